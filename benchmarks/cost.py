"""(c) What a save and a restore cost, against the size of the state, in both frameworks.

"blocks" is how long `save` keeps a training loop waiting when it writes in the background; the ratio to a
save that waits is what counts, since the times are this machine's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks._records import replace_part, spread, versions

RESULTS = Path(__file__).parent / "results" / "cost.jsonl"
SIZES = (10, 50, 200)  # MB of y, z and v together
TENSORS = 20


class Torch:
    """A model and its AdamW after one step."""

    def __init__(self, megabytes: int, folder: Path, background: bool):
        import torch

        import sftorch
        from sftorch.checkpoint import Checkpoints

        count = megabytes * 1_000_000 // 12 // TENSORS
        self.model = torch.nn.ParameterList([torch.randn(count) for _ in range(TENSORS)])
        self.optimizer = sftorch.AdamWScheduleFree(self.model.parameters())
        for p in self.model:
            p.grad = torch.ones_like(p)
        self.optimizer.step()
        self.checkpoints = Checkpoints(folder, background=background)

    def save(self, step: int) -> None:
        self.checkpoints.save(self.model, self.optimizer, step=step)

    def restore(self) -> None:
        self.checkpoints.restore(self.model, self.optimizer)


class Jax:
    """Parameters and AdamW's state after one update."""

    def __init__(self, megabytes: int, folder: Path, background: bool):
        import jax
        import jax.numpy as jnp

        import sfjax
        from sfjax.checkpoint import Checkpoints

        count = megabytes * 1_000_000 // 12 // TENSORS
        keys = jax.random.split(jax.random.key(0), TENSORS)
        self.params: Any = {f"w{i}": jax.random.normal(key, (count,)) for i, key in enumerate(keys)}
        tx = sfjax.schedule_free_adamw(0.01)
        grads = jax.tree.map(jnp.ones_like, self.params)
        _, self.state = jax.jit(tx.update)(grads, tx.init(self.params), self.params)
        jax.block_until_ready(self.state)
        self.checkpoints = Checkpoints(folder, background=background)

    def save(self, step: int) -> None:
        self.checkpoints.save(step, self.params, self.state)

    def restore(self) -> None:
        self.checkpoints.restore(self.params, self.state)


KINDS: dict[str, type] = {"torch": Torch, "jax": Jax}


def seconds(action: Callable[[], None]) -> float:
    """Returns how long a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(kind: str, megabytes: int, repeats: int) -> dict[str, np.ndarray]:
    """Returns the times of saves that wait, of saves in the background (and the first), and of restores."""
    times: dict[str, list[float]] = {"waits": [], "blocks": [], "restores": []}
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        waiting, background = (
            KINDS[kind](megabytes, Path(one), False),
            KINDS[kind](megabytes, Path(other), True),
        )
        for step in range(repeats + 1):  # interleaved, so that a busy moment meets both
            times["waits"].append(seconds(lambda step=step: waiting.save(step)))  # type: ignore[misc]
            times["blocks"].append(seconds(lambda step=step: background.save(step)))  # type: ignore[misc]
            background.checkpoints.wait()
            times["restores"].append(seconds(waiting.restore))
        for run in (waiting, background):
            run.checkpoints.close()
    found = {name: np.array(values[1:]) for name, values in times.items()}
    return found | {"first": np.array(times["blocks"][:1])}


def main(argv: Sequence[str]) -> int:
    """Prints the table and writes its rows to results/cost.jsonl."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cost", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=7, help="of each, after a first one; default: 7")
    arguments = parser.parse_args(argv)
    rows = []
    for kind, megabytes in tqdm([(kind, size) for kind in KINDS for size in SIZES], desc="cost"):
        times = measure(kind, megabytes, arguments.repeats)
        times["blocks_over_waits"] = times["blocks"] / times["waits"]
        rows.append(
            {
                "part": "cost",
                "framework": kind,
                "megabytes": megabytes,
                "n": arguments.repeats,
                "device": "cpu",
            }
            | {"versions": versions(), "seconds": {name: spread(values) for name, values in times.items()}}
        )
    replace_part(RESULTS, "cost", rows)
    show(rows)
    return 0


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints medians in ms."""
    columns = ("waits", "blocks", "first", "restores")
    table = Table(title="a save that waits, what a save blocks, the first of these, a restore: medians, ms")
    for column in ("framework", "state, MB", *columns, "blocks / waits (quartiles)"):
        table.add_column(column, justify="right")
    for row in rows:
        medians = {name: value["median"] for name, value in row["seconds"].items()}
        ratio = row["seconds"]["blocks_over_waits"]
        table.add_row(
            row["framework"],
            str(row["megabytes"]),
            *(f"{1000 * medians[name]:.3g}" for name in columns),
            f"{ratio['median']:.1%} ({ratio['q1']:.1%} to {ratio['q3']:.1%})",
        )
    Console(width=120).print(table)
