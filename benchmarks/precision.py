"""What 16-bit parameters cost: `python -m benchmarks precision`.

The same 6,000 steps in every precision, ours and the others; each row is held to float32's run of the same
framework and seed. Some minutes on one core. Writes OUT/precision.jsonl and OUT/precision.png.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks import _records, precision_figure
from benchmarks.precision_problem import EVERY, STEPS, make

RESULTS = Path(__file__).parent / "results"
# Each is a module benchmarks.precision_NAME with METHODS (name -> .label; "float32" is among them) and
# train(name, problem, lr) -> (.curve, .shipped, .bytes), as precision_torch describes.
FRAMEWORKS = ("torch", "jax")
LRS = (3e-3, 3e-4)
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if a precision of ours misses its target."""
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "precision.jsonl"
    torch.set_num_threads(1)
    for framework in [] if options.report else options.frameworks:
        found = [row for lr in LRS for row in rows(framework, lr, options)]
        if options.methods:
            found = _among(path, framework, found)
        _records.replace_part(path, f"precision {framework}", found)
    everything = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    console = Console(width=140)
    for lr in LRS:
        console.print(table([row for row in everything if row["lr"] == lr]))
    precision_figure.draw(everything, options.out / "precision.png")
    if options.markdown:
        _records.write_between_markers(options.markdown, "precision", markdown(everything))
    missed = misses(everything)
    console.print("\n".join(missed) or "targets met", highlight=False)
    return int(bool(missed))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments, or exits with what is wrong with them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks precision", description=(__doc__ or "").split("\n")[0]
    )
    here = [name for name in FRAMEWORKS if importlib.util.find_spec(f"benchmarks.precision_{name}")]
    add = parser.add_argument
    add("--frameworks", nargs="+", choices=here, default=here, help=f"default: {' '.join(here)}")
    add("--methods", nargs="+", metavar="NAME", help="only these rows, the others stay; default: all")
    add("--seeds", type=int, default=3, metavar="N", help="default: 3")
    add(
        "--draws",
        type=int,
        default=1,
        metavar="N",
        help="seeds of the rounding at random, in each; default: 1",
    )
    add("--steps", type=int, default=STEPS, metavar="N", help=f"default: {STEPS}")
    add("--report", action="store_true", help="run nothing: figure and tables from OUT/precision.jsonl")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    add(
        "--markdown", type=Path, metavar="FILE", help="write the table between <!-- precision --> and its end"
    )
    options = parser.parse_args(argv)
    for name, least in (("seeds", 1), ("draws", 1), ("steps", EVERY)):
        if getattr(options, name) < least:
            parser.error(
                f"--{name} must be a whole number >= {least}, got {getattr(options, name)}: pass more"
            )
    return options


def _among(path: Path, framework: str, found: list[Row]) -> list[Row]:
    """Returns the rows that a framework has had, new ones in their places; references of more seeds stay."""
    methods = list(importlib.import_module(f"benchmarks.precision_{framework}").METHODS)
    old = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = {(row["lr"], row["method"]): row for row in found}
    kept |= {
        (row["lr"], row["method"]): row
        for row in old
        if row["framework"] == framework
        and (
            (row["lr"], row["method"]) not in kept
            or (row["method"] in ("float32", "adamw") and row["n"] > kept[row["lr"], row["method"]]["n"])
        )
    }
    return sorted(kept.values(), key=lambda row: (-row["lr"], methods.index(row["method"])))


def rows(framework: str, lr: float, options: argparse.Namespace) -> list[Row]:
    """Runs the methods of a framework on every seed, those that round at random with every draw."""
    module = importlib.import_module(f"benchmarks.precision_{framework}")
    seeds, steps = options.seeds, options.steps
    asked = {name: module.METHODS[name] for name in options.methods or module.METHODS}
    references = {"float32", *map(_reference, asked.values())}
    chosen = [
        name for name in module.METHODS if name in {*references, *asked} and _is_here(module.METHODS[name])
    ]
    problems = [make(seed, steps) for seed in range(seeds)]
    runs: dict[str, list[Any]] = {name: [] for name in chosen}
    draws = {name: options.draws if module.METHODS[name].is_drawn else 1 for name in chosen}
    order = [(one, name, draw) for one in problems for name in chosen for draw in range(draws[name])]
    for problem, name, draw in tqdm(order, desc=f"{framework}, lr {lr:g}", unit="run"):
        runs[name].append(module.train(name, problem, lr, draw))
    last = {name: np.array([run.curve[-1] for run in of_method]) for name, of_method in runs.items()}
    of = {name: np.repeat(last[_reference(module.METHODS[name])], draws[name]) for name in runs}
    shared = {"part": f"precision {framework}", "framework": framework, "lr": lr, "steps": steps, "n": seeds}
    shared |= {"device": "cpu", "versions": _records.versions()}
    return [
        shared
        | {"draws": draws[name], "method": name, "label": module.METHODS[name].label}
        | {"bytes": of_method[0].bytes}
        | {"reference": module.METHODS[_reference(module.METHODS[name])].label}
        | {"loss": _records.spread(last[name]), "ratio": _ratio(last[name] / of[name])}
        | {"shipped_ratio": _ratio(np.array([run.shipped for run in of_method]) / of[name])}
        | {"every": EVERY, "curve": [_records.digits(v) for v in np.median([r.curve for r in of_method], 0)]}
        for name, of_method in runs.items()
    ]


def _reference(method: Any) -> str:
    """Returns the name of the row that a method is held to."""
    return getattr(method, "reference", "float32")


def _is_here(method: Any) -> bool:
    """Tells whether a method can run; a row of a package that is missing is left out, and said to be."""
    needs = getattr(method, "needs", "")
    if needs and not importlib.util.find_spec(needs):
        print(f"{method.label} is left out: pip install -e .[bench-8bit] for {needs}")
        return False
    return True


def _ratio(values: np.ndarray) -> dict[str, float]:
    """Returns the spread of losses over float32's, seed by seed; digits of what they differ by count."""
    quartiles = np.percentile(values, [0, 25, 50, 75, 100])
    return {
        name: round(float(v), 6)
        for name, v in zip(("min", "q1", "median", "q3", "max"), quartiles, strict=True)
    }


def table(found: Sequence[Row]) -> Table:
    """Returns the table of one learning rate."""
    first = found[0]
    table = Table(title=f"lr {first['lr']:g}, {first['steps']} steps, {first['n']} seeds")
    for column in (
        "",
        "bytes",
        "loss at x (quartiles)",
        "over float32's: median",
        "least",
        "most",
        "x as shipped",
    ):
        table.add_column(column, justify="right" if column else "left")
    for row in found:
        loss, ratio = row["loss"], row["ratio"]
        table.add_row(
            f"{row['framework']}: {row['label']}",
            f"{row['bytes']:g}",
            f"{loss['median']:.4g} ({loss['q1']:.4g} to {loss['q3']:.4g})",
            *(_factor(ratio[name]) for name in ("median", "min", "max")),
            _factor(row["shipped_ratio"]["median"]),
        )
    return table


def _factor(ratio: float) -> str:
    """Returns a ratio near 1 as what it is off by, another as a multiple."""
    return f"{round(ratio - 1, 5) + 0.0:+.3%}" if abs(ratio - 1) < 0.5 else f"{ratio:.1f} x"


def markdown(found: Sequence[Row]) -> str:
    """Returns the table of both learning rates: the loss, and what it is over float32's."""
    lines = [
        "| | bytes a parameter | " + " | ".join(f"lr {lr:g}" for lr in LRS) + " |",
        "| --- | ---: |" + " ---: |" * len(LRS),
    ]
    by_row: dict[tuple[str, str], dict[float, Row]] = {}
    for row in found:
        by_row.setdefault((row["framework"], row["method"]), {})[row["lr"]] = row
    for (framework, _), of_lr in by_row.items():
        first = next(iter(of_lr.values()))
        cells = [f"{r['loss']['median']:.4g} ({_factor(r['ratio']['median'])})" for r in of_lr.values()]
        lines.append(f"| {framework}: {first['label']} | {first['bytes']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def misses(found: Sequence[Row]) -> list[str]:
    """Returns a sentence for every target that the medians miss."""
    allowed = {"exact": 0.001, "exact-float16": 0.001, "lean": 0.01, "8bit": 0.01, "8bit-float32": 0.01}
    told = []
    for row in found:
        off, name = row["ratio"]["median"] - 1, f"{row['framework']} {row['method']} at lr {row['lr']:g}"
        if row["method"] in allowed and abs(off) > allowed[row["method"]]:
            told.append(f"{name} must be within {allowed[row['method']]:.1%} of float32, got {off:+.2%}")
        if row["method"] == "schedulefree" and off < 9:
            told.append(f"{name} was to be more than 10 times float32's loss, got {off + 1:.1f} times")
    return told
