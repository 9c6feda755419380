"""Attention layers of a hybrid: placements of n of L layers, and explicit lists.

Layers are counted from 0 through both stacks, embedding stack first. n = 0 is the linear student,
n = L the teacher. Placements are those of mmMamba's ablations (arXiv 2502.13145).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from mmmamba_cli.errors import RecipeError


class LayerPlan(Protocol):
    """Settings that determine the attention layers, for example the recipe's `layers` section."""

    @property
    def attention(self) -> int | tuple[int, ...]: ...

    @property
    def placement(self) -> str: ...


def head_interleaved(n: int, num_layers: int) -> tuple[int, ...]:
    """The first layer of each of n equal blocks: floor(i L / n)."""
    return tuple(i * num_layers // n for i in range(n))


def tail_interleaved(n: int, num_layers: int) -> tuple[int, ...]:
    """The last layer of each of n equal blocks: floor((i + 1) L / n) - 1."""
    return tuple((i + 1) * num_layers // n - 1 for i in range(n))


def head_stacked(n: int, num_layers: int) -> tuple[int, ...]:
    """The first n layers: 0 .. n - 1."""
    return tuple(range(n))


def tail_stacked(n: int, num_layers: int) -> tuple[int, ...]:
    """The last n layers: L - n .. L - 1."""
    return tuple(range(num_layers - n, num_layers))


PLACEMENTS: Mapping[str, Callable[[int, int], tuple[int, ...]]] = {
    "head-interleaved": head_interleaved,
    "tail-interleaved": tail_interleaved,
    "head-stacked": head_stacked,
    "tail-stacked": tail_stacked,
}


def place_attention(placement: str, n: int, num_layers: int) -> tuple[int, ...]:
    """Indices of the n attention layers of `num_layers`, ascending.

    Raises RecipeError for an unknown placement, or n outside 0 .. num_layers.
    """
    if placement not in PLACEMENTS:
        raise RecipeError(
            f"layers.placement: is {placement!r}, must be one of {', '.join(PLACEMENTS)}"
        )
    if not 0 <= n <= num_layers:
        raise RecipeError(
            f"layers.attention: is {n}, must be from 0 to {num_layers}, "
            f"the number of layers of this model",
            "give a number that fits: --set layers.attention=N, or --attn-layers N",
        )
    return PLACEMENTS[placement](n, num_layers)


# Measurements that rank layers; `file:PATH` names scores in a file.
SELECTION_METHODS = ("kl-zero", "kl", "recall", "mse")
SCORES_FILE_PREFIX = "file:"


def is_selection(value: object) -> bool:
    """Whether `value` names a measurement of layers: a method, or `file:PATH`."""
    if not isinstance(value, str):
        return False
    is_file = value.startswith(SCORES_FILE_PREFIX) and len(value) > len(SCORES_FILE_PREFIX)
    return is_file or value in SELECTION_METHODS


def plan_kind(kept: int, num_layers: int) -> str:
    """Kind of a model with `kept` attention layers: `linear`, `hybrid (4 attention)` or
    `all attention`.
    """
    if kept == 0:
        return "linear"
    return "all attention" if kept == num_layers else f"hybrid ({kept} attention)"


def layer_list_problem(
    layers: Sequence[int], num_layers: int | None = None
) -> tuple[int, str] | None:
    """First problem of an explicit list of layers: its position and a sentence; None if valid.

    Without `num_layers`, for a recipe whose teacher is not known yet, only the lower bound is
    checked.
    """
    first_seen: dict[int, int] = {}
    for position, layer in enumerate(layers):
        if layer < 0:
            return position, f"is {layer}, layers are counted from 0"
        if num_layers is not None and layer >= num_layers:
            last = num_layers - 1
            return position, f"is {layer}, must be from 0 to {last}, the last layer of this model"
        if layer in first_seen:
            first = first_seen[layer]
            return position, f"is {layer}, which stands at [{first}] already; name a layer once"
        first_seen[layer] = position
    return None


def attention_layers(plan: LayerPlan, num_layers: int) -> tuple[int, ...]:
    """Indices of the attention layers in a model of `num_layers` > 0, ascending.

    Raises RecipeError naming field, index and value for a count or a list that does not fit.
    """
    if isinstance(plan.attention, int):
        return place_attention(plan.placement, plan.attention, num_layers)
    problem = layer_list_problem(plan.attention, num_layers)
    if problem is not None:
        position, sentence = problem
        raise RecipeError(f"layers.attention[{position}]: {sentence}")
    return tuple(sorted(plan.attention))
