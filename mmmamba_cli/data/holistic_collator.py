"""Micro batches from encoded samples: rows, their assignment to processes, and padding.

Legend: B rows, T columns of a micro batch.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from mmmamba_cli.data.batch import IGNORE_INDEX, BadSample, Batch, bad_sample
from mmmamba_cli.data.generated_corpus import Drawings, SampleGenerator
from mmmamba_cli.data.sample import Sample
from mmmamba_cli.data.sample_encoder import EncodedSample, SampleEncoder, decode_images
from mmmamba_cli.data.sample_size import SampleSize
from mmmamba_cli.errors import DataError
from mmmamba_cli.ops.attention import varlen_metadata
from mmmamba_cli.processing import ImageProcessor, TrainingProcessor

SizedT = TypeVar("SizedT", bound=Sized)
Row = list[EncodedSample]


@dataclass(frozen=True)
class ColumnLimit:
    """As few micro batches in a step as leave at most `columns` columns in each of them.

    Columns are those of all its rows with padding. A longer row is a micro batch alone. The number
    of micro batches follows from the lengths of the rows of the global batch and from the number of
    processes: it is the same for all processes, and may differ from step to step.
    """

    columns: int


# Micro batches of a step on each process: their number, or a limit of their size.
Accumulation = int | ColumnLimit


def make_rows(samples: Sequence[SizedT], batching: str, max_length: int) -> list[list[SizedT]]:
    """Make the rows of a global batch, independent of the number of processes.

    `padded`: one sample per row, in order; `bucketed`: one sample per row, longest first; `packed`:
    first-fit-decreasing packing into rows of `max_length` tokens.
    """
    if batching == "padded":
        return [[sample] for sample in samples]
    by_length = sorted(samples, key=len, reverse=True)
    if batching == "bucketed":
        return [[sample] for sample in by_length]
    rows: list[list[SizedT]] = []
    room: list[int] = []
    for sample in by_length:
        fitting = (i for i, free in enumerate(room) if free >= len(sample))
        row = next(fitting, None)
        if row is None:
            rows.append([sample])
            room.append(max_length - len(sample))
        else:
            rows[row].append(sample)
            room[row] -= len(sample)
    return rows


def assign_rows(
    rows: Sequence[list[SizedT]], rank: int, world_size: int, accumulation: Accumulation
) -> list[list[list[SizedT]]]:
    """Assign contiguous rows to the micro batches of process `rank`.

    Minimises the largest micro batch, counted in tokens with padding: it bounds the time of a step
    and the peak memory. If there are fewer rows than micro batches, the last ones are empty.
    """
    parts = world_size * count_micro_batches(rows, world_size, accumulation)
    lengths = [_row_length(row) for row in rows]
    fits, largest = max(lengths, default=0), len(rows) * max(lengths, default=0)
    if isinstance(accumulation, ColumnLimit):
        # A row above the limit is alone, and the other micro batches are as small as can be.
        fits, largest = 1, min(largest, accumulation.columns)
    while fits < largest:
        middle = (fits + largest) // 2
        if len(_ends(lengths, parts, middle)) <= parts:
            largest = middle
        else:
            fits = middle + 1
    ends = _ends(lengths, parts, largest)
    ends += [len(rows)] * (parts - len(ends))
    cut = [list(rows[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    return cut[rank::world_size]


def count_micro_batches(
    rows: Sequence[Sequence[Sized]], world_size: int, accumulation: Accumulation
) -> int:
    """The number of micro batches of each process for the rows of a global batch."""
    if isinstance(accumulation, int):
        return accumulation
    # Greedy parts are the fewest, because a part never has more columns than one that includes it.
    parts = len(_ends([_row_length(row) for row in rows], 1, accumulation.columns))
    return -(-parts // world_size)


def _ends(lengths: Sequence[int], parts: int, limit: int) -> list[int]:
    """End indices of greedy parts of at most `limit` tokens with padding each.

    A longer row is a part alone. Each part leaves at least one row for every later part, so that no
    part is empty needlessly.
    """
    ends: list[int] = []
    start = longest = 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        full = longest * (row - start + 1) > limit
        needed = len(lengths) - row < parts - len(ends)
        if row > start and (full or needed):
            ends.append(row)
            start, longest = row, length
    return [*ends, len(lengths)]


class HolisticCollator:
    """Encodes samples for a `HolisticVLM`, and makes micro batches of them.

    `generator` is that of a corpus whose pictures are drawn later.
    """

    def __init__(
        self,
        processor: TrainingProcessor,
        max_length: int,
        max_tiles: int | None = None,
        generator: SampleGenerator | None = None,
    ):
        self._encoder = SampleEncoder(processor, max_length, max_tiles)
        self.max_length = max_length
        self._generator = generator

    def encode(self, sample: Sample) -> EncodedSample:
        """Encode a sample. Raises `DataError` that names it."""
        return self._encoder(sample)

    def measure(self, sample: Sample) -> SampleSize:
        """Sizes of a sample before truncation. Raises `DataError` that names it."""
        return self._encoder.measure(sample)

    def decode(self, sample: EncodedSample) -> None:
        """Decode the pictures of a sample, or draw them on the CPU.

        Raises:
            DataError: a picture cannot be decoded, or the corpus draws another shape.
        """
        images = self._encoder.images
        decode_images(sample, images)
        if self._generator is None or images is None or not sample.drawings:
            return
        drawings = _stack_drawings([[sample]], images, self._generator)
        assert drawings is not None
        replace(drawings, to_pixels=self._generator.to_pixels).draw(torch.device("cpu"))

    def collate(self, rows: Sequence[Row]) -> tuple[Batch, list[BadSample]]:
        """One micro batch, without the samples whose pictures cannot be decoded."""
        pad_id = self._encoder.processor.pad_token_id
        return collate(rows, self._encoder.images, pad_id, self._generator)


def collate(
    rows: Sequence[Row],
    images: ImageProcessor | None,
    pad_id: int,
    generator: SampleGenerator | None = None,
) -> tuple[Batch, list[BadSample]]:
    """Pad rows into a micro batch, without the samples whose pictures cannot be decoded.

    `generator` stacks the layouts of pictures that are drawn later.
    """
    bad: list[BadSample] = []
    kept: list[Row] = []
    pixels: list[Tensor] = []
    for row in rows:
        good: Row = []
        for sample in row:
            try:
                pixels += decode_images(sample, images)
                good.append(sample)
            except DataError as error:
                bad.append(bad_sample(error, sample.name, seen_by_all=False))
        if good:
            kept.append(good)
    batch = _pad_rows(kept, pixels, pad_id) if kept else empty_batch(pad_id)
    if generator is not None and images is not None:
        batch = replace(batch, drawings=_stack_drawings(kept, images, generator))
    return batch, bad


def _stack_drawings(
    rows: Sequence[Row], images: ImageProcessor, generator: SampleGenerator
) -> Drawings | None:
    """The pictures of rows in order; None without pictures."""
    samples = [sample for row in rows for sample in row]
    drawings = [drawing for sample in samples for drawing in sample.drawings]
    if not drawings:
        return None
    num_tiles = sum(sum(sample.num_tiles) for sample in samples)
    return Drawings(generator.stack(drawings, images.tiling), num_tiles, images.image_size)


def empty_batch(pad_id: int) -> Batch:
    """One padding token, for a process without rows, which takes part in collectives."""
    mask = torch.zeros(1, 1, dtype=torch.bool)
    return Batch(
        input_ids=torch.full((1, 1), pad_id),
        labels=torch.full((1, 1), IGNORE_INDEX),
        attention_mask=mask,
        seq_idx=None,
        pixel_values=None,
        num_samples=0,
        num_tokens=0,
        varlen=varlen_metadata(mask, None),
    )


def _pad_rows(rows: list[Row], pixels: list[Tensor], pad_id: int) -> Batch:
    lengths = [_row_length(row) for row in rows]
    shape = (len(rows), max(lengths))
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE_INDEX)
    numbers, real = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for r, row in enumerate(rows):
        column = 0
        for number, sample in enumerate(row):
            place = slice(column, column + len(sample))
            ids = torch.tensor(sample.ids)
            input_ids[r, place] = ids
            labels[r, place] = ids.masked_fill(~torch.tensor(sample.is_answer), IGNORE_INDEX)
            numbers[r, place], real[r, place] = number, True
            column = place.stop
    mask = None if bool(real.all()) else real
    seq_idx = numbers if any(len(row) > 1 for row in rows) else None
    return Batch(
        input_ids=input_ids,
        labels=labels,
        attention_mask=mask,
        seq_idx=seq_idx,
        pixel_values=torch.cat(pixels) if pixels else None,
        num_samples=sum(map(len, rows)),
        num_tokens=sum(lengths),
        names=tuple(sample.name for row in rows for sample in row),
        varlen=None if mask is None and seq_idx is None else varlen_metadata(mask, seq_idx),
    )


def _row_length(row: Sequence[Sized]) -> int:
    return sum(len(sample) for sample in row)
