"""Intervals that rest on too few pictures to be read are left out of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mmmamba_cli.evaluate.result import RuleResult
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.reporting.run_contents import ModelResult

# With fewer units the draws of a bootstrap repeat each other: often all are equal, and the interval
# has no width.
MIN_UNITS = 5
# The metric that gives each category the same weight: it is no better known than its smallest one.
MEAN = "mean"


def without_short_intervals(one: ModelResult, rows: Sequence[Row]) -> ModelResult:
    """A result without the intervals that rest on fewer than MIN_UNITS pictures.

    `rows` are the questions that were asked; if they are not known, the number of questions bounds
    that of pictures.
    """
    # A picture may be in several categories.
    total = len({row.unit for row in rows}) if rows else None
    rules = tuple(_reduced(part, _units(part, rows), total) for part in one.result.rules)
    return replace(one, result=one.result.model_copy(update={"rules": rules}))


def _reduced(part: RuleResult, units: Mapping[str, int], total: int | None) -> RuleResult:
    if not units:
        return part
    whole = sum(units.values()) if total is None else total
    known = {**dict.fromkeys(part.intervals, whole), MEAN: min(units.values()), **units}
    kept = {name: span for name, span in part.intervals.items() if known[name] >= MIN_UNITS}
    return part.model_copy(update={"intervals": kept})


def _units(part: RuleResult, rows: Sequence[Row]) -> dict[str, int]:
    """Pictures by category."""
    if not rows:
        counts = {name: one.get("rows") for name, one in part.categories.items()}
        return {name: int(count) for name, count in counts.items() if count is not None}
    seen: dict[str, set[str]] = {}
    for row in rows:
        seen.setdefault(row.category, set()).add(row.unit)
    return {name: len(found) for name, found in seen.items()}


def lacks_intervals(parts: Sequence[RuleResult]) -> bool:
    """Whether a score of the parts has no interval."""
    return any(
        value is not None and name not in part.intervals
        for part in parts
        for name, value in part.metrics.items()
    )
