"""Placements of attention layers, and invalid lists."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe import PLACEMENTS, Layers, attention_layers, place_attention

counts = st.integers(0, 80).flatmap(lambda L: st.tuples(st.integers(0, L), st.just(L)))


@settings(deadline=None)
@given(counts, st.sampled_from(sorted(PLACEMENTS)))
def test_a_placement_is_n_different_layers_in_order(count: tuple[int, int], placement: str) -> None:
    n, num_layers = count
    layers = place_attention(placement, n, num_layers)
    assert len(layers) == n
    assert list(layers) == sorted(set(layers))
    assert set(layers) <= set(range(num_layers))


@settings(deadline=None)
@given(counts)
def test_placements_follow_their_formulas(count: tuple[int, int]) -> None:
    n, L = count
    assert place_attention("head-interleaved", n, L) == tuple(
        math.floor(i * L / n) for i in range(n)
    )
    assert place_attention("tail-interleaved", n, L) == tuple(
        math.floor((i + 1) * L / n) - 1 for i in range(n)
    )
    assert place_attention("head-stacked", n, L) == tuple(i for i in range(L) if i < n)
    assert place_attention("tail-stacked", n, L) == tuple(i for i in range(L) if i >= L - n)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("head-interleaved", (0, 4, 8, 12, 16, 20, 24, 28)),
        ("tail-interleaved", (3, 7, 11, 15, 19, 23, 27, 31)),
        ("head-stacked", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("tail-stacked", (24, 25, 26, 27, 28, 29, 30, 31)),
    ],
)
def test_eight_of_thirty_two(placement: str, expected: tuple[int, ...]) -> None:
    assert place_attention(placement, 8, 32) == expected


def test_layers_that_do_not_divide_evenly() -> None:
    assert place_attention("head-interleaved", 3, 7) == (0, 2, 4)
    assert place_attention("tail-interleaved", 3, 7) == (1, 3, 6)


@pytest.mark.parametrize("placement", sorted(PLACEMENTS))
def test_none_is_the_linear_student_and_all_the_teacher(placement: str) -> None:
    assert place_attention(placement, 0, 6) == ()
    assert place_attention(placement, 6, 6) == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("n", [-1, 7])
def test_a_count_out_of_range_names_field_value_and_range(n: int) -> None:
    with pytest.raises(RecipeError, match=rf"^layers.attention: is {n}, must be from 0 to 6,"):
        place_attention("head-stacked", n, 6)


def test_an_unknown_placement_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"layers.placement: is 'middle', .*tail-interleaved"):
        place_attention("middle", 1, 6)


def test_a_plan_is_a_count_placed_or_a_list_sorted() -> None:
    plan = Layers(attention=2, placement="tail-stacked")
    assert attention_layers(plan, 6) == (4, 5)
    assert attention_layers(Layers(attention=(5, 0, 3)), 6) == (0, 3, 5)
    assert attention_layers(Layers(attention=()), 6) == ()


class Plan:
    """A plan without validation."""

    placement = "head-interleaved"

    def __init__(self, *attention: int) -> None:
        self.attention = attention


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((0, 6), r"^layers.attention\[1\]: is 6, must be from 0 to 5,"),
        ((0, -1), r"^layers.attention\[1\]: is -1, layers are counted from 0"),
        ((3, 0, 3), r"^layers.attention\[2\]: is 3, which stands at \[0\] already"),
    ],
)
def test_an_invalid_list_names_index_and_value(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        attention_layers(Plan(*layers), 6)


def test_more_attention_layers_than_the_model_has() -> None:
    with pytest.raises(RecipeError, match="is 8, must be from 0 to 6"):
        attention_layers(Layers(attention=8), 6)
