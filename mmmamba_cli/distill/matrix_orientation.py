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
    """A `LayerLoss`: mean over tokens and heads of the squared distance of matrix rows.

    A mixing matrix is made of queries, keys and the decay. Neither the values nor what follows the
    read-out are in it: W_V, the gate, the gated norm, D, and the convolution's channels of values.
    """

    reached: tuple[str, ...] = (
        "mixer.q_proj",
        "mixer.k_proj",
        "mixer.dt_proj",
        "mixer.conv1d",
        "mixer.A_log",
        "mixer.dt_bias",
        "mixer.q_norm",
        "mixer.k_norm",
    )
    reached_in_part: tuple[str, ...] = ("mixer.conv1d",)

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
