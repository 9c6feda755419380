"""The results of one suite with its questions, and the sections that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.evaluate import Result, Suite
from mmmamba_cli.evaluate.result import CHOSEN_BY_LIKELIHOOD
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.vlmeval_table import VLMEvalTable
from mmmamba_cli.reporting.comparisons import ScoreDifference, product_pairs, score_difference
from mmmamba_cli.reporting.examples import Example, find_examples, open_table
from mmmamba_cli.reporting.html import Markup
from mmmamba_cli.reporting.interval_filter import without_short_intervals
from mmmamba_cli.reporting.retention import Kept, kept_in_run, known_suite
from mmmamba_cli.reporting.run_contents import ModelResult, ReportData
from mmmamba_cli.reporting.scores import accuracy_section, examples_section
from mmmamba_cli.runs import TEACHER


@dataclass(frozen=True)
class SuiteResults:
    """The comparable results of a suite. `problem` tells why its questions are not there.

    `others` are results over other questions, or by likelihood among generated ones; not shown.
    """

    name: str
    results: Sequence[ModelResult]
    others: Sequence[ModelResult]
    suite: Suite | None
    table: VLMEvalTable | None = None
    rows: Sequence[Row] = ()
    problem: str = ""

    @property
    def teacher(self) -> ModelResult | None:
        return next((one for one in self.results if one.label == TEACHER), None)

    @property
    def kept(self) -> list[Kept]:
        """Retention of all models against the teacher; empty if it was not asked."""
        teacher = self.teacher
        if teacher is None:
            return []
        return kept_in_run(self.suite, self.rows, self.results, teacher)

    def differences(self, report: ReportData) -> list[ScoreDifference]:
        """Differences of products of one name in different runs."""
        if self.suite is None or not self.rows:
            return []
        compared = [
            score_difference(self.suite, self.rows, one, other)
            for one, other in product_pairs(report, self.results)
        ]
        return [one for one in compared if one is not None]

    def examples(
        self, labels: Sequence[str] = (), *, categories: int | None = None, questions: int = 4
    ) -> list[Example]:
        """Pictures with the answers of the models, or of those of `labels`."""
        if self.suite is None or self.table is None:
            return []
        asked = [one for one in self.results if one.answers and (one.label in labels or not labels)]
        if labels:
            asked.sort(key=lambda one: labels.index(one.label))
        if not asked:
            return []
        return find_examples(
            self.suite, self.table, self.rows, asked, categories=categories, questions=questions
        )


def suite_results(report: ReportData, data: Path | None) -> list[SuiteResults]:
    """The results of each suite. `data` is the folder of the suites' tables."""
    found = []
    for name in dict.fromkeys(one.result.suite for one in report.evaluated):
        results = [one for one in report.evaluated if one.result.suite == name]
        # The largest comparable group is shown.
        groups = [
            [one for one in results if _is_comparable(one.result, first.result)]
            for first in results
        ]
        alike = max(groups, key=len)
        others = [one for one in results if one not in alike]
        try:
            one = SuiteResults(name, alike, others, *open_table(alike, data))
        except MmmambaError as error:
            one = SuiteResults(name, alike, others, known_suite(name), problem=str(error))
        shown = [without_short_intervals(result, one.rows) for result in alike]
        found.append(replace(one, results=shown))
    return found


def _is_comparable(one: Result, other: Result) -> bool:
    """Whether both have answers to the same questions, generated or chosen by likelihood."""
    ways = {
        str(result.settings.get("answers", "")).startswith(CHOSEN_BY_LIKELIHOOD)
        for result in (one, other)
    }
    return one.data.same_questions(other.data) and len(ways) == 1


def suite_sections(
    one: SuiteResults,
    differences: Sequence[ScoreDifference],
    series: Mapping[str, int],
    left_out: dict[str, str],
) -> dict[str, Markup]:
    """Scores and examples of a suite; adds the parts that it has not to `left_out`."""
    # The order of the legend.
    one = replace(one, results=sorted(one.results, key=lambda result: series[result.label]))
    parts = {
        f"scores, {one.name}": accuracy_section(
            one.suite, one.results, series, differences, one.kept
        )
    }
    examples = one.examples()
    if examples and one.suite is not None:
        parts[f"examples, {one.name}"] = examples_section(one.suite, examples, series)
    else:
        reason = one.problem or "no question was answered by every model"
        left_out[f"examples, {one.name}"] = reason
    if one.others:
        labels = ", ".join(other.label for other in one.others)
        left_out[f"some scores, {one.name}"] = (
            f"asked other questions than the others, or answered in another way: {labels}"
        )
    return parts
