"""Weight-only int8 for decoding: a step reads half the bytes of bf16.

Rows are scaled symmetrically (`ops.quantize`), and each norm's weights become part of the weights
that read it, so that a step need not read them; activations, embeddings and the vision part stay as
they are. Legend: O rows of a weight, D hidden size, H heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmmamba_cli.inference.weight_packing import groups_of, joined, linears_of, require_plain
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.mamba2 import Mamba2
from mmmamba_cli.model.norm import RMSNorm
from mmmamba_cli.ops.backends import upcast
from mmmamba_cli.ops.projection import Int8Weight, project
from mmmamba_cli.ops.projection import quantize as quantized


class Int8Linear(nn.Module):
    """A linear layer, (..., D) -> (..., O), over rows of an int8 weight that others may share.

    With many rows of input, as at prefill, the weight is widened for the moment of the product.
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
    """Replace every linear layer of the blocks, and the head, by an `Int8Linear`.

    In place and for good; the weights are freed one after the other. What is quantized already is
    left alone. Such a model generates as before, it cannot be trained or saved.

    Norms in front of these layers get weights of ones, new parameters, since other models may hold
    the old ones: what they were is multiplied into the columns of the layers, before rounding.
    Nothing else reads these norms, but for the decoder's last: hidden states that `model.model`
    returns are then without its weights, and the logits as before. Norms on heads of q and k stay.

    Raises `MmmambaError` for layers that are not plain linear ones, as with adapters; nothing has
    been changed then.
    """
    if isinstance(model.lm_head, Int8Linear):
        return
    require_plain(model)
    for block in model.model.blocks:
        _quantize_block(block)
    (head,) = _quantize_together([model.lm_head], model.model.norm)
    model.set_output_embeddings(head)
    if model.get_input_embeddings().weight.is_cuda:
        torch.cuda.empty_cache()


def joined_int8(layers: Sequence[Int8Linear]) -> Int8Weight:
    """The packed weight that the layers are rows of; a copy if the model was moved since."""
    parts = [[layer.values for layer in layers], [layer.scales for layer in layers]]
    whole = [joined(part) for part in parts]
    values, scales = (
        torch.cat(part) if found is None else found
        for part, found in zip(parts, whole, strict=True)
    )
    return Int8Weight(values, scales)


def _quantize_block(block: Block) -> None:
    mixer_inputs, mlp_inputs = groups_of(block)
    gated = block.mixer.g_norm if isinstance(block.mixer, Mamba2) else None
    groups: tuple[tuple[list[nn.Linear], RMSNorm | None], ...] = (
        (mixer_inputs, block.mixer_norm),
        (mlp_inputs, block.mlp_norm),
        ([block.mixer.o_proj], gated),
        ([block.mlp.down_proj], None),
    )
    places = {id(layer): name for name, layer in linears_of(block).items()}
    for layers, norm in groups:
        for layer, replacement in zip(layers, _quantize_together(layers, norm), strict=True):
            part, _, name = places[id(layer)].partition(".")
            setattr(getattr(block, part), name, replacement)


@torch.no_grad()
def _quantize_together(layers: Sequence[nn.Linear], norm: RMSNorm | None) -> list[Int8Linear]:
    """One int8 weight over all of them, and a layer for each of its parts.

    All that `norm` passes on goes into these layers: its weights become part of theirs.
    """
    rows = [layer.out_features for layer in layers]
    device, width = layers[0].weight.device, layers[0].in_features
    values = torch.empty(sum(rows), width, dtype=torch.int8, device=device)
    scales = torch.empty(sum(rows), dtype=torch.float32, device=device)
    parts = zip(layers, values.split(rows), scales.split(rows), strict=True)
    made = []
    for layer, own_values, own_scales in parts:
        found = quantized(layer.weight.detach() if norm is None else _scaled(layer.weight, norm))
        own_values.copy_(found.values)
        own_scales.copy_(found.scales)
        made.append(Int8Linear(own_values, own_scales, layer.bias))
    if norm is not None:
        norm.weight = nn.Parameter(torch.ones_like(norm.weight), norm.weight.requires_grad)
    return made


def _scaled(weight: Tensor, norm: RMSNorm) -> Tensor:
    """The weight (O, D) times the norm's, in fp32 or fp64; one of heads (P,) is that of all H."""
    scales = upcast(norm.weight)
    return upcast(weight) * scales.repeat(weight.shape[1] // len(scales))
