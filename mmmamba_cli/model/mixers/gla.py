"""Gated linear attention in place of attention (Yang et al., arXiv 2312.06635).

W_Q, W_K and W_V are the teacher's; the decay of each key channel is new. Legend as in
`gated_mixer`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from mmmamba_cli.architecture import MixerConfig, StackConfig
from mmmamba_cli.architecture.mixers.gla import DECAY_RANK
from mmmamba_cli.model.gated_mixer import GatedMixer, dt_bias, initial_gated_value
from mmmamba_cli.model.mixer import register_mixer
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops import gla, gla_matrix
from mmmamba_cli.ops.backends import upcast

# The logarithm of a decay is that of a sigmoid over this.
DECAY_TEMPERATURE = 16


@register_mixer("gla")
class GatedLinearAttention(GatedMixer):
    """Linear attention with a decay per key channel, (B, T, D) -> (B, T, D).

    S_t = S_{t-1} diag(gamma_t) + v_t k_t^T and y_t = S_t q_t / sqrt(P), with
    log gamma = logsigmoid(W_up W_down x + decay_bias) / 16.
    """

    # W_up, which reads the output of W_down, is not one of them.
    input_projections: ClassVar[tuple[str, ...]] = (
        "v_proj",
        "k_proj",
        "q_proj",
        "g_proj",
        "decay_down_proj",
    )

    def add_gates(self, hidden_size: int, stack: StackConfig, options: MixerConfig) -> None:
        heads, width = stack.num_heads, stack.head_dim
        self.decay_down_proj = nn.Linear(hidden_size, DECAY_RANK, bias=False)
        self.decay_up_proj = nn.Linear(DECAY_RANK, heads * width, bias=False)
        self.decay_bias = nn.Parameter(torch.zeros(heads, width))

    def log_decay(self, hidden: Tensor) -> Tensor:
        """log gamma, (B, T, H, P) in fp32."""
        raw = upcast(self.decay_up_proj(self.decay_down_proj(hidden)))
        raw = raw.unflatten(-1, (self.num_heads, -1)) + self.decay_bias
        return F.logsigmoid(raw) / DECAY_TEMPERATURE

    def max_log_decay(self, input_gain: Tensor) -> Tensor:
        """logsigmoid(decay_bias + sqrt(D) |W_up W_down g|) / 16, (H, P)."""
        rows = upcast(self.decay_up_proj.weight) @ upcast(self.decay_down_proj.weight)
        reach = self.projection_reach(rows, input_gain).unflatten(0, (self.num_heads, -1))
        return F.logsigmoid(self.decay_bias + reach) / DECAY_TEMPERATURE

    def scan(
        self,
        v: Tensor,
        k: Tensor,
        q: Tensor,
        hidden: Tensor,
        layout: SequenceLayout,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Gated linear attention (`ops.gla`)."""
        return gla(
            v,
            k,
            q,
            self.log_decay(hidden),
            initial_state=state,
            mask=layout.mask,
            seq_idx=layout.seq_idx,
        )

    def mixing_matrix(self, hidden: Tensor, layout: SequenceLayout) -> Tensor:
        """Products of queries and decayed keys, (B, H, T, T) fp32; see `ops.gla_matrix`."""
        _, k, q, _ = self.values_keys_queries(hidden, layout)
        decay = self.log_decay(hidden)
        return gla_matrix(k, q, decay, mask=layout.mask, seq_idx=layout.seq_idx)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        initialization.zeros_(self.decay_bias)

    @staticmethod
    def initial_value(
        name: str, shape: tuple[int, ...], mimic: bool, rng: torch.Generator
    ) -> Tensor:
        """See `Mixer.initial_value`. To mimic attention, heads decay as with `A_log` 1."""
        if name == "decay_bias" and not mimic:
            return torch.zeros(shape)
        if name == "decay_bias":
            # gamma = exp(-dt exp(A_log)) with `A_log` 1, solved for the bias.
            decay = torch.e * DECAY_TEMPERATURE * F.softplus(dt_bias(shape[:1], rng))
            return -torch.log(torch.expm1(decay))[:, None].repeat(1, shape[1])
        return initial_gated_value(name, shape, mimic, rng)
