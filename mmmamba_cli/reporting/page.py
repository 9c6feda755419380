"""The page of a report: one self-contained HTML file without scripts or external resources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmmamba_cli.errors import MmmambaError, RunError
from mmmamba_cli.evaluate import Suite
from mmmamba_cli.evaluate.result import RuleResult
from mmmamba_cli.reporting.comparisons import (
    ScoreDifference,
    difference_sentence,
    external_differences,
    external_section,
    product_pairs,
    score_difference,
)
from mmmamba_cli.reporting.costs import costs_section, headline
from mmmamba_cli.reporting.examples import find_examples, open_table
from mmmamba_cli.reporting.html import (
    CSS,
    Child,
    Markup,
    item_list,
    join_markup,
    paragraph,
    section,
    table,
    tag,
)
from mmmamba_cli.reporting.layer_scores import layer_score_sections
from mmmamba_cli.reporting.loss_curves import losses_section
from mmmamba_cli.reporting.provenance import (
    commands_section,
    lineage_section,
    teacher_name,
    versions_section,
)
from mmmamba_cli.reporting.run_contents import ModelResult, ReportData, parts_by_label
from mmmamba_cli.reporting.scores import accuracy_section, examples_section
from mmmamba_cli.runs.provenance import redact_text

MARK = "mmmamba report"


@dataclass(frozen=True)
class Page:
    """The HTML, the names of the parts shown, and the parts left out with the reason."""

    html: str
    shown: tuple[str, ...]
    left_out: dict[str, str]


def build_page(
    report: ReportData,
    *,
    created: str,
    title: str | None = None,
    note: str | None = None,
    data: Path | None = None,
) -> Page:
    """Build the page. `data` is the folder of the suites' tables, which hold the images; `note` is
    a sentence below the heading.

    Parts without content are left out, and the page names them.
    """
    series = _series(report)
    parts: dict[str, Markup] = {}
    left_out: dict[str, str] = {}
    differences: list[ScoreDifference] = []
    for suite in _suites(report):
        results = [one for one in report.evaluated if one.result.suite == suite]
        parts |= _suite_sections(report, results, series, data, differences, left_out)
    for number, comparison in enumerate(report.comparisons, start=1):
        parts[comparison.title] = external_section(number, comparison, series)
        differences += external_differences(comparison)
    if not report.evaluated:
        left_out["scores and examples"] = "nothing was evaluated: `mmmamba eval --suite scenes`"
    if report.trained:
        parts["losses"] = losses_section(report.trained, series)
    else:
        left_out["losses"] = "no stage of distillation was run: `mmmamba distill --data FILE`"
    if report.main.profile is not None:
        parts["costs"] = costs_section(report.main.profile, series)
    else:
        left_out["costs"] = "nothing was measured: `mmmamba profile`"
    parts |= layer_score_sections(report, left_out)
    parts["lineage"] = lineage_section(report)
    parts["commands"] = commands_section(report)
    parts["versions"] = versions_section(report, created)
    if left_out or report.remarks:
        parts["left out"] = _left_out(left_out, report.remarks)
    heading = title or _title(report)
    body = join_markup((_head(heading, note, report, differences), *parts.values()))
    return Page(_document(heading, body), tuple(parts), left_out)


def check_replaceable(file: Path) -> None:
    """Raise `RunError` if `file` exists and is not a report."""
    try:
        if not file.exists() or f">{MARK}<".encode() in file.read_bytes():
            return
    except IsADirectoryError as error:
        raise RunError(f"{file} is a folder", "give a file to write, as report.html") from error
    raise RunError(f"{file} is there and is no report of mmmamba", "choose another file")


def _suites(report: ReportData) -> list[str]:
    return list(dict.fromkeys(one.result.suite for one in report.evaluated))


def _series(report: ReportData) -> dict[str, int]:
    """A colour number per model, the same in all parts. A product takes the colour of the evaluated
    product that was made from it."""
    labels = list(report.labels)
    if report.main.profile is not None:
        labels += [subject.name for subject in report.main.profile.subjects]
    found = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    for run in report.runs:
        for one in run.trained:
            descendants = list(map(run.label, run.descendants(one.product.name)))
            known = next((found[label] for label in descendants if label in found), None)
            found.setdefault(one.label, len(found) if known is None else known)
    return found


def _suite_sections(
    report: ReportData,
    results: Sequence[ModelResult],
    series: dict[str, int],
    data: Path | None,
    differences: list[ScoreDifference],
    left_out: dict[str, str],
) -> dict[str, Markup]:
    """The sections of one suite; adds to `differences` and `left_out`."""
    name = results[0].result.suite
    suite: Suite | None = None
    found: list[ScoreDifference] = []
    parts: dict[str, Markup] = {}
    # Results over other questions are not comparable: the largest comparable group is shown.
    groups = [
        [one for one in results if one.result.data.same_questions(first.result.data)]
        for first in results
    ]
    alike = max(groups, key=len)
    try:
        suite, table_, rows = open_table(alike, data)
        compared = [
            score_difference(suite, rows, one, other) for one, other in product_pairs(report, alike)
        ]
        found = [one for one in compared if one is not None]
        answered = [one for one in alike if one.answers]
        examples = find_examples(suite, table_, rows, answered) if answered else []
        if examples:
            parts[f"examples, {name}"] = examples_section(suite, examples)
        else:
            left_out[f"examples, {name}"] = "no question was answered by every model"
    except MmmambaError as error:
        left_out[f"examples, {name}"] = str(error)
    differences += found
    scores = accuracy_section(suite, alike, series, found)
    if len(alike) < len(results):
        others = ", ".join(one.label for one in results if one not in alike)
        left_out[f"some scores, {name}"] = f"asked other questions than the others: {others}"
    return {f"scores, {name}": scores, **parts}


def _title(report: ReportData) -> str:
    students = [name for name, one in report.main.products.items() if one.final]
    teacher = report.main.teacher
    against = "" if teacher is None else f" against {teacher_name(teacher.path)}"
    return f"{', '.join(students) or ', '.join(report.main.products)}{against}"


def _head(
    title: str, note: str | None, report: ReportData, differences: Sequence[ScoreDifference]
) -> Markup:
    """Title, headline scores and differences."""
    titles = dict.fromkeys(one.result.title for one in report.evaluated if one.result.rules)
    tables = [
        _headlines(title, [one for one in report.evaluated if one.result.title == title])
        for title in titles
    ]
    sentences: list[Child] = [difference_sentence(one) for one in differences]
    if report.main.profile is not None:
        sentences += headline(report.main.profile)
    return tag(
        "header",
        paragraph(MARK, class_="small"),
        tag("h1", title),
        None if note is None else paragraph(note, class_="lead"),
        *tables,
        item_list(sentences) if sentences else None,
    )


def _headlines(title: str, results: Sequence[ModelResult]) -> Markup:
    """The headline score of every model in one suite, with the rule if rules differ."""
    parts = parts_by_label(results)
    differ = len({part.rule for part in parts.values()}) > 1
    rows = [
        (
            one.label,
            one.result.model.kind or None,
            *((parts[one.label].rule,) if differ else ()),
            *_headline(parts[one.label]),
            _final(one.result.model.final),
        )
        for one in results
        if one.result.rules
    ]
    by = ("rule",) if differ else ()
    heading = ("model", "kind", *by, "score", "95 %", "distilled end to end")
    return table(title, heading, rows, words=True)


def _headline(part: RuleResult) -> tuple[str | None, str | None]:
    interval, value = part.intervals.get(part.metric), part.metrics[part.metric]
    span = None if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"
    return None if value is None else f"{value:.1f}", span


def _final(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"


def _left_out(reasons: dict[str, str], remarks: Sequence[str]) -> Markup:
    items = [
        join_markup((tag("strong", f"{what}: "), f"{reason}")) for what, reason in reasons.items()
    ]
    return section(
        "left-out", "What is not on this page", item_list([*items, *map(redact_text, remarks)])
    )


def _document(title: str, body: Markup) -> str:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # Blocks every request, even if foreign markup got into the page.
        tag(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        ),
        tag("title", title),
        tag("style", Markup(CSS)),
    )
    page = tag("html", head, tag("body", tag("main", body)), lang="en")
    return f"<!doctype html>\n{page}\n"
