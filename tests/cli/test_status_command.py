"""`mmmamba status`: the lineage in a terminal, in a pipe and as JSON."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from ended import Command
from rich.console import Console

from mmmamba_cli.cli.status import _draw, command
from mmmamba_cli.inspection import read_lineage
from mmmamba_cli.runs import Run

LOSSES = [4.0, 3.0, "nan", 1.0]


def result(manifest: dict[str, Any], suite: str, used: int = 10) -> dict[str, Any]:
    """A result as `mmmamba eval` writes it."""
    rule = {
        "rule": "vlmevalkit",
        "scoring": "mme_words",
        "metric": "perception",
        "metrics": {"perception": 1234.5, "reasoning": 1.0},
        "intervals": {},
        "counts": {},
        "categories": {},
    }
    return {
        "suite": suite.lower(),
        "title": suite,
        "version": 1,
        "suite_digest": "x",
        "data": {"file": "x.tsv", "sha256": "x", "rows": 10, "used": used},
        "model": {"name": manifest["name"], "content_hash": manifest["content_hash"]},
        "settings": {},
        "rules": [rule, {**rule, "rule": "internvl", "metrics": {"perception": 7.0}}],
        "seed": 0,
        "versions": {},
    }


@pytest.fixture
def run(mmmamba: Command, student_run: Path, tmp_path: Path) -> Path:
    """A seed and a hybrid with the held-out losses and scores that training and eval write."""
    folder = tmp_path / "run"
    shutil.copytree(student_run, folder)
    assert mmmamba("hybridize", "--run", folder, "--layers", "0,5").code == 0
    hybrid = next(p for p in (folder / "products").iterdir() if p.name.startswith("hybrid"))
    hybrid = hybrid.rename(folder / "products" / hybrid.name)
    rows = [{"step": i, "loss": 1.0} for i in range(3)]
    rows += [{"step": 9 + i, "held_out/loss": value} for i, value in enumerate(LOSSES)]
    (hybrid / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = json.loads((hybrid / "manifest.json").read_text())
    for suite, used in (("MME", 10), ("POPE", 4)):
        place = folder / "evals" / hybrid.name / suite.lower()
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(result(manifest, suite, used)))
    # A result of another kit, and one of a product that was replaced later.
    other = folder / "evals" / hybrid.name / "lm-eval"
    other.mkdir()
    (other / "result.json").write_text('{"kit": "lm-eval"}')
    stale = folder / "evals" / "seed" / "mme"
    stale.mkdir(parents=True)
    gone = {**manifest, "content_hash": "0" * 64}
    (stale / "result.json").write_text(json.dumps(result(gone, "OLD")))
    return folder


def test_piped_lines_are_not_wrapped(mmmamba: Command, run: Path) -> None:
    done = mmmamba("status", "--run", run)
    assert done.code == 0, done.err
    lines = [
        line.lstrip(" └─│") if "│·" not in line else line.strip() for line in done.out.splitlines()
    ]
    assert lines[0] == f"teacher {run.parent}" or lines[0].startswith("teacher /")
    assert "■ attention  · linear" in lines[1]
    text = done.out
    assert "··│······" in text
    assert "■·│···■··" in text
    assert "held out █▆×▁ 4 to 1" in text
    assert "MME: perception 1,234.5 (vlmevalkit), perception 7.0 (internvl)" in text
    assert "POPE: perception 1,234.5 (vlmevalkit, part)" in text
    assert "OLD" not in text
    assert "hybrid (2 attention), 0.1 M, float32, " in text
    assert "<- current" in next(line for line in text.splitlines() if "hybrid-" in line)
    assert "\x1b" not in text
    assert text.index("seed") < text.index("hybrid-")


def test_unreadable_results_are_reported(mmmamba: Command, run: Path) -> None:
    (run / "evals" / "seed" / "pope").mkdir()
    (run / "evals" / "seed" / "pope" / "result.json").write_text("{")
    done = mmmamba("status", "--run", run)
    assert (done.code, done.err.count("warning:")) == (0, 2)
    assert "lm-eval/result.json has the scores of lm-eval, which are not those" in done.err
    assert "seed/pope/result.json is no result of mmmamba eval: not shown" in done.err
    found = json.loads(mmmamba("status", "--run", run, "--json").out)
    assert len(found["left_out"]) == 2


def test_a_rule_without_a_date_in_an_older_result(mmmamba: Command, run: Path) -> None:
    (file,) = (run / "evals").glob("hybrid-*/mme/result.json")
    value = json.loads(file.read_text())
    for part in value["rules"]:
        part["scoring"] = "choice_rows"
    file.write_text(json.dumps(value))
    text = mmmamba("status", "--run", run).out
    assert "MME: perception 1,234.5 (vlmevalkit-2025-08), perception 7.0 (internvl)" in text


def test_json_output(mmmamba: Command, run: Path) -> None:
    found = json.loads(mmmamba("status", "--run", run, "--json").out)
    seed, hybrid = found["products"]
    assert hybrid["held_out"] == [4.0, 3.0, None, 1.0]
    assert hybrid["bytes"] > 100_000
    assert seed["scores"] == []
    assert hybrid["scores"][0] == {
        "suite": "MME",
        "rule": "vlmevalkit",
        "metric": "perception",
        "value": 1234.5,
        "partial": False,
    }
    assert [s["partial"] for s in hybrid["scores"]] == [False, False, True, True]
    assert found["current"] == hybrid["name"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_output_fits_the_terminal_without_loss(run: Path, width: int) -> None:
    def drawn(columns: int) -> list[str]:
        file = io.StringIO()
        Console(file=file, width=columns, force_terminal=False).print(
            _draw(read_lineage(Run(run)), "utf-8")
        )
        return file.getvalue().splitlines()

    lines = drawn(width)
    assert max(map(len, lines)) <= width

    def words(lines: list[str]) -> str:
        return "".join("".join(line.strip(" └─├│") for line in lines).split())

    assert words(lines) == words(drawn(100_000))


def test_an_encoding_without_the_marks_gets_letters(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    command(run)
    sys.stdout.flush()
    text = written.getvalue().decode("ascii")
    assert "#.|...#.." in text
    assert "held out @*x_ 4 to 1" in text


def test_a_missing_run_is_a_user_error(mmmamba: Command, tmp_path: Path) -> None:
    done = mmmamba("status", "--run", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "is not a run" in done.err
