"""Writing from signal handlers, and the exit of one process among several."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from isolated_process import ROOT, run_isolated

from mmmamba_cli.cli.stop_request import StopRequest
from mmmamba_cli.distributed import stop_signals
from mmmamba_cli.distributed.stop_signals import write_from_handler


class SignalledFile(io.FileIO):
    """A file that raises a signal during each write, while the buffer above it is locked."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        count = super().write(data)
        signal.raise_signal(signal.SIGUSR1)
        return count


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs a signal of its own")
def test_a_handler_writes_during_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stderr"
    file = SignalledFile(path, "w")
    stream = io.TextIOWrapper(io.BufferedWriter(file), line_buffering=True)  # type: ignore[type-var]
    monkeypatch.setattr(sys, "stderr", stream)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: write_from_handler("stopping\n"))
    try:
        stream.write("in step 3\n")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert path.read_text() == "in step 3\nstopping\n"


# Exit handlers run in reverse order: this one is left out if the process ends before the shutdown.
# Two processes as forks of one that has imported torch.
PROCESS = """
import atexit
import os
import sys
from mmmamba_cli.distributed.stop_signals import skip_interpreter_shutdown
# Nothing else may be written.
os.dup2(1, 2)
for code in (0, 3):
    if not os.fork():
        atexit.register(print, "shut down", code)
        succeed = skip_interpreter_shutdown()
        if code == 0:
            succeed()
        sys.exit(code)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_the_interpreter_is_not_shut_down_after_success() -> None:
    assert run_isolated(PROCESS, package=ROOT) == "0\nshut down 3\n3\n"


def test_a_command_among_several_processes_flushes_its_output() -> None:
    words = [sys.executable, "-m", "mmmamba_cli", "--version"]
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    result = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0
    assert result.stdout.startswith("mmmamba ")


def test_a_late_copy_of_a_request_does_not_interrupt_what_follows(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A launcher forwards Ctrl-C that the terminal has sent; the work may be saved by then."""
    before = {number: signal.getsignal(number) for number in stop_signals.SIGNALS}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.received
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(stop_signals, "SAME_REQUEST_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capfd.readouterr().err.count("stopping after this step") == 1


# SIGTERM, whose handler is no function, ends the process when it is no copy.
TERMINATED = """
import os
import signal
from mmmamba_cli.cli.stop_request import StopRequest
from mmmamba_cli.distributed import stop_signals
if not os.fork():
    with StopRequest(prints=False):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    print("copy ignored", flush=True)
    stop_signals.SAME_REQUEST_SECONDS = -1.0
    signal.raise_signal(signal.SIGTERM)
    print("not reached", flush=True)
print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_a_second_sigterm_after_the_work_ends_the_process() -> None:
    assert run_isolated(TERMINATED, package=ROOT) == "copy ignored\n-15\n"


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
@pytest.mark.parametrize("is_received", [True, False])
def test_handlers_are_restored(handler: Any, is_received: bool) -> None:
    before = {number: signal.getsignal(number) for number in stop_signals.SIGNALS}
    try:
        signal.signal(signal.SIGINT, handler)
        with StopRequest(prints=False) as stop:
            if is_received:
                signal.raise_signal(signal.SIGTERM)
        assert stop.received is is_received
        is_same = signal.getsignal(signal.SIGINT) is handler
        assert is_same is (handler is signal.SIG_IGN or not is_received)
    finally:
        for number, one in before.items():
            signal.signal(number, one)
