"""Lyapunov exponents of the whole recurrence of a student, by tangents.

The memory of a linear student after a token, its conv and recurrent states, is a function of the
memory before it. K tangent vectors are carried through the derivative of that function and made
orthonormal again at each token; the exponents are the means of log |R_ii| (Benettin, Galgani,
Giorgilli and Strelcyn, Meccanica 15, 1980). Legend: T tokens, K vectors, n numbers of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.cache import HybridCache, new_cache, read_ssm_state, write_ssm_state
from mmmamba_cli.model.prepared_inputs import PreparedInputs
from mmmamba_cli.stability.model_layers import layer_specs

Memory = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TangentGrowth:
    """`log_growth` (T, K) is log |R_ii| of each token; its means over tokens are exponents."""

    log_growth: Tensor

    def exponents(self, begin: int = 0, end: int | None = None) -> Tensor:
        """The K largest finite-time exponents over tokens `begin` to `end`, descending, (K,)."""
        return self.log_growth[begin:end].mean(0).sort(descending=True).values

    @property
    def largest_growth(self) -> float:
        """The largest factor by which the first vector has grown since the first token.

        This is the transient: errors may grow so much before they die. 1 if they never grow.
        """
        return float(self.log_growth[:, 0].cumsum(0).max().clamp(min=0).exp())


def lacks_tangents(model: HolisticVLM) -> str | None:
    """Why the recurrence of a model has no tangents here; None if it has."""
    others = [spec.title for spec in layer_specs(model) if spec.decay is None]
    if not others:
        return None
    titles = " and ".join(dict.fromkeys(others))
    return (
        f"exponents by tangents: {len(others)} layers have {titles}, whose memory is not a "
        "state that decays"
    )


@torch.no_grad()
def tangent_growth(
    model: HolisticVLM,
    ids: Tensor,
    vectors: int,
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> TangentGrowth:
    """Carry `vectors` tangents through the tokens `ids` (1, T) of a model that has only decays.

    The tangents are rows of one batch, so that one pass in forward mode differentiates all.
    Computed in the model's dtype.
    """
    decoder = model.model
    batch = ids.expand(vectors, -1)
    inputs = decoder.prepare(batch)
    embedded = decoder.embed(inputs)
    mixers = [block.mixer for block in decoder.blocks]
    memory: Memory = [mixer.empty_states(vectors, embedded) for mixer in mixers]
    shapes = [state.shape[1:] for pair in memory for state in pair]
    size = sum(shape.numel() for shape in shapes)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, vectors, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(start.to(embedded)).Q
    growth = []
    cache = new_cache(model.config)
    for token in range(ids.shape[1]):
        with forward_ad.dual_level():
            tangents = _unflatten(basis.T.contiguous(), memory)
            dual = [
                (forward_ad.make_dual(conv, a), forward_ad.make_dual(state, b))
                for (conv, state), (a, b) in zip(memory, tangents, strict=True)
            ]
            after = _step(model, embedded[:, token : token + 1], inputs, token, dual, cache)
            parts = [forward_ad.unpack_dual(state) for pair in after for state in pair]
            # The cache writes into its tensors in place.
            values = [part.primal.clone() for part in parts]
            moved = [_tangent(part) for part in parts]
        memory = list(zip(values[::2], values[1::2], strict=True))
        basis, upper = torch.linalg.qr(torch.cat(moved, dim=1).T)
        growth.append(upper.diagonal().abs().double().log())
        advance(1)
    return TangentGrowth(torch.stack(growth))


def _tangent(part: forward_ad.UnpackedDualTensor) -> Tensor:
    """The tangent of a state as rows (K, n of the state); zeros where it does not depend on it."""
    found = torch.zeros_like(part.primal) if part.tangent is None else part.tangent
    return found.flatten(1)


def _unflatten(rows: Tensor, like: Memory) -> Memory:
    """Split tangents (K, n) into the shapes of the states."""
    sizes = [state[0].numel() for pair in like for state in pair]
    pieces = iter(rows.split(sizes, dim=1))
    return [(next(pieces).view_as(conv), next(pieces).view_as(state)) for conv, state in like]


def _step(
    model: HolisticVLM,
    hidden: Tensor,
    inputs: PreparedInputs,
    token: int,
    memory: Memory,
    cache: HybridCache,
) -> Memory:
    """The memory after a token with the embedding `hidden` (K, 1, D)."""
    decoder, split = model.model, model.model.num_embedding_layers
    for layer, (conv, state) in enumerate(memory):
        write_ssm_state(cache, layer, conv, state)
    if inputs.embedding_layout is not None:
        layout = inputs.embedding_layout.chunk(token, token + 1)
        hidden = decoder.run_layers(decoder.layers[:split], hidden, layout, cache)
        hidden = decoder.embedding_to_language(hidden, inputs)
    layout = inputs.language_layout.chunk(token, token + 1)
    decoder.run_layers(decoder.layers[split:], hidden, layout, cache)
    found = [read_ssm_state(cache, layer) for layer in range(len(memory))]
    return [(conv, state) for conv, state in found if conv is not None and state is not None]
