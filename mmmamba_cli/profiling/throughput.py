"""Search for the batch size with the most tokens per second, by doubling.

One model is in memory at a time, because other weights would reduce the largest batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mmmamba_cli.devices import OutOfMemory, translate_out_of_memory
from mmmamba_cli.profiling.benchmark import LoadedDecoders, Plan
from mmmamba_cli.profiling.interfaces import Subject
from mmmamba_cli.profiling.result import (
    MEASURED,
    OUT_OF_MEMORY,
    OVER_BUDGET,
    RooflinePart,
    Status,
    Throughput,
)
from mmmamba_cli.profiling.roofline import roofline_seconds
from mmmamba_cli.profiling.timers import DeviceTimer, time_decode

# A doubling counts as a gain from this relative increase on; the search ends after PATIENCE
# doublings without one.
MIN_GAIN = 0.03
PATIENCE = 2
# Batch sizes tried between one that fits and its double that does not.
BISECTIONS = 2
REPEATS, WARM_UP_TOKENS = 3, 2


def search_batch_size(
    subjects: Sequence[Subject],
    plan: Plan,
    loaded: LoadedDecoders,
    timer: DeviceTimer,
    roofline: RooflinePart | None,
    until: float | None,
) -> list[Throughput]:
    """Every batch size tried at each context of `plan.throughput`, with each subject's best marked.

    `until` is a time of `timer.now()`, None for no limit.
    """
    found: list[Throughput] = []
    for subject in subjects:
        if plan.throughput_subjects and subject.name not in plan.throughput_subjects:
            continue
        loaded.keep_only(subject)
        timer.empty_cache()
        for context in sorted(plan.throughput):
            tried = _BatchSearch(subject, context, plan, loaded, timer, roofline, until).run()
            # `max` returns the first of equals: the smallest batch.
            best = max(tried, key=lambda one: one.rate or 0.0)
            found += [
                one.model_copy(update={"best": one is best and one.rate is not None})
                for one in tried
            ]
    return found


@dataclass
class _BatchSearch:
    subject: Subject
    context: int
    plan: Plan
    loaded: LoadedDecoders
    timer: DeviceTimer
    roofline: RooflinePart | None
    until: float | None
    tried: list[Throughput] = field(default_factory=list)

    def run(self) -> list[Throughput]:
        batch, best, idle = 1, 0.0, 0
        while batch <= self.plan.largest_batch and idle < PATIENCE:
            one = self._try(batch)
            if one.status == OUT_OF_MEMORY:
                self._between(batch // 2, batch)
                break
            if one.rate is None:
                break
            idle = idle + 1 if one.rate < (1 + MIN_GAIN) * best else 0
            best = max(best, one.rate)
            batch *= 2
        return self.tried

    def _between(self, fits: int, refused: int) -> None:
        """Bisect between the largest batch that fits and one that does not."""
        for _ in range(BISECTIONS):
            batch = (fits + refused) // 2
            if batch in (fits, refused):
                return
            one = self._try(batch)
            if one.status == OVER_BUDGET:
                return
            if one.status == MEASURED:
                fits = batch
            else:
                refused = batch

    def _try(self, batch: int) -> Throughput:
        if self.until is not None and self.timer.now() > self.until:
            self.tried.append(self._not_measured(batch, OVER_BUDGET))
            return self.tried[-1]
        try:
            found = translate_out_of_memory(lambda: self._measure(batch))
        except OutOfMemory as error:
            found = self._not_measured(batch, OUT_OF_MEMORY, str(error))
            if self.subject.name in self.loaded.decoders:
                self.loaded.decoders[self.subject.name].release()
        self.timer.empty_cache()
        self.tried.append(found)
        return found

    def _not_measured(self, batch: int, status: Status, note: str = "") -> Throughput:
        return Throughput(
            subject=self.subject.name, context=self.context, batch=batch, status=status, note=note
        )

    def _measure(self, batch: int) -> Throughput:
        decoder = self.loaded.get(self.subject)
        seconds, memory = time_decode(
            decoder,
            self.timer,
            batch=batch,
            context=self.context,
            warm_up=WARM_UP_TOKENS,
            repeats=REPEATS,
            burst=self.plan.burst,
            rng=torch.Generator().manual_seed(self.plan.seed),
            apart=True,
        )
        cost = decoder.cost(batch, self.context, False)
        return Throughput(
            subject=self.subject.name,
            context=self.context,
            batch=batch,
            status=MEASURED,
            seconds=statistics.median(seconds),
            floor=None if self.roofline is None else roofline_seconds(cost, self.roofline),
            peak=memory.peak,
        )
