"""Answers that were given before, by us or by the kits: TSV, JSON lines or XLSX."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmamba_cli.errors import DataError, name_some
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.store import HEADER, LIMIT
from mmmamba_cli.evaluate.tsv import MAX_CELL

INDEX, PREDICTION = "index", "prediction"
KINDS = (".tsv", ".jsonl", ".xlsx")


@dataclass(frozen=True)
class Predictions:
    """A file of answers: all its cells, the column `prediction` among them."""

    file: Path
    cells: list[dict[str, str]]
    sha256: str

    def has(self, columns: Sequence[str]) -> bool:
        """Whether every row has these columns."""
        return all(name in cell for cell in self.cells for name in columns)

    def answers(self, rows: Sequence[Row]) -> dict[str, str]:
        """The answer to each row. Raises `DataError` that names the rows without one."""
        found = {cell[INDEX]: cell[PREDICTION] for cell in self.cells}
        lacking = [row.index for row in rows if row.index not in found]
        if lacking:
            raise DataError(
                f"{self.file} lacks {len(lacking)} of {len(rows)} rows: index {name_some(lacking)}",
                "answer them too, or score only the first rows of the suite with --limit",
            )
        return {row.index: found[row.index] for row in rows}


def read_predictions(file: Path) -> Predictions:
    """Read a file as the kits write them, with columns `index` and `prediction`.

    Raises `DataError` for another kind of file, missing columns, indexes that repeat, and lines
    that are no JSON.
    """
    if file.suffix not in KINDS:
        raise DataError(f"{file} is not one of {', '.join(KINDS)}", "save the predictions as one")
    if not file.is_file():
        raise DataError(f"{file} does not exist", "check the path")
    readers = {".tsv": _read_tsv, ".jsonl": _read_jsonl, ".xlsx": _read_xlsx}
    cells = [
        {key: _text(value) for key, value in cell.items()} for cell in readers[file.suffix](file)
    ]
    if not cells:
        raise DataError(f"{file} has no predictions")
    for number, cell in enumerate(cells, start=1):
        missing = [name for name in (INDEX, PREDICTION) if name not in cell]
        if missing:
            raise DataError(
                f"{file}: row {number} lacks {' and '.join(missing)}; it has {', '.join(cell)}",
                "expected the columns index and prediction",
            )
    counts: dict[str, int] = {}
    for cell in cells:
        counts[cell[INDEX]] = counts.get(cell[INDEX], 0) + 1
    twice = [index for index, count in counts.items() if count > 1]
    if twice:
        raise DataError(f"{file} answers index {name_some(twice)} more than once")
    return Predictions(file, cells, hashlib.sha256(file.read_bytes()).hexdigest())


def _text(value: Any) -> str:
    """A cell as text; a spreadsheet keeps whole numbers as 1.0 sometimes, and nothing as None."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else str(value)


def _read_tsv(file: Path) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(MAX_CELL)
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            for row in csv.DictReader(handle, delimiter="\t", restval=None):
                yield {key: value for key, value in row.items() if key is not None}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not a table of tab-separated text: {error}") from error


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
            # Our own files say what they are, and how batches were made, in lines of their own.
            if HEADER not in record and LIMIT not in record:
                yield record


def _read_xlsx(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        from openpyxl import load_workbook
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        raise DataError(
            f"reading {file} needs openpyxl", "pip install 'mmmamba[eval]', or save it as .tsv"
        ) from error
    import zipfile
    import zlib

    # A workbook is XML in a zip: damage shows as that of the zip, the XML, or what it describes.
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
        book = load_workbook(file, read_only=True, data_only=True)
        rows = list(book.worksheets[0].iter_rows(values_only=True))
        book.close()
    except damage as error:
        raise DataError(
            f"{file} is not an XLSX workbook, or is damaged", "save it again, or as .tsv"
        ) from error
    heading = [str(name) for name in rows[0]] if rows else []
    for values in rows[1:]:
        if any(value is not None for value in values):
            yield dict(zip(heading, values, strict=False))
