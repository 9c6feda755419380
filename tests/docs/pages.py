"""The pages of the project and the commands in them."""

from __future__ import annotations

import re
from pathlib import Path

import run_page

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
INLINE = re.compile(r"`(mmmamba [^`]+)`")


def shown(page: Path) -> str:
    return str(page.relative_to(ROOT))


def calls_in_fences(page: Path) -> list[tuple[int, list[str]]]:
    """(line of the fence, words) of each command in a page's code blocks."""
    return [
        (fence.line, call)
        for fence in run_page.fences(page.read_text(encoding="utf-8"))
        if fence.mark in ("", run_page.MARK)
        for call in run_page.mmmamba_calls(fence.text)
    ]


def calls_in_sentences(page: Path) -> list[list[str]]:
    """The words of each command in a page's inline code."""
    text = run_page.FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(found.split()).split(" ")[1:] for found in INLINE.findall(text)]
