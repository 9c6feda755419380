"""What a checkpoint may be called: a path, a model that ships with a package, an id on the Hub.

A package ships models with an entry point in the group `mmmamba.models` that leads to a mapping of
names to folders, or to a function that returns one. What lies on the disk always comes first.
"""

from __future__ import annotations

from pathlib import Path

from mmmamba_cli.checkpoint.atomic import put_back, restore
from mmmamba_cli.checkpoint.hub import FILE_SUFFIXES, fetched, hub_name, is_hub_id
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.plugins import entry_points

MODELS = "mmmamba.models"


def shipped_models() -> dict[str, Path]:
    """Folders by name of the models that are installed, the project's own first."""
    folders: dict[str, Path] = {}
    for _, load in entry_points(MODELS):
        found = load()
        for name, folder in (found() if callable(found) else found).items():
            folders.setdefault(name, Path(folder))
    return folders


def located(name: str | Path) -> Path:
    """A path on this disk: the one given, a shipped model's folder, or what the Hub had.

    A folder that a killed command has left set aside is put back first. Raises `CheckpointError` if
    there is no such thing, naming the models that ship.
    """
    path = Path(name).expanduser()
    if _is_there(path):
        return path
    hidden = restore(path)
    if _is_there(path):
        return path
    if hidden is not None:
        raise CheckpointError(
            f"{path} was being replaced and is kept as {hidden}", put_back(hidden)
        )
    if is_hub_id(name):
        return fetched(name)
    shipped = shipped_models()
    if str(name) in shipped:
        return shipped[str(name)]
    raise CheckpointError(f"{path} does not exist", _remedy(path, shipped))


def public_name_of(path: str | Path) -> str | None:
    """What a folder is called elsewhere too: its name on the Hub, or that of a shipped model."""
    known = hub_name(path)
    if known is not None:
        return known
    shipped = shipped_models().items()
    return next((name for name, folder in shipped if _is_same(folder, Path(path))), None)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # Something is in the way; whoever opens it will say what.
        return True


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve()
    except OSError:
        return False


def _remedy(path: Path, shipped: dict[str, Path]) -> str:
    if not shipped or path.name.endswith(FILE_SUFFIXES):
        return "check the path"
    return f"check the path, or give a model that ships: {', '.join(shipped)}"
