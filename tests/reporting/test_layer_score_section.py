"""The section of a report on layers that were chosen by measurement."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from report_case import Balanced

from mmmamba_cli.layer_selection import LayerScore, LayerScores
from mmmamba_cli.layer_selection.layer_scores import file_digest, write_layer_scores
from mmmamba_cli.reporting import build_page, read_report_data
from mmmamba_cli.reporting.layer_scores import write_score_picture
from mmmamba_cli.reporting.svg_file import COLOURS

Full = tuple[Path, Path, Path]


def score(layer: int, value: float, halves: tuple[float, float]) -> LayerScore:
    stack = "embedding" if layer < 1 else "language"
    fields = {"layer": layer, "stack": stack, "score": value, "halves": halves, "error": 0.25}
    return LayerScore.model_validate(fields)


SCORES = (score(0, 1.5, (1, 2)), score(1, -0.5, (2, 1)), score(2, 7.25, (3, 0)))


def selected_run(full: Full, folder: Path) -> tuple[Path, Path]:
    """A copy of a run whose newest product was chosen by a file of scores; the run and the file."""
    run = folder / "run"
    shutil.copytree(full[0], run)
    scores = LayerScores(
        method="kl-zero", unit="nats", num_layers=3, embedding_ratio=1.0, inputs={}
    )
    for one in SCORES:
        scores = scores.with_score((), one)
    file = run / "selection" / "kl-zero-1.json"
    write_layer_scores(file, scores)
    manifest = sorted(run.glob("products/*/manifest.json"))[-1]
    fields = json.loads(manifest.read_text())
    record = {"scores": "selection/kl-zero-1.json", "scores_sha256": file_digest(file)}
    fields |= {"attention_layers": [2], "selection": {"method": "kl-zero", **record}}
    manifest.write_text(json.dumps(fields))
    return run, file


def test_the_section_has_bars_by_stack_and_the_numbers(full: Full, tmp_path: Path) -> None:
    run, _ = selected_run(full, tmp_path)
    page = build_page(read_report_data(run), created="today", data=full[2])
    (name,) = [one for one in page.shown if one.startswith("attention layers")]
    text = page.html
    Balanced(text)
    assert "chosen by kl-zero: nats" in text and "layer 2, attention" in text
    assert "Spearman -1.00" in text and "depends much on the samples" in text
    assert text.rindex(">7.25<") < text.rindex(">1.5<") < text.rindex(">-0.5<")
    assert name not in page.left_out


def test_changed_scores_are_left_out_and_named(full: Full, tmp_path: Path) -> None:
    run, file = selected_run(full, tmp_path)
    file.write_text(file.read_text() + " ")
    page = build_page(read_report_data(run), created="today", data=full[2])
    assert not [one for one in page.shown if one.startswith("attention layers")]
    assert any("was changed since" in reason for reason in page.left_out.values())
    file.unlink()
    page = build_page(read_report_data(run), created="today", data=full[2])
    assert any("are not in the run" in reason for reason in page.left_out.values())


def test_the_picture_stands_alone(tmp_path: Path) -> None:
    write_score_picture(tmp_path / "a.svg", "Scores <of> layers", SCORES, (2,))
    text = (tmp_path / "a.svg").read_text()
    Balanced(text)
    # Three bars and the ground.
    assert text.count("<rect") == 4
    assert "var(" not in text and COLOURS["s0"] in text
    assert "Scores &lt;of&gt; layers" in text
