"""Run a command in a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path
from typing import NoReturn

import torch

from mmmamba_cli.cli import console, main

CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """Runs `mmmamba WORDS` in a fork of this process, which has torch imported already."""

    def __init__(self, columns: int, *words: object, **environment: str):
        self.text = ""
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            _become(["mmmamba", *map(str, words)], environment)
        self.resize(columns)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.handle, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """Read the output up to and including `text`."""
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end, f"{text!r} did not come: {self.text[-500:]!r}"
            if not self._read():
                break
        assert text in self.text, self.text[-500:]
        before, _, self.text = self.text.partition(text)
        return before + text

    def wait_until_it_reads(self) -> None:
        """Wait until the process has slept for a while, as it does while it waits for a line."""
        status = Path(f"/proc/{self.pid}/stat")
        if not status.exists():
            time.sleep(1)
            return
        end, asleep = time.monotonic() + 120, 0
        while asleep < 10:
            assert time.monotonic() < end
            time.sleep(0.03)
            state = status.read_text().rpartition(") ")[2][0]
            asleep = asleep + 1 if state == "S" else 0

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def ended(self) -> int:
        """Wait for the exit code; reads the remaining output, which would block the process."""
        end = time.monotonic() + 120
        while time.monotonic() < end and self._read():
            pass
        if time.monotonic() >= end:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.handle)
        return os.waitstatus_to_exitcode(status)

    def _read(self) -> bool:
        """Read the available output; False at its end."""
        if select.select([self.handle], [], [], 0.1)[0]:
            try:
                self.text += os.read(self.handle, 65536).decode(errors="replace")
            except OSError:
                return False
        return True


def _become(words: list[str], environment: dict[str, str]) -> NoReturn:
    """In the fork: run the command on the terminal instead of pytest's captured streams."""
    code = 1
    try:
        # A fork has none of its parent's threads.
        torch.set_num_threads(1)
        # A background shell job ignores Ctrl-C, and its child processes inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            os.environ.pop(name, None)
        os.environ |= {"TERM": "xterm", **environment}
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
        console.out.cache_clear()
        console.err.cache_clear()
        sys.argv = words
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Skip pytest's exit handlers in the fork.
        os._exit(code)
