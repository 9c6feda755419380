"""Random access to the records of a JSON file without loading it: JSON lines, or one JSON list.

LLaVA publishes its conversations as one list.
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

from mmmamba_cli.data.file_version import FileVersion
from mmmamba_cli.errors import DataError

LINE_BLOCK_BYTES = 1 << 24
# Only lines up to this length are read to find out whether they are blank.
MAX_BLANK_LINE_BYTES = 64


class JsonLines:
    """The lines of a file that are not blank, read on access.

    Only the line offsets are kept in memory, 16 bytes per line. `display_name` is the name of the
    file in sample names. `positions` are those of an earlier `JsonLines` of the same file, which is
    then not searched.

    Attributes:
        positions: (2, N) int64, the offset and the number of each line.
        version: the file as it was when it was opened.

    Raises:
        DataError: the file cannot be read, or a line is not JSON.
    """

    def __init__(
        self, file: Path, display_name: str | None = None, positions: np.ndarray | None = None
    ):
        self.file = file
        self.display_name = display_name or file.name
        try:
            self.version = FileVersion.of(file)
            self.positions = _index(file, self.version.size) if positions is None else positions
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{file} does not exist", "check the path") from error
        except IsADirectoryError as error:
            raise DataError(f"{file} is a folder, expected a file of JSON lines") from error
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        self._starts, self._numbers = self.positions

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, index: int) -> str:
        """`file:line`, lines counted from 1."""
        return f"{self.display_name}:{int(self._numbers[index])}"

    def __getitem__(self, index: int) -> Any:
        start = int(self._starts[index])
        # Opened on each access: forked workers would share a file position.
        try:
            with self.file.open("rb") as handle:
                self.version.check_size(handle.fileno())
                handle.seek(start)
                line = handle.readline()
            # Some editors write a byte order mark before the first line.
            return json.loads(line.removeprefix(codecs.BOM_UTF8) if start == 0 else line)
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error.message}", error.hint) from error
        except OSError as error:
            raise DataError(f"{self.name(index)}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.name(index)}: is not JSON: {error}") from error


def _index(file: Path, size: int) -> np.ndarray:
    """The offset and the number of each line of `size` bytes that is not blank, (2, N) int64."""
    ends = [np.array([-1], dtype=np.int64)]
    with file.open("rb") as handle:
        for place in range(0, size, LINE_BLOCK_BYTES):
            content = handle.read(min(LINE_BLOCK_BYTES, size - place))
            block = np.frombuffer(content, dtype=np.uint8)
            ends.append(np.flatnonzero(block == ord("\n")).astype(np.int64) + place)
    starts = np.concatenate(ends) + 1
    lengths = np.diff(np.append(starts, size + 1)) - 1
    keep = np.flatnonzero(lengths > 0)
    with file.open("rb") as handle:
        blank = [
            i
            for i in keep[lengths[keep] <= MAX_BLANK_LINE_BYTES]
            if _is_blank(handle, int(starts[i]))
        ]
    keep = np.setdiff1d(keep, blank)
    return np.stack((starts[keep], keep + 1))


def _is_blank(handle: Any, start: int) -> bool:
    handle.seek(start, os.SEEK_SET)
    return not handle.readline().removeprefix(codecs.BOM_UTF8).strip()


LIST_BLOCK_BYTES = 1 << 22
# An item that is incomplete after this many characters is not JSON.
MAX_ITEM_CHARACTERS = 1 << 26
_SPACE = re.compile(r"[ \t\r\n]*")
_SCANNER = json.JSONDecoder()


def is_json_list(file: Path) -> bool:
    """Whether the first character except spaces is `[`; False for an unreadable file."""
    try:
        with file.open("rb") as handle:
            start = handle.read(4096).removeprefix(codecs.BOM_UTF8)
    except OSError:
        return False
    return start.lstrip().startswith(b"[")


class JsonList:
    """The items of a JSON list, read on access.

    Opening reads the file once, in blocks; only item offsets are kept in memory, 16 bytes per item.
    `display_name` is the name of the file in sample names. `positions` are those of an earlier
    `JsonList` of the same file, which is then not searched.

    Attributes:
        positions: (2, N) int64, the byte offsets at which each item begins and ends.
        version: the file as it was when it was opened.

    Raises:
        DataError: the file cannot be read or is not a list.
    """

    def __init__(
        self, file: Path, display_name: str | None = None, positions: np.ndarray | None = None
    ):
        self.file = file
        self.display_name = display_name or file.name
        try:
            self.version = FileVersion.of(file)
            self.positions = self._search() if positions is None else positions
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        self._starts, self._ends = self.positions

    def _search(self) -> np.ndarray:
        file = self.file
        starts, ends = array("q"), array("q")
        try:
            for start, end in _items(file):
                starts.append(start)
                ends.append(end)
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not JSON: it is not valid UTF-8") from error
        except (ValueError, RecursionError) as error:
            item = len(starts) + 1
            raise DataError(
                f"{file} is not a JSON list: item {item}: {error}",
                "correct the file, or write one conversation a line as .jsonl",
            ) from error
        return np.array([starts, ends], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def name(self, index: int) -> str:
        """`file:item`, items counted from 1."""
        return f"{self.display_name}:{index + 1}"

    def __getitem__(self, index: int) -> Any:
        start, end = int(self._starts[index]), int(self._ends[index])
        try:
            # Opened on each access: forked workers would share a file position.
            with self.file.open("rb") as handle:
                self.version.check_size(handle.fileno())
                handle.seek(start)
                return json.loads(handle.read(end - start))
        except DataError as error:
            raise DataError(f"{self.name(index)}: {error.message}", error.hint) from error
        except OSError as error:
            raise DataError(f"{self.name(index)}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.name(index)}: is not JSON: {error}") from error


class _TextStream:
    """The text of a file from the current position on; `place` is the position in bytes."""

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
        """Read another block, and drop the text before the position."""
        block = self._handle.read(LIST_BLOCK_BYTES)
        self._ended = not block
        self._text = self._text[self._at :] + self._decoder.decode(block, final=self._ended)
        self._at = 0

    def skip(self, characters: int) -> None:
        """Advance by `characters` of the text that was read."""
        end = self._at + characters
        self.place += len(self._text[self._at : end].encode())
        self._at = end

    def next_character(self) -> str:
        """Advance to the next character that is not a space and return it; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self.skip(found.end() - self._at if found else 0)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read()

    def item_length(self) -> int:
        """Length of the value that begins here. Raises `ValueError` if it is not JSON."""
        while True:
            left = len(self._text) - self._at
            try:
                _, end = _SCANNER.raw_decode(self._text, self._at)
            except ValueError as error:
                if self._ended or left > MAX_ITEM_CHARACTERS:
                    raise ValueError(_reason(error)) from error
            else:
                # A number may continue in the next block.
                if end < len(self._text) or self._ended:
                    return end - self._at
            self._read()


def _reason(error: ValueError) -> str:
    """The decoder's message without line and column, which are relative to the block."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _items(file: Path) -> Iterator[tuple[int, int]]:
    """Yield the byte range (start, end) of each item."""
    with closing(_TextStream(file)) as text:
        if text.next_character() != "[":
            raise ValueError("expected [")
        text.skip(1)
        character = text.next_character()
        while character != "]":
            start = text.place
            text.skip(text.item_length())
            yield start, text.place
            character = text.next_character()
            if character not in (",", "]") or not character:
                raise ValueError("expected , or ] after it")
            if character == ",":
                text.skip(1)
                if text.next_character() == "]":
                    raise ValueError("expected a conversation after the comma")
        text.skip(1)
        if text.next_character():
            raise ValueError("there is text after the list")
