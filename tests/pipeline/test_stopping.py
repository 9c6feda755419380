"""What a signal handler writes while the process is in the middle of a write."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path

import pytest

from mmmamba_cli.distributed.stopping import write_from_handler


class SignalledFile(io.FileIO):
    """A file during each write of which a signal arrives, while the buffer above it is locked."""

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
