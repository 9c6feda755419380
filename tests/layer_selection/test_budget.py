"""Budgets of attention layers, and files of scores."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from small import small_model

from mmmamba_cli.errors import MmmambaError, RecipeError
from mmmamba_cli.layer_selection import (
    BytesBudget,
    CountBudget,
    LayerScore,
    LayerScores,
    kv_bytes_per_layer,
    parse_bytes,
    parse_count,
    spearman,
)
from mmmamba_cli.layer_selection.layer_scores import (
    half_agreement,
    read_given_scores,
    read_layer_scores,
    write_layer_scores,
)

STACKS = ["embedding", "language", "language"]


def score(layer: int, value: float, halves: tuple[float, float] = (0.0, 0.0)) -> LayerScore:
    fields = {"layer": layer, "stack": STACKS[layer], "score": value, "halves": halves}
    return LayerScore.model_validate({**fields, "error": 0.1})


def test_a_number_of_layers_takes_the_best() -> None:
    scores = {0: 1.0, 1: 3.0, 2: 3.0, 3: -1.0}
    assert CountBudget(2).choose(scores) == (1, 2)
    assert CountBudget(3).choose(scores) == (0, 1, 2)
    assert CountBudget(2).next_layer(scores, ()) == 1
    assert CountBudget(2).has_room((5,), 8) and not CountBudget(2).has_room((5, 6), 8)
    assert not CountBudget(9).has_room((0, 1), 2)


@pytest.mark.parametrize("seed", range(20))
def test_bytes_choose_the_largest_total_of_all_subsets(seed: int) -> None:
    rng = random.Random(seed)
    costs = (400,) * 3 + (100,) * 4
    scores = {layer: rng.random() for layer in range(7)}
    limit = rng.randrange(100, 1600)
    budget = BytesBudget(limit, 1000, costs)
    subsets = itertools.chain.from_iterable(itertools.combinations(range(7), n) for n in range(8))
    fitting = [one for one in subsets if sum(costs[i] for i in one) <= limit]
    best = max(fitting, key=lambda one: (sum(scores[i] for i in one), len(one)))
    assert budget.choose(scores) == best


def test_the_next_layer_is_the_best_per_byte_that_fits() -> None:
    budget = BytesBudget(500, 1000, (400, 100, 100))
    assert budget.next_layer({0: 2.0, 1: 1.0, 2: 0.1}, ()) == 1
    assert budget.next_layer({0: 2.0, 2: 0.4}, (1,)) == 0
    assert budget.has_room((1,), 3) and not budget.has_room((0, 1), 3)


def test_bytes_of_keys_and_values_grow_with_the_columns_of_a_stack() -> None:
    # 2 stacks of 2 layers: keys and values, 2 heads of 8, 2 bytes.
    config = small_model("mmmm", shuffle="post").config
    per_column = 2 * 2 * 8 * 2
    assert kv_bytes_per_layer(config, 1000, 2, 1.0) == (1000 * per_column,) * 4
    embedding, language = 2500 * per_column, 1000 * per_column
    assert kv_bytes_per_layer(config, 1000, 2, 2.5) == (*(embedding,) * 2, *(language,) * 2)


@pytest.mark.parametrize(
    ("text", "num_layers", "expected"),
    [("8", 32, 8), ("1/4", 32, 8), ("1/4", 6, 2), ("1/100", 8, 1), ("0/4", 8, 0), ("1/1", 5, 5)],
)
def test_numbers_and_shares_of_layers(text: str, num_layers: int, expected: int) -> None:
    assert parse_count(text, num_layers) == expected


@pytest.mark.parametrize("text", ["-1", "1.5", "1/0", "3/2", "many", ""])
def test_other_numbers_of_layers_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--attn-layers"):
        parse_count(text, 8)


def test_sizes() -> None:
    assert [parse_bytes(one) for one in ("1GiB", "1.5 kb", "512")] == [1 << 30, 1500, 512]
    for text in ("1GiBi", "-1", "much"):
        with pytest.raises(RecipeError, match="expected a number with a unit"):
            parse_bytes(text)


def test_rank_correlation() -> None:
    assert spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # scipy.stats.spearmanr([1, 2, 2, 4], [1, 3, 2, 4]) = 0.9487
    assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9487, abs=1e-4)
    assert spearman([1], [1]) is None and spearman([1, 1], [1, 2]) is None
    assert half_agreement([score(0, 1, (1, 2)), score(1, 2, (2, 1))]).is_low
    assert not half_agreement([score(0, 1, (1, 1)), score(1, 2, (2, 2))]).is_low


def test_scores_are_kept_by_round(tmp_path: Path) -> None:
    empty = LayerScores(
        method="kl", unit="nats", num_layers=3, embedding_ratio=1.0, inputs={"samples": 4}
    )
    scores = empty.with_score((), score(0, 1.5)).with_score((), score(1, 0.5))
    scores = scores.with_score((), score(2, 9.5)).with_score((2,), score(0, 1.0))
    assert [one.layer for one in scores.round_of(()).layers] == [0, 1, 2]
    assert [one.layer for one in scores.round_of((2,)).layers] == [0]
    write_layer_scores(tmp_path / "selection" / "kl.json", scores)
    assert read_layer_scores(tmp_path / "selection" / "kl.json") == scores


def test_scores_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"scores": [0.5, 2, 1]}))
    found, ratio = read_given_scores(file, STACKS)
    assert [(one.layer, one.stack, one.score) for one in found] == [
        (0, "embedding", 0.5),
        (1, "language", 2.0),
        (2, "language", 1.0),
    ]
    assert ratio == 1.0
    for text, message in (
        ('{"scores": [1, 2]}', "has scores of 2 layers, the model has 3"),
        ('{"scores": [1, 2, true]}', "no list of numbers"),
        ("[1, 2, 3]", "no list of numbers"),
        ("{", "is not valid JSON"),
    ):
        file.write_text(text)
        with pytest.raises(MmmambaError, match=message):
            read_given_scores(file, STACKS)
    with pytest.raises(MmmambaError, match="no such file"):
        read_given_scores(tmp_path / "none.json", STACKS)
