"""Gated DeltaNet mixer that replaces attention (Yang et al., arXiv 2412.06464).

W_Q, W_K and W_V are the teacher's; the decay and the write strength beta are new. Legend as in
`gated_mixer`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba_cli.architecture import StackConfig
from mmmamba_cli.model.delta_mixer import DeltaMixer
from mmmamba_cli.model.mixer import register_mixer
from mmmamba_cli.ops.backends import upcast


@register_mixer("gated_delta")
class GatedDelta(DeltaMixer):
    """The delta rule with one decay per head, (B, T, D) -> (B, T, D).

    gamma_t = exp(-dt_t exp(A_log)) with dt = softplus(x W_dt + dt_bias).
    """

    input_projections: ClassVar[tuple[str, ...]] = (
        "v_proj",
        "k_proj",
        "q_proj",
        "g_proj",
        "dt_proj",
        "beta_proj",
    )

    def add_decay(self, hidden_size: int, stack: StackConfig) -> None:
        self.dt_proj = nn.Linear(hidden_size, stack.num_heads, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(stack.num_heads))

    def log_decay(self, hidden: Tensor) -> Tensor:
        return -torch.exp(self.A_log) * F.softplus(upcast(self.dt_proj(hidden)) + self.dt_bias)

    def max_log_decay(self, input_gain: Tensor) -> Tensor:
        """-exp(A_log) softplus(dt_bias - sqrt(D) |w_dt * g|), (H,)."""
        raw = self.dt_bias - self.projection_reach(self.dt_proj.weight, input_gain)
        return -torch.exp(self.A_log) * F.softplus(raw)
