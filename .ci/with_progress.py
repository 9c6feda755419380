"""Run a command; print what it is for, its lines, and a line after 10 seconds without one.

    python .ci/with_progress.py WHAT COMMAND...

Standard library only: it runs before anything is installed. The bytes that pip downloads are shown
as a share (`pip install --progress-bar raw`). The exit code is that of the command.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time

# Seconds without a line before the time is printed.
INTERVAL = 10.0
INTERRUPTED = 130
# A line of pip's raw progress bar: bytes, and all bytes if their number is known.
PIP_PROGRESS = re.compile(r"Progress (\d+) of (\d+)\s*$")


class TimeLines:
    """Prints `what, after 20 s` from a thread whenever nothing was printed for INTERVAL seconds."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.share = ""
        self.began = self.last = time.monotonic()
        self.ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def print(self, line: str) -> None:
        self.last = time.monotonic()
        print(line, flush=True)

    def _run(self) -> None:
        while not self.ended.wait(max(0.0, self.last + INTERVAL - time.monotonic())):
            now = time.monotonic()
            if now - self.last >= INTERVAL:
                self.print(f"{self.what}, after {now - self.began:.0f} s{self.share}")


def main(what: str, command: list[str]) -> int:
    lines = TimeLines(what)
    lines.print(what)
    process = subprocess.Popen(  # noqa: S603  the words of the Makefile, without a shell
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            found = PIP_PROGRESS.match(line)
            if found is None:
                lines.share = ""
                lines.print(line.rstrip())
            elif int(found[2]):
                lines.share = f", {int(found[1]) / int(found[2]):.0%} downloaded"
        return process.wait()
    except KeyboardInterrupt:
        # Ctrl-C reached the command too.
        process.wait()
        return INTERRUPTED
    finally:
        lines.ended.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
