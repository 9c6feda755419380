"""Datasets in tables: Parquet files, and folders that the library `datasets` has saved.

Rows are read on access by pyarrow, which is needed for these sources only, and only the columns of
a sample. Pictures are bytes, structs of `bytes` and `path`, as `datasets` stores them, or paths.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

from mmmamba_cli.data.corpus import CorpusPart, locate
from mmmamba_cli.data.file_version import FileVersion
from mmmamba_cli.data.sample import (
    IMAGE_PATH_KEYS,
    MEDIA_KEYS,
    TURN_KEYS,
    ImageBytes,
    ImageLocation,
    Sample,
    parse_sample,
    resolve_image,
)
from mmmamba_cli.errors import DataError, name_some

PARQUET, ARROW = ".parquet", ".arrow"
OTHER_KINDS = (".json", ".jsonl", ".tar")
# The file that lists the data files of a folder saved by `datasets`.
STATE = "state.json"
DICT_STATE = "dataset_dict.json"
# `train-00000-of-00010.parquet` is of the split `train`.
SPLIT = re.compile(r"(.+?)-\d+-of-\d+(?:-[0-9a-f]+)?")
MAX_OPEN_FILES = 64
# Row groups that stay decoded in a process; a group of pictures has about 100 MB.
MAX_DECODED_GROUPS = 2
IMAGE_COLUMNS = ("image", "images")


def is_table_source(source: str) -> bool:
    """Whether a source is a Parquet file, several by a pattern, or a folder."""
    suffix = Path(source).suffix.lower()
    return suffix in (PARQUET, ARROW) or (suffix not in OTHER_KINDS and Path(source).is_dir())


def table_files(source: str) -> list[Path]:
    """The files of a source, in order.

    Raises:
        DataError: there are none, or a folder has several splits.
    """
    path = Path(source)
    if not path.is_dir():
        if path.exists() or not any(mark in source for mark in "*?["):
            return [path]
        found = sorted(path.parent.glob(path.name))
        if not found:
            raise DataError(f"no file matches {source}", "check the path")
        return found
    if (path / STATE).is_file():
        return _saved_files(path)
    if (path / DICT_STATE).is_file():
        splits = sorted(each.name for each in path.iterdir() if (each / STATE).is_file())
        raise DataError(
            f"{path} has the splits {name_some(splits)}", f"name one: {path / (splits or ['?'])[0]}"
        )
    found = sorted(path.rglob(f"*{PARQUET}"))
    if not found:
        raise DataError(
            f"{path} is a folder without {PARQUET} files, and `datasets` did not save it",
            "name a file of conversations",
        )
    splits = sorted({_split(file) for file in found})
    if len(splits) > 1:
        folder = found[0].parent
        raise DataError(
            f"{path} has the splits {name_some(splits)}",
            f"name the files of one: '{folder / splits[0]}-*{PARQUET}'",
        )
    return found


def _split(file: Path) -> str:
    match = SPLIT.fullmatch(file.stem)
    return file.stem if match is None else match[1]


def _saved_files(folder: Path) -> list[Path]:
    try:
        listed = json.loads((folder / STATE).read_text(encoding="utf-8-sig"))["_data_files"]
        return [folder / each["filename"] for each in listed]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{folder / STATE} cannot be read: {error}", "save the dataset again"
        ) from error


class TableCorpus:
    """The rows of tables, concatenated; paths of pictures are relative to `root`."""

    def __init__(self, files: Sequence[Path], root: Path | None):
        self.tables = [_open(file) for file in files]
        self._ends = list(accumulate(len(table) for table in self.tables))
        self._root = files[0].parent if root is None else root
        self.parts = (CorpusPart(files[0].name, len(self)),)
        self.ignored: tuple[str, ...] = ()
        self.pictures: dict[str, ImageLocation] = {}
        self.files = tuple(table.version for table in self.tables)

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        """`file:row`, rows counted from 1."""
        which, row = locate(self._ends, index)
        return f"{self.files[which].path.name}:{row + 1}"

    def __getitem__(self, index: int) -> Sample:
        which, row = locate(self._ends, index)
        name = self.name(index)
        try:
            found = self.tables[which][row]
        except DataError as error:
            raise DataError(f"{name}: {error.message}", error.hint) from error
        except _read_errors(self.files[which].path) as error:
            raise DataError(f"{name}: cannot be read: {error}") from error
        record, stored = take_pictures(found)

        def find(image: str) -> ImageLocation:
            return stored[image] if image in stored else resolve_image(self._root, image)

        return parse_sample(record, name, find)


def take_pictures(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, ImageBytes]]:
    """A row without nulls, in which stored pictures have names, and these pictures."""
    record: dict[str, Any] = _without_nulls(row)
    stored: dict[str, ImageBytes] = {}

    def named(picture: Any) -> Any:
        content = picture
        if isinstance(picture, Mapping) and {"bytes", "path"} & set(picture):
            content = picture.get("bytes", picture.get("path"))
        if not isinstance(content, bytes):
            return content if isinstance(content, str) else picture
        # No path has this form, since none is empty.
        name = f"/{len(stored)}"
        stored[name] = ImageBytes(content)
        return name

    for column in IMAGE_COLUMNS:
        value = record.get(column)
        if value is not None:
            record[column] = (
                [named(each) for each in value] if isinstance(value, list) else named(value)
            )
    for part in _content_parts(record):
        for key in IMAGE_PATH_KEYS:
            if key in part:
                part[key] = named(part[key])
    return record, stored


def _content_parts(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of the contents of all turns; the record is a copy, so that they may be changed."""
    for turns in (record.get("conversations"), record.get("messages")):
        for turn in turns if isinstance(turns, list) else ():
            for content in turn.values() if isinstance(turn, dict) else ():
                if isinstance(content, list):
                    yield from (part for part in content if isinstance(part, dict))


def _without_nulls(value: Any) -> Any:
    """A table has every key in every row; those that a row lacks are null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _pyarrow(file: Path) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"reading {file} needs pyarrow", "pip install 'mmmamba[tables]'") from error
    return pyarrow


class ParquetTable:
    """Rows of a Parquet file. A row is read with its row group."""

    def __init__(self, path: Path):
        self.version = FileVersion.of(path)
        file = _parquet_file(os.getpid(), self.version)
        self._columns = _sample_columns(path, file.schema_arrow.names)
        metadata = file.metadata
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = list(accumulate(groups)) or [0]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> dict[str, Any]:
        group, place = locate(self._ends, row)
        found = _row_group(os.getpid(), self.version, group, self._columns)
        return dict(found.slice(place, 1).to_pylist()[0])


# Loader processes are forks or receive a pickle: each opens a file itself.
@lru_cache(MAX_OPEN_FILES)
def _parquet_file(process: int, file: FileVersion) -> Any:
    file.check_size()
    return _pyarrow(file.path).parquet.ParquetFile(file.path)


@lru_cache(MAX_DECODED_GROUPS)
def _row_group(process: int, file: FileVersion, group: int, columns: tuple[str, ...]) -> Any:
    opened = _parquet_file(process, file)
    return opened.read_row_group(group, columns=list(columns), use_threads=False)


class ArrowTable:
    """Rows of an Arrow file as `datasets` writes it, mapped into memory."""

    def __init__(self, path: Path):
        self.version = FileVersion.of(path)
        table = _arrow_table(self.version)
        self._columns = _sample_columns(path, table.schema.names)
        self._length = int(table.num_rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> dict[str, Any]:
        found = _arrow_table(self.version).select(list(self._columns))
        return dict(found.slice(row, 1).to_pylist()[0])


@lru_cache(MAX_OPEN_FILES)
def _arrow_table(file: FileVersion) -> Any:
    file.check_size()
    arrow = _pyarrow(file.path)
    source = arrow.memory_map(str(file.path))
    try:
        return arrow.ipc.open_stream(source).read_all()
    except arrow.ArrowInvalid:
        return arrow.ipc.open_file(source).read_all()


def _sample_columns(file: Path, names: Sequence[str]) -> tuple[str, ...]:
    """The columns that a sample is made of; the others may hold what Python's types do not.

    Raises:
        DataError: there is none with turns or a text, or two have the same name.
    """
    found = [name for name in names if name in (*TURN_KEYS, *MEDIA_KEYS)]
    if not set(found) & set(TURN_KEYS):
        raise DataError(
            f"{file} has the columns {name_some(names)}, expected one of {', '.join(TURN_KEYS)}",
            "rename the column of the conversations",
        )
    if len(set(found)) < len(found):
        twice = sorted({name for name in found if found.count(name) > 1})
        raise DataError(f"{file} has two columns called {name_some(twice)}", "rename one")
    return tuple(found)


def _read_errors(file: Path) -> tuple[type[Exception], ...]:
    """Errors of damaged files, texts that are not UTF-8 and values that Python's types lack."""
    return OSError, ValueError, OverflowError, _pyarrow(file).ArrowException


def _open(file: Path) -> ParquetTable | ArrowTable:
    try:
        return ArrowTable(file) if file.suffix.lower() == ARROW else ParquetTable(file)
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist", "check the path") from error
    except _read_errors(file) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
