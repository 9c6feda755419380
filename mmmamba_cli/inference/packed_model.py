"""The model as one token passes it: what each layer reads, packed, and nothing that is looked up.

Legend: D hidden size, H query heads, K key/value heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmmamba_cli.inference.quantization import Int8Linear, joined_int8
from mmmamba_cli.inference.weight_packing import joined, mixer_inputs, mlp_inputs, pack, packed_bias
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.config import StackConfig
from mmmamba_cli.model.mamba2 import Mamba2
from mmmamba_cli.model.norm import RMSNorm
from mmmamba_cli.ops.backends import upcast
from mmmamba_cli.ops.decode import MixerWeights
from mmmamba_cli.ops.projection import Int8Weight

Weight = Tensor | Int8Weight


@dataclass(frozen=True)
class Norm:
    """An RMSNorm of `dim` numbers; its weight is None where it was multiplied into what follows."""

    weight: Tensor | None
    eps: float
    dim: int


@dataclass(frozen=True)
class Projection:
    """A packed weight, and its bias."""

    weight: Weight
    bias: Tensor | None


@dataclass(frozen=True)
class HeadNorms:
    """Weights (P,) of the norms on each head of q and of k, and their epsilon."""

    q: Tensor
    k: Tensor
    eps: float


@dataclass(frozen=True)
class ScanPlan:
    """A Mamba-2 mixer; `inputs` are [v|k|q|g|dt]."""

    inputs: Projection
    output: Projection
    weights: MixerWeights
    gated_norm: Norm
    head_norms: HeadNorms | None
    rope: bool
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def is_plain(self) -> bool:
        """Whether nothing comes between convolution and scan: one op does both then."""
        return self.head_norms is None and not self.rope


@dataclass(frozen=True)
class AttentionPlan:
    """An attention mixer; `inputs` are [q|k|v]."""

    inputs: Projection
    output: Projection
    head_norms: HeadNorms | None
    heads: int
    kv_heads: int
    head_dim: int
    rope: bool = True


@dataclass(frozen=True)
class LayerPlan:
    """A block; `mlp_inputs` are [gate|up]."""

    mixer_norm: Norm
    mixer: ScanPlan | AttentionPlan
    mlp_norm: Norm
    mlp_inputs: Projection
    mlp_output: Projection


@dataclass(frozen=True)
class StackPlan:
    """The layers of one stack."""

    config: StackConfig
    layers: tuple[LayerPlan, ...]

    @property
    def grows(self) -> bool:
        """Whether its memory grows with the columns it has seen."""
        return any(isinstance(layer.mixer, AttentionPlan) for layer in self.layers)

    @property
    def rotates(self) -> bool:
        """Whether any of its mixers wants to know the token's position."""
        return any(layer.mixer.rope for layer in self.layers)


@dataclass(frozen=True)
class ModelPlan:
    """Both stacks, and what stands before, between and behind them."""

    text_embedding: Tensor
    embedding: StackPlan | None
    language: StackPlan
    normalize_embedding_output: bool
    norm: Norm
    head: Projection

    @property
    def stacks(self) -> tuple[StackPlan, ...]:
        return (self.language,) if self.embedding is None else (self.embedding, self.language)

    @property
    def grows(self) -> bool:
        return any(stack.grows for stack in self.stacks)


@torch.no_grad()
def plan_of(model: HolisticVLM) -> ModelPlan:
    """Pack the model, unless that was done, and say what a step reads. Raises as `pack` does."""
    if not isinstance(model.lm_head, Int8Linear):
        pack(model)
    decoder, config = model.model, model.config
    layers = tuple(_layer(block) for block in decoder.blocks)
    split = decoder.num_embedding_layers
    return ModelPlan(
        text_embedding=decoder.text_embedding.weight.detach(),
        embedding=None if config.embedding is None else StackPlan(config.embedding, layers[:split]),
        language=StackPlan(config.language, layers[split:]),
        normalize_embedding_output=config.normalize_embedding_output,
        norm=_norm(decoder.norm, model.lm_head),
        head=_projection([model.lm_head]),
    )


def weights_size(plan: ModelPlan) -> int:
    """Bytes of weights that a step reads in full: projections and the head."""
    found = [plan.head]
    for layer in (layer for stack in plan.stacks for layer in stack.layers):
        found += [layer.mixer.inputs, layer.mixer.output, layer.mlp_inputs, layer.mlp_output]
    size = 0
    for projection in found:
        weight = projection.weight
        size += sum(t.nbytes for t in (weight if isinstance(weight, Int8Weight) else (weight,)))
    return size


def _layer(block: Block) -> LayerPlan:
    mixer = block.mixer
    inputs, output = _projection(mixer_inputs(mixer)), _projection([mixer.o_proj])
    head_norms = None
    if mixer.q_norm is not None and mixer.k_norm is not None:
        q, k = mixer.q_norm, mixer.k_norm
        head_norms = HeadNorms(q.weight.detach(), k.weight.detach(), q.eps)
    found: ScanPlan | AttentionPlan
    shape = (mixer.num_heads, mixer.num_kv_heads, mixer.head_dim)
    if isinstance(mixer, Mamba2):
        norm = _norm(mixer.g_norm, mixer.o_proj)
        found = ScanPlan(
            inputs, output, _mixer_weights(mixer), norm, head_norms, mixer.rope, *shape
        )
    else:
        found = AttentionPlan(inputs, output, head_norms, *shape)
    return LayerPlan(
        mixer_norm=_norm(block.mixer_norm, mixer_inputs(mixer)[0]),
        mixer=found,
        mlp_norm=_norm(block.mlp_norm, mlp_inputs(block.mlp)[0]),
        mlp_inputs=_projection(mlp_inputs(block.mlp)),
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


def _norm(norm: RMSNorm, reader: nn.Module) -> Norm:
    """A norm that only `reader`, and what is packed with it, comes after."""
    weight = norm.weight.detach()
    # As `quantize` leaves them: ones need not be read.
    is_folded = isinstance(reader, Int8Linear) and bool((weight == 1).all())
    return Norm(None if is_folded else weight, norm.eps, len(weight))


def _projection(layers: Sequence[Any]) -> Projection:
    """Of layers that were packed together, or of a single one."""
    bias = packed_bias(layers)
    if isinstance(layers[0], Int8Linear):
        return Projection(joined_int8(layers), bias)
    weight = joined([layer.weight for layer in layers])
    assert weight is not None, "the layers are packed"
    return Projection(weight, bias)
