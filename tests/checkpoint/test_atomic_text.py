"""Text files that are written as a whole or not at all."""

import os
import threading
from pathlib import Path

import pytest
from test_atomic_writes import dead_pid, tree

from mmmamba_cli.checkpoint import atomic_writes
from mmmamba_cli.checkpoint.atomic_writes import atomic_write_text


def test_text_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    atomic_write_text(path, "first\n")
    atomic_write_text(path, "zweite, größer\n")
    assert path.read_bytes() == "zweite, größer\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_text_that_fails_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(OSError, match="No space"):
        atomic_write_text(path, "new")
    assert tree(tmp_path) == {"x.json": "old"}


def test_text_goes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    atomic_write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_readers_never_see_half_a_text(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    atomic_write_text(path, "0" * 50_000)
    texts = [str(i % 10) * 50_000 for i in range(40)]
    writer = threading.Thread(target=lambda: [atomic_write_text(path, text) for text in texts])
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(path.read_text())
    assert seen
    assert all(len(text) == 50_000 and len(set(text)) == 1 for text in seen)


def test_leftovers_of_a_text_are_removed(tmp_path: Path) -> None:
    """A process killed between write and rename leaves the hidden file."""
    target, other = tmp_path / "run.json", f".run.json2.partial-x-{dead_pid()}-0123abcd"
    dead = tmp_path / f".run.json.partial-{atomic_writes._machine_id()}-{dead_pid()}-0123abcd"
    dead.write_text("half")
    (tmp_path / other).write_text("another's")
    atomic_write_text(target, "new")
    assert tree(tmp_path) == {"run.json": "new", other: "another's"}
