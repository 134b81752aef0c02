"""The style sheet of the report: light and dark, narrow and wide, screen and paper."""

from __future__ import annotations

from typing import Final

LIGHT: Final = {
    "paper": "#fafaf8",
    "card": "#ffffff",
    "ink": "#1a2027",
    "muted": "#566170",
    "line": "#dfe2e6",
    "track": "#e8ebee",
    "accent": "#0b6e6e",
    "flat": "#98a2ae",
    "good": "#17693a",
    "good-paper": "#e3f3e8",
    "warn": "#7d4e00",
    "warn-paper": "#fcf0d8",
    "bad": "#a3242a",
    "bad-paper": "#fbe6e5",
    "calm": "#24507f",
    "calm-paper": "#e4eef8",
}
"""Colours on light paper."""

DARK: Final = {
    "paper": "#11161b",
    "card": "#192027",
    "ink": "#e7ebef",
    "muted": "#a1adba",
    "line": "#2d3742",
    "track": "#2a333d",
    "accent": "#4cc4b8",
    "flat": "#6d7a88",
    "good": "#8ed9a8",
    "good-paper": "#173324",
    "warn": "#f0c674",
    "warn-paper": "#382c12",
    "bad": "#f5a09b",
    "bad-paper": "#401e1f",
    "calm": "#9cc7f2",
    "calm-paper": "#1a2f45",
}
"""Colours on dark paper."""

_BASE: Final = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:76rem;padding:2rem 1.5rem 4rem;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.9rem;line-height:1.2;margin:.1rem 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 .6rem}
h3{font-size:1rem;margin:1.6rem 0 .4rem}
p{margin:.5rem 0;max-width:62rem;overflow-wrap:anywhere}
section{margin-top:2.6rem;padding-top:1.6rem;border-top:1px solid var(--line)}
small{font-size:.8rem;color:var(--muted)}
a{color:var(--accent)}
.muted{color:var(--muted)}
.kicker{margin:0;color:var(--accent);font-weight:600;font-size:.85rem}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;list-style:none;margin:1.4rem 0 0;padding:0}
code,pre,.names{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
code{font-size:.88em;overflow-wrap:anywhere}
"""

_HEADLINE: Final = """
.verdict{margin:1.1rem 0;padding:.8rem 1rem;border-radius:8px;border-left:5px solid;
max-width:none;color:var(--ink)}
.verdict strong{display:block;font-size:1.1rem}
.exact,.close{background:var(--good-paper);border-color:var(--good)}
.exact strong,.close strong{color:var(--good)}
.fair{background:var(--warn-paper);border-color:var(--warn)}
.fair strong{color:var(--warn)}
.far{background:var(--bad-paper);border-color:var(--bad)}
.far strong{color:var(--bad)}
.unknown{background:var(--calm-paper);border-color:var(--calm)}
.unknown strong{color:var(--calm)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.8rem;margin:0}
.tiles>div{background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:.8rem 1rem}
.tiles dt{color:var(--muted);font-size:.85rem}
.tiles dd{margin:0}
.tiles strong{display:block;font-size:1.45rem;line-height:1.3;overflow-wrap:anywhere}
.tiles small{display:block}
figure{margin:1.1rem 0}
figcaption{color:var(--muted);font-size:.88rem;margin:.3rem 0 .5rem;max-width:62rem}
.bar-row{display:grid;grid-template-columns:4rem 1fr 6rem;gap:.8rem;align-items:center;
margin:.3rem 0}
.bar-row .bar{height:14px;margin:0}
.number{text-align:right;font-variant-numeric:tabular-nums}
.bar{display:block;height:6px;border-radius:3px;background:var(--track);overflow:hidden;
margin-top:.25rem}
.bar>span{display:block;height:100%;border-radius:3px;background:var(--flat)}
.bar.dmt>span{background:var(--accent)}
"""

_TABLES: Final = """
.scroll{overflow-x:auto;margin:.9rem 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--muted);font-size:.88rem;padding-bottom:.4rem}
th,td{text-align:left;vertical-align:top;padding:.5rem .7rem;border-bottom:1px solid var(--line)}
thead th{font-size:.82rem;font-weight:600;color:var(--muted);vertical-align:bottom;
white-space:nowrap}
tbody th{font-weight:600}
th.number,td.number{text-align:right}
th:first-child{padding-left:0}
.name{overflow-wrap:anywhere}
td small{margin-left:.45rem}
.quality td.number small,.quality td.number .bar{display:block;margin-left:auto}
.quality .bar{width:5rem;margin-bottom:.25rem}
.change.worse{color:var(--bad)}
.change.better{color:var(--good)}
.badge{display:inline-block;font-size:.76rem;font-weight:600;padding:.05rem .5rem;
border-radius:99px;background:var(--track);color:var(--ink);white-space:nowrap}
bdi+.badge{margin-left:.5rem}
.badge.assumed{background:var(--warn-paper);color:var(--warn)}
.badge.given,.badge.inferred{background:var(--calm-paper);color:var(--calm)}
.badge.read,.badge.own{background:var(--good-paper);color:var(--good)}
.towers td:nth-child(3),.towers td:nth-child(4),.towers td:nth-child(5){white-space:nowrap;
min-width:7.5rem}
.towers td:nth-child(6){min-width:8rem}
.hosts td:nth-child(4){min-width:9rem}
.hosts td:nth-child(4) small{margin:0}
.swatch{display:inline-block;width:.75em;height:.75em;border-radius:3px;margin-right:.45em}
.count{display:block;font-size:.8rem}
ul.names,ul.chips{display:flex;flex-wrap:wrap;list-style:none;margin:0;padding:0;gap:.15rem .6rem}
ul.names{font-size:.8rem}
ul.names li{overflow-wrap:anywhere}
.ranks{display:inline-flex;align-items:flex-end;gap:2px;height:1.3em;vertical-align:bottom}
.ranks>span{width:6px;min-height:1px;background:var(--accent);border-radius:1px}
dl{margin:.8rem 0}
section dl>div{display:grid;grid-template-columns:12rem 1fr;gap:.8rem;padding:.2rem 0}
section dt{color:var(--muted)}
section dd{margin:0;overflow-wrap:anywhere}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--accent)}
#files table{max-width:46rem}
.advice{border-left:3px solid var(--accent);padding-left:.8rem}
.card{background:#fff;border:1px solid var(--line);border-radius:8px;padding:.6rem;
overflow-x:auto}
.card svg{display:block;width:100%;min-width:56rem;height:auto;font-family:"DejaVu Sans",
Verdana,sans-serif}
.commands{padding:0;list-style:none}
.commands p{margin:1rem 0 .2rem;color:var(--muted)}
pre{margin:0;padding:.7rem .9rem;background:var(--card);border:1px solid var(--line);
border-radius:8px;overflow-x:auto;user-select:all}
pre code{overflow-wrap:normal;white-space:pre}
footer{margin-top:3rem;color:var(--muted);font-size:.85rem}
"""

_NARROW: Final = """
@media screen and (max-width:46rem){
body{padding:1.2rem 1rem 3rem}
h1{font-size:1.5rem}
thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
table,caption,tbody,tr,tbody th,td{display:block;width:auto}
tr{border-bottom:1px solid var(--line);padding:.6rem 0}
th,td,th.number,td.number{border:0;padding:.15rem 0;text-align:left}
td{display:grid;grid-template-columns:7.5rem minmax(0,1fr);gap:.6rem}
td::before{content:attr(data-label);color:var(--muted);font-size:.82rem}
.towers tbody th::before,.hosts tbody th::before{content:attr(data-label) " ";
color:var(--muted);font-weight:400}
.tiles{grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr))}
.tiles strong{font-size:1.2rem}
.quality td.number small,.quality td.number .bar{display:inline-block;margin-left:.5rem}
.quality td.number .bar{margin-left:0;margin-right:.5rem;vertical-align:middle}
section dl>div{grid-template-columns:1fr;gap:0}
.bar-row{grid-template-columns:3.2rem 1fr 5.2rem;gap:.5rem}
}
"""

_PRINT: Final = """
@media print{
body{max-width:none;padding:0;font-size:10pt}
nav{display:none}
section{break-before:auto}
tr,figure,.tiles>div,pre{break-inside:avoid}
.card{overflow:visible}
.card svg{min-width:0}
pre code{white-space:pre-wrap}
details::details-content{content-visibility:visible;block-size:auto}
.bar,.bar>span,.swatch,.ranks>span,.verdict,.badge{print-color-adjust:exact;
-webkit-print-color-adjust:exact}
}
"""


def _variables(colours: dict[str, str]) -> str:
    return ":root{" + ";".join(f"--{name}:{value}" for name, value in colours.items()) + "}"


STYLE: Final = "".join(
    [
        _variables(LIGHT),
        f"@media screen and (prefers-color-scheme:dark){{{_variables(DARK)}}}",
        _BASE,
        _HEADLINE,
        _TABLES,
        _NARROW,
        _PRINT,
    ]
)
"""The whole style sheet."""
