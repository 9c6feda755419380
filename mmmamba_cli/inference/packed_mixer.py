"""The interface of a mixer over packed weights, and what its steps share.

Legend: B batch, T columns of a chunk, D hidden size, H query heads, K key/value heads, P head dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from torch import Tensor

from mmmamba_cli.inference.quantization import Int8Linear, packed_int8
from mmmamba_cli.inference.weight_packing import packed_bias, packed_view
from mmmamba_cli.model.mixer import Mixer
from mmmamba_cli.model.norm import RMSNorm
from mmmamba_cli.ops import rms_norm
from mmmamba_cli.ops.projection import Int8Weight

Weight = Tensor | Int8Weight


class ProjectOptions(TypedDict):
    """Keyword arguments of `ops.project` that are the same for every call of a projection."""

    bias: Tensor | None
    norm: Tensor | None
    norm_dim: int | None
    eps: float


@dataclass(frozen=True)
class PackedProjection:
    """A packed weight, its bias and the RMSNorm in front of it.

    `options` has `norm_dim` in place of `norm` where `quantize` folded the norm's weight into the
    projection, and neither where there is no norm.
    """

    weight: Weight
    options: ProjectOptions


def packed_projection(layers: Sequence[Any], norm: RMSNorm | None = None) -> PackedProjection:
    """Layers that are packed together, or a single one, and the norm in front of them."""
    options = ProjectOptions(bias=packed_bias(layers), norm=None, norm_dim=None, eps=0.0)
    is_int8 = isinstance(layers[0], Int8Linear)
    if norm is not None:
        options["norm"], options["eps"] = norm.weight.detach(), norm.eps
        # `quantize` leaves norm weights of ones; a step need not read them.
        if is_int8 and bool((norm.weight == 1).all()):
            options["norm"], options["norm_dim"] = None, len(norm.weight)
    if is_int8:
        return PackedProjection(packed_int8(layers), options)
    weight = packed_view([layer.weight for layer in layers])
    assert weight is not None, "the layers are packed"
    return PackedProjection(weight, options)


@dataclass(frozen=True)
class QKNorm:
    """Weights (P,) of the RMSNorms on each head of q and of k, and their epsilon."""

    q: Tensor
    k: Tensor
    eps: float


def packed_qk_norm(q: RMSNorm | None, k: RMSNorm | None) -> QKNorm | None:
    """The norms on q and k of a mixer; None if it has none."""
    if q is None or k is None:
        return None
    return QKNorm(q.weight.detach(), k.weight.detach(), q.eps)


def normalize_qk(norm: QKNorm | None, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k (B, heads, P) after their norms, if there are any."""
    if norm is None:
        return q, k
    return rms_norm(q, norm.q, norm.eps), rms_norm(k, norm.k, norm.eps)


@dataclass(frozen=True)
class TokenInfo:
    """Inputs of a step that all layers of a stack share.

    Attributes:
        column: (1,) int64, the token's column in the cache.
        starts: (B,) int64, the first column of each row that is not padding.
        cos, sin: (B, P), the token's RoPE rotation; None for stacks without RoPE.
        backend: backend of the ops.
    """

    column: Tensor
    starts: Tensor
    cos: Tensor | None
    sin: Tensor | None
    backend: str


@dataclass(frozen=True)
class ChunkPadding:
    """Padding mask of a chunk: left padding, or right padding after `length` columns.

    `columns` is (B or 1, T, 1) bool, True for padding; `length` is (1,) int64.
    """

    columns: Tensor
    length: Tensor | None = None


class LayerCache(Protocol):
    """The decoding state of one layer, at fixed addresses."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, with the batch first; only keys and values have columns, third."""
        ...

    def finish_prefill(self, length: int) -> None:
        """Prepare for decoding after the model's modules or chunks have read `length` columns."""
        ...

    def module_layer(self) -> Any:
        """The cache with the interface of transformers' cache layers, for the model's modules."""
        ...


class PackedMixer(Protocol):
    """A mixer over packed weights, made by `pack` of its module in `inference.mixers`.

    Attributes:
        inputs, output: projections of the mixer's input, and W_O.
        rope: whether a step needs the token's RoPE rotation.
        grows: whether the cache grows with the text.
        chunks: whether `chunk` runs prompts over the packed weights, without positions. Otherwise
            the model's modules do.
        right_padding: whether a prompt may be padded on the right: the padding changes nothing that
            later tokens read.
    """

    @property
    def inputs(self) -> PackedProjection: ...
    @property
    def output(self) -> PackedProjection: ...
    @property
    def rope(self) -> bool: ...
    @property
    def grows(self) -> bool: ...
    @property
    def chunks(self) -> bool: ...
    @property
    def right_padding(self) -> bool: ...

    def empty_cache(self, like: Tensor, batch: int, capacity: int) -> LayerCache:
        """A zeroed cache of `capacity` columns on the device and in the dtype of `like`."""
        ...

    def step(self, cache: Any, inputs: Tensor, hidden: Tensor, token: TokenInfo) -> Tensor:
        """From the packed projection of the token (B, ...) to hidden (B, D) after W_O.

        The residual sum is written into `hidden`.
        """
        ...

    def chunk(
        self,
        cache: Any,
        rows: Tensor,
        batch: int,
        mask: Tensor | None,
        padding: ChunkPadding | None,
    ) -> Tensor:
        """Rows (B * T, D) after the mixer and its residual sum, which is written in place."""
        ...


def pack_mixer(name: str, mixer: Mixer, norm: RMSNorm) -> PackedMixer:
    """The mixer `name` over its packed weights; `norm` is the one in front of it."""
    module = importlib.import_module(f"mmmamba_cli.inference.mixers.{name}")
    inputs = packed_projection(
        [getattr(mixer, projection) for projection in mixer.input_projections], norm
    )
    output = packed_projection([mixer.o_proj], mixer.output_norm)
    pack: Callable[..., PackedMixer] = module.pack
    return pack(mixer, inputs, output)
