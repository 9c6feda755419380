"""The CSS of a page: light, dark, narrow and print."""

from __future__ import annotations

from mmmamba_cli.reporting.series_styles import (
    DARK_COLOURS,
    LIGHT_COLOURS,
    colour_variables,
    style_css,
)

DAY = (
    "--ground:#fff;--raised:#f6f7f9;--ink:#1c1e21;--soft:#555b63;--rule:#d9dde2;"
    "--good:#1b6e3c;--bad:#a3262a;--link:#0b5cad;" + colour_variables(LIGHT_COLOURS)
)
NIGHT = (
    "--ground:#15171a;--raised:#1e2126;--ink:#e8eaed;--soft:#a4abb5;--rule:#363b43;"
    "--good:#7bd69a;--bad:#ff9a94;--link:#8ec2ff;" + colour_variables(DARK_COLOURS)
)

BASE = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:1.5rem 1rem 4rem;background:var(--ground);
color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.2rem 0 .6rem}
h2{font-size:1.3rem;line-height:1.3;margin:2.6rem 0 .6rem;padding-top:1rem;
border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.1rem 0 .3rem}
p{max-width:46rem;margin:.5rem 0}
a{color:var(--link)}
code,pre{font:.85em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--raised);border:1px solid var(--rule);border-radius:6px;padding:.7rem .9rem;
white-space:pre-wrap}
.lead{font-size:1.12rem}.small,.axis{font-size:.87rem;color:var(--soft)}
.axis{margin:0 0 .2rem}
.found{border-left:4px solid var(--s0);padding:.4rem .8rem;background:var(--raised);
max-width:56rem}
.table{margin:.8rem 0}
table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums;
max-width:100%}
caption{text-align:left;font-weight:600;padding:.2rem 0}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--rule);text-align:right;
vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom;overflow-wrap:break-word}
tbody th{font-weight:500}
td{overflow-wrap:break-word}
.words td,.words th{text-align:left}
.unbroken{white-space:nowrap}
figure{margin:1rem 0}figcaption{font-size:.87rem;color:var(--soft);max-width:56rem;
margin:.5rem 0}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--link);font-size:.92rem}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));
gap:1rem 1.4rem;align-items:start}
.panels>*{min-width:0}
.panels svg:not(.swatch){display:block;width:100%;max-width:400px;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:.15rem 1rem;list-style:none;padding:0;
margin:.3rem 0;font-size:.85rem}
.swatch{vertical-align:-1px}
.cards{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr))}
.card{border:1px solid var(--rule);border-radius:8px;padding:.8rem;background:var(--raised);
min-width:0}
.card img{display:block;width:100%;max-width:336px;height:auto;border-radius:4px;background:#fff}
.card h3{margin:.2rem 0 .4rem}
.question{font-weight:600;margin:.7rem 0 .1rem}.question .small{font-weight:400}
.answers{list-style:none;margin:0;padding:0;font-size:.9rem}
.answers li{display:flex;gap:.5rem;justify-content:space-between;padding:.1rem 0;
border-bottom:1px solid var(--rule)}
.answers li>span{min-width:0}
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
.stroke.hollow{fill:var(--ground);stroke-width:1.5}
.stroke.mark{stroke-width:1.2;stroke-dasharray:2 2}
.stroke.noisy{stroke-width:1.4;stroke-dasharray:1.6 1.4}
"""

NARROW = """
@media(max-width:820px){body{padding:1rem .8rem 3rem}h1{font-size:1.4rem}
table,caption,tbody,tr,th,td{display:block}thead{display:none}
tbody tr{border:1px solid var(--rule);border-radius:6px;padding:.3rem .6rem;margin:.4rem 0}
tbody th,tbody td,.words td{text-align:left;padding:.15rem 0;border:0}
tbody th{font-weight:600}
td{display:flex;gap:.8rem;justify-content:space-between}
td::before{content:attr(data-label);color:var(--soft);flex:0 1 50%;min-width:0}
td>span{flex:0 1 auto;min-width:0;text-align:right;overflow-wrap:anywhere}
.tree,.tree ul{padding-left:.6rem}}
"""

PRINT = (
    "@media print{:root{"
    + DAY
    + """}body{max-width:none;font-size:10.5pt}
.card,figure div,tr{break-inside:avoid}h2,h3{break-after:avoid}}
"""
)

CSS = (
    f":root{{color-scheme:light dark;{DAY}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{NIGHT}}}}}" + style_css() + BASE + NARROW + PRINT
)
