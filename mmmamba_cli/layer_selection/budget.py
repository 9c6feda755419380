"""Budgets of attention layers: a number of layers, or bytes of keys and values at a context."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any, Protocol

from mmmamba_cli.architecture import ATTENTION, ModelShape, default_mixer, mixer_spec
from mmmamba_cli.errors import RecipeError

UNITS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


class Budget(Protocol):
    """How many layers may be attention."""

    def choose(self, scores: Mapping[int, float]) -> tuple[int, ...]:
        """The layers to be attention, ascending, given the score of every layer."""
        ...

    def has_room(self, kept: Sequence[int], num_layers: int) -> bool:
        """Whether one of the layers beside `kept` fits."""
        ...

    def next_layer(self, scores: Mapping[int, float], kept: Sequence[int]) -> int:
        """The next layer to choose, given the layers chosen and the scores of the others."""
        ...

    def record(self) -> dict[str, Any]:
        """The budget as JSON, for the manifest."""
        ...


@dataclass(frozen=True)
class CountBudget:
    """A number of attention layers."""

    count: int

    def choose(self, scores: Mapping[int, float]) -> tuple[int, ...]:
        return tuple(sorted(rank(scores)[: self.count]))

    def has_room(self, kept: Sequence[int], num_layers: int) -> bool:
        return len(kept) < min(self.count, num_layers)

    def next_layer(self, scores: Mapping[int, float], kept: Sequence[int]) -> int:
        return rank(scores)[0]

    def record(self) -> dict[str, Any]:
        return {"attention_layers": self.count}


@dataclass(frozen=True)
class BytesBudget:
    """Bytes of keys and values at a context length, for one row; `costs` has those of each layer.

    The states of linear layers are not counted: they do not grow with the context.
    """

    limit: int
    context: int
    costs: tuple[int, ...]

    def choose(self, scores: Mapping[int, float]) -> tuple[int, ...]:
        """The layers of the largest total score within the budget; of equal totals, the most.

        Exact: layers of equal cost are taken by score, and every split of the budget between the
        costs (one per stack) is compared.
        """
        ranked = rank(scores)
        groups: dict[int, list[int]] = {}
        for layer in ranked:
            groups.setdefault(self.costs[layer], []).append(layer)
        best: tuple[float, int, tuple[int, ...]] = (float("-inf"), 0, ())
        (first, members), *others = groups.items()
        for counts in product(*(range(len(found) + 1) for _, found in others)):
            spent = sum(cost * n for (cost, _), n in zip(others, counts, strict=True))
            if spent > self.limit:
                continue
            fitting = min(len(members), (self.limit - spent) // first)
            chosen = members[:fitting] + [
                layer for (_, found), n in zip(others, counts, strict=True) for layer in found[:n]
            ]
            total = sum(scores[layer] for layer in chosen)
            best = max(best, (total, len(chosen), tuple(sorted(chosen))), key=lambda one: one[:2])
        return best[2]

    def has_room(self, kept: Sequence[int], num_layers: int) -> bool:
        left = self._left(kept)
        return any(self.costs[i] <= left for i in range(num_layers) if i not in kept)

    def next_layer(self, scores: Mapping[int, float], kept: Sequence[int]) -> int:
        """The layer of the largest score per byte among those that still fit."""
        left = self._left(kept)
        fitting = {i: score / self.costs[i] for i, score in scores.items() if self.costs[i] <= left}
        return rank(fitting)[0]

    def _left(self, kept: Sequence[int]) -> int:
        return self.limit - sum(self.costs[layer] for layer in kept)

    def record(self) -> dict[str, Any]:
        return {"kv_bytes": self.limit, "context": self.context}


def rank(scores: Mapping[int, float]) -> list[int]:
    """Layers by descending score; of equal scores the lower layer comes first."""
    return sorted(scores, key=lambda layer: (-scores[layer], layer))


def kv_bytes_per_layer(
    model: ModelShape, context: int, itemsize: int, embedding_ratio: float
) -> tuple[int, ...]:
    """Bytes of keys and values of each layer as attention, for one row of `context` columns.

    `embedding_ratio`: columns of the embedding stack for each column of the language stack. It is
    above 1 where the embedding stack sees every patch of a picture.
    """
    spec = mixer_spec(default_mixer(ATTENTION))
    found = []
    for layer in range(model.num_hidden_layers):
        ratio = embedding_ratio if layer < model.num_embedding_layers else 1.0
        columns = round(context * ratio)
        stack = model.stack_of(layer)
        found.append(spec.cache_bytes(stack, model.mixer_config, 1, columns, itemsize).kv_cache)
    return tuple(found)


def parse_count(text: str, num_layers: int) -> int:
    """Parse `8`, or a share of the model's layers such as `1/4`, rounded to whole layers.

    Raises:
        RecipeError: neither a number nor a share, or more layers than the model has.
    """
    whole = re.fullmatch(r"\d+", text.strip())
    share = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if whole is None and (share is None or not int(share[2])):
        raise RecipeError(
            f"--attn-layers is {text!r}, expected a number of layers or a share of them: 8, 1/4"
        )
    if whole is not None:
        return int(text)
    part = Fraction(text.strip())
    if part > 1:
        raise RecipeError(f"--attn-layers is {text}, expected a share of at most 1/1")
    # Half a layer counts as one; a share above zero is at least one layer.
    return max(int(part * num_layers + Fraction(1, 2)), 1 if part else 0)


def parse_bytes(text: str, option: str = "--kv-bytes") -> int:
    """Parse `1GiB`, `512MB` or a number of bytes. Raises `RecipeError` for anything else."""
    match = SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in UNITS:
        raise RecipeError(f"{option} is {text!r}, expected a number with a unit: 1GiB, 512MiB, 2GB")
    return int(float(match[1]) * UNITS[match[2].lower()])
