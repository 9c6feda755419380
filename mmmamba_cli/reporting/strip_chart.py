"""A strip of points for each row over a common logarithmic axis, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmmamba_cli.reporting.chart_scales import Scale, axis_range, format_short
from mmmamba_cli.reporting.charts import RIGHT, WIDTH, svg, x_axis
from mmmamba_cli.reporting.html import Markup, tag
from mmmamba_cli.reporting.series_styles import MARKER_RADIUS, fill_class, stroke_class

# Pixels.
ROW_HEIGHT, LABEL_WIDTH, TOP, BOTTOM = 19, 64, 8, 36


@dataclass(frozen=True)
class Strip:
    """A row: positive points, filled, and earlier ones, hollow; or a note in their place."""

    label: str
    points: tuple[float, ...]
    before: tuple[float, ...] = ()
    note: str | None = None


def strips(
    title: str,
    rows: Sequence[Strip],
    *,
    x_name: str,
    series: int,
    show: Callable[[float], str] = format_short,
) -> Markup:
    """Points that are not finite are left out. Raises `ValueError` without any point."""
    values = [value for row in rows for value in (*row.points, *row.before) if _drawn(value)]
    if not values:
        raise ValueError(f"{title}: there is nothing to draw")
    x = Scale(*axis_range(values, log=True), LABEL_WIDTH, WIDTH - RIGHT, log=True)
    bottom = TOP + ROW_HEIGHT * len(rows)
    parts = [*x_axis(x, bottom, TOP, show=show)]
    middle = (LABEL_WIDTH + WIDTH - RIGHT) / 2
    parts.append(tag("text", x_name, x=middle, y=bottom + 32, class_="tick", text_anchor="middle"))
    for number, row in enumerate(rows):
        parts.append(_strip(row, x, TOP + ROW_HEIGHT * (number + 0.5), series))
    return svg(title, _described(rows, x_name, show), bottom + BOTTOM, parts)


def _drawn(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _strip(row: Strip, x: Scale, y: float, series: int) -> Markup:
    label = tag("text", row.label, x=LABEL_WIDTH - 8, y=y + 4, class_="tick", text_anchor="end")
    if row.note is not None:
        return tag("g", label, tag("text", row.note, x=LABEL_WIDTH, y=y + 4, class_="value"))
    hollow, filled = f"hollow {stroke_class(series)}", fill_class(series)
    marks = [(value, hollow) for value in row.before] + [(value, filled) for value in row.points]
    dots = (
        tag("circle", cx=x(value), cy=y, r=MARKER_RADIUS, class_=look)
        for value, look in marks
        if _drawn(value)
    )
    return tag("g", label, *dots)


def _described(rows: Sequence[Strip], x_name: str, show: Callable[[float], str]) -> str:
    found = []
    for row in rows:
        drawn = sorted(value for value in row.points if _drawn(value))
        said = row.note or (f"{show(drawn[0])} to {show(drawn[-1])}" if drawn else "none")
        found.append(f"{row.label}: {said}")
    return f"{x_name}. " + "; ".join(found)
