"""(b) in figures: one row a method and setting, the table for people, and whether the target is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from benchmarks import _records
from benchmarks.resume_methods import EXACT, OURS, OURS_JAX, RADAM, Method
from benchmarks.resume_restart import LAST, Curve, Setting

PART = "restart"
BOUND = 1.05  # largest worst loss over the exact continuation's
# Each is a ratio or a loss for each seed: the losses of two seeds differ by a factor of 2 (each has its own
# data), those of two methods on one seed by 10%, so only ratios within a seed tell methods apart.
MEASURES = ("worst_over_before", "worst_over_exact", "loss_at_300", "loss_at_300_over_radam")
Row = dict[str, Any]


def rows(setting: Setting, lead: Curve, curves: Mapping[Method, Curve], part: str = PART) -> list[Row]:
    """Returns one row a method."""
    before = lead.at(0)
    references = {method.name: curve for method, curve in curves.items()}
    shared = {
        "part": part,
        "problem": setting.problem.name,
        "accumulate": setting.accumulate,
        "micro_batch": setting.problem.micro_batch,
        "trained": setting.trained,
        "lr": setting.problem.lr,
        "n": setting.problem.seeds,
        "device": "cpu",
        "versions": _records.versions(),
        "loss_before": _records.spread(before),
    }
    found = []
    for method, curve in curves.items():
        measured = {
            "worst_over_before": curve.worst() / before,
            "worst_over_exact": curve.worst() / references[EXACT.name].worst(),
            "loss_at_300": curve.at(LAST),
            "loss_at_300_over_radam": curve.at(LAST) / references[RADAM.name].at(LAST),
        }
        spreads = {name: _records.spread(values) | error(values) for name, values in measured.items()}
        names = {"method": method.name, "label": method.label}
        found.append(shared | names | spreads | {"curve": relative(lead, curve, before)})
    return found


def error(values: np.ndarray) -> dict[str, float]:
    """Returns the standard error of the median, by 1,000 bootstrap samples of the seeds."""
    chosen = np.random.default_rng(0).integers(0, len(values), (1000, len(values)))
    return {"error": _records.digits(np.median(values[chosen], axis=1).std())}


def relative(lead: Curve, curve: Curve, before: np.ndarray) -> dict[str, Any]:
    """Returns the loss over the loss before, from before the restart to the end, for the figure."""
    steps = [int(step) for step in (*lead.steps, *curve.steps)]
    spreads = [_records.spread(losses / before) for losses in (*lead.losses, *curve.losses)]
    return {"step": steps} | {name: [spread[name] for spread in spreads] for name in ("median", "q1", "q3")}


def settings_of(found: Sequence[Row]) -> list[tuple[str, int]]:
    """Returns (problem, accumulate), in the order of the rows."""
    return list(dict.fromkeys((row["problem"], row["accumulate"]) for row in found))


def pick(found: Sequence[Row], problem: str, accumulate: int, method: str) -> Row:
    """Returns one row."""
    wanted = (problem, accumulate, method)
    return next(row for row in found if (row["problem"], row["accumulate"], row["method"]) == wanted)


def figures(row: Row) -> list[str]:
    """Returns the medians of a row, in the order of MEASURES."""
    before, exact, last, ratio = (row[measure]["median"] for measure in MEASURES)
    error = row[MEASURES[-1]]["error"]
    return [f"{before:#.3g}", f"{exact:#.3g}", f"{last:#.4g}", f"{ratio:.3f} ± {error:.3f}"]


def tables(found: Sequence[Row]) -> Group:
    """Returns a table for each setting, for a terminal of 80 columns."""
    shown = []
    for problem, accumulate in settings_of(found):
        mine = [row for row in found if (row["problem"], row["accumulate"]) == (problem, accumulate)]
        title = f"{problem}, accumulate {accumulate}, medians of {mine[0]['n']} seeds"
        shown.append(Table("", title=title, header_style="bold"))
        for head in ("worst/before", "worst/exact", "loss at 300", "over RAdam's"):
            shown[-1].add_column(head, justify="right", no_wrap=True)
        for row in mine:
            shown[-1].add_row(
                row["label"], *figures(row), style="bold" if row["method"] == OURS.name else None
            )
    return Group(*shown)


def markdown(found: Sequence[Row]) -> str:
    """Returns a table for each problem."""
    blocks = []
    for problem in dict.fromkeys(row["problem"] for row in found):
        mine = [row for row in found if row["problem"] == problem]
        head = [f"accumulate {accumulate}" for _, accumulate in settings_of(mine)]
        lines = [[f"{problem}, {mine[0]['n']} seeds", *head], ["---", *("---:" for _ in head)]]
        for method, label in {row["method"]: row["label"] for row in mine}.items():
            cells = [" / ".join(figures(pick(mine, *setting, method))) for setting in settings_of(mine)]
            lines.append([f"**{label}**" if method == OURS.name else label, *cells])
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(blocks)


def misses(found: Sequence[Row]) -> list[str]:
    """Returns one sentence for each setting in which the default policy misses its target."""
    sentences = []
    for setting in settings_of(found):
        for method in (OURS, OURS_JAX):
            row = pick(found, *setting, method.name)
            worst, last = (row[name]["median"] for name in ("worst_over_exact", "loss_at_300_over_radam"))
            where = f"{method.label}, {setting[0]}, accumulate {setting[1]}"
            if worst > BOUND:
                sentences.append(f"{where}: worst loss must be <= {BOUND}x the exact run's, got {worst:.3f}x")
            if last > 1:
                sentences.append(f"{where}: loss at 300 must be <= 1x RAdam's, got {last:.3f}x")
    return sentences
