"""Sliding-window attention over packed weights and a state at fixed addresses.

Legend: B batch, H query heads, K key/value heads, P head dim, D hidden size, W window, F first
tokens (`sinks`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmmamba_cli.inference.packed_mixer import (
    ChunkPadding,
    PackedProjection,
    QKNorm,
    TokenInfo,
    normalize_qk,
    packed_qk_norm,
)
from mmmamba_cli.inference.recurrent_cache import ModuleRecurrentCache
from mmmamba_cli.model.mixers.window import Window
from mmmamba_cli.model.rope import apply_rope
from mmmamba_cli.ops import window_step
from mmmamba_cli.ops.projection import project


@dataclass(frozen=True)
class WindowCache:
    """Keys and values of a window and its first tokens, (B, K, F + W, P) each.

    Their tokens are counted by the position of the stack (`TokenInfo`).
    """

    keys: Tensor
    values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.keys, self.values)

    def finish_prefill(self, length: int) -> None:
        """Do nothing: the module leaves the state as a step reads it."""

    def module_layer(self) -> ModuleRecurrentCache:
        """See `LayerCache`."""
        return ModuleRecurrentCache(self.keys, self.values)


@dataclass(frozen=True)
class PackedWindow:
    """A window mixer; `inputs` is [q|k|v]. See `PackedMixer`."""

    inputs: PackedProjection
    output: PackedProjection
    qk_norm: QKNorm | None
    sink_logits: Tensor | None
    window: int
    sinks: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: bool = True
    grows: bool = False
    chunks: bool = False
    # Padding on the right would push real tokens out of the window.
    right_padding: bool = False

    def empty_cache(self, like: Tensor, batch: int, capacity: int) -> WindowCache:
        shape = (batch, self.kv_heads, self.sinks + self.window, self.head_dim)
        return WindowCache(like.new_zeros(shape), like.new_zeros(shape))

    def step(self, cache: WindowCache, inputs: Tensor, hidden: Tensor, token: TokenInfo) -> Tensor:
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim))
            for part in inputs.split((width, kv_width, kv_width), dim=-1)
        )
        q, k = normalize_qk(self.qk_norm, q, k)
        assert token.cos is not None and token.sin is not None
        cos, sin = token.cos.unsqueeze(1), token.sin.unsqueeze(1)
        q, k = (apply_rope(x.unsqueeze(1), cos, sin).squeeze(1) for x in (q, k))
        y = window_step(
            q,
            k,
            v,
            cache.keys,
            cache.values,
            # Padding is on the left, so the columns behind it are the tokens of a row.
            token.column - token.starts,
            sinks=self.sinks,
            sink_logits=self.sink_logits,
        )
        return project(
            y,
            self.output.weight,
            **self.output.options,
            residual=hidden,
            out=hidden,
            backend=token.backend,
        )

    def chunk(
        self,
        cache: WindowCache,
        rows: Tensor,
        batch: int,
        mask: Tensor | None,
        padding: ChunkPadding | None,
    ) -> Tensor:
        """Raise `TypeError`: a window needs positions, so its module reads prompts."""
        raise TypeError("sliding-window attention reads prompts by its module")


def pack(mixer: Window, inputs: PackedProjection, output: PackedProjection) -> PackedWindow:
    """See `pack_mixer`."""
    logits = mixer.sink_logits
    return PackedWindow(
        inputs,
        output,
        qk_norm=packed_qk_norm(mixer.q_norm, mixer.k_norm),
        sink_logits=None if logits is None else logits.detach(),
        window=mixer.window,
        sinks=mixer.sinks,
        heads=mixer.num_heads,
        kv_heads=mixer.num_kv_heads,
        head_dim=mixer.head_dim,
    )
