"""The stop of a long command by Ctrl-C or SIGTERM, at a point where its work is saved."""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmmamba_cli.distributed.stop_signals import StopSignalCounter


class StopRequest(AbstractContextManager["StopRequest"]):
    """Records the first Ctrl-C or SIGTERM; the second ends the process with 130 or 143.

    A signal within a second of the first is a copy of the same request, also after this context.
    One of several processes `prints` the message that the command stops after this `unit`.
    """

    def __init__(self, prints: bool = True, unit: str = "step") -> None:
        self.prints = prints
        self.unit = unit
        self._signals: StopSignalCounter | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def received(self) -> bool:
        return self._signals is not None and self._signals.count > 0

    def __enter__(self) -> StopRequest:
        from mmmamba_cli.distributed.stop_signals import SIGNALS, StopSignalCounter

        self._signals = StopSignalCounter()
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from mmmamba_cli.distributed.stop_signals import restore_handlers

        assert self._signals is not None
        restore_handlers(self._before, self._signals)

    def _note(self, number: int, frame: FrameType | None) -> None:
        from mmmamba_cli.distributed.stop_signals import (
            exit_by_signal,
            stopping_message,
            write_from_handler,
        )

        assert self._signals is not None
        if self._signals.is_repeat():
            exit_by_signal(number)
        if self._signals.count == 1 and self.prints:
            write_from_handler(stopping_message(self.unit))
