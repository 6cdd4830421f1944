"""Writes the golden files: `python -m parity_tests.make_golden`; with `--check` only says what differs.

Recorded gradients and case descriptions must be equal to the last bit. Iterates pass through the
machine's pow, log and expm1, whose last bit differs between C libraries, so they may differ by 1e-15
of the displacement plus one ulp, a thousandth of what any implementation is allowed.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import numpy as np

from parity_tests import compare, golden
from parity_tests.cases import CASES
from parity_tests.problems import PROBLEMS
from parity_tests.tolerances import TOLERANCES
from parity_tests.trajectory import SEQUENCES


@functools.cache
def wanted() -> dict[str, dict[str, np.ndarray]]:
    """Returns file name -> arrays, for every golden file there must be, generated anew, once a process."""
    files = {f"problem-{id}.npz": golden.problem_file(id) for id in PROBLEMS}
    records = {id: golden.record(PROBLEMS[id]) for id in PROBLEMS}
    return files | {f"{id}.npz": golden.case_file(case, records[case.problem]) for id, case in CASES.items()}


def find_problems(folder: Path = golden.FOLDER) -> list[str]:
    """Returns one sentence for each file of a folder that is not what this program would write."""
    files = wanted()
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    found = [f"{name} must not be there: no case has that id" for name in sorted(there - set(files))]
    found += [
        f"{name} must be there, got nothing: run without --check" for name in sorted(set(files) - there)
    ]
    for name in sorted(set(files) & there):
        with np.load(folder / name) as file:
            found += [f"{name}: {text}" for text in _differences(dict(file), files[name])]
    return found


def _differences(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> list[str]:
    if set(got) != set(want):
        return [f"arrays must be {sorted(want)}, got {sorted(got)}"]
    exact = [name for name in want if name not in SEQUENCES]
    found = [
        f"{k} must be {_short(want[k])}, got {_short(got[k])}" for k in exact if not _equal(got[k], want[k])
    ]
    if found or len(exact) == len(want):
        return found
    if any(got[s].shape != want[s].shape for s in SEQUENCES):
        return [f"x, y and z must have shape {want['x'].shape}"]
    try:
        compare.assert_same(
            "iterates", golden.unpack(got), golden.unpack(want), TOLERANCES["float64", "regenerate"]
        )
    except AssertionError as error:
        return [str(error)]
    return []


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b)


def _short(a: np.ndarray) -> str:
    return f"{a.dtype}{list(a.shape)} {' '.join(str(a).split())[:200]}"


def write(folder: Path = golden.FOLDER) -> int:
    """Writes every golden file, removes the files of cases that are gone; returns how many it wrote."""
    folder.mkdir(exist_ok=True)
    files = wanted()
    for path in folder.glob("*.npz"):
        if path.name not in files:
            path.unlink()
    for name, arrays in files.items():
        np.savez(folder / name, allow_pickle=False, **arrays)
    return len(files)


def main(arguments: list[str] | None = None, folder: Path = golden.FOLDER) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests.make_golden", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if anything differs")
    if not parser.parse_args(arguments).check:
        print(f"{write(folder)} files written to {folder}")
        return 0
    found = find_problems(folder)
    print("\n".join(found) or "golden files are what this program writes")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
