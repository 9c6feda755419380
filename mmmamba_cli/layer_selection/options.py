"""Settings and callbacks of a selection of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

DEFAULT_SAMPLES, DEFAULT_STEPS = 128, 40
# Methods for which scores change after each choice. The others measure one layer in an otherwise
# unchanged teacher.
GREEDY_METHODS = ("kl-zero", "kl")


@dataclass(frozen=True)
class SelectionOptions:
    """How layers are scored. `method` is one of `SELECTION_METHODS`, or `file:PATH`.

    `samples` are scored; `steps` is the length of a training of method kl; `seed` draws samples and
    their order. With `greedy` the other layers are scored again after each choice.
    """

    method: str
    samples: int = DEFAULT_SAMPLES
    steps: int = DEFAULT_STEPS
    seed: int = 0
    greedy: bool = False
    device: str | None = None
    teacher: Path | None = None


@contextmanager
def _no_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda more: None


@dataclass(frozen=True)
class SelectionCallbacks:
    """Functions of the caller; `progress(title, total)` yields a function that adds layers done."""

    say: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = _no_progress
