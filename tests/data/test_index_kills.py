"""A data index that is killed at every write, built twice at once, or written to a full disk."""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import kill_points
import pytest
from conversations import write_conversations
from ended import Command
from preloaded_process import PreloadedProcess
from test_as_a_new_user import write_teacher

from mmmamba_cli.checkpoint import open_any_checkpoint
from mmmamba_cli.cli import library_error, main
from mmmamba_cli.data import find_index, open_corpus
from mmmamba_cli.data.parallel_map import map_in_workers
from mmmamba_cli.runs import open_training_processor

# The number of a write, and what it is: of the hidden file, and of the leftover of an earlier kill.
KILLS = {2: "open /.train.jsonl.", 3: "os.rename /.train.jsonl.", 4: "os.remove /.train.jsonl."}


def start_once() -> None:
    """Start the command of the first argument, killed at the write of that number."""
    spec = json.loads(sys.argv[1])
    report = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    kill_points.start(spec["words"], spec["folder"], spec["place"], report)


class Builder:
    """The command `data index` for one set of conversations."""

    def __init__(self, folder: Path):
        self.folder = folder / "data"
        self.teacher = write_teacher(folder / "teacher") / "hovle.ckpt"
        self.data = write_conversations(self.folder, 12)
        root = ("--image-root", self.folder, "--model", self.teacher, "--workers", 0)
        self.words = [str(word) for word in ("data", "index", self.data, *root)]
        self.output = folder / "output"

    def killed(self, place: int, *more: str) -> dict[str, Any]:
        """How a start ended that is killed at the write of this number, 0 for none."""
        report = self.output.with_name("report")
        report.unlink(missing_ok=True)
        spec = {"words": [*self.words, *more], "folder": str(self.folder), "place": place}
        process = PreloadedProcess(start_once, [json.dumps(spec), str(report)], self.output)
        assert process.wait(120) == 0, process.text()
        return json.loads(report.read_text())

    def indexes(self) -> list[Path]:
        return sorted(self.folder.glob("*.index"))

    def hidden(self) -> list[Path]:
        return sorted(self.folder.glob(".*"))

    def found(self) -> Path | None:
        """The index that `distill` would use."""
        processor = open_training_processor(open_any_checkpoint(self.teacher))
        assert processor is not None
        return find_index(str(self.data), open_corpus(self.data, self.folder), processor).file


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    return Builder(tmp_path)


@pytest.fixture
def complete(builder: Builder, mmmamba: Command) -> bytes:
    """The content of the index, which lies nowhere yet."""
    assert mmmamba(*builder.words).code == 0
    (file,) = builder.indexes()
    content = file.read_bytes()
    file.unlink()
    return content


def test_killed_at_every_write(builder: Builder, complete: bytes) -> None:
    """There is no index or the whole one after each kill, and the next start needs no help."""
    for place, event in KILLS.items():
        assert builder.killed(place)["killed"].startswith(event)
        # The removal of a leftover comes after the rename.
        written = [file.read_bytes() for file in builder.indexes()]
        assert written == ([complete] if place == 4 else [])
        assert builder.found() == next(iter(builder.indexes()), None)
    assert builder.killed(3, "--overwrite")["killed"].startswith(KILLS[3])
    assert [file.read_bytes() for file in builder.indexes()] == [complete]
    assert builder.killed(0, "--overwrite")["exit"] == 0
    assert [file.read_bytes() for file in builder.indexes()] == [complete]
    assert not builder.hidden()


def test_two_builders_at_once(builder: Builder, complete: bytes, tmp_path: Path) -> None:
    processes = [PreloadedProcess(main, builder.words, tmp_path / f"output{n}") for n in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert [file.read_bytes() for file in builder.indexes()] == [complete]
    assert not builder.hidden()


def test_a_full_disk(builder: Builder, mmmamba: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(builder.folder.iterdir())
    monkeypatch.setattr(os, "fsync", full)
    done = mmmamba(*builder.words)
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith(
        ".index: the disk is full (free some space or choose another folder)"
    )
    assert sorted(builder.folder.iterdir()) == before


def killed_process(number: int, signal_number: int = signal.SIGKILL) -> int:
    if number == 3:
        # pytest's would print the stack of the signal.
        faulthandler.disable()
        os.kill(os.getpid(), signal_number)
    return number


@pytest.mark.parametrize("signal_number", [signal.SIGABRT, signal.SIGSEGV])
def test_a_crashed_worker_is_a_bug(signal_number: int) -> None:
    crash = partial(killed_process, signal_number=signal_number)
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        list(map_in_workers(crash, range(6), 2))
    assert library_error(caught.value) is None


def test_a_killed_worker_is_one_sentence() -> None:
    with pytest.raises(RuntimeError) as caught:
        list(map_in_workers(killed_process, range(6), 2))
    error = library_error(caught.value)
    assert error is not None and error.message.startswith("a process that prepares data was killed")
    assert library_error(RuntimeError("DataLoader timed out")) is None
