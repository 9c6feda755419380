"""Checkpoints named by their place on the Hugging Face Hub: `OWNER/NAME`, or `OWNER/NAME@REVISION`.

What lies on the disk always comes first: only a name that no file or folder has is looked for.
"""

from __future__ import annotations

import re
from pathlib import Path

from mmmamba_cli.errors import CheckpointError

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*?)(?:@([\w./-]+))?")
# The Hub's cache: models--OWNER--NAME/snapshots/COMMIT.
SNAPSHOT = re.compile(r"models--(.+?)--(.+)/snapshots/([0-9a-f]+)")
# Names with these endings are files, whether they are there or not.
FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".json")
WEIGHTS, OLD_WEIGHTS = "*.safetensors", "*.bin"
COMPANIONS = ("*.json", "*.model", "*.jinja")


def is_hub_id(name: str | Path) -> bool:
    """Whether `name` can only mean a repository: of that form, and nothing on the disk."""
    text = str(name)
    match = HUB_ID.fullmatch(text)
    if match is None or text.endswith(FILE_SUFFIXES):
        return False
    # A name inside a folder that is here is a path, though there be nothing there.
    return not Path(text).exists() and not Path(match[1]).is_dir()


def fetched(name: str | Path) -> Path:
    """A path on this disk: the one given, or the folder a repository was downloaded to.

    Configs, tokenizers and weights are fetched, PyTorch files only where there are no safetensors,
    code never. Raises `CheckpointError` if the repository cannot be had.
    """
    if not is_hub_id(name):
        return Path(name)
    owner, repository, revision = HUB_ID.fullmatch(str(name)).groups()  # type: ignore[union-attr]
    return _download(f"{owner}/{repository}", revision)


def hub_name(path: str | Path) -> str | None:
    """`OWNER/NAME@COMMIT` of a folder in the Hub's cache, None for any other path."""
    match = SNAPSHOT.search(Path(path).as_posix())
    return None if match is None else f"{match[1]}/{match[2]}@{match[3][:12]}"


def _download(repository: str, revision: str | None) -> Path:
    try:
        folder = _snapshot(repository, revision, WEIGHTS)
        if not any(folder.glob(WEIGHTS)):
            folder = _snapshot(repository, revision, OLD_WEIGHTS)
    except (OSError, ValueError) as error:
        raise CheckpointError(*_refusal(repository, revision, error)) from error
    return folder


def _snapshot(repository: str, revision: str | None, weights: str) -> Path:
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[*COMPANIONS, weights],
            # Folders inside a repository hold other formats of the model, or training states.
            ignore_patterns=["*/*"],
        )
    )


def _refusal(repository: str, revision: str | None, error: Exception) -> tuple[str, str]:
    """A sentence and a hint. What the Hub itself says is left out: it may quote the request."""
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
