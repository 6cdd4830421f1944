"""(c) What a save and a restore cost, against the size of the state, in both frameworks.

"blocks" is how long `save` keeps a training loop waiting when it writes in the background, "first" the same
for the first save of a Checkpoints, which has to find room for its copy. The ratio to a save that waits is
what counts, since the times are this machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks._records import replace_part, spread, versions, write_between_markers

RESULTS = Path(__file__).parent / "results" / "cost.jsonl"
RAW = RESULTS.with_name("raw.jsonl")
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

    def save_plainly(self, file: Any) -> None:
        import torch

        held = [p.detach() for p in self.model]
        torch.save({"model": held, "optimizer": list(self.optimizer.state.values())}, file)

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


def seconds(action: Callable[[], object]) -> float:
    """Returns how long a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(kind: str, megabytes: int, repeats: int) -> dict[str, np.ndarray]:
    """Returns the times of saves that wait, of saves in the background, of first ones, and of restores."""
    times: dict[str, list[float]] = {"waits": [], "blocks": [], "first": [], "restores": []}
    with tempfile.TemporaryDirectory() as folder:
        waiting, background = (
            KINDS[kind](megabytes, Path(folder) / name, name == "background")
            for name in ("waiting", "background")
        )
        for step in range(repeats + 1):  # interleaved, so that a busy moment meets both
            times["waits"].append(seconds(lambda step=step: waiting.save(step)))  # type: ignore[misc]
            times["blocks"].append(seconds(lambda step=step: background.save(step)))  # type: ignore[misc]
            background.checkpoints.wait()
            fresh = KINDS[kind](megabytes, Path(folder) / f"fresh-{step}", True)
            times["first"].append(seconds(lambda fresh=fresh: fresh.save(0)))  # type: ignore[misc]
            fresh.checkpoints.close()
            shutil.rmtree(Path(folder) / f"fresh-{step}")
            times["restores"].append(seconds(waiting.restore))
        for run in (waiting, background):
            run.checkpoints.close()
    found = {name: np.array(values[1:]) for name, values in times.items()}
    return found | {f"{name}_over_waits": found[name] / found["waits"] for name in ("blocks", "first")}


def against_raw(megabytes: int, repeats: int) -> dict[str, Any]:
    """Returns the row of saves and restores in torch beside a write, synced, and a read of as many bytes."""
    times: dict[str, list[float]] = {"write": [], "save": [], "torch_save": [], "read": [], "restore": []}
    raw = np.random.default_rng(0).integers(0, 256, megabytes * 1_000_000, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run = Torch(megabytes, place / "checkpoints", background=False)

        def write(name: str, fill: Callable[[Any], object]) -> None:
            with open(place / name, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())

        for step in range(repeats + 1):  # interleaved, so that a busy moment meets all
            times["write"].append(seconds(lambda: write("raw", lambda file: file.write(raw.data))))
            times["save"].append(seconds(lambda step=step: run.save(step)))  # type: ignore[misc]
            times["torch_save"].append(seconds(lambda: write("torch", run.save_plainly)))
            times["read"].append(seconds(lambda: np.fromfile(place / "raw", np.uint8)))
            times["restore"].append(seconds(run.restore))
        run.checkpoints.close()
    found = {name: np.array(values[1:]) for name, values in times.items()}
    ratios = {
        f"{name}_over_{of}": spread(found[name] / found[of])
        for name, of in (("save", "write"), ("torch_save", "write"), ("restore", "read"))
    }
    return {
        "part": f"{megabytes} MB",
        "megabytes": megabytes,
        "n": repeats,
        "seconds": {name: spread(values) for name, values in found.items()},
        **ratios,
        "versions": versions(),
    }


def show_raw(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table of `against_raw`."""
    table = Table(title="torch, on a CPU: a save that waits, and a restore")
    names = ("save_over_write", "torch_save_over_write", "restore_over_read")
    for column in ("state, MB", "n", *(name.replace("_", " ") for name in names)):
        table.add_column(column, justify="right")
    for row in rows:
        ratios = ["{median:.2f} ({q1:.2f} to {q3:.2f})".format(**row[name]) for name in names]
        table.add_row(str(row["megabytes"]), str(row["n"]), *ratios)
    Console(width=120).print(table)


def main(argv: Sequence[str]) -> int:
    """Prints the table and writes its rows to results/cost.jsonl, and on request into a page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cost", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=7, help="of each, after a first one; default: 7")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the table between <!-- cost --> and its end"
    )
    parser.add_argument(
        "--raw", type=int, action="append", metavar="MB", help="only beside a raw write and read of this size"
    )
    arguments = parser.parse_args(argv)
    if arguments.raw:
        for size in arguments.raw:
            replace_part(RAW, f"{size} MB", [against_raw(size, arguments.repeats)])
        show_raw([json.loads(line) for line in RAW.read_text(encoding="utf-8").splitlines()])
        return 0
    rows = []
    for kind, megabytes in tqdm([(kind, size) for kind in KINDS for size in SIZES], desc="cost"):
        times = measure(kind, megabytes, arguments.repeats)
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
    if arguments.markdown:
        write_between_markers(arguments.markdown, "cost", markdown(rows))
    show(rows)
    return 0


HEAD = (
    "framework",
    "state, MB",
    "a save that waits, ms",
    "a restore, ms",
    "in the background, of one that waits",
    "the first of a Checkpoints",
)


def cells(row: dict[str, Any]) -> list[str]:
    """Returns a row of the table: medians, for the ratios with their quartiles."""
    times = [f"{1000 * row['seconds'][name]['median']:.3g}" for name in ("waits", "restores")]
    ratios = [row["seconds"][f"{name}_over_waits"] for name in ("blocks", "first")]
    spreads = [f"{of['median']:.1%} ({of['q1']:.1%} to {of['q3']:.1%})" for of in ratios]
    return [row["framework"], str(row["megabytes"]), *times, *spreads]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the table for a page."""
    lines = [HEAD, ["---", *["---:"] * (len(HEAD) - 1)], *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table."""
    table = Table()
    for column in HEAD:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*cells(row))
    Console(width=120).print(table)
