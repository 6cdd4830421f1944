"""resume.png: validation loss around a restart from weights alone, for each method; restart.png: a choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks import resume_rows
from benchmarks.resume_problems import PROBLEMS
from benchmarks.resume_restart import LAST, LEAD
from benchmarks.resume_rows import Row

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
STYLES: dict[str, dict[str, Any]] = {
    "upstream-0": {"color": "#b42318", "linewidth": 1.3},
    "optax": {"color": "#5b1a12", "linewidth": 1.3, "dashes": (2, 2)},
    "upstream-5": {"color": "#e8590c", "linewidth": 1.3},
    "upstream-50": {"color": "#e0a800", "linewidth": 1.3},
    "radam": {"color": "#7048a8", "linewidth": 1.5},
    "exact": {"color": "#12805c", "linewidth": 1.8},
    "ours": {"color": "#1f6feb", "linewidth": 2.6},
    "ours-jax": {"color": "#0b2e6b", "linewidth": 1.1, "dashes": (4, 2)},
}
RC: dict[str, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
FIRST = ("upstream-0", "radam", "exact", "ours")
FINE_TICKS = (0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.3, 1.4)
COARSE_TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50)
STEP_TICKS = (-50, -10, 0, 5, 25, 50, 100, 200, 300)


def draw(found: Sequence[Row], path: Path) -> None:
    """Draws one panel for each problem (rows) and accumulation (columns)."""
    problems = list(dict.fromkeys(row["problem"] for row in found))
    accumulations = list(dict.fromkeys(row["accumulate"] for row in found))
    labels = {problem.name: problem.label for problem in PROBLEMS}
    with mpl.rc_context(RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(4.4 * len(accumulations), 3.6 * len(problems) + 1.2), layout="constrained")
        axes = figure.subplots(len(problems), len(accumulations), sharex=True, sharey="row", squeeze=False)
        for row, problem in zip(axes, problems, strict=True):
            for ax, accumulate in zip(row, accumulations, strict=True):
                panel(ax, [r for r in found if (r["problem"], r["accumulate"]) == (problem, accumulate)])
                ax.set_title(f"accumulate {accumulate}")
            n = next(r["n"] for r in found if r["problem"] == problem)
            row[0].set_title(f"{labels[problem]}, {n} seeds\naccumulate {accumulations[0]}")
            row[0].set_ylabel("validation loss / loss before")
        for ax in axes[-1]:
            ax.set_xlabel("optimizer steps since the restart, square-root axis")
        title = f"A restart from weights alone after {found[0]['trained']} steps"
        spread = f"median and quartiles of the seeds, micro-batches of {found[0]['micro_batch']}"
        figure.suptitle(f"{title}: {spread}", x=0.008, ha="left", fontsize=12, fontweight="bold")
        handles, names = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=5, frameon=False)
        figure.savefig(path, dpi=150)


def draw_first(found: Sequence[Row], path: Path) -> None:
    """Draws the picture of the README: the methods of FIRST with the most accumulation, a panel a problem."""
    most = max(row["accumulate"] for row in found)
    problems = list(dict.fromkeys(row["problem"] for row in found))
    with mpl.rc_context(RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(4.4 * len(problems), 3.9), layout="constrained")
        (axes,) = figure.subplots(1, len(problems), squeeze=False)
        for ax, problem in zip(axes, problems, strict=True):
            rows = [row for row in found if (row["problem"], row["accumulate"]) == (problem, most)]
            panel(ax, rows, FIRST)
            ax.set_title(f"{problem}, {rows[0]['n']} seeds")
            ax.set_xlabel("optimizer steps since the restart, square-root axis")
        axes[0].set_ylabel("validation loss / loss before")
        title = f"A restart from weights alone, {most} micro-batches a step: median and quartiles"
        figure.suptitle(title, x=0.008, ha="left", fontsize=12, fontweight="bold")
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(
            handles,
            names,
            loc="outside lower left",
            ncols=5,
            frameon=False,
            columnspacing=1.3,
            handlelength=1.3,
        )
        figure.savefig(path, dpi=150)


def panel(ax: Axes, found: Sequence[Row], methods: Sequence[str] = tuple(STYLES)) -> None:
    """Draws one setting: later methods lie on top."""
    for name in methods:
        style = STYLES[name]
        row = resume_rows.pick(found, found[0]["problem"], found[0]["accumulate"], name)
        line(ax, row["curve"], False, style | {"label": row["label"]})
    line(ax, found[0]["curve"], True, {"color": INK, "linewidth": 1.8, "label": "before"})
    ax.axvline(0, color=MUTED, linewidth=1, dashes=(1, 2))
    scale(ax)


def line(ax: Axes, curve: Mapping[str, list[float]], before: bool, style: dict[str, Any]) -> None:
    """Draws the median and the quartiles of a curve, on one side of the restart."""
    keep = [i for i, step in enumerate(curve["step"]) if (step <= 0 if before else step >= 0)]
    steps, median, q1, q3 = ([curve[name][i] for i in keep] for name in ("step", "median", "q1", "q3"))
    ax.fill_between(steps, q1, q3, color=style["color"], alpha=0.1, linewidth=0)
    ax.plot(steps, median, **style)


def scale(ax: Axes) -> None:
    """Gives the first steps room, and the losses as many ticks as their range needs."""
    ax.set_xscale("function", functions=(signed_root, signed_square))
    ax.set_xlim(-LEAD, LAST)
    ax.xaxis.set_major_locator(FixedLocator(STEP_TICKS))
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(FixedLocator(FINE_TICKS if ax.get_ylim()[1] < 1.5 else COARSE_TICKS))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def signed_root(step: np.ndarray) -> np.ndarray:
    """Returns sqrt(|step|) with the sign of step."""
    return np.sign(step) * np.sqrt(np.abs(step))


def signed_square(root: np.ndarray) -> np.ndarray:
    """Returns the inverse."""
    return np.sign(root) * np.square(root)
