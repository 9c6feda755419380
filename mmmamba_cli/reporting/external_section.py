"""The section on comparisons that were measured unit by unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmmamba_cli.evaluate.bootstrap import DRAWS, difference_interval, intervals
from mmmamba_cli.evaluate.scoring.metrics import Tally, divide
from mmmamba_cli.reporting.charts import Bar, bars
from mmmamba_cli.reporting.differences import Difference, sentence
from mmmamba_cli.reporting.external_comparisons import Comparison
from mmmamba_cli.reporting.html import Markup, figure, paragraph, section, table, tag


def differences(comparison: Comparison) -> list[Difference]:
    """Of the pairs that the file names, units drawn together."""
    tallies = {name: _tally(units) for name, units in comparison.models.items()}
    return [
        Difference(
            one,
            other,
            comparison.metric,
            _value(tallies[one]) - _value(tallies[other]),
            difference_interval(tallies[one], tallies[other], "share"),
            f"{comparison.units:,} {comparison.unit}s",
        )
        for one, other in comparison.compare
    ]


def comparison_section(number: int, comparison: Comparison, series: Mapping[str, int]) -> Markup:
    """One panel of bars, with intervals, and the sentences on the pairs."""
    rows = []
    for name, units in comparison.models.items():
        tally = _tally(units)
        interval = intervals(tally)["share"]
        rows.append(Bar(name, _value(tally), series[name], interval))
    cells = [
        (row.label, f"{row.value:.1f}", f"{row.interval[0]:.1f} to {row.interval[1]:.1f}")
        for row in rows
        if row.interval is not None
    ]
    picture = bars(
        f"{comparison.title}: {comparison.metric}", rows, high=100, show=lambda v: f"{v:.1f}"
    )
    return section(
        f"comparison-{number}",
        f"{comparison.title}: {', '.join(comparison.models)}",
        paragraph(
            f"{comparison.metric}. Whiskers are 95% intervals over {DRAWS:,} seeded draws of "
            f"whole {comparison.unit}s, {comparison.units:,} of them."
        ),
        *(paragraph(sentence(one), class_="found") for one in differences(comparison)),
        figure(
            tag("div", tag("div", picture), class_="panels"),
            "Higher is better.",
            table(comparison.metric, ("", "share, %", "95 %"), cells),
        ),
    )


def _tally(units: Sequence[tuple[float, float]]) -> Tally:
    numbers = np.array(units, dtype=np.float64)
    return Tally(numbers, _share, ("",) * len(units), {})


def _value(tally: Tally) -> float:
    value = tally.values()["share"]
    assert value is not None
    return value


def _share(sums: np.ndarray) -> dict[str, np.ndarray]:
    return {"share": 100 * divide(sums[..., 0], sums[..., 1])}
