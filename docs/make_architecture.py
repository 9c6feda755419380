"""Writes architecture.svg: the rooms of the package and the imports between them, from the code.

    python docs/make_architecture.py

Rows are the layers of the import contract in pyproject.toml; the small rooms at the bottom, which
any other may import, share a band. An arrow is an import; one that follows from others (a room
imports a second, which imports the third) is left out. Rooms of a row that may import each other
are joined by a line.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs/architecture.svg"
COMMAND = "python docs/make_architecture.py"
PACKAGE = "mmmamba_cli"
# Pixels.
WIDTH, ROW, BOX_WIDTH, BOX_HEIGHT, MARGIN = 960, 84, 168, 40, 24
# How far an arrow that passes rows swings out, for each row.
SWING = 34
# Each room in a few words; a room without them is refused.
CONTENTS = {
    "cli": "one file per command",
    "verification": "checks of a teacher",
    "ablation": "plans, cells, tables",
    "chat": "conversations",
    "doctor": "checks of this machine",
    "inspection": "summaries, differences",
    "reporting": "a run as one page",
    "evaluate": "suites, answers, scores",
    "layer_selection": "layers by measurement",
    "profiling": "speed, memory, roofline",
    "distill": "stages 1 to 3",
    "stability": "decays, rounding over length",
    "seed": "student from teacher",
    "hybridize": "attention restored",
    "export": "layouts for other tools",
    "runs": "products, manifests",
    "checkpoint": "weights in and out",
    "data": "samples to batches",
    "distributed": "processes, FSDP2",
    "inference": "decoding by CUDA graphs",
    "model": "blocks, mixers, caches",
    "teachers": "mixers in other models",
    "processing": "text and images to ids",
    "ops": "references and kernels",
    "recipe": "settings as YAML",
    "plugins": "entry points",
    "devices": "device choice",
    "versions": "supported versions",
    "architecture": "sizes, mixers, no torch",
    "lazy_imports": "import at first use",
    "errors": "MmmambaError",
    "interrupts": "Ctrl-C",
    "decoding": "alias of inference",
    "chatting": "alias of chat",
}
ALIASES = ("decoding", "chatting")
# The first layer of the band at the bottom.
FIRST_SHARED = "recipe"


@dataclass(frozen=True)
class Box:
    room: str
    x: float
    y: float

    @property
    def middle(self) -> float:
        return self.x + BOX_WIDTH / 2


def layers() -> list[list[str]]:
    """The rooms of each layer, the topmost first."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (contract,) = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    rows = [[room.strip() for room in re.split("[|:]", layer)] for layer in contract["layers"]]
    return [kept for row in rows if (kept := [room for room in row if room not in ALIASES])]


def imports() -> dict[str, set[str]]:
    """The rooms that each room imports directly."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    found: dict[str, set[str]] = {room: set() for row in layers() for room in row}
    for module in graph.modules:
        importer = _room(module)
        for other in graph.find_modules_directly_imported_by(module):
            imported = _room(other)
            if importer in found and imported in found and importer != imported:
                found[importer].add(imported)
    return found


def reduced(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The edges that do not follow from others (transitive reduction)."""
    reach: dict[str, set[str]] = {}

    def reachable(room: str) -> set[str]:
        if room not in reach:
            reach[room] = set(edges[room])
            for other in edges[room]:
                reach[room] |= reachable(other)
        return reach[room]

    return {
        room: {x for x in found if not any(x in reachable(other) for other in found - {x})}
        for room, found in edges.items()
    }


def picture() -> str:
    """The SVG text."""
    rows = layers()
    cut = rows.index([FIRST_SHARED])
    shared = [room for row in rows[cut:] for room in row]
    boxes = {box.room: box for y, row in enumerate(rows[:cut]) for box in _boxes(row, y)}
    band_y = 2 * MARGIN + cut * ROW - (ROW - BOX_HEIGHT)
    band = _band(shared, band_y)
    height = band[-1].y + BOX_HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="sans-serif">',
        f"<!-- Written by `{COMMAND}`. -->",
        "<title>Rooms of mmmamba_cli; arrows are imports</title>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#5b6770"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    edges = {room: found & boxes.keys() for room, found in imports().items() if room in boxes}
    beside = {(a, b) for row in rows for a in row for b in row if b in edges.get(a, ())}
    for room, other in beside:
        edges[room].remove(other)
    for room, found in sorted(reduced(edges).items()):
        parts += [_arrow(boxes[room], boxes[other]) for other in sorted(found)]
    parts += [_line(boxes[a], boxes[b]) for a, b in sorted(beside) if boxes[a].x < boxes[b].x]
    parts.append(
        f'<rect x="{MARGIN}" y="{band_y:.0f}" width="{WIDTH - 2 * MARGIN}" '
        f'height="{height - band_y - MARGIN:.0f}" rx="8" fill="#f7f7f4" stroke="#b9b9ae"/>'
        f'<text x="{WIDTH / 2:.0f}" y="{band_y + 17:.0f}" text-anchor="middle" font-size="11.5" '
        'fill="#55554d">imported by any room above</text>'
    )
    parts += [_text_box(box) for box in (*boxes.values(), *band)]
    return "\n".join([*parts, "</svg>", ""])


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _boxes(row: list[str], place: int) -> list[Box]:
    step = WIDTH / (len(row) + 1)
    y = MARGIN + place * ROW
    return [Box(room, step * (i + 1) - BOX_WIDTH / 2, y) for i, room in enumerate(row)]


def _band(rooms: list[str], y: float) -> list[Box]:
    """Boxes of the shared rooms, four to a line."""
    gap = (WIDTH - 2 * MARGIN - 4 * BOX_WIDTH) / 5
    return [
        Box(
            room,
            MARGIN + gap + (i % 4) * (BOX_WIDTH + gap),
            y + 26 + i // 4 * (BOX_HEIGHT + 12),
        )
        for i, room in enumerate(rooms)
    ]


def _arrow(start: Box, end: Box) -> str:
    x1, y1, x2, y2 = start.middle, start.y + BOX_HEIGHT, end.middle, end.y - 2
    rows = round((end.y - start.y) / ROW)
    # To the side on which there is room, and further the more rows are passed.
    side = 1 if (x1 + x2) / 2 >= WIDTH / 2 else -1
    swing = side * SWING * (rows - 1) if rows > 1 else 0
    bend = (y2 - y1) / 3
    return (
        f'<path d="M{x1:.0f} {y1:.0f}C{x1 + swing:.0f} {y1 + bend:.0f} '
        f'{x2 + swing:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}" fill="none" stroke="#5b6770" '
        'stroke-opacity=".55" marker-end="url(#arrow)"/>'
    )


def _line(left: Box, right: Box) -> str:
    y = left.y + BOX_HEIGHT / 2
    return (
        f'<path d="M{left.x + BOX_WIDTH:.0f} {y:.0f}H{right.x:.0f}" stroke="#5b6770" '
        'stroke-opacity=".55"/>'
    )


def _text_box(box: Box) -> str:
    x, y = box.middle, box.y
    return (
        f'<rect x="{box.x:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5" '
        f'fill="#eef3f7" stroke="#33526b"/>'
        f'<text x="{x:.0f}" y="{y + 16:.0f}" text-anchor="middle" font-size="13" '
        f'font-weight="bold" fill="#14222d">{escape(box.room)}/</text>'
        f'<text x="{x:.0f}" y="{y + 30:.0f}" text-anchor="middle" font-size="10.5" '
        f'fill="#33526b">{escape(CONTENTS[box.room])}</text>'
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
