"""GPU metrics besides time: memory of one model alone, launch overhead, energy.

Each is measured in repeats of its own, so that the timed ones are not disturbed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from mmmamba_cli.devices import OutOfMemory, translate_out_of_memory
from mmmamba_cli.profiling.benchmark import LoadedDecoders, Plan
from mmmamba_cli.profiling.interfaces import GENERATOR, Decoder, Subject
from mmmamba_cli.profiling.result import DECODE, Energy, Launches, Measurement, Memory
from mmmamba_cli.profiling.timers import DeviceTimer, time_decode

WARM_UP_TOKENS = 2
# Consecutive tokens whose kernel times are summed.
PROFILED_TOKENS = 3
# The energy counter advances in steps of tens of milliseconds, which is little of one second.
MIN_ENERGY_SECONDS = 1.0


def isolated_memory(
    subject: Subject, plan: Plan, loaded: LoadedDecoders, timer: DeviceTimer
) -> dict[int, Memory]:
    """Memory of decoding by context with no other model loaded, up to the first that does not fit.

    Empty if the device does not count its peak memory.
    """
    if timer.peak() is None:
        return {}
    loaded.keep_only(subject)
    timer.empty_cache()
    found: dict[int, Memory] = {}
    for context in sorted(plan.contexts):
        rng = torch.Generator().manual_seed(plan.seed)

        def work(context: int = context, rng: torch.Generator = rng) -> Memory:
            _, memory = time_decode(
                loaded.get(subject),
                timer,
                batch=plan.batch,
                context=context,
                warm_up=WARM_UP_TOKENS,
                repeats=1,
                burst=1,
                rng=rng,
                apart=True,
            )
            return memory

        try:
            found[context] = translate_out_of_memory(work)
        except OutOfMemory:
            # `measure` runs into this again and records it.
            loaded.get(subject).release()
            timer.empty_cache()
            break
        timer.empty_cache()
    return found


def measure_launches(
    subjects: Sequence[Subject],
    measured: Sequence[Measurement],
    plan: Plan,
    loaded: LoadedDecoders,
    timer: DeviceTimer,
) -> list[Launches]:
    """Launch overhead of eager subjects at their shortest and longest context."""
    found = []
    for subject, ends in _decode_measurements(subjects, measured):
        if subject.info.way == GENERATOR:
            continue
        for context, one in {ends[0].context: ends[0], ends[-1].context: ends[-1]}.items():
            assert one.median is not None

            def work(subject: Subject = subject, context: int = context) -> float | None:
                decoder = _warm_decoder(subject, context, PROFILED_TOKENS, plan, loaded)
                seconds = timer.kernel_seconds(lambda: decoder.decode(PROFILED_TOKENS))
                decoder.release()
                return seconds

            try:
                seconds = translate_out_of_memory(work)
            except OutOfMemory:
                loaded.get(subject).release()
                timer.empty_cache()
                continue
            if seconds is not None:
                kernels = seconds / PROFILED_TOKENS
                found.append(
                    Launches(
                        subject=subject.name, context=context, kernels=kernels, wall=one.median
                    )
                )
    return found


def measure_energy(
    subjects: Sequence[Subject],
    measured: Sequence[Measurement],
    plan: Plan,
    loaded: LoadedDecoders,
    timer: DeviceTimer,
) -> list[Energy]:
    """Energy of decoding at the first context of `plan.throughput`, or the longest measured."""
    found: list[Energy] = []
    if timer.joules() is None:
        return found
    for subject, rows in _decode_measurements(subjects, measured):
        preferred = [row for row in rows if row.context in plan.throughput[:1]]
        row = preferred[0] if preferred else rows[-1]
        assert row.median is not None
        count = max(WARM_UP_TOKENS, math.ceil(MIN_ENERGY_SECONDS / row.median))

        def work(
            subject: Subject = subject, context: int = row.context, count: int = count
        ) -> Energy:
            decoder = _warm_decoder(subject, context, count, plan, loaded)
            begin, before = timer.now(), timer.joules()
            decoder.decode(count)
            end, after = timer.now(), timer.joules()
            decoder.release()
            assert before is not None and after is not None
            return Energy(
                subject=subject.name,
                context=context,
                tokens=count * plan.batch,
                joules=after - before,
                seconds=end - begin,
            )

        try:
            found.append(translate_out_of_memory(work))
        except OutOfMemory:
            loaded.get(subject).release()
            timer.empty_cache()
    return found


def _warm_decoder(
    subject: Subject, context: int, tokens: int, plan: Plan, loaded: LoadedDecoders
) -> Decoder:
    """A warm decoder after `context` columns, with room for `tokens` more."""
    decoder = loaded.get(subject)
    decoder.start(plan.batch, context + WARM_UP_TOKENS + tokens)
    decoder.fill_random(plan.batch, context, torch.Generator().manual_seed(plan.seed))
    decoder.decode(WARM_UP_TOKENS)
    return decoder


def _decode_measurements(
    subjects: Sequence[Subject], measured: Sequence[Measurement]
) -> Iterable[tuple[Subject, list[Measurement]]]:
    """Subjects with their successful decode measurements, shortest context first."""
    for subject in subjects:
        rows = [
            one
            for one in measured
            if (one.subject, one.task) == (subject.name, DECODE) and one.median is not None
        ]
        if rows:
            yield subject, sorted(rows, key=lambda one: one.context)
