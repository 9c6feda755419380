"""Folders and files that are there completely or not at all.

What `--overwrite` may replace: folders that hold only what mmmamba wrote into them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shlex
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from mmmamba_cli.errors import CheckpointError, name_some

# A hidden sibling: the name it stands for, its role, the machine and the process that made it.
HIDDEN_SIBLING = re.compile(
    r"\.(?P<name>.+)\.(?P<role>partial|old)-(?P<machine>[\w.]+)-(?P<pid>\d+)(-(?P<token>[0-9a-f]+))?"
)
# Tokens of the hidden folders that this process is writing.
_active: set[str] = set()


@contextmanager
def atomic_folder(
    target: Path, overwrite: bool = False, check: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Yield an empty hidden folder beside `target` that takes its name when the block ends well.

    If it does not, Ctrl-C included, nothing remains of it and an old `target` is as it was. With
    `overwrite` an existing folder is replaced; it is removed only after the new one is in place.
    `check` is called with an existing folder before anything is written, and again before the
    folder is replaced; it raises if the folder may not be replaced. What killed processes of this
    machine left behind is cleaned up first.

    Raises `CheckpointError` if the target exists (without `overwrite`) or is not a folder, and
    `OSError`, which names the target, if the disk is full or not writable.
    """
    target = Path(target).resolve()
    _refuse_existing(target, overwrite, check)
    made = [parent for parent in target.parents if not parent.exists()]
    token = secrets.token_hex(4)
    partial, aside = _sibling(target, "partial", token), _sibling(target, "old", token)
    _active.add(token)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean_up_leftovers(target)
        _refuse_existing(target, overwrite, check)
        with _report_target_path(target, partial):
            partial.mkdir()
            yield partial
            _sync_tree(partial)
        if overwrite and target.exists():
            _refuse_existing(target, overwrite, check)
            target.rename(aside)
        _rename_into_place(partial, target)
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
        _active.discard(token)
    _sync_folder(target.parent)


def interrupted_replacements(folder: Path) -> dict[str, Path]:
    """Folders below `folder` that were moved aside to be replaced and never were, by name.

    A process that is killed between the two moves of a replacement leaves the old folder hidden
    beside its place. Empty if `folder` cannot be listed.
    """
    found = {}
    with suppress(OSError):
        for path in sorted(Path(folder).iterdir()):
            match = HIDDEN_SIBLING.fullmatch(path.name)
            if match is not None and match["role"] == "old":
                place = path.with_name(match["name"])
                if not place.exists() and path.is_dir():
                    found[match["name"]] = path
    return found


def restore_interrupted(target: Path) -> Path | None:
    """Put the folder `target` back if a killed process of this machine has left it set aside.

    Returns the hidden folder if one is there and stays there, because another machine may be
    writing or because the disk refuses the move; None otherwise.
    """
    target = Path(target)
    hidden = interrupted_replacements(target.parent).get(target.name)
    if hidden is None:
        return None
    match = HIDDEN_SIBLING.fullmatch(hidden.name)
    if match is None or not _owner_is_dead(match):
        return hidden
    try:
        hidden.rename(target)
    except OSError:
        # Another command may have put it back meanwhile.
        return hidden if hidden.exists() else None
    return None


def restore_hint(hidden: Path) -> str:
    """What to do about a folder that `restore_interrupted` left where it is."""
    match = HIDDEN_SIBLING.fullmatch(hidden.name)
    name = hidden.name if match is None else match["name"]
    move = shlex.join(["mv", str(hidden), str(hidden.with_name(name))])
    return f"if no other machine is writing it, put it back: {move}"


def atomic_write_text(path: Path, text: str) -> None:
    """As `atomic_write_bytes`, in UTF-8."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file by way of a hidden sibling, so that `path` is old or new, never between.

    What killed processes of this machine left beside it is removed. Raises `OSError`, which names
    `path`, if the disk is full or not writable; an old file is then as it was.
    """
    path = Path(path).resolve()
    token = secrets.token_hex(4)
    partial = _sibling(path, "partial", token)
    _active.add(token)
    try:
        with _report_target_path(path, partial):
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        with suppress(OSError):
            _clean_up_leftovers(path)
    finally:
        _active.discard(token)
        # A folder that cannot be written to holds nothing to take away.
        with suppress(PermissionError):
            partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextmanager
def _report_target_path(target: Path, partial: Path) -> Iterator[None]:
    """Errors of the system about the hidden `partial`, or a file in it, name the target instead.

    A failed write names no file; it is given the target too.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        if name is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            error.filename = str(target)
        elif isinstance(name, str | os.PathLike) and Path(name).is_relative_to(partial):
            error.filename = str(target / Path(name).relative_to(partial))
            # A rename names both ends.
            error.filename2 = None
        raise


def _refuse_existing(
    target: Path, overwrite: bool, check: Callable[[Path], None] | None = None
) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a folder or nothing there")
    if not overwrite:
        raise CheckpointError(f"{target} already exists", "--overwrite replaces it")
    if check is not None:
        check(target)


def _sibling(target: Path, role: str, token: str) -> Path:
    """A hidden name that no other process has, and that says whose it is."""
    return target.parent / f".{target.name}.{role}-{_machine_id()}-{os.getpid()}-{token}"


def _host_name() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname())[:32]


@cache
def _machine_id() -> str:
    """The host, its boot and its process namespace: where a process id means one process.

    Containers on one disk may share a host name, and number their processes alike.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return f"{_host_name()}.{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:8]}"


def _clean_up_leftovers(target: Path) -> None:
    """Undo what dead processes left: remove partial folders, put an old folder back or away.

    A process id of another machine on a shared disk says nothing here, so those are left alone.
    """
    for path in sorted(target.parent.iterdir()):
        match = HIDDEN_SIBLING.fullmatch(path.name)
        if match is None or match["name"] != target.name or not _owner_is_dead(match):
            continue
        if match["role"] == "old" and not target.exists():
            path.rename(target)
        else:
            _remove(path)


def _owner_is_dead(hidden: re.Match[str]) -> bool:
    """Whether the process that made this hidden folder is known to have ended."""
    pid = int(hidden["pid"])
    if hidden["token"] is None:
        # As earlier versions named them; this process is not one of those.
        return hidden["machine"] == _host_name() and (pid == os.getpid() or not _is_alive(pid))
    if hidden["machine"] != _machine_id():
        return False
    return hidden["token"] not in _active if pid == os.getpid() else not _is_alive(pid)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _rename_into_place(partial: Path, target: Path) -> None:
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


HINT_ELSEWHERE = "move what is to be kept, or choose another folder"
MAX_NAMED_FILES = 5


def check_replaceable(
    folder: Path, foreign_entries: Callable[[Path], Iterable[str]], writer: str
) -> None:
    """Raise `CheckpointError` unless `folder` may be replaced by what `writer` is about to write.

    Refused are the working directory, the home folder and their parents, and a folder in which
    `foreign_entries` finds something. `writer` is the command, for example "mmmamba export".
    """
    folder = Path(folder).resolve()
    for place, what in ((Path.cwd(), "the working directory"), (Path.home(), "the home folder")):
        if place.resolve().is_relative_to(folder):
            relation = "is" if place.resolve() == folder else "holds"
            raise CheckpointError(f"{folder} {relation} {what}", "choose another folder")
    found = list(foreign_entries(folder))
    if found:
        raise CheckpointError(
            f"{folder} would be replaced, and with it what {writer} did not write: "
            f"{name_some(found, MAX_NAMED_FILES)}",
            HINT_ELSEWHERE,
        )


def folder_entries(folder: Path) -> list[str]:
    """The names of what lies in `folder`, folders with a slash behind."""
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())


def unlisted_files(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Files below `folder` whose path within it matches none of `patterns` (`*` crosses `/`)."""
    known = tuple(patterns)
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return [name for name in names if not any(fnmatchcase(name, one) for one in known)]
