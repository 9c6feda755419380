"""A profile as tables: headings and rows of text, for whoever prints them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmmamba_cli.errors import name_some
from mmmamba_cli.profiling.contract import AS_SHIPPED, TUNED
from mmmamba_cli.profiling.result import (
    DECODE,
    MEASURED,
    OVER_BUDGET,
    PREFILL,
    TOO_LONG,
    Measurement,
    Profile,
    Ratio,
    SubjectPart,
    Task,
)

# Title, heading, rows.
Table = tuple[str, tuple[str, ...], list[tuple[object, ...]]]

CONTEXT = "context"
TITLES = {DECODE: "next token", PREFILL: "prefill"}
BASELINES = (AS_SHIPPED, TUNED)
TEACHERS = {
    AS_SHIPPED: "the teacher as shipped, its keys and values concatenated with every token,",
    TUNED: "the teacher with a static cache",
}
# Quartiles this far apart, by the median, are worth a remark.
NOISY = 0.25


def tables(profile: Profile) -> list[Table]:
    """Latency, then memory, then prefill; each followed by its ratios to the teacher."""
    found = [_latency(profile, DECODE), *_times(profile, DECODE)]
    found += [_memory(profile), *_shares(profile)]
    if profile.plan.prefill:
        found += [_latency(profile, PREFILL), *_times(profile, PREFILL)]
    return found


def remarks(profile: Profile) -> list[str]:
    """What went otherwise than asked for, a sentence each."""
    found = []
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
    """Whether the caches were found right before anything was timed."""
    gate = profile.gate
    worst = max(value for ways in gate.distances.values() for value in ways.values())
    line = f"Checked before: {gate.what}, at most {worst:.1g}, allowed {gate.tolerance:.1g}"
    if gate.unchecked:
        return f"{line}. NOT checked, for want of memory: {', '.join(gate.unchecked)}."
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
    what = (
        f"{', '.join(students)}, with static caches, {against}" if students else " and ".join(held)
    )
    return f"{what}; all eager, PyTorch's own kernels; measured in one run, in turns"


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


def _by_context(
    profile: Profile, task: Task, title: str, cell: Callable[[Measurement], str]
) -> Table:
    """A row for each context, a column for each subject."""
    names = [subject.name for subject in profile.subjects]
    rows: list[tuple[object, ...]] = []
    for context in sorted(profile.plan.contexts):
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
    for context in sorted(profile.plan.contexts):
        found = [known.get((student, teacher, context)) for student, teacher, _ in pairs]
        rows.append((f"{context:,}", *(None if one is None else cell(one) for one in found)))
    short = {AS_SHIPPED: "as shipped", TUNED: "static cache"}
    heading = tuple(f"{student} / {short[role]}" for student, _, role in pairs)
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
