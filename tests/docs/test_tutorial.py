"""docs/tutorial.md: the table of its last section is that of the recipes and results."""

from __future__ import annotations

import json
from typing import Any

import make_readme_pictures
from pages import ROOT

from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.recipe import load_recipe

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
EVIDENCE = ROOT / "benchmarks" / "results" / "evidence" / "scenes-long"


def row(head: str) -> list[str]:
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {head} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_conversations_are_steps_times_batch_size() -> None:
    expected = [
        ", ".join(f"{stage.steps * stage.batch_size:,}" for stage in load_recipe(name).stages)
        for name in ("scenes-demo", "scenes-long", "scenes-long")
    ]
    assert row("conversations in each stage") == expected


def test_seconds_and_losses_are_those_of_the_shipped_students() -> None:
    cells: dict[str, dict[str, Any]] = {
        name: json.loads((EVIDENCE / f"{name}-seed0.json").read_text())
        for name in ("linear", "hybrid")
    }
    seconds = [
        ", ".join(f"{value:.0f}" for value in cell["timing"]["stages"].values())
        for cell in cells.values()
    ]
    assert row("seconds of each stage") == ["", *seconds]
    (stage,) = (one for one in cells["linear"]["stages"] if one["name"] == "stage3")
    first, *_, last = stage["held_out"]
    losses = (f"{one['loss']:.2f} at step {one['step']:,}" for one in (first, last))
    assert f"fell from {' to '.join(losses)}" in " ".join(PAGE.split())


def test_shipped_students_are_those_of_the_cells() -> None:
    file = ROOT / "benchmarks" / "results" / make_readme_pictures.SCORES
    found = {
        result["model"]["name"]: result["model"]["content_hash"]
        for result in json.loads(file.read_text())["results"]
    }
    for name in ("linear", "hybrid"):
        cell = json.loads((EVIDENCE / f"{name}-seed0.json").read_text())
        shipped = open_checkpoint(f"scenes-{name}").source.content_hash()
        assert cell["model"]["content_hash"] == found[f"scenes-{name}"] == shipped


def test_scores_are_those_of_the_shipped_students() -> None:
    figures = make_readme_pictures.read_figures()
    for suite in make_readme_pictures.SUITES:
        scores = (figures.scores[suite][model] for model in ("linear", "hybrid"))
        cells = [f"{mean:.1f} ({low:.1f}, {high:.1f})" for mean, low, high in scores]
        assert row(f"`{suite}`" + (", percent right" if suite == "scenes" else "")) == ["", *cells]
