"""Progress of `mmmamba ablate`: cells done and left, and the step of each cell that runs."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING

from mmmamba_cli.cli.console import PROGRESS_LINE_INTERVAL, err

if TYPE_CHECKING:
    from rich.live import Live


class AblationDisplay(AbstractContextManager["AblationDisplay"]):
    """A live panel in a terminal, lines at least `PROGRESS_LINE_INTERVAL` apart elsewhere."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._last_line = 0.0
        self._head = ""
        self._seconds: tuple[float, float] | None = None
        self._steps: dict[str, tuple[str, int, int]] = {}

    def __enter__(self) -> AblationDisplay:
        if err().is_terminal:
            from rich.live import Live

            self._live = Live(console=err(), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        err().print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, done: int, total: int, seconds: float | None) -> None:
        """Cells done and in all, and the estimated seconds that are left."""
        self._head = f"{done}/{total} cells"
        self._seconds = None if seconds is None else (time.monotonic(), seconds)
        # Cells that have ended are not shown any more.
        self._steps.clear()
        self._show(at_once=True)

    def report(self, unit: str, what: str, done: int, total: int) -> None:
        """Where a cell is: steps of a stage, or answers of a suite."""
        self._steps[unit] = (what, done, total)
        self._show(at_once=False)

    def _show(self, at_once: bool) -> None:
        steps = [f"{unit} {what} {n}/{of}" for unit, (what, n, of) in self._steps.items()]
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text("\n".join([self._line(), *steps])))
            return
        now = time.monotonic()
        if at_once or now - self._last_line >= PROGRESS_LINE_INTERVAL:
            self._last_line = now
            self.say("  ".join([self._line(), *steps]))

    def _line(self) -> str:
        if self._seconds is None:
            return self._head
        since, seconds = self._seconds
        left = max(0.0, seconds - (time.monotonic() - since)) / 60
        return f"{self._head}  about {left:.0f} min left"
