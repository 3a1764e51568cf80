"""The pieces of an HTML page, which know nothing of runs: foreign text, numbers, tables, curves, the style.

A page fetches nothing and runs nothing: no script is in it, and its Content-Security-Policy lets none in.
"""

import html
import math
import re

# control characters but newline and tab, what turns the direction of writing, halves of surrogate pairs
ODD = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text):
    """Any value as HTML: escaped, odd characters by their code."""
    return ODD.sub(
        lambda found: f"<i class=odd>{ascii(found[0])[1:-1]}</i>", html.escape(str(text))
    )


def plain(text):
    """The same for a title or an attribute, which hold no tags."""
    return ODD.sub(lambda found: ascii(found[0])[1:-1], html.escape(str(text)))


def figure(value):
    """A number as one reads it, "-" where there is none."""
    if value is None:
        return "-"
    return typeset(f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}")


def typeset(number):
    return number.replace("e-0", "e-").replace("-", "\u2212")


def table(head, rows, numbers=False):
    """A table that scrolls inside its own box. Cells are HTML; a row of one cell is a heading."""
    body = "".join(
        f'<tr><th colspan="{len(head)}" class=part>{row[0]}</th></tr>'
        if len(row) == 1
        else f"<tr><th>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<div class=scroll tabindex=0><table{' class=numbers' * numbers}><thead><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr></thead><tbody>{body}</tbody></table></div>"


def more(title, parts):
    """What is unfolded by a click."""
    return (
        f"<details><summary>{visible(title)}</summary>{''.join(parts)}</details>" if parts else ""
    )


def ticks(low, high, n):
    """About n round numbers from low to high, [(number, text)], with as many decimals as they need."""
    power = 10.0 ** math.floor(math.log10((high - low) / n))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * (high - low) / n)
    numbers = [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]
    finest, greatest = (math.floor(math.log10(y) + 1e-9) for y in (step, max(abs(low), abs(high))))
    form = f",.{max(0, -finest)}f" if greatest > -4 else f".{greatest - finest}e"
    return [(y, typeset(format(y, form) if y else "0")) for y in numbers]


def curve(title, unit, series, steps, borders=(), level=None):
    """An SVG of {label: [[(step, y), ...] of each piece]} over (first, last) of `steps`. borders: [(step, text)] of vertical lines;
    level: (y, text) of a horizontal one."""
    ys = [y for pieces in series.values() for piece in pieces for _, y in piece] + (
        [level[0]] if level else []
    )
    left, right, low, high = steps[0], max(steps[1], steps[0] + 1), min(ys), max(ys)
    margin = max(0.06 * (high - low), 1e-4 * abs(high)) if high > low else 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin
    W, H, L, R, T, B = 380, 220, 58, 12, 26, 34  # the picture, and its margins

    def X(step):
        return round(L + (step - left) / (right - left) * (W - L - R), 1)

    def Y(y):
        return round(H - B - (y - low) / (high - low) * (H - T - B), 1)

    out = [
        f'<text class=unit x="4" y="13">{plain(unit)}</text><text class=unit x="{W - R}" y="{H - 3}" text-anchor="end">step</text>'
    ]
    for y, text in ticks(low, high, 4):
        out.append(
            f'<line class=grid x1="{L}" x2="{W - R}" y1="{Y(y)}" y2="{Y(y)}"/><text x="{L - 6}" y="{Y(y) + 4}" text-anchor="end">{text}</text>'
        )
    for x, text in ticks(left, right, 4):
        out.append(
            f'<text x="{X(x)}" y="{H - B + 15}" text-anchor="middle">{text}</text>'
            if "." not in text
            else ""
        )
    for x, text in borders[:: -(-len(borders) // 5) or 1]:
        out.append(f'<line class=border x1="{X(x)}" x2="{X(x)}" y1="{T - 6}" y2="{H - B}"/>')
        out.append(
            f'<text class=unit x="{X(x) + 3}" y="{T}">{plain(text)}</text>' if X(x) < W - 60 else ""
        )
    out.append(
        f'<line class=level x1="{L}" x2="{W - R}" y1="{Y(level[0])}" y2="{Y(level[0])}"/>'
        if level
        else ""
    )
    for n, (label, pieces) in enumerate(series.items()):
        out.append(f'<g class="{colour(n)}">')
        for piece in pieces:
            out.append(f'<polyline points="{" ".join(f"{X(x)},{Y(y)}" for x, y in piece)}"/>')
            if len(piece) <= 60:
                out += [
                    f'<circle cx="{X(x)}" cy="{Y(y)}" r="2.5"><title>{plain(label)}, step {figure(x)}: {figure(y)}</title></circle>'
                    for x, y in piece
                ]
        out.append("</g>")
    legend = "".join(
        f'<li class="{colour(n)}"><i class=key></i>{visible(label)} <b>{figure(pieces[-1][-1][1])}</b></li>'
        for n, (label, pieces) in enumerate(series.items())
    )
    legend += f"<li><i class=dashes></i>{visible(level[1])}</li>" if level else ""
    return (
        f'<figure><figcaption>{visible(title)}</figcaption><svg viewBox="0 0 {W} {H}" role=img aria-label="{plain(title)}, {plain(unit)}, by step">{"".join(out)}</svg>'
        f"<ul class=legend>{legend}</ul></figure>"
    )


def colour(n):
    """The class of the n-th thing's colour."""
    return f"s{n % 6}" + " late" * (n >= 6)


def whole(title, body):
    """The file."""
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\"><meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{plain(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f6f7f9; --text: #1b2330; --dim: #5c6675; --line: #dfe3e8; --warn: #fff4d6;
  --s0: #2463d6; --s1: #c2570c; --s2: #0b8457; --s3: #b0277e; --s4: #6d3fc4; --s5: #0e7a94 }
@media (prefers-color-scheme: dark) { :root { --back: #12161c; --card: #1a2029; --text: #e3e8ef; --dim: #98a3b3; --line: #303946; --warn: #3a3014;
  --s0: #7aa8ff; --s1: #ffa25e; --s2: #4fd19b; --s3: #f58acb; --s4: #b79bff; --s5: #56cbe4 } }
.s0 { --c: var(--s0) } .s1 { --c: var(--s1) } .s2 { --c: var(--s2) } .s3 { --c: var(--s3) } .s4 { --c: var(--s4) } .s5 { --c: var(--s5) }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, "Segoe UI", "Open Sans", sans-serif; overflow-wrap: anywhere }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.7rem; margin: 0 0 1rem }
h2 { font-size: 1.35rem; margin: 2.5rem 0 1rem }
h3 { font-size: 1.1rem; margin: 2.5rem 0 .75rem }
h4 { font-size: .9rem; margin: 1rem 0 .3rem }
section:first-of-type > h2 { margin-top: 0 }
p { margin: .4rem 0 }
a { color: var(--s0) }
code, .odd, .tokens { font: .85em ui-monospace, "DejaVu Sans Mono", monospace }
small, .dim, .none { color: var(--dim) }
h2 small, h4 small { font-weight: normal; font-size: .9rem }
.none { border: 1px dashed var(--line); border-radius: 8px; padding: .75rem 1rem }
.odd { color: var(--dim); border: 1px solid var(--line); border-radius: 3px; padding: 0 .15em }
.notes { background: var(--warn); border-radius: 8px; padding: .75rem 1rem .75rem 2rem; margin: 1rem 0 }

.tiles, .curves, .answers { display: grid; gap: .75rem; margin: 0 }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)) }
.curves { grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); margin-top: .75rem }
.answers { grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)) }
.tiles div, figure, article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .75rem 1rem; min-width: 0 }
dt, dd { margin: 0; color: var(--dim); font-size: .85rem }
dd b { display: block; color: var(--text); font-size: 1.35rem; line-height: 1.35 }

figure { margin: 0 }
figcaption { font-weight: 600; font-size: .95rem }
svg { display: block; width: 100%; height: auto }
svg text { font: 11px system-ui, "Open Sans", sans-serif; fill: var(--dim) }
polyline { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round }
.late polyline { stroke-dasharray: 4 2 }
circle { fill: var(--c) }
.grid { stroke: var(--line) }
.border { stroke: var(--dim); stroke-dasharray: 3 3; opacity: .6 }
.level { stroke: var(--dim); stroke-dasharray: 6 3 }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; list-style: none; margin: .4rem 0 0; padding: 0; font-size: .85rem; color: var(--dim) }
.legend b { color: var(--text); font-weight: 600 }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; background: var(--c); margin-right: .4em }
.dashes { display: inline-block; width: 1.4em; border-top: 2px dashed var(--dim); vertical-align: middle; margin-right: .4em }

.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; width: fit-content; max-width: 100%; min-width: min(100%, 34rem) }
table { border-collapse: separate; border-spacing: 0; font-size: .88rem; width: 100% }
tbody tr + tr > * { border-top: 1px solid var(--line) }
th, td { text-align: left; padding: .35rem .75rem; vertical-align: top; min-width: 4.5rem }
td + td { min-width: 7rem }
th + td { min-width: 14rem; white-space: pre-wrap }
tbody th { font-weight: normal; overflow-wrap: normal; min-width: 8.5rem }
@media (min-width: 50rem) { tbody th { min-width: 17rem } }
.numbers td, .numbers thead th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; min-width: 4.5rem }
.numbers th:first-child { position: sticky; left: 0; background: var(--back) }
thead th, .numbers thead th:first-child, tbody th.part.part { background: var(--card); font-weight: 600 }
tbody .part { color: var(--dim); font-size: .82rem }

details { margin: .75rem 0 }
summary { cursor: pointer; font-weight: 600; font-size: .9rem; padding: .25rem 0 }
article { margin: .75rem 0 }
.text { white-space: pre-wrap; margin: 0 0 .4rem; max-height: 18rem; overflow-y: auto }
.prompt { font-weight: 600 }
.answer { background: var(--back); border-top: 3px solid var(--c); border-radius: 4px; padding: .5rem .75rem; min-width: 0 }
.answer h4 { margin: 0 0 .25rem }
.tie { color: var(--dim) }
mark { background: var(--warn); color: inherit; padding: 0 .3em; border-radius: 3px }
.tokens { font-size: .9rem; line-height: 1.9; padding: 1px }
.tokens span { border-radius: 3px; padding: .1em 0; margin-right: 2px }
.read { background: var(--card); color: var(--dim); outline: 1px solid var(--line) }
.asked { background: color-mix(in srgb, var(--c) 22%, transparent); outline: 1px solid color-mix(in srgb, var(--c) 45%, transparent) }
.eot { font-weight: 700 }
"""
