"""Hidden-state alignment: outputs of whole layers, student against teacher.

The second step of MOHAWK (Bick et al., arXiv 2408.10189), as a mean squared error over elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.distill.layerwise import MIX_PARAMETERS, Layer
from mmmamba_cli.model.block import Block
from mmmamba_cli.ops.common import widened


@dataclass(frozen=True)
class HiddenAlignment:
    """A `LayerLoss`: mean over the elements of (B, T, D), residual connections and MLP included.

    The norm before the mixer makes the hidden state that both mixers read, and gets no gradient.
    """

    reached: tuple[str, ...] = (*MIX_PARAMETERS, "mixer.o_proj", "mlp_norm", "mlp")
    reached_in_part: tuple[str, ...] = ()

    def units(self, block: Block) -> int:
        return block.mixer.o_proj.out_features

    def __call__(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        teacher, student = layer.teacher, layer.student
        with torch.no_grad():
            taught = teacher.mixer.mix(layer.normed, layer.columns)
            expected = teacher.finish(layer.hidden, teacher.mixer.o_proj(taught))
        learned = student.mixer.mix(layer.normed, layer.columns)
        actual = student.finish(layer.hidden, student.mixer.o_proj(learned))
        difference = widened(actual) - widened(expected)
        return layer.masked_sum(difference.square()), taught, learned
