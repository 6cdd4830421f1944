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
MEASURES = ("worst_over_before", "worst_over_exact", "loss_at_300")
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
        spreads = {name: _records.spread(values) for name, values in measured.items()}
        names = {"method": method.name, "label": method.label}
        found.append(shared | names | spreads | {"curve": relative(lead, curve, before)})
    return found


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


def cell(row: Row) -> str:
    """Returns the three medians of a row."""
    before, exact, last = (row[measure]["median"] for measure in MEASURES)
    return f"{before:#.3g} / {exact:#.3g} / {last:#.4g}"


def cells(found: Sequence[Row]) -> dict[str, dict[tuple[str, int], str]]:
    """Returns label -> (problem, accumulate) -> cell."""
    labels = {row["method"]: row["label"] for row in found}
    return {
        label: {setting: cell(pick(found, *setting, method)) for setting in settings_of(found)}
        for method, label in labels.items()
    }


def tables(found: Sequence[Row]) -> Group:
    """Returns a table for each problem, for a terminal of 80 columns."""
    shown = []
    for problem in dict.fromkeys(row["problem"] for row in found):
        mine = [row for row in found if row["problem"] == problem]
        caption = "worst loss in 100 steps over the loss before / over the exact run's / loss at 300"
        title = f"Restart from weights alone, {problem}, medians of {mine[0]['n']} seeds"
        shown.append(Table(title=title, caption=caption, header_style="bold"))
        shown[-1].add_column("")
        for _, accumulate in settings_of(mine):
            shown[-1].add_column(f"accumulate {accumulate}", justify="right", no_wrap=True)
        for label, row in cells(mine).items():
            tight = [text.replace(" ", "") for text in row.values()]
            shown[-1].add_row(label, *tight, style="bold" if label == OURS.label else None)
    return Group(*shown)


def markdown(found: Sequence[Row]) -> str:
    """Returns a table for each problem."""
    blocks = []
    for problem in dict.fromkeys(row["problem"] for row in found):
        mine = [row for row in found if row["problem"] == problem]
        head = [f"accumulate {accumulate}" for _, accumulate in settings_of(mine)]
        lines = [[problem, *head], ["---", *("---:" for _ in head)]]
        lines += [[f"**{k}**" if k == OURS.label else k, *row.values()] for k, row in cells(mine).items()]
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(blocks)


def misses(found: Sequence[Row]) -> list[str]:
    """Returns one sentence for each setting in which the default policy misses its target."""
    sentences = []
    for setting in settings_of(found):
        radam = pick(found, *setting, RADAM.name)["loss_at_300"]["median"]
        for method in (OURS, OURS_JAX):
            row = pick(found, *setting, method.name)
            worst, last = row["worst_over_exact"]["median"], row["loss_at_300"]["median"]
            where = f"{method.label}, {setting[0]}, accumulate {setting[1]}"
            if worst > BOUND:
                sentences.append(f"{where}: worst loss must be <= {BOUND}x the exact run's, got {worst:.3f}x")
            if last > radam:
                sentences.append(f"{where}: loss at 300 must be <= RAdam's {radam:.4g}, got {last:.4g}")
    return sentences
