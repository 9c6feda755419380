"""Checkpoint names: a path, a model shipped with a package, or an id on the Hugging Face Hub.

An existing file or folder always comes first. A package ships models with an entry point in the
group `mmmamba.models`: a mapping of names to folders, or a function that returns one. A Hub id is
`OWNER/NAME` or `OWNER/NAME@REVISION`.
"""

from __future__ import annotations

import re
from pathlib import Path

from mmmamba_cli.checkpoint.atomic_writes import restore_hint, restore_interrupted
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.plugins import entry_point_values

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*?)(?:@([\w./-]+))?")
# Folder of the Hub's cache: models--OWNER--NAME/snapshots/COMMIT.
HUB_SNAPSHOT_PATH = re.compile(r"models--(.+?)--(.+)/snapshots/([0-9a-f]+)")
# A name with one of these suffixes is a path, even if it does not exist.
FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".json")
SAFETENSORS_PATTERN, PICKLE_PATTERN = "*.safetensors", "*.bin"
# The card and licence files go with a student that is published.
SIDECAR_PATTERNS = ("*.json", "*.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*")


def is_hub_id(name: str | Path) -> bool:
    """Whether `name` has the form of a Hub id and is no path on this disk."""
    text = str(name)
    match = HUB_ID.fullmatch(text)
    if match is None or text.endswith(FILE_SUFFIXES):
        return False
    # Inside an existing folder a name is a path, even if it does not exist.
    return not Path(text).exists() and not Path(match[1]).is_dir()


def download_from_hub(name: str | Path) -> Path:
    """Download the repository if `name` is a Hub id, and return its folder; else return the path.

    Configs, tokenizers and weights are downloaded, PyTorch files only if there are no safetensors,
    code never. Raises `CheckpointError` if the download fails.
    """
    if not is_hub_id(name):
        return Path(name)
    owner, repository, revision = HUB_ID.fullmatch(str(name)).groups()  # type: ignore[union-attr]
    return _download(f"{owner}/{repository}", revision)


def hub_name(path: str | Path) -> str | None:
    """`OWNER/NAME@COMMIT` of a folder in the Hub's cache, None for any other path."""
    match = HUB_SNAPSHOT_PATH.search(Path(path).as_posix())
    return None if match is None else f"{match[1]}/{match[2]}@{match[3][:12]}"


def check_repository_id(name: str) -> None:
    """Raise `CheckpointError` unless `name` is OWNER/NAME."""
    match = HUB_ID.fullmatch(name)
    if match is None or match[3] is not None:
        raise CheckpointError(f"{name!r} is no repository", "expected OWNER/NAME")


def _download(repository: str, revision: str | None) -> Path:
    try:
        folder = _snapshot(repository, revision, SAFETENSORS_PATTERN)
        if not any(folder.glob(SAFETENSORS_PATTERN)):
            folder = _snapshot(repository, revision, PICKLE_PATTERN)
    except (OSError, ValueError) as error:
        raise CheckpointError(*_download_error(repository, revision, error)) from error
    return folder


def _snapshot(repository: str, revision: str | None, weights: str) -> Path:
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[*SIDECAR_PATTERNS, weights],
            # Subfolders of a repository hold other formats of the model, or training states.
            ignore_patterns=["*/*"],
        )
    )


def _download_error(repository: str, revision: str | None, error: Exception) -> tuple[str, str]:
    """A sentence and a hint, without the Hub's own message: it may quote the request."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repository} on the Hugging Face Hub is gated",
            "ask for access on its page, then log in with `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} on the Hugging Face Hub has no revision {revision!r}", "check it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repository} is neither on this disk nor on the Hugging Face Hub",
            "check the name; a private repository needs `hf auth login`",
        )
    return (
        f"{repository} is not on this disk, and the Hugging Face Hub cannot be reached "
        f"({type(error).__name__})",
        "give a local path, or download it where there is a network and copy the folder here",
    )


MODELS_GROUP = "mmmamba.models"


def shipped_models() -> dict[str, Path]:
    """Folders of the installed models by name, mmmamba's own first."""
    folders: dict[str, Path] = {}
    for _, found in entry_point_values(MODELS_GROUP):
        for name, folder in found.items():
            folders.setdefault(name, Path(folder))
    return folders


def resolve_path(name: str | Path) -> Path:
    """Resolve a path, the name of a shipped model or a Hub id to a path on this disk.

    A folder that a killed command left hidden is restored first. Raises `CheckpointError`, naming
    the shipped models, if nothing has that name.
    """
    path = Path(name).expanduser()
    if _exists(path):
        return path
    hidden = restore_interrupted(path)
    if _exists(path):
        return path
    if hidden is not None:
        raise CheckpointError(
            f"{path} was being replaced and is kept as {hidden}", restore_hint(hidden)
        )
    if is_hub_id(name):
        return download_from_hub(name)
    shipped = shipped_models()
    if str(name) in shipped:
        return shipped[str(name)]
    raise CheckpointError(f"{path} does not exist", _missing_path_hint(path, shipped))


def public_model_name(path: str | Path) -> str | None:
    """The name of a folder on other machines: its Hub id or that of a shipped model, or None."""
    known = hub_name(path)
    if known is not None:
        return known
    shipped = shipped_models().items()
    return next((name for name, folder in shipped if _same_folder(folder, Path(path))), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # Opening it raises the error with its reason.
        return True


def _same_folder(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve()
    except OSError:
        return False


def _missing_path_hint(path: Path, shipped: dict[str, Path]) -> str:
    if not shipped or path.name.endswith(FILE_SUFFIXES):
        return "check the path"
    return f"check the path, or give a model that ships: {', '.join(shipped)}"
