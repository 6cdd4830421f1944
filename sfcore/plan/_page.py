"""A plan as pieces of HTML: what it will do, problems, curves, files. A user's words are text, never HTML."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from html import escape
from itertools import islice

import numpy as np

from sfcore.plan._model import Change, Plan
from sfcore.plan._report import curves, facts

_MOST, _LONGEST = 100, 300  # problems that are shown; characters of one value
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 520, 170, 58, 28, 26
_POINTS = 300

HEADER = """
<h1>Check a run before it starts</h1>
<p>Paste or open what you are about to train with. What a choice has made meaningless is switched off, says
why, and gets its value back when the choice is undone.</p>
"""
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto; }
footer { display: none !important; }
.form > .block { display: flex; flex-direction: column; }
.form > .block > label, .form > .block > .container { flex: 1; display: flex; flex-direction: column; }
.form > .block .input-container, .form > .block > .container > .wrap { margin-top: auto; }
#sf-text textarea, #sf-now textarea { font: 13px/1.5 var(--font-mono); }
.sf-gone { display: none !important; }
.sf-off :disabled { opacity: .55; cursor: not-allowed; }
.sf-off .info-text { color: #93590a; }
.dark .sf-off .info-text { color: #fdb022; }
.sf { --sf-red: #b42318; --sf-amber: #93590a; --sf-green: #18703c; line-height: 1.5; }
.dark .sf { --sf-red: #f97066; --sf-amber: #fdb022; --sf-green: #47cd89; }
.sf h1 { font-size: 1.55rem; font-weight: 650; letter-spacing: -.015em; margin: .6rem 0 .2rem; }
.sf h2 { font-size: 1.05rem; font-weight: 650; margin: 0 0 .55rem; }
.sf p { display: block; margin: 0; }
.sf code, .sf dd, .sf li, .sf p { overflow-wrap: anywhere; }
.sf code, .sf-problems .code { font-family: var(--font-mono); font-size: .86em; }
.sf ul { list-style: none; margin: 0; padding: 0; }
.sf li { font-size: .93rem; margin: 0 0 .3rem; }
.sf dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.1rem; margin: 0; }
.sf dd, .sf dt { margin: 0; font-size: .93rem; }
.sf dt, .sf-header p, .sf details, .sf-problems .code { color: var(--body-text-color-subdued); }
.sf-header p { max-width: 46rem; }
.sf-problems li { border-left: 3px solid var(--sf-amber); padding: 0 0 0 .8rem; margin-bottom: .85rem; }
.sf-problems li.error { border-color: var(--sf-red); }
.sf-problems .code { float: right; }
.sf-problems .fix { font-weight: 550; }
.sf-problems .fix::before { content: "\\2192\\00a0"; }
.sf summary { cursor: pointer; font-size: .86rem; }
.sf .bad { color: var(--sf-red); }
.sf .fair { color: var(--sf-amber); }
.sf .good { color: var(--sf-green); }
.sf-refused { border-left: 3px solid var(--sf-red); padding: .2rem .8rem; }
.sf svg { width: 100%; height: auto; display: block; margin: 0 0 .5rem; }
.sf svg text { fill: var(--body-text-color-subdued); font: 12px var(--font); }
.sf svg text.title { fill: var(--body-text-color); font-size: 13px; font-weight: 600; }
.sf svg .grid { stroke: var(--border-color-primary); }
.sf svg .curve { fill: none; stroke: var(--primary-500); stroke-width: 2; stroke-linejoin: round; }
.sf-files a { padding: 0 !important; margin: 0 .9rem 0 0; color: var(--link-text-color); }
.sf-files a::before { content: "\\2193\\00a0"; }
"""


def piece(kind: str, inside: str) -> str:
    """Returns a piece of the page, which has its looks by its kind."""
    return f'<div class="sf sf-{kind}">{inside}</div>' if inside else ""


def shown(value: object) -> str:
    """Returns a value as HTML that shows it, and does nothing else; a long one is cut."""
    text = str(value)
    return escape(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)")


def refused(reason: object) -> str:
    """Returns why a text could not be read."""
    return piece("refused", f"<p>{shown(reason)}</p><p>What was read before stays below.</p>")


def summary(plan: Plan) -> str:
    """Returns what the run will do."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{shown(value)}</dd>" for name, value in facts(plan))
    return piece("summary", f"<h2>{shown(plan.source)}: what the run will do</h2><dl>{rows}</dl>")


def problems(plan: Plan) -> str:
    """Returns every problem with its fix, the worst first; of very many the first hundred."""
    count = [(len(plan.errors), "error", "bad"), (len(plan.warnings), "warning", "fair")]
    told = [f'<span class="{look}">{n} {name}{"s" * (n > 1)}</span>' for n, name, look in count if n]
    head = ", ".join(told) or '<span class="good">No problems found</span>'
    worst_first = (*plan.errors, *plan.warnings)
    items = [
        f'<li class="{one.severity}"><span class="code">{one.code}</span>'
        f"<p><code>{shown(one.field)}</code> must be {shown(one.rule)}, got "
        f"<code>{shown(repr(one.found))}</code></p>"
        f'<p class="fix">{shown(one.fix)}</p>'
        f"<details><summary>Why</summary>{shown(one.why)}</details></li>"
        for one in worst_first[:_MOST]
    ]
    more = len(worst_first) - len(items)
    rest = f"<p>and {more} more, of which <code>schedulefree plan</code> prints every one</p>" if more else ""
    return piece("problems", f'<h2 role="status">{head}</h2><ul>{"".join(items)}</ul>{rest}')


def changes(made: Iterable[Change]) -> str:
    """Returns what a repair has changed."""
    items = [
        f"<li><code>{shown(one.field)}</code>: {_value(one.before)} → {_value(one.after)} ({one.code})</li>"
        for one in islice(made, _MOST)
    ]
    return piece("changes", f"<h2>Repaired</h2><ul>{''.join(items)}</ul>" if items else "")


def _value(value: object) -> str:
    return "nothing" if value is None else f"<code>{shown(value)}</code>"


def files(contents: Mapping[str, str]) -> str:
    """Returns links that save files; they hold them, so that no server has to keep any."""
    links = []
    for name, text in contents.items():
        held = base64.b64encode(text.encode("utf-8", "surrogateescape")).decode()
        kind = f"data:application/octet-stream;base64,{held}"
        links.append(f'<a download="{escape(name)}" href="{kind}">Save {escape(name)}</a>')
    return piece("files", "".join(links))


def pictures(plan: Plan) -> str:
    """Returns the curves of lr and c over the run, or why there are none."""
    try:
        drawn = curves(plan)
    except ValueError as error:
        return piece("curves", f"<h2>Curves</h2><p>{shown(error)}</p>")
    return piece("curves", "".join(_picture(title, values, log) for title, values, log in drawn))


def _picture(title: str, values: np.ndarray, log: bool) -> str:
    last = len(values) - 1
    places = np.unique(np.linspace(0, last, _POINTS).astype(int))
    if log:  # most of it happens at the start
        places = np.unique(np.concatenate([places, np.geomspace(1, last + 1, _POINTS).astype(int) - 1]))
    ticks, low, high = _ticks(values, log)
    floor = _HEIGHT - _BOTTOM

    def down(value: np.ndarray | float) -> np.ndarray:
        value = np.log10(np.maximum(value, 10.0**low)) if log else np.asarray(value)
        return floor - (value - low) / (high - low) * (floor - _TOP)

    def across(step: np.ndarray | float) -> np.ndarray:
        return _LEFT + np.asarray(step) / max(last, 1) * (_WIDTH - _LEFT - 12)

    lines = [f'<text class="title" x="{_LEFT}" y="14">{escape(title)}</text>']
    for tick in ticks:
        y = float(down(tick))
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for step, anchor in ((0, "start"), (last // 2, "middle"), (last, "end")):
        text = f"step {step + 1}" if step == 0 else f"{step + 1}"
        x = float(across(step))
        lines.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{text}</text>')
    points = zip(across(places), down(values[places]), strict=True)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    lines.append(f'<polyline class="curve" points="{path}"/>')
    inside = "".join(lines)
    return f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {_WIDTH} {_HEIGHT}">{inside}</svg>'


def _ticks(values: np.ndarray, log: bool) -> tuple[list[float], float, float]:
    """Returns where lines are drawn, and the ends of the axis, which are decades where it is logarithmic."""
    largest = float(values.max())
    if not log:
        return [0.0, largest / 2, largest] if largest else [0.0], 0.0, largest or 1.0
    positive = values[values > 0]
    low, high = (
        (math.floor(math.log10(positive.min())), math.ceil(math.log10(largest))) if len(positive) else (0, 1)
    )
    high = max(high, low + 1)
    every = math.ceil((high - low) / 4)
    return [10.0**power for power in range(high, low - 1, -every)], low, high
