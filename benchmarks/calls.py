"""How much of our Python a step goes through: files, functions, and calls, beside torch's own optimizer.

A step is taken of a matrix and its bias, after three others: what is built once is built then. Functions are
those with a name; the comprehensions of a version of Python that has frames for them are not.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks._records import replace_part, versions

RESULTS = Path(__file__).parent / "results" / "calls.jsonl"
OURS = ("sfcore", "sfjax", "sftorch")
SHAPES = {"weight": (4, 3), "bias": (4,)}
STEPS = 3  # before the one that is looked at
Visits = Counter[tuple[str, str]]


class Most(NamedTuple):
    """What a step may visit."""

    files: int
    functions: int
    calls: int


# A JAX update in Python, which jit runs when it traces; what it has cached visits nothing of ours.
LIMITS = {"sftorch fused": Most(8, 25, 45), "sftorch foreach": Most(8, 25, 45), "sfjax": Most(6, 20, 80)}


def visits(step: Callable[[], Any], packages: Sequence[str] = OURS) -> Visits:
    """Returns how often a step calls each function of some packages, by file and qualified name."""
    found: Visits = Counter()

    def note(frame: FrameType, event: str, argument: object) -> None:
        module, code = str(frame.f_globals.get("__name__", "")), frame.f_code
        inside = any(f"{module}.".startswith(f"{package}.") for package in packages)
        if event == "call" and inside and not code.co_name.startswith("<"):
            found[code.co_filename, getattr(code, "co_qualname", code.co_name)] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(before)
    return found


def summary(found: Visits) -> Most:
    """Returns the numbers of files, functions and calls."""
    return Most(len({file for file, _ in found}), len(found), sum(found.values()))


def torch_step(make: Callable[[Any], Any]) -> Callable[[], Any]:
    """Returns a step, with a new gradient, of an optimizer that has taken some."""
    import torch

    params = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES.values()]
    optimizer = make(params)
    for number in range(STEPS + 1):
        for p in params:
            p.grad = torch.ones_like(p)
        if number < STEPS:
            optimizer.step()
    return optimizer.step  # type: ignore[no-any-return]


def jax_update() -> Callable[[], Any]:
    """Returns an update, not compiled, of an optimizer that has taken some."""
    import jax.numpy as jnp

    import sfjax

    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    optimizer = sfjax.schedule_free_adamw(0.01)
    state = optimizer.init(params)
    for _ in range(STEPS):
        _, state = optimizer.update(params, state, params)
    return lambda: optimizer.update(params, state, params)


def steps() -> dict[str, Callable[[], Any]]:
    """Returns the steps of ours that LIMITS hold, ready to be taken."""
    import sftorch

    return {
        "sftorch fused": torch_step(lambda params: sftorch.AdamWScheduleFree(params, fused=True)),
        "sftorch foreach": torch_step(lambda params: sftorch.AdamWScheduleFree(params, fused=False)),
        "sfjax": jax_update(),
    }


def rows() -> list[dict[str, Any]]:
    """Returns what is written of each step."""
    import torch

    found = {name: summary(visits(step)) for name, step in steps().items()}
    peer = torch_step(lambda params: torch.optim.AdamW(params, foreach=True))
    found["torch.optim.AdamW foreach"] = summary(visits(peer, ("torch.optim",)))
    return [
        {"part": "calls", "name": name} | one._asdict() | {"versions": versions()}
        for name, one in found.items()
    ]


def main(argv: Sequence[str]) -> int:
    """Counts, prints a table and writes results/calls.jsonl."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks calls", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--list", action="store_true", help="print each function and how often it is called")
    arguments = parser.parse_args(argv)
    table = Table(
        "step", "files", "functions", "calls", "at most", title="Python functions that a step visits"
    )
    found = rows()
    replace_part(RESULTS, "calls", found)
    for row in found:
        limit = LIMITS.get(row["name"])
        most = "" if limit is None else "{} {} {}".format(*limit)
        table.add_row(*(str(row[key]) for key in ("name", "files", "functions", "calls")), most)
    Console(width=100).print(table)
    for name, step in steps().items() if arguments.list else ():
        print(f"\n{name}")
        for (file, function), times in visits(step).items():
            print(f"{times:4} {'/'.join(Path(file).parts[-2:])} {function}")
    return 0
