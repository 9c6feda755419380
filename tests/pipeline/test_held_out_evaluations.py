"""Held-out evaluations of `mmmamba distill`: the best student, and evaluations that fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distill import distill, done, killed_at, mmmamba, same, weights

from mmmamba_cli.distill import trainer
from mmmamba_cli.runs import Run

STAGE = ("--stage", "1")
EVERY_STEP = ("--set", "stages.stage1.evaluate_every=1")


def held_out(seeded: Path) -> tuple[object, ...]:
    return "--held-out", seeded / "held_out.jsonl"


def metrics_rows(work: Path) -> list[dict[str, Any]]:
    file = work / "run/products/stage1/metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_product_is_the_last_student_and_not_the_best(
    work: Path, seeded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(*distill(work, seeded, *STAGE))
    last = weights(work, "stage1")
    evaluate, losses = trainer.evaluate_held_out, iter((1.0, 2.0, 3.0, 4.0))
    monkeypatch.setattr(
        trainer, "evaluate_held_out", lambda *args: replace(evaluate(*args), loss=next(losses))
    )
    done(*distill(work, seeded, *STAGE, *held_out(seeded), *EVERY_STEP, "--overwrite"))
    assert Run(work / "run").product("stage1").metrics["best_step"] == 1
    assert same(weights(work, "stage1"), last)
    assert not same(weights(work, "stage1-best"), last)


@pytest.mark.parametrize("failing", [2, 4])
def test_an_evaluation_without_memory_is_repeated(
    failing: int, work: Path, seeded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step whose evaluation fails is saved; the next command evaluates it and goes on."""
    words = distill(work, seeded, *STAGE, *held_out(seeded), *EVERY_STEP)
    done(*words)
    expected, rows = Run(work / "run").product("stage1").metrics, metrics_rows(work)
    evaluate, calls = trainer.evaluate_held_out, []

    def fail_once(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(*args)

    monkeypatch.setattr(trainer, "evaluate_held_out", fail_once)
    assert mmmamba(*words, "--overwrite").exit_code != 0
    (state,) = (work / "run/training/stage1").glob("step-*/state.json")
    assert json.loads(state.read_text())["progress"]["step"] == failing
    done(*words, "--overwrite")
    assert len(calls) == 5
    found = Run(work / "run").product("stage1").metrics
    measured = {"seconds": 0.0}
    assert {**found, **measured} == {**expected, **measured}
    speed = {"tokens_per_second": 0.0}
    assert [{**row, **speed} for row in metrics_rows(work)] == [{**row, **speed} for row in rows]


@pytest.mark.parametrize(
    ("change", "is_reset"), [("loss_scale=1e-3", True), ("optimiser.weight_decay=0.01", False)]
)
def test_another_loss_resets_the_best_student(
    change: str, is_reset: bool, work: Path, seeded: Path
) -> None:
    killed_at(work, seeded, "stage1", 2, *held_out(seeded), *EVERY_STEP)
    for file in (work / "run/training/stage1").glob("step-*/state.json"):
        record = json.loads(file.read_text())
        record["progress"]["best_loss"] = -1.0
        file.write_text(json.dumps(record))
    changed = ("--set", f"stages.stage1.{change}", "--force")
    done(*distill(work, seeded, *STAGE, *held_out(seeded), *EVERY_STEP, *changed))
    metrics = Run(work / "run").product("stage1").metrics
    assert (metrics["best_loss"] > 0) == is_reset
