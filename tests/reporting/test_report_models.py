"""Models of a page: details from config and card, and a look of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from report_case import Balanced, answer

from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.reporting import build_page, read_report_data
from mmmamba_cli.reporting.models import model_details, read_card, series_of, training_of
from mmmamba_cli.reporting.series_styles import (
    DARK_COLOURS,
    DASHES,
    LIGHT_COLOURS,
    NUM_STYLES,
    dashes,
    marker,
)

Full = tuple[Path, Path, Path]


def test_twelve_styles_differ_in_colour_marker_and_dashes() -> None:
    assert NUM_STYLES == len(set(LIGHT_COLOURS)) == len(set(DARK_COLOURS)) == len(set(DASHES)) == 12
    looks = [marker(number, 0, 0).replace(f"s{number}", "") for number in range(NUM_STYLES)]
    assert len(set(looks)) == NUM_STYLES
    # Where colours repeat, the combination does not.
    later = {(number % NUM_STYLES, dashes(number)) for number in range(3 * NUM_STYLES)}
    assert len(later) == 3 * NUM_STYLES


def test_each_model_has_one_style(full: Full) -> None:
    run, other, _ = full
    series = series_of(read_report_data(run, [other]), ["linear-stage3"])
    assert len(set(series.values())) == len(series)
    assert list(series)[:2] == ["teacher", "linear-stage3"]
    # Stages are models of their own: two curves of one panel never look alike.
    assert {"stage1", "linear-stage3 (other)"} <= set(series)


def test_details_of_shipped_models_come_from_config_and_card(full: Full, tmp_path: Path) -> None:
    run, other, data = full
    asked = shutil.copytree(other, tmp_path / "other")
    for name in ("scenes-linear", "scenes-hybrid"):
        answer(asked, data, name, ["Yes"] * 20)
        # As results of older versions: without a kind.
        file = asked / "evals" / name / "scenes" / "result.json"
        value = json.loads(file.read_text())
        value["model"] |= {"kind": "", "final": None}
        file.write_text(json.dumps(value))
    report = read_report_data(run, [asked])
    details = model_details(report)
    linear, hybrid = details["scenes-linear"], details["scenes-hybrid"]
    assert linear.kind == "linear, attention in none of 8 layers"
    assert hybrid.kind == "hybrid, attention in 2 of 8 layers"
    assert (linear.recipe, linear.final) == ("scenes-long", True)
    assert hybrid.recipe == "scenes-long, with layers.attention=2"
    assert hybrid.mixer == "Mamba-2" and round((hybrid.parameters or 0) / 1e6, 1) == 7.4
    # The front matter repeats the text of the card and the recipe.
    *first, last = (f"{stage.steps:,}" for stage in load_recipe("scenes-long").stages)
    steps = f"{', '.join(first)} and {last} steps of 192 conversations"
    assert linear.training == hybrid.training == f"{steps}, lessons drawn while training"
    assert details["teacher"].kind == "attention in all 8 layers"
    text = Balanced(build_page(report, created="now", data=data).html).text
    assert "hybrid, attention in 2 of 8 layers" in text


def test_a_card_without_front_matter_has_no_details(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert read_card(card) == {}
    for text in ("# title\n", "---\nnever ended", "---\n- a list\n---\n", "---\n: :\n---\n"):
        card.write_text(text)
        assert read_card(card) == {}, text
    card.write_text("---\nmmmamba:\n  recipe: mine\n---\n# title\n")
    assert read_card(card) == {"recipe": "mine"}


def test_training_of_a_card() -> None:
    numbered = {"lessons": 24_000, "steps": [200, 1264], "batch": 192}
    steps = "200 and 1,264 steps of 192 conversations"
    assert training_of(numbered) == f"{steps}, drawn from 24,000 lessons"
    drawn = {**numbered, "lessons": "drawn while training"}
    assert training_of(drawn) == f"{steps}, lessons drawn while training"
    for key, wrong in (("lessons", None), ("steps", []), ("steps", 3), ("batch", "many")):
        assert training_of({**numbered, key: wrong}) is None
