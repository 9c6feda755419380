"""How a command ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Done(NamedTuple):
    """Exit code, stdout and stderr of one command."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]
