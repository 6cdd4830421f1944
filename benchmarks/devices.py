"""What a step and the two modes cost when parameters lie on many devices, beside the peers.

Torch: processes of one group, forked, each with its own optimizer of the parts of a tree that FSDP2's layout
gives it (`Shard(0)`), and beside it the same optimizer of plain tensors of the same sizes: the local step.
Everybody takes one step in every round, and what counts is the ratio within a round, of the thread's own
processor time: these machines are shared. Results have the ratio on the clock too, which has what is
waited for. JAX: an update on a mesh of virtual devices over that of one device, and its collectives.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks._records import replace_part, spread, versions, write_between_markers
from benchmarks._trees import Shape, count, gpt

RESULTS = Path(__file__).parent / "results" / "devices.jsonl"
TREES: dict[str, list[Shape]] = {
    "gpt": gpt(width=128, vocabulary=4096, context=256),  # the 148 tensors of GPT-2 small, 3M parameters
    "small": [(32, 32)] * 400,
    "block": gpt(width=128, layers=1, vocabulary=4096, context=256),  # for JAX, as XLA compiles long
}
FOR_JAX = ("block",)
PEER = "torch.optim.AdamW fused"
OURS = "sftorch AdamWScheduleFree fused"
Makers = dict[str, Callable[[Any], Any]]


def makers() -> Makers:
    """Returns what makes each optimizer of a list of parameters."""
    import schedulefree
    import torch

    import sftorch

    return {
        OURS: lambda params: sftorch.AdamWScheduleFree(params, lr=1e-4, fused=True),
        "sftorch AdamWScheduleFree foreach": lambda params: sftorch.AdamWScheduleFree(
            params, lr=1e-4, fused=False
        ),
        PEER: lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        "torch.optim.AdamW foreach": lambda params: torch.optim.AdamW(params, lr=1e-4, foreach=True),
        "schedulefree AdamWScheduleFree foreach": lambda params: schedulefree.AdamWScheduleFree(
            params, lr=1e-4, foreach=True
        ),
    }


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts all-reduces inside a `with` block; returns a list of the one number."""
    import torch.distributed as dist

    original, seen = dist.all_reduce, [0]

    def all_reduce(*args: Any, **options: Any) -> Any:
        seen[0] += 1
        return original(*args, **options)

    dist.all_reduce = all_reduce
    try:
        yield seen
    finally:
        dist.all_reduce = original


def _params(shapes: Sequence[Shape], mesh: Any, divided: bool) -> list[Any]:
    """Returns parameters with gradients: DTensors as FSDP2 cuts them, or plain tensors of a part's size."""
    import torch
    from torch.distributed.tensor import Shard, distribute_tensor

    found = []
    for shape in shapes:
        whole = distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
        p = torch.nn.Parameter(whole if divided else whole.to_local().clone())
        p.grad = torch.full_like(p, 1e-3)
        found.append(p)
    return found


def _flip(optimizer: Any) -> None:
    optimizer.eval()
    optimizer.train()


def _work(rank: int, world: int, tree: str, rounds: int, seed: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    mesh, draw = init_device_mesh("cpu", (world,)), random.Random(seed)
    torch.manual_seed(0)
    calls: dict[tuple[str, str, str], Callable[[], Any]] = {}
    for name, make in makers().items():
        for where in ("divided", "local"):
            optimizer = make(_params(TREES[tree], mesh, where == "divided"))
            calls[name, "step", where] = optimizer.step
            if hasattr(optimizer, "eval"):
                optimizer.train()
                calls[name, "flips", where] = functools.partial(_flip, optimizer)
    taken: dict[Any, list[tuple[float, float]]] = {key: [] for key in calls}
    collectives: dict[Any, int] = {}
    for number in range(-3, rounds):  # the first ones warm up
        for key in draw.sample(list(calls), len(calls)):
            dist.barrier()
            with counted() as seen:
                started, began = time.thread_time(), time.perf_counter()
                calls[key]()
                seconds = time.thread_time() - started, time.perf_counter() - began
            collectives[key] = seen[0]
            if number >= 0:
                taken[key].append(seconds)
    if rank == 0:
        rows = list(_rows(tree, world, taken, collectives))
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _rows(
    tree: str, world: int, taken: dict[Any, list[tuple[float, float]]], collectives: dict[Any, int]
) -> Iterator[dict[str, Any]]:
    arrays = {key: np.array(seconds).T[0] for key, seconds in taken.items()}
    clock = {key: np.array(seconds).T[1] for key, seconds in taken.items()}
    for name, what, where in taken:
        if where != "divided":
            continue
        here, local = arrays[name, what, "divided"], arrays[name, what, "local"]
        row = {
            "part": f"torch-{tree}-{world}",
            "name": name,
            "what": what,
            "tree": tree,
            "tensors": len(TREES[tree]),
            "parameters": count(TREES[tree]),
            "devices": world,
            "n": len(here),
            "ms": spread(here * 1e3),
            "local_ms": spread(local * 1e3),
            "over_local": spread(here / local),
            "over_local_on_the_clock": spread(clock[name, what, "divided"] / clock[name, what, "local"]),
            "over_our_local": spread(here / arrays[OURS, what, "local"]),
            "collectives": collectives[name, what, where],
            "versions": versions(),
        }
        yield row | ({"over_peer": spread(here / arrays[PEER, what, "divided"])} if what == "step" else {})


def measure(tree: str, world: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Returns a row for each optimizer and what it does."""
    from sfcore.native import build  # and torch, once for all that are forked

    build.find()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        workers: list[Any] = [
            context.Process(target=_work, args=(rank, world, tree, rounds, seed, place))
            for rank in range(world)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise RuntimeError(f"all of {world} processes must end well: read what they wrote above")
        found: list[dict[str, Any]] = json.loads((place / "rows.json").read_text(encoding="utf-8"))
    return found


def measure_jax(tree: str, devices: int, rounds: int) -> list[dict[str, Any]]:
    """Returns the same of jitted updates, measured in a process of its own that has the devices."""
    command = [sys.executable, "-m", "benchmarks.devices_jax", tree, str(devices), str(rounds)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} must end well, got: {done.stderr[-2000:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a table a tree."""
    for part in dict.fromkeys(row["part"] for row in rows):
        of_part = [row for row in rows if row["part"] == part]
        first = of_part[0]
        title = f"{first['tree']}: {first['tensors']} tensors on {first['devices']} devices, n = {first['n']}"
        table = Table(title=title)
        for column in ("optimizer", "", "ms", "x its local one", f"x {PEER} there", "collectives"):
            table.add_column(column, justify="left" if column == "optimizer" else "right")
        for row in of_part:
            table.add_row(*_cells(row))
        Console(width=120).print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    peer = row.get("over_peer")
    return [
        row["name"],
        row["what"],
        f"{row['ms']['median']:.3g}",
        "{median:.2f} ({q1:.2f}-{q3:.2f})".format(**row["over_local"]) if row.get("over_local") else "",
        f"{peer['median']:.2f}" if peer else "",
        str(row["collectives"]),
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the table of the documentation."""
    lines = [
        "| | tensors, devices | | ms | x its local one (quartiles) | x AdamW fused there | collectives |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        name, what, *cells = _cells(row)
        bold = f"**{name}**" if name.startswith(("sftorch", "sfjax")) else name
        lines.append(f"| {bold} | {row['tensors']}, {row['devices']} | {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def recorded() -> list[dict[str, Any]]:
    """Returns what was measured."""
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def main(argv: Sequence[str]) -> int:
    """Measures, prints tables and writes results/devices.jsonl."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks devices", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tree", choices=TREES, action="append", help="default: all")
    parser.add_argument("--processes", type=int, default=2, help="of torch, default 2")
    parser.add_argument("--devices", type=int, default=8, help="of JAX, default 8")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="show what was measured, and measure nothing")
    parser.add_argument("--markdown", type=Path, help="write the table between the markers of a page")
    given = parser.parse_args(argv)
    if not given.report:
        for tree in given.tree or TREES:
            if tree in FOR_JAX:
                rows = measure_jax(tree, given.devices, given.rounds)
            else:
                rows = measure(tree, given.processes, given.rounds, given.seed)
            for part in dict.fromkeys(row["part"] for row in rows):
                replace_part(RESULTS, part, [row for row in rows if row["part"] == part])
    rows = recorded()
    show(rows)
    if given.markdown:
        write_between_markers(given.markdown, "devices", markdown(rows))
    return 0
