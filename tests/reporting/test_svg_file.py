"""SVG files of charts: colours and ground, rendered without a browser."""

from __future__ import annotations

import io
from pathlib import Path

import resvg_py
from PIL import Image

from mmmamba_cli.reporting.charts import svg
from mmmamba_cli.reporting.html import tag
from mmmamba_cli.reporting.series_styles import stroke_class
from mmmamba_cli.reporting.svg_file import COLOURS, write_svg


def colours_of(file: Path) -> set[str]:
    """The colours of a rendered picture, as #rrggbb."""
    rendered = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(file)))))
    assert rendered.mode == "RGBA"
    found = rendered.getcolors(2**16)
    assert found is not None
    assert all(colour[3] == 255 for _, colour in found), "transparent"
    return {"#{:02x}{:02x}{:02x}".format(*colour[:3]) for _, colour in found}


def test_colours_are_values(tmp_path: Path) -> None:
    line = tag("path", d="M0 20h200", class_=stroke_class(1), stroke_width=6)
    grid = tag("line", x1=0, x2=200, y1=40.5, y2=40.5, class_="grid")
    file = tmp_path / "chart.svg"
    write_svg(file, svg("Title", "description", 60, [line, grid]), {"name": 0})
    assert "var(" not in file.read_text(encoding="utf-8")
    drawn = colours_of(file)
    for name in ("s0", "s1", "rule", "ground"):
        value = COLOURS[name]
        assert (value if len(value) == 7 else "#ffffff") in drawn, name
