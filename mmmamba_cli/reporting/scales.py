"""Numbers to places on a picture, and the ticks between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Values `low` to `high` onto coordinates `begin` to `end`; by their logarithms if `log`."""

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
        """Round values inside the scale, about as many as `wanted`."""
        if self.log:
            return _decades(self.low, self.high)
        step = _round_step((self.high - self.low) / max(1, wanted))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def around(values: Sequence[float], *, log: bool = False) -> tuple[float, float]:
    """A range that holds all values with round ends; from zero on unless `log`."""
    low, high = min(values), max(values)
    if log:
        bottom, top = _round_below(low), _round_above(high)
        return (bottom, top) if top > bottom else (bottom / 2, top * 2)
    step = _round_step((high - min(0.0, low)) / 4 or 1.0)
    return min(0.0, math.floor(low / step) * step), math.ceil(high / step - 1e-9) * step or 1.0


def _round_below(value: float) -> float:
    """The next of 1, 2 and 5 times a power of ten, at most a positive value."""
    return max(step for step in _steps(value) if step <= value * (1 + 1e-9))


def _round_above(value: float) -> float:
    return min(step for step in _steps(value) if step >= value * (1 - 1e-9))


def _steps(value: float) -> list[float]:
    power = 10.0 ** math.floor(math.log10(value))
    return [power * factor for factor in (1, 2, 5, 10)]


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; only the powers where these are many."""
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


def short(value: float) -> str:
    """A number as a tick or label: three digits that say something, thousands with a letter."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    if size and size < 1e-3:
        return f"{value:.0e}"
    return f"{value:,.0f}" if size >= 100 else f"{value:.3g}"
