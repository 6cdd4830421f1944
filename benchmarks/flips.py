"""What eval() and then train() cost, beside the peers: time and page faults, at several sizes.

Everybody flips once in every round, in an order drawn anew, each with parameters of its own; what counts is
the ratio to schedulefree's in the same round, on the clock and in processor time, since these machines are
shared. A page fault is the first touch of 4 KiB of fresh memory, which costs more than moving its bytes.
"""

from __future__ import annotations

import argparse
import functools
import random
import resource
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

import sftorch
from benchmarks._records import replace_part, spread, versions

RESULTS = Path(__file__).parent / "results" / "flips.jsonl"
SIZES = (1, 20, 100)  # million parameters
TENSORS = 20
PEER = "schedulefree AdamWScheduleFree"


def makers() -> dict[str, Callable[[list[Tensor]], Any]]:
    """Returns what makes each optimizer of a list of parameters."""
    import schedulefree

    return {
        "sftorch AdamWScheduleFree": sftorch.AdamWScheduleFree,
        "sftorch AdamWScheduleFree foreach": functools.partial(sftorch.AdamWScheduleFree, fused=False),
        PEER: schedulefree.AdamWScheduleFree,
    }


def _started(make: Callable[[list[Tensor]], Any], count: int) -> Any:
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(count // TENSORS)) for _ in range(TENSORS)]
    optimizer = make(params)
    optimizer.train()
    for _ in range(2):
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        optimizer.step()
        for p in params:
            p.grad = None
    return optimizer


def measure(millions: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Returns a row for each contender."""
    draw = random.Random(seed)
    optimizers = {name: _started(make, millions * 1_000_000) for name, make in makers().items()}
    taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in optimizers}
    for number in tqdm(range(-2, rounds), desc=f"{millions}M"):  # the first two warm up
        for name in draw.sample(list(optimizers), len(optimizers)):
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            clock, own = time.perf_counter(), time.process_time()
            optimizers[name].eval()
            optimizers[name].train()
            spent = time.perf_counter() - clock, time.process_time() - own
            if number >= 0:
                taken[name].append((*spent, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))
    arrays = {name: np.array(values).T for name, values in taken.items()}
    return [
        {
            "part": f"{millions}M",
            "name": name,
            "millions": millions,
            "n": rounds,
            "threads": torch.get_num_threads(),
            "ms": spread(clock * 1e3),
            "over_peer": spread(clock / arrays[PEER][0]),
            "over_peer_in_processor_time": spread(own / arrays[PEER][1]),
            "page_faults": spread(faults),
            "versions": versions(),
        }
        for name, (clock, own, faults) in arrays.items()
    ]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table."""
    table = Table(title=f"eval() and train(), {rows[0]['threads']} thread(s), n = {rows[0]['n']}")
    for column in ("optimizer", "parameters", "ms", f"x {PEER}", "x in processor time", "page faults"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for row in rows:
        ratios = [row[name] for name in ("over_peer", "over_peer_in_processor_time")]
        cells = ["{median:.2f} ({q1:.2f} to {q3:.2f})".format(**ratio) for ratio in ratios]
        size, ms, faults = f"{row['millions']}M", row["ms"]["median"], row["page_faults"]["median"]
        table.add_row(row["name"], size, f"{ms:.3g}", *cells, f"{faults:.0f}")
    Console(width=130).print(table)


def main(argv: Sequence[str]) -> int:
    """Prints the table and writes its rows to results/flips.jsonl."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks flips", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--size", type=int, action="append", help="million parameters; default: 1, 20, 100")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = []
    for millions in arguments.size or SIZES:
        found = measure(millions, arguments.rounds, arguments.seed)
        replace_part(RESULTS, f"{millions}M", found)
        rows += found
    show(rows)
    return 0
