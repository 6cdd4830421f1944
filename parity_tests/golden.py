"""Golden files: recorded gradients, one file a problem, and the reference's iterates, one file a case.

golden/problem-ID.npz   params-LEAF, grads-LEAF (float32, steps first)
golden/CASE.npz         x, y, z (float64, [checkpoint, all leaves flat]), steps, case (JSON)
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from parity_tests.cases import Case
from parity_tests.problems import PROBLEMS, SHAPES, Record, record
from parity_tests.reference import Arrays, Reference
from parity_tests.trajectory import SEQUENCES, Trajectory, stack

FOLDER = Path(__file__).parent / "golden"
# Dense while mistakes show (all planted ones do by step 10), then ever sparser.
CHECKPOINTS = (0, 1, 2, 3, 5, 7, 10, 20, 40, 60, 100, 200, 300)


def replay(case: Case, recorded: Record) -> Trajectory:
    """Returns the reference's run of a case on recorded gradients, every step of it."""
    run = Reference(case.optimizer, recorded.params, case.options)
    rows = {0: run.iterates()}
    for step, lr in enumerate(case.lrs):
        grads, told = case.told(recorded.step(step), step)
        run.update(grads, lr, **told)
        rows[step + 1] = run.iterates()
    return stack(rows)


def problem_file(id: str) -> dict[str, np.ndarray]:
    """Returns what a problem's golden file must hold."""
    made = record(PROBLEMS[id])
    parts = {f"params-{k}": a for k, a in made.params.items()} | {
        f"grads-{k}": a for k, a in made.grads.items()
    }
    return {name: a.astype(np.float32) for name, a in parts.items()}


def case_file(case: Case, recorded: Record) -> dict[str, np.ndarray]:
    """Returns what a case's golden file must hold."""
    run = replay(case, recorded)
    kept = run.at(np.array([s for s in CHECKPOINTS if s <= case.steps]))
    about = {"steps": kept.steps, "case": np.array(json.dumps(asdict(case), indent=1))}
    return about | {s: flatten(kept.sequence(s), len(kept.steps)) for s in SEQUENCES}


@functools.cache
def load_record(problem: str) -> Record:
    """Returns the recorded gradients of a problem, as float64."""
    with np.load(FOLDER / f"problem-{problem}.npz") as file:
        params, grads = (
            {k: file[f"{part}-{k}"].astype(np.float64) for k in SHAPES} for part in ("params", "grads")
        )
    return Record(params, grads)


@functools.cache
def load(id: str) -> Trajectory:
    """Returns the recorded iterates of a case, at its checkpoints."""
    with np.load(FOLDER / f"{id}.npz") as file:
        return unpack(dict(file))


def unpack(arrays: dict[str, np.ndarray]) -> Trajectory:
    """Returns the iterates that a case's golden file holds."""
    return Trajectory(arrays["steps"], *(_unflatten(arrays[s]) for s in SEQUENCES))


def flatten(leaves: Arrays, rows: int) -> np.ndarray:
    """Returns leaves of some rows each as one array [rows, all leaves flat]."""
    # An empty leaf has no size from which reshape could infer a -1.
    return np.concatenate(
        [leaves[k].reshape(rows, int(np.prod(shape))) for k, shape in SHAPES.items()], axis=1
    )


def _unflatten(flat: np.ndarray) -> Arrays:
    ends = np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])
    flat.flags.writeable = False  # loaded once for all tests
    parts = np.split(flat, ends[:-1], axis=1)
    return {k: p.reshape(len(flat), *shape) for (k, shape), p in zip(SHAPES.items(), parts, strict=True)}
