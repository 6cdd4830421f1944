"""What `benchmarks step` and `memory` measured, as a figure and as the tables of docs/precision.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.resume_figure import INK, MUTED, RC

OURS, PEER = "#1f6feb", "#9aa5b1"
TITLES = {
    "gpt-1": "148 tensors, 50.9M, 1 thread",
    "gpt-2": "148 tensors, 50.9M, 2 threads",
    "one-1": "1 tensor, 50.9M, 1 thread",
    "tiny-1": "2,000 tensors of 256, 1 thread",
    "small-1": "10 tensors of 256, 1 thread",
    "gpt-jax": "JAX: 148 tensors, 50.9M, all cores",
    "small-jax": "JAX: 10 tensors of 256, all cores",
}
TICKS = (1, 1.5, 2, 3, 5, 8, 12, 20, 40)
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Returns the rows of a results file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_ours(row: Mapping[str, Any]) -> bool:
    """Tells whether a row is of this project."""
    return str(row["name"]).startswith(("sftorch", "sfjax"))


def draw(found: Sequence[Row], path: Path) -> None:
    """Draws the time of a step over that of the floor: one panel a part, quartiles as whiskers."""
    parts = [part for part in TITLES if any(row["part"] == part for row in found)]
    counts = [sum(row["part"] == part for row in found) for part in parts]
    with mpl.rc_context(RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(8.5, 0.3 * sum(counts) + 0.9 * len(parts)), layout="constrained")
        axes = figure.subplots(len(parts), 1, sharex=True, squeeze=False, height_ratios=counts)[:, 0]
        for ax, part in zip(axes, parts, strict=True):
            rows = sorted(
                (row for row in found if row["part"] == part), key=lambda row: -row["over_floor"]["median"]
            )
            for place, row in enumerate(rows):
                over, colour = row["over_floor"], OURS if is_ours(row) else PEER
                ax.barh(place, over["median"] - 1, left=1, color=colour, height=0.7)
                ax.plot([over["q1"], over["q3"]], [place, place], color=INK, linewidth=1)
                ax.text(over["q3"] * 1.04, place, f"{over['median']:.3g}", va="center", fontsize=8, color=INK)
            ax.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(FixedLocator(TICKS))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.set_title(f"{TITLES[part]} (n = {rows[0]['n']})")
            ax.grid(visible=False, axis="y")
        axes[-1].set_xlabel("time of a step over that of moving its bytes; median, quartiles", color=MUTED)
        figure.savefig(path, dpi=130, facecolor="white")


def markdown(steps: Sequence[Row], memory: Sequence[Row]) -> str:
    """Returns the tables: times over the floor, by tree; and bytes a parameter."""
    parts = [part for part in TITLES if any(row["part"] == part for row in steps)]
    found = []
    for in_jax in (False, True):
        some = [part for part in parts if part.endswith("-jax") == in_jax]
        if some:
            found.append(_times([row for row in steps if row["part"] in some], some))
    compiled = [row for row in steps if row["part"] == "compile-jax"]
    if compiled:
        found.append(_compiling(compiled))
    found.append(_bytes(memory))
    return "\n\n".join(found)


def _times(rows: Sequence[Row], parts: Sequence[str]) -> str:
    lines = ["| step | " + " | ".join(TITLES[part] for part in parts) + " |"]
    lines.append("| --- |" + " ---: |" * len(parts))
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = []
        for part in parts:
            over = next((r["over_floor"] for r in rows if r["name"] == name and r["part"] == part), None)
            cells.append(f"{over['median']:.3g} ({over['q1']:.3g}-{over['q3']:.3g})" if over else "")
        shown = f"**{name}**" if is_ours({"name": name}) else name
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _compiling(rows: Sequence[Row]) -> str:
    leaves, peer = rows[0]["leaves"], rows[0]["peer"]
    lines = [f"| JAX: a step of {leaves} leaves | traced in s | compiled in s | both, x {peer} |"]
    lines.append("| --- |" + " ---: |" * 3)
    for row in rows:
        trace, compiling, over = (row[key] for key in ("trace_seconds", "compile_seconds", "over_peer"))
        shown = f"**{row['name']}**" if is_ours(row) else row["name"]
        ratio = f"{over['median']:.3g} ({over['q1']:.3g}-{over['q3']:.3g})"
        lines.append(f"| {shown} | {trace['median']:.3g} | {compiling['median']:.3g} | {ratio} |")
    return "\n".join(lines)


def _bytes(rows: Sequence[Row]) -> str:
    lines = ["| bytes a parameter | dtype | state | taken in a step |", "| --- | --- | ---: | ---: |"]
    for row in rows:
        shown = f"**{row['name']}**" if is_ours(row) else row["name"]
        lines.append(f"| {shown} | {row['dtype']} | {row['state_bytes']:.3g} | {row['step_bytes']:.2f} |")
    return "\n".join(lines)
