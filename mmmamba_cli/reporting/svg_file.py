"""A picture of a page as an SVG file of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.reporting.html import Markup, join_markup, tag
from mmmamba_cli.reporting.series_styles import dashes, stroke_class, style_css
from mmmamba_cli.reporting.stylesheet import DAY

# Colours of a light page by the names of its variables.
COLOURS = dict(re.findall(r"--(\w+):([^;]+);", DAY))
VARIABLE = re.compile(r"var\(--(\w+)\)")
STYLE = (
    "text{font-size:12px;font-family:sans-serif;fill:var(--ink)}.tick,.value{font-size:11px}"
    ".grid{stroke:var(--rule)}.whisker{stroke:var(--ink);fill:none}"
    ".stroke{fill:none;stroke-width:1.8}.stroke.hollow{fill:var(--ground);stroke-width:1.5}"
)


NO_NAMES: Mapping[str, int] = MappingProxyType({})
SIZES = ("width", "height")
# Pixels.
LINE_HEIGHT, SWATCH_WIDTH = 16, 34


def write_svg(file: Path, picture: Markup, names: Mapping[str, int] = NO_NAMES) -> None:
    """Write a chart in the colours of a light page, below a legend of `names` and their styles.

    Colours are values, because only browsers know CSS variables and a background.
    """
    opened, rest = picture.split(">", 1)
    top = LINE_HEIGHT * len(names) + (4 if names else 0)
    size = {name: float(re.search(rf' {name}="([\d.]+)"', opened)[1]) for name in SIZES}  # type: ignore[index]
    inner = opened.replace("<svg", f'<svg y="{top}"', 1)
    rows = join_markup(_legend_row(*row) for row in enumerate(names.items()))
    width, height = size["width"], size["height"] + top
    ground = tag("rect", width="100%", height="100%", fill="var(--ground)")
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}"><style>{STYLE}{style_css()}</style>'
        f"{ground}{rows}{inner}>{rest}</svg>\n"
    )
    atomic_write_text(file, VARIABLE.sub(lambda found: COLOURS[found[1]], text))


def _legend_row(number: int, named: tuple[str, int]) -> Markup:
    label, series = named
    y = LINE_HEIGHT * (number + 0.5) + 4
    return tag(
        "g",
        tag(
            "path",
            d=f"M8 {y}h{SWATCH_WIDTH}",
            class_=stroke_class(series),
            stroke_dasharray=dashes(series),
        ),
        tag("text", label, x=SWATCH_WIDTH + 14, y=y + 4),
    )
