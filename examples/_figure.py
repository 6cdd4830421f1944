"""curves.png: both frameworks' curves over each other, and the gap between them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
EPSILON = float(np.finfo(np.float32).eps)
COLORS = {"x": "#1f6feb", "y": "#d9730d", "train": "#8a94a0"}
# A broad pale line under a thin dashed one: both can be seen where they agree.
STYLES: dict[str, dict[str, Any]] = {
    "jax": {"linewidth": 5, "alpha": 0.35, "solid_capstyle": "round"},
    "torch": {"linewidth": 1.4, "dashes": (4, 1.5)},
}
LABELS = {"jax": "JAX", "torch": "PyTorch"}
RC: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draws loss, test accuracy and, when both frameworks ran, the twin gap."""
    settings, gaps = result["settings"], result["twin_gap"]
    with mpl.rc_context(RC):
        figure = Figure(figsize=(12.5 if gaps else 8.6, 4.4), layout="constrained")
        axes = figure.subplots(1, 3 if gaps else 2)
        draw_loss(axes[0], result["frameworks"])
        draw_accuracy(axes[1], result["frameworks"])
        if gaps:
            draw_gap(axes[2], gaps)
        for ax in axes:
            ax.set_xlabel("optimizer step")
            ax.set_xlim(0, settings["steps"])
        figure.suptitle(title(settings), x=0.008, ha="left", fontsize=12, fontweight="bold")
        figure.legend(handles=legend(result["frameworks"]), loc="outside lower left", ncols=5, frameon=False)
        figure.savefig(path, dpi=150)


def draw_loss(ax: Axes, frameworks: Mapping[str, Any]) -> None:
    """Draws the losses on a logarithmic axis."""
    for framework, run in frameworks.items():
        for name, color in (("train_loss", "train"), ("test_loss_y", "y"), ("test_loss_x", "x")):
            ax.plot(*series(run["points"], name), color=COLORS[color], **STYLES[framework])
    ax.set_yscale("log")
    ax.set_title("Cross-entropy")


def draw_accuracy(ax: Axes, frameworks: Mapping[str, Any]) -> None:
    """Draws the test accuracies from 90% up, where the differences are."""
    for framework, run in frameworks.items():
        for name, color in (("test_accuracy_y", "y"), ("test_accuracy_x", "x")):
            ax.plot(*series(run["points"], name), color=COLORS[color], **STYLES[framework])
    ends = [run["points"][-1]["test_accuracy_x"] for run in frameworks.values() if run["points"]]
    last = min(ends, default=1.0)
    ax.set_ylim(min(0.9, max(0.0, last - 0.1)), 1.0)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_title("Test accuracy")


def draw_gap(ax: Axes, gaps: list[dict[str, float]]) -> None:
    """Draws how far the twins are apart, on a logarithmic axis."""
    for name in ("y", "x"):
        steps, values = series(gaps, name)
        ax.plot(steps, np.where(values > 0, values, np.nan), color=COLORS[name], linewidth=1.8)
    ax.set_yscale("log")
    ax.set_ylim(1e-8, 1)
    ax.axhline(EPSILON, color=MUTED, linewidth=1, dashes=(1, 2))
    ax.annotate(
        "float32 rounding", (1, EPSILON), (0, -3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", va="top", color=MUTED, fontsize=9,
    )  # fmt: skip
    ax.set_title("Twin gap: difference / movement")


def series(points: list[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and the values of one curve."""
    return np.array([p["step"] for p in points]), np.array([p[name] for p in points], dtype=float)


def title(settings: Mapping[str, Any]) -> str:
    """Returns one line that says what was run."""
    return (
        f"Schedule-Free {settings['optimizer']} on handwritten digits "
        f"(lr {settings['lr']:g}, batch {settings['batch_size']}, seed {settings['seed']})"
    )


def legend(frameworks: Mapping[str, Any]) -> list[Line2D]:
    """Returns a colour for each quantity and a line for each framework."""
    quantities = {
        "x": "at x, the average",
        "y": "at y, where gradients are taken",
        "train": "training batches, at y",
    }
    return [
        *(Line2D([], [], color=COLORS[name], linewidth=3, label=text) for name, text in quantities.items()),
        *(Line2D([], [], color=INK, label=LABELS[name], **STYLES[name]) for name in frameworks),
    ]
