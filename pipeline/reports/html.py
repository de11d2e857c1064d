"""The page around a report: one file, nothing from elsewhere. Style for screen, dark screen and
paper; a script that sorts tables."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark; --ink: #1b2530; --soft: #5b6875; --line: #d9dfe5; --paper: #ffffff; --panel: #f5f7f9;
  --accent: #0b62a8; --second: #b4500a; --warn: #fff4df; --warnline: #d99a2b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #9dabb8; --line: #34404b; --paper: #12181e; --panel: #1a222a;
  --accent: #63b3f5; --second: #f0995a; --warn: #33291a; --warnline: #b98430; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { margin-top: 32px; display: flex; flex-wrap: wrap; gap: 24px; justify-content: space-between; align-items: flex-end; }
h1 { margin: 0; font-size: 30px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; padding-top: 14px; border-top: 1px solid var(--line); font-size: 20px; }
p { margin: 6px 0; max-width: 78ch; }
.soft, figcaption, .note { color: var(--soft); font-size: 13.5px; }
.score { text-align: right; }
.score b { display: block; font-size: 44px; line-height: 1.05; color: var(--accent); font-variant-numeric: tabular-nums; }
.warning { background: var(--warn); border-left: 4px solid var(--warnline); padding: 10px 14px; margin: 14px 0; border-radius: 4px;
  max-width: none; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 12px 24px; margin: 24px 0 0;
  padding: 16px 18px; background: var(--panel); border-radius: 8px; }
dl.facts dt { color: var(--soft); font-size: 12.5px; } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
dl.words { display: grid; grid-template-columns: minmax(130px, max-content) 1fr; gap: 6px 20px; font-size: 14px; }
dl.words dt { font-weight: 600; } dl.words dd { margin: 0; }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: 13.5px; padding-bottom: 6px; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 13px; vertical-align: bottom; }
th:first-child, td:first-child, .left { text-align: left; }
tbody th { color: var(--ink); } tbody tr:hover { background: var(--panel); }
tbody th.id { white-space: normal; overflow-wrap: anywhere; min-width: 110px; max-width: 280px; }
tbody th { vertical-align: top; } td.missing { color: var(--soft); } td small { color: var(--soft); display: block; }
th.group { text-align: center; border-bottom: 2px solid var(--line); }
th button { all: unset; cursor: pointer; font: inherit; } th button:focus-visible { outline: 2px solid var(--accent); }
th button::after { content: "\\2195"; opacity: .45; padding-left: 4px; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
.charts, .cases { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(310px, 1fr)); }
figure { margin: 0; }
figure img { width: 100%; height: auto; max-height: 480px; object-fit: contain; background: #000; border-radius: 6px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .curve { fill: none; stroke: var(--accent); stroke-width: 2; }
svg .faint { fill: none; stroke: var(--accent); stroke-width: 1; opacity: .35; } svg .dot { fill: var(--accent); fill-opacity: .6; }
svg .stage { stroke: var(--soft); stroke-dasharray: 3 3; } svg .mean { stroke: var(--second); stroke-width: 3; }
svg .interval { fill: var(--second); fill-opacity: .22; } svg text.name { fill: var(--ink); font-size: 13px; }
svg text.title { fill: var(--ink); font-weight: 600; font-size: 13px; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin: 0 4px 0 12px; vertical-align: -1px;
  border: 1px solid var(--soft); }
footer { margin-top: 40px; padding: 16px 24px 40px; }
@media (max-width: 720px) { .score { text-align: left; } main, header, footer { padding: 0 14px; } }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --panel: #f3f3f3; --accent: #0b62a8;
  --second: #b4500a; --warn: #fff4df; }
  body { font-size: 11px; } main, header, footer { max-width: none; padding: 0; } .scroll { overflow: visible; } table { font-size: 9.5px; }
  th, td { padding: 3px 5px; } figure, tr, svg { break-inside: avoid; } h2 { break-after: avoid; } thead { display: table-header-group; }
  th button::after { content: ""; } .charts, .cases { grid-template-columns: repeat(3, 1fr); } }
""".strip()

SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending", column = Number(button.dataset.column);
  for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent : cell.dataset.v === "" ? null : Number(cell.dataset.v);
  };
  const order = (a, b) => typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
  const rows = [...body.rows].map(row => [value(row), row]);
  rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : (up ? 1 : -1) * order(a, b));
  body.append(...rows.map(([, row]) => row));
});
""".strip()


def e(text: Any) -> str:
    """Text that is safe inside HTML and attributes."""
    return html.escape(str(text), quote=True)


def page(title: str, body: str) -> str:
    """A whole document. `body` is HTML: header, main, footer."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta '
        'name="viewport" content="width=device-width, '
        'initial-scale=1">\n<meta http-equiv="Content-Security-Policy" '
        f'content="{POLICY}">\n<title>{e(title)}</title>\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n{body}\n<script>\n{SCRIPT}\n</script>\n</body>\n</html>\n"
    )


def section(title: str, body: str, key: str) -> str:
    return f'<section aria-labelledby="{key}">\n<h2 id="{key}">{e(title)}</h2>\n{body}\n</section>'


def facts(pairs: Sequence[tuple[str, Any]]) -> str:
    """A grid of facts; those that are not known are left out."""
    known = [(name, value) for name, value in pairs if value not in (None, "")]
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{e(name)}</dt><dd>{e(value)}</dd></div>" for name, value in known)
        + "</dl>"
    )


def words(pairs: dict[str, str]) -> str:
    return (
        '<dl class="words">'
        + "".join(f"<dt>{e(name)}</dt><dd>{e(text)}</dd>" for name, text in pairs.items())
        + "</dl>"
    )


def cell(value: float | int | None, digits: int = 3, extra: str = "", signed: bool = False) -> str:
    """A table cell with a number that sorts; a dash for what is missing."""
    if value is None:
        return '<td class="missing" data-v="" title="missing">\u2013</td>'
    text = (
        f"{value:{'+' if signed else ''}.{digits}f}" if isinstance(value, float) else f"{value:,}"
    )
    return f'<td data-v="{value!r}">{text}{f"<small>{e(extra)}</small>" if extra else ""}</td>'


def interval(bounds: Sequence[float] | None, digits: int = 3) -> str:
    return "" if bounds is None else f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"


def table(head: str, rows: Sequence[str], caption: str, label: str) -> str:
    """`head` and `rows` are HTML. Wide tables scroll by themselves, with the keyboard too."""
    return (
        '<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{e(label)}"><table><caption>{e(caption)}</caption>'
        f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
