"""`map_in_workers`: garbage collection in its worker processes."""

import gc
import os
import sys
from pathlib import Path

import pytest

from mmmamba_cli.data.parallel_map import map_in_workers


class CyclicObject:
    """An object that refers to itself. Its finalizer writes the id of its process to a file."""

    def __init__(self, log: Path):
        self.log, self.itself = log, self

    def __del__(self) -> None:
        with self.log.open("a", encoding="utf-8") as handle:
            handle.write(f"{os.getpid()}\n")


def collect_garbage(number: int) -> int:
    gc.collect()
    return number


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_workers_do_not_collect_garbage_of_the_parent(tmp_path: Path) -> None:
    log = tmp_path / "finalized"
    gc.disable()
    try:
        CyclicObject(log)
        assert list(map_in_workers(collect_garbage, range(4), 2)) == [0, 1, 2, 3]
        assert not log.exists()
    finally:
        gc.enable()
    # The parent's own collector still finds the object.
    gc.collect()
    assert log.read_text(encoding="utf-8").split() == [str(os.getpid())]
