"""docs/how-to/qwen3-vl.md: its commands run on a tiny teacher, its table is that of the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import run_page
from pages import ROOT
from tiny_qwen3_vl import PAGE, RECIPE, prepare
from typer.testing import CliRunner

from mmmamba_cli.cli.app import app
from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.runs import Run

RESULTS = ROOT / "benchmarks" / "results" / "qwen3_vl_needs.json"
GIB = 2**30


def commands() -> list[list[str]]:
    """The page's commands that are run, in their order."""
    found = run_page.fences(PAGE.read_text(encoding="utf-8"))
    texts = [fence.text for fence in found if fence.mark == run_page.MARK]
    return [call for text in texts for call in run_page.mmmamba_calls(text)]


def test_the_commands_run_on_a_tiny_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process; `python tests/docs/tiny_qwen3_vl.py FOLDER` runs them in shells."""
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    called = commands()
    for words in called:
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, (words, result.output)
    names = [words[0] for words in called]
    steps = ["verify", "data", "recipe", "seed", "distill", "distill", "hybridize", "distill"]
    assert names == [*steps, "eval", "report", "export"]
    run = Run(tmp_path / "runs" / "qwen")
    product = run.product(run.record.current)
    assert product.stages == tuple(stage.name for stage in load_recipe(RECIPE).stages)
    assert product.final and len(product.attention_layers) == 1
    assert (run.folder / "report.html").is_file()
    assert (tmp_path / "exported" / "config.json").is_file()


def table() -> dict[str, list[str]]:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if " B | " in line]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {name: values for name, *values in cells}


def test_the_table_is_that_of_the_results() -> None:
    found = json.loads(RESULTS.read_text())["models"]
    expected = {}
    for name, model in found.items():
        stages = model["stages"]
        values = [stages["stage1"]["memory"]["frozen_weights"]]
        values += [stages[f"stage{i}"]["memory"]["total"] for i in (1, 2, 3)]
        values += [model["seed_bytes"], model["disk_peak_bytes"]]
        assert stages["stage4"]["memory"] == stages["stage3"]["memory"]
        expected[f"{name.removesuffix('B')} B"] = [f"{value / GIB:.1f}" for value in values]
    assert table() == expected


def test_the_results_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the smallest model; the sizes are those of the published checkpoints."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("qwen3_vl_needs", None)
    import qwen3_vl_needs

    stored = json.loads(RESULTS.read_text())
    made = qwen3_vl_needs.needs(
        qwen3_vl_needs.linear_student(*qwen3_vl_needs.SIZES["2B"]), load_recipe(stored["recipe"])
    )
    assert json.loads(json.dumps(made)) == stored["models"]["2B"]
    parameters = [model["teacher_parameters"] / 1e9 for model in stored["models"].values()]
    assert parameters == pytest.approx([2.13, 4.44, 8.77], rel=0.005)
