"""What leads a page: measured results given to the report, else the run's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mmmamba_cli.evaluate.result import Result
from mmmamba_cli.profiling import Profile
from mmmamba_cli.reporting.html import Markup, join_markup, tag
from mmmamba_cli.reporting.lead import EXAMPLE_CATEGORIES, EXAMPLE_QUESTIONS, Lead
from mmmamba_cli.reporting.measured_results import MeasuredScores
from mmmamba_cli.reporting.models import ModelDetails, subject_label
from mmmamba_cli.reporting.retention import Kept, kept_in_scores
from mmmamba_cli.reporting.run_contents import ReportData
from mmmamba_cli.reporting.suite_results import SuiteResults
from mmmamba_cli.runs import TEACHER
from mmmamba_cli.runs.provenance import redact_command


def read_lead(
    report: ReportData, suites: Sequence[SuiteResults], details: Mapping[str, ModelDetails]
) -> Lead:
    """The lead of a page, from `report.measured` where that has scores or a profile."""
    kept, source = _measured_scores(report, details)
    if not kept:
        kept, source = _scores_of_run(report, suites), join_markup(("Measured in this run.",))
    profile, profile_source = _profile(report)
    names = [] if profile is None else profile.subjects
    students = list(dict.fromkeys(one.student for one in kept))
    examples, asked_of = [], ""
    for suite in suites:
        examples = suite.examples(
            [TEACHER, *students], categories=EXAMPLE_CATEGORIES, questions=EXAMPLE_QUESTIONS
        )
        if examples:
            asked_of = f" of {suite.name}, with the answers that the models gave in this run"
            break
    return Lead(
        kept,
        source,
        profile,
        profile_source,
        {subject.name: subject_label(subject, report) for subject in names},
        details,
        examples,
        asked_of,
    )


def _measured_scores(
    report: ReportData, details: Mapping[str, ModelDetails]
) -> tuple[list[Kept], Markup]:
    label = _label_by_hash(report)
    teacher = report.main.teacher
    kept: list[Kept] = []
    sources = []
    for name, scores in report.measured.scores:
        found = kept_in_scores(scores, label, None if teacher is None else teacher.content_hash)
        kept += found
        if found:
            sources.append(_source(name, scores))
    return sorted(kept, key=lambda one: _order(details, one.student)), join_markup(sources, " ")


def _order(details: Mapping[str, ModelDetails], student: str) -> int:
    """Linear students before hybrids."""
    known = details.get(student)
    return 0 if known is None or known.attention is None else known.attention


def _label_by_hash(report: ReportData) -> Callable[[Result], str]:
    """A model of a file has the label of the run's model with the same weights, else its name."""
    labels = {one.result.model.content_hash: one.label for one in reversed(report.evaluated)}
    # A product of the main run comes before one of the same weights in another.
    for run in reversed(report.runs):
        labels |= {one.content_hash: run.label(name) for name, one in run.products.items()}
    if report.main.teacher is not None:
        labels[report.main.teacher.content_hash] = TEACHER
    return lambda result: labels.get(result.model.content_hash, result.model.name)


def _source(name: str, scores: MeasuredScores) -> Markup:
    """Where and when a file's scores were measured."""
    when = [
        *([] if scores.date is None else [f"on {scores.date}"]),
        *([] if scores.device is None else [f"on {scores.device}"]),
        f"torch {scores.results[0].versions.get('torch', 'unknown')}",
        f"seed {scores.results[0].seed}",
    ]
    command = None
    if scores.command is not None:
        command = join_markup((", by ", tag("code", redact_command(scores.command))))
    return join_markup((f"Measured {', '.join(when)}", command, f" ({name})."))


def _scores_of_run(report: ReportData, suites: Sequence[SuiteResults]) -> list[Kept]:
    """Retention of the run's evaluated products: of those distilled end to end, if any is."""
    kept = [one for suite in suites for one in suite.kept if one.student in report.main.products]
    done = [one for one in kept if report.main.products[one.student].final]
    return done or kept


def _profile(report: ReportData) -> tuple[Profile | None, str]:
    if report.measured.profiles:
        name, profile = report.measured.profiles[0]
        return profile, name
    return report.main.profile, ""
