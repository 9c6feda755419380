"""The page of a report: one self-contained HTML file without scripts or external resources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmmamba_cli.errors import RunError
from mmmamba_cli.reporting.comparisons import external_section
from mmmamba_cli.reporting.costs import costs_section
from mmmamba_cli.reporting.html import (
    Child,
    Markup,
    item_list,
    join_markup,
    paragraph,
    section,
    tag,
)
from mmmamba_cli.reporting.layer_scores import layer_score_sections
from mmmamba_cli.reporting.lead import about_paragraph, lead_sections, summary_sentences
from mmmamba_cli.reporting.lead_contents import read_lead
from mmmamba_cli.reporting.loss_curves import losses_section
from mmmamba_cli.reporting.mixer_fidelity import RunFidelity, fidelity_section
from mmmamba_cli.reporting.models import (
    model_details,
    models_section,
    series_of,
    subject_label,
)
from mmmamba_cli.reporting.provenance import (
    commands_section,
    lineage_section,
    side_by_side,
    teacher_name,
    versions_section,
)
from mmmamba_cli.reporting.run_contents import ReportData, RunContents
from mmmamba_cli.reporting.stability import stability_sections
from mmmamba_cli.reporting.stylesheet import CSS
from mmmamba_cli.reporting.suite_results import suite_results, suite_sections
from mmmamba_cli.runs import TEACHER
from mmmamba_cli.runs.provenance import redact_text

MARK = "mmmamba report"


@dataclass(frozen=True)
class Page:
    """The HTML, the names of the parts shown, and the parts left out with the reason.

    `summary` is the result in sentences: what the students keep of their teacher.
    """

    html: str
    shown: tuple[str, ...]
    left_out: dict[str, str]
    summary: tuple[str, ...] = ()


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
    suites = suite_results(report, data)
    details = model_details(report)
    lead = read_lead(report, suites, details)
    series = series_of(report, [one.student for one in lead.kept])
    left_out: dict[str, str] = {}
    parts = lead_sections(lead, series)
    # Products of single stages stand in the lineage.
    judged = {*report.labels, *lead.labels.values(), *(one.student for one in lead.kept), TEACHER}
    shown = [label for label in series if label in details and label in judged]
    # A run that was only seeded draws nothing, and its teacher alone needs no legend.
    if len(shown) > 1:
        parts["models"] = models_section(series, details, shown)
    if report.measured.scores or report.measured.profiles:
        parts["run"] = _run_section(report, bool(lead.examples))
    parts |= _mechanics(report, series, left_out)
    for one in suites:
        differences = one.differences(report)
        parts |= suite_sections(one, differences, series, left_out)
    if not suites:
        left_out["scores and examples"] = (
            "nothing was evaluated: `mmmamba eval --suite scenes`"
            if report.main.reads_pictures
            else "the suites ask about pictures, and the models of this run read text only"
        )
    profile = report.main.profile
    if profile is not None:
        labels = {one.name: subject_label(one, report) for one in profile.subjects}
        parts["costs"] = costs_section(profile, series, labels)
    else:
        left_out["costs"] = "nothing was measured: `mmmamba profile`"
    parts |= stability_sections(report, series)
    parts |= layer_score_sections(report, left_out)
    parts["lineage"] = lineage_section(report)
    parts["commands"] = commands_section(report)
    parts["versions"] = versions_section(report, created)
    if left_out or report.remarks:
        parts["left out"] = _left_out(left_out, report.remarks)
    heading = title or _title(report)
    summary = summary_sentences(lead)
    body = join_markup((_head(heading, note, summary, lead.mixers), *parts.values()))
    return Page(_document(heading, body), tuple(parts), left_out, tuple(summary))


def check_replaceable(file: Path) -> None:
    """Raise `RunError` if `file` exists and is not a report."""
    try:
        if not file.exists() or f">{MARK}<".encode() in file.read_bytes():
            return
    except IsADirectoryError as error:
        raise RunError(f"{file} is a folder", "give a file, as in --out report.html") from error
    raise RunError(
        f"{file} exists and is not a report of mmmamba", "choose another file with --out"
    )


def _mechanics(
    report: ReportData, series: dict[str, int], left_out: dict[str, str]
) -> dict[str, Markup]:
    """What training did: mixers that imitate attention, comparisons of other programs, losses."""
    parts: dict[str, Markup] = {}
    fidelity = [found for run in report.runs if (found := _fidelity(run)) is not None]
    if fidelity:
        parts["fidelity"] = fidelity_section(fidelity, series)
    for number, comparison in enumerate(report.comparisons, start=1):
        parts[comparison.title] = external_section(number, comparison, series)
    if report.trained:
        parts["losses"] = losses_section(report.trained, series, side_by_side(report))
    else:
        left_out["losses"] = "no stage of distillation was run: `mmmamba distill --data FILE`"
    return parts


def _run_section(report: ReportData, has_answers: bool) -> Markup:
    """The border between results that were measured elsewhere and the run's own."""
    products = [product for run in report.runs for product in run.products.values()]
    days = sorted({product.created[:10] for product in products})
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    listed = "; ".join(f"{run.title}: {', '.join(run.products)}" for run in report.runs)
    answers = ", but the answers to the pictures are of this run" if has_answers else ""
    beside = ", and in those that it is compared with" if report.runs[1:] else ""
    return section(
        "run",
        "What was done in this run",
        paragraph(
            f"The scores and times above were measured elsewhere, as each figure says{answers}. "
            f"What follows was made and measured in this run{beside}, on {when}."
        ),
        paragraph(f"Models of each run, in the order in which they were made: {listed}."),
        None if (together := side_by_side(report)) is None else paragraph(together),
    )


def _fidelity(run: RunContents) -> RunFidelity | None:
    """The similarities of a run's products, of the linear ones if there are any.

    A hybrid's restored attention equals the teacher's by construction.
    """
    if run.mixers is None:
        return None
    layers = run.mixers.layers
    linear = {
        name: found
        for name, found in layers.items()
        if name in run.products and not run.products[name].attention_layers
    }
    recipe = next(iter(run.recipes.values()), None)
    begun = "" if recipe is None else f" (mixers begin as: {recipe.mixer.init})"
    title = f"{run.title}{begun}"
    shown = {run.label(name): found for name, found in (linear or layers).items()}
    return RunFidelity(title, run.mixers.inputs, shown)


def _title(report: ReportData) -> str:
    students = [name for name, one in report.main.products.items() if one.final]
    teacher = report.main.teacher
    against = "" if teacher is None else f" against {teacher_name(teacher.path)}"
    return f"{', '.join(students) or ', '.join(report.main.products)}{against}"


def _head(title: str, note: str | None, summary: Sequence[str], mixers: Sequence[str]) -> Markup:
    """Title, the result in sentences, and what the page is."""
    return tag(
        "header",
        paragraph(MARK, class_="small"),
        tag("h1", title),
        # No line ends between a number and its percent sign.
        *(
            paragraph(tag("strong", sentence.replace(" %", "\u00a0%")), class_="lead")
            for sentence in summary
        ),
        about_paragraph(mixers),
        None if note is None else paragraph(note),
    )


def _left_out(reasons: dict[str, str], remarks: Sequence[str]) -> Markup:
    items: list[Child] = [
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
