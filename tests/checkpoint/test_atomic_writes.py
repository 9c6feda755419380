"""Atomic folders and files under errors, concurrency and killed processes."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmmamba_cli.checkpoint import atomic_writes
from mmmamba_cli.checkpoint.atomic_writes import atomic_folder, atomic_write_text
from mmmamba_cli.errors import CheckpointError


def fill(folder: Path, text: str = "new") -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "a.txt").write_text(text)
    (folder / "b.txt").write_text(text)


def tree(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def whole(text: str = "new") -> dict[str, str]:
    return {"b.txt": text, "deep/a.txt": text}


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        fill(folder)
        assert not target.exists()
        assert folder.parent == tmp_path
        assert folder.name.startswith(".out.partial-")
        assert re.fullmatch(rf".*-{os.getpid()}-[0-9a-f]{{8}}", folder.name)
    assert tree(tmp_path) == {f"out/{name}": text for name, text in whole().items()}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError, SystemExit])
def test_nothing_remains_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "new" / "parents" / "out") as folder:
        fill(folder)
        raise error
    assert not list(tmp_path.iterdir())


def test_parents_are_made_and_others_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError), atomic_folder(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "else.txt").write_text("kept")
        raise ValueError
    assert tree(tmp_path) == {"a/else.txt": "kept"}
    assert not (tmp_path / "a" / "b").exists()
    with atomic_folder(tmp_path / "a" / "b" / "out") as folder:
        fill(folder)
    assert tree(tmp_path / "a" / "b" / "out") == whole()


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(CheckpointError, match=r"out already exists .*--overwrite"),
        atomic_folder(tmp_path / "out"),
    ):
        raise AssertionError("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    for overwrite in (False, True):
        with (
            pytest.raises(CheckpointError, match="out is a file"),
            atomic_folder(tmp_path / "out", overwrite),
        ):
            raise AssertionError("the block must not run")
    assert tree(tmp_path) == {"out": "precious"}


def old_folder(parent: Path) -> Path:
    (parent / "out").mkdir()
    (parent / "out" / "old.txt").write_text("old")
    return parent / "out"


def test_overwrite_replaces_all_of_it(tmp_path: Path) -> None:
    target = old_folder(tmp_path)
    with atomic_folder(target, overwrite=True) as folder:
        fill(folder)
        assert tree(target) == {"old.txt": "old"}
    assert tree(target) == whole()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_of_nothing(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        fill(folder)
    assert tree(tmp_path / "out") == whole()


def test_overwrite_that_fails_keeps_the_old(tmp_path: Path) -> None:
    target = old_folder(tmp_path)
    with pytest.raises(KeyboardInterrupt), atomic_folder(target, overwrite=True) as folder:
        fill(folder)
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"out/old.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError(5, "broken"), KeyboardInterrupt()], ids=["io", "ctrl-c"])
def test_a_swap_that_fails_halfway_restores_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException
) -> None:
    target, real, calls = old_folder(tmp_path), Path.rename, []

    def rename(path: Path, other: Path) -> Path:
        calls.append(path)
        if len(calls) == failing:
            raise error
        return real(path, other)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(type(error)), atomic_folder(target, overwrite=True) as folder:
        fill(folder)
    assert len(calls) >= failing
    assert tree(tmp_path) == {"out/old.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_keeps_leading_to_the_folder(tmp_path: Path) -> None:
    old_folder(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with atomic_folder(tmp_path / "link", overwrite=True) as folder:
        fill(folder)
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "out") == whole()


def test_a_folder_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="made by another process"),
        atomic_folder(tmp_path / "out") as folder,
    ):
        fill(folder)
        old_folder(tmp_path)
    assert tree(tmp_path) == {"out/old.txt": "old"}


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    host, here = atomic_writes._host_name(), atomic_writes._machine_id()
    dead, alive = dead_pid(), os.getppid()
    leftovers = {
        f".out.partial-{host}-{dead}": False,
        f".out.partial-{host}-{os.getpid()}": False,
        f".out.partial-{host}-{alive}": True,
        f".out.partial-{here}-{dead}-0123abcd": False,
        f".out.partial-{here}-{os.getpid()}-0123abcd": False,
        f".out.partial-{here}-{alive}-0123abcd": True,
        # Another container on this host has its own PIDs.
        f".out.partial-{host}.00000000-{dead}-0123abcd": True,
        f".out.partial-elsewhere-{dead}": True,
        f".out2.partial-{host}-{dead}": True,
        f".out.partial-{host}-x": True,
    }
    for name in leftovers:
        fill_in = tmp_path / name
        fill_in.mkdir()
        fill(fill_in)
    with atomic_folder(tmp_path / "out") as folder:
        fill(folder)
    assert tree(tmp_path / "out") == whole()
    assert {path.name for path in tmp_path.iterdir()} == {
        "out",
        *(name for name, stays in leftovers.items() if stays),
    }


def test_an_old_folder_left_aside_is_put_back(tmp_path: Path) -> None:
    aside = tmp_path / f".out.old-{atomic_writes._host_name()}-{dead_pid()}"
    shutil.move(old_folder(tmp_path), aside)
    with pytest.raises(CheckpointError, match="already exists"), atomic_folder(tmp_path / "out"):
        raise AssertionError("the block must not run")
    assert tree(tmp_path) == {"out/old.txt": "old"}


def test_an_old_folder_that_was_replaced_is_removed(tmp_path: Path) -> None:
    aside = tmp_path / f".out.old-{atomic_writes._host_name()}-{dead_pid()}"
    shutil.move(old_folder(tmp_path), aside)
    old_folder(tmp_path)
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        fill(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tree(tmp_path / "out") == whole()


def test_containers_with_equal_pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers share a disk, and their processes a PID: neither touches the other's files."""
    with atomic_folder(tmp_path / "out") as mine:
        fill(mine)
        host = atomic_writes._host_name()
        monkeypatch.setattr(atomic_writes, "_machine_id", lambda: f"{host}.00000000")
        monkeypatch.setattr(atomic_writes, "_active", set())
        with atomic_folder(tmp_path / "out") as other:
            assert other != mine
            fill(other, "other")
        assert tree(mine) == whole()
        shutil.rmtree(tmp_path / "out")
    assert tree(tmp_path / "out") == whole()


def test_two_threads_of_a_process(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as mine:
        fill(mine)
        with atomic_folder(tmp_path / "out") as other:
            fill(other, "other")
        assert tree(mine) == whole()
        shutil.rmtree(tmp_path / "out")
    assert tree(tmp_path / "out") == whole()


@pytest.mark.parametrize("legacy", [True, False])
def test_a_reader_puts_an_old_folder_back(tmp_path: Path, legacy: bool) -> None:
    where = atomic_writes._host_name() if legacy else atomic_writes._machine_id()
    aside = tmp_path / f".out.old-{where}-{dead_pid()}{'' if legacy else '-0123abcd'}"
    shutil.move(old_folder(tmp_path), aside)
    assert atomic_writes.interrupted_replacements(tmp_path) == {"out": aside}
    assert atomic_writes.restore_interrupted(tmp_path / "out") is None
    assert tree(tmp_path) == {"out/old.txt": "old"}
    assert (
        atomic_writes.interrupted_replacements(tmp_path) == {}
        and atomic_writes.restore_interrupted(tmp_path / "out") is None
    )


@pytest.mark.parametrize("owner", ["another machine", "a live process", "a disk that refuses"])
def test_an_old_folder_that_may_not_be_moved_is_named(
    tmp_path: Path, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = "elsewhere.00000000" if owner == "another machine" else atomic_writes._machine_id()
    pid = os.getppid() if owner == "a live process" else dead_pid()
    aside = tmp_path / f".out.old-{where}-{pid}-0123abcd"
    shutil.move(old_folder(tmp_path), aside)

    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    if owner == "a disk that refuses":
        monkeypatch.setattr(Path, "rename", fail)
    assert atomic_writes.restore_interrupted(tmp_path / "out") == aside
    assert tree(tmp_path) == {f"{aside.name}/old.txt": "old"}
    assert f"mv {aside} {tmp_path / 'out'}" in atomic_writes.restore_hint(aside)


def test_a_check_stops_the_replacement_early_and_late(tmp_path: Path) -> None:
    target = old_folder(tmp_path)

    def check(folder: Path) -> None:
        if (folder / "mine.txt").exists():
            raise CheckpointError("mine")

    with (
        pytest.raises(CheckpointError, match="mine"),
        atomic_folder(target, overwrite=True, check=check) as folder,
    ):
        fill(folder)
        (target / "mine.txt").write_text("put there meanwhile")
    with (
        pytest.raises(CheckpointError, match="mine"),
        atomic_folder(target, overwrite=True, check=check),
    ):
        raise AssertionError("the block must not run")
    assert set(tree(tmp_path)) == {"out/old.txt", "out/mine.txt"}


def test_a_refused_write_names_the_file_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError) as raised:
        atomic_write_text(tmp_path / "report.html", "x")
    assert raised.value.filename == str(tmp_path / "report.html")


HALFWAY = f"""
import signal, sys, time
# A shell that runs the tests in the background makes them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
spec = spec_from_file_location("atomic", {atomic_writes.__file__!r})  # without its package
atomic = module_from_spec(spec)
spec.loader.exec_module(atomic)
with atomic.atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number, remains", [(signal.SIGKILL, 1), (signal.SIGINT, 0)])
def test_a_killed_process_leaves_no_target(tmp_path: Path, number: int, remains: int) -> None:
    command = [sys.executable, "-c", HALFWAY, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    process.wait(60)
    process.stdout.close()
    assert len(list(tmp_path.iterdir())) == remains
    with atomic_folder(tmp_path / "out") as folder:
        fill(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_contents_reach_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_fsync, real_rename, events = os.fsync, Path.rename, []

    def fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_fsync(descriptor)

    def rename(path: Path, other: Path) -> Path:
        events.append("rename")
        return real_rename(path, other)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    with atomic_folder(tmp_path / "out") as folder:
        fill(folder)
    assert events == ["a.txt", "deep", "b.txt", folder.name, "rename", tmp_path.name]


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError), atomic_folder(tmp_path / "file" / "out"):
        raise AssertionError("the block must not run")
    with pytest.raises(OSError):
        atomic_write_text(tmp_path / "file" / "x.txt", "text")
    assert tree(tmp_path) == {"file": "kept"}


def refused(path: Path) -> PermissionError:
    return PermissionError(13, "Permission denied", str(path))


def test_a_folder_that_cannot_be_written_to_names_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the target, not the hidden file. Permissions are faked: root ignores them."""
    monkeypatch.setattr(Path, "open", lambda path, *_: (_ for _ in ()).throw(refused(path)))
    monkeypatch.setattr(Path, "mkdir", lambda path, *_, **__: (_ for _ in ()).throw(refused(path)))
    with pytest.raises(PermissionError) as caught:
        atomic_write_text(tmp_path / "report.html", "x")
    assert caught.value.filename == str(tmp_path / "report.html")
    with pytest.raises(PermissionError) as caught, atomic_folder(tmp_path / "out"):
        pass
    # If a parent cannot be created, the error names the parent.
    assert caught.value.filename in (str(tmp_path / "out"), str(tmp_path))


def test_an_error_inside_a_folder_names_the_place_it_would_have(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught, atomic_folder(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep").write_text("x")
    assert caught.value.filename == str(tmp_path / "out" / "deep")
    with pytest.raises(FileNotFoundError) as caught, atomic_folder(tmp_path / "out"):
        (tmp_path / "other").read_text()
    assert caught.value.filename == str(tmp_path / "other")


def test_a_full_disk_names_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        atomic_write_text(tmp_path / "a.json", "x")
    assert caught.value.filename == str(tmp_path / "a.json")
    with pytest.raises(OSError, match="No space") as caught, atomic_folder(tmp_path / "out") as new:
        fill(new)
    assert caught.value.filename == str(tmp_path / "out")
    assert not list(tmp_path.iterdir())
