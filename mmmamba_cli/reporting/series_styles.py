"""Colour, marker and dashes of a model: the same in every chart of a page.

A style number selects all three, so that colour is never needed. Colours are CSS classes (`s0`,
`s1`, ...), so that they follow light and dark mode. The first `NUM_STYLES` numbers differ in all
three; later ones repeat colours, with another marker and other dashes.
"""

from __future__ import annotations

from mmmamba_cli.reporting.html import Markup, tag

NUM_STYLES = 12
# After Okabe and Ito (2008) where possible, with a contrast of 3:1 with the background.
LIGHT_COLOURS = (
    *("#0072b2", "#b35900", "#007a5a", "#a63c7f", "#6b5d00", "#5b5bd6"),
    *("#c0272d", "#007d8a", "#5f6672", "#7a4a2b", "#8e3fc0", "#4a7300"),
)
DARK_COLOURS = (
    *("#6bb7ec", "#f2a65a", "#4fc9a2", "#e79ac4", "#d8c64a", "#a9a9ff"),
    *("#ff8a80", "#58d0dc", "#b4bcc8", "#d3a17e", "#cf9bf2", "#a5d66b"),
)
DASHES = (
    *(None, "7 3", "2 3", "9 3 2 3", "4 2", "1 2"),
    *("12 4", "6 2 2 2 2 2", "3 6", "14 3 3 3", "5 1", "9 2 1 2 1 2"),
)
# Pixels.
MARKER_RADIUS = 3.2
NUM_SHAPES = 6
# The shift of markers and of dashes where colours repeat.
SHIFT = 5
CIRCLE, SQUARE, TRIANGLE, DIAMOND, CROSS = range(5)


def style_css() -> str:
    """Rules of the classes `fill sN` and `stroke sN`."""
    return "".join(
        f".fill.s{i}{{fill:var(--s{i})}}.stroke.s{i}{{stroke:var(--s{i})}}"
        for i in range(NUM_STYLES)
    )


def colour_variables(colours: tuple[str, ...]) -> str:
    """CSS variables `--sN` of a colour scheme."""
    return "".join(f"--s{i}:{value};" for i, value in enumerate(colours))


def _shifted(series: int) -> int:
    return (series + SHIFT * (series // NUM_STYLES)) % NUM_STYLES


def dashes(series: int) -> str | None:
    """The `stroke-dasharray` of a series, None for a solid line."""
    return DASHES[_shifted(series)]


def fill_class(series: int) -> str:
    return f"fill s{series % NUM_STYLES}"


def stroke_class(series: int) -> str:
    return f"stroke s{series % NUM_STYLES}"


def marker(series: int, x: float, y: float, noisy: bool = False) -> Markup:
    """The marker of a series: six shapes, filled for the first six styles, then hollow.

    The hollow form of a diagonal cross is an upright one. A `noisy` point is hollow with a dotted
    outline in every style.
    """
    shape, hollow = _shifted(series) % NUM_SHAPES, _shifted(series) >= NUM_SHAPES
    r = MARKER_RADIUS
    if shape == CROSS:
        path = (
            f"M{x - 1.3 * r:.2f} {y:.2f}h{2.6 * r:.2f}M{x:.2f} {y - 1.3 * r:.2f}v{2.6 * r:.2f}"
            if hollow
            else f"M{x - r:.2f} {y - r:.2f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}"
        )
        return tag("path", d=path, class_=f"{'noisy ' if noisy else ''}{stroke_class(series)}")
    drawn = f"hollow {stroke_class(series)}" if hollow else fill_class(series)
    if noisy:
        drawn = f"noisy hollow {stroke_class(series)}"
    if shape == CIRCLE:
        return tag("circle", cx=x, cy=y, r=r, class_=drawn)
    if shape == SQUARE:
        path = f"M{x - r:.2f} {y - r:.2f}h{2 * r}v{2 * r}h{-2 * r}z"
    elif shape == TRIANGLE:
        path = f"M{x:.2f} {y - 1.2 * r:.2f}l{1.2 * r:.2f} {2.2 * r:.2f}h{-2.4 * r:.2f}z"
    elif shape == DIAMOND:
        side = f"{1.4 * r:.2f}"
        path = f"M{x:.2f} {y - 1.4 * r:.2f}l{side} {side}l-{side} {side}l-{side} -{side}z"
    else:
        path = f"M{x:.2f} {y + 1.2 * r:.2f}l{1.2 * r:.2f} {-2.2 * r:.2f}h{-2.4 * r:.2f}z"
    return tag("path", d=path, class_=drawn)


def swatch(series: int) -> Markup:
    """The sample of a series in a legend: its line and marker in its colour."""
    return tag(
        "svg",
        tag("path", d="M0 6H34", class_=stroke_class(series), stroke_dasharray=dashes(series)),
        marker(series, 17.0, 6.0),
        viewBox="0 0 34 12",
        width=34,
        height=12,
        aria_hidden="true",
        class_="swatch",
    )


def legend(series: dict[str, int]) -> Markup:
    """A list of names with their swatches."""
    items = (tag("li", swatch(number), " ", name) for name, number in series.items())
    return tag("ul", *items, class_="legend")
