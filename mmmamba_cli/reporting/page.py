"""One self-contained page: no script, nothing loaded, every part that there is material for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmmamba_cli.errors import MmmambaError, RunError
from mmmamba_cli.evaluate import Suite
from mmmamba_cli.evaluate.result import RulePart
from mmmamba_cli.reporting.costs import costs_section, headline
from mmmamba_cli.reporting.differences import Difference, difference, pairs, sentence
from mmmamba_cli.reporting.examples import find_examples, open_table
from mmmamba_cli.reporting.external_section import comparison_section
from mmmamba_cli.reporting.external_section import differences as measured_differences
from mmmamba_cli.reporting.html import (
    CSS,
    Child,
    Markup,
    joined,
    listed,
    paragraph,
    section,
    table,
    tag,
)
from mmmamba_cli.reporting.loss_curves import losses_section
from mmmamba_cli.reporting.provenance import (
    commands_section,
    lineage_section,
    place,
    versions_section,
)
from mmmamba_cli.reporting.run_contents import Evaluated, Material, parts_by_label
from mmmamba_cli.reporting.scores import accuracy_section, examples_section
from mmmamba_cli.runs.provenance import public_text

MARK = "mmmamba report"


@dataclass(frozen=True)
class Page:
    """The text of the file; `shown` and `left_out` are the parts, `left_out` with the reason."""

    html: str
    shown: tuple[str, ...]
    left_out: dict[str, str]


def build_page(
    material: Material,
    *,
    created: str,
    title: str | None = None,
    note: str | None = None,
    data: Path | None = None,
) -> Page:
    """The report on `material`. `data` is the folder of the suites' tables, for the pictures;
    `note` is what a reader must know first.

    Parts without material are left out, and the page says so.
    """
    series = _series(material)
    parts: dict[str, Markup] = {}
    left_out: dict[str, str] = {}
    differences: list[Difference] = []
    for suite in _suites(material):
        results = [one for one in material.evaluated if one.result.suite == suite]
        parts |= _answers(material, results, series, data, differences, left_out)
    for number, comparison in enumerate(material.comparisons, start=1):
        parts[comparison.title] = comparison_section(number, comparison, series)
        differences += measured_differences(comparison)
    if not material.evaluated:
        left_out["scores and examples"] = "nothing was evaluated: `mmmamba eval --suite scenes`"
    if material.trained:
        parts["losses"] = losses_section(material.trained, series)
    else:
        left_out["losses"] = "no stage of distillation was run: `mmmamba distill --data FILE`"
    if material.main.profile is not None:
        parts["costs"] = costs_section(material.main.profile, series)
    else:
        left_out["costs"] = "nothing was measured: `mmmamba profile`"
    parts["lineage"] = lineage_section(material)
    parts["commands"] = commands_section(material)
    parts["versions"] = versions_section(material, created)
    if left_out or material.remarks:
        parts["left out"] = _left_out(left_out, material.remarks)
    heading = title or _title(material)
    body = joined((_head(heading, note, material, differences), *parts.values()))
    return Page(_document(heading, body), tuple(parts), left_out)


def check_replaceable(file: Path) -> None:
    """Raise `RunError` if `file` is there and is no report, which a report may replace."""
    try:
        if not file.exists() or f">{MARK}<".encode() in file.read_bytes():
            return
    except IsADirectoryError as error:
        raise RunError(f"{file} is a folder", "give a file to write, as report.html") from error
    raise RunError(f"{file} is there and is no report of mmmamba", "choose another file")


def _suites(material: Material) -> list[str]:
    return list(dict.fromkeys(one.result.suite for one in material.evaluated))


def _series(material: Material) -> dict[str, int]:
    """A colour for each model, the same in all parts; a product of which another was made and
    evaluated has the colour of that one."""
    labels = list(material.labels)
    if material.main.profile is not None:
        labels += [subject.name for subject in material.main.profile.subjects]
    found = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    for run in material.runs:
        for one in run.trained:
            heirs = list(map(run.label, run.heirs(one.product.name)))
            known = next((found[label] for label in heirs if label in found), None)
            found.setdefault(one.label, len(found) if known is None else known)
    return found


def _answers(
    material: Material,
    results: Sequence[Evaluated],
    series: dict[str, int],
    data: Path | None,
    differences: list[Difference],
    left_out: dict[str, str],
) -> dict[str, Markup]:
    """The sections on one suite; adds to `differences` and `left_out`."""
    name = results[0].result.suite
    suite: Suite | None = None
    found: list[Difference] = []
    parts: dict[str, Markup] = {}
    # What was asked otherwise is another measurement: the questions of most models are shown.
    groups = [
        [one for one in results if one.result.data.same_questions(first.result.data)]
        for first in results
    ]
    alike = max(groups, key=len)
    try:
        suite, table_, rows = open_table(alike, data)
        compared = [difference(suite, rows, one, other) for one, other in pairs(material, alike)]
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


def _title(material: Material) -> str:
    students = [name for name, one in material.main.products.items() if one.final]
    teacher = material.main.teacher
    against = "" if teacher is None else f" against {place(teacher.path)}"
    return f"{', '.join(students) or ', '.join(material.main.products)}{against}"


def _head(
    title: str, note: str | None, material: Material, differences: Sequence[Difference]
) -> Markup:
    """What this is and what it came to, before anything else."""
    titles = dict.fromkeys(one.result.title for one in material.evaluated if one.result.rules)
    tables = [
        _headlines(title, [one for one in material.evaluated if one.result.title == title])
        for title in titles
    ]
    said: list[Child] = [sentence(one) for one in differences]
    if material.main.profile is not None:
        said += headline(material.main.profile)
    return tag(
        "header",
        paragraph(MARK, class_="small"),
        tag("h1", title),
        None if note is None else paragraph(note, class_="lead"),
        *tables,
        listed(said) if said else None,
    )


def _headlines(title: str, results: Sequence[Evaluated]) -> Markup:
    """The headline of every model in one suite; which rule it is by where that differs."""
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


def _headline(part: RulePart) -> tuple[str | None, str | None]:
    interval, value = part.intervals.get(part.metric), part.metrics[part.metric]
    span = None if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"
    return None if value is None else f"{value:.1f}", span


def _final(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"


def _left_out(reasons: dict[str, str], remarks: Sequence[str]) -> Markup:
    items = [joined((tag("strong", f"{what}: "), f"{reason}")) for what, reason in reasons.items()]
    return section(
        "left-out", "What is not on this page", listed([*items, *map(public_text, remarks)])
    )


def _document(title: str, body: Markup) -> str:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # Nothing may be loaded, whatever slipped into the page.
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
