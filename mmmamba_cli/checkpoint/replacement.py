"""What `--overwrite` may replace: folders that hold only what mmmamba wrote into them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from mmmamba_cli.errors import CheckpointError, name_some

ELSEWHERE = "move what is to be kept, or choose another folder"
NAMED = 5


def check_replaceable(
    folder: Path, strangers: Callable[[Path], Iterable[str]], writer: str
) -> None:
    """Raise `CheckpointError` unless `folder` may be replaced by what `writer` is about to write.

    It may not if it is or holds the working directory or the home folder, or if `strangers` names
    anything in it. `writer` is the command, as "mmmamba export".
    """
    folder = Path(folder).resolve()
    for place, what in ((Path.cwd(), "the working directory"), (Path.home(), "the home folder")):
        if place.resolve().is_relative_to(folder):
            relation = "is" if place.resolve() == folder else "holds"
            raise CheckpointError(f"{folder} {relation} {what}", "choose another folder")
    found = list(strangers(folder))
    if found:
        raise CheckpointError(
            f"{folder} would be replaced, and with it what {writer} did not write: "
            f"{name_some(found, NAMED)}",
            ELSEWHERE,
        )


def entries(folder: Path) -> list[str]:
    """The names of what lies in `folder`, folders with a slash behind."""
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())


def files_beside(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Files below `folder` whose path within it matches none of `patterns` (`*` crosses `/`)."""
    known = tuple(patterns)
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return [name for name in names if not any(fnmatchcase(name, one) for one in known)]
