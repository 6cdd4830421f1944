"""(a) Does a run that was stopped and resumed in a fresh process end in the same bits? A table.

For each framework one process trains every combination to the end, saving on the way, and notes a digest
of the whole state; another process resumes every combination from its checkpoint and ends it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import _records

FRAMEWORKS = ("jax", "torch")
OPTIMIZERS = ("sgd", "adamw", "radam")
UPDATES = 24
SAVED_AFTER = 11  # updates; with accumulation two micro-batches later, in the middle of the twelfth


@dataclass(frozen=True)
class Combination:
    """One run.

    Attributes:
        optimizer, precision, accumulate: "sgd", "adamw" or "radam"; dtype of the parameters; micro-batches.
        mode: "train" or "eval", when it is saved. JAX has no modes: there x was just evaluated.
    """

    optimizer: str
    precision: str
    accumulate: int
    mode: str

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.precision}-{self.accumulate}-{self.mode}"

    @property
    def micro_batches(self) -> int:
        return UPDATES * self.accumulate

    @property
    def saved_at(self) -> int:
        """Micro-batches before the save."""
        return SAVED_AFTER * self.accumulate + self.accumulate // 2


def combinations() -> Iterator[Combination]:
    """Yields every combination that the table shows."""
    for optimizer, precision, accumulate, mode in product(
        OPTIMIZERS, ("float32", "bfloat16"), (1, 4), ("train", "eval")
    ):
        yield Combination(optimizer, precision, accumulate, mode)


def run(framework: str, folder: Path) -> dict[str, tuple[str, str]]:
    """Returns combination -> (digest of the whole run, digest of the resumed run), from two processes."""
    for part in ("whole", "resumed"):
        command = [sys.executable, "-m", f"benchmarks.exact_{framework}", part, str(folder)]
        subprocess.run(command, check=True)
    whole, resumed = (json.loads((folder / f"{part}.json").read_text()) for part in ("whole", "resumed"))
    return {name: (whole[name], resumed[name]) for name in whole}


def main(argv: Sequence[str]) -> int:
    """Prints the table; the exit code is the number of combinations that differ, at most 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks exact", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--framework", choices=FRAMEWORKS, action="append", help="default: both")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="also write DIR/exact.jsonl; default: print only"
    )
    arguments = parser.parse_args(argv)
    table = Table(title="resumed in a fresh process: the same bits as the run that was never stopped?")
    for column in ("framework", "optimizer", "parameters", "accumulate", "saved in mode", "same bits"):
        table.add_column(column)
    differing = 0
    for framework in arguments.framework or FRAMEWORKS:
        with tempfile.TemporaryDirectory() as folder:
            digests = run(framework, Path(folder))
        rows = []
        for one in combinations():
            same = len(set(digests[one.name])) == 1
            differing += not same
            cells = (framework, one.optimizer, one.precision, str(one.accumulate), one.mode)
            table.add_row(*cells, "yes" if same else "NO")
            rows.append({"part": framework, **asdict(one), "same_bits": same})
        if arguments.out:
            about = {"device": "cpu", "versions": _records.versions()}
            _records.replace_part(arguments.out / "exact.jsonl", framework, [row | about for row in rows])
    console = Console()
    console.print(table)
    console.print(f"{differing} of {table.row_count} differ")
    return min(differing, 1)


def write(part: str, folder: Path, digests: dict[str, str]) -> None:
    """Writes what a process of one part found."""
    (folder / f"{part}.json").write_text(json.dumps(digests))
