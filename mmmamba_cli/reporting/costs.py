"""The section on costs: memory and time over the context length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mmmamba_cli.profiling import Measurement, Profile, report
from mmmamba_cli.profiling.result import DECODE, PREFILL, Task
from mmmamba_cli.reporting.chart_scales import format_context
from mmmamba_cli.reporting.charts import Line, Mark, lines
from mmmamba_cli.reporting.html import Markup, figure, join_markup, paragraph, section, table, tag
from mmmamba_cli.reporting.profile_tables import (
    correctness_sentence,
    measured_tables,
    remark_sentences,
    skipped_sentences,
    withheld_sentences,
)
from mmmamba_cli.reporting.series_styles import legend
from mmmamba_cli.runs.provenance import redact_command

MIB = 2**20
PREFILL_PANEL = "prefill (reading the prompt), ms"

Value = Callable[[Measurement], float | None]


def costs_section(profile: Profile, series: Mapping[str, int], labels: Mapping[str, str]) -> Markup:
    """Three panels over the context, the models compared, and the conditions."""
    names = [subject.name for subject in profile.subjects]
    panels = [
        panel(profile, names, series, labels, title, task, value)
        for title, task, value in (
            ("memory while decoding, MiB", DECODE, memory_of),
            ("next token, ms", DECODE, milliseconds_of),
            (PREFILL_PANEL, PREFILL, milliseconds_of),
        )
    ]
    sentences = [
        correctness_sentence(profile),
        *(f"{line}." for line in report.launch_overhead_lines(profile)),
        *skipped_sentences(profile),
        *withheld_sentences(profile),
        *remark_sentences(profile),
    ]
    sentences += [f"{note}." for note in profile.notes]
    shown = {labels[name]: series[labels[name]] for name in names}
    return section(
        "costs",
        f"Memory and time against context: {', '.join(shown)}",
        paragraph(f"Compared: {profile.compared}."),
        figure(
            join_markup((legend(shown), tag("div", *panels, class_="panels"))),
            join_markup(
                (
                    "Lower is better; both axes are logarithmic. Dotted hollow points are noisy. "
                    f"Memory is {report.memory_name(profile)}. ",
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
            noisy = _noisy_contexts(profile, name, task) if value is milliseconds_of else ()
            line = Line(labels[name], series[labels[name]], points, True, frozenset(noisy))
            drawn.append(line)
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


def _noisy_contexts(profile: Profile, name: str, task: Task) -> list[float]:
    return [
        float(one.context)
        for one in report.noisy_measurements(profile)
        if (one.subject, one.task) == (name, task)
    ]


def memory_of(one: Measurement) -> float | None:
    """Memory in MiB."""
    return None if one.memory is None else one.memory.total / MIB


def milliseconds_of(one: Measurement) -> float | None:
    return None if one.median is None else 1000 * one.median
