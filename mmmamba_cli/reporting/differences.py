"""Two models that answered the same questions: how far apart they are, drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmmamba_cli.evaluate.bootstrap import difference_interval
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring import find_rule
from mmmamba_cli.evaluate.suite import Suite
from mmmamba_cli.reporting.html import Markup, joined, tag
from mmmamba_cli.reporting.run_contents import Evaluated, Material


@dataclass(frozen=True)
class Difference:
    """`one` less `other` by a metric of a rule, and its 95 % interval."""

    one: str
    other: str
    metric: str
    value: float
    interval: tuple[float, float]
    # Of what: "448 questions".
    asked: str

    @property
    def sure(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval[0] > 0 or self.interval[1] < 0


def pairs(material: Material, results: Sequence[Evaluated]) -> list[tuple[Evaluated, Evaluated]]:
    """Products of the run, each with that of the same name in every other run."""
    by_label = {one.label: one for one in results}
    found = []
    for name in material.main.products:
        for run in material.runs[1:]:
            one, other = by_label.get(name), by_label.get(run.label(name))
            if one is not None and other is not None:
                found.append((one, other))
    return found


def difference(
    suite: Suite, rows: Sequence[Row], one: Evaluated, other: Evaluated
) -> Difference | None:
    """By the suite's first rule; None if one of them was not asked every row, or none scores."""
    if not suite.rules or any(
        row.index not in answers for row in rows for answers in (one.answers, other.answers)
    ):
        return None
    rule = find_rule(next(iter(suite.rules.values())))
    left, right = (
        rule(rows, [found.answers[row.index]["prediction"] for row in rows])
        for found in (one, other)
    )
    metric = left.headline
    mine, theirs = left.values()[metric], right.values()[metric]
    if mine is None or theirs is None:
        return None
    return Difference(
        one.label,
        other.label,
        metric,
        mine - theirs,
        difference_interval(left, right, metric, seed=one.result.seed),
        f"{len(rows):,} questions",
    )


def sentence(found: Difference) -> Markup:
    """The difference in a sentence, and whether it may be chance."""
    if round(found.value, 1) == 0:
        how = f"{found.one} and {found.other} come to the same"
    else:
        more = "above" if found.value > 0 else "below"
        how = f"{found.one} is {abs(found.value):.1f} points {more} {found.other}"
    verdict = (
        "The interval leaves zero out."
        if found.sure
        else "The interval holds zero: on these questions it may be chance."
    )
    return joined(
        (
            tag("strong", how),
            f" in {found.metric} (95 % interval over {found.asked}, drawn together: "
            f"{found.interval[0]:+.1f} to {found.interval[1]:+.1f}). {verdict}",
        )
    )
