"""Folders and files that are there completely or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmmamba_cli.errors import CheckpointError


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty hidden folder beside `target` that takes its name when the block ends well.

    If it does not, Ctrl-C included, nothing remains of it and an old `target` is as it was. With
    `overwrite` an existing folder is replaced; it is removed only after the new one is in place.
    What killed processes of this machine left behind is cleaned up first.

    Raises `CheckpointError` if the target exists (without `overwrite`) or is not a folder, and
    `OSError` if the disk is full or not writable.
    """
    target = Path(target).resolve()
    _refuse_existing(target, overwrite)
    made = [parent for parent in target.parents if not parent.exists()]
    partial, aside = _sibling(target, "partial"), _sibling(target, "old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _recover(target)
        _refuse_existing(target, overwrite)
        partial.mkdir()
        yield partial
        _sync_tree(partial)
        if overwrite and target.exists():
            target.rename(aside)
        _put_in_place(partial, target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        _remove(partial)
        for parent in made:
            with suppress(OSError):  # not made, or something else lies in it by now
                parent.rmdir()
        raise
    finally:
        if aside.exists() and target.exists():
            _remove(aside)
    _sync_folder(target.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """As `atomic_write_bytes`, in UTF-8."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file by way of a hidden sibling, so that `path` is old or new, never between.

    Raises `OSError` if the disk is full or not writable; an old file is then as it was.
    """
    path = Path(path).resolve()
    partial = _sibling(path, "partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a folder or nothing there")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} already exists", "--overwrite replaces it")


def _sibling(target: Path, role: str) -> Path:
    """A hidden name that says which process of which machine it belongs to."""
    return target.parent / f".{target.name}.{role}-{_host()}-{os.getpid()}"


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname())


def _recover(target: Path) -> None:
    """Undo what dead processes left: remove partial folders, put an old folder back or away.

    A process id of another machine on a shared disk says nothing here, so those are left alone.
    Our own id is a dead process's too: we have not started.
    """
    stale = re.compile(rf"\.{re.escape(target.name)}\.(partial|old)-{re.escape(_host())}-(\d+)")
    for path in sorted(target.parent.iterdir()):
        match = stale.fullmatch(path.name)
        if match is None or _is_alive(int(match[2])):
            continue
        if match[1] == "old" and not target.exists():
            path.rename(target)
        else:
            _remove(path)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _put_in_place(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise CheckpointError(f"{target} was made by another process meanwhile") from error
        raise


def _sync_tree(folder: Path) -> None:
    """Bring every file and folder below to the disk, contents before the folders naming them."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(Path(path, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_folder(Path(path))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems have no fsync for folders; the rename is as safe as they make it.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
