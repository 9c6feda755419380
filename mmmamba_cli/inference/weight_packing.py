"""Projections that read the same input as one tensor, without a second copy of the weights.

The modules keep their parameters; these become row slices of the packed tensor, so that the model's
own forward computes what it did. Legend: O rows of a packed weight, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.attention import Attention
from mmmamba_cli.model.block import Block, SwiGLU
from mmmamba_cli.model.mamba2 import Mamba2

SCAN_INPUTS = ("v_proj", "k_proj", "q_proj", "g_proj", "dt_proj")
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
MLP_INPUTS = ("gate_proj", "up_proj")


def pack(model: HolisticVLM) -> None:
    """Lay [v|k|q|g|dt] or [q|k|v] of each mixer, and [gate|up] of each MLP, side by side in memory.

    In place, for good, and at most one group of weights larger for a moment. What is packed already
    is left alone, so it may be called again; moving or casting the model afterwards undoes it.

    Raises `MmmambaError` for projections that are not plain linear layers of one dtype on one
    device, as with adapters or sharded weights; nothing has been changed then.
    """
    require_plain(model)
    groups = [group for block in model.model.blocks for group in groups_of(block)]
    for layers in groups:
        _require_alike(model, layers)
    for layers in groups:
        weights = [layer.weight for layer in layers]
        if joined(weights) is None:
            _join(weights)


def groups_of(block: Block) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """The projections of a block that are packed together: the mixer's, and the MLP's."""
    return mixer_inputs(block.mixer), mlp_inputs(block.mlp)


def mixer_inputs(mixer: Attention | Mamba2) -> list[nn.Linear]:
    """The projections that read a mixer's input, in their packed order."""
    names = SCAN_INPUTS if isinstance(mixer, Mamba2) else ATTENTION_INPUTS
    return [getattr(mixer, name) for name in names]


def mlp_inputs(mlp: SwiGLU) -> list[nn.Linear]:
    return [getattr(mlp, name) for name in MLP_INPUTS]


def joined(weights: Sequence[Tensor]) -> Tensor | None:
    """One tensor (O, ...) over tensors that lie one behind the other in one storage, else None."""
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
    """The biases behind one another, 0 where a layer has none; None if no layer has one.

    A copy: biases are small.
    """
    if all(layer.bias is None for layer in layers):
        return None
    like = next(layer.bias for layer in layers if layer.bias is not None)
    parts = [
        like.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        for layer in layers
    ]
    return torch.cat(parts)


def linears_of(block: Block) -> dict[str, nn.Module]:
    """Each projection of a block, whatever class it has, by its name within the block."""
    return {
        f"{part}.{name}": layer
        for part in ("mixer", "mlp")
        for name, layer in getattr(block, part).named_children()
        if name.endswith("_proj")
    }


def require_plain(model: HolisticVLM) -> None:
    """Raise `MmmambaError` that names the first projection, or head, that is no plain layer."""
    layers = [layer for block in model.model.blocks for layer in linears_of(block).values()]
    for layer in (*layers, model.lm_head):
        found = layer.weight.data if type(layer) is nn.Linear else layer
        if type(found) not in (Tensor, nn.Linear):
            raise MmmambaError(
                f"{_name(model, layer)} is a {type(found).__name__}, and only plain linear layers "
                "can be decoded fast",
                "merge adapters into the weights first, and gather sharded ones; "
                "model.generate takes the model as it is",
            )


def _require_alike(model: HolisticVLM, layers: Sequence[nn.Linear]) -> None:
    first = layers[0].weight
    for layer in layers[1:]:
        if (layer.weight.dtype, layer.weight.device) != (first.dtype, first.device):
            raise MmmambaError(
                f"{_name(model, layer)} is {layer.weight.dtype} on {layer.weight.device}, but "
                f"{_name(model, layers[0])} beside it is {first.dtype} on {first.device}",
                "load the model in one dtype onto one device",
            )


def _name(model: HolisticVLM, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


@torch.no_grad()
def _join(weights: Sequence[Tensor]) -> None:
    first = weights[0]
    rows = [weight.shape[0] for weight in weights]
    whole = first.new_empty(sum(rows), first.shape[1])
    for weight, part in zip(weights, whole.split(rows), strict=True):
        part.copy_(weight)
        # The parameter stays the object it was; its old memory is free from here on.
        weight.data = part
    if first.is_cuda:
        # Pieces of that size are never wanted again: kept, they would double what is reserved.
        torch.cuda.empty_cache()
