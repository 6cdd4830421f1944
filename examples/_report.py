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

    pairs = zip(*(run.points for run in runs.values()), strict=True)
    return [{"step": a.step, "x": gap(a.x, b.x), "y": gap(a.y, b.y)} for a, b in pairs]


def show(result: Mapping[str, Any]) -> None:
    """Prints the table: a few evaluations, the last one included."""
    table = Table(title=f"Schedule-Free {result['settings']['optimizer']}, handwritten digits")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    frameworks, gaps = result["frameworks"], result["twin_gap"]
    count = len(next(iter(frameworks.values()))["points"])
    for index in range(count - 1, -1, -math.ceil(count / TABLE_STEPS))[::-1]:
        for framework, run in frameworks.items():
            point = run["points"][index]
            first = framework == next(iter(frameworks))
            table.add_row(
                str(point["step"]) if first else "",
                framework,
                *(f"{point[name]:.4f}" for name in ("train_loss", "test_loss_x", "test_loss_y")),
                *(f"{point[name]:.2%}" for name in ("test_accuracy_x", "test_accuracy_y")),
                f"{gaps[index]['x']:.1e}" if gaps and first else "",
            )
        table.add_section()
    console = Console()
    console.print(table)
    if gaps:
        worst = max(gap["x"] for gap in gaps)
        console.print(f"twins: the weights differ by {worst:.1e} of their movement at most", highlight=False)
    for framework, run in frameworks.items():
        last = run["points"][-1]
        console.print(
            f"{framework:>5}: {last['test_accuracy_x']:.2%} of the test digits right at x, "
            f"{last['test_accuracy_y']:.2%} at y, in {run['seconds']:.1f} s",
            highlight=False,
        )


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
