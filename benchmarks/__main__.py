"""Runs one benchmark: `python -m benchmarks NAME [options]`; NAME --help lists its options."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "quality": "whether one run without a schedule beats a tuned schedule: test losses, every rate",
    "resume": "what a restart costs: loss after a restart from weights alone",
    "precision": "what 16-bit parameters cost: the loss in every precision, ours and the others'",
    "eight": "what a step costs in every precision against the memory that it must move, beside 8-bit peers",
    "exact": "whether a run resumed in a fresh process ends in the same bits: a table",
    "cost": "what a save and a restore cost, against the size of the state",
    "memory": "what an optimizer keeps, and what a step takes for a moment",
    "step": "what a step costs against the memory it must move, beside the peers",
    "launches": "what a step of lists is to a CUDA device: launches, bytes, temporaries, counted without one",
    "calls": "how much of our Python a step goes through: files, functions, calls",
    "flips": "what eval() and then train() cost, beside the peers: time and page faults",
    "devices": "what a step and the modes cost under FSDP2 and on a JAX mesh, beside the peers",
    "hlo": "what XLA makes of a step: kernels, bytes, copies, on an H100, a TPU and a CPU",
    "storm": "the same under SIGKILL at random moments, and of random programs cut at any line",
    "fuzz": "what readers, restores, imports and the plan make of damaged, random and hostile input",
    "overlap": "whether a second job on a folder can lose what the first was promised",
    "powercut": "what is on the disk if the power goes after any operation of a run that saves",
}
ALL = ("step", "memory", "precision")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code of the benchmark that the first word names."""
    name, *rest = argv or ["--help"]
    if name == "all":
        return max(importlib.import_module(f"benchmarks.{one}").main(rest) for one in ALL)
    if name in BENCHMARKS:
        return importlib.import_module(f"benchmarks.{name}").main(rest)
    listed = "\n".join(f"  {known:<10}{text}" for known, text in BENCHMARKS.items())
    listed += "\n  all       " + ", ".join(ALL)
    print(f"usage: python -m benchmarks NAME [options]\n\nNAME is one of\n{listed}")
    return 0 if name in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
