"""The page's skeleton and looks: one HTML file, no script, no link, light and dark, readable on paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["facts", "figure", "page", "picture", "section", "table", "tiles"]

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbf9; --card: #ffffff; --ink: #1c2126; --soft: #5b6670; --line: #e2e4e1;
  --accent: #0b6e8a; --accent-soft: #0b6e8a33; --good: #23784a; --bad: #b3402f; --random: #8a6d1f; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --card: #1c2125; --ink: #e6e8e6; --soft: #9aa5ad;
  --line: #30373d; --accent: #5cc0dc; --accent-soft: #5cc0dc44; --good: #6fc893; --bad: #f08a78; --random: #d9b75c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 44px 28px 80px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 8px; font-weight: 650; }
h2 { font-size: 22px; letter-spacing: -.01em; margin: 0 0 6px; font-weight: 620; }
h3 { font-size: 15px; margin: 0 0 2px; font-weight: 620; }
p { margin: 0 0 12px; max-width: 78ch; } .lead { font-size: 18px; color: var(--soft); max-width: 72ch; }
section { margin-top: 52px; padding-top: 26px; border-top: 1px solid var(--line); }
.look { border-left: 3px solid var(--accent); padding: 2px 0 2px 14px; color: var(--soft); margin: 10px 0 20px; }
.look b { color: var(--ink); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 14px; margin: 26px 0 4px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 26px; letter-spacing: -.02em; font-weight: 620; }
.tile span { color: var(--soft); font-size: 13.5px; line-height: 1.35; display: block; }
.tile.good b { color: var(--good); } .tile.bad b { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px 10px; }
figcaption { color: var(--soft); font-size: 13.5px; line-height: 1.4; margin-bottom: 6px; }
figcaption strong { color: var(--ink); font-size: 15px; display: block; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 11.5px; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); } svg .unit { font-size: 10.5px; }
svg polyline { fill: none; stroke-linejoin: round; } svg .raw { stroke: var(--accent); opacity: .28; stroke-width: 1; }
svg .smooth { stroke: var(--accent); stroke-width: 2.2; } svg circle { fill: var(--accent); }
svg .dots polyline { stroke: var(--bad); stroke-width: 1.4; } svg .dots circle { fill: var(--bad); }
svg .level line { stroke: var(--soft); stroke-dasharray: 5 4; stroke-width: 1.3; } svg .level text { font-size: 11px; }
svg .bad line { stroke: var(--bad); } svg .bad text { fill: var(--bad); }
svg .random line { stroke: var(--random); } svg .random text { fill: var(--random); }
.keys { color: var(--soft); font-size: 13.5px; margin: 0 0 14px; }
.keys i { display: inline-block; width: 20px; height: 0; border-top: 3px solid var(--accent); vertical-align: 4px;
  margin: 0 6px 0 14px; } .keys i:first-child { margin-left: 0; } .keys .k-raw { opacity: .35; }
.keys .k-dots { border-color: var(--bad); }
.crop { margin: 30px 0 44px; } .strip { display: grid; gap: 8px; margin: 10px 0 18px; align-items: start; }
.strip .head { font-size: 13px; line-height: 1.3; color: var(--soft); align-self: end; }
.strip .head b { color: var(--ink); display: block; font-weight: 600; }
.strip .side { font-size: 12.5px; color: var(--soft); writing-mode: vertical-rl; transform: rotate(180deg);
  text-align: center; align-self: center; }
.pic { position: relative; background: #000; border-radius: 4px; overflow: hidden; }
.pic img { display: block; width: 100%; height: auto; } .pic img + img { position: absolute; inset: 0; height: 100%; }
.pic .cells { image-rendering: pixelated; }
.pic u { position: absolute; color: #fff; opacity: .75; font-size: 11px; line-height: 1; text-decoration: none;
  text-shadow: 0 0 3px #000; } .pic u:nth-of-type(1) { left: 5px; top: calc(50% - 6px); }
.pic u:nth-of-type(2) { right: 5px; top: calc(50% - 6px); } .pic u:nth-of-type(3) { left: calc(50% - 4px); top: 5px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14.5px; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 13px; } th, td { padding: 7px 14px 7px 0;
  border-bottom: 1px solid var(--line); vertical-align: middle; } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; } tr.us td { font-weight: 620; } td.bar { width: 38%; }
.bar div { height: 13px; border-radius: 3px; background: var(--accent-soft); border-right: 2px solid var(--accent); }
tr.us .bar div { background: var(--accent); } td small { color: var(--soft); font-weight: 400; display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 22px; margin: 0; font-size: 14.5px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 56px; color: var(--soft); font-size: 13.5px; }
@media print { section { break-inside: avoid-page; } main { padding: 0; } }
"""


def page(title: str, body: Iterable[str]) -> str:
    """The whole document."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def section(title: str, look: str, *parts: str) -> str:
    """A section. look: what the reader should look for, HTML."""
    head = f'<h2>{escape(title)}</h2><p class="look"><b>What to look for.</b> {look}</p>'
    return f"<section>{head}{''.join(parts)}</section>"


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Key numbers: (number, what it is, "good" | "bad" | "")."""
    cells = (
        f'<div class="tile {tone}"><b>{escape(n)}</b><span>{escape(what)}</span></div>' for n, what, tone in entries
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def figure(title: str, caption: str, drawing: str) -> str:
    return f"<figure><figcaption><strong>{escape(title)}</strong>{caption}</figcaption>{drawing}</figure>"


def picture(alt: str, base: str, overlay: str | None = None, edges: Sequence[str] = ()) -> str:
    """A slice. base, overlay: data URIs, the overlay with sharp voxels; edges: letters at the left, right and top."""
    over = f'<img class="cells" alt="" src="{overlay}">' if overlay else ""
    letters = "".join(f"<u>{letter}</u>" for letter in edges)
    return f'<div class="pic"><img alt="{escape(alt)}" src="{base}">{over}{letters}</div>'


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """rows: (class of the row, cells of HTML); the first column is text, "bar:0.4" a bar, all others are numbers."""
    names = "".join(f"<th{' class=n' if i and name else ''}>{name}</th>" for i, name in enumerate(head))
    body = "".join(f'<tr class="{kind}">{"".join(map(_cell, range(len(cells)), cells))}</tr>' for kind, cells in rows)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(place: int, text: str) -> str:
    if text.startswith("bar:"):
        return f'<td class="bar"><div style="width:{100 * min(float(text[4:]), 1.0):.1f}%"></div></td>'
    return f"<td{' class=n' if place else ''}>{text}</td>"


def facts(entries: Iterable[tuple[str, str]]) -> str:
    """Names and values as a list."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries) + "</dl>"
