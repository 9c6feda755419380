"""Scales, ticks and number formats of charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` to coordinates from `begin` to `end`, linearly or by log."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, here = (_log(v) if self.log else v for v in (self.low, self.high, value))
        share = (here - low) / (high - low) if high != low else 0.5
        return self.begin + share * (self.end - self.begin)

    def ticks(self, wanted: int = 4) -> list[float]:
        """Round values within the scale, about `wanted` of them."""
        if self.log:
            return _decades(self.low, self.high)
        step = _round_step((self.high - self.low) / max(1, wanted))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def axis_range(values: Sequence[float], *, log: bool = False) -> tuple[float, float]:
    """A range with round ends that contains all values, and zero unless `log`."""
    low, high = min(values), max(values)
    if log:
        bottom, top = _round_below(low), _round_above(high)
        return (bottom, top) if top > bottom else (bottom / 2, top * 2)
    step = _round_step((high - min(0.0, low)) / 4 or 1.0)
    return min(0.0, math.floor(low / step) * step), math.ceil(high / step - 1e-9) * step or 1.0


def _round_below(value: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is at most a positive value."""
    return max(step for step in _steps(value) if step <= value * (1 + 1e-9))


def _round_above(value: float) -> float:
    return min(step for step in _steps(value) if step >= value * (1 - 1e-9))


def _steps(value: float) -> list[float]:
    power = 10.0 ** math.floor(math.log10(value))
    return [power * factor for factor in (1, 2, 5, 10)]


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; only the powers if there are more than three."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [
        factor * 10.0**power
        for power in powers
        for factor in ((1, 2, 5) if len(powers) <= 3 else (1,))
    ]
    return [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next((power * f for f in (1, 2, 2.5, 5, 10) if power * f >= rough - 1e-12), power)


def _log(value: float) -> float:
    return math.log10(value)


def format_short(value: float) -> str:
    """Format a number as a tick or label: three significant digits, M and G from a million on."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    for limit, letter in ((1e9, "G"), (1e6, "M")):
        if size >= limit:
            return f"{value / limit:.3g}{letter}"
    if size and size < 1e-3:
        return f"{value:.0e}"
    return f"{value:,.0f}" if size >= 100 else f"{value:.3g}"


def format_context(value: float) -> str:
    """Format a number of tokens: multiples of 1,024 as K."""
    whole = value >= 1024 and value % 1024 == 0
    return f"{value / 1024:g}K" if whole else format_short(value)
