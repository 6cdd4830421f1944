"""What a run leaves behind: the table, result.json and curves.png."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from _digits import Point, Settings, flatten, initial_weights
from _figure import draw

PACKAGES = {"jax": ("jax", "flax", "optax"), "torch": ("torch",)}
TABLE_STEPS = 6
COLUMNS = (
    *(
        "\nstep",
        "",
        "train\nloss",
        "test\nloss x",
        "test\nloss y",
        "test\nacc. x",
        "test\nacc. y",
        "twin\ngap x",
    ),
)


@dataclass(frozen=True)
class Run:
    """One framework's points, its wall time (compilation included), where it went on from, its digests."""

    points: list[Point]
    seconds: float
    resumed: int
    sha256: dict[str, str]


def summarize(settings: Settings, runs: Mapping[str, Run]) -> dict[str, Any]:
    """Returns what result.json holds; twin_gap is empty unless both frameworks ran."""
    packages = ["numpy", *(name for framework in runs for name in PACKAGES[framework])]
    return {
        "settings": asdict(settings),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "frameworks": {
            framework: {
                "seconds": round(run.seconds, 3),
                "resumed_from_step": run.resumed,
                "sha256": run.sha256,
                "points": [
                    {name: value for name, value in vars(point).items() if name not in ("x", "y")}
                    for point in run.points
                ],
            }
            for framework, run in runs.items()
        },
        "twin_gap": twin_gap(settings, runs),
    }


def twin_gap(settings: Settings, runs: Mapping[str, Run]) -> list[dict[str, float]]:
    """Returns how far the twins are apart: largest difference of a weight over its largest movement."""
    if len(runs) < 2:
        return []
    start = flatten(initial_weights(settings.seed))

    def gap(one: np.ndarray, other: np.ndarray) -> float:
        moved = max(np.abs(one - start).max(), np.abs(other - start).max())
        return float(np.abs(one - other).max() / moved) if moved else 0.0

    one, other = ({point.step: point for point in run.points} for run in runs.values())
    pairs = [(a, other[step]) for step, a in one.items() if step in other]  # a resumed one has fewer
    return [{"step": a.step, "x": gap(a.x, b.x), "y": gap(a.y, b.y)} for a, b in pairs]


def show(result: Mapping[str, Any]) -> None:
    """Prints the table: a few evaluations, the last one included."""
    table = Table(title=f"Schedule-Free {result['settings']['optimizer']}, handwritten digits")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    frameworks = result["frameworks"]
    gaps = {gap["step"]: gap["x"] for gap in result["twin_gap"]}
    found = {name: {point["step"]: point for point in run["points"]} for name, run in frameworks.items()}
    steps = sorted({step for points in found.values() for step in points}, reverse=True)
    for step in steps[:: max(1, math.ceil(len(steps) / TABLE_STEPS))][::-1]:
        for place, name in enumerate(name for name in found if step in found[name]):
            gap = f"{gaps[step]:.1e}" if step in gaps and not place else ""
            table.add_row("" if place else str(step), name, *cells(found[name][step]), gap)
        table.add_section()
    console = Console()
    console.print(table)
    if gaps:
        worst = max(gaps.values())
        console.print(f"twins: the weights differ by {worst:.1e} of their movement at most", highlight=False)
    for name, run in frameworks.items():
        console.print(f"{name:>5}: {summary(run)}", highlight=False)


def cells(point: Mapping[str, Any]) -> list[str]:
    """Returns the numbers of a row of the table."""
    losses = [f"{point[name]:.4f}" for name in ("train_loss", "test_loss_x", "test_loss_y")]
    return losses + [f"{point[name]:.2%}" for name in ("test_accuracy_x", "test_accuracy_y")]


def summary(run: Mapping[str, Any]) -> str:
    """Returns how a framework ended, in a sentence."""
    if not run["points"]:
        return f"nothing was left to do after step {run['resumed_from_step']}"
    last = run["points"][-1]
    x, y = last["test_accuracy_x"], last["test_accuracy_y"]
    return f"{x:.2%} of the test digits right at x, {y:.2%} at y, in {run['seconds']:.1f} s"


def write(result: Mapping[str, Any], out: Path) -> None:
    """Writes result.json and curves.png to `out` and says where."""
    (out / "result.json").write_text(json.dumps(finite(result), indent=2, allow_nan=False) + "\n")
    draw(result, out / "curves.png")
    Console().print(f"wrote {out / 'result.json'} and {out / 'curves.png'}", highlight=False, soft_wrap=True)


def finite(value: Any) -> Any:
    """Returns the same value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
