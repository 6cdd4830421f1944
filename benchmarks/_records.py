"""What every benchmark writes: JSON lines with versions, and tables between markers of a Markdown file."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("numpy", "torch", "jax", "optax", "schedulefree")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def spread(values: np.ndarray) -> dict[str, float]:
    """Returns median and quartiles over the seeds, to five digits."""
    q1, median, q3 = np.percentile(values, [25, 50, 75])
    return {"median": digits(median), "q1": digits(q1), "q3": digits(q3)}


def digits(value: float) -> float:
    """Returns a number to five digits, which is more than a median of seeds knows."""
    return float(f"{value:.5g}")


def replace_part(path: Path, part: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the rows of one part of a benchmark; lines of other parts stay."""
    kept = []
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line).get("part") != part]
    written = [*kept, *(json.dumps(row, allow_nan=False) for row in rows)]
    path.write_text("".join(line + "\n" for line in written), encoding="utf-8")


def write_between_markers(path: Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: if the file does not hold both markers once, in this order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, opened, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"{path} must hold {begin} and then {end}, got a file without them: add both lines")
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")
