"""Lines of JSON, read where they lie."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mmmamba_cli.errors import DataError

BLOCK = 1 << 24
# Lines up to this long are looked at: they may be blank.
MAX_BLANK = 64


class JsonLines:
    """The lines of a file that are not blank, each read when it is asked for.

    Only where lines begin is held in memory, 16 bytes a line. `shown` is what the file is called in
    names of samples. Raises `DataError` if the file cannot be read, or for a line that is no JSON.
    """

    def __init__(self, file: Path, shown: str | None = None):
        self.file = file
        self.shown = shown or file.name
        try:
            self._starts, self._numbers = _index(file)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{file} does not exist", "check the path") from error
        except IsADirectoryError as error:
            raise DataError(f"{file} is a folder, expected a file of JSON lines") from error
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, index: int) -> str:
        """`file:line`, lines counted from 1."""
        return f"{self.shown}:{int(self._numbers[index])}"

    def __getitem__(self, index: int) -> Any:
        start = int(self._starts[index])
        # Opened each time, so that a forked worker shares no position with its parent.
        try:
            with self.file.open("rb") as handle:
                handle.seek(start)
                line = handle.readline()
            # A byte order mark, as some editors put before the first line.
            return json.loads(line.removeprefix(codecs.BOM_UTF8) if start == 0 else line)
        except OSError as error:
            raise DataError(f"{self.name(index)}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.name(index)}: is not JSON: {error}") from error


def _index(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where each line that is not blank begins, and its number."""
    size = file.stat().st_size
    ends = [np.array([-1], dtype=np.int64)]
    with file.open("rb") as handle:
        for place in range(0, size, BLOCK):
            block = np.frombuffer(handle.read(BLOCK), dtype=np.uint8)
            ends.append(np.flatnonzero(block == ord("\n")).astype(np.int64) + place)
    starts = np.concatenate(ends) + 1
    lengths = np.diff(np.append(starts, size + 1)) - 1
    keep = np.flatnonzero(lengths > 0)
    with file.open("rb") as handle:
        blank = [i for i in keep[lengths[keep] <= MAX_BLANK] if _is_blank(handle, int(starts[i]))]
    keep = np.setdiff1d(keep, blank)
    return starts[keep], keep + 1


def _is_blank(handle: Any, start: int) -> bool:
    handle.seek(start, os.SEEK_SET)
    return not handle.readline().removeprefix(codecs.BOM_UTF8).strip()
