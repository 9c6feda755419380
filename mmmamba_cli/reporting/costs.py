"""The section on costs: memory and time over the context length."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mmmamba_cli.profiling import Measurement, Profile, report
from mmmamba_cli.profiling.result import DECODE, PREFILL, Ratio, Task
from mmmamba_cli.reporting.charts import Line, lines, swatch
from mmmamba_cli.reporting.html import Markup, figure, join_markup, paragraph, section, table, tag

MIB = 2**20


def costs_section(profile: Profile, series: Mapping[str, int]) -> Markup:
    """Three panels over the context, the models compared, and the conditions."""
    names = [subject.name for subject in profile.subjects]
    panels = [
        _panel(profile, series, "memory while decoding, MiB", DECODE, _memory),
        _panel(profile, series, "next token, ms", DECODE, _milliseconds),
        _panel(profile, series, "reading the context, ms", PREFILL, _milliseconds),
    ]
    legend = [tag("li", swatch(series[name], lined=True), " ", name) for name in names]
    measured = ", ".join(
        (
            profile.device.name,
            f"{profile.device.threads} threads",
            profile.dtype,
            f"batch {profile.plan.batch}",
            f"seed {profile.seed}",
        )
    )
    sentences = [
        report.correctness_line(profile),
        *(f"{line}." for line in report.launch_overhead_lines(profile)),
    ]
    sentences += [f"{note}." for note in profile.notes]
    sentences += [f"{remark}." for remark in report.remarks(profile)]
    return section(
        "costs",
        f"Memory and time against context: {', '.join(names)}",
        paragraph(f"Compared: {profile.compared}."),
        figure(
            join_markup(
                (
                    tag("ul", *legend, class_="legend"),
                    tag("div", *(p for p in panels if p is not None), class_="panels"),
                )
            ),
            f"Lower is better; both axes are logarithmic. Memory is {report.memory_name(profile)}. "
            f"Measured on {measured}.",
            join_markup(
                table(title, heading, rows)  # type: ignore[arg-type]
                for title, heading, rows in report.tables(profile)
            ),
        ),
        tag("ul", *(tag("li", line) for line in sentences), class_="small"),
    )


def _panel(
    profile: Profile,
    series: Mapping[str, int],
    title: str,
    task: Task,
    value: Callable[[Measurement], float | None],
) -> Markup | None:
    drawn = []
    for subject in profile.subjects:
        points = _points(profile, subject.name, task, value)
        if points:
            drawn.append(Line(subject.name, series[subject.name], points, marked=True))
    if not drawn:
        return None
    chart = lines(
        f"{title}, by context",
        drawn,
        x_name="context, tokens",
        y_name=title,
        log_x=True,
        log_y=True,
        x_ticks=profile.plan.lengths(task),
    )
    return tag("div", tag("h3", title), chart)


def _points(
    profile: Profile, name: str, task: Task, value: Callable[[Measurement], float | None]
) -> tuple[tuple[float, float], ...]:
    found = []
    for context in profile.plan.lengths(task):
        one = profile.find(name, task, context)
        number = None if one is None else value(one)
        if number is not None:
            found.append((float(context), number))
    return tuple(found)


def _memory(one: Measurement) -> float | None:
    return None if one.memory is None else one.memory.total / MIB


def _milliseconds(one: Measurement) -> float | None:
    return None if one.median is None else 1000 * one.median


def headline(profile: Profile) -> list[str]:
    """A sentence per student and baseline, at the longest context that both reached."""
    longest: dict[tuple[str, str], Ratio] = {}
    for ratio in sorted(profile.ratios, key=lambda one: one.context):
        if ratio.task == DECODE:
            longest[ratio.subject, ratio.baseline] = ratio
    return [
        f"{one.subject}: {one.times_faster:.2f} times as fast as {one.baseline} at {one.context:,} "
        f"tokens, with {one.memory:.0%} of its memory"
        for one in longest.values()
    ]
