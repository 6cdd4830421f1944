"""precision.png: the loss at x over the run, in every precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.resume_figure import MUTED, RC

STYLES: dict[str, dict[str, Any]] = {
    "float32": {"color": "#1f2933", "linewidth": 4.5, "alpha": 0.35},
    "exact": {"color": "#1f6feb", "linewidth": 1.6},
    "exact-float16": {"color": "#12805c", "linewidth": 1.4, "dashes": (1, 2)},
    "lean": {"color": "#e0a800", "linewidth": 1.4, "dashes": (5, 3)},
    "8bit": {"color": "#0b7285", "linewidth": 1.6, "dashes": (4, 1.5)},
    "8bit-float32": {"color": "#66a3ad", "linewidth": 1.2, "dashes": (1, 1.5)},
    "rounded": {"color": "#7048a8", "linewidth": 1.4},
    "schedulefree": {"color": "#b42318", "linewidth": 1.4},
    "pytorch_optimizer": {"color": "#e8590c", "linewidth": 1.4, "dashes": (3, 2)},
    "optax.contrib": {"color": "#b42318", "linewidth": 1.4},
}


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws one panel for each framework (rows) and learning rate (columns).

    Rows of other seeds than the first one's are medians of other problems, and are left out.
    """
    found = [row for row in found if row["n"] == found[0]["n"]]
    frameworks, lrs = (list(dict.fromkeys(row[key] for row in found)) for key in ("framework", "lr"))
    with mpl.rc_context(RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(4.8 * len(lrs), 3.4 * len(frameworks) + 1.1), layout="constrained")
        axes = figure.subplots(len(frameworks), len(lrs), sharex=True, sharey=True, squeeze=False)
        for of_row, framework in zip(axes, frameworks, strict=True):
            for ax, lr in zip(of_row, lrs, strict=True):
                for row in found:
                    if (row["framework"], row["lr"]) == (framework, lr) and row["method"] in STYLES:
                        steps = [i * row["every"] for i in range(len(row["curve"]))]
                        ax.plot(steps, row["curve"], label=row["label"], **STYLES[row["method"]])
                ax.set_title(f"{framework}, lr {lr:g}")
                ax.set_yscale("log")
            of_row[0].set_ylabel("loss at x")
            of_row[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, labelcolor=MUTED)
        for ax in axes[-1]:
            ax.set_xlabel("optimizer steps")
        n = found[0]["n"]
        title = f"What a parameter's precision costs: medians of {n} seeds"
        figure.suptitle(title, x=0.008, ha="left", fontsize=12, fontweight="bold")
        figure.savefig(path, dpi=150)
