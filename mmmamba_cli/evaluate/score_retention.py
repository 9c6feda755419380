"""Retention of a teacher's scores: the student's over the teacher's, as it is and above chance."""

from __future__ import annotations

from collections.abc import Iterable

from mmmamba_cli.evaluate.bootstrap import ratio_interval
from mmmamba_cli.evaluate.result import DEFAULT_SEED, Interval, JsonModel, ScoredSuite
from mmmamba_cli.evaluate.scoring.chance import above_chance
from mmmamba_cli.evaluate.scoring.unit_scores import UnitScores


class Retention(JsonModel):
    """The student's score relative to the teacher's, by one rule.

    `ratio` is None if the teacher's score is 0 or either score is None. `above_chance` is the ratio
    of both scores above `chance`, the expected score of random guesses; None if that is unknown, or
    if the teacher is not better.
    """

    suite: str
    rule: str
    metric: str
    student: str
    teacher: str
    student_value: float | None
    teacher_value: float | None
    ratio: float | None
    interval: Interval | None
    rows: int
    seed: int
    chance: float | None = None
    above_chance: float | None = None
    above_chance_interval: Interval | None = None


def retention(
    suite: str,
    rule: str,
    student: tuple[str, UnitScores],
    teacher: tuple[str, UnitScores],
    rows: int,
    seed: int,
) -> Retention:
    """Student over teacher by a rule's headline metric; both answered the same rows."""
    metric = teacher[1].headline
    ours, theirs = student[1].values()[metric], teacher[1].values()[metric]
    ratio = ours / theirs if ours is not None and theirs else None
    chance = teacher[1].chance.get(metric)
    above = None
    if ours is not None and theirs is not None and chance is not None:
        above = above_chance(ours, theirs, chance)
    return Retention(
        suite=suite,
        rule=rule,
        metric=metric,
        student=student[0],
        teacher=teacher[0],
        student_value=ours,
        teacher_value=theirs,
        ratio=ratio,
        interval=None
        if ratio is None
        else ratio_interval(student[1], teacher[1], metric, seed=seed),
        rows=rows,
        seed=seed,
        chance=chance,
        above_chance=above,
        above_chance_interval=None
        if above is None or chance is None
        else ratio_interval(student[1], teacher[1], metric, seed=seed, origin=chance),
    )


def compare_with_teacher(
    students: Iterable[ScoredSuite], teacher: ScoredSuite, seed: int = DEFAULT_SEED
) -> list[Retention]:
    """The retention of each student by each rule of the suite."""
    suite, name = teacher.result.suite, teacher.result.model.name
    return [
        retention(
            suite,
            rule,
            (student.result.model.name, student.unit_scores[rule]),
            (name, scores),
            len(teacher.rows),
            seed,
        )
        for student in students
        for rule, scores in teacher.unit_scores.items()
    ]
