"""Writing from signal handlers, and the exit of one process among several."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from isolated_process import ROOT, run_isolated

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
