"""Scores of the finished cells of a plan on one suite, and their replicates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mmmamba_cli.ablation.answers import Questions, read_questions
from mmmamba_cli.ablation.cell_record import CellRecord
from mmmamba_cli.ablation.plan import TEACHER_ARM, SuiteUse
from mmmamba_cli.ablation.statistics import Difference, paired_difference, replicates
from mmmamba_cli.evaluate.scoring import UnitScores
from mmmamba_cli.evaluate.scoring.chance import above_chance


class SuiteScores:
    """The scores of all finished cells on one suite, and their replicates."""

    def __init__(self, use: SuiteUse, out: Path, records: Mapping[str, CellRecord]):
        self.use = use
        self.values: dict[str, float] = {}
        # All metrics of each cell, and the names of those that are a category's.
        self.metrics: dict[str, Mapping[str, float | None]] = {}
        self.categories: tuple[str, ...] = ()
        self.metric = ""
        self._questions: dict[str, str] = {}
        self._groups: dict[str, dict[str, UnitScores]] = {}
        self._replicates: dict[str, dict[str, np.ndarray]] = {}
        opened: dict[str, Questions] = {}
        for name, record in records.items():
            suite = record.suite(use.title)
            rule = None if suite is None else suite.rule(use.rule)
            if suite is None or rule is None or rule.metrics[rule.metric] is None:
                continue
            digest = suite.questions
            if digest not in opened:
                opened[digest] = read_questions(out, suite.suite, digest)
            scores = opened[digest].scores(rule.scoring, suite.answers)
            self.metrics[name] = metrics = scores.values()
            value = metrics[rule.metric]
            assert value is not None
            self.metric, self.values[name] = rule.metric, value
            self.categories = tuple(one for one in scores.categories if one in metrics)
            self._questions[name] = digest
            self._groups.setdefault(digest, {})[name] = scores

    @property
    def chance(self) -> float | None:
        """The score of a blind guess, by the plan or the rule; None if it is not known."""
        return self.use.chance if self.use.chance is not None else self.chance_of(self.metric)

    def chance_of(self, metric: str) -> float | None:
        """The value that the rule gives a blind guess in a metric; None if it is not known."""
        known = [
            one.chance.get(metric) for group in self._groups.values() for one in group.values()
        ]
        return known[0] if known else None

    def mean(self, cells: Iterable[str], metric: str | None = None) -> float | None:
        """The mean of a metric over cells, by default of the headline; None without any value."""
        name = metric or self.metric
        found = [self.metrics[cell].get(name) for cell in cells if cell in self.metrics]
        given = [value for value in found if value is not None]
        return float(np.mean(given)) if given else None

    def difference(self, pairs: Sequence[tuple[str, str]]) -> Difference | None:
        """The difference over pairs of cells, each (cell, base cell); None for other questions."""
        same = [(a, b) for a, b in pairs if self._questions[a] == self._questions[b]]
        if not same:
            return None
        values = [self.values[a] - self.values[b] for a, b in same]
        drawn = [self._drawn(a) - self._drawn(b) for a, b in same]
        return paired_difference(values, drawn)

    def _drawn(self, name: str) -> np.ndarray:
        digest = self._questions[name]
        if digest not in self._replicates:
            self._replicates[digest] = replicates(self._groups[digest], self.metric)
        return self._replicates[digest][name]


def percent_of_teacher(
    score: float | None, teacher: float | None, chance: float | None = 0.0
) -> float | None:
    """Percent of the teacher's score above `chance`; None if one of them is not known."""
    if score is None or teacher is None or chance is None:
        return None
    ratio = above_chance(score, teacher, chance)
    return None if ratio is None else 100 * ratio


def cells_by_arm(records: Mapping[str, CellRecord]) -> dict[str, list[str]]:
    """Names of the cells of each arm; the teacher's arm has one."""
    found: dict[str, list[str]] = {TEACHER_ARM: []}
    for name, record in records.items():
        found.setdefault(record.arm, []).append(name)
    return found
