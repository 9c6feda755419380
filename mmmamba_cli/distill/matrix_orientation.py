"""Matrix orientation: the mixing matrices of student and teacher, for short sequences.

The first step of MOHAWK (Bick et al., arXiv 2408.10189): the squared Frobenius distance of the two
T x T matrices of a head, here per row, so that sequences of unequal length weigh by their tokens.
Memory grows with T^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.distill.layerwise import Layer
from mmmamba_cli.model.block import Block


@dataclass(frozen=True)
class MatrixOrientation:
    """A `LayerLoss`: mean over tokens and heads of the squared distance of matrix rows."""

    def units(self, block: Block) -> int:
        return block.mixer.num_heads

    def __call__(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            taught = layer.teacher.mixer.mix(layer.normed, layer.columns)
            learned = layer.student.mixer.mix(layer.normed, layer.columns)
            expected = layer.teacher.mixer.mixing_matrix(layer.normed, layer.columns)
        actual = layer.student.mixer.mixing_matrix(layer.normed, layer.columns)
        rows = (actual - expected).square().sum(-1).transpose(1, 2)
        return layer.masked_sum(rows), taught, learned
