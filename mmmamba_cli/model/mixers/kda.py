"""Kimi delta attention in place of attention (Kimi Team, arXiv 2510.26692).

W_Q, W_K and W_V are the teacher's; the decay of each key channel and the write strength beta are
new. Legend as in `gated_mixer`.
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


@register_mixer("kda")
class KimiDelta(DeltaMixer):
    """The delta rule with a decay per key channel, (B, T, D) -> (B, T, D).

    gamma_t = exp(-dt_t exp(A_log)) with dt = softplus(W_up W_down x + dt_bias), (B, T, H, P).
    """

    # W_up, which reads the output of W_down, is not one of them.
    input_projections: ClassVar[tuple[str, ...]] = (
        "v_proj",
        "k_proj",
        "q_proj",
        "g_proj",
        "dt_down_proj",
        "beta_proj",
    )

    def add_decay(self, hidden_size: int, stack: StackConfig) -> None:
        width = stack.head_dim
        self.dt_down_proj = nn.Linear(hidden_size, width, bias=False)
        self.dt_up_proj = nn.Linear(width, stack.num_heads * width, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(stack.num_heads, width))

    def log_decay(self, hidden: Tensor) -> Tensor:
        dt = upcast(self.dt_up_proj(self.dt_down_proj(hidden)))
        dt = F.softplus(dt.unflatten(-1, (self.num_heads, -1)) + self.dt_bias)
        return -torch.exp(self.A_log).unsqueeze(-1) * dt

    def max_log_decay(self, input_gain: Tensor) -> Tensor:
        """-exp(A_log) softplus(dt_bias - sqrt(D) |W_up W_down g|), (H, P)."""
        rows = upcast(self.dt_up_proj.weight) @ upcast(self.dt_down_proj.weight)
        reach = self.projection_reach(rows, input_gain).unflatten(0, (self.num_heads, -1))
        return -torch.exp(self.A_log).unsqueeze(-1) * F.softplus(self.dt_bias - reach)

    @staticmethod
    def initial_value(
        name: str, shape: tuple[int, ...], mimic: bool, rng: torch.Generator
    ) -> Tensor:
        """See `Mixer.initial_value`. All channels of a head begin with the same decay."""
        if name == "dt_bias":
            return DeltaMixer.initial_value(name, shape[:1], mimic, rng)[:, None].repeat(
                1, shape[1]
            )
        return DeltaMixer.initial_value(name, shape, mimic, rng)
