"""Tables in VLMEvalKit's layout: tab-separated, with pictures as base64 cells.

Files can have gigabytes, so pictures stay on disk: the byte range of each row is kept, and its
picture is read when it is needed.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mmmamba_cli.errors import DataError, name_some

# An image cell of at most this length is the index of the row that holds the picture.
MAX_REFERENCE_CHARS = 64
IMAGE = "image"
# The added column: the index of the row that holds the picture, or "".
PICTURE = "picture"
MAX_CELL_CHARS = 1 << 30
WHOLE_NUMBER = re.compile(r"^(\d+)\.0+$")


class _HashedLines:
    """Iterates over decoded lines of a file; counts and hashes the bytes read."""

    def __init__(self, file: Path):
        self._file = file
        self.offset = 0
        self.number = 0
        self.sha256 = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        with self._file.open("rb") as handle:
            for raw in handle:
                self.sha256.update(raw)
                self.offset += len(raw)
                self.number += 1
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{self._file}: line {self.number} is not UTF-8", "save the table as UTF-8"
                    ) from error
                yield text.removeprefix("\ufeff") if self.number == 1 else text


class VLMEvalTable:
    """A TSV as rows of text cells, with lazily read pictures.

    In `cells`, the column `image` is replaced by `picture`: the index of the row that holds the
    picture, or "". `sha256` is that of the file. Raises `DataError` that names rows or columns for
    missing columns, rows of another width, repeated indexes, and references to rows without a
    picture.
    """

    def __init__(self, file: Path, columns: Sequence[str]):
        self.file = file
        self.cells: list[dict[str, str]] = []
        # Number of pictures by the index of the row that holds them.
        self.pictures: dict[str, int] = {}
        self._spans: list[tuple[int, int]] = []
        self._references: dict[str, str] = {}
        csv.field_size_limit(MAX_CELL_CHARS)
        lines = _HashedLines(file)
        try:
            self._read(lines, columns)
        except csv.Error as error:
            raise DataError(f"{file}: line {lines.number} is no row of a table: {error}") from error
        self.sha256 = lines.sha256.hexdigest()
        self._simplify_indexes()
        self._check_indexes()
        self._place = {cell["index"]: i for i, cell in enumerate(self.cells)}
        self._resolve()

    def _read(self, lines: _HashedLines, columns: Sequence[str]) -> None:
        reader = records(lines, "\t")
        self.columns = tuple(check_heading(self.file, next(reader, [])))
        self._check_columns(columns)
        begin = lines.offset
        for number, values in enumerate(reader, start=1):
            if values:
                self._add_record(values, number)
                self._spans.append((begin, lines.offset))
            begin = lines.offset

    def _check_columns(self, wanted: Sequence[str]) -> None:
        missing = [name for name in wanted if name not in self.columns]
        if IMAGE not in self.columns and "image_path" not in self.columns:
            missing.append("image (or image_path)")
        if missing:
            raise DataError(
                f"{self.file} lacks the column{'s' if missing[1:] else ''} {', '.join(missing)}; "
                f"it has {', '.join(self.columns) or 'none'}",
                f"expected a table in VLMEvalKit's layout: tab-separated, with "
                f"{', '.join([*wanted, IMAGE])}",
            )

    def _add_record(self, values: list[str], number: int) -> None:
        if len(values) != len(self.columns):
            raise DataError(
                f"{self.file}: row {number} has {len(values)} cells, the heading has "
                f"{len(self.columns)}",
                "cells are separated by tabs, and quoted where they contain one",
            )
        cell = dict(zip(self.columns, values, strict=True))
        cell["index"] = cell["index"].strip()
        picture = cell.pop(IMAGE, "").strip()
        if len(picture) > MAX_REFERENCE_CHARS or picture.startswith("["):
            self.pictures[cell["index"]] = len(split_cell(picture))
        elif picture:
            self._references[cell["index"]] = picture
        self.cells.append(cell)

    def _simplify_indexes(self) -> None:
        """Turn indexes 0.0, 1.0 into 0, 1 if every index is a whole number."""
        if not simplify_indexes(self.cells):
            return
        self.pictures = {plain_index(index): count for index, count in self.pictures.items()}
        self._references = {
            plain_index(index): plain_index(owner) for index, owner in self._references.items()
        }

    def _check_indexes(self) -> None:
        counts = Counter(cell["index"] for cell in self.cells)
        twice = [index for index, count in counts.items() if count > 1]
        if twice:
            raise DataError(
                f"{self.file} has more than one row of index {name_some(twice)}",
                "every row needs an index of its own",
            )

    def _resolve(self) -> None:
        """Fill the column `picture`."""
        lost = []
        for cell in self.cells:
            index = cell["index"]
            owner = self._references.get(index, index if index in self.pictures else "")
            cell[PICTURE] = owner
            if owner and owner not in self.pictures:
                lost.append(f"{index} -> {owner}")
        if lost:
            raise DataError(
                f"{self.file}: the picture of some rows is to be found in a row that holds none "
                f"(row -> named row): {name_some(lost)}",
                "an image is base64, or the index of another row that has base64",
            )

    def image_cell(self, index: str) -> str:
        """The cell `image` of a row, read from the file."""
        begin, end = self._spans[self._place[index]]
        with self.file.open("rb") as handle:
            handle.seek(begin)
            record = io.BytesIO(handle.read(end - begin))
        (values,) = csv.reader((line.decode("utf-8") for line in record), delimiter="\t")
        return values[self.columns.index(IMAGE)]


def plain_index(index: str) -> str:
    """An index without the decimals that spreadsheets and pandas add: 3 for 3.0."""
    return WHOLE_NUMBER.sub(r"\1", index)


def simplify_indexes(cells: Iterable[dict[str, str]]) -> bool:
    """Make all indexes plain if all are whole numbers; return whether they are."""
    plain = [plain_index(cell["index"]) for cell in cells]
    if not all(index.isdecimal() for index in plain):
        return False
    for cell, index in zip(cells, plain, strict=True):
        cell["index"] = index
    return True


def records(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """Rows of delimited text. Raises `csv.Error` if the last row ends inside a quoted cell.

    Without the check, csv reads such a cell up to the end of the text, with all rows in between.
    """
    read: list[str] = []
    last: list[str] = []

    def remembered() -> Iterator[str]:
        for line in lines:
            read.append(line)
            yield line

    for values in csv.reader(remembered(), delimiter=delimiter):
        last = read.copy()
        read.clear()
        yield values
    try:
        list(csv.reader(last, delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise csv.Error("a quoted cell of the last row is never closed") from error


def check_heading(file: Path, names: Sequence[str]) -> list[str]:
    """Column names without outer spaces. Raises `DataError` if a name repeats."""
    columns = [name.strip() for name in names]
    twice = [name for name, count in Counter(columns).items() if name and count > 1]
    if twice:
        raise DataError(f"{file} has more than one column {name_some(twice)}", "rename or drop one")
    return columns


def split_cell(cell: str) -> list[str]:
    """The texts of a cell, which holds one text or a Python list of them."""
    text = cell.strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            listed = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return [text]
        return [str(one) for one in listed]
    return [text]
