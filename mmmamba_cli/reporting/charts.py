"""Bar and line charts as SVG of one width.

`series_styles.py` gives each series its colour, marker and dashes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmmamba_cli.reporting.chart_scales import Scale, axis_range, format_short
from mmmamba_cli.reporting.html import Markup, tag
from mmmamba_cli.reporting.series_styles import dashes, fill_class, marker, stroke_class

# All sizes are in pixels.
WIDTH = 340
MARGIN = 8
# Heights in a bar chart.
LABEL_HEIGHT, BAR_HEIGHT, BAR_GAP = 15, 10, 7
# Height of a line of text above a plot, and the mean width of its characters.
TEXT_HEIGHT, CHARACTER_WIDTH = 13, 6.6
# Edges and plot height of a line chart.
LEFT, RIGHT, TOP, BOTTOM, PLOT_HEIGHT = 46, 12, 12, 36, 150
MIN_TICK_DISTANCE = 34


@dataclass(frozen=True)
class Bar:
    """A value and optionally its interval; `series` selects the style."""

    label: str
    value: float
    series: int
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """Points with ascending x; values that are not finite are gaps.

    `noisy` are the x of measurements that are not reliable; they are drawn hollow.
    """

    label: str
    series: int
    points: tuple[tuple[float, float], ...]
    marked: bool = False
    noisy: frozenset[float] = frozenset()


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

    `reference` is a value and its name, drawn as a vertical line behind each bar.
    """
    ends = [row.interval[1] for row in rows if row.interval] + [row.value for row in rows]
    known = [end for end in ends if math.isfinite(end)]
    top = high if high is not None else axis_range(known)[1] if known else 1.0
    x = Scale(0, top, MARGIN, WIDTH - 52)
    above = 4 if reference is None else 4 + TEXT_HEIGHT
    tops = [above + i * (LABEL_HEIGHT + BAR_HEIGHT + BAR_GAP) for i in range(len(rows) + 1)]
    bottom = tops[-1] + 2
    height = bottom + 24
    parts = [*x_axis(x, bottom, above)]
    parts += [_bar(row, x, begin, show) for row, begin in zip(rows, tops, strict=False)]
    if reference is not None:
        parts += _reference(x, reference, tops[:-1])
    return svg(title, _describe_bars(title, rows, show), height, parts)


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


def _reference(x: Scale, reference: tuple[float, str], tops: Sequence[float]) -> list[Markup]:
    """The line with its name above; it stops at the labels of the bars."""
    value, what = reference
    place = x(value)
    pieces = (f"M{place:.2f} {top + LABEL_HEIGHT - 2}v{BAR_HEIGHT + 4}" for top in tops)
    return [
        tag("text", what, x=place, y=11, class_="tick", text_anchor="middle"),
        tag("path", d="".join(pieces), class_="reference"),
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
    top = TOP + TEXT_HEIGHT * len(marks)
    bottom = top + PLOT_HEIGHT
    x = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, log_x)
    y = Scale(low, high, bottom, top, log_y)
    parts = [*_y_axis(y, show), *x_axis(x, bottom, top, x_ticks, show_x)]
    parts.append(
        tag(
            "text",
            x_name,
            x=(LEFT + WIDTH - RIGHT) / 2,
            y=bottom + 32,
            class_="tick",
            text_anchor="middle",
        )
    )
    parts += [_line(line, x, y) for line in series]
    parts += _marks(marks, x, bottom)
    described = "; ".join(
        (_describe_lines(series, x_name, y_name, show), *(mark.label for mark in marks))
    )
    return svg(title, described, bottom + BOTTOM, parts)


def _line(line: Line, x: Scale, y: Scale) -> Markup:
    path, pen = [], "M"
    finite = []
    for at, value in line.points:
        if not math.isfinite(value) or (y.log and value <= 0):
            pen = "M"
            continue
        finite.append((x(at), y(value), at in line.noisy))
        path.append(f"{pen}{x(at):.2f} {y(value):.2f}")
        pen = "L"
    look, dashed = stroke_class(line.series), dashes(line.series)
    parts = [tag("path", d="".join(path), class_=look, stroke_dasharray=dashed)] if path else []
    if line.marked or len(finite) == 1:
        parts += [marker(line.series, left, top, noisy) for left, top, noisy in finite]
    return tag("g", *parts)


def _marks(marks: Sequence[Mark], x: Scale, bottom: float) -> list[Markup]:
    """Vertical lines, each up to its label above the plot.

    No line crosses a label: labels on the right of their lines are ordered from the left one down,
    labels on the left from the right one down. Where neither has the room, no line goes above the
    plot, and colours tell whose each label is.
    """
    widths = {mark.label: CHARACTER_WIDTH * len(mark.label) + 4 for mark in marks}
    right = all(x(mark.at) + widths[mark.label] <= WIDTH for mark in marks)
    left = not right and all(x(mark.at) >= widths[mark.label] for mark in marks)
    parts = []
    for row, mark in enumerate(sorted(marks, key=lambda one: one.at, reverse=left)):
        place, base = x(mark.at), TOP + TEXT_HEIGHT * row
        begin = base - 8 if right or left else TOP + TEXT_HEIGHT * len(marks)
        at = place - 4 if left else place + 4 if right else WIDTH - widths[mark.label]
        look = f"mark {stroke_class(mark.series)}"
        label = f"{fill_class(mark.series)} value"
        parts += [
            tag("line", x1=place, x2=place, y1=begin, y2=bottom, class_=look),
            tag(
                "text",
                mark.label,
                x=max(0.0, at),
                y=base + 1,
                class_=label,
                text_anchor="end" if left else "start",
            ),
        ]
    return parts


def x_axis(
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
        half = CHARACTER_WIDTH * len(show(value)) / 2
        anchor = "start" if place < half else "end" if place + half > WIDTH else "middle"
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


def svg(title: str, description: str, height: float, parts: Sequence[Markup]) -> Markup:
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
