"""Errors that the user can fix: one sentence and a remedy, exit code 2.

Any other exception is a bug in mmmamba and keeps its traceback.
"""

from collections.abc import Iterable
from pathlib import Path


class MmmambaError(Exception):
    """Invalid input or environment.

    `message` names the problem and the expected value; `hint` is the remedy.
    """

    # Whether another process of the command prints the error.
    is_reported_elsewhere = False

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message if hint is None else f"{message} ({hint})")
        self.message = message
        self.hint = hint


class RecipeError(MmmambaError):
    """An invalid recipe or override."""


class CheckpointError(MmmambaError):
    """A checkpoint, config or tensor that cannot be read or does not match."""


class DataError(MmmambaError):
    """An image, prompt or data file that cannot be used."""


class RunError(MmmambaError):
    """A run directory or product that is missing, in use, or has another parent."""


class DeviceMemoryError(MmmambaError):
    """A stage or prompt that does not fit into what is free of the device's memory."""


class MmmambaWarning(UserWarning):
    """An input was interpreted differently from how it was given."""


def check_utf8(name: str | Path) -> None:
    """Raise `RunError` if a path or a word of a command line is not UTF-8.

    Python reads its other bytes as lone surrogates, which JSON files in UTF-8 cannot hold.
    """
    try:
        str(name).encode()
    except UnicodeEncodeError as error:
        raise RunError(
            f"{name} is not UTF-8; runs and results record paths and commands as UTF-8",
            "rename the file or folder, or choose another",
        ) from error


def name_some(names: Iterable[str], limit: int = 10) -> str:
    """Join at most `limit` names and count the rest: `a, b and 3 more`."""
    listed = list(names)
    shown = ", ".join(listed[:limit])
    rest = len(listed) - limit
    return shown if rest <= 0 else f"{shown} and {rest} more"
