"""Differences of two models over the same units, and the section on external comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmmamba_cli.evaluate.bootstrap import NUM_RESAMPLES, difference_interval, intervals
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring import find_rule
from mmmamba_cli.evaluate.scoring.unit_scores import UnitScores, safe_divide
from mmmamba_cli.evaluate.suite import Suite
from mmmamba_cli.reporting.charts import Bar, bars
from mmmamba_cli.reporting.html import Markup, figure, join_markup, paragraph, section, table, tag
from mmmamba_cli.reporting.interval_filter import MIN_UNITS
from mmmamba_cli.reporting.run_contents import ExternalComparison, ModelResult, ReportData


@dataclass(frozen=True)
class ScoreDifference:
    """`one` minus `other` in a metric of a rule, with its 95 % interval (paired bootstrap)."""

    one: str
    other: str
    metric: str
    value: float
    # None if the sample has too few units for one.
    interval: tuple[float, float] | None
    # The sample, for example "448 questions".
    sample: str
    # Whether both gave the same answers, or got the same in every unit.
    is_same: bool = False

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def product_pairs(
    report: ReportData, results: Sequence[ModelResult]
) -> list[tuple[ModelResult, ModelResult]]:
    """Results of products of the main run, each with the product of that name in another run."""
    by_label = {one.label: one for one in results}
    pairs = []
    for name in report.main.products:
        for run in report.runs[1:]:
            one, other = by_label.get(name), by_label.get(run.label(name))
            if one is not None and other is not None:
                pairs.append((one, other))
    return pairs


def score_difference(
    suite: Suite, rows: Sequence[Row], one: ModelResult, other: ModelResult
) -> ScoreDifference | None:
    """Difference by the suite's first rule; None unless both models answered all rows."""
    if not suite.rules or any(
        row.index not in answers for row in rows for answers in (one.answers, other.answers)
    ):
        return None
    rule = find_rule(next(iter(suite.rules.values())))
    said, others = (
        [result.answers[row.index]["prediction"] for row in rows] for result in (one, other)
    )
    left, right = rule(rows, said), rule(rows, others)
    metric = left.headline
    mine, theirs = left.values()[metric], right.values()[metric]
    if mine is None or theirs is None:
        return None
    return ScoreDifference(
        one.label,
        other.label,
        metric,
        mine - theirs,
        difference_interval(left, right, metric, seed=one.result.seed)
        if all(has_interval(result, metric) for result in (one, other))
        else None,
        f"{len(rows):,} questions",
        said == others,
    )


def has_interval(one: ModelResult, metric: str) -> bool:
    """Whether the result has an interval of a metric: one over few pictures was left out."""
    return not one.result.rules or metric in one.result.rules[0].intervals


def difference_sentence(difference: ScoreDifference) -> Markup:
    """The difference in a sentence, with a remark on chance."""
    if difference.is_same:
        both = f"{difference.one} and {difference.other} gave the same answers"
        return join_markup((tag("strong", both), f" ({difference.sample})."))
    if round(difference.value, 1) == 0:
        how = f"{difference.one} and {difference.other} come to the same"
    else:
        more = "above" if difference.value > 0 else "below"
        points = abs(difference.value)
        how = f"{difference.one} is {points:.1f} points {more} {difference.other}"
    if difference.interval is None:
        few = f" in {difference.metric}, over {difference.sample}: too few for an interval."
        return join_markup((tag("strong", how), few))
    verdict = (
        "The interval leaves zero out."
        if difference.significant
        else "The interval includes zero: the difference may be chance."
    )
    low, high = difference.interval
    return join_markup(
        (
            tag("strong", how),
            f" in {difference.metric} (95 % interval, paired over {difference.sample}: "
            f"{low:+.1f} to {high:+.1f}). {verdict}",
        )
    )


def external_differences(comparison: ExternalComparison) -> list[ScoreDifference]:
    """Differences of the pairs that an external comparison names."""
    tallies = {name: _tally(units) for name, units in comparison.models.items()}
    return [
        ScoreDifference(
            one,
            other,
            comparison.metric,
            _share_of(tallies[one]) - _share_of(tallies[other]),
            difference_interval(tallies[one], tallies[other], "share")
            if comparison.units >= MIN_UNITS
            else None,
            f"{comparison.units:,} {comparison.unit}s",
            comparison.models[one] == comparison.models[other],
        )
        for one, other in comparison.compare
    ]


def external_section(
    number: int, comparison: ExternalComparison, series: Mapping[str, int]
) -> Markup:
    """A panel of bars with intervals, and a sentence on each pair."""
    rows = []
    for name, units in comparison.models.items():
        tally = _tally(units)
        interval = intervals(tally)["share"] if comparison.units >= MIN_UNITS else None
        rows.append(Bar(name, _share_of(tally), series[name], interval))
    cells = [
        (
            row.label,
            f"{row.value:.1f}",
            None if row.interval is None else f"{row.interval[0]:.1f} to {row.interval[1]:.1f}",
        )
        for row in rows
    ]
    chart = bars(
        f"{comparison.title}: {comparison.metric}", rows, high=100, show=lambda v: f"{v:.1f}"
    )
    sentences = map(difference_sentence, external_differences(comparison))
    return section(
        f"comparison-{number}",
        f"{comparison.title}: {', '.join(comparison.models)}",
        paragraph(
            f"{comparison.metric[:1].upper()}{comparison.metric[1:]}. Whiskers are 95 % intervals "
            f"over {NUM_RESAMPLES:,} seeded draws of whole {comparison.unit}s, "
            f"{comparison.units:,} of them."
            if comparison.units >= MIN_UNITS
            else f"{comparison.metric[:1].upper()}{comparison.metric[1:]}, over "
            f"{comparison.units:,} {comparison.unit}s: too few for intervals."
        ),
        *(paragraph(one, class_="found") for one in sentences),
        None if comparison.note is None else paragraph(comparison.note),
        figure(
            tag("div", tag("div", chart), class_="panels"),
            "Higher is better.",
            table(comparison.metric, ("", "share, %", "95 %"), cells),
        ),
    )


def _tally(units: Sequence[tuple[float, float]]) -> UnitScores:
    numbers = np.array(units, dtype=np.float64)
    return UnitScores(numbers, _share, ("",) * len(units), {})


def _share_of(tally: UnitScores) -> float:
    value = tally.values()["share"]
    assert value is not None
    return value


def _share(sums: np.ndarray) -> dict[str, np.ndarray]:
    return {"share": 100 * safe_divide(sums[..., 0], sums[..., 1])}
