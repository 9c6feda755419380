"""Model cards of the shipped students: their tables are those of the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import make_readme_pictures
import pytest
from pages import ROOT

from mmmamba_cli.checkpoint import open_checkpoint

RESULTS = make_readme_pictures.RESULTS
CATEGORIES = (
    *("mean", "random", "popular", "adversarial"),
    *("existence", "count", "position", "colour", "OCR"),
)


def rules(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The first rule of each result of a file, by suite and model."""
    found = json.loads((RESULTS / name).read_text())["results"]
    return {(one["suite"], one["model"]["name"]): one["rules"][0] for one in found}


def number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def cells(rule: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Scores with their intervals, which are left out where both ends are the score."""
    found = []
    for name in names:
        score, low, high = (
            number(one) for one in (rule["metrics"][name], *rule["intervals"][name])
        )
        found.append(score if low == high else f"{score} ({low}, {high})")
    return found


def rows(model: str) -> dict[str, list[list[str]]]:
    """The rows of a card's tables by their first cell, in order."""
    card = ROOT / "evals" / "scenes" / "models" / model / "README.md"
    found: dict[str, list[list[str]]] = {}
    for line in card.read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            head, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(head, []).append(rest)
    return found


@pytest.mark.parametrize("model", ["linear", "hybrid"])
def test_tables_of_a_card(model: str) -> None:
    name, written = f"scenes-{model}", rows(model)
    measured = rules(make_readme_pictures.SCORES)
    kept = []
    for suite in make_readme_pictures.SUITES:
        student, teacher = (measured[suite, one] for one in (name, "teacher"))
        assert written[f"`{suite}`"] == [cells(student, CATEGORIES)]
        ratios = (student["metrics"][one] / teacher["metrics"][one] for one in CATEGORIES)
        kept.append([number(100 * ratio) for ratio in ratios])
    other = rules("scenes_another_draw_cpu.json")["scenes", name]
    assert written["another draw (`--seed 2026`)"] == [cells(other, CATEGORIES)]
    long = []
    for cell in (f"{model}-seed0", "teacher"):
        file = RESULTS / "evidence" / "scenes-long" / f"{cell}.json"
        (suite,) = (
            one
            for one in json.loads(file.read_text())["suites"]
            if one["label"] == "scenes-long-4k"
        )
        long.append(suite["rules"][0])
    student, teacher = long
    names = list(student["metrics"])
    assert written["`scenes-long-4k`"] == [cells(student, names)]
    ratios = (student["metrics"][one] / teacher["metrics"][one] for one in names)
    assert written["retention, percent"] == [*kept, [number(100 * ratio) for ratio in ratios]]


@pytest.mark.parametrize("model", ["linear", "hybrid"])
def test_the_hash_of_a_card(model: str) -> None:
    card = (ROOT / "evals" / "scenes" / "models" / model / "README.md").read_text(encoding="utf-8")
    content_hash = open_checkpoint(f"scenes-{model}").source.content_hash()
    assert f"Content hash `{content_hash[:12]}`" in " ".join(card.split())
