"""Bar and line charts as SVG of one width, with their scales and ticks.

`styles.py` gives each series its colour, marker and dashes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmmamba_cli.reporting.html import Markup, tag
from mmmamba_cli.reporting.styles import dashes, fill_class, marker, stroke_class

# All sizes are in pixels.
WIDTH = 340
MARGIN = 8
# Heights in a bar chart.
LABEL_HEIGHT, BAR_HEIGHT, BAR_GAP = 15, 10, 7
# Edges and plot height of a line chart.
LEFT, RIGHT, TOP, BOTTOM, PLOT_HEIGHT = 46, 12, 12, 36, 150
MIN_TICK_DISTANCE = 34


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
    """Format a number as a tick or label: three significant digits, k, M and G for large ones."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    if size and size < 1e-3:
        return f"{value:.0e}"
    return f"{value:,.0f}" if size >= 100 else f"{value:.3g}"


def format_context(value: float) -> str:
    """Format a number of tokens: multiples of 1,024 as K."""
    whole = value >= 1024 and value % 1024 == 0
    return f"{value / 1024:g}K" if whole else format_short(value)


@dataclass(frozen=True)
class Bar:
    """A value and optionally its interval; `series` selects the style."""

    label: str
    value: float
    series: int
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """Points with ascending x; values that are not finite are gaps."""

    label: str
    series: int
    points: tuple[tuple[float, float], ...]
    marked: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at `at` on the x axis with a label, in the colour of a series."""

    label: str
    series: int
    at: float


def bars(
    title: str,
    rows: Sequence[Bar],
    *,
    high: float | None = None,
    reference: tuple[float, str] | None = None,
    show: Callable[[float], str] = format_short,
) -> Markup:
    """Horizontal bars from zero with label, value and the interval as a whisker.

    `reference` is a value and its description, drawn as a vertical line.
    """
    ends = [row.interval[1] for row in rows if row.interval] + [row.value for row in rows]
    known = [end for end in ends if math.isfinite(end)]
    top = high if high is not None else axis_range(known)[1] if known else 1.0
    x = Scale(0, top, MARGIN, WIDTH - 52)
    height = 4 + len(rows) * (LABEL_HEIGHT + BAR_HEIGHT + BAR_GAP) + 26
    bottom = height - 24
    parts = [*_x_axis(x, bottom, 4)]
    if reference is not None:
        parts += _reference(x, reference, bottom)
    for number, row in enumerate(rows):
        parts.append(_bar(row, x, 4 + number * (LABEL_HEIGHT + BAR_HEIGHT + BAR_GAP), show))
    return _svg(title, _describe_bars(title, rows, show), height, parts)


def _bar(row: Bar, x: Scale, top: float, show: Callable[[float], str]) -> Markup:
    y = top + LABEL_HEIGHT
    if not math.isfinite(row.value):
        return tag(
            "g",
            tag("text", row.label, x=MARGIN, y=top + 11, class_="label"),
            tag("text", show(row.value), x=x(0) + 5, y=y + 9, class_="value"),
        )
    # The value is written behind the bar and its whisker.
    reach = row.interval[1] if row.interval else row.value
    end = max(x(row.value), x(reach) if math.isfinite(reach) else 0.0)
    parts = [
        tag("text", row.label, x=MARGIN, y=top + 11, class_="label"),
        tag(
            "rect",
            x=x(0),
            y=y,
            width=max(0.0, x(row.value) - x(0)),
            height=BAR_HEIGHT,
            class_=fill_class(row.series),
        ),
    ]
    if row.interval is not None and all(map(math.isfinite, row.interval)):
        low, high = map(x, row.interval)
        middle = y + BAR_HEIGHT / 2
        path = f"M{low:.2f} {middle - 4}v8M{high:.2f} {middle - 4}v8M{low:.2f} {middle}H{high:.2f}"
        parts.append(tag("path", d=path, class_="whisker"))
    parts.append(tag("text", show(row.value), x=end + 5, y=y + 9, class_="value"))
    return tag("g", *parts)


def _reference(x: Scale, reference: tuple[float, str], bottom: float) -> list[Markup]:
    value, what = reference
    return [
        tag("title", what),
        tag("line", x1=x(value), x2=x(value), y1=2, y2=bottom, class_="reference"),
    ]


def lines(
    title: str,
    series: Sequence[Line],
    *,
    x_name: str,
    y_name: str,
    log_x: bool = False,
    log_y: bool = False,
    show: Callable[[float], str] = format_short,
    x_ticks: Sequence[float] | None = None,
    marks: Sequence[Mark] = (),
    show_x: Callable[[float], str] = format_short,
) -> Markup:
    """Lines over a common x axis; an axis is logarithmic only if all its values are positive."""
    points = [point for line in series for point in line.points if math.isfinite(point[1])]
    if not points:
        raise ValueError(f"{title}: there is nothing to draw")
    log_x = log_x and min(point[0] for point in points) > 0
    log_y = log_y and min(point[1] for point in points) > 0
    xs = [point[0] for point in points]
    low, high = axis_range([point[1] for point in points], log=log_y)
    x = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, log_x)
    y = Scale(low, high, TOP + PLOT_HEIGHT, TOP, log_y)
    parts = [*_y_axis(y, show), *_x_axis(x, TOP + PLOT_HEIGHT, TOP, x_ticks, show_x)]
    parts.append(
        tag(
            "text",
            x_name,
            x=(LEFT + WIDTH - RIGHT) / 2,
            y=TOP + PLOT_HEIGHT + 32,
            class_="tick",
            text_anchor="middle",
        )
    )
    parts += [_line(line, x, y) for line in series]
    parts += [_mark(mark, x, row) for row, mark in enumerate(marks)]
    described = "; ".join(
        (_describe_lines(series, x_name, y_name, show), *(mark.label for mark in marks))
    )
    return _svg(title, described, TOP + PLOT_HEIGHT + BOTTOM, parts)


def _line(line: Line, x: Scale, y: Scale) -> Markup:
    path, pen = [], "M"
    finite = []
    for at, value in line.points:
        if not math.isfinite(value) or (y.log and value <= 0):
            pen = "M"
            continue
        finite.append((x(at), y(value)))
        path.append(f"{pen}{finite[-1][0]:.2f} {finite[-1][1]:.2f}")
        pen = "L"
    look, dashed = stroke_class(line.series), dashes(line.series)
    parts = [tag("path", d="".join(path), class_=look, stroke_dasharray=dashed)] if path else []
    if line.marked or len(finite) == 1:
        parts += [marker(line.series, *point) for point in finite]
    return tag("g", *parts)


def _mark(mark: Mark, x: Scale, row: int) -> Markup:
    """A vertical line with its label, on the side of the line where there is more room."""
    place = x(mark.at)
    left = place > (LEFT + WIDTH - RIGHT) / 2
    return tag(
        "g",
        tag(
            "line",
            x1=place,
            x2=place,
            y1=TOP,
            y2=TOP + PLOT_HEIGHT,
            class_=f"mark {stroke_class(mark.series)}",
        ),
        tag(
            "text",
            mark.label,
            x=place + (-4 if left else 4),
            y=TOP + 10 + 13 * row,
            class_="label value",
            text_anchor="end" if left else "start",
        ),
    )


def _x_axis(
    x: Scale,
    bottom: float,
    top: float,
    ticks: Sequence[float] | None = None,
    show: Callable[[float], str] = format_short,
) -> list[Markup]:
    parts = []
    for value in _spaced_ticks(x, x.ticks() if ticks is None else ticks):
        place = x(value)
        # A centred number would be cut off at the edges.
        anchor = "middle" if 14 < place < WIDTH - 14 else "start" if place <= 14 else "end"
        parts += [
            tag("line", x1=place, x2=place, y1=top, y2=bottom, class_="grid"),
            tag(
                "text",
                show(value),
                x=place,
                y=bottom + 15,
                class_="tick",
                text_anchor=anchor,
            ),
        ]
    return parts


def _spaced_ticks(x: Scale, ticks: Sequence[float]) -> list[float]:
    """The ticks that are far enough from the one before for their numbers."""
    kept: list[float] = []
    for value in ticks:
        if not kept or abs(x(value) - x(kept[-1])) >= MIN_TICK_DISTANCE:
            kept.append(value)
    return kept


def _y_axis(y: Scale, show: Callable[[float], str]) -> list[Markup]:
    parts = []
    for value in y.ticks():
        parts += [
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value), class_="grid"),
            tag("text", show(value), x=LEFT - 5, y=y(value) + 4, class_="tick", text_anchor="end"),
        ]
    return parts


def _svg(title: str, description: str, height: float, parts: Sequence[Markup]) -> Markup:
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {WIDTH} {height:g}",
        width=WIDTH,
        height=f"{height:g}",
        role="img",
        aria_label=f"{title}. {description}",
    )


def _describe_bars(title: str, rows: Sequence[Bar], show: Callable[[float], str]) -> str:
    """The chart in words, for screen readers."""
    return "; ".join(
        f"{row.label}: {show(row.value)}"
        + (f", {show(row.interval[0])} to {show(row.interval[1])}" if row.interval else "")
        for row in rows
    )


def _describe_lines(
    series: Sequence[Line], x_name: str, y_name: str, show: Callable[[float], str]
) -> str:
    sentences = []
    for line in series:
        finite = [point for point in line.points if math.isfinite(point[1])]
        if finite:
            (a, b), (c, d) = finite[0], finite[-1]
            sentences.append(
                f"{line.label}: {show(b)} at {format_short(a)} to {show(d)} at {format_short(c)}"
            )
    return f"{y_name} over {x_name}. " + "; ".join(sentences)
