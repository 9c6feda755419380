"""Where the data indexes of a source lie, and which of them is of given data and processor.

An index lies beside its data, or, where that folder cannot be written, in the cache folder. Its
name has the name of the source and a digest of its key: `train.jsonl.1f0c2a9d7b3e.index`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers

from mmmamba_cli.data.corpus import Corpus
from mmmamba_cli.data.fingerprint import content_digest
from mmmamba_cli.data.generated_corpus import GeneratedCorpus
from mmmamba_cli.data.sample_index import (
    FORMAT,
    IndexKey,
    IndexSummary,
    SampleIndex,
    read_index,
    read_key,
)
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import TeacherProcessor, TrainingProcessor, processor_digest

SUFFIX = ".index"
DIGEST_CHARACTERS = 12
# Characters of a source that stay in the name of its index; patterns have others.
NOT_IN_NAMES = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class FoundIndex:
    """The index of a source, or None, and why its other indexes are not used."""

    file: Path | None
    stale: tuple[str, ...] = ()


def index_key(
    corpus: Corpus,
    processor: TrainingProcessor | TeacherProcessor,
    max_tiles: int | None = None,
) -> IndexKey:
    """The key of the index of a corpus. Reads its files once.

    Raises:
        DataError: the corpus makes its samples while training, or a file cannot be read.
    """
    if isinstance(corpus, GeneratedCorpus):
        raise DataError(
            f"{corpus.spec.text} makes its samples while training, so it has no data index",
            "name conversations in files",
        )
    own = processor.processor if isinstance(processor, TeacherProcessor) else processor
    return IndexKey(
        content=content_digest(corpus),
        samples=len(corpus),
        processor=processor_digest(own),
        transformers=transformers.__version__,
        max_tiles=max_tiles,
    )


def index_file(source: str, key: IndexKey) -> Path:
    """Where to write the index of a source: beside it, or in the cache folder."""
    beside, cache = _folders(source)
    folder = beside if os.access(beside, os.W_OK) else cache
    return folder / _file_name(source, key)


def find_index(
    source: str,
    corpus: Corpus,
    processor: TrainingProcessor | TeacherProcessor,
    max_tiles: int | None = None,
) -> FoundIndex:
    """Find the index of a source that `open_corpus` opened as `corpus`.

    The files of the corpus are read only if the source has any index.

    Raises:
        DataError: a file of the corpus cannot be read.
    """
    prefix = _prefix(source)
    files = [
        file
        for folder in _folders(source)
        for file in _listed(folder)
        if file.name.startswith(prefix) and file.name.endswith(SUFFIX)
    ]
    if not files or isinstance(corpus, GeneratedCorpus):
        return FoundIndex(None)
    key = index_key(corpus, processor, max_tiles)
    stale = []
    for file in files:
        try:
            difference = _difference(read_key(file), key)
        except DataError as error:
            stale.append(f"{error.message}")
            continue
        if difference is None:
            return FoundIndex(file)
        stale.append(f"{file} is not used: {difference}")
    return FoundIndex(None, tuple(stale))


def index_summary(
    source: str,
    corpus: Corpus,
    processor: TrainingProcessor | TeacherProcessor,
    max_length: int,
    max_tiles: int | None = None,
) -> IndexSummary | None:
    """Totals of a source for a maximum length, None without an index. Errors of `find_index`."""
    file = find_index(source, corpus, processor, max_tiles).file
    return None if file is None else read_index(file).summary(max_length)


def open_index(file: Path, key: IndexKey) -> SampleIndex | None:
    """The index in a file if it is complete and of this key, else None."""
    try:
        index = read_index(file)
    except DataError:
        return None
    return index if index.key == key else None


def _difference(stored: IndexKey, wanted: IndexKey) -> str | None:
    """Why a stored index does not apply; None if it does."""
    if stored.format != wanted.format:
        return f"it has format {stored.format}, expected {FORMAT}"
    if (stored.content, stored.samples) != (wanted.content, wanted.samples):
        return "the data have changed since it was built"
    if stored.processor != wanted.processor:
        return "it was built with another tokenizer, chat template or tiling"
    if stored.max_tiles != wanted.max_tiles:
        return f"it was built with max_tiles {stored.max_tiles}, expected {wanted.max_tiles}"
    if stored.transformers != wanted.transformers:
        return (
            f"it was built with transformers {stored.transformers}, {wanted.transformers} is "
            "installed"
        )
    return None


def _listed(folder: Path) -> list[Path]:
    """The contents of a folder; none if it may not be listed, though its files may be read."""
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError:
        return []


def _prefix(source: str) -> str:
    return NOT_IN_NAMES.sub("_", Path(source).name) + "."


def _file_name(source: str, key: IndexKey) -> str:
    digest = hashlib.sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()
    return f"{_prefix(source)}{digest[:DIGEST_CHARACTERS]}{SUFFIX}"


def _folders(source: str) -> tuple[Path, Path]:
    """The folder of the data, and that of its indexes in the cache folder of the user."""
    beside = Path(os.path.abspath(source)).parent  # noqa: PTH100 - `resolve` would follow links.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # Data of the same name in several folders have different indexes.
    digest = hashlib.sha256(os.fsencode(beside)).hexdigest()[:DIGEST_CHARACTERS]
    return beside, cache / "mmmamba" / "indexes" / digest
