"""Fixtures for tests of checkpoint readers and writers."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest


def _resident_peak() -> int:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) << 10


@pytest.fixture(autouse=True)
def files_reach_the_disk(
    real_fsync: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", real_fsync)


@pytest.fixture
def peak_growth() -> Callable[[int], AbstractContextManager[None]]:
    """`peak_growth(n)` asserts that peak memory grows by at most n bytes in its block."""

    @contextmanager
    def within(limit: int) -> Iterator[None]:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        except OSError:
            pytest.skip("measures memory through Linux's /proc")
        before = _resident_peak()
        yield
        assert _resident_peak() - before <= limit

    return within
