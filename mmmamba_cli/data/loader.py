"""The batches of each optimiser step, a pure function of seed and step.

Every process plans the whole global batch from lengths. With a `SampleIndex` it reads them there,
and encodes only its own rows; without one it encodes the texts and reads the image headers of the
whole batch. In both cases it decodes only the pictures of its own rows, and the batches are equal.
The loader has no state to save: a run resumes at any step, with any number of processes or workers,
because the order of samples is a pure function of the seed and the position in the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmmamba_cli.data.batch import BadSample, StepBatches, bad_sample
from mmmamba_cli.data.collator import Encoded, make_collator
from mmmamba_cli.data.corpus import Corpus, CorpusPart
from mmmamba_cli.data.generated_corpus import ENDLESS, GeneratedCorpus
from mmmamba_cli.data.holistic_collator import (
    Accumulation,
    assign_rows,
    count_micro_batches,
    make_rows,
)
from mmmamba_cli.data.parallel_map import map_in_workers
from mmmamba_cli.data.sample_index import SampleIndex
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import TeacherProcessor, TrainingProcessor


class SampleOrder:
    """An endless stream of passes over the parts, each shuffled by (seed, pass) or in file order.

    With `repeats` 2.5, each pass takes every sample of a part twice, and a random half of them once
    more. All passes have the same length.
    """

    def __init__(self, parts: Sequence[CorpusPart], seed: int, shuffle: bool):
        self._parts = tuple(parts)
        self._seed = seed
        self._shuffle = shuffle
        self.length = sum(self._whole(part) + self._extra(part) for part in parts)
        self._drawn: dict[int, np.ndarray] = {}

    def __getitem__(self, number: int) -> int:
        """Index in the corpus of sample `number` of the stream."""
        count, place = divmod(number, self.length)
        if count not in self._drawn:
            # A batch may span two passes; older permutations are not needed again.
            self._drawn = {n: p for n, p in self._drawn.items() if n == count - 1}
            self._drawn[count] = self._draw(count)
        return int(self._drawn[count][place])

    @staticmethod
    def _whole(part: CorpusPart) -> int:
        return int(part.repeats) * part.samples

    @staticmethod
    def _extra(part: CorpusPart) -> int:
        share = part.repeats - int(part.repeats)
        extra = round(share * part.samples)
        # A share of a small part rounds to at least one sample, unless the part is empty.
        return min(max(extra, 1), part.samples) if part.repeats < 1 else extra

    def _draw(self, number: int) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64([self._seed, number]))
        chosen, first = [], 0
        for part in self._parts:
            own = np.arange(first, first + part.samples)
            chosen += [own] * int(part.repeats)
            chosen.append(np.sort(rng.permutation(own)[: self._extra(part)]))
            first += part.samples
        stream = np.concatenate(chosen)
        return rng.permutation(stream) if self._shuffle else stream


class EndlessOrder:
    """The order of an endless corpus, whose samples are random already: 0, 1, 2, ..."""

    length = ENDLESS

    def __getitem__(self, number: int) -> int:
        return number


@dataclass(frozen=True)
class PlannedSample:
    """Sample `index` of the corpus, not read yet; its length, in tokens, is that of the index."""

    index: int
    length: int

    def __len__(self) -> int:
        return self.length


Planned = PlannedSample | Encoded


def can_be_packed(processor: TrainingProcessor | TeacherProcessor) -> bool:
    """Whether rows of the processor's model may hold several samples (`data.batching: packed`)."""
    return not isinstance(processor, TeacherProcessor) or processor.packs_rows


class StepLoader:
    """Batches for one process of `world_size`.

    With a `TeacherProcessor` micro batches are `ModelBatch`es, else `Batch`es.

    A global batch has `batch_size` samples; each process gets its share in as many micro batches as
    `accumulation` says, a number or a `ColumnLimit`. `workers` is the number of worker processes
    that prepare steps ahead; 0 prepares each step on demand, with the same batches. `pin_memory` is
    for batches that go to a GPU. With `single_pass` the stream ends after one pass over the corpus,
    and the last step holds the remaining samples. `index` is that of the corpus for the same
    processor and `max_tiles`: each process then encodes only its share of a batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        processor: TrainingProcessor | TeacherProcessor,
        *,
        batch_size: int,
        accumulation: Accumulation = 1,
        max_length: int,
        batching: str = "bucketed",
        shuffle: bool = True,
        seed: int = 0,
        max_tiles: int | None = None,
        workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
        single_pass: bool = False,
        index: SampleIndex | None = None,
    ):
        self.corpus = corpus
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.batching = batching
        self.workers = workers
        self.pin_memory = pin_memory
        self.rank = rank
        self.world_size = world_size
        generated = corpus if isinstance(corpus, GeneratedCorpus) else None
        self._generator = None if generated is None else generated.generator
        if batching == "packed" and not can_be_packed(processor):
            raise DataError(
                "data.batching is packed, and rows of this model hold one conversation each",
                "set data.batching to bucketed or padded",
            )
        self._collator = make_collator(corpus, processor, max_length, max_tiles)
        self._order: SampleOrder | EndlessOrder = (
            EndlessOrder()
            if generated is not None and generated.endless
            else SampleOrder(corpus.parts, seed, shuffle)
        )
        self._index = index
        self._end = self._order.length if single_pass else None

    @property
    def steps_per_pass(self) -> int:
        """Steps of one pass over the corpus; the last one may include samples of the next pass."""
        return -(-self._order.length // self.batch_size)

    def unreadable(self) -> list[BadSample] | None:
        """All samples of a pass if none of them can be read; None once one is readable."""
        bad = []
        for number in range(self._order.length):
            index = self._order[number]
            try:
                self._collator.decode(self._collator.encode(self.corpus[index]))
            except DataError as error:
                bad.append(bad_sample(error, self.corpus.name(index)))
            else:
                return None
        return bad

    def steps(self, first: int, stop: int) -> Iterator[StepBatches]:
        """Yield the batches of steps `first` to `stop` - 1; bad samples are left out and listed."""
        steps = range(first, stop)
        for batches in map_in_workers(self.prepare, steps, self.workers, self.pin_memory):
            yield self._with_pictures(batches)

    def step(self, step: int) -> StepBatches:
        """The batches of one step."""
        return self._with_pictures(self.prepare(step))

    def _with_pictures(self, batches: StepBatches) -> StepBatches:
        return batches if self._generator is None else batches.drawn_by(self._generator.to_pixels)

    def prepare(self, step: int) -> StepBatches:
        """The batches of one step as a loader process makes them: pictures cannot be drawn yet."""
        rows, bad = self._rows(step)
        micro = []
        for part in assign_rows(rows, self.rank, self.world_size, self.accumulation):
            batch, unusable = self._collate(part)
            micro.append(batch)
            bad += unusable
        return StepBatches(step, tuple(micro), tuple(bad), len(self._numbers(step)))

    def count_micro_batches(self, step: int) -> int:
        """The number of micro batches of each process in a step; it reads the step's texts."""
        return count_micro_batches(self._rows(step)[0], self.world_size, self.accumulation)

    def _rows(self, step: int) -> tuple[list[list[Planned]], list[BadSample]]:
        """The rows of the global batch of a step, and samples that all processes find to be bad."""
        planned, bad = self._plan(step)
        return make_rows(planned, self.batching, self._collator.max_length), bad

    def _numbers(self, step: int) -> range:
        """Positions of a step's samples in the stream."""
        stop = (step + 1) * self.batch_size
        return range(step * self.batch_size, stop if self._end is None else min(stop, self._end))

    def _plan(self, step: int) -> tuple[Sequence[Planned], list[BadSample]]:
        """Samples of the global batch with their lengths, and those with bad texts or headers."""
        planned, bad = [], []
        for number in self._numbers(step):
            sample = self._order[number]
            try:
                planned.append(self._planned(sample))
            except DataError as error:
                bad.append(bad_sample(error, self.corpus.name(sample)))
        return planned, bad

    def _planned(self, sample: int) -> Planned:
        """Sample number `sample` of the corpus: its length from the index, or encoded."""
        if self._index is None:
            return self._collator.encode(self.corpus[sample])
        return PlannedSample(sample, self._index.length(sample, self._collator.max_length))

    def _collate(self, rows: Sequence[list[Planned]]) -> tuple[Any, list[BadSample]]:
        """The micro batch of planned rows, and samples that only this process finds to be bad."""
        bad: list[BadSample] = []
        encoded: list[list[Encoded]] = []
        for row in rows:
            good = []
            for sample in row:
                try:
                    good.append(self._encoded(sample))
                except DataError as error:
                    assert isinstance(sample, PlannedSample)
                    name = self.corpus.name(sample.index)
                    bad.append(bad_sample(error, name, seen_by_all=False))
            if good:
                encoded.append(good)
        batch, undecodable = self._collator.collate(encoded)
        return batch, bad + undecodable

    def _encoded(self, sample: Planned) -> Encoded:
        """Raises `DataError` for a picture that is no longer as it was when it was indexed."""
        if not isinstance(sample, PlannedSample):
            return sample
        encoded: Encoded = self._collator.encode(self.corpus[sample.index])
        if len(encoded) != len(sample):
            raise DataError(
                f"has {len(encoded)} tokens, and {len(sample)} in the data index: its pictures "
                "have changed since; build the index again with `mmmamba data index --overwrite`"
            )
        return encoded
