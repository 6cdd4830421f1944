"""What a step costs in every precision, in processor time over moving its bytes, beside 8-bit peers.

The floor reads and writes as many bytes and computes next to nothing. Everybody steps once in every round, in
an order drawn anew, and what counts is the ratio to the floor of the same round. A step in codes computes
more than it moves: AdamW's root and quotient alone take longer than the floor of 12 bytes.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

import sftorch
from benchmarks._records import replace_part, spread, versions, write_between_markers
from benchmarks._trees import count, gpt
from sftorch.kernels.call import Job, Kind

RESULTS = Path(__file__).parent / "results" / "eight.jsonl"
SHAPES = gpt(layers=4, vocabulary=8192)
FLOOR_BYTES = 28  # of the floor of float32: four arrays read, three written
LR, DECAY = 1e-4, 0.01


class Contender(NamedTuple):
    """One row.

    Attributes:
        name: as the table has it.
        dtype: of parameters and gradients.
        moved: bytes a parameter that a step reads and writes at least, short rows and vectors not counted.
        make: (parameters, lr=..., weight_decay=...) -> optimizer.
    """

    name: str
    dtype: torch.dtype
    moved: float
    make: Callable[..., Any]


def contenders() -> list[Contender]:
    """Returns ours and those peers that are installed."""
    ours, narrow, wide = sftorch.AdamWScheduleFree, torch.bfloat16, torch.float32
    found = [
        _ours("float32, exact", wide, 28, ours),
        _ours("float32, 8bit", wide, 18, ours, precision="8bit"),
        _ours("bfloat16, exact", narrow, 26, ours),
        _ours("bfloat16, lean", narrow, 18, ours, precision="lean"),
        _ours("bfloat16, 8bit", narrow, 12, ours, precision="8bit"),
        Contender(
            "torch.optim.AdamW, float32, fused", wide, 28, functools.partial(torch.optim.AdamW, fused=True)
        ),
        Contender(
            "torch.optim.AdamW, bfloat16, fused", narrow, 14, functools.partial(torch.optim.AdamW, fused=True)
        ),
    ]
    for module, name in (("bitsandbytes.optim", "bitsandbytes"), ("torchao.optim", "torchao")):
        if importlib.util.find_spec(name):
            make = importlib.import_module(module).AdamW8bit
            found.append(Contender(f"{name} AdamW8bit, bfloat16", narrow, 10, make))
    return found


def _ours(name: str, dtype: torch.dtype, moved: float, make: Any, **options: Any) -> Contender:
    return Contender(f"sftorch {name}", dtype, moved, functools.partial(make, fused=True, **options))


def measure(rounds: int, seed: int, threads: int) -> list[dict[str, Any]]:
    """Returns a row for each contender."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    draw, listed = random.Random(seed), {one.name: one for one in contenders()}
    tables = {name: [torch.zeros(shape) for shape in SHAPES] for name in ("y", "z", "v", "g")}
    steps: dict[str, Callable[[], Any]] = {"floor": lambda: Job(Kind.FLOOR_ADAMW).run(tables, (), threads)}
    steps |= {name: _started(one).step for name, one in listed.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(-2, rounds), desc=f"{threads} thread(s)"):  # the first two warm up
        for name in draw.sample(list(steps), len(steps)):
            began = time.process_time()
            steps[name]()
            if number >= 0:
                taken[name].append(time.process_time() - began)
    seconds = {name: np.array(found) for name, found in taken.items()}
    exact = seconds["sftorch float32, exact"]
    return [
        {
            "part": f"{threads} thread(s)",
            "name": name,
            "parameters": count(SHAPES),
            "tensors": len(SHAPES),
            "threads": threads,
            "n": rounds,
            "moved": one.moved,
            "ns_per_parameter": spread(seconds[name] / count(SHAPES) * 1e9),
            "over_floor": spread(seconds[name] / (seconds["floor"] * one.moved / FLOOR_BYTES)),
            "over_exact": spread(seconds[name] / exact),
            "versions": versions(),
        }
        for name, one in listed.items()
    ]


def _started(one: Contender) -> Any:
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(shape, dtype=one.dtype)) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return one.make(params, lr=LR, weight_decay=DECAY)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the table."""
    first = rows[0]
    size = f"{first['parameters'] / 1e6:.3g}M parameters in {first['tensors']} tensors, n = {first['n']}"
    lines = [
        f"| AdamW, {size} | bytes moved | ns a parameter | x floor of its bytes | x float32, exact |",
        "| --- |" + " ---: |" * 4,
    ]
    for row in rows:
        ratios = [
            "{median:.3g} ({q1:.3g}-{q3:.3g})".format(**row[name]) for name in ("over_floor", "over_exact")
        ]
        shown = f"**{row['name']}**" if row["name"].startswith("sftorch") else row["name"]
        lines.append(
            f"| {shown} | {row['moved']:g} | {row['ns_per_parameter']['median']:.3g} | "
            + " | ".join(ratios)
            + " |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Prints the table and writes its rows to results/eight.jsonl."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks eight", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--seed", type=int, default=0, help="of tensors and order; default: 0")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: benchmarks/results/eight.jsonl")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the table between <!-- eight --> and its end"
    )
    arguments = parser.parse_args(argv)
    rows = measure(arguments.rounds, arguments.seed, arguments.threads)
    replace_part(arguments.out, f"{arguments.threads} thread(s)", rows)
    Console(width=140).print(markdown(rows), markup=False)
    if arguments.markdown:
        write_between_markers(arguments.markdown, "eight", markdown(rows))
    return 0
