"""One block of either stack: norm, mixer, norm, SwiGLU, each with a residual connection."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from mmmamba_cli.model.config import HolisticVLMConfig
from mmmamba_cli.model.mixer import Mixer, mixer_class
from mmmamba_cli.model.norm import RMSNorm
from mmmamba_cli.model.sequence_layout import SequenceLayout


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(GradientCheckpointingLayer):
    """Layer `layer_idx`, counted through both stacks, (B, T, D) -> (B, T, D).

    transformers enables activation checkpointing by the class `GradientCheckpointingLayer`.
    """

    def __init__(self, config: HolisticVLMConfig, layer_idx: int):
        super().__init__()
        stack = config.stack_of(layer_idx)
        self.mixer_norm = RMSNorm(config.hidden_size, stack.rms_norm_eps)
        self.mixer: Mixer = mixer_class(config.mixer_names[layer_idx])(config, layer_idx)
        self.mlp_norm = RMSNorm(config.hidden_size, stack.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, stack.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """Apply the layer; an attention layer appends its softmax to `weights`."""
        mixed = self.mixer(self.mixer_norm(hidden), layout, cache, weights)
        return self.after_mixer(hidden, mixed)

    def after_mixer(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """Add `mixed` to the residual stream and apply the MLP.

        `mixed` (B, T, D) is the mixer's output after W_O. Layer-local training runs the mixer
        itself and continues here.
        """
        hidden = hidden + mixed
        return hidden + self.mlp(self.mlp_norm(hidden))
