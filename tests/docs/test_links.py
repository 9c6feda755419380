"""Links between the project's pages are valid, including their anchors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import run_page
from pages import PAGES, ROOT, shown

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
FOREIGN = ("http://", "https://", "mailto:")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


def links(page: Path) -> list[str]:
    text = run_page.FENCE.sub("", page.read_text(encoding="utf-8"))
    return [one or other for one, other in LINK.findall(text)]


def anchors(page: Path) -> set[str]:
    """GitHub's anchors: lower case, no punctuation, a hyphen for each space."""
    text = run_page.FENCE.sub("", page.read_text(encoding="utf-8"))
    found: set[str] = set()
    for heading in HEADING.findall(text):
        base = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        again = sum(
            one == base or re.fullmatch(rf"{re.escape(base)}-\d+", one) is not None for one in found
        )
        found.add(f"{base}-{again}" if again else base)
    return found


def problem_of(page: Path, link: str) -> str | None:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return f"{link}: there is no {target}"
    if not target.is_relative_to(ROOT) and page.is_relative_to(ROOT):
        return f"{link}: leads out of the project"
    if anchor and anchor not in anchors(target):
        return f"{link}: {target.name} has no heading of that name"
    return None


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_are_valid(page: Path) -> None:
    wrong = [
        problem
        for link in links(page)
        if not link.startswith(FOREIGN) and (problem := problem_of(page, link)) is not None
    ]
    assert not wrong, "\n".join(wrong)


def test_every_page_is_linked_from_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    reached, ahead = {index}, [index]
    while ahead:
        page = ahead.pop()
        local = [link.partition("#")[0] for link in links(page) if not link.startswith(FOREIGN)]
        found = {(page.parent / path).resolve() for path in local if path.endswith(".md")}
        ahead += found - reached
        reached |= found
    assert {page for page in PAGES if page.parent != ROOT} <= reached


@pytest.mark.parametrize(
    ("link", "right"),
    [("b.md", True), ("#one-two", True), ("b.md#x-1", True), ("c.md", False), ("b.md#y", False)],
)
def test_broken_links(tmp_path: Path, link: str, right: bool) -> None:
    (tmp_path / "a.md").write_text("# One, `two`\n")
    (tmp_path / "b.md").write_text("# X\n# X\n```\n# Y\n```\n")
    assert (problem_of(tmp_path / "a.md", link) is None) is right


def test_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("[a](b.md) ![c](d.png)\n```\n[no](e.md)\n```\n[two\nlines](f.md#g)\n")
    assert links(page) == ["b.md", "d.png", "f.md#g"]
