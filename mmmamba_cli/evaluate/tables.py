"""Results as text tables: a heading and rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmmamba_cli.errors import name_some
from mmmamba_cli.evaluate.result import CHOSEN_BY_LIKELIHOOD, Result, RuleResult
from mmmamba_cli.evaluate.score_retention import Retention
from mmmamba_cli.evaluate.suite import Suite

TextTable = tuple[tuple[str, ...], list[tuple[object, ...]]]


def summary(results: Iterable[Result]) -> TextTable:
    """One row per model, suite, rule and metric; the headline metric of a rule comes first."""
    rows: list[tuple[object, ...]] = []
    for result in results:
        for part in result.rules:
            for metric, value in part.metrics.items():
                is_first = metric == part.metric
                rows.append(
                    (
                        result.model.name if is_first else "",
                        result.suite if is_first else "",
                        part.rule if is_first else "",
                        metric,
                        format_number(value),
                        span(part.intervals.get(metric)),
                        _asked(result) if is_first else "",
                        part.counts.get("unreadable", 0) if is_first else "",
                    )
                )
    heading = ("model", "suite", "rule", "metric", "score", "95 %", "rows", "unreadable")
    return heading, rows


def categories(result: Result, part: RuleResult) -> TextTable:
    """One row per category of a suite by one rule."""
    metrics = list(dict.fromkeys(key for one in part.categories.values() for key in one))
    rows: list[tuple[object, ...]] = [
        (name, *(format_number(values.get(metric)) for metric in metrics))
        for name, values in part.categories.items()
    ]
    return (f"{result.suite} by {part.rule}", *metrics), rows


def retention_table(parts: Iterable[Retention]) -> TextTable:
    """One row per student, suite and rule."""
    rows: list[tuple[object, ...]] = [
        (
            part.student,
            part.suite,
            part.rule,
            part.metric,
            format_number(part.student_value),
            format_number(part.teacher_value),
            None if part.ratio is None else f"{part.ratio:.1%}",
            _percent_span(part.interval),
            format_number(part.chance),
            None if part.above_chance is None else f"{part.above_chance:.1%}",
            _percent_span(part.above_chance_interval),
        )
        for part in parts
    ]
    columns = ("student", "suite", "rule", "metric", "score", "teacher", "retention", "95 %")
    heading = (*columns, "chance", "above chance", "95 % above chance")
    return heading, rows


def comparison(
    results: Sequence[Result], suites: Mapping[str, Suite], tables: Iterable[Mapping[str, Any]]
) -> TextTable:
    """This run's scores above the published ones, one column per published suite.

    Only scores by the rule of the published numbers are shown.
    """
    shown = [suite for suite in suites.values() if suite.published is not None]
    columns = [suite.published.column for suite in shown if suite.published is not None]
    ours: dict[str, dict[str, str | None]] = {}
    for result in results:
        published = suites[result.suite].published
        part = None if published is None else result.rule(published.rule)
        if published is not None and part is not None:
            value = part.metrics.get(published.metric)
            ours.setdefault(result.model.name, {})[published.column] = format_number(value)
    rows: list[tuple[object, ...]] = [
        (name, *(values.get(column) for column in columns), "this run")
        for name, values in ours.items()
    ]
    for table in tables:
        for name, values in table["rows"].items():
            rows.append((name, *(values.get(column) for column in columns), table["source"]))
    return ("model", *columns, "source"), rows


def remarks(result: Result) -> list[str]:
    """Caveats of a result, one sentence each."""
    found = []
    for part in result.rules:
        unreadable = part.counts.get("unreadable", 0)
        if unreadable:
            shown = ", ".join(f"{one.index}: {one.answer[:40]!r}" for one in part.unreadable)
            found.append(
                f"{result.suite} by {part.rule}: {unreadable} of {result.data.used} answers could "
                f"not be read, as {shown}"
            )
        found += [f"{result.suite} by {part.rule}: {note}" for note in part.notes]
    way = result.settings.get("answers")
    if isinstance(way, str) and way.startswith(CHOSEN_BY_LIKELIHOOD):
        found.append(f"{result.suite}: answers were {way}, not generated")
    if result.data.partial:
        found.append(_part(result))
    if not result.rules:
        found.append(f"{result.suite}: answers need a judge; they are in predictions.tsv")
    if result.not_asked:
        shown = name_some(one.index for one in result.not_asked)
        found.append(
            f"{result.suite}: {len(result.not_asked)} of {result.data.used} rows could not be "
            f"asked and count as wrong ({shown})"
        )
    if result.data.without_image:
        found.append(f"{result.suite}: {result.data.without_image} rows have no picture")
    return found


def _part(result: Result) -> str:
    data = result.data
    sentence = (
        f"{result.suite}: a part, {data.used} of {data.rows} rows were asked; these are not the "
        "scores of the suite"
    )
    if data.categories_not_asked:
        sentence += f", and nothing was asked of {name_some(data.categories_not_asked)}"
    return sentence


def format_number(value: float | None) -> str | None:
    """Format with two decimals; integers (counts) without."""
    if value is None:
        return None
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def span(interval: tuple[float, float] | None) -> str | None:
    return None if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def _percent_span(interval: tuple[float, float] | None) -> str | None:
    return None if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"


def _asked(result: Result) -> str:
    """The number of rows asked, out of how many if not all were."""
    data = result.data
    return f"{data.used} of {data.rows}, a part" if data.partial else str(data.used)
