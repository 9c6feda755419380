"""Digests of training data, which detect changed data when a run resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmmamba_cli.data.corpus import Corpus
from mmmamba_cli.data.generated_corpus import GeneratedCorpus
from mmmamba_cli.errors import DataError

# JSON files are hashed in full, since opening them reads every byte anyway. Of a larger shard or
# table, the size and this many evenly spaced blocks are hashed.
JSON_SUFFIXES = (".json", ".jsonl")
MAX_WHOLE_FILE_BYTES = 64 << 20
BLOCK_BYTES = 64 << 10
NUM_BLOCKS = 256
# Pictures of this many evenly spaced samples are covered: their contents in every `READ_EVERY`-th
# of these samples, and their sizes in the others.
NUM_SAMPLES = 1024
READ_EVERY = 16


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 digests of a set of conversations, in hexadecimal.

    `conversations` covers every byte of `.jsonl` and `.json` files, and the size and 256 blocks of
    64 KiB of each larger shard or table. `pictures` covers picture files of 1,024 evenly spaced
    samples: all of their sizes, and the contents for every 16th of these samples, or for all where
    there are at most 64 samples. Paths and times are not covered, so data may be moved. Of a
    generated corpus, both cover its spec, its version and what else it names as its identity.
    """

    conversations: str
    pictures: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def fingerprint(corpus: Corpus) -> Fingerprint:
    """Compute the digests.

    Raises:
        DataError: a file of the corpus cannot be read, or has changed since it was opened.
    """
    if isinstance(corpus, GeneratedCorpus):
        digest = hashlib.sha256(corpus.identity.encode()).hexdigest()
        return Fingerprint(digest, digest)
    return Fingerprint(_digest_files(corpus), _digest_pictures(corpus))


def content_digest(corpus: Corpus) -> str:
    """One digest of what `fingerprint` covers, without the repeats of the sets of a mixture.

    Raises:
        DataError: a file of the corpus cannot be read, or has changed since it was opened.
    """
    digest = hashlib.sha256(f"samples {len(corpus)}\n".encode())
    _hash_files(digest, corpus)
    digest.update(_digest_pictures(corpus).encode())
    return digest.hexdigest()


def _digest_files(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    for part in corpus.parts:
        digest.update(f"part {part.samples} {part.repeats!r}\n".encode())
    _hash_files(digest, corpus)
    return digest.hexdigest()


def _hash_files(digest: Any, corpus: Corpus) -> None:
    for file in corpus.files:
        try:
            digest.update(f"file {file.size}\n".encode())
            for block in _blocks(file.path, file.size):
                digest.update(block)
            # The samples were found in the file that was opened, not in the one that replaced it.
            file.check_unchanged()
        except OSError as error:
            raise DataError(f"{file.path} cannot be read: {error.strerror or error}") from error


def _blocks(file: Path, size: int) -> Iterator[bytes]:
    """The contents of a file, or evenly spaced blocks of a large one, including both ends."""
    with file.open("rb") as handle:
        if file.suffix.lower() in JSON_SUFFIXES or size <= MAX_WHOLE_FILE_BYTES:
            while block := handle.read(1 << 20):
                yield block
            return
        for number in range(NUM_BLOCKS):
            handle.seek((size - BLOCK_BYTES) * number // (NUM_BLOCKS - 1))
            yield handle.read(BLOCK_BYTES)


def _digest_pictures(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    count = min(len(corpus), NUM_SAMPLES)
    every = READ_EVERY if count > NUM_SAMPLES // READ_EVERY else 1
    for number in range(count):
        try:
            images: Sequence[object] = corpus[number * len(corpus) // count].images
        except DataError:
            # The digest of conversations covers the line itself.
            continue
        for image in images:
            # The digest of conversations covers pictures inside shards and tables.
            if isinstance(image, Path):
                digest.update(_digest_picture(image, with_contents=number % every == 0))
    return digest.hexdigest()


def _digest_picture(file: Path, with_contents: bool) -> bytes:
    try:
        size = file.stat().st_size
        content = hashlib.sha256(file.read_bytes()).hexdigest() if with_contents else ""
    except OSError:
        return b"unreadable\n"
    return f"{size} {content}\n".encode()
