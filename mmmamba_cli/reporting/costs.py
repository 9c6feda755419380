"""The section on costs: memory and time over the context length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from mmmamba_cli.errors import name_some
from mmmamba_cli.profiling import Measurement, Profile, report
from mmmamba_cli.profiling.result import DECODE, MEASURED, PREFILL, Task
from mmmamba_cli.reporting.charts import Line, Mark, format_context, lines
from mmmamba_cli.reporting.html import Markup, figure, join_markup, paragraph, section, table, tag
from mmmamba_cli.reporting.styles import legend
from mmmamba_cli.runs.provenance import redact_command

MIB = 2**20

Value = Callable[[Measurement], float | None]


def costs_section(profile: Profile, series: Mapping[str, int], labels: Mapping[str, str]) -> Markup:
    """Three panels over the context, the models compared, and the conditions."""
    names = [subject.name for subject in profile.subjects]
    panels = [
        panel(profile, names, series, labels, title, task, value)
        for title, task, value in (
            ("memory while decoding, MiB", DECODE, memory_of),
            ("next token, ms", DECODE, milliseconds_of),
            ("reading the context, ms", PREFILL, milliseconds_of),
        )
    ]
    sentences = [
        report.correctness_line(profile),
        *(f"{line}." for line in report.launch_overhead_lines(profile)),
        *skipped_sentences(profile),
    ]
    sentences += [f"{note}." for note in profile.notes]
    sentences += [f"{remark}." for remark in _remarks(profile)]
    shown = {labels[name]: series[labels[name]] for name in names}
    return section(
        "costs",
        f"Memory and time against context: {', '.join(shown)}",
        paragraph(f"Compared: {profile.compared}."),
        figure(
            join_markup((legend(shown), tag("div", *panels, class_="panels"))),
            join_markup(
                (
                    "Lower is better; both axes are logarithmic. Memory is "
                    f"{report.memory_name(profile)}. ",
                    conditions(profile, ""),
                )
            ),
            join_markup(
                table(title, heading, rows)  # type: ignore[arg-type]
                for title, heading, rows in measured_tables(profile)
            ),
        ),
        tag("ul", *(tag("li", line) for line in sentences), class_="small"),
    )


def conditions(profile: Profile, source: str) -> Markup:
    """Where and when a profile was measured; `source` names its file, if it is not the run's."""
    device = profile.device
    threads = f"{device.threads} threads" if device.type == "cpu" else device.type
    where = ", ".join(
        (device.name, threads, profile.dtype, f"batch {profile.plan.batch}", f"seed {profile.seed}")
    )
    return join_markup(
        (
            f"Measured on {profile.created[:10]} on {where}, torch "
            f"{profile.versions.get('torch', 'unknown')}, by ",
            tag("code", redact_command(profile.command)),
            f" ({source})." if source else ".",
        )
    )


def panel(
    profile: Profile,
    names: Sequence[str],
    series: Mapping[str, int],
    labels: Mapping[str, str],
    title: str,
    task: Task,
    value: Value,
    marks: Sequence[Mark] = (),
) -> Markup | None:
    """A value of the named subjects over the context; None if nothing was measured."""
    drawn = []
    for name in names:
        points = _points(profile, name, task, value)
        if points:
            drawn.append(Line(labels[name], series[labels[name]], points, marked=True))
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
        marks=marks,
        show_x=format_context,
    )
    return tag("div", tag("h3", title), chart)


def _points(
    profile: Profile, name: str, task: Task, value: Value
) -> tuple[tuple[float, float], ...]:
    found = []
    for context in profile.plan.lengths(task):
        one = profile.find(name, task, context)
        number = None if one is None else value(one)
        if number is not None:
            found.append((float(context), number))
    return tuple(found)


def memory_of(one: Measurement) -> float | None:
    """Memory in MiB."""
    return None if one.memory is None else one.memory.total / MIB


def milliseconds_of(one: Measurement) -> float | None:
    return None if one.median is None else 1000 * one.median


def measured_tables(profile: Profile) -> Iterator[report.Table]:
    """The profile's tables without the contexts at which nothing was measured."""
    for title, heading, rows in report.tables(profile):
        if heading[0] == report.CONTEXT:
            rows = [row for row in rows if any(_has_number(cell) for cell in row[1:])]
        if rows:
            yield title, heading, rows


def _has_number(cell: object) -> bool:
    return any(character.isdigit() for character in str(cell))


def skipped_sentences(profile: Profile) -> list[str]:
    """The measurements that were not made, in one sentence for each reason."""
    reasons: dict[str, list[str]] = {}
    for one in profile.measurements:
        if one.status != MEASURED:
            title = report.TITLES[one.task]
            reasons.setdefault(one.status.removeprefix("skipped: "), []).append(
                f"{one.subject} ({title} at {one.context:,})"
            )
    return [
        f"Not measured, because {_because(reason)}: {name_some(listed, 6)}."
        for reason, listed in reasons.items()
    ]


def _because(reason: str) -> str:
    return {
        "over budget": "the time given by --budget was spent",
        "out of memory": "memory was not enough",
        "a shorter one was out of memory": "a shorter context was out of memory",
    }.get(reason, reason)


def _remarks(profile: Profile) -> list[str]:
    """Warnings of the profile; those on single skipped measurements are one sentence elsewhere."""
    skipped = {one.status for one in profile.measurements} - {MEASURED}
    return [
        remark
        for remark in report.remarks(profile)
        if not any(f": {status} (" in remark for status in skipped)
    ]
