"""Attention to a sliding window and to attention sinks in place of attention to all keys.

All projections are the teacher's. Sinks are the first tokens (StreamingLLM, Xiao et al., arXiv
2309.17453) or a learned logit per head in the softmax's denominator (gpt-oss, OpenAI, arXiv
2508.10925). Legend: B batch, T tokens, S columns before this call, H query heads, K key/value
heads, P head dim, D hidden size, W window, F first tokens (`sinks`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Cache, initialization

from mmmamba_cli.architecture import MixerShape
from mmmamba_cli.model.cache import read_ssm_state, write_ssm_state
from mmmamba_cli.model.mixer import register_mixer
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.model.softmax_mixer import SoftmaxMixer
from mmmamba_cli.ops import window_attention, window_matrix
from mmmamba_cli.ops.window import WindowState, window_state

# A logit of -inf would give exactly the teacher's attention, but never get a gradient. At -8 a sink
# has exp(-8) = 3e-4 of the weight of a key with score 0.
NEGLIGIBLE_LOGIT = -8.0


@register_mixer("window")
class Window(SoftmaxMixer):
    """Attention to the last W and the first F tokens, (B, T, D) -> (B, T, D).

    The state has the keys, stored as the conv state, and the values, (B, K, F + W, P) each; see
    `ops.window.WindowState`. While all columns fit the window, the output is that of attention to
    all keys, bit for bit.
    """

    def __init__(self, config: MixerShape, layer_idx: int):
        super().__init__(config, layer_idx)
        options = config.mixer_config
        self.window, self.sinks = options.window, options.sinks
        logits = torch.zeros(self.num_heads)
        self.sink_logits = nn.Parameter(logits) if options.sink_logits else None

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """Apply the mixer. `weights` is ignored: it collects the softmax of attention layers."""
        return self.o_proj(self.mix(hidden, layout, cache))

    def mix(self, hidden: Tensor, layout: SequenceLayout, cache: Cache | None = None) -> Tensor:
        """Compute the attention before W_O, (B, T, H * P)."""
        q, k, v = (x.transpose(1, 2) for x in self.queries_keys_values(hidden, layout))
        past = self._past(cache, layout, len(hidden))
        if self._sees_all_columns(layout):
            y = self.attend(q, *self._all_columns(k, v, past, layout), layout)
        else:
            y = window_attention(
                q,
                k,
                v,
                window=self.window,
                sinks=self.sinks,
                sink_logits=self.sink_logits,
                past_keys=None if past is None else past.keys,
                past_values=None if past is None else past.values,
                past_counts=None if past is None else past.counts,
                mask=layout.mask,
                seq_idx=layout.seq_idx,
                backend=self.backend,
            )
        if cache is not None:
            state = window_state(
                k,
                v,
                window=self.window,
                sinks=self.sinks,
                past_keys=None if past is None else past.keys,
                past_values=None if past is None else past.values,
                past_counts=None if past is None else past.counts,
                mask=layout.mask,
            )
            write_ssm_state(cache, self.layer_idx, state.keys, state.values)
        return y.transpose(1, 2).flatten(2)

    def empty_states(self, batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, F + W, P) in the dtype of `like`."""
        shape = (batch, self.num_kv_heads, self.sinks + self.window, self.head_dim)
        return like.new_zeros(shape), like.new_zeros(shape)

    def mixing_matrix(self, hidden: Tensor, layout: SequenceLayout) -> Tensor:
        """The softmax over the window and the first tokens, (B, H, T, T) fp32.

        With sink logits its rows sum to less than 1.
        """
        q, k, _ = (x.transpose(1, 2) for x in self.queries_keys_values(hidden, layout))
        return window_matrix(
            q,
            k,
            window=self.window,
            sinks=self.sinks,
            sink_logits=self.sink_logits,
            mask=layout.mask,
            seq_idx=layout.seq_idx,
        )

    def reset_parameters(self) -> None:
        if self.sink_logits is not None:
            initialization.zeros_(self.sink_logits)

    @staticmethod
    def initial_value(
        name: str, shape: tuple[int, ...], mimic: bool, rng: torch.Generator
    ) -> Tensor:
        """See `Mixer.initial_value`. To mimic attention, a sink begins with a negligible share."""
        if name != "sink_logits":
            raise KeyError(name)
        return torch.full(shape, NEGLIGIBLE_LOGIT if mimic else 0.0)

    def _sees_all_columns(self, layout: SequenceLayout) -> bool:
        """Whether every query sees all keys up to its own, as attention does."""
        return self.sink_logits is None and layout.past + layout.length <= self.window

    def _past(self, cache: Cache | None, layout: SequenceLayout, batch: int) -> WindowState | None:
        """The state before this call; None before the first one.

        The cache holds no counts: the layout knows the real tokens among the columns so far.
        """
        keys, values = read_ssm_state(cache, self.layer_idx)
        if keys is None or values is None:
            return None
        if layout.key_mask is None:
            counts = torch.full((batch,), layout.past, device=keys.device)
        else:
            counts = layout.key_mask[:, : layout.past].sum(1)
        return WindowState(keys, values, counts)

    def _all_columns(
        self, k: Tensor, v: Tensor, past: WindowState | None, layout: SequenceLayout
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, S + T, P) of all columns, as the cache of attention has them.

        The state has real tokens only; padding has the key of another token, which no real query
        sees.
        """
        if past is None:
            return k, v
        columns = torch.arange(layout.past, device=k.device).unsqueeze(0)
        if layout.key_mask is not None:
            columns = (layout.key_mask[:, : layout.past].cumsum(1) - 1).clamp(min=0)
        slots = (self.sinks + columns)[:, None, :, None]
        return (
            torch.cat((past.keys.take_along_dim(slots, dim=2), k), dim=2),
            torch.cat((past.values.take_along_dim(slots, dim=2), v), dim=2),
        )
