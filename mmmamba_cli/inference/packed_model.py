"""The packed weights of a model, as a tree of stacks and layers that a decoding step reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.inference.packed_mixer import (
    PackedMixer,
    PackedProjection,
    pack_mixer,
    packed_projection,
)
from mmmamba_cli.inference.quantization import Int8Linear
from mmmamba_cli.inference.weight_packing import mlp_inputs, pack
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.config import StackConfig
from mmmamba_cli.ops.projection import Int8Weight


@dataclass(frozen=True)
class PackedLayer:
    """A block; `mlp_inputs` is [gate|up]. Each projection includes the norm in front of it."""

    mixer: PackedMixer
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
        return any(layer.mixer.grows for layer in self.layers)

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
    layers = tuple(
        _layer(block, name) for block, name in zip(decoder.blocks, config.mixer_names, strict=True)
    )
    split = decoder.num_embedding_layers
    embedding = None if config.embedding is None else PackedStack(config.embedding, layers[:split])
    return PackedModel(
        text_embedding=decoder.text_embedding.weight.detach(),
        embedding=embedding,
        language=PackedStack(config.language, layers[split:]),
        normalize_embedding_output=config.normalize_embedding_output,
        head=packed_projection([model.lm_head], decoder.norm),
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


def _layer(block: Block, name: str) -> PackedLayer:
    return PackedLayer(
        mixer=pack_mixer(name, block.mixer, block.mixer_norm),
        mlp_inputs=packed_projection(mlp_inputs(block.mlp), block.mlp_norm),
        mlp_output=packed_projection([block.mlp.down_proj]),
    )
