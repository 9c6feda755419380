"""HTML and SVG as text in which everything is escaped that did not come from `tag`."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

# Elements of HTML that have no end tag.
VOID = frozenset(("img", "meta", "br", "hr"))


class Markup(str):
    """Text that is markup already. Only `tag` and `joined` make it."""

    __slots__ = ()


Child = Markup | str | int | float | None


def tag(name: str, /, *children: Child, **attributes: str | int | float | None) -> Markup:
    """An element. Children that are not markup are escaped; None is left out, among both.

    `class_` is written `class`, and an underscore within a name is a hyphen: `stroke_width`.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(plain(value))}"')
    opened = f"<{' '.join(words)}>"
    return Markup(opened if name in VOID else f"{opened}{joined(children)}</{name}>")


def joined(children: Iterable[Child], by: str = "") -> Markup:
    """Children one after the other."""
    return Markup(escape(by).join(_text(child) for child in children if child is not None))


def plain(value: str | int | float) -> str:
    """A coordinate with at most two decimals; other values as they are."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _text(child: Child) -> str:
    return child if isinstance(child, Markup) else escape(str(child))
