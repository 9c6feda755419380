"""Packing of projections with the same input into one weight, without a second copy.

The modules keep their parameters as row slices of the packed tensor, so the model's own forward is
unchanged bit for bit. Legend: O rows of a packed weight, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmmamba_cli.architecture import spec_of
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.block import Block, SwiGLU
from mmmamba_cli.model.mixer import Mixer

MLP_INPUTS = ("gate_proj", "up_proj")


def pack(model: HolisticVLM) -> None:
    """Pack the input projections of each mixer and [gate|up] of each MLP, in place.

    Needs extra memory for one group of weights at a time. Groups that are packed already are left
    alone; moving or casting the model undoes the packing.

    Raises:
        MmmambaError: a mixer without a step over packed weights, or projections that are not plain
            linear layers of one dtype on one device, for example adapters or sharded weights. The
            model is unchanged then.
    """
    require_packed_mixers(model)
    require_plain_linears(model)
    groups = [group for block in model.model.blocks for group in packed_groups(block)]
    for layers in groups:
        _require_same_dtype_and_device(model, layers)
    for layers in groups:
        weights = [layer.weight for layer in layers]
        if packed_view(weights) is None:
            _pack_weights(weights)


def packed_groups(block: Block) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """The projections of a block that are packed together: the mixer's, and the MLP's."""
    return mixer_inputs(block.mixer), mlp_inputs(block.mlp)


def mixer_inputs(mixer: Mixer) -> list[nn.Linear]:
    """The input projections of a mixer, in packed order."""
    return [getattr(mixer, name) for name in mixer.input_projections]


def mlp_inputs(mlp: SwiGLU) -> list[nn.Linear]:
    """The input projections of an MLP, in packed order."""
    return [getattr(mlp, name) for name in MLP_INPUTS]


def packed_view(weights: Sequence[Tensor]) -> Tensor | None:
    """A view (O, ...) of weights that are adjacent in one storage; None if they are not."""
    first = weights[0]
    expected = first.data_ptr()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or weight.data_ptr() != expected or not weight.is_contiguous():
            return None
        expected += weight.numel() * weight.element_size()
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def packed_bias(layers: Sequence[nn.Linear]) -> Tensor | None:
    """A concatenated copy of the biases, 0 where a layer has none; None if no layer has one."""
    if all(layer.bias is None for layer in layers):
        return None
    like = next(layer.bias for layer in layers if layer.bias is not None)
    parts = [
        like.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        for layer in layers
    ]
    return torch.cat(parts)


def block_projections(block: Block) -> dict[str, nn.Module]:
    """All projections of a block, of any class, by their name within the block."""
    return {
        f"{part}.{name}": layer
        for part in ("mixer", "mlp")
        for name, layer in getattr(block, part).named_children()
        if name.endswith("_proj")
    }


def require_packed_mixers(model: HolisticVLM) -> None:
    """Raise `MmmambaError` naming the first layer whose mixer has no step over packed weights."""
    for layer in range(model.config.num_hidden_layers):
        title = spec_of(model.config, layer).slow_title(model.config.mixer_config)
        if title is not None:
            raise MmmambaError(
                f"layer {layer} is {title}, which has no fast decoding yet",
                "model.generate takes the model as it is",
            )


def require_plain_linears(model: HolisticVLM) -> None:
    """Raise `MmmambaError` naming the first projection or LM head that is not a plain layer."""
    layers = [layer for block in model.model.blocks for layer in block_projections(block).values()]
    for layer in (*layers, model.lm_head):
        found = layer.weight.data if type(layer) is nn.Linear else layer
        if type(found) not in (Tensor, nn.Linear):
            raise MmmambaError(
                f"{_name(model, layer)} is a {type(found).__name__}, and only plain linear layers "
                "can be decoded fast",
                "merge adapters into the weights first, and gather sharded ones; "
                "model.generate takes the model as it is",
            )


def _require_same_dtype_and_device(model: HolisticVLM, layers: Sequence[nn.Linear]) -> None:
    first = layers[0].weight
    for layer in layers[1:]:
        if (layer.weight.dtype, layer.weight.device) != (first.dtype, first.device):
            raise MmmambaError(
                f"{_name(model, layer)} is {layer.weight.dtype} on {layer.weight.device}, but "
                f"{_name(model, layers[0])} beside it is {first.dtype} on {first.device}",
                "load the model in one dtype onto one device",
            )


def _name(model: HolisticVLM, module: nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)


@torch.no_grad()
def _pack_weights(weights: Sequence[Tensor]) -> None:
    first = weights[0]
    rows = [weight.shape[0] for weight in weights]
    packed = first.new_empty(sum(rows), first.shape[1])
    for weight, part in zip(weights, packed.split(rows), strict=True):
        part.copy_(weight)
        # Keeps the Parameter object and frees its old storage.
        weight.data = part
    if first.is_cuda:
        # Return the freed blocks: no later allocation has their size, so the allocator would
        # otherwise reserve twice the weights.
        torch.cuda.empty_cache()
