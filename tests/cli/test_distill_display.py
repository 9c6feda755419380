"""The terminal display of a training, including steps without a finite loss."""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from mmmamba_cli.cli import distill_display
from mmmamba_cli.cli.distill_display import TrainingDisplay
from mmmamba_cli.cli.stop_request import StopRequest
from mmmamba_cli.distill import Progress, StepResult
from mmmamba_cli.distill.validation import HeldOutMetrics
from mmmamba_cli.recipe import Stage

NAN, INF = math.nan, math.inf
STAGE = Stage(
    name="stage1", learns="new", loss="mixer-mse", inputs="teacher", steps=9, batch_size=2, lr=1e-3
)
GOOD = StepResult(
    step=1,
    loss=1.0,
    terms={"layer 0": 1.0, "layer 1": 4.0, "layer 2": 8.0},
    learning_rate=1e-3,
    gradient_norm=1.0,
    tokens=10,
    tokens_per_second=5.0,
)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Console]:
    console = Console(file=io.StringIO(), force_terminal=True, width=160, color_system=None)
    monkeypatch.setattr(distill_display, "err", lambda: console)
    monkeypatch.setattr(distill_display, "print_table", lambda *_, **__: None)
    yield console


def shown(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_a_step_without_a_finite_loss_in_a_terminal(loss: float, terminal: Console) -> None:
    bad = replace(
        GOOD,
        step=2,
        loss=loss,
        gradient_norm=loss,
        terms={**GOOD.terms, "layer 1": loss},
        skipped=f"the loss is {loss} in layer 1",
        held_out=HeldOutMetrics(loss, 0.5, loss, loss, 10, 2),
    )
    with TrainingDisplay(True, StopRequest()) as display:
        display.on_stage_begin(STAGE, {}, Progress())
        display.on_step_end(GOOD)
        display.on_step_end(bad)
    text = shown(terminal)
    assert f"step 2 skipped: the loss is {loss} in layer 1" in text
    assert f"layers ▂?█  highest layer 2: 8  layer 1: {loss}" in text
    assert "stage1 2/9" in text


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ({"a": NAN, "b": NAN}, "layers ??  a: nan  b: nan"),
        ({"a": 0.0, "b": 0.0}, "layers ▁▁  highest a: 0"),
        ({"a": -1.0, "b": 2.0}, "layers ▁█  highest b: 2"),
        ({"a": 1e308, "b": 1.7e308}, "layers ▅█  highest b: 1.7e+308"),
        ({"a": 5e-324, "b": 5e-324}, "layers ██  highest a: 4.94e-324"),
    ],
)
def test_bars_of_any_numbers(terms: dict[str, float], expected: str) -> None:
    assert distill_display._bars(terms) == expected


def test_held_out_samples_are_named_once_and_always_counted(terminal: Console) -> None:
    found = HeldOutMetrics(1.0, 0.5, None, None, 10, 3, bad=("set.jsonl:7: no such image",))
    with TrainingDisplay(True, StopRequest()) as display:
        display.on_stage_begin(STAGE, {}, Progress())
        for step in (1, 2):
            display.on_step_end(replace(GOOD, step=step, held_out=found))
    text = shown(terminal)
    assert text.count("skipped held-out sample set.jsonl:7: no such image") == 1
    assert "1 of 4 samples could not be read" in text


def test_the_last_line_is_repeated_where_nothing_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill_display, "PROGRESS_LINE_INTERVAL", 0.05)
    with TrainingDisplay(False, StopRequest()) as silent:
        silent.say("process 1")
        with TrainingDisplay(True, StopRequest()) as display:
            display.say("loading teacher and student")
            err, end = "", time.monotonic() + 120
            while err.count("\n") < 2:
                assert time.monotonic() < end, err
                time.sleep(0.01)
                err += capsys.readouterr().err
    first, second, *_ = err.splitlines()
    assert first == "loading teacher and student"
    assert re.fullmatch(r"loading teacher and student, \d+ s ago", second)
