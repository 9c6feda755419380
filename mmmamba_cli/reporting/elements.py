"""Parts of a page: tables that can be read aloud, figures with their numbers beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mmmamba_cli.reporting.markup import Child, Markup, joined, tag


def paragraph(*children: Child, class_: str | None = None) -> Markup:
    return tag("p", *children, class_=class_)


def table(
    caption: Child,
    heading: Sequence[Child],
    rows: Iterable[Sequence[Child]],
    *,
    words: bool = False,
) -> Markup:
    """A table with a caption; the first cell of a row names it. None is shown as a dash.

    Cells are aligned right, as numbers are; left if they are `words`.
    """
    head = tag("tr", *(tag("th", cell, scope="col") for cell in heading))
    body = []
    for row in rows:
        name, *cells = ("–" if cell is None else cell for cell in row)
        body.append(tag("tr", tag("th", name, scope="row"), *(tag("td", cell) for cell in cells)))
    inner = tag(
        "table",
        tag("caption", caption),
        tag("thead", head),
        tag("tbody", *body),
        class_="words" if words else None,
    )
    # A wide table scrolls by itself, with the keyboard too; the page does not.
    return tag("div", inner, class_="scrolls", tabindex=0, role="group", aria_label=caption)


def figure(picture: Markup, caption: Child, numbers: Markup | None = None) -> Markup:
    """A picture, what it shows, and the numbers of it, folded."""
    folded = None
    if numbers is not None:
        folded = tag("details", tag("summary", "The numbers as a table"), numbers)
    return tag("figure", picture, tag("figcaption", caption), folded)


def section(name: str, title: str, *children: Child) -> Markup:
    """A part of the page under its heading; `name` is its anchor."""
    head = tag("h2", title, id=f"{name}-title")
    return tag("section", head, *children, id=name, aria_labelledby=f"{name}-title")


def code(text: str) -> Markup:
    return tag("code", text)


def listed(items: Iterable[Child], ordered: bool = False) -> Markup:
    return tag("ol" if ordered else "ul", *(tag("li", item) for item in items))


def lines(items: Iterable[Child]) -> Markup:
    return joined(items, by="\n")
