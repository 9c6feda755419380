"""Retention: what a student keeps of its teacher's score, as it is and above chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.evaluate import find_suite
from mmmamba_cli.evaluate.bootstrap import ratio_interval
from mmmamba_cli.evaluate.result import Interval, Result, RuleResult
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring import find_rule
from mmmamba_cli.evaluate.scoring.chance import YES_NO_CHANCE, above_chance
from mmmamba_cli.evaluate.scoring.unit_scores import UnitScores
from mmmamba_cli.evaluate.suite import Suite
from mmmamba_cli.reporting.html import Child, Markup, table
from mmmamba_cli.reporting.measured_results import MeasuredScores
from mmmamba_cli.reporting.run_contents import ModelResult
from mmmamba_cli.runs import TEACHER

# The metrics that YES_NO_CHANCE holds for beside the categories' own accuracies.
ACCURACIES = ("mean", "accuracy")


@dataclass(frozen=True)
class Share:
    """A score or a retention, in percent, and its 95 % interval."""

    value: float
    interval: Interval | None = None

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.1f}"
        low, high = self.interval
        return f"{self.value:.1f} ({low:.1f} to {high:.1f})"


@dataclass(frozen=True)
class Kept:
    """A student's and its teacher's score in a suite, and the retention in percent.

    `above` is that of the score above `chance`; None if chance is unknown or the teacher is not
    above it.
    """

    suite: str
    title: str
    metric: str
    questions: int
    student: str
    teacher: str
    student_score: Share
    teacher_score: Share
    chance: float | None
    raw: Share | None
    above: Share | None

    @property
    def headline(self) -> Share | None:
        """The retention above chance where chance is known, else that of the score."""
        return self.raw if self.chance is None else self.above


def chance_of(suite: Suite | None, metric: str, part: RuleResult) -> float | None:
    """The expected score of random answers by a metric, None if it is not known.

    Results of older versions do not name it; a yes/no suite's accuracies are known all the same.
    """
    if metric in part.chance:
        return part.chance[metric]
    if suite is None or suite.choices != ("Yes", "No"):
        return None
    return YES_NO_CHANCE if metric in (*ACCURACIES, *part.categories) else None


def known_suite(name: str) -> Suite | None:
    """A suite that is installed here, None for another."""
    try:
        return find_suite(name)
    except MmmambaError:
        return None


def kept_in_run(
    suite: Suite | None,
    rows: Sequence[Row],
    results: Sequence[ModelResult],
    teacher: ModelResult,
) -> list[Kept]:
    """Retention of each result of a run by the rule of the teacher's result.

    The intervals are paired, over `rows`; without rows, or without an answer to each, there are
    none.
    """
    if not teacher.result.rules:
        return []
    taught = teacher.result.rules[0]
    rule = suite.rules.get(taught.rule) if suite is not None and rows else None
    theirs = None if rule is None else _unit_scores(rule, rows, teacher)
    found = []
    for one in results:
        ours = one.result.rule(taught.rule)
        if one is teacher or ours is None:
            continue
        chance = chance_of(suite, taught.metric, taught)
        kept = _kept(one.result, ours, taught, (one.label, teacher.label), chance)
        mine = None if rule is None else _unit_scores(rule, rows, one)
        # Where the scores have no interval, there are too few pictures for one.
        known = taught.metric in ours.intervals and taught.metric in taught.intervals
        if kept is not None and mine is not None and theirs is not None and known:
            kept = _with_intervals(kept, mine, theirs, one.result.seed)
        found += [] if kept is None else [kept]
    return found


def _unit_scores(rule: str, rows: Sequence[Row], one: ModelResult) -> UnitScores | None:
    """A model's scores by unit, None if it did not answer every row."""
    if any(row.index not in one.answers for row in rows):
        return None
    return find_rule(rule)(rows, [one.answers[row.index]["prediction"] for row in rows])


def _with_intervals(kept: Kept, ours: UnitScores, theirs: UnitScores, seed: int) -> Kept:
    def interval(chance: float) -> Interval | None:
        return _percent(ratio_interval(ours, theirs, kept.metric, seed=seed, origin=chance))

    return _replace_intervals(
        kept, interval(0.0), None if kept.chance is None else interval(kept.chance)
    )


def _replace_intervals(kept: Kept, raw: Interval | None, above: Interval | None) -> Kept:
    return replace(
        kept,
        raw=None if kept.raw is None else Share(kept.raw.value, raw),
        above=None if kept.above is None else Share(kept.above.value, above),
    )


def _kept(
    result: Result,
    ours: RuleResult,
    theirs: RuleResult,
    labels: tuple[str, str],
    chance: float | None,
) -> Kept | None:
    """Retention without intervals; None if either score is unknown."""
    metric = theirs.metric
    mine, taught = ours.metrics.get(metric), theirs.metrics.get(metric)
    if mine is None or taught is None:
        return None
    above = None if chance is None else above_chance(mine, taught, chance)
    return Kept(
        result.suite,
        result.title,
        metric,
        result.data.used,
        *labels,
        Share(mine, ours.intervals.get(metric)),
        Share(taught, theirs.intervals.get(metric)),
        chance,
        Share(100 * mine / taught) if taught else None,
        None if above is None else Share(100 * above),
    )


def kept_in_scores(
    measured: MeasuredScores, label: Callable[[Result], str], teacher_hash: str | None
) -> list[Kept]:
    """Retention of each student in a file of scores, by suite.

    The teacher is the model with the hash of the run's teacher, or one that the file calls so.
    """
    named = {part.teacher for part in measured.retention} | {TEACHER}
    found = []
    for suite in dict.fromkeys(one.suite for one in measured.results):
        results = [one for one in measured.results if one.suite == suite and one.rules]
        teacher = next(
            (
                one
                for one in results
                if one.model.content_hash == teacher_hash or one.model.name in named
            ),
            None,
        )
        if teacher is None:
            continue
        for one in results:
            ours = one.rule(teacher.rules[0].rule)
            if one is teacher or ours is None or not one.data.same_questions(teacher.data):
                continue
            chance = chance_of(known_suite(suite), teacher.rules[0].metric, teacher.rules[0])
            labels = (label(one), label(teacher))
            kept = _kept(one, ours, teacher.rules[0], labels, chance)
            if kept is not None:
                raw, above = _intervals_in(measured, one, ours.rule)
                found.append(_replace_intervals(kept, raw, above))
    return found


def _intervals_in(
    measured: MeasuredScores, result: Result, rule: str
) -> tuple[Interval | None, Interval | None]:
    """The intervals of raw and above-chance retention that a file has, in percent."""
    wanted = (result.suite, rule, result.model.name)
    for one in measured.retention:
        if (one.suite, one.rule, one.student) == wanted:
            return _percent(one.interval), _percent(one.above_chance_interval)
    return None, None


def _percent(interval: Interval | None) -> Interval | None:
    return None if interval is None else (100 * interval[0], 100 * interval[1])


def retention_table(title: str, kept: Sequence[Kept]) -> Markup:
    """Scores and retention of students, with chance."""
    rows: list[tuple[Child, ...]] = []
    for one in kept:
        rows.append(
            (
                one.student,
                str(one.student_score),
                str(one.teacher_score),
                None if one.chance is None else f"{one.chance:g}",
                None if one.raw is None else str(one.raw),
                None if one.above is None else str(one.above),
            )
        )
    heading = (
        "student",
        "score",
        "teacher's score",
        "chance",
        "kept of the score, %",
        "kept above chance, %",
    )
    return table(title, heading, rows, words=True)
