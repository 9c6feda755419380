"""HTML and SVG markup with escaping, and the elements of a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape, unescape

# HTML elements without an end tag.
VOID_ELEMENTS = frozenset(("img", "meta", "br", "hr"))
TAGS = re.compile(r"<[^>]*>")
# A number and what follows it in parentheses.
INTERVAL = re.compile(r"(-?[\d.,]+) (\([^()]*\))")


class Markup(str):
    """Text that is already escaped. Only `tag` and `join_markup` create it."""

    __slots__ = ()


Child = Markup | str | int | float | None


def tag(name: str, /, *children: Child, **attributes: str | int | float | None) -> Markup:
    """An element. Children that are not `Markup` are escaped; None is omitted.

    In attribute names a trailing underscore is dropped (`class_`) and others become hyphens
    (`stroke_width`).
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(_attribute_value(value))}"')
    opened = f"<{' '.join(words)}>"
    return Markup(opened if name in VOID_ELEMENTS else f"{opened}{join_markup(children)}</{name}>")


def join_markup(children: Iterable[Child], by: str = "") -> Markup:
    """Concatenate children, escaping those that are not `Markup`."""
    return Markup(escape(by).join(_escaped(child) for child in children if child is not None))


def _attribute_value(value: str | int | float) -> str:
    """A float with at most two decimals; other values unchanged."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _escaped(child: Child) -> str:
    return child if isinstance(child, Markup) else escape(str(child))


def paragraph(*children: Child, class_: str | None = None) -> Markup:
    return tag("p", *children, class_=class_)


def table(
    caption: Child,
    heading: Sequence[Child],
    rows: Iterable[Sequence[Child]],
    *,
    words: bool = False,
) -> Markup:
    """A table with a caption; the first cell of a row is its heading. None is shown as a dash.

    Cells are aligned right for numbers, or left if they are `words`. On a narrow screen each row
    becomes a card, in which every cell stands beside its column's heading (`data-label`).
    """
    head = tag("tr", *(tag("th", cell, scope="col") for cell in heading))
    labels = [_text_of(cell) for cell in heading[1:]]
    body = []
    for row in rows:
        name, *cells = ("–" if cell is None else cell for cell in row)
        shown = (
            tag("td", tag("span", _unbroken(cell)), data_label=label)
            for cell, label in zip(cells, labels, strict=True)
        )
        body.append(tag("tr", tag("th", name, scope="row"), *shown))
    inner = tag(
        "table",
        tag("caption", caption),
        tag("thead", head),
        tag("tbody", *body),
        class_="words" if words else None,
    )
    return tag("div", inner, class_="table")


def _unbroken(cell: Child) -> Child:
    """A number with its interval breaks only between both."""
    found = INTERVAL.fullmatch(cell) if isinstance(cell, str) and type(cell) is str else None
    if found is None:
        return cell
    return join_markup((found[1], " ", tag("span", found[2], class_="unbroken")))


def _text_of(cell: Child) -> str:
    """The words of a heading: markup of its own is left out."""
    return unescape(TAGS.sub("", cell)) if isinstance(cell, Markup) else str(cell or "")


def figure(picture: Markup, caption: Child, numbers: Markup | None = None) -> Markup:
    """A picture, its caption, and its numbers in a collapsed element."""
    folded = None
    if numbers is not None:
        folded = tag("details", tag("summary", "The numbers as a table"), numbers)
    return tag("figure", picture, tag("figcaption", caption), folded)


def section(name: str, title: str, *children: Child) -> Markup:
    """A section with a heading; `name` is its anchor."""
    head = tag("h2", title, id=f"{name}-title")
    return tag("section", head, *children, id=name, aria_labelledby=f"{name}-title")


def item_list(items: Iterable[Child], ordered: bool = False) -> Markup:
    return tag("ol" if ordered else "ul", *(tag("li", item) for item in items))
