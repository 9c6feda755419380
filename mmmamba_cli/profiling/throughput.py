"""The most tokens a second: batches doubled until memory ends, or nothing is gained any more.

One model is in memory at a time, since what the others hold would take its rows away.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mmmamba_cli.profiling.benchmark import Loaded, Plan
from mmmamba_cli.profiling.interfaces import OutOfMemory, Subject
from mmmamba_cli.profiling.result import (
    MEASURED,
    OUT_OF_MEMORY,
    OVER_BUDGET,
    CeilingsPart,
    Status,
    Throughput,
)
from mmmamba_cli.profiling.roofline import floor_of
from mmmamba_cli.profiling.timed_repeat import decode_turn
from mmmamba_cli.profiling.timers import Instruments, or_out_of_memory

# A doubling that gives less than this share more has gained nothing; after two, no other is tried.
GAIN = 0.03
PATIENCE = 2
# Batches tried between one that fits and its double that does not.
BISECTIONS = 2
REPEATS, WARM_UP = 3, 2


def search(
    subjects: Sequence[Subject],
    plan: Plan,
    loaded: Loaded,
    meter: Instruments,
    ceilings: CeilingsPart | None,
    until: float | None,
) -> list[Throughput]:
    """Every batch that was tried, at each context of `plan.throughput`; each subject's best is so
    marked. `until` is on the clock of `meter`, None for as long as it takes.
    """
    found: list[Throughput] = []
    for subject in subjects:
        if plan.throughput_of and subject.name not in plan.throughput_of:
            continue
        loaded.keep_only(subject)
        meter.clean()
        for context in sorted(plan.throughput):
            tried = _Search(subject, context, plan, loaded, meter, ceilings, until).run()
            # Of equals the first, which is the smallest.
            best = max(tried, key=lambda one: one.rate or 0.0)
            found += [
                one.model_copy(update={"best": one is best and one.rate is not None})
                for one in tried
            ]
    return found


@dataclass
class _Search:
    subject: Subject
    context: int
    plan: Plan
    loaded: Loaded
    meter: Instruments
    ceilings: CeilingsPart | None
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
            idle = idle + 1 if one.rate < (1 + GAIN) * best else 0
            best = max(best, one.rate)
            batch *= 2
        return self.tried

    def _between(self, fits: int, refused: int) -> None:
        """Halve the gap a few times: a whole double of what fits may be far from what would."""
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
        if self.until is not None and self.meter.now() > self.until:
            self.tried.append(self._none(batch, OVER_BUDGET))
            return self.tried[-1]
        try:
            found = or_out_of_memory(lambda: self._measure(batch))
        except OutOfMemory as error:
            found = self._none(batch, OUT_OF_MEMORY, str(error))
            if self.subject.name in self.loaded.decoders:
                self.loaded.decoders[self.subject.name].stop()
        self.meter.clean()
        self.tried.append(found)
        return found

    def _none(self, batch: int, status: Status, note: str = "") -> Throughput:
        return Throughput(
            subject=self.subject.name, context=self.context, batch=batch, status=status, note=note
        )

    def _measure(self, batch: int) -> Throughput:
        decoder = self.loaded.get(self.subject)
        seconds, memory = decode_turn(
            decoder,
            self.meter,
            batch=batch,
            context=self.context,
            warm_up=WARM_UP,
            repeats=REPEATS,
            burst=self.plan.burst,
            rng=torch.Generator().manual_seed(self.plan.seed),
            apart=True,
        )
        need = decoder.cost(batch, self.context, False)
        return Throughput(
            subject=self.subject.name,
            context=self.context,
            batch=batch,
            status=MEASURED,
            seconds=statistics.median(seconds),
            floor=None if self.ceilings is None else floor_of(need, self.ceilings),
            peak=memory.peak,
        )
