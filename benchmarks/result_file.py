"""The JSON of a benchmark whose parts are measured in several calls."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from random_stages import environment, write_result


class ResultFile:
    """A result with its parts by name below `key`; each call adds those that the file lacks.

    The file is read at the beginning. `result` has the environment of the last call and the
    commands of all.
    """

    def __init__(self, file: Path | None, key: str, what: str, device: torch.device):
        self._file, self._key = file, key
        self.result: dict[str, Any] = {}
        self.parts: dict[str, Any] = {}
        self.read()
        self.result |= {"what": what, **environment(device)}
        command = self.result.pop("command")
        self.result["commands"] = sorted({*self.result.get("commands", []), command})

    def read(self) -> None:
        """Replace the result by that of the file, if there is one, to which others may write."""
        if self._file is not None and self._file.is_file():
            self.result = json.loads(self._file.read_text())
        self.parts = self.result.setdefault(self._key, {})

    def missing(
        self, names: Iterable[str], *, again: bool, is_late: Callable[[], bool]
    ) -> Iterator[str]:
        """The parts to measure: with `again` all, and those for which no time is left are named."""
        for name in names:
            if name in self.parts and not again:
                continue
            if is_late():
                print(f"{self._key}: no time left for {name}", file=sys.stderr)
                continue
            yield name

    def add(self, name: str, part: dict[str, Any]) -> None:
        self.parts[name] = part
        print(json.dumps({name: part}), file=sys.stderr, flush=True)

    def write(self) -> None:
        """Replace the file, so that a call that runs out of time loses nothing."""
        write_result(self._file, self.result)
