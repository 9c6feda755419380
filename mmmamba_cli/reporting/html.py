"""HTML and SVG markup with escaping, elements of a page, and its CSS."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# HTML elements without an end tag.
VOID_ELEMENTS = frozenset(("img", "meta", "br", "hr"))


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

    Cells are aligned right for numbers, or left if they are `words`.
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
    # A wide table scrolls on its own, also by keyboard, instead of the page.
    return tag("div", inner, class_="scrolls", tabindex=0, role="group", aria_label=caption)


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


# Six colours for colour-blind readers (after Okabe and Ito, 2008), darkened or lightened to a
# contrast of 3:1 with the background.
LIGHT = ("#0072b2", "#b35900", "#007a5a", "#a63c7f", "#6b5d00", "#5b5bd6")
DARK = ("#6bb7ec", "#f2a65a", "#4fc9a2", "#e79ac4", "#d8c64a", "#a9a9ff")


def _colours(values: tuple[str, ...]) -> str:
    return "".join(f"--s{i}:{value};" for i, value in enumerate(values))


def _series() -> str:
    return "".join(
        f".fill.s{i}{{fill:var(--s{i})}}.stroke.s{i}{{stroke:var(--s{i})}}"
        for i in range(len(LIGHT))
    )


DAY = (
    "--ground:#fff;--raised:#f6f7f9;--ink:#1c1e21;--soft:#555b63;--rule:#d9dde2;"
    "--good:#1b6e3c;--bad:#a3262a;--link:#0b5cad;" + _colours(LIGHT)
)
NIGHT = (
    "--ground:#15171a;--raised:#1e2126;--ink:#e8eaed;--soft:#a4abb5;--rule:#363b43;"
    "--good:#7bd69a;--bad:#ff9a94;--link:#8ec2ff;" + _colours(DARK)
)

CSS = (
    f":root{{color-scheme:light dark;{DAY}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{NIGHT}}}}}"
    + _series()
    + """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:1.5rem 1rem 4rem;background:var(--ground);
color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:.2rem 0 .6rem}
h2{font-size:1.25rem;line-height:1.3;margin:2.6rem 0 .6rem;padding-top:1rem;
border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.1rem 0 .3rem}
p{max-width:46rem;margin:.5rem 0}
a{color:var(--link)}
nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;list-style:none;padding:0;margin:.8rem 0}
code,pre{font:.85em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--raised);border:1px solid var(--rule);border-radius:6px;padding:.7rem .9rem;
overflow-x:auto}
.lead{font-size:1.05rem}.small,.axis{font-size:.87rem;color:var(--soft)}
.axis{margin:0 0 .2rem}
.found{border-left:4px solid var(--s0);padding:.4rem .8rem;background:var(--raised);
max-width:56rem}
.scrolls{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.2rem 0;white-space:nowrap}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--rule);text-align:right;
vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
tbody th{font-weight:500}
figure{margin:1rem 0}figcaption{font-size:.87rem;color:var(--soft);max-width:56rem;
margin:.5rem 0}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--link);font-size:.92rem}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));
gap:1rem 1.4rem;align-items:start}
.panels svg:not(.swatch){display:block;width:100%;max-width:400px;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:.15rem 1rem;list-style:none;padding:0;
margin:.3rem 0;font-size:.85rem}
.swatch{vertical-align:-1px}
.cards{display:grid;gap:1rem}
.card{border:1px solid var(--rule);border-radius:8px;padding:.8rem;background:var(--raised);
min-width:0;display:grid;grid-template-columns:168px minmax(0,1fr);gap:.2rem 1.2rem}
.card img{display:block;width:168px;max-width:100%;height:auto;border-radius:4px;
background:#fff}
.card th,.card td{text-align:left}
.card tbody th{font-weight:400;min-width:9rem}.card .scrolls{margin:0}
.words td{text-align:left}.words th{text-align:left}
.right{color:var(--good)}.wrong{color:var(--bad);font-weight:600}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);
white-space:nowrap}
.tree,.tree ul{list-style:none;padding-left:1.1rem;border-left:2px solid var(--rule);
margin:.2rem 0}
.tree{border:0;padding:0}.tree li{padding:.15rem 0}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink)}
svg .label{paint-order:stroke;stroke:var(--ground);stroke-width:3px}
svg .tick{fill:var(--soft);font-size:11px}
svg .value{font-size:11px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--rule);stroke-width:1}
.whisker{stroke:var(--ink);stroke-width:1.3;fill:none}
.reference{stroke:var(--ink);stroke-width:1;stroke-dasharray:3 3}
.stroke{fill:none;stroke-width:1.8;stroke-linejoin:round}
@media(max-width:480px){body{padding:1rem .8rem 3rem}h1{font-size:1.4rem}
.card{grid-template-columns:minmax(0,1fr)}th,td{padding:.3rem .5rem}caption{white-space:normal}
.card tbody th{min-width:7rem}}
@media print{:root{"""
    + DAY
    + """}body{max-width:none;font-size:10.5pt}nav{display:none}
.card,figure div,tr{break-inside:avoid}h2,h3{break-after:avoid}
pre{white-space:pre-wrap}.scrolls{overflow:visible}}
"""
)
