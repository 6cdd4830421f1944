"""quality.png: one run without a schedule beside cosines for three lengths; quality-rates.png: the rates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter, StrMethodFormatter

from benchmarks.quality_methods import METHODS
from benchmarks.quality_problems import PROBLEMS
from benchmarks.resume_figure import MUTED, RC

Row = dict[str, Any]
BLUE, ORANGES = "#1f6feb", ("#e0a800", "#e8590c", "#b42318")
HORIZONS = ("fashion-quarter", "fashion-half", "fashion")
RATE_STYLES: dict[str, dict[str, Any]] = {
    "sf-adamw": {"color": BLUE, "linewidth": 2.4},
    "sf-radam": {"color": "#7048a8", "linewidth": 1.4},
    "sf-normuon": {"color": "#12805c", "linewidth": 2.2},
    "adamw-cosine": {"color": "#b42318", "linewidth": 1.8},
    "adamw-wsd": {"color": "#e8590c", "linewidth": 1.2, "dashes": (4, 2)},
    "adamw-constant": {"color": "#616e7c", "linewidth": 1.2, "dashes": (1, 2)},
    "muon-cosine": {"color": "#e0a800", "linewidth": 1.4},
}


def draw(found: Sequence[Row], folder: Path) -> None:
    """Draws what there are rows for."""
    curves = {(row["problem"], row["method"]): row for row in found if row["part"] == "curve"}
    if ("fashion", "sf-adamw") in curves and all((name, "adamw-cosine") in curves for name in HORIZONS):
        _horizons(curves, folder / "quality.png")
    shown = [name for name in ("fashion", "kjv") if any(r["problem"] == name for r in found)]
    if shown:
        _rates(found, shown, folder / "quality-rates.png")


def _horizons(curves: dict[tuple[str, str], Row], path: Path) -> None:
    with mpl.rc_context(RC | {"font.size": 11}):  # type: ignore[arg-type]
        figure = Figure(figsize=(8.4, 4.0), layout="constrained")
        ax = figure.subplots()
        free = curves["fashion", "sf-adamw"]
        points, mean, se = (np.array(free[key]) for key in ("points", "mean", "se"))
        ax.fill_between(points, mean - 2 * se, mean + 2 * se, color=BLUE, alpha=0.18, linewidth=0)
        label = "Schedule-Free AdamW: one run, tuned once"
        ax.plot(points, mean, color=BLUE, linewidth=2.8, label=label, zorder=3)
        for name, color in zip(HORIZONS, ORANGES, strict=True):
            row = curves[name, "adamw-cosine"]
            end, last, error = row["points"][-1], row["mean"][-1], 2 * row["se"][-1]
            label = f"AdamW with a cosine, tuned for {end:,} steps"
            ax.plot(row["points"], row["mean"], color=color, linewidth=1.7, label=label)
            ax.errorbar(end, last, error, color=color, marker="o", markersize=7, capsize=4, clip_on=False)
        ax.legend(loc="upper right", frameon=False, fontsize=11)
        low = min(mean.min(), *(curves[name, "adamw-cosine"]["mean"][-1] for name in HORIZONS))
        ax.set_ylim(low - 0.01, low + 0.16)
        ax.set_xlim(0, points[-1])
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.set_xlabel("steps")
        ax.set_ylabel("test loss")
        title = f"Fashion-MNIST, a small network: mean of {free['seeds']} seeds, two standard errors"
        figure.suptitle(title, x=0.008, ha="left", fontsize=12, fontweight="bold")
        figure.savefig(path, dpi=150)


def _rates(found: Sequence[Row], problems: Sequence[str], path: Path) -> None:
    with mpl.rc_context(RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(4.8 * len(problems) + 2.4, 3.8), layout="constrained")
        axes = figure.subplots(1, len(problems), squeeze=False)[0]
        for ax, problem in zip(axes, problems, strict=True):
            rows = {r["method"]: r for r in found if (r["part"], r["problem"]) == ("sweep", problem)}
            for name, style in RATE_STYLES.items():
                if name in rows:
                    losses = [np.nan if loss is None else loss for loss in rows[name]["test"]]
                    ax.plot(rows[name]["rates"], losses, label=METHODS[name].label, marker=".", **style)
            least = min(min(x for x in r["test"] if x is not None) for r in rows.values())
            ax.set_ylim(least * 0.985, least * 1.3)
            ax.set_xscale("log")
            ax.set_xticks(
                sorted({rate for name in RATE_STYLES if name in rows for rate in rows[name]["rates"]})
            )
            ax.xaxis.set_major_formatter(ScalarFormatter())
            ax.minorticks_off()
            ax.tick_params(axis="x", labelrotation=45)
            ax.set_title(PROBLEMS[problem].label)
            ax.set_xlabel("learning rate")
        axes[0].set_ylabel("test loss at x")
        lines = {line.get_label(): line for ax in axes for line in ax.get_lines()}
        wanted = [lines[METHODS[name].label] for name in RATE_STYLES if METHODS[name].label in lines]
        axes[-1].legend(
            handles=wanted, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, labelcolor=MUTED
        )
        figure.savefig(path, dpi=150)
