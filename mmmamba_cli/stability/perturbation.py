"""Deviation of states and logits after a disturbance, on the same tokens.

Legend: B batch, T tokens, H query heads, P head dim, V vocabulary, C places where states are read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.cache import HybridCache, new_cache, read_ssm_state
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.stability.decay_spectrum import observed_mixers, state_log_decay
from mmmamba_cli.stability.model_layers import decaying_layers, layer_specs


@dataclass(frozen=True)
class Deviation:
    """The deviation after each of the C `places`, counted in tokens since the disturbance.

    `states` and `state_norms` are the Frobenius norms of the difference and of the undisturbed
    states of each layer with a decay, (C, H); `log_decays` the sums of log gamma since the
    disturbance, (C, H, ...); `logits` (T,) is the norm of the difference over the vocabulary.
    """

    places: tuple[int, ...]
    states: dict[int, Tensor]
    state_norms: dict[int, Tensor]
    log_decays: dict[int, Tensor]
    logits: Tensor


def log_places(tokens: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... and `tokens`."""
    found = [1, 2]
    while found[-1] < tokens:
        found += [found[-1] * 3 // 2, found[-1] * 2]
    return (*(place for place in found if place < tokens), tokens)


def fill_cache(
    model: HolisticVLM, cache: HybridCache, ids: Tensor, total: int, chunk_size: int
) -> None:
    """Pass `ids` (1, T) of a text of `total` tokens through the model."""
    lengths = torch.tensor([total], device=ids.device)
    for chunk in ids.split(chunk_size, dim=1):
        model(chunk, cache=cache, use_cache=True, prompt_lengths=lengths, logits_to_keep=1)


def disturbed_states(
    model: HolisticVLM, cache: HybridCache, size: float, seed: int
) -> tuple[HybridCache, dict[int, Tensor]]:
    """A copy of a filled cache whose states are off in random directions, and the differences.

    Each head of each layer with a decay is off by `size` times the norm of its state; differences
    are (H, P, P).
    """
    disturbed = copy.deepcopy(cache)
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for layer in decaying_layers(model):
        _, state = read_ssm_state(disturbed, layer)
        assert state is not None
        noise = torch.randn(state.shape, generator=generator, dtype=torch.float64)
        noise = noise / _matrix_norm(noise)[..., None, None]
        delta = size * _matrix_norm(state)[..., None, None] * noise.to(state)
        before = state.clone()
        state.add_(delta)
        # The difference after rounding to the state's dtype.
        deltas[layer] = (state - before)[0]
    return disturbed, deltas


def rounded_randomly(values: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """`values` off by errors of the size of one rounding to `dtype`, in their own dtype.

    Relative errors are uniform up to half the distance of neighbouring numbers. Rounding itself
    would change nothing in a model whose weights were stored in `dtype`.
    """
    generator = torch.Generator().manual_seed(seed)
    error = torch.rand(values.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return values * (1 + error.to(values) * torch.finfo(dtype).eps / 2)


@torch.no_grad()
def follow_deviation(
    model: HolisticVLM,
    ids: Tensor,
    places: Sequence[int],
    *,
    reference: HybridCache | None = None,
    disturbed: HybridCache | None = None,
    other_embeddings: Tensor | None = None,
    total: int | None = None,
    chunk_size: int = 512,
) -> Deviation:
    """Pass `ids` (1, T) through the model twice and compare.

    Args:
        places: where states are read, ascending, the last one T.
        reference, disturbed: caches before the first token; new ones if None.
        other_embeddings: (1, T, D), the inputs of the second run; None for the same.
        total: tokens of the whole text, with those in the caches.
    """
    first = new_cache(model.config) if reference is None else reference
    second = new_cache(model.config) if disturbed is None else disturbed
    lengths = torch.tensor([ids.shape[1] if total is None else total], device=ids.device)
    mixers, specs = decaying_layers(model), layer_specs(model)
    layers = list(mixers)
    sums: dict[int, Tensor] = {}

    def add_decays(layer: int, hidden: Tensor, layout: SequenceLayout, cache: object) -> None:
        part = state_log_decay(specs[layer], mixers[layer], hidden).double().sum(0)
        sums[layer] = part if layer not in sums else sums[layer] + part

    states: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    norms: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    decays: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    logits = []
    begin = 0
    for end in places:
        for start in range(begin, end, chunk_size):
            columns = slice(start, min(end, start + chunk_size))
            chunk = ids[:, columns]
            with observed_mixers(model, add_decays):
                here = model(chunk, cache=first, use_cache=True, prompt_lengths=lengths).logits[0]
            given = (
                {"input_ids": chunk}
                if other_embeddings is None
                else {"inputs_embeds": other_embeddings[:, columns]}
            )
            there = model(**given, cache=second, use_cache=True, prompt_lengths=lengths).logits[0]
            logits.append(torch.linalg.vector_norm(there.double() - here.double(), dim=-1))
        for layer in layers:
            (_, plain), (_, off) = read_ssm_state(first, layer), read_ssm_state(second, layer)
            assert plain is not None and off is not None
            states[layer].append(_matrix_norm(off.double() - plain.double())[0])
            norms[layer].append(_matrix_norm(plain.double())[0])
            decays[layer].append(sums[layer])
        begin = end
    return Deviation(
        tuple(places),
        {layer: torch.stack(found) for layer, found in states.items()},
        {layer: torch.stack(found) for layer, found in norms.items()},
        {layer: torch.stack(found) for layer, found in decays.items()},
        torch.cat(logits),
    )


def predicted_deviation(delta: Tensor, log_decays: Tensor) -> Tensor:
    """Norms of a deviation of the state that nothing but the decay moves, (C, H).

    `delta` (H, P, P) is the deviation at the disturbance, `log_decays` (C, H) or (C, H, P) are sums
    of log gamma since. Exact for the first layer with a decay, whose inputs are undisturbed, of a
    mixer with an exact decay; an upper bound for a delta rule.
    """
    factors = log_decays.exp()
    if factors.dim() == 3:
        return _matrix_norm(delta.double() * factors.unsqueeze(-2))
    return factors * _matrix_norm(delta.double())


def _matrix_norm(states: Tensor) -> Tensor:
    """Frobenius norms of (..., P, P)."""
    return torch.linalg.matrix_norm(states)
