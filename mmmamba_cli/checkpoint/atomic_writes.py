"""Atomic writes: a folder or file is complete or absent, and an old one stays until replaced.

`check_replaceable` restricts what `--overwrite` replaces to folders that mmmamba wrote.
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

# A hidden sibling: name of its target, role, and the machine and process that wrote it.
HIDDEN_SIBLING = re.compile(
    r"\.(?P<name>.+)\.(?P<role>partial|old)-(?P<machine>[\w.]+)-(?P<pid>\d+)(-(?P<token>[0-9a-f]+))?"
)
HINT_ELSEWHERE = "move what is to be kept, or choose another folder"
MAX_NAMED_FILES = 5
# Tokens of the hidden folders that this process is writing.
_active: set[str] = set()


@contextmanager
def atomic_folder(
    target: Path, overwrite: bool = False, check: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Yield an empty hidden folder beside `target`; rename it to `target` when the block succeeds.

    If the block fails, Ctrl-C included, the hidden folder is removed and an old `target` is
    unchanged. `overwrite` replaces an existing folder, which is removed once the new one is in
    place. `check` is called with an existing folder before anything is written and again before
    the replacement; it raises if the folder may not be replaced. Leftovers of killed processes of
    this machine are cleaned up first.

    Raises:
        CheckpointError: if the target exists (without `overwrite`) or is not a folder.
        OSError: if the disk is full or not writable; it names the target.
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
            with suppress(OSError):  # never created, or no longer empty
                parent.rmdir()
        raise
    finally:
        if aside.exists() and target.exists():
            _remove(aside)
        _active.discard(token)
    _sync_folder(target.parent)


def interrupted_replacements(folder: Path) -> dict[str, Path]:
    """Old folders in `folder` whose replacement was interrupted, by the name of their target.

    A process that is killed between the two renames of a replacement leaves the old folder hidden
    beside its target. Empty if `folder` cannot be listed.
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
    """Rename the old folder back to `target` if a killed process of this machine left it hidden.

    Returns the hidden folder if it has to stay, because another machine may be writing or because
    the rename fails; None otherwise.
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
        # Another command may have renamed it meanwhile.
        return hidden if hidden.exists() else None
    return None


def restore_hint(hidden: Path) -> str:
    """Hint with the command that renames a hidden folder back by hand."""
    match = HIDDEN_SIBLING.fullmatch(hidden.name)
    name = hidden.name if match is None else match["name"]
    move = shlex.join(["mv", str(hidden), str(hidden.with_name(name))])
    return f"if no other machine is writing it, put it back: {move}"


def atomic_write_text(path: Path, text: str) -> None:
    """Write text as `atomic_write_bytes` does, encoded as UTF-8."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file through a hidden sibling, so that `path` has the old or the new content.

    Leftovers of killed processes of this machine are removed. Raises `OSError`, which names
    `path`, if the disk is full or not writable; an old file is then unchanged.
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
        # A folder that is not writable holds no leftover.
        with suppress(PermissionError):
            partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextmanager
def _report_target_path(target: Path, partial: Path) -> Iterator[None]:
    """Replace the hidden path in an `OSError` by the target's; set it where the error has none."""
    try:
        yield
    except OSError as error:
        name = error.filename
        if name is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            error.filename = str(target)
        elif isinstance(name, str | os.PathLike) and Path(name).is_relative_to(partial):
            error.filename = str(target / Path(name).relative_to(partial))
            # A failed rename names two paths.
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
    """A hidden name that is unique to this process and identifies it."""
    return target.parent / f".{target.name}.{role}-{_machine_id()}-{os.getpid()}-{token}"


def _host_name() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname())[:32]


@cache
def _machine_id() -> str:
    """Identify host, boot and PID namespace, within which a PID is one process.

    Containers on one disk may share the host name and use the same PIDs.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return f"{_host_name()}.{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:8]}"


def _clean_up_leftovers(target: Path) -> None:
    """Clean up after dead processes: remove partial folders, restore or remove old ones.

    Leftovers of other machines on a shared disk stay: their PIDs mean nothing here.
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
    """Whether the process that wrote this hidden folder is known to have ended."""
    pid = int(hidden["pid"])
    if hidden["token"] is None:
        # Naming of earlier versions. A leftover with our own PID is of an earlier process.
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
    """fsync every file and folder of the tree, files before the folders that contain them."""
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
        # Some network filesystems have no fsync for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    """Names of the entries of `folder`; folders end with a slash."""
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())


def unlisted_files(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Files in the tree of `folder` whose relative path matches no pattern (`*` crosses `/`)."""
    known = tuple(patterns)
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return [name for name in names if not any(fnmatchcase(name, one) for one in known)]
