"""docs/tutorial.md: the table of its last section is that of the recipes and results."""

from __future__ import annotations

import json

import make_readme_pictures
from pages import ROOT

from mmmamba_cli.recipe import load_recipe

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def row(head: str) -> list[str]:
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {head} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_conversations_are_steps_times_batch_size() -> None:
    demo, linear = (load_recipe(name) for name in ("scenes-demo", "scenes-linear"))
    hybrid = load_recipe("scenes-linear", ["stages.stage3.steps=1264"])
    assert "--set stages.stage3.steps=1264" in PAGE
    expected = [
        ", ".join(f"{stage.steps * stage.batch_size:,}" for stage in recipe.stages)
        for recipe in (demo, linear, hybrid)
    ]
    assert row("conversations in stages 1, 2 and 3") == expected


def test_seconds_are_those_of_the_shipped_students() -> None:
    file = ROOT / "benchmarks" / "results" / "scenes_students.json"
    stages = json.loads(file.read_text())["made_with"]["stages"]
    first = [
        f"{stages[name]['steps'] * stages[name]['median seconds a step']:.0f}"
        for name in ("stage1", "stage2")
    ]
    cells = [
        ", ".join([*first, f"{stages[f'{model}, stage 3']['seconds']:.0f}"])
        for model in ("linear", "hybrid")
    ]
    assert row("seconds of stages 1, 2 and 3") == ["", *cells]


def test_scores_are_those_of_the_shipped_students() -> None:
    figures = make_readme_pictures.read_figures()
    for suite in make_readme_pictures.SUITES:
        scores = (figures.scores[suite][model] for model in ("linear", "hybrid"))
        cells = [f"{mean:.1f} ({low:.1f}, {high:.1f})" for mean, low, high in scores]
        assert row(f"`{suite}`" + (", percent right" if suite == "scenes" else "")) == ["", *cells]
