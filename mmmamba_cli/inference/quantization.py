"""Weight-only int8 quantization for decoding: a step reads half the bytes of bf16.

Rows are scaled symmetrically (`ops.projection.quantize_rows`). Norm weights are folded into the
projections behind them, so that a step need not read them. Activations, embeddings and the vision
part keep their dtype. Legend: O rows of a weight, D hidden size, H heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmmamba_cli.inference.weight_packing import (
    block_projections,
    packed_groups,
    packed_view,
    require_plain_linears,
)
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.norm import RMSNorm
from mmmamba_cli.ops.backends import upcast
from mmmamba_cli.ops.projection import Int8Weight, project, quantize_rows


class Int8Linear(nn.Module):
    """A linear layer, (..., D) -> (..., O), over rows of an int8 weight that others may share.

    With many rows of input, as in prefill, the weight is dequantized for each product.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, values: Tensor, scales: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = values.shape
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = project(x.reshape(-1, x.shape[-1]), self.as_weight(), bias=self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def as_weight(self) -> Int8Weight:
        return Int8Weight(self.values, self.scales)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def quantize(model: HolisticVLM) -> None:
    """Replace all linear layers of the blocks and the LM head by `Int8Linear`, in place.

    The original weights are freed one by one. A model that is quantized already is left alone. A
    quantized model generates as before; it cannot be trained or saved.

    The norms in front of these layers get new parameters of ones (other models may share the old
    ones): their weights are multiplied into the columns of the layers before rounding. Only the
    final norm has another reader: hidden states that `model.model` returns lack its weight, while
    logits keep it. QK norms stay as they are.

    Raises:
        MmmambaError: layers that are not plain linear layers, for example adapters. The model is
            unchanged then.
    """
    if isinstance(model.lm_head, Int8Linear):
        return
    require_plain_linears(model)
    for block in model.model.blocks:
        _quantize_block(block)
    (head,) = _quantize_group([model.lm_head], model.model.norm)
    model.set_output_embeddings(head)
    if model.get_input_embeddings().weight.is_cuda:
        torch.cuda.empty_cache()


def packed_int8(layers: Sequence[Int8Linear]) -> Int8Weight:
    """The packed weight of the layers; a copy if they are no longer adjacent in memory."""
    groups = [[layer.values for layer in layers], [layer.scales for layer in layers]]
    views = [packed_view(group) for group in groups]
    values, scales = (
        torch.cat(group) if view is None else view
        for group, view in zip(groups, views, strict=True)
    )
    return Int8Weight(values, scales)


def _quantize_block(block: Block) -> None:
    mixer_inputs, mlp_inputs = packed_groups(block)
    groups: tuple[tuple[list[nn.Linear], RMSNorm | None], ...] = (
        (mixer_inputs, block.mixer_norm),
        (mlp_inputs, block.mlp_norm),
        ([block.mixer.o_proj], block.mixer.output_norm),
        ([block.mlp.down_proj], None),
    )
    names = {id(layer): name for name, layer in block_projections(block).items()}
    for layers, norm in groups:
        for layer, replacement in zip(layers, _quantize_group(layers, norm), strict=True):
            part, _, name = names[id(layer)].partition(".")
            setattr(getattr(block, part), name, replacement)


@torch.no_grad()
def _quantize_group(layers: Sequence[nn.Linear], norm: RMSNorm | None) -> list[Int8Linear]:
    """Quantize layers into one packed int8 weight; returns an `Int8Linear` for each.

    `norm` feeds only these layers; its weight is folded into theirs.
    """
    rows = [layer.out_features for layer in layers]
    device, width = layers[0].weight.device, layers[0].in_features
    values = torch.empty(sum(rows), width, dtype=torch.int8, device=device)
    scales = torch.empty(sum(rows), dtype=torch.float32, device=device)
    parts = zip(layers, values.split(rows), scales.split(rows), strict=True)
    made = []
    for layer, own_values, own_scales in parts:
        weight = layer.weight.detach() if norm is None else _fold_norm(layer.weight, norm)
        found = quantize_rows(weight)
        own_values.copy_(found.values)
        own_scales.copy_(found.scales)
        made.append(Int8Linear(own_values, own_scales, layer.bias))
    if norm is not None:
        norm.weight = nn.Parameter(torch.ones_like(norm.weight), norm.weight.requires_grad)
    return made


def _fold_norm(weight: Tensor, norm: RMSNorm) -> Tensor:
    """The weight (O, D) times the norm's, in fp32 or fp64; a norm of heads (P,) repeats H times."""
    scales = upcast(norm.weight)
    return upcast(weight) * scales.repeat(weight.shape[1] // len(scales))
