"""Building a data index: one pass over a corpus, in several processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np

from mmmamba_cli.data.batch import bad_sample
from mmmamba_cli.data.collator import Collator, make_collator
from mmmamba_cli.data.corpus import Corpus
from mmmamba_cli.data.dataset import record_positions
from mmmamba_cli.data.fingerprint import content_digest
from mmmamba_cli.data.parallel_map import map_in_workers
from mmmamba_cli.data.sample_index import POSITIONS, SIZES, IndexKey, SampleIndex
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import TeacherProcessor, TrainingProcessor

# Samples that a worker measures at a time: enough to outweigh the transfer of the result.
CHUNK_SAMPLES = 1024
# For the collator of an index, which does not truncate.
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class _Chunk:
    """Sizes (n, 4) uint32 of neighbouring samples, in the order of `SIZES`, and the bad ones."""

    sizes: np.ndarray
    bad: tuple[tuple[int, str], ...]


def build_index(
    corpus: Corpus,
    processor: TrainingProcessor | TeacherProcessor,
    key: IndexKey,
    *,
    workers: int = 0,
    advance: Callable[[int], None] | None = None,
) -> SampleIndex:
    """Measure every sample of a corpus.

    Pictures are not decoded, only their headers are read; videos are decoded, because their headers
    do not tell which frames a processor samples. `key` is `index_key` of the arguments. `workers`
    processes measure; 0 measures in this one. `advance` is called with numbers of samples.

    Raises:
        DataError: the data have changed meanwhile.
    """
    collator = make_collator(corpus, processor, NO_LIMIT, key.max_tiles)
    with suppress(DataError):
        # What a processor finds out about itself at its first sample is then known to all workers.
        collator.measure(corpus[0])
    sizes = np.zeros((len(SIZES), len(corpus)), dtype=np.uint32)
    bad: list[tuple[int, str]] = []
    starts = range(0, len(corpus), CHUNK_SAMPLES)
    measure = partial(_measure_chunk, corpus, collator)
    for start, chunk in zip(starts, map_in_workers(measure, starts, workers), strict=True):
        sizes[:, start : start + len(chunk.sizes)] = chunk.sizes.T
        bad += chunk.bad
        if advance is not None:
            advance(len(chunk.sizes))
    if content_digest(corpus) != key.content:
        raise DataError(
            f"{corpus.files[0].path} or its pictures changed while the index was built",
            "build it again once they do not change any more",
        )
    # Names of pictures may have lone surrogates.
    reasons = [reason.encode("utf-8", "surrogatepass") for _, reason in bad]
    tensors = dict(zip(SIZES, sizes, strict=True)) | {
        "bad_samples": np.array([sample for sample, _ in bad], dtype=np.int64),
        "bad_ends": np.array(list(accumulate(map(len, reasons))), dtype=np.int64),
        "bad_text": np.frombuffer(b"".join(reasons), dtype=np.uint8),
    }
    positions = record_positions(corpus)
    return SampleIndex(key, tensors if positions is None else tensors | {POSITIONS: positions})


def _measure_chunk(corpus: Corpus, collator: Collator, start: int) -> _Chunk:
    stop = min(start + CHUNK_SAMPLES, len(corpus))
    sizes = np.zeros((stop - start, len(SIZES)), dtype=np.uint32)
    bad = []
    for sample in range(start, stop):
        try:
            size = collator.measure(corpus[sample])
        except DataError as error:
            bad.append((sample, bad_sample(error, corpus.name(sample)).reason))
        else:
            sizes[sample - start] = (size.tokens, size.required, size.images, size.tiles)
    return _Chunk(sizes, tuple(bad))
