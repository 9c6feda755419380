"""Reader of prediction files, of mmmamba or other kits: TSV, CSV, JSON lines or XLSX."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmamba_cli.errors import DataError, name_some
from mmmamba_cli.evaluate.answer_cache import HEADER, LIMIT
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.vlmeval_table import (
    MAX_CELL_CHARS,
    check_heading,
    plain_index,
    records,
    simplify_indexes,
)

INDEX, PREDICTION = "index", "prediction"
DELIMITERS = {".tsv": "\t", ".csv": ","}
KINDS = (*DELIMITERS, ".jsonl", ".xlsx")


@dataclass(frozen=True)
class Predictions:
    """A file of answers: its rows as cells by column, `index` and `prediction` among them."""

    file: Path
    cells: list[dict[str, str]]
    sha256: str

    def has(self, columns: Sequence[str]) -> bool:
        """Whether every row has these columns."""
        return all(name in cell for cell in self.cells for name in columns)

    def answers(self, rows: Sequence[Row]) -> dict[str, str]:
        """The answer to each row by index. An index 3.0 in the file matches row 3.

        Raises `DataError` that names the rows without an answer.
        """
        found = self._found()
        lacking = [row.index for row in rows if row.index not in found]
        if lacking:
            raise DataError(
                f"{self.file} lacks {len(lacking)} of {len(rows)} rows: index {name_some(lacking)}",
                "answer them too, or score a part of the suite with --limit N",
            )
        return {row.index: found[row.index] for row in rows}

    def left_out(self, indexes: Iterable[str]) -> list[str]:
        """The indexes of its rows that are not among those of a table."""
        known = set(map(plain_index, indexes))
        return [cell[INDEX] for cell in self.cells if plain_index(cell[INDEX]) not in known]

    def answered_units(self, rows: Sequence[Row]) -> list[Row]:
        """The rows whose unit is completely answered."""
        found = self._found()
        open_units = {row.unit for row in rows if row.index not in found}
        return [row for row in rows if row.unit not in open_units]

    def _found(self) -> dict[str, str]:
        plain = {plain_index(cell[INDEX]): cell[PREDICTION] for cell in self.cells}
        return plain | {cell[INDEX]: cell[PREDICTION] for cell in self.cells}


def read_predictions(file: Path) -> Predictions:
    """Read a file with the columns `index` and `prediction`, as evaluation kits write it.

    Raises `DataError` for other file types, missing columns, rows whose width differs from the
    heading, repeated indexes, and invalid JSON.
    """
    kind = file.suffix.lower()
    if kind not in KINDS:
        raise DataError(f"{file} is not one of {', '.join(KINDS)}", "save the predictions as one")
    if not file.is_file():
        raise DataError(f"{file} does not exist", "check the path")
    if kind in DELIMITERS:
        rows = _read_table(file, DELIMITERS[kind])
    else:
        rows = _read_jsonl(file) if kind == ".jsonl" else _read_xlsx(file)
    cells = [{key: _text(value) for key, value in cell.items()} for cell in rows]
    if not cells:
        raise DataError(f"{file} has no predictions")
    for number, cell in enumerate(cells, start=1):
        missing = [name for name in (INDEX, PREDICTION) if name not in cell]
        if missing:
            raise DataError(
                f"{file}: row {number} lacks {' and '.join(missing)}; it has {', '.join(cell)}",
                "expected the columns index and prediction",
            )
    for number, cell in enumerate(cells, start=1):
        cell[INDEX] = cell[INDEX].strip()
        if not cell[INDEX]:
            raise DataError(
                f"{file}: row {number} has no index", "number the rows as the suite does"
            )
        _check_unicode(file, number, cell)
    simplify_indexes(cells)
    counts = Counter(plain_index(cell[INDEX]) for cell in cells)
    twice = [index for index, count in counts.items() if count > 1]
    if twice:
        raise DataError(f"{file} answers index {name_some(twice)} more than once")
    return Predictions(file, cells, hashlib.sha256(file.read_bytes()).hexdigest())


def _text(value: Any) -> str:
    """A cell as text; spreadsheets store integers as 1.0, and empty cells are None or NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else str(value)


def _check_unicode(file: Path, number: int, cell: Mapping[str, str]) -> None:
    """Raise `DataError` for a lone surrogate, which JSON can write and UTF-8 cannot."""
    for column, text in cell.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{file}: row {number} has a lone surrogate (U+{ord(text[error.start]):04X}) in "
                f"{ascii(column)[1:-1]}, which is not valid Unicode",
                "write it as UTF-8",
            ) from error


def _read_table(file: Path, delimiter: str) -> Iterator[Mapping[str, str]]:
    csv.field_size_limit(MAX_CELL_CHARS)
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            reader = records(handle, delimiter)
            heading = check_heading(file, next(reader, []))
            for number, values in enumerate(reader, start=1):
                if values:
                    yield _cells(file, heading, values, number)
    except (csv.Error, UnicodeDecodeError) as error:
        what = "tab-separated" if delimiter == "\t" else "comma-separated"
        raise DataError(f"{file} is not a table of {what} text in UTF-8: {error}") from error


def _cells(
    file: Path, heading: Sequence[str], values: Sequence[Any], number: int
) -> dict[str, Any]:
    """A row by column. Raises `DataError` with its number if its width is not the heading's."""
    if len(values) != len(heading):
        raise DataError(
            f"{file}: row {number} has {len(values)} cells, the heading has {len(heading)}",
            "the row was cut, or a cell with a separator in it is not quoted",
        )
    return dict(zip(heading, values, strict=True))


def _read_jsonl(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}: line {number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{file}: line {number} is not a JSON object")
            # Skip the header and batch limits of mmmamba's own files.
            if HEADER not in record and LIMIT not in record:
                yield record


def _read_xlsx(file: Path) -> Iterator[Mapping[str, Any]]:
    rows = _sheet(file)
    heading = check_heading(file, ["" if name is None else str(name) for name in rows[0]])
    while heading and not heading[-1]:
        heading.pop()
    for number, values in enumerate(rows[1:], start=1):
        if all(value is None for value in values):
            continue
        # A sheet may omit empty cells at the end of a row, or have extra ones.
        kept = list(values) + [None] * (len(heading) - len(values))
        while len(kept) > len(heading) and kept[-1] is None:
            kept.pop()
        yield _cells(file, heading, kept, number)


def _sheet(file: Path) -> list[tuple[Any, ...]]:
    """The rows of a workbook's first sheet. Raises `DataError` if there is none."""
    try:
        from openpyxl import load_workbook
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        raise DataError(
            f"reading {file} needs openpyxl", "pip install 'mmmamba[eval]', or save it as .tsv"
        ) from error
    import zipfile
    import zlib

    # A workbook is zipped XML: damage can surface in the zip, the XML or its interpretation.
    damage = (
        InvalidFileException,
        zipfile.BadZipFile,
        zlib.error,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        OSError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
    )
    try:
        # Read formulas as text: an answer that begins with "=" is stored as one without a value.
        book = load_workbook(file, read_only=True, data_only=False)
        rows = list(book.worksheets[0].iter_rows(values_only=True))
        book.close()
    except damage as error:
        raise DataError(
            f"{file} is not an XLSX workbook, or is damaged", "save it again, or as .tsv"
        ) from error
    if not rows:
        raise DataError(f"{file} has no predictions")
    return rows
