"""Datasets of conversations, indexed by sample: JSON files, shards, tables, mixtures."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mmmamba_cli.data.corpus import Corpus, CorpusPart, locate
from mmmamba_cli.data.jsonl import JsonLines, JsonList, is_json_list
from mmmamba_cli.data.sample import (
    ImageLocation,
    Sample,
    first_present,
    parse_sample,
    resolve_image,
)
from mmmamba_cli.data.table_corpus import TableCorpus, is_table_source, table_files
from mmmamba_cli.data.webdataset import Shard, expand_shards
from mmmamba_cli.errors import DataError, MmmambaWarning, name_some

# The limit of common file systems, which raise their own error for longer names.
MAX_NAME_CHARACTERS = 255


class ConversationFile:
    """A `.jsonl` file, or a `.json` file with one list.

    `display_name` is the name of the file in sample names. Image paths are relative to `root`, or
    to the folder of the file. `positions` are those of the records, if they are known.
    """

    def __init__(
        self,
        file: Path,
        root: Path | None,
        display_name: str | None = None,
        positions: np.ndarray | None = None,
    ):
        if root is not None and not root.is_dir():
            raise DataError(
                f"the image root {root} is not a folder", "check --image-root (data.image_root)"
            )
        is_list = file.suffix.lower() == ".json" and is_json_list(file)
        kind = JsonList if is_list else JsonLines
        self.records: JsonList | JsonLines = kind(file, display_name, positions)
        self.root = file.parent if root is None else root
        self.ignored: tuple[str, ...] = ()
        self.pictures: dict[str, ImageLocation] = {}
        self.parts = (CorpusPart(file.name, len(self.records)),)
        self.files = (self.records.version,)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        return parse_sample(record, self.name(index), lambda name: resolve_image(self.root, name))

    def name(self, index: int) -> str:
        return self.records.name(index)


class ShardedCorpus:
    """webdataset shards, concatenated."""

    def __init__(self, files: Sequence[Path]):
        self.shards = [Shard(file) for file in files]
        self._ends = list(accumulate(len(shard) for shard in self.shards))
        self.parts = (CorpusPart(files[0].name, len(self)),)
        self.ignored = tuple(name for shard in self.shards for name in shard.ignored)
        self.pictures: dict[str, ImageLocation] = {
            f"{shard.file.name}/{name}": picture
            for shard in self.shards
            for name, picture in shard.pictures.items()
        }
        self.files = tuple(shard.version for shard in self.shards)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        shard, number = locate(self._ends, index)
        return self.shards[shard][number]

    def name(self, index: int) -> str:
        shard, number = locate(self._ends, index)
        return self.shards[shard].name(number)


class MixedCorpus:
    """Several datasets as one, each with its own `repeats`."""

    def __init__(self, sets: Sequence[tuple[str, Corpus, float]]):
        self.sets = [corpus for _, corpus, _ in sets]
        self._ends = list(accumulate(len(corpus) for corpus in self.sets))
        self.parts = tuple(CorpusPart(name, len(corpus), repeats) for name, corpus, repeats in sets)
        self.ignored = tuple(name for corpus in self.sets for name in corpus.ignored)
        self.pictures = {name: one for corpus in self.sets for name, one in corpus.pictures.items()}
        self.files = tuple(file for corpus in self.sets for file in corpus.files)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        which, number = locate(self._ends, index)
        return self.sets[which][number]

    def name(self, index: int) -> str:
        which, number = locate(self._ends, index)
        return self.sets[which].name(number)


def record_positions(corpus: Corpus) -> np.ndarray | None:
    """Positions of the records of one JSON file, (2, N) int64; None for another corpus."""
    return corpus.records.positions if isinstance(corpus, ConversationFile) else None


def open_files(
    source: str | Path, image_root: Path | None = None, positions: np.ndarray | None = None
) -> Corpus:
    """Open conversations: `.jsonl`, a `.json` list, an InternVL meta `.json`, `.tar`, or tables.

    Tables are `.parquet` files, by a pattern or in a folder, and folders saved by `datasets`.
    `part-{000..099}.tar` names a range of shards. Warns with a `MmmambaWarning` about members of
    shards that belong to no sample. `positions` are `record_positions` of an earlier corpus of the
    same source.

    Raises:
        DataError: a file is missing, of an unknown kind, or has no sample.
    """
    text = str(source)
    suffix = Path(text).suffix.lower()
    corpus: Corpus
    if suffix == ".jsonl":
        corpus = ConversationFile(Path(text), image_root, positions=positions)
    elif is_table_source(text):
        corpus = TableCorpus(table_files(text), image_root)
    elif suffix == ".tar":
        corpus = ShardedCorpus(expand_shards(text))
    elif suffix == ".json" and is_json_list(Path(text)):
        corpus = ConversationFile(Path(text), image_root, positions=positions)
    elif suffix == ".json":
        corpus = _open_meta(Path(text), image_root)
    else:
        raise DataError(
            f"{text} is of no kind we read, expected .jsonl, .json (a list, or a meta file), .tar, "
            ".parquet or a folder of tables"
        )
    if len(corpus) == 0:
        lines = "one conversation a line" if suffix == ".jsonl" else "one conversation a row"
        expected = {".tar": "a .json member for each", ".json": "a list of conversations"}.get(
            suffix, lines
        )
        raise DataError(f"{text} has no samples", f"expected {expected}")
    if corpus.ignored:
        warnings.warn(
            MmmambaWarning(
                f"{text}: {len(corpus.ignored):,} members belong to no sample "
                f"({name_some(corpus.ignored, 3)})"
            ),
            stacklevel=2,
        )
    return corpus


def _open_meta(file: Path, image_root: Path | None) -> Corpus:
    """Open an InternVL meta file, `{set: {"annotation": file, "root": folder, "repeat_time": n}}`.

    Paths are relative to the working directory, as in InternVL, or else to the folder of the meta
    file; a relative root is joined to `image_root` if given. `weight` multiplies `repeat_time`.
    """
    meta = _read_object(file)
    sets = []
    for name, entry in meta.items():
        where = f"{file}: {name}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("annotation"), str):
            raise DataError(f"{where}: has no annotation, expected the path of a .jsonl file")
        root = entry.get("root")
        for path in (entry["annotation"], root or ""):
            if not isinstance(path, str) or any(
                len(x) > MAX_NAME_CHARACTERS for x in path.split("/")
            ):
                raise DataError(
                    f"{where}: {path!r:.60} is no path", "give annotation and root as paths"
                )
        annotation = Path(entry["annotation"])
        if not annotation.is_absolute() and not annotation.exists():
            annotation = file.parent / annotation
        folder = image_root if root is None else (image_root or Path()) / root
        if folder is not None and not folder.is_absolute() and not folder.is_dir():
            folder = file.parent / folder
        times = _positive(entry.get("repeat_time", 1), f"{where}: repeat_time")
        times *= _positive(entry.get("weight", 1), f"{where}: weight")
        try:
            # Sample names show the path of the meta file: file names of sets are often equal.
            corpus = ConversationFile(annotation, folder, entry["annotation"])
        except DataError as error:
            raise DataError(f"{where}: {error.message}", error.hint) from error
        if len(corpus) == 0:
            raise DataError(f"{where}: {annotation} has no samples", "leave the set out")
        sets.append((name, corpus, times))
    if not sets:
        raise DataError(f"{file} names no sets")
    return MixedCorpus(sets)


def _read_object(file: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist", "check the path") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} is not JSON: {error}", "a file of one conversation a line is called .jsonl"
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{file} is a {type(value).__name__}, expected a list of conversations or a meta file "
            "of several sets"
        )
    if first_present(value, "conversations", "messages") is not None:
        raise DataError(
            f"{file} is one conversation, expected a list of them or a meta file of several sets",
            "put it in [ ]",
        )
    return value


def _positive(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise DataError(f"{where}: is {value!r}, expected a number above 0")
    return float(value)
