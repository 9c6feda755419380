"""Mamba-2 mixer that replaces attention (mmMamba, arXiv 2502.13145, section 3).

W_Q -> C, W_K -> B, W_V -> x; the decay and input step dt are new. Legend as in `gated_mixer`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from mmmamba_cli.architecture import MixerConfig, StackConfig
from mmmamba_cli.model.gated_mixer import GatedMixer, initial_gated_value
from mmmamba_cli.model.mixer import query_key_products, register_mixer
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops import ssd
from mmmamba_cli.ops.backends import repeat_heads, upcast

# Without the input step, values are divided by the step, whose square must not underflow in the
# gradient. A smaller step decays nothing in fp32.
MIN_STEP = 1e-12


@register_mixer("mamba2")
class Mamba2(GatedMixer):
    """Selective state-space mixer, (B, T, D) -> (B, T, D).

    S_t = exp(-dt_t exp(A_log)) S_{t-1} + dt_t v_t k_t^T and y_t = S_t q_t, with
    dt = softplus(x W_dt + dt_bias). Without `input_step` it is simple gated linear attention:
    S_t = exp(-dt_t exp(A_log)) S_{t-1} + v_t k_t^T and y_t = S_t q_t / sqrt(P).
    """

    input_projections: ClassVar[tuple[str, ...]] = (
        "v_proj",
        "k_proj",
        "q_proj",
        "g_proj",
        "dt_proj",
    )

    def add_gates(self, hidden_size: int, stack: StackConfig, options: MixerConfig) -> None:
        self.input_step = options.input_step
        self.dt_proj = nn.Linear(hidden_size, stack.num_heads, bias=False)
        self.A_log = nn.Parameter(torch.ones(stack.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(stack.num_heads))
        self.D = nn.Parameter(torch.zeros(stack.num_heads)) if options.d_skip else None

    def scan(
        self,
        v: Tensor,
        k: Tensor,
        q: Tensor,
        hidden: Tensor,
        layout: SequenceLayout,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The SSD scan (`ops.ssd`)."""
        rates = -torch.exp(self.A_log)
        if not self.input_step:
            dt = self.step_sizes(hidden)
            groups = self.num_heads // self.num_kv_heads
            # The scan multiplies by the step again.
            values = repeat_heads(upcast(v), groups) / dt.unsqueeze(-1)
            y, state = ssd(
                values,
                dt,
                rates,
                repeat_heads(k, groups),
                upcast(q) / math.sqrt(self.head_dim),
                initial_state=state,
                mask=layout.mask,
                seq_idx=layout.seq_idx,
            )
            if self.D is not None:
                y = y + self.D.unsqueeze(-1) * repeat_heads(v, groups)
            return y.to(v.dtype), state
        return ssd(
            v,
            self.dt_proj(hidden),
            rates,
            k,
            q,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            D=self.D,
            initial_state=state,
            mask=layout.mask,
            seq_idx=layout.seq_idx,
        )

    def step_sizes(self, hidden: Tensor) -> Tensor:
        """dt, (B, T, H) in fp32."""
        return self._limited(F.softplus(upcast(self.dt_proj(hidden)) + self.dt_bias))

    def _limited(self, dt: Tensor) -> Tensor:
        return dt if self.input_step else dt.clamp(min=MIN_STEP)

    def log_decay(self, hidden: Tensor) -> Tensor:
        """-dt exp(A_log), (B, T, H)."""
        return -torch.exp(self.A_log) * self.step_sizes(hidden)

    def max_log_decay(self, input_gain: Tensor) -> Tensor:
        """-exp(A_log) softplus(dt_bias - sqrt(D) |w_dt * g|), (H,)."""
        raw = self.dt_bias - self.projection_reach(self.dt_proj.weight, input_gain)
        return -torch.exp(self.A_log) * self._limited(F.softplus(raw))

    def write_strength(self, hidden: Tensor) -> Tensor:
        """dt, or 1 without the input step."""
        dt = self.step_sizes(hidden)
        return dt if self.input_step else torch.ones_like(dt)

    def mixing_matrix(self, hidden: Tensor, layout: SequenceLayout) -> Tensor:
        """Matrix that maps values to read-outs, (B, H, T, T) fp32 (arXiv 2405.21060, section 4).

        (q_t . k_s) exp(sum_{s < r <= t} dt_r A) dt_s, and 0 at masked keys.
        """
        _, k, q, _ = self.values_keys_queries(hidden, layout)
        dt = self.step_sizes(hidden).transpose(1, 2)
        if layout.mask is not None:
            # Padding neither writes to the state nor decays it.
            dt = dt * layout.mask.unsqueeze(1)
        decay = (dt * -torch.exp(self.A_log).unsqueeze(-1)).cumsum(-1)
        passed = decay.unsqueeze(-1) - decay.unsqueeze(-2)
        passed = passed.masked_fill(~layout.visible_keys(), -math.inf).exp()
        products = query_key_products(upcast(q), upcast(k)) * passed
        if self.input_step:
            return products * dt.unsqueeze(-2)
        if layout.mask is not None:
            products = products * layout.mask[:, None, None, :]
        return products / math.sqrt(self.head_dim)

    @staticmethod
    def constant_decay(rates: Tensor, steps: Tensor) -> dict[str, Tensor]:
        """Parameters, fp32, with which every token has the step size and the decay of its head.

        `rates` (H,) are dt exp(A_log) > 0 and `steps` (H,) are dt > 0, both fp64; `dt_proj` is 0.
        """
        bias = steps + torch.log(-torch.expm1(-steps))
        return {"A_log": torch.log(rates / steps).float(), "dt_bias": bias.float()}

    def reset_parameters(self) -> None:
        super().reset_parameters()
        initialization.ones_(self.A_log)
        initialization.zeros_(self.dt_bias)
        if self.D is not None:
            initialization.zeros_(self.D)

    @staticmethod
    def initial_value(
        name: str, shape: tuple[int, ...], mimic: bool, rng: torch.Generator
    ) -> Tensor:
        """See `Mixer.initial_value`; mmMamba (arXiv 2502.13145, section 3.2) and Mamba-2."""
        if name == "D":
            return torch.zeros(shape) if mimic else torch.ones(shape)
        return initial_gated_value(name, shape, mimic, rng)
