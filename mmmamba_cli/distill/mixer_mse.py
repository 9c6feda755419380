"""Stages 1 and 2: the student's mixer imitates the teacher's attention, layer by layer.

Mean squared error between the mixers' outputs, both before W_O (mmMamba, arXiv 2502.13145).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.distill.layerwise import MIX_PARAMETERS, Layer
from mmmamba_cli.model.block import Block
from mmmamba_cli.ops.common import widened


@dataclass(frozen=True)
class MixerMSE:
    """A `LayerLoss`: mean over the elements of (B, T, H * P)."""

    reached: tuple[str, ...] = MIX_PARAMETERS
    reached_in_part: tuple[str, ...] = ()

    def units(self, block: Block) -> int:
        return block.mixer.num_heads * block.mixer.head_dim

    def __call__(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            taught = layer.teacher.mixer.mix(layer.normed, layer.columns)
        learned = layer.student.mixer.mix(layer.normed, layer.columns)
        difference = widened(learned) - widened(taught)
        return layer.masked_sum(difference.square()), taught, learned
