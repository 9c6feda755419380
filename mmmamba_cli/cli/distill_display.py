"""Live display of a training."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mmmamba_cli.cli.console import err, print_table
from mmmamba_cli.cli.quiet_timer import PROGRESS_LINE_INTERVAL, QuietTimer
from mmmamba_cli.cli.stop_request import StopRequest

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from mmmamba_cli.distill import Progress, StageCallbacks, StepResult
    from mmmamba_cli.recipe import Stage

BARS = "▁▂▃▄▅▆▇█"


class TrainingDisplay(AbstractContextManager["TrainingDisplay"]):
    """A live panel in a terminal, plain lines elsewhere; process 0 only.

    Without a panel the last line is repeated, with the time since, where nothing else is printed:
    a step may take minutes, and so may loading the models.
    """

    def __init__(self, is_main: bool, stop: StopRequest):
        self.is_main = is_main
        self.stop = stop
        self._live: Live | None = None
        self._stage: Stage | None = None
        self._last_line = 0.0
        self._started = (0.0, 0)
        self._reported: set[str] = set()
        self._said, self._said_at = "starting", time.monotonic()
        self._timer = QuietTimer(self._repeat, PROGRESS_LINE_INTERVAL)

    def __enter__(self) -> TrainingDisplay:
        if self.is_main:
            self._timer.__enter__()
        return self

    @property
    def callbacks(self) -> StageCallbacks:
        from mmmamba_cli.distill import StageCallbacks

        return StageCallbacks(
            self.say, self.on_stage_begin, self.on_step_end, lambda: self.stop.received
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_live()
        if self.is_main:
            self._timer.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """A line on stderr, above the live panel if there is one."""
        if self.is_main:
            self._said, self._said_at = text, time.monotonic()
            self._print(text)

    def _repeat(self) -> None:
        if self._live is None:
            self._print(f"{self._said}, {time.monotonic() - self._said_at:.0f} s ago")

    def _print(self, text: str) -> None:
        err().print(text, markup=False, highlight=False, soft_wrap=True)
        self._timer.reset()

    def on_stage_begin(
        self, stage: Stage, trainable: Mapping[str, Any], progress: Progress
    ) -> None:
        """Print the trainable parameters and start the display of the stage."""
        from mmmamba_cli.distill import layers_per_parameter

        self._end_live()
        self._stage = stage
        self._started = (time.monotonic(), progress.step)
        if not self.is_main:
            return
        sizes: dict[str, int] = {}
        for name, parameter in trainable.items():
            (inner,) = layers_per_parameter([name])
            sizes[inner] = sizes.get(inner, 0) + parameter.numel()
        counts = layers_per_parameter(trainable)
        rows = [(name, counts[name], f"{sizes[name]:,}") for name in sorted(counts)]
        rows.append(("total", len(trainable), f"{sum(sizes.values()):,}"))
        self.say(
            f"{stage.name}: {stage.loss}, {stage.steps} steps, batch {stage.batch_size}, "
            f"lr {stage.lr:g}"
        )
        print_table(
            ("learns", "tensors", "parameters"),
            rows,
            right=("tensors", "parameters"),
            to_stderr=True,
        )
        if err().is_terminal:
            from rich.live import Live

            self._live = Live(console=err(), refresh_per_second=4, transient=False)
            self._live.start()

    def on_step_end(self, result: StepResult) -> None:
        """Show one step; print its problems in any case."""
        for sample in result.bad:
            self.say(f"skipped sample {sample}")
        for sample in result.held_out.bad if result.held_out else ():
            # Every evaluation reports the same samples.
            if sample not in self._reported:
                self._reported.add(sample)
                self.say(f"skipped held-out sample {sample}")
        if result.skipped is not None:
            self.say(f"step {result.step} skipped: {result.skipped}")
        if self._live is not None:
            self._live.update(self._panel(result))
            if result.held_out is not None:
                self.say(self._held_out(result))
            return
        stage = self._stage
        is_last = stage is not None and result.step == stage.steps
        if (
            is_last
            or result.held_out
            or time.monotonic() - self._last_line >= PROGRESS_LINE_INTERVAL
        ):
            self._last_line = time.monotonic()
            self.say(self._line(result))

    def _line(self, result: StepResult) -> str:
        name, steps = ("", 0) if self._stage is None else (self._stage.name, self._stage.steps)
        parts = [
            f"{name} {result.step}/{steps}",
            f"loss {result.loss:.4g}",
            f"lr {result.learning_rate:.3g}",
            f"|g| {result.gradient_norm:.3g}",
            f"{result.tokens_per_second:,.0f} tokens/s",
            *([] if result.memory_gib is None else [f"{result.memory_gib:.1f} GiB"]),
            f"{self._time_left(result)} left",
            *([self._held_out(result)] if result.held_out else []),
        ]
        return "  ".join(parts)

    def _held_out(self, result: StepResult) -> str:
        found = result.held_out
        assert found is not None
        text = f"held out: loss {found.loss:.4g}, top-1 agreement {found.agreement:.1%}"
        if found.student_nll is not None and found.teacher_nll is not None:
            text += f", nll {found.student_nll:.3f} (teacher {found.teacher_nll:.3f})"
        if found.bad:
            total = found.samples + len(found.bad)
            text += f", {len(found.bad)} of {total} samples could not be read"
        return text

    def _panel(self, result: StepResult) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        total = self._stage.steps if self._stage else result.step
        lines: list[RenderableType] = [
            ProgressBar(total=total, completed=result.step, width=60),
            Text(self._line(result)),
        ]
        if len(result.terms) > 1:
            lines.append(Text(_bars(result.terms)))
        return Group(*lines)

    def _time_left(self, result: StepResult) -> str:
        begun, first = self._started
        done = result.step - first
        steps = self._stage.steps if self._stage else result.step
        seconds = (time.monotonic() - begun) / max(1, done) * (steps - result.step)
        hours, rest = divmod(round(seconds), 3600)
        return f"{hours}:{rest // 60:02}:{rest % 60:02}"

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _bars(terms: Mapping[str, float]) -> str:
    """Per-layer losses as a row of bars, with the highest one; "?" where not finite."""
    finite = {name: value for name, value in terms.items() if math.isfinite(value)}
    worst = max(finite, key=lambda name: finite[name], default=None)
    top = 0.0 if worst is None else finite[worst]
    drawn = "".join(_bar(value, top) if name in finite else "?" for name, value in terms.items())
    lost = [f"{name}: {value}" for name, value in terms.items() if name not in finite]
    said = ([] if worst is None else [f"highest {worst}: {top:.3g}"]) + lost[:3]
    return "  ".join([f"layers {drawn}", *said])


def _bar(value: float, top: float) -> str:
    return BARS[max(0, min(7, int(8 * (value / top)))) if top > 0 else 0]
