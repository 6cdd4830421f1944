"""(c) What a save and a restore cost, against the size of the state, in both frameworks.

"blocks" is how long `save` keeps a training loop waiting when it writes in the background, "first" the same
for the first save of a Checkpoints, which has to find room for its copy. The ratio to a save that waits is
what counts, since the times are this machine's.

`--raw` holds a save and a restore in torch against a plain write, synced, and a plain read of y, z and v. A
save makes new files and removes older ones: so does the write that it is held against. A write over the same
file is shown beside that, which gets back the very pages of memory that it has just let go.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

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

    def __init__(self, megabytes: int, folder: Path, background: bool, keep_newest: int = 2):
        import torch

        import sftorch
        from sftorch.checkpoint import Checkpoints

        count = megabytes * 1_000_000 // 12 // TENSORS
        self.model = torch.nn.ParameterList([torch.randn(count) for _ in range(TENSORS)])
        self.optimizer = sftorch.AdamWScheduleFree(self.model.parameters())
        for p in self.model:
            p.grad = torch.ones_like(p)
        self.optimizer.step()
        self.checkpoints = Checkpoints(folder, background=background, keep_newest=keep_newest)

    def save(self, step: int) -> None:
        self.checkpoints.save(self.model, self.optimizer, step=step)

    def save_by_torch(self, file: BinaryIO) -> None:
        import torch

        held = [p.detach() for p in self.model]
        torch.save({"model": held, "optimizer": list(self.optimizer.state.values())}, file)

    def write_raw(self, file: BinaryIO) -> None:
        for p in self.model:
            for tensor in (p.detach(), *(self.optimizer.state[p][name] for name in ("z", "exp_avg_sq"))):
                file.write(tensor.numpy().data)

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


def write_over(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    """Writes a file, over the one that is there, and syncs it to the disk."""
    with open(path, "wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())


def write_new(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    """Writes a new file and syncs it to the disk; it takes the place of the one before, which goes."""
    write_over(path.with_suffix(".new"), fill)
    os.replace(path.with_suffix(".new"), path)


def against_raw(megabytes: int, repeats: int) -> dict[str, Any]:
    """Returns the row of saves and restores in torch beside a write, synced, and a read of y, z and v."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        raw, over, by_torch = (place / name for name in ("raw", "over", "torch"))
        # One is kept of everything, so that the largest size fits on a disk and into its memory.
        waiting = Torch(megabytes, place / "waiting", background=False, keep_newest=1)
        behind = copy.copy(waiting)
        behind.checkpoints = type(waiting.checkpoints)(place / "behind", keep_newest=1)
        actions: dict[str, Callable[[int], object]] = {
            "write_over": lambda step: write_over(over, waiting.write_raw),
            "write": lambda step: write_new(raw, waiting.write_raw),
            "read": lambda step: np.fromfile(raw, np.uint8),
            "save": waiting.save,
            "restore": lambda step: waiting.restore(),
            "torch_save": lambda step: write_new(by_torch, waiting.save_by_torch),
            "blocks": behind.save,
        }
        times: dict[str, list[float]] = {name: [] for name in actions}
        for step in range(repeats + 1):  # interleaved, so that a busy moment meets all
            for name, action in actions.items():
                times[name].append(seconds(partial(action, step)))
            behind.checkpoints.wait()
        saved = sum(file.stat().st_size for file in (place / "waiting").rglob("*.safetensors"))
        sizes = {"write_over": over.stat().st_size, "write": raw.stat().st_size, "save": saved}
        sizes["torch_save"] = by_torch.stat().st_size
        waiting.checkpoints.close()
        behind.checkpoints.close()
    found = {name: np.array(values[1:]) for name, values in times.items()}
    return {
        "part": f"{megabytes} MB",
        "megabytes": megabytes,
        "n": repeats,
        "device": "cpu",
        "bytes": sizes,
        "megabytes_per_second": {
            name: spread(size / 1_000_000 / found[name]) for name, size in sizes.items()
        },
        "seconds": {name: spread(values) for name, values in found.items()},
        "ratios": {f"{name}/{of}": spread(found[name] / found[of]) for name, of in RATIOS},
        "versions": versions(),
    }


RATES = {
    "write": "a plain write, synced, into a new file: MB/s",
    "write_over": "the same over one file: MB/s",
    "torch_save": "torch.save, synced, into a new file: MB/s",
    "save": "a save that waits: MB/s, of 4/3 of the bytes",
}
RATIOS = {
    ("save", "write"): "a save that waits, of a plain write into a new file",
    ("save", "write_over"): "of one over the same file",
    ("torch_save", "write"): "torch.save, of a plain write into a new file",
    ("blocks", "save"): "what a save in the background blocks, of one that waits",
    ("restore", "read"): "a restore, of a plain read",
}


def raw_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the table of `against_raw`, a size a column: medians, for the ratios with their quartiles."""
    rows = sorted(rows, key=lambda row: row["megabytes"])
    rates = [
        [text, *(f"{row['megabytes_per_second'][name]['median']:,.0f}" for row in rows)]
        for name, text in RATES.items()
    ]
    ratios = [
        [text, *("{median:.2f} ({q1:.2f} to {q3:.2f})".format(**row["ratios"][f"{a}/{b}"]) for row in rows)]
        for (a, b), text in RATIOS.items()
    ]
    return [
        ["torch, on a CPU", *(f"{row['megabytes']:,} MB, n = {row['n']}" for row in rows)],
        *rates,
        *ratios,
    ]


def main(argv: Sequence[str]) -> int:
    """Prints the table and writes its rows to results/cost.jsonl, and on request into a page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cost", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=7, help="of each, after a first one; default: 7")
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="write the table between <!-- cost --> and its end, with --raw between <!-- raw --> and its end",
    )
    parser.add_argument(
        "--raw", type=int, action="append", metavar="MB", help="only beside a raw write and read of this size"
    )
    arguments = parser.parse_args(argv)
    if arguments.raw:
        for size in arguments.raw:
            replace_part(RAW, f"{size} MB", [against_raw(size, arguments.repeats)])
        table = raw_cells([json.loads(line) for line in RAW.read_text(encoding="utf-8").splitlines()])
        if arguments.markdown:
            write_between_markers(arguments.markdown, "raw", as_markdown(table))
        show(table)
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
    show([list(HEAD), *map(cells, rows)])
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
    return as_markdown([list(HEAD), *map(cells, rows)])


def raw_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the table of `against_raw` for a page."""
    return as_markdown(raw_cells(rows))


def as_markdown(table: Sequence[list[str]]) -> str:
    """Returns a table, whose first row is its head, in Markdown."""
    lines = [table[0], ["---", *["---:"] * (len(table[0]) - 1)], *table[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(table: Sequence[list[str]]) -> None:
    """Prints a table, whose first row is its head."""
    shown = Table()
    for column in table[0]:
        shown.add_column(column, justify="right")
    for row in table[1:]:
        shown.add_row(*row)
    Console(width=120).print(shown)
