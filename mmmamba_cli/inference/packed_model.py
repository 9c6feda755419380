"""The packed weights of a model, as a tree of stacks and layers that a decoding step reads.

Legend: D hidden size, P head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from mmmamba_cli.inference.quantization import Int8Linear, packed_int8
from mmmamba_cli.inference.weight_packing import (
    mixer_inputs,
    mlp_inputs,
    pack,
    packed_bias,
    packed_view,
)
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.config import StackConfig
from mmmamba_cli.model.mamba2 import Mamba2
from mmmamba_cli.model.norm import RMSNorm
from mmmamba_cli.ops.backends import upcast
from mmmamba_cli.ops.decode import MixerWeights
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


@dataclass(frozen=True)
class QKNorm:
    """Weights (P,) of the RMSNorms on each head of q and of k, and their epsilon."""

    q: Tensor
    k: Tensor
    eps: float


@dataclass(frozen=True)
class PackedMamba2:
    """A Mamba-2 mixer; `inputs` is [v|k|q|g|dt], `output` is W_O behind the gated norm."""

    inputs: PackedProjection
    output: PackedProjection
    weights: MixerWeights
    qk_norm: QKNorm | None
    rope: bool
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def has_fused_step(self) -> bool:
        """Whether `ops.mixer_step` applies: no norm or RoPE between convolution and scan."""
        return self.qk_norm is None and not self.rope


@dataclass(frozen=True)
class PackedAttention:
    """An attention mixer; `inputs` is [q|k|v]."""

    inputs: PackedProjection
    output: PackedProjection
    qk_norm: QKNorm | None
    heads: int
    kv_heads: int
    head_dim: int
    rope: bool = True


@dataclass(frozen=True)
class PackedLayer:
    """A block; `mlp_inputs` is [gate|up]. Each projection includes the norm in front of it."""

    mixer: PackedMamba2 | PackedAttention
    mlp_inputs: PackedProjection
    mlp_output: PackedProjection


@dataclass(frozen=True)
class PackedStack:
    """The layers of one stack."""

    config: StackConfig
    layers: tuple[PackedLayer, ...]

    @property
    def has_attention(self) -> bool:
        """Whether the stack has a KV cache, which grows with the sequence length."""
        return any(isinstance(layer.mixer, PackedAttention) for layer in self.layers)

    @property
    def uses_rope(self) -> bool:
        """Whether any mixer needs the token's position."""
        return any(layer.mixer.rope for layer in self.layers)


@dataclass(frozen=True)
class PackedModel:
    """Text embedding, the stacks, and the LM head with the final norm."""

    text_embedding: Tensor
    embedding: PackedStack | None
    language: PackedStack
    normalize_embedding_output: bool
    head: PackedProjection

    @property
    def stacks(self) -> tuple[PackedStack, ...]:
        return (self.language,) if self.embedding is None else (self.embedding, self.language)

    @property
    def has_attention(self) -> bool:
        return any(stack.has_attention for stack in self.stacks)


@torch.no_grad()
def pack_model(model: HolisticVLM) -> PackedModel:
    """Pack the weights of `model` in place if they are not, and return them as a tree.

    Raises `MmmambaError` as `pack` does.
    """
    if not isinstance(model.lm_head, Int8Linear):
        pack(model)
    decoder, config = model.model, model.config
    layers = tuple(_layer(block) for block in decoder.blocks)
    split = decoder.num_embedding_layers
    embedding = None if config.embedding is None else PackedStack(config.embedding, layers[:split])
    return PackedModel(
        text_embedding=decoder.text_embedding.weight.detach(),
        embedding=embedding,
        language=PackedStack(config.language, layers[split:]),
        normalize_embedding_output=config.normalize_embedding_output,
        head=_projection([model.lm_head], decoder.norm),
    )


def weight_nbytes(packed: PackedModel) -> int:
    """Bytes of the weights that every step reads in full: all projections and the LM head."""
    found = [packed.head]
    for layer in (layer for stack in packed.stacks for layer in stack.layers):
        found += [layer.mixer.inputs, layer.mixer.output, layer.mlp_inputs, layer.mlp_output]
    size = 0
    for projection in found:
        weight = projection.weight
        size += sum(t.nbytes for t in (weight if isinstance(weight, Int8Weight) else (weight,)))
    return size


def _layer(block: Block) -> PackedLayer:
    mixer = block.mixer
    inputs = _projection(mixer_inputs(mixer), block.mixer_norm)
    qk_norm = None
    if mixer.q_norm is not None and mixer.k_norm is not None:
        q, k = mixer.q_norm, mixer.k_norm
        qk_norm = QKNorm(q.weight.detach(), k.weight.detach(), q.eps)
    packed: PackedMamba2 | PackedAttention
    shape = (mixer.num_heads, mixer.num_kv_heads, mixer.head_dim)
    if isinstance(mixer, Mamba2):
        output, weights = _projection([mixer.o_proj], mixer.g_norm), _mixer_weights(mixer)
        packed = PackedMamba2(inputs, output, weights, qk_norm, mixer.rope, *shape)
    else:
        packed = PackedAttention(inputs, _projection([mixer.o_proj]), qk_norm, *shape)
    return PackedLayer(
        mixer=packed,
        mlp_inputs=_projection(mlp_inputs(block.mlp), block.mlp_norm),
        mlp_output=_projection([block.mlp.down_proj]),
    )


def _mixer_weights(mixer: Mamba2) -> MixerWeights:
    bias, skip = mixer.conv1d.bias, mixer.D
    return MixerWeights(
        conv_weight=mixer.conv1d.weight.detach().squeeze(1),
        conv_bias=None if bias is None else bias.detach(),
        A=upcast(-torch.exp(mixer.A_log.detach())),
        dt_bias=mixer.dt_bias.detach(),
        D=None if skip is None else skip.detach(),
    )


def _projection(layers: Sequence[Any], norm: RMSNorm | None = None) -> PackedProjection:
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
