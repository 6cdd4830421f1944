"""The conformance matrix: implementations down, case families across, the largest error in each cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from parity_tests import golden
from parity_tests.cases import CASES, FAMILIES, Case
from parity_tests.compare import largest
from parity_tests.drivers import DRIVERS, Driver
from parity_tests.known_differences import KNOWN_DIFFERENCES, known
from parity_tests.tolerances import TOLERANCES

BEGIN, END = "<!-- conformance: begin -->", "<!-- conformance: end -->"


@dataclass(frozen=True)
class Cell:
    """What one implementation does on the cases of one family.

    Attributes:
        cases: how many it can be asked to run.
        error: largest error of those that ran, relative to displacement; None if none did.
        refused: how many it raised an exception on.
        differences: ids of the known differences that these cases show.
        conforms: whether every case ran within tolerance.
    """

    cases: int = 0
    error: float | None = None
    refused: int = 0
    differences: tuple[str, ...] = ()
    conforms: bool = True

    def __str__(self) -> str:
        if not self.cases:
            return "·"
        if self.error is None:
            return "refused"
        number = "NaN" if math.isinf(self.error) else "0" if self.error == 0 else f"{self.error:.0e}"
        return number + ("†" if self.refused else "")


Matrix = dict[str, dict[str, Cell]]


def pairs(drivers: Iterable[Driver]) -> list[tuple[Driver, Case]]:
    """Returns every case with every driver that it can be put to."""
    return [(driver, case) for driver in drivers for case in CASES.values() if driver.supports(case)]


def build(
    drivers: Iterable[Driver] = tuple(DRIVERS.values()),
    dtype: str = "float64",
    done: Callable[[Driver, Case], Any] = lambda driver, case: None,
) -> Matrix:
    """Runs every pair and returns driver -> family -> cell; `done` is called after each."""
    drivers = list(drivers)
    matrix = {driver.name: {family: Cell() for family in FAMILIES} for driver in drivers}
    for driver, case in pairs(drivers):
        row = matrix[driver.name]
        row[case.family] = _with(row[case.family], driver, case, dtype)
        done(driver, case)
    return matrix


def _with(cell: Cell, driver: Driver, case: Case, dtype: str) -> Cell:
    tolerance = TOLERANCES[dtype, "golden"]
    difference = known(driver.name, case)
    shown = cell.differences
    if difference and difference.id not in shown:
        shown = (*shown, difference.id)
    cell = replace(cell, cases=cell.cases + 1, differences=shown)
    try:
        want = golden.load(case.id)
        run = driver.run(case, golden.load_record(case.problem), dtype, want.steps.tolist())
        error = largest(run, want, tolerance)
    except Exception:  # a peer may fail in any way; that is what the matrix shows
        return replace(cell, refused=cell.refused + 1, conforms=False)
    conforms = cell.conforms and error <= tolerance.relative
    return replace(cell, error=max(error, cell.error or 0.0), conforms=conforms)


def notes(matrix: Matrix) -> dict[str, str]:
    """Returns the known differences that the matrix shows: id -> letter."""
    shown = {id for row in matrix.values() for cell in row.values() for id in cell.differences}
    listed = [difference.id for difference in KNOWN_DIFFERENCES if difference.id in shown]
    return {id: chr(ord("a") + number) for number, id in enumerate(listed)}


def markdown(matrix: Matrix, dtype: str = "float64") -> str:
    """Returns the matrix as a Markdown table with its notes."""
    letters = notes(matrix)
    lines = ["| " + " | ".join(["implementation", *FAMILIES]) + " |", "|---" * (len(FAMILIES) + 1) + "|"]
    for name, row in matrix.items():
        cells = []
        for cell in row.values():
            text = str(cell) if cell.conforms else f"**{cell}**"
            marks = ",".join(letters[id] for id in cell.differences)
            cells.append(f"{text} <sup>{marks}</sup>" if marks else text)
        lines.append("| " + " | ".join([name, *cells]) + " |")
    tolerance = TOLERANCES[dtype, "golden"].relative
    lines += [
        "",
        f"Largest error of x, y and z in {dtype} over {len(CASES)} recorded cases, relative to the largest "
        f"displacement from the start; {tolerance:g} is allowed, bold is beyond it or refuses cases (†), "
        "· has no such option.",
        "",
    ]
    by_id = {difference.id: difference for difference in KNOWN_DIFFERENCES}
    lines += [
        f"- <sup>{letter}</sup> {by_id[id].reason} ([read]({by_id[id].link}))"
        for id, letter in letters.items()
    ]
    return "\n".join(lines)


def as_json(matrix: Matrix, dtype: str) -> dict[str, Any]:
    """Returns the matrix as plain data."""
    rows = {name: {family: asdict(cell) for family, cell in row.items()} for name, row in matrix.items()}
    return {
        "dtype": dtype,
        "tolerance": TOLERANCES[dtype, "golden"].relative,
        "cases": len(CASES),
        "rows": rows,
    }


def write_between_markers(path: Path, text: str) -> None:
    """Replaces what lies between the two markers of a file."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} must hold the lines {BEGIN} and {END}, got neither or one: add them")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
