"""A profile as tables: headings and rows of text, for whoever prints them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mmmamba_cli.errors import name_some
from mmmamba_cli.profiling.interfaces import (
    AS_SHIPPED,
    BASELINES,
    GENERATOR,
    STATIC_TEACHER,
    TUNED,
    Subject,
)
from mmmamba_cli.profiling.result import (
    DECODE,
    MEASURED,
    OUT_OF_MEMORY,
    OVER_BUDGET,
    PREFILL,
    TOO_LONG,
    Measurement,
    Profile,
    Ratio,
    SubjectPart,
    Task,
)

if TYPE_CHECKING:
    import torch

    from mmmamba_cli.profiling.benchmark import Plan

# Title, heading, rows.
Table = tuple[str, tuple[str, ...], list[tuple[object, ...]]]

CONTEXT = "context"
TITLES = {DECODE: "next token", PREFILL: "prefill"}
TEACHERS = {
    AS_SHIPPED: "the teacher as shipped (eager, its keys and values concatenated with every token)",
    STATIC_TEACHER: "the teacher with a static cache (eager)",
    TUNED: "the teacher tuned (by the same decoder as the students, cache in place)",
}
SHORT = {AS_SHIPPED: "as shipped", STATIC_TEACHER: "static cache", TUNED: "tuned"}
# Quartiles this far apart, by the median, are worth a remark.
NOISY = 0.25


def tables(profile: Profile) -> list[Table]:
    """Latency, memory, prefill, each beside its ratios to the teacher; then what else there is."""
    found = [_latency(profile, DECODE), *_floors(profile, DECODE), *_times(profile, DECODE)]
    found += [_memory(profile), *_shares(profile)]
    if profile.plan.prefill:
        found += [_latency(profile, PREFILL), *_floors(profile, PREFILL), *_times(profile, PREFILL)]
    return [*found, *_throughput(profile), *_energy(profile)]


def remarks(profile: Profile) -> list[str]:
    """What went otherwise than asked for, a sentence each."""
    found = [f"WRONG: {told}" for told in profile.gate.wrong.values()]
    for one in profile.measurements:
        if one.status != MEASURED and one.note:
            found.append(f"{_place(one)}: {one.status} ({one.note})")
        if one.alone:
            found.append(f"{_place(one)}: fitted only without the other models in memory")
    noisy = [one for one in profile.measurements if _is_noisy(one)]
    if noisy:
        found.append(
            f"noisy, the quartiles more than {NOISY:.0%} of the median apart, are "
            f"{len(noisy)} of {len(profile.measurements)}: {name_some(map(_place, noisy), 4)}; "
            "let nothing else run on the machine, or take more --repeats"
        )
    if any(one.status == OVER_BUDGET for one in profile.measurements):
        found.append("--budget SECONDS allows more time")
    return found


def gate_line(profile: Profile) -> str:
    """Whether the decoders were found right before anything was timed."""
    gate = profile.gate
    distances = [value for ways in gate.distances.values() for value in ways.values()]
    worst = math.nan if any(map(math.isnan, distances)) else max(distances)
    line = f"Checked before: {gate.what}, at most {worst:.1g}, allowed {gate.tolerance:.1g}"
    if gate.unchecked:
        return f"{line}. NOT checked, for want of memory: {', '.join(gate.unchecked)}."
    if gate.wrong:
        return f"{line}. WRONG, believe no number of: {', '.join(gate.wrong)}."
    return f"{line}: green."


def comparison(subjects: Sequence[SubjectPart]) -> str:
    """What is compared with what, in one sentence."""
    students = [
        f"{one.name} ({len(one.attention_layers)} of {one.num_layers} layers attention)"
        for one in subjects
        if one.role not in BASELINES
    ]
    held = [TEACHERS[one.role] for one in subjects if one.role in BASELINES]
    against = f"against {' and against '.join(held)}" if held else "against no teacher"
    what = f"{', '.join(students)}, {against}" if students else " and ".join(held)
    ways = {one.way for one in subjects if one.role != AS_SHIPPED}
    if ways == {GENERATOR}:
        how = "students by mmmamba's own decoder"
    elif GENERATOR in ways:
        how = "by mmmamba's own decoder where not said to be eager"
    else:
        how = "all eager, PyTorch's own kernels, static caches but where said otherwise"
    return f"{what}; {how}; measured in one run, in turns"


def notes(subjects: Sequence[Subject], plan: Plan, device: torch.device) -> list[str]:
    """What must be known to read the numbers, a sentence each."""
    burst = f"the mean of {plan.burst} behind one another" if plan.burst > 1 else "timed alone"
    found = [
        "decoding begins from a cache filled with random numbers, as long as the context: the time "
        "does not depend on what is in it",
        f"a next token is one pass through the model and the greedy choice, text only, {burst}; "
        "weights shared by models are held once, and counted for each",
        "tensors that no forward uses, as a second token table, are loaded on neither side",
    ]
    roles, ways = ({getattr(one.about, key) for one in subjects} for key in ("role", "way"))
    if AS_SHIPPED in roles:
        found.append(
            f"{AS_SHIPPED}: this project's model with transformers' DynamicCache, which copies "
            "all keys and values with every token, as HoVLE's own code does; not that code itself"
        )
    if GENERATOR in ways:
        kernels = (
            "attention split over the cache, one CUDA graph a token"
            if device.type == "cuda"
            else "PyTorch's own kernels"
        )
        found.append(
            f"mmmamba's own decoder: packed weights, memory in place, {kernels}; teacher and "
            "students alike"
        )
    if any(one.about.precision for one in subjects):
        found.append("int8: weights alone, a scale for each row; activations stay as they are")
    if device.type == "cpu":
        found.append(
            "memory is counted, weights and cache: a CPU tells the peak of the whole process only"
        )
    elif plan.gauges:
        found.append(
            "memory while decoding was read with no other model on the device, in turns of its own"
        )
    if plan.prefill:
        found.append(
            "prefill: models with attention read the whole prompt at once, linear ones some "
            "thousand columns at a time, unless prefill_chunk says otherwise; caches that stay in "
            "place have just the prompt's room, and are made before the clock starts"
        )
    undone = [one.name for one in subjects if one.about.final is False]
    if undone:
        found.append(
            f"never distilled end to end: {', '.join(undone)}; speed does not depend on it"
        )
    return found


def milliseconds(seconds: float) -> str:
    """With three significant digits or all those before the point."""
    value = seconds * 1000
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def size(value: int) -> str:
    """Bytes in MiB, from one GiB on in GiB."""
    mebibytes = value / 2**20
    return f"{mebibytes:,.1f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:,.2f} GiB"


def _latency(profile: Profile, task: Task) -> Table:
    def cell(one: Measurement) -> str:
        if one.median is None or one.quartiles is None:
            return _why(one)
        if len(one.repeats) == 1:
            return f"{milliseconds(one.median)} (once)"
        spread = (one.quartiles[1] - one.quartiles[0]) / 2
        plain = milliseconds(one.median)
        digits = len(plain.partition(".")[2])
        return f"{plain} ± {spread * 1000:,.{digits}f}"

    title = f"{TITLES[task]}, ms: median ± half the distance of the quartiles"
    return _by_context(profile, task, title, cell)


def _memory(profile: Profile) -> Table:
    def cell(one: Measurement) -> str:
        return _why(one) if one.memory is None else size(one.memory.total)

    title = f"memory while decoding: {memory_name(profile)}"
    return _by_context(profile, DECODE, title, cell)


def memory_name(profile: Profile) -> str:
    """What the numbers of memory are: not the same on a GPU and on a CPU."""
    if profile.device.type == "cuda":
        return "peak of weights, cache and activations, by the allocator"
    return "weights and cache, counted; without activations"


def _times(profile: Profile, task: Task) -> list[Table]:
    title = f"{TITLES[task]}: how many times faster than the teacher"
    return _ratios(profile, task, title, lambda ratio: f"{_short(ratio.times_faster)}x")


def _shares(profile: Profile) -> list[Table]:
    title = "memory while decoding, against the teacher"
    return _ratios(profile, DECODE, title, lambda ratio: f"{ratio.memory - 1:+.0%}")


def _floors(profile: Profile, task: Task) -> list[Table]:
    """How near each subject is to what the device allows; nothing where that was not measured."""
    rates = profile.ceilings
    if rates is None:
        return []

    def cell(one: Measurement) -> str | None:
        if one.floor is None or one.share is None:
            return None
        return f"{milliseconds(one.floor)} ({one.share:.0%})"

    title = (
        f"{TITLES[task]}: floor, ms, and share of the time that it is; copies run at "
        f"{rates.copy_rate / 1e9:,.0f} GB/s, matrix products at {rates.matmul_rate / 1e9:,.0f} "
        "GFLOP/s"
    )
    return [_by_context(profile, task, title, cell)]


def _throughput(profile: Profile) -> list[Table]:
    """The best batch of each subject, and why there was no larger one."""
    rows: list[tuple[object, ...]] = []
    for best in (one for one in profile.throughput if one.best):
        own = [
            one
            for one in profile.throughput
            if (one.subject, one.context) == (best.subject, best.context)
        ]
        assert best.rate is not None and best.seconds is not None
        refused = [one.batch for one in own if one.status == OUT_OF_MEMORY]
        cut = any(one.status == OVER_BUDGET for one in own)
        end = f"out of memory at {min(refused):,}" if refused else "no gain beyond"
        rows.append(
            (
                best.subject,
                f"{best.context:,}",
                f"{best.batch:,}",
                f"{best.rate:,.0f}",
                milliseconds(best.seconds),
                None if best.floor is None else f"{best.floor / best.seconds:.0%}",
                None if best.peak is None else size(best.peak),
                OVER_BUDGET if cut else end,
            )
        )
    if not rows:
        return []
    heading = ("model", CONTEXT, "batch", "tokens/s", "ms", "of the floor", "peak", "larger ones")
    return [("most tokens a second, over batches that were doubled", heading, rows)]


def _energy(profile: Profile) -> list[Table]:
    rows: list[tuple[object, ...]] = [
        (
            one.subject,
            f"{one.context:,}",
            f"{one.joules / one.tokens:.3g}",
            f"{one.joules / one.seconds:,.0f}",
        )
        for one in profile.energy
    ]
    title = "energy of the whole device while decoding, by its own counter"
    return [(title, ("model", CONTEXT, "J a token", "W"), rows)] if rows else []


def host_lines(profile: Profile) -> list[str]:
    """How much of an eager token's time the device waits for the host, a sentence each."""
    return [
        f"{one.subject} at {one.context:,}: its kernels take {milliseconds(one.kernels)} of "
        f"{milliseconds(one.wall)} ms, so {one.share:.0%} is launches by the host (kernel times "
        "summed by torch.profiler, over the median without it)"
        for one in profile.launches
    ]


def _by_context(
    profile: Profile, task: Task, title: str, cell: Callable[[Measurement], str | None]
) -> Table:
    """A row for each context, a column for each subject."""
    names = [subject.name for subject in profile.subjects]
    rows: list[tuple[object, ...]] = []
    for context in profile.plan.lengths(task):
        found = [profile.find(name, task, context) for name in names]
        rows.append((f"{context:,}", *(None if one is None else cell(one) for one in found)))
    return title, (CONTEXT, *names), rows


def _ratios(profile: Profile, task: Task, title: str, cell: Callable[[Ratio], str]) -> list[Table]:
    """A row for each context, a column for each student and baseline; nothing without a teacher."""
    pairs = [
        (student.name, teacher.name, teacher.role)
        for student in profile.subjects
        if student.role not in BASELINES
        for teacher in profile.subjects
        if teacher.role in BASELINES
    ]
    if not pairs:
        return []
    known = {
        (one.subject, one.baseline, one.context): one for one in profile.ratios if one.task == task
    }
    rows: list[tuple[object, ...]] = []
    for context in profile.plan.lengths(task):
        found = [known.get((student, teacher, context)) for student, teacher, _ in pairs]
        rows.append((f"{context:,}", *(None if one is None else cell(one) for one in found)))
    heading = tuple(f"{student} / {SHORT[role]}" for student, _, role in pairs)
    return [(title, (CONTEXT, *heading), rows)]


def _why(one: Measurement) -> str:
    """In a cell, why there is no number."""
    return "skipped" if one.status == TOO_LONG else one.status


def _is_noisy(one: Measurement) -> bool:
    if one.median is None or one.quartiles is None:
        return False
    return one.quartiles[1] - one.quartiles[0] > NOISY * one.median


def _place(one: Measurement) -> str:
    return f"{one.subject} ({TITLES[one.task]} at {one.context:,})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
