"""What a GPU tells besides time: memory of a model that has it to itself, launches, energy.

Each is read in turns of its own, so that the timed ones are not disturbed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from mmmamba_cli.profiling.benchmark import Loaded, Plan
from mmmamba_cli.profiling.interfaces import EAGER, Decoder, OutOfMemory, Subject
from mmmamba_cli.profiling.result import DECODE, Energy, Launches, Measurement, Memory
from mmmamba_cli.profiling.timed_repeat import decode_turn
from mmmamba_cli.profiling.timers import Instruments, or_out_of_memory

WARM_UP = 2
# Tokens behind one another whose kernels are summed.
PROFILED = 3
# Counters of energy move in steps of some tens of milliseconds: a second makes these small.
ENERGY_SECONDS = 1.0


def memory_apart(
    subject: Subject, plan: Plan, loaded: Loaded, meter: Instruments
) -> dict[int, Memory]:
    """Of decoding at each context, no other model being in memory; without those that do not fit.

    Nothing where the device does not tell its peak.
    """
    if meter.peak() is None:
        return {}
    loaded.keep_only(subject)
    meter.clean()
    found: dict[int, Memory] = {}
    for context in sorted(plan.contexts):
        rng = torch.Generator().manual_seed(plan.seed)

        def work(context: int = context, rng: torch.Generator = rng) -> Memory:
            _, memory = decode_turn(
                loaded.get(subject),
                meter,
                batch=plan.batch,
                context=context,
                warm_up=WARM_UP,
                repeats=1,
                burst=1,
                rng=rng,
                apart=True,
            )
            return memory

        try:
            found[context] = or_out_of_memory(work)
        except OutOfMemory:
            # `measure` finds it again, and says it.
            loaded.get(subject).stop()
            meter.clean()
            break
        meter.clean()
    return found


def launches(
    subjects: Sequence[Subject],
    measured: Sequence[Measurement],
    plan: Plan,
    loaded: Loaded,
    meter: Instruments,
) -> list[Launches]:
    """The host's share of a token, of eager subjects at their shortest and longest context."""
    found = []
    for subject, ends in _measured_at(subjects, measured):
        if subject.about.way != EAGER:
            continue
        for context, one in {ends[0].context: ends[0], ends[-1].context: ends[-1]}.items():
            assert one.median is not None

            def work(subject: Subject = subject, context: int = context) -> float | None:
                decoder = _ready(subject, context, PROFILED, plan, loaded)
                seconds = meter.kernel_seconds(lambda: decoder.tokens(PROFILED))
                decoder.stop()
                return seconds

            try:
                seconds = or_out_of_memory(work)
            except OutOfMemory:
                loaded.get(subject).stop()
                meter.clean()
                continue
            if seconds is not None:
                kernels = seconds / PROFILED
                found.append(
                    Launches(
                        subject=subject.name, context=context, kernels=kernels, wall=one.median
                    )
                )
    return found


def energy(
    subjects: Sequence[Subject],
    measured: Sequence[Measurement],
    plan: Plan,
    loaded: Loaded,
    meter: Instruments,
) -> list[Energy]:
    """Of a token: at the first context of `plan.throughput`, else at the longest measured."""
    found: list[Energy] = []
    if meter.joules() is None:
        return found
    for subject, rows in _measured_at(subjects, measured):
        asked = [row for row in rows if row.context in plan.throughput[:1]]
        row = asked[0] if asked else rows[-1]
        assert row.median is not None
        count = max(WARM_UP, math.ceil(ENERGY_SECONDS / row.median))

        def work(
            subject: Subject = subject, context: int = row.context, count: int = count
        ) -> Energy:
            decoder = _ready(subject, context, count, plan, loaded)
            begin, before = meter.now(), meter.joules()
            decoder.tokens(count)
            end, after = meter.now(), meter.joules()
            decoder.stop()
            assert before is not None and after is not None
            return Energy(
                subject=subject.name,
                context=context,
                tokens=count * plan.batch,
                joules=after - before,
                seconds=end - begin,
            )

        try:
            found.append(or_out_of_memory(work))
        except OutOfMemory:
            loaded.get(subject).stop()
            meter.clean()
    return found


def _ready(subject: Subject, context: int, tokens: int, plan: Plan, loaded: Loaded) -> Decoder:
    """A warm decoder behind `context` columns, with room for so many tokens."""
    decoder = loaded.get(subject)
    decoder.start(plan.batch, context + WARM_UP + tokens)
    decoder.fill(plan.batch, context, torch.Generator().manual_seed(plan.seed))
    decoder.tokens(WARM_UP)
    return decoder


def _measured_at(
    subjects: Sequence[Subject], measured: Sequence[Measurement]
) -> Iterable[tuple[Subject, list[Measurement]]]:
    """Subjects of which decoding was measured, with that, shortest context first."""
    for subject in subjects:
        rows = [
            one
            for one in measured
            if (one.subject, one.task) == (subject.name, DECODE) and one.median is not None
        ]
        if rows:
            yield subject, sorted(rows, key=lambda one: one.context)
