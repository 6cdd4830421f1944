"""The tables of `benchmarks quality`, for a terminal and for the pages, from its result file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._records import write_between_markers
from benchmarks.quality_methods import METHODS
from benchmarks.quality_problems import CONVEX, PROBLEMS

Row = dict[str, Any]
HORIZONS = ("fashion-quarter", "fashion-half", "fashion")
OVERVIEW = ("fashion", "kjv", "digits", "digits-large", "quadratic", "quadratic-quiet")
SCHEDULED = ("adamw-cosine", "adamw-linear", "adamw-wsd")


class Gap(NamedTuple):
    """How far one method's losses are from another's, seed by seed: mean, and its standard error."""

    mean: float
    se: float

    @property
    def errors(self) -> float:
        """The mean in standard errors; > 0 where the first one's losses are less."""
        return self.mean / self.se if self.se else 0.0


def gap(first: Sequence[float | None], second: Sequence[float | None]) -> Gap | None:
    """Returns second minus first, over the same seeds; None if a run diverged."""
    if None in first or None in second:
        return None
    apart = np.array(second, float) - np.array(first, float)
    return Gap(float(apart.mean()), float(apart.std(ddof=1) / len(apart) ** 0.5))


def of(found: Sequence[Row], part: str, problem: str | None = None) -> dict[str, Row]:
    """Returns the rows of a part: by method those of a problem, else by "problem method"."""
    rows = [row for row in found if row["part"] == part and problem in (None, row["problem"])]
    rows.sort(key=_place)
    return {row["method"] if problem else f"{row['problem']} {row['method']}": row for row in rows}


def _place(row: Row) -> tuple[int, int, str, float]:
    """Returns where a row stands: by its problem, its method, and the value of what it varies."""
    option, _, value = row["method"].partition("=")
    problems, methods = list(PROBLEMS), list(METHODS)
    problem = problems.index(row["problem"]) if row["problem"] in problems else len(problems)
    method = methods.index(row["method"]) if row["method"] in methods else len(methods)
    return problem, method if not value else len(methods), option, float(value or 0)


def ends(row: Row, point: int = -1) -> list[float | None]:
    """Returns the chosen rate's test losses at a point, seed by seed."""
    return row["chosen"]["test"][point]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of Markdown, numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def shown(mean: float | None, se: float | None = None) -> str:
    """Returns a loss, and its standard error in its own digits."""
    if mean is None:
        return "diverged"
    if se is None:
        return f"{mean:.4g}"
    decimals = max(0, 1 - int(np.floor(np.log10(se)))) if se else 4
    return f"{mean:.{decimals}f} ± {se:.{decimals}f}"


def _rate(row: Row) -> str:
    return f"{row['chosen']['rate']:g}" + (" (edge)" if row["chosen"]["edge"] else "")


def horizons(found: Sequence[Row]) -> str:
    """Returns one run of Schedule-Free AdamW against AdamW with cosine, tuned anew for each length."""
    free = of(found, "sweep", "fashion").get("sf-adamw")
    rows = []
    for problem in HORIZONS:
        cosine = of(found, "sweep", problem).get("adamw-cosine")
        if free is None or cosine is None:
            continue
        at = free["points"].index(cosine["steps"])
        ours, theirs = free["chosen"], cosine["chosen"]
        apart = gap(ends(free, at), ends(cosine))
        rows.append(
            [
                f"{cosine['steps']:,}",
                shown(ours["mean"][at], ours["se"][at]),
                shown(theirs["mean"][-1], theirs["se"][-1]),
                _rate(cosine),
                "" if apart is None else f"{shown(apart.mean, apart.se)}",
                "" if apart is None else f"{apart.errors:+.1f}",
                f"{100 * ours['error'][at]:.2f} / {100 * theirs['error'][-1]:.2f}",
            ]
        )
    head = ("steps", "one run without a schedule", "cosine, tuned for these steps", "its rate")
    return table((*head, "less by", "in standard errors", "test error, %"), rows)


def overview(found: Sequence[Row]) -> str:
    """Returns every method's test loss on every problem, the rate tuned; the least in bold."""
    at = {problem: of(found, "sweep", problem) for problem in OVERVIEW}
    at = {problem: rows for problem, rows in at.items() if rows}
    least = {
        problem: min(
            (r["chosen"]["mean"][-1], name) for name, r in rows.items() if r["chosen"]["mean"][-1] is not None
        )
        for problem, rows in at.items()
    }
    lines = []
    for name, method in METHODS.items():
        cells = []
        for problem, rows in at.items():
            chosen = rows[name]["chosen"] if name in rows else None
            cell = "" if chosen is None else shown(chosen["mean"][-1], chosen["se"][-1])
            cells.append(f"**{cell}**" if name == least[problem][1] else cell)
        if any(cells):
            lines.append([method.label, *cells])
    return table(["test loss at x", *(PROBLEMS[problem].label for problem in at)], lines)


def rates(found: Sequence[Row]) -> str:
    """Returns a table a problem: the test loss at every rate, the one that validation chose in bold."""
    parts = []
    for problem in PROBLEMS:
        rows = of(found, "sweep", problem)
        if not rows:
            continue
        first = next(iter(rows.values()))
        grid = [f"{rate:g}" for rate in PROBLEMS[problem].rates]
        lines = []
        for name, row in rows.items():
            scale = METHODS[name].scale
            cells = [shown(loss) for loss in row["test"]]
            best = row["rates"].index(row["chosen"]["rate"])
            cells[best] = f"**{cells[best]}**" + (" (edge)" if row["chosen"]["edge"] else "")
            label = METHODS[name].label + (f" (rates times {scale:g})" if scale != 1 else "")
            lines.append([label, *cells])
        title = f"{PROBLEMS[problem].label}, {first['steps']:,} steps, {first['seeds']} seeds:"
        parts.append(f"{title}\n\n{table(['test loss at rate', *grid], lines)}")
    return "\n\n".join(parts)


def loses(found: Sequence[Row]) -> str:
    """Returns the problems on which a scheduled AdamW is better than Schedule-Free AdamW, or as good."""
    rows = []
    for problem in PROBLEMS:
        of_problem = of(found, "sweep", problem)
        theirs = [(name, of_problem[name]) for name in SCHEDULED if name in of_problem]
        theirs = [(name, row) for name, row in theirs if row["chosen"]["mean"][-1] is not None]
        if problem in HORIZONS[:2] or "sf-adamw" not in of_problem or not theirs:
            continue
        name, best = min(theirs, key=lambda pair: pair[1]["chosen"]["validation"])
        apart = gap(ends(of_problem["sf-adamw"]), ends(best))
        if apart is None or apart.errors >= 2:
            continue
        rows.append(
            [
                f"{PROBLEMS[problem].label}",
                "loses" if apart.errors <= -2 else "ties",
                shown(of_problem["sf-adamw"]["chosen"]["mean"][-1]),
                f"{shown(best['chosen']['mean'][-1])} ({METHODS[name].label})",
                f"{apart.errors:+.1f}",
            ]
        )
    head = ("problem", "it", "Schedule-Free AdamW", "the best scheduled AdamW", "less by, in standard errors")
    return table(head, rows)


def convex(found: Sequence[Row]) -> str:
    """Returns the test accuracy on the sets of the paper's Fig. 8."""
    at = {name: of(found, "sweep", name) for name in CONVEX}
    at = {name: rows for name, rows in at.items() if rows}
    lines = []
    for name, method in METHODS.items():
        cells = []
        for rows in at.values():
            chosen = rows[name]["chosen"] if name in rows else None
            cells.append(
                ""
                if chosen is None
                else f"{100 - 100 * chosen['error'][-1]:.1f} ± {100 * chosen['error_se'][-1]:.1f}"
            )
        if any(cells):
            lines.append([method.label, *cells])
    return table(["test accuracy, %", *(PROBLEMS[name].label for name in at)], lines)


def twins(found: Sequence[Row]) -> str:
    """Returns how far apart the twins are, after a short run and at the end."""
    lines = []
    for row in of(found, "twin").values():
        short, full = row["short"], row["full"]
        lines.append(
            [
                f"{PROBLEMS[row['problem']].label}: {METHODS[row['method']].label}",
                f"{short['apart']:.0e}",
                shown(full["jax"], full["se"]),
                f"{full['torch']:.5g}",
                f"{abs(full['torch'] - full['jax']) / full['se']:.2f}",
                f"{row['float64']['apart']:.0e}" if "float64" in row else "",
            ]
        )
    ends = "JAX at the end", "torch", "apart, in standard errors", "apart in float64"
    return table(("", "apart after 100 steps", *ends), lines)


SENSITIVE = {"b1": "beta", "r": "r", "warmup": "warm-up, share of the run"}


def sensitivity(found: Sequence[Row]) -> str:
    """Returns what one hyperparameter at a time does to Schedule-Free AdamW."""
    rows = of(found, "sensitivity")
    lines = []
    for row in rows.values():
        option, _, value = row["method"].partition("=")
        chosen, label = row["chosen"], f"{SENSITIVE[option]} = {value}" if value else "the defaults"
        lines.append([label, shown(chosen["mean"][-1], chosen["se"][-1]), _rate(row), *_around(row)])
    return table(("Fashion-MNIST, 500 steps", "test loss", "best rate", "at half of it", "at twice"), lines)


def _around(row: Row) -> list[str]:
    """Returns the test losses of the rates beside the chosen one."""
    best = row["rates"].index(row["chosen"]["rate"])
    return [shown(row["test"][at]) if 0 <= at < len(row["rates"]) else "" for at in (best - 1, best + 1)]


def batch(found: Sequence[Row]) -> str:
    """Returns the losses of as many steps at several batches."""
    rows = of(found, "batch")
    sizes = sorted({row["batch"] for row in rows.values()})
    by = {(row["batch"], row["method"]): row for row in rows.values()}
    lines = []
    for size in sizes:
        names = [name for name in ("sf-adamw", "adamw-cosine", "adamw-constant") if (size, name) in by]
        chosen = [by[size, name]["chosen"] for name in names]
        lines.append(
            [str(size), *(f"{shown(one['mean'][-1], one['se'][-1])} at {one['rate']:g}" for one in chosen)]
        )
    head = [METHODS[name].label for name in ("sf-adamw", "adamw-cosine", "adamw-constant")]
    return table(("digits, 300 steps: batch", *head), lines)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "quality-horizons": horizons,
    "quality-overview": overview,
    "quality-loses": loses,
    "quality-convex": convex,
    "quality-twins": twins,
    "quality-rates": rates,
    "quality-sensitivity": sensitivity,
    "quality-batch": batch,
}


def write(found: Sequence[Row], page: Path) -> None:
    """Writes the tables that a page has markers for.

    Raises:
        ValueError: if it has none.
    """
    text = page.read_text(encoding="utf-8")
    wanted = [name for name in TABLES if f"<!-- {name} -->" in text]
    if not wanted:
        raise ValueError(
            f"{page} must hold a marker as <!-- quality-overview -->, got none: add it, and its end"
        )
    for name in wanted:
        write_between_markers(page, name, TABLES[name](found))


def text(found: Sequence[Row]) -> str:
    """Returns what a terminal shows."""
    titles = {"quality-loses": "Where it loses, or ties"}
    parts = [
        f"{titles.get(name, name)}\n{make(found)}" for name, make in TABLES.items() if name != "quality-rates"
    ]
    spent = [row["seconds"]["processor"] for row in found if row["seconds"]["processor"] is not None]
    return "\n\n".join(
        [*parts, f"{len(spent)} of {len(found)} rows: {sum(spent) / 60:.1f} minutes of one core"]
    )
