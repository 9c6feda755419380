"""Text plots: a layer plan as a row of marks, a series as a sparkline; layers and byte sizes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Marks:
    """The characters of a layer plan and of a sparkline."""

    attention: str
    linear: str
    border: str
    bars: str
    gap: str


UNICODE = Marks("■", "·", "│", BARS, "×")
ASCII = Marks("#", ".", "|", "_.-=+*%@", "x")


def marks_for(encoding: str | None) -> Marks:
    """The marks that `encoding` can represent."""
    try:
        "".join((UNICODE.attention, UNICODE.border, UNICODE.bars)).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


def layer_plan(
    num_layers: int, attention: Collection[int], marks: Marks = UNICODE, embedding: int = 0
) -> str:
    """One mark per layer, with a border after the `embedding` layers of the first stack."""
    row = [marks.attention if i in attention else marks.linear for i in range(num_layers)]
    if 0 < embedding < num_layers:
        row.insert(embedding, marks.border)
    return "".join(row)


def legend(marks: Marks = UNICODE) -> str:
    return f"{marks.attention} attention  {marks.linear} linear"


def sparkline(values: Sequence[float], marks: Marks = UNICODE, width: int = 24) -> str:
    """One bar per value between the minimum and maximum, a cross for values that are not finite.

    More than `width` values are subsampled, keeping the first and the last.
    """
    if len(values) > width:
        step = (len(values) - 1) / (width - 1)
        values = [values[round(i * step)] for i in range(width)]
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return marks.gap * len(values)
    # Scaled by the largest value, because the difference of two huge ones could overflow.
    unit = max(map(abs, known)) or 1.0
    low, high = min(known) / unit, max(known) / unit
    top = len(marks.bars) - 1
    return "".join(
        marks.bars[round(top * (value / unit - low) / (high - low)) if high > low else 0]
        if math.isfinite(value)
        else marks.gap
        for value in values
    )


def format_bytes(nbytes: float) -> str:
    """Format a number of bytes in B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.2f} GiB"


def format_ranges(layers: Iterable[int]) -> str:
    """Format 0, 1, 2, 3, 6 as `0-3, 6`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
