"""Tables and sentences of a profile, as text for the terminal and the HTML report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mmmamba_cli.errors import name_some
from mmmamba_cli.profiling.interfaces import (
    AS_SHIPPED,
    BASELINES,
    EAGER,
    GENERATOR,
    STATIC_TEACHER,
    TRANSFORMERS,
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
SHORT_NAMES = {AS_SHIPPED: "as shipped", STATIC_TEACHER: "static cache", TUNED: "tuned"}
# A measurement is noisy if its interquartile range exceeds this share of the median.
MAX_QUARTILE_RANGE = 0.25


def tables(profile: Profile) -> list[Table]:
    """Latency, memory and prefill with their ratios to the teacher, then throughput and energy."""
    found = [
        _latency(profile, DECODE),
        *_roofline(profile, DECODE),
        *_speed_ratios(profile, DECODE),
    ]
    found += [_memory(profile), *_memory_ratios(profile)]
    if profile.plan.prefill:
        found += [
            _latency(profile, PREFILL),
            *_roofline(profile, PREFILL),
            *_speed_ratios(profile, PREFILL),
        ]
    return [*found, *_throughput(profile), *_energy(profile)]


def remarks(profile: Profile) -> list[str]:
    """Warnings about the measurements, one sentence each."""
    found = [f"WRONG: {message}" for message in profile.gate.wrong.values()]
    for one in profile.measurements:
        if one.status != MEASURED and one.note:
            found.append(f"{_label(one)}: {one.status} ({one.note})")
        if one.alone:
            found.append(f"{_label(one)}: fitted only without the other models in memory")
    noisy = noisy_measurements(profile)
    if noisy:
        found.append(
            f"noisy, the quartiles more than {MAX_QUARTILE_RANGE:.0%} of the median apart, are "
            f"{len(noisy)} of {len(profile.measurements)}: {name_some(map(_label, noisy), 4)}; "
            "let nothing else run on the machine, or take more --repeats"
        )
    if any(one.status == OVER_BUDGET for one in profile.measurements):
        found.append("--budget SECONDS allows more time")
    return found


def noisy_measurements(profile: Profile) -> list[Measurement]:
    """Measurements whose interquartile range exceeds MAX_QUARTILE_RANGE of the median."""
    return [one for one in profile.measurements if is_noisy(one)]


def correctness_line(profile: Profile) -> str:
    """Result of the correctness check in one line."""
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
    """The models compared, in one sentence."""
    students = [
        f"{one.name} ({len(one.attention_layers)} of {one.num_layers} layers attention)"
        for one in subjects
        if one.role not in BASELINES
    ]
    baselines = [TEACHERS[one.role] for one in subjects if one.role in BASELINES]
    against = f"against {' and against '.join(baselines)}" if baselines else "against no teacher"
    what = f"{', '.join(students)}, {against}" if students else " and ".join(baselines)
    ways = {one.way for one in subjects if one.role != AS_SHIPPED}
    if ways == {TRANSFORMERS}:
        how = "all by the forward pass of their class in transformers, one launch per operation"
    elif ways == {GENERATOR}:
        how = "students by mmmamba's own decoder"
    elif GENERATOR in ways:
        how = "by mmmamba's own decoder where not said to be eager"
    else:
        how = "all eager, PyTorch's own kernels, static caches but where said otherwise"
    return f"{what}; {how}; measured in one run, in turns"


def notes(subjects: Sequence[Subject], plan: Plan, device: torch.device) -> list[str]:
    """What the numbers mean, one sentence each."""
    burst = f"the mean of {plan.burst} behind one another" if plan.burst > 1 else "timed alone"
    found = [
        "decoding begins from a cache filled with random numbers, as long as the context: the time "
        "does not depend on what is in it",
        f"a next token is one pass through the model and the greedy choice, text only, {burst}; "
        "weights shared by models are held once, and counted for each",
        "tensors that no forward uses, as a second token table, are loaded on neither side",
        *_decoder_notes(subjects, device),
    ]
    if any(one.info.precision for one in subjects):
        found.append("int8: weights alone, a scale for each row; activations stay as they are")
    if device.type == "cpu":
        found.append(
            "memory is counted, weights and cache: a CPU tells the peak of the whole process only"
        )
    elif plan.gpu_metrics:
        found.append(
            "memory while decoding was read with no other model on the device, in turns of its own"
        )
    if plan.prefill:
        whole = "models with attention read the whole prompt at once, linear ones some thousand"
        whole += " columns at a time, unless prefill_chunk says otherwise"
        if all(one.info.way == TRANSFORMERS for one in subjects):
            whole = (
                "every model reads the whole prompt at once, unless prefill_chunk says otherwise"
            )
        found.append(
            f"prefill: {whole}; caches that stay in place have just the prompt's room, and are "
            "made before the clock starts"
        )
    undone = [one.name for one in subjects if one.info.final is False]
    if undone:
        found.append(
            f"never distilled end to end: {', '.join(undone)}; speed does not depend on it"
        )
    return found


def _decoder_notes(subjects: Sequence[Subject], device: torch.device) -> list[str]:
    """How the models are decoded."""
    found = []
    ways = {one.info.way for one in subjects}
    if TRANSFORMERS in ways:
        found.append(
            "models of transformers decode by the forward pass of their own class with caches of "
            "transformers, growing for the teacher as shipped and static for the others; CUDA "
            "graphs, packed and int8 weights are not for them"
        )
    if any(one.info.role == AS_SHIPPED and one.info.way == EAGER for one in subjects):
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
    return found + [
        f"{one.name} is decoded eagerly, with a static cache: {one.info.eager_reason}"
        for one in subjects
        if one.info.eager_reason is not None and one.info.way == EAGER
    ]


def format_ms(seconds: float) -> str:
    """Seconds as milliseconds with three significant digits, or all digits before the point."""
    value = seconds * 1000
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def format_memory(value: int) -> str:
    """Bytes in MiB, or in GiB from one GiB on."""
    mebibytes = value / 2**20
    return f"{mebibytes:,.1f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:,.2f} GiB"


def _latency(profile: Profile, task: Task) -> Table:
    def cell(one: Measurement) -> str:
        if one.median is None or one.quartiles is None:
            return _missing_reason(one)
        if len(one.repeats) == 1:
            return f"{format_ms(one.median)} (once)"
        spread = (one.quartiles[1] - one.quartiles[0]) / 2
        plain = format_ms(one.median)
        digits = len(plain.partition(".")[2])
        return f"{plain} ± {spread * 1000:,.{digits}f}"

    title = f"{TITLES[task]}, ms: median ± half the distance of the quartiles"
    return _context_table(profile, task, title, cell)


def _memory(profile: Profile) -> Table:
    def cell(one: Measurement) -> str:
        return _missing_reason(one) if one.memory is None else format_memory(one.memory.total)

    title = f"memory while decoding: {memory_name(profile)}"
    return _context_table(profile, DECODE, title, cell)


def memory_name(profile: Profile) -> str:
    """What a memory number includes, which differs between GPU and CPU."""
    if profile.device.type == "cuda":
        return "peak of weights, cache and activations, by the allocator"
    return "weights and cache, counted; without activations"


def _speed_ratios(profile: Profile, task: Task) -> list[Table]:
    title = f"{TITLES[task]}: how many times faster than the teacher"
    return _ratio_tables(
        profile, task, title, lambda ratio: f"{_format_ratio(ratio.times_faster)}x"
    )


def _memory_ratios(profile: Profile) -> list[Table]:
    title = "memory while decoding, against the teacher"
    return _ratio_tables(profile, DECODE, title, lambda ratio: f"{ratio.memory - 1:+.0%}")


def _roofline(profile: Profile, task: Task) -> list[Table]:
    """Roofline bound of each subject and its share of the time; empty if not measured."""
    roofline = profile.ceilings
    if roofline is None:
        return []

    def cell(one: Measurement) -> str | None:
        if one.floor is None or one.share is None:
            return None
        return f"{format_ms(one.floor)} ({one.share:.0%})"

    title = (
        f"{TITLES[task]}: floor, ms, and share of the time that it is; copies run at "
        f"{roofline.copy_rate / 1e9:,.0f} GB/s, "
        f"matrix products at {roofline.matmul_rate / 1e9:,.0f} GFLOP/s"
    )
    return [_context_table(profile, task, title, cell)]


def _throughput(profile: Profile) -> list[Table]:
    """The best batch size of each subject, and why no larger one was better."""
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
                format_ms(best.seconds),
                None if best.floor is None else f"{best.floor / best.seconds:.0%}",
                None if best.peak is None else format_memory(best.peak),
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


def launch_overhead_lines(profile: Profile) -> list[str]:
    """Launch overhead of eager subjects, one sentence each."""
    return [
        f"{one.subject} at {one.context:,}: its kernels take {format_ms(one.kernels)} of "
        f"{format_ms(one.wall)} ms, so {one.share:.0%} is launches by the host (kernel times "
        "summed by torch.profiler, over the median without it)"
        for one in profile.launches
    ]


def _context_table(
    profile: Profile, task: Task, title: str, cell: Callable[[Measurement], str | None]
) -> Table:
    """A row per context and a column per subject."""
    names = [subject.name for subject in profile.subjects]
    rows: list[tuple[object, ...]] = []
    for context in profile.plan.lengths(task):
        found = [profile.find(name, task, context) for name in names]
        rows.append((f"{context:,}", *(None if one is None else cell(one) for one in found)))
    return title, (CONTEXT, *names), rows


def _ratio_tables(
    profile: Profile, task: Task, title: str, cell: Callable[[Ratio], str]
) -> list[Table]:
    """A row per context and a column per student and baseline; empty without a baseline."""
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
    heading = tuple(f"{student} / {SHORT_NAMES[role]}" for student, _, role in pairs)
    return [(title, (CONTEXT, *heading), rows)]


def _missing_reason(one: Measurement) -> str:
    """The cell of a measurement without a number."""
    return "skipped" if one.status == TOO_LONG else one.status


def is_noisy(one: Measurement) -> bool:
    """Whether the quartiles of a measurement are too far apart to compare it with others."""
    if one.median is None or one.quartiles is None:
        return False
    return one.quartiles[1] - one.quartiles[0] > MAX_QUARTILE_RANGE * one.median


def _label(one: Measurement) -> str:
    return f"{one.subject} ({TITLES[one.task]} at {one.context:,})"


def _format_ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
