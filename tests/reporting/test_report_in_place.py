"""Reports of runs with students of transformers' models, and the commands that follow them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from command_lines import problem_of
from ended import Command
from families import FAMILIES, save_teacher
from suite_tables import pope_rows, write_tsv
from typer.testing import CliRunner

from mmmamba_cli.cli.app import app
from mmmamba_cli.cli.next_steps import steps_after
from mmmamba_cli.profiling import profiler
from mmmamba_cli.profiling.result import RooflinePart
from mmmamba_cli.runs import Run

RATES = RooflinePart(copy_rate=1e10, matmul_rate=1e11, size=1, side=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a teacher with pictures and of a language model, each with a seeded student."""
    folder = tmp_path_factory.mktemp("report-in-place")
    for name in ("gemma3", "qwen3"):
        save_teacher(FAMILIES[name], folder / "teachers" / name)
        options = ("--dtype", "fp32", "--no-report", "--in-place", "--allow-bidirectional")
        words = ("seed", folder / "teachers" / name, "--run", folder / name, *options)
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
    write_tsv(folder / "data" / "POPE.tsv", pope_rows(each=2))
    return folder


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("gemma3", "nothing was evaluated: `mmmamba eval --suite scenes`"),
        ("qwen3", "the suites ask about pictures, and the models of this run read text only"),
    ],
)
def test_advice_of_a_page_without_scores(
    mmmamba: Command, place: Path, tmp_path: Path, name: str, advice: str
) -> None:
    done = mmmamba("report", "--run", place / name, "--out", tmp_path / "page.html")
    assert done.code == 0
    assert f"no scores and examples: {advice}" in done.err


@pytest.mark.parametrize(
    ("name", "missing", "command"),
    [
        ("gemma3", None, "eval --suite mme,pope --data DIR --teacher"),
        ("gemma3", "tokenizer.json", "profile"),
        ("qwen3", None, "chat --teacher"),
    ],
)
def test_the_commands_after_a_finished_student(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, missing: str | None, command: str
) -> None:
    monkeypatch.setenv("LMUData", str(place / "none"))
    run = Run(place / name)
    product = run.product("seed").model_copy(update={"final": True})
    file = None if missing is None else run.product_folder("seed") / missing
    if file is not None:
        file.rename(file.with_suffix(".away"))
    try:
        steps: Any = steps_after(run, product)
    finally:
        if file is not None:
            file.with_suffix(".away").rename(file)
    (line,) = steps.commands
    assert line == f"mmmamba {command} --run {run.folder}"
    assert problem_of(shlex.split(line)[1:]) is None


def test_a_page_with_scores_and_costs(
    mmmamba: Command, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "render_plot", lambda profile, kind: None)
    monkeypatch.setattr(profiler, "measure_roofline", lambda *given: RATES)
    run = ("--run", place / "gemma3")
    data = ("--data", place / "data")
    asked = mmmamba("eval", *run, *data, "--suite", "pope", "--teacher", "--max-new-tokens", 2)
    assert asked.code == 0, asked.err
    assert mmmamba("profile", *run, "--contexts", 16, "--repeats", 1).code == 0
    done = mmmamba("report", *run, *data, "--out", tmp_path / "page.html")
    assert done.code == 0, done.err
    for part in ("retention", "scores", "pope", "costs", "lineage"):
        assert part in done.out
    # Nothing is left out but training.
    assert [line for line in done.err.splitlines() if "warning" in line] == [
        "warning: no losses: no stage of distillation was run: `mmmamba distill --data FILE`"
    ]
    page = (tmp_path / "page.html").read_text()
    assert "all by the forward pass of their class in transformers" in page
    assert "seed" in page and "teacher with a static cache" in page
