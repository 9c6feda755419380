"""Sending an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from mmmamba_cli.checkpoint.resolve import HUB_ID
from mmmamba_cli.errors import CheckpointError

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def check_repository_id(name: str) -> None:
    """Raise `CheckpointError` unless `name` is OWNER/NAME."""
    match = HUB_ID.fullmatch(name)
    if match is None or match[3] is not None:
        raise CheckpointError(f"{name!r} is no repository", "expected OWNER/NAME")


def push_to_hub(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder as a model repository, made if it is not there; returns its address.

    The token is huggingface_hub's own. Raises `CheckpointError` if the Hub refuses or cannot be
    reached; nothing it says is repeated, since it may quote the request.
    """
    import huggingface_hub
    from huggingface_hub import errors

    check_repository_id(repository)
    try:
        place = huggingface_hub.create_repo(repository, private=private, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message="mmmamba export"
        )
    except errors.LocalTokenNotFoundError as error:
        raise CheckpointError(f"{folder} was not pushed: there is no token", LOGIN) from error
    except (OSError, ValueError) as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        if code in (401, 403):
            raise CheckpointError(
                f"{folder} was not pushed: the Hub does not let you write to {repository}", LOGIN
            ) from error
        told = type(error).__name__ if code is None else f"status {code}"
        raise CheckpointError(
            f"{folder} was not pushed: the Hugging Face Hub could not be written to ({told})",
            "the folder is complete; push it again with `hf upload`",
        ) from error
    return str(place)
