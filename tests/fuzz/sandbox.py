"""Sandbox of a case: no writes outside its folder, no processes, limited time and memory.

A Python audit hook sees every file operation and every started process. A hook cannot be removed,
so there is a single one, inactive between cases.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Limits of a case; memory is counted from the start of the case. CPU time detects endless work on a
# busy machine as on an idle one, the clock a case that waits forever.
CPU_SECONDS = 8.0
CLOCK_SECONDS = 120.0
ADDRESS_SPACE = 3 << 30
RESIDENT = 300 << 20

WRITES = {"os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime", "os.chown"}
TWO_PATHS = {"os.rename", "os.link", "os.symlink"}
STARTS = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "socket.connect",
    "socket.getaddrinfo",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Forbidden(BaseException):
    """A case violated the sandbox; a `BaseException`, so that `except Exception` cannot hide it."""


class _AuditHook:
    """The audit hook. `home` is the folder of the running case, None between cases."""

    def __init__(self) -> None:
        self.home: str | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.home is None:
            return
        problem = None
        if event == "open":
            if isinstance(arguments[2], int) and arguments[2] & WRITING:
                problem = self._outside(arguments[0])
        elif event in WRITES:
            problem = self._outside(arguments[0], arguments[-1])
        elif event in TWO_PATHS:
            problem = self._outside(arguments[1], arguments[-1])
        elif event in STARTS:
            problem = "starts or calls"
        elif event == "exec" and arguments[0].co_filename.startswith(self.home):
            problem = f"runs {arguments[0].co_filename}, by"
        if problem is not None:
            self.seen.append(f"{problem} {event}{arguments!r:.200}")
            raise Forbidden(self.seen[-1])

    def _outside(self, path: Any, folder: Any = -1) -> str | None:
        if isinstance(path, int):
            return None
        name = os.fsdecode(path)
        if isinstance(folder, int) and folder > 2 and not name.startswith("/"):
            name = str(Path(f"/proc/self/fd/{folder}").readlink() / name)
        # The last part may be a link, which is the file that is written.
        real = str(Path(os.path.realpath(Path(name).parent), Path(name).name))
        inside = real == self.home or real.startswith(f"{self.home}/") or real == "/dev/null"
        return None if inside else f"writes {real}, outside, by"


_HOOK: list[_AuditHook] = []


@contextmanager
def sandboxed(home: Path) -> Iterator[None]:
    """Run the block in the sandbox; it may write in `home` and its folder `tmp`."""
    if not _HOOK:
        _HOOK.append(_AuditHook())
        sys.addaudithook(_HOOK[0])
    watch, before = _HOOK[0], (tempfile.tempdir, sys.dont_write_bytecode, Path.cwd())
    tempfile.tempdir, sys.dont_write_bytecode = str(home / "tmp"), True
    os.chdir(home)
    watch.seen = []
    try:
        with _bounded():
            watch.home = os.path.realpath(home)
            try:
                yield
            finally:
                watch.home = None
    finally:
        tempfile.tempdir, sys.dont_write_bytecode = before[0], before[1]
        os.chdir(before[2])
    assert not watch.seen, watch.seen


@contextmanager
def _bounded() -> Iterator[None]:
    """Limit time and memory of the block."""

    def ring(number: int, _: Any) -> None:
        used = f"{CPU_SECONDS} s of CPU time" if number == signal.SIGPROF else f"{CLOCK_SECONDS} s"
        raise Forbidden(f"not done after {used}")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = {number: signal.signal(number, ring) for number in (signal.SIGALRM, signal.SIGPROF)}
    _reset_peak()
    start = _status("VmHWM")
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_SPACE, hard))
    signal.setitimer(signal.ITIMER_REAL, CLOCK_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown = _status("VmHWM") - start
    assert grown <= RESIDENT, f"took {grown >> 20} MiB of memory"


def _reset_peak() -> None:
    # Resets the peak to the resident size.
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {field} in /proc/self/status")
