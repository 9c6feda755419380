"""Base of the mixers with a delta rule: what the state holds for a key is replaced, not added to.

Legend: B batch, T tokens, D hidden size, H query heads, P head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization

from mmmamba_cli.architecture import MixerConfig, StackConfig
from mmmamba_cli.model.gated_mixer import GatedMixer, initial_gated_value
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.ops import delta_rule, delta_rule_matrix
from mmmamba_cli.ops.backends import upcast


class DeltaMixer(GatedMixer):
    """A mixer with a decay, of a head or of a key channel, and a write strength beta of a head.

    S~_t = S_{t-1} diag(gamma_t), u_t = beta_t (v_t - S~_t k_t), S_t = S~_t + u_t k_t^T and
    y_t = S_t q_t / sqrt(P), with q and k over their 2-norm and beta = sigmoid(x W_beta + beta_bias)
    (arXiv 2412.06464, equation 10). A subclass adds the decay in `add_decay` and computes it.
    """

    def add_gates(self, hidden_size: int, stack: StackConfig, options: MixerConfig) -> None:
        self.A_log = nn.Parameter(torch.ones(stack.num_heads))
        self.add_decay(hidden_size, stack)
        self.beta_proj = nn.Linear(hidden_size, stack.num_heads, bias=False)
        self.beta_bias = nn.Parameter(torch.zeros(stack.num_heads))

    def add_decay(self, hidden_size: int, stack: StackConfig) -> None:
        """Add the projections of the decay and `dt_bias`."""
        raise NotImplementedError

    def beta(self, hidden: Tensor) -> Tensor:
        """The write strength, (B, T, H) in fp32."""
        return torch.sigmoid(upcast(self.beta_proj(hidden)) + self.beta_bias)

    def write_strength(self, hidden: Tensor) -> Tensor:
        """beta; keys have norm 1."""
        return self.beta(hidden)

    def scan(
        self,
        v: Tensor,
        k: Tensor,
        q: Tensor,
        hidden: Tensor,
        layout: SequenceLayout,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The delta rule (`ops.delta_rule`)."""
        return delta_rule(
            v,
            k,
            q,
            self.log_decay(hidden),
            self.beta(hidden),
            qk_l2_norm=True,
            initial_state=state,
            mask=layout.mask,
            seq_idx=layout.seq_idx,
        )

    def mixing_matrix(self, hidden: Tensor, layout: SequenceLayout) -> Tensor:
        """(Q K^T o G) (I + L)^-1 diag(beta) / sqrt(P); see `ops.delta_rule_matrix`."""
        _, k, q, _ = self.values_keys_queries(hidden, layout)
        return delta_rule_matrix(
            k,
            q,
            self.log_decay(hidden),
            self.beta(hidden),
            qk_l2_norm=True,
            mask=layout.mask,
            seq_idx=layout.seq_idx,
        )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        initialization.ones_(self.A_log)
        initialization.zeros_(self.dt_bias)
        initialization.zeros_(self.beta_bias)

    @staticmethod
    def initial_value(
        name: str, shape: tuple[int, ...], mimic: bool, rng: torch.Generator
    ) -> Tensor:
        """See `Mixer.initial_value`. beta begins at 1/2 for every token to mimic attention."""
        if name == "beta_bias":
            return torch.zeros(shape)
        return initial_gated_value(name, shape, mimic, rng)
