"""Attention over packed weights and a KV cache at fixed addresses.

Legend: B batch, H query heads, K key/value heads, P head dim, S capacity in columns.
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
from mmmamba_cli.model.mixers.attention import Attention
from mmmamba_cli.ops.decode import attention_step
from mmmamba_cli.ops.projection import project


@dataclass(frozen=True)
class KVCache:
    """Keys and values of an attention layer, (B, K, S, P) each."""

    keys: Tensor
    values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.keys, self.values)

    def finish_prefill(self, length: int) -> None:
        """Do nothing: the columns lie where a step reads them."""

    def module_layer(self) -> ModuleKVCache:
        """See `LayerCache`."""
        return ModuleKVCache(self)


class ModuleKVCache:
    """A `KVCache` during prefill, with the interface of transformers' cache layers."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.length = 0

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, K, T, P); returns all columns so far."""
        begin, self.length = self.length, self.length + keys.shape[2]
        self.cache.keys[:, :, begin : self.length].copy_(keys)
        self.cache.values[:, :, begin : self.length].copy_(values)
        return self.cache.keys[:, :, : self.length], self.cache.values[:, :, : self.length]


@dataclass(frozen=True)
class PackedAttention:
    """An attention mixer; `inputs` is [q|k|v]. See `PackedMixer`."""

    inputs: PackedProjection
    output: PackedProjection
    qk_norm: QKNorm | None
    heads: int
    kv_heads: int
    head_dim: int
    rope: bool = True
    grows: bool = True
    chunks: bool = False
    # Causal attention never sees the padding, and the next tokens' columns overwrite it.
    right_padding: bool = True

    def empty_cache(self, like: Tensor, batch: int, capacity: int) -> KVCache:
        shape = (batch, self.kv_heads, capacity, self.head_dim)
        return KVCache(like.new_zeros(shape), like.new_zeros(shape))

    def step(self, cache: KVCache, inputs: Tensor, hidden: Tensor, token: TokenInfo) -> Tensor:
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim))
            for part in inputs.split((width, kv_width, kv_width), dim=-1)
        )
        q, k = normalize_qk(self.qk_norm, q, k)
        assert token.cos is not None and token.sin is not None
        y = attention_step(
            q,
            k,
            v,
            cache.keys,
            cache.values,
            token.column,
            token.starts,
            token.cos,
            token.sin,
            backend=token.backend,
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
        cache: KVCache,
        rows: Tensor,
        batch: int,
        mask: Tensor | None,
        padding: ChunkPadding | None,
    ) -> Tensor:
        """Raise `TypeError`: attention needs positions, so its module reads prompts."""
        raise TypeError("attention reads prompts by its module")


def pack(mixer: Attention, inputs: PackedProjection, output: PackedProjection) -> PackedAttention:
    """See `pack_mixer`."""
    qk_norm = packed_qk_norm(mixer.q_norm, mixer.k_norm)
    shape = (mixer.num_heads, mixer.num_kv_heads, mixer.head_dim)
    return PackedAttention(inputs, output, qk_norm, *shape)
