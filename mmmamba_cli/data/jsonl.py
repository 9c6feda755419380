"""Lines of JSON, read where they lie.

A file that is one JSON list, as LLaVA publishes its conversations, read item by item.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import closing
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


LIST_BLOCK = 1 << 22
# Bytes of an item up to which more is read before it is called no JSON.
MAX_ITEM = 1 << 26
_SPACE = re.compile(r"[ \t\r\n]*")
_SCANNER = json.JSONDecoder()


def is_json_list(file: Path) -> bool:
    """Whether the first character that is no space is `[`; False for a file that cannot be read."""
    try:
        with file.open("rb") as handle:
            start = handle.read(4096).removeprefix(codecs.BOM_UTF8)
    except OSError:
        return False
    return start.lstrip().startswith(b"[")


class JsonList:
    """The items of a JSON list, each read when it is asked for.

    Opening reads the file once, a block at a time; only where items begin and end is held in
    memory, 16 bytes an item. `shown` is what the file is called in names of samples. Raises
    `DataError` if the file cannot be read or is no list.
    """

    def __init__(self, file: Path, shown: str | None = None):
        self.file = file
        self.shown = shown or file.name
        self._starts, self._ends = array("q"), array("q")
        try:
            for start, end in _items(file):
                self._starts.append(start)
                self._ends.append(end)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not JSON: it is not valid UTF-8") from error
        except (ValueError, RecursionError) as error:
            item = len(self._starts) + 1
            raise DataError(
                f"{file} is not a JSON list: item {item}: {error}",
                "mend it there, or write one conversation a line as .jsonl",
            ) from error

    def __len__(self) -> int:
        return len(self._starts)

    def name(self, index: int) -> str:
        """`file:item`, items counted from 1."""
        return f"{self.shown}:{index + 1}"

    def __getitem__(self, index: int) -> Any:
        start, end = self._starts[index], self._ends[index]
        try:
            # Opened for each item, so that a forked worker shares no position with its parent.
            with self.file.open("rb") as handle:
                handle.seek(start)
                return json.loads(handle.read(end - start))
        except OSError as error:
            raise DataError(f"{self.name(index)}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.name(index)}: is not JSON: {error}") from error


class _Text:
    """The text of a file from a position on; `place` is that position in bytes."""

    def __init__(self, file: Path):
        self._handle = file.open("rb")
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False
        has_mark = self._handle.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        self.place = len(codecs.BOM_UTF8) if has_mark else 0
        self._handle.seek(self.place)

    def close(self) -> None:
        self._handle.close()

    def _read(self) -> None:
        """Add a block; what was passed is let go."""
        block = self._handle.read(LIST_BLOCK)
        self._ended = not block
        self._text = self._text[self._at :] + self._decoder.decode(block, final=self._ended)
        self._at = 0

    def skip(self, characters: int) -> None:
        """Go on by so many characters of what was read."""
        end = self._at + characters
        self.place += len(self._text[self._at : end].encode())
        self._at = end

    def next_sign(self) -> str:
        """The next character that is no space, where the position then is; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self.skip(found.end() - self._at if found else 0)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read()

    def item_length(self) -> int:
        """Characters of the value that begins here. Raises `ValueError` if it is no JSON."""
        while True:
            left = len(self._text) - self._at
            try:
                _, end = _SCANNER.raw_decode(self._text, self._at)
            except ValueError as error:
                if self._ended or left > MAX_ITEM:
                    raise ValueError(_reason(error)) from error
            else:
                # A number may go on in the next block.
                if end < len(self._text) or self._ended:
                    return end - self._at
            self._read()


def _reason(error: ValueError) -> str:
    """The decoder's words without its line and column, which count from the block."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _items(file: Path) -> Iterator[tuple[int, int]]:
    """First byte of each item, and the one behind it."""
    with closing(_Text(file)) as text:
        if text.next_sign() != "[":
            raise ValueError("expected [")
        text.skip(1)
        sign = text.next_sign()
        while sign != "]":
            start = text.place
            text.skip(text.item_length())
            yield start, text.place
            sign = text.next_sign()
            if sign not in (",", "]") or not sign:
                raise ValueError("expected , or ] behind it")
            if sign == ",":
                text.skip(1)
                if text.next_sign() == "]":
                    raise ValueError("expected a conversation behind the comma")
        text.skip(1)
        if text.next_sign():
            raise ValueError("there is more behind the list")
