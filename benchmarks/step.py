"""What a step costs against the memory that it must move, beside the peers.

The floor reads and writes the arrays of a step and computes next to nothing. Everybody takes one step in
every round, in an order drawn anew, and what counts is the ratio to the floor of the same round: these
machines are shared, so a time alone means nothing. JAX's times are those of the processors, and jax.jit
alone hands on as many arrays as a micro-step has.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from benchmarks import step_report, step_torch
from benchmarks._records import replace_part, spread, versions, write_between_markers
from benchmarks._trees import CPU_TREES, JAX_TREES, TREES, Shape, count
from sftorch.kernels.call import Job, Kind

RESULTS = Path(__file__).parent / "results" / "step.jsonl"
# Bytes a parameter that a step must read and write in float32: y, z, g and v in, y, z and v out. A micro-step
# reads gradient and mean, and writes the mean.
BYTES = {"adamw": 28, "radam": 28, "sgd": 20, "micro-step": 12}
PEER = "torch.optim.AdamW fused"
JAX_PEER = "optax.adamw"
LEAVES = 1000  # of the tree that is compiled
Steps = dict[str, Callable[[], Any]]


def gradients(shapes: Sequence[Shape]) -> list[Tensor]:
    """Returns gradients to be copied into those of the parameters; peers write into theirs."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * 1e-3 for shape in shapes]


def floors(shapes: Sequence[Shape]) -> Steps:
    """Returns the floors, by algorithm."""
    tables = {name: [torch.zeros(shape) for shape in shapes] for name in ("y", "z", "v", "g")}
    without_v = {name: tables[name] for name in ("y", "z", "g")}
    of_mean = {"y": tables["z"], "z": tables["z"], "g": tables["g"]}
    return {
        "adamw": lambda: Job(Kind.FLOOR_ADAMW).run(tables, ()),
        "sgd": lambda: Job(Kind.FLOOR_SGD).run(without_v, ()),
        "micro-step": lambda: Job(Kind.FLOOR_MEAN).run(of_mean, ()),
    }


def measure(tree: str, threads: int, rounds: int, seed: int, heavy: bool = False) -> list[dict[str, Any]]:
    """Returns a row for each contender: nanoseconds a parameter, and the ratio to the floor."""
    torch.set_num_threads(threads)
    shapes, draw = TREES[tree], random.Random(seed)
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    fresh = gradients(shapes)
    for p in params:
        p.grad = torch.empty_like(p)
    found = {one.name: one for one in step_torch.contenders(heavy)}
    steps: Steps = {f"floor {name}": run for name, run in floors(shapes).items() if name != "micro-step"}
    steps |= {name: one.make(params).step for name, one in found.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(-2, rounds), desc=f"{tree}, {threads} thread(s)"):  # the first two warm up
        for name in draw.sample(list(steps), len(steps)):
            for p, g in zip(params, fresh, strict=True):
                p.grad.copy_(g)  # type: ignore[union-attr]
            started = time.perf_counter()
            steps[name]()
            if number >= 0:
                taken[name].append(time.perf_counter() - started)
    return [_row(tree, threads, one, taken) for one in found.values()]


def measure_jax(tree: str, rounds: int) -> list[dict[str, Any]]:
    """Returns the rows of jitted, donated updates; XLA takes all cores, and so does the floor."""
    from benchmarks import step_jax

    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    shapes = {str(i): shape for i, shape in enumerate(TREES[tree])}
    others = {f"floor {name}": run for name, run in floors(TREES[tree]).items()}
    found = step_jax.rows(shapes, rounds, names=tuple(step_jax.METHODS), others=others)
    taken = {name: np.array(seconds) for name, seconds in found}
    rows = []
    for name in step_jax.METHODS:
        kind = next((kind for kind in ("sgd", "micro-step") if name.endswith(kind)), "adamw")
        peer = taken[JAX_PEER] * BYTES[kind] / BYTES["adamw"]
        floor = taken[f"floor {kind}"]
        one = row(f"{tree}-jax", name, tree, threads, taken[name], floor, JAX_PEER, peer)
        rows.append(one | {"clock": "processor"})
    return rows


def measure_compiling(rounds: int) -> list[dict[str, Any]]:
    """Returns the rows of tracing and compiling a jitted step of many leaves, each time anew."""
    import jax

    from benchmarks import step_jax

    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in step_jax.COMPILED}
    for _ in tqdm(range(rounds), desc="compiling"):
        for name, found in taken.items():
            jax.clear_caches()
            found.append(step_jax.seconds_to_compile(name, LEAVES))
    seconds = {name: np.array(found) for name, found in taken.items()}
    return [
        {
            "part": "compile-jax",
            "name": name,
            "leaves": LEAVES,
            "n": rounds,
            "clock": "processor",
            "trace_seconds": spread(both[:, 0]),
            "compile_seconds": spread(both[:, 1]),
            "peer": JAX_PEER,
            "over_peer": spread(both.sum(axis=1) / seconds[JAX_PEER].sum(axis=1)),
            "versions": versions(),
        }
        for name, both in seconds.items()
    ]


def _row(tree: str, threads: int, one: step_torch.Contender, taken: dict[str, list[float]]) -> dict[str, Any]:
    seconds = np.array(taken[one.name])
    floor = np.array(taken["floor sgd" if one.algorithm == "sgd" else "floor adamw"])
    peer = np.array(taken[PEER]) * BYTES[one.algorithm] / BYTES["adamw"]
    return row(f"{tree}-{threads}", one.name, tree, threads, seconds, floor, PEER, peer)


def row(
    part: str,
    name: str,
    tree: str,
    threads: int,
    seconds: np.ndarray,
    floor: np.ndarray,
    peer_name: str,
    peer: np.ndarray,
) -> dict[str, Any]:
    """Returns what is written of one contender; arrays have an entry a round."""
    shapes = TREES[tree]
    return {
        "part": part,
        "name": name,
        "tree": tree,
        "tensors": len(shapes),
        "parameters": count(shapes),
        "dtype": "float32",
        "device": "cpu",
        "threads": threads,
        "n": len(seconds),
        "ns_per_parameter": spread(seconds / count(shapes) * 1e9),
        "ms_per_step": spread(seconds * 1e3),
        "over_floor": spread(seconds / floor),
        "peer": peer_name,
        "over_peer": spread(seconds / peer),
        "versions": versions(),
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a table a tree, and what compiling takes."""
    console = Console(width=120)
    for part in dict.fromkeys(row["part"] for row in rows if "tree" in row):
        of_part = [row for row in rows if row["part"] == part]
        first = of_part[0]
        title = f"{first['tree']}: {first['tensors']} tensors, {first['parameters'] / 1e6:.3g}M parameters, "
        table = Table(title=title + f"{first['threads']} thread(s), n = {first['n']}")
        peer = f"x {first['peer']}, by bytes"
        for column in ("optimizer", "ms", "ns/parameter", "x floor (quartiles)", peer):
            table.add_column(column, justify="left" if column == "optimizer" else "right")
        for row in of_part:
            over = row["over_floor"]
            table.add_row(
                row["name"],
                f"{row['ms_per_step']['median']:.3g}",
                f"{row['ns_per_parameter']['median']:.3g}",
                f"{over['median']:.3g} ({over['q1']:.3g} to {over['q3']:.3g})",
                f"{row['over_peer']['median']:.3g}",
            )
        console.print(table)
    for row in (row for row in rows if row["part"] == "compile-jax"):
        trace, compiling = row["trace_seconds"]["median"], row["compile_seconds"]["median"]
        console.print(
            f"{row['name']}, {row['leaves']} leaves, n = {row['n']}: traced in {trace:.3g} s, compiled in "
            f"{compiling:.3g} s, x {row['peer']} {row['over_peer']['median']:.3g}"
        )


def main(argv: Sequence[str]) -> int:
    """Measures, prints the tables and writes results/step.jsonl and step.png."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tree", choices=CPU_TREES, action="append", help="default: all")
    parser.add_argument("--only", choices=("jax", "compile"), help="those parts; default: all")
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and 2")
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--seed", type=int, default=0, help="of the order; default: 0")
    parser.add_argument("--heavyball", action="store_true", help="HeavyBall too; it compiles for minutes")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the tables between <!-- step --> and its end"
    )
    parser.add_argument("--report", action="store_true", help="run nothing: figure and tables as measured")
    arguments = parser.parse_args(argv)
    if not arguments.report:
        _measure_all(arguments)
    found = step_report.read(RESULTS)
    show(found)
    step_report.draw(found, RESULTS.with_suffix(".png"))
    if arguments.markdown:
        memory = step_report.read(RESULTS.with_name("memory.jsonl"))
        write_between_markers(arguments.markdown, "step", step_report.markdown(found, memory))
    return 0


def _measure_all(arguments: argparse.Namespace) -> None:
    for tree in () if arguments.only else arguments.tree or CPU_TREES:
        for threads in arguments.threads or (1, 2):
            # A step of a small tree is over in 50 us, and varies by as much.
            rounds = max(arguments.rounds, 200) if tree == "small" else arguments.rounds
            rows = measure(tree, threads, rounds, arguments.seed, arguments.heavyball)
            replace_part(RESULTS, f"{tree}-{threads}", rows)
    for tree in () if arguments.only == "compile" else arguments.tree or CPU_TREES:
        if tree in JAX_TREES:
            rounds = max(arguments.rounds, 200) if tree == "small" else arguments.rounds
            replace_part(RESULTS, f"{tree}-jax", measure_jax(tree, rounds))
    if arguments.only == "compile" or (arguments.tree is None and not arguments.only):
        replace_part(RESULTS, "compile-jax", measure_compiling(max(11, arguments.rounds)))
