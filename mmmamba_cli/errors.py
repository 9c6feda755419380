"""Errors that are the user's to mend: one sentence and a remedy, exit code 2.

A bug of ours is any other exception; it keeps its traceback.
"""

from collections.abc import Iterable


class MmmambaError(Exception):
    """A mistake in what we were given.

    `message` names the thing and what was expected of it; `hint`, when given, says what to do.
    """

    # Whether another process of the same command prints it.
    is_reported_elsewhere = False

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message if hint is None else f"{message} ({hint})")
        self.message = message
        self.hint = hint


class RecipeError(MmmambaError):
    """A recipe, or a value laid over one, that is not valid."""


class CheckpointError(MmmambaError):
    """A checkpoint, config or tensor that cannot be read or does not fit."""


class DataError(MmmambaError):
    """An image, prompt or data file that cannot be used."""


class RunError(MmmambaError):
    """A run directory or product that is missing, busy, or of another parent."""


class MmmambaWarning(UserWarning):
    """Something was taken otherwise than it was given: one sentence that names it."""


def name_some(names: Iterable[str], limit: int = 10) -> str:
    """Join at most `limit` names, then say how many more there are: `a, b and 3 more`."""
    listed = list(names)
    shown = ", ".join(listed[:limit])
    rest = len(listed) - limit
    return shown if rest <= 0 else f"{shown} and {rest} more"
