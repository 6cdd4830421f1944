"""Prints the conformance matrix: `python -m parity_tests`, about two minutes on one core."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from parity_tests import matrix as matrices
from parity_tests.cases import FAMILIES
from parity_tests.drivers import DRIVERS, TWINS, Driver
from parity_tests.known_differences import KNOWN_DIFFERENCES
from parity_tests.matrix import Matrix

WIDTH = 136  # what the table needs


def arguments(given: list[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests", description=__doc__)
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64", help="default: float64")
    parser.add_argument("--only", metavar="NAME", help="implementations whose name contains NAME")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help=f"write a table between {matrices.BEGIN} and its end"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the cells as JSON")
    return parser.parse_args(given)


def run(drivers: list[Driver], dtype: str, console: Console) -> Matrix:
    """Returns the matrix, with a progress bar."""
    columns = (TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(matrices.pairs(drivers)))
        return matrices.build(
            drivers, dtype, lambda driver, case: progress.update(task, advance=1, description=driver.name)
        )


def table(matrix: Matrix, dtype: str) -> Table:
    """Returns the matrix for the terminal."""
    letters = matrices.notes(matrix)
    title = f"Largest error relative to displacement, {dtype} († raises on some cases, · has no such option)"
    shown = Table(title=title, header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("implementation", no_wrap=True)
    for family in FAMILIES:
        shown.add_column(family, justify="right", overflow="fold", min_width=8)
    for name, row in matrix.items():
        cells = []
        for cell in row.values():
            marks = "".join(letters[id] for id in cell.differences)
            style = (
                "dim" if not cell.cases else "green" if cell.conforms else "yellow" if marks else "bold red"
            )
            cells.append(f"[{style}]{cell}[/]{f' [dim]{marks}[/]' if marks else ''}")
        shown.add_row(name, *cells)
    return shown


def main(given: list[str] | None = None) -> int:
    """Runs the program; returns 1 if one of the twins is out of tolerance."""
    options = arguments(given)
    console = Console()
    console.width = max(console.width, WIDTH)
    drivers = [driver for driver in DRIVERS.values() if (options.only or "") in driver.name]
    matrix = run(drivers, options.dtype, console)
    console.print(table(matrix, options.dtype))
    letters = matrices.notes(matrix)
    for difference in KNOWN_DIFFERENCES:
        if difference.id in letters:
            console.print(
                f"[dim]{letters[difference.id]}[/] {difference.reason}\n  [dim]{difference.link}[/]"
            )
    if options.markdown:
        matrices.write_between_markers(options.markdown, matrices.markdown(matrix, options.dtype))
    if options.json:
        options.json.write_text(json.dumps(matrices.as_json(matrix, options.dtype), indent=1) + "\n")
    ours = {driver.name for driver in TWINS}
    return int(
        any(not cell.conforms for name, row in matrix.items() if name in ours for cell in row.values())
    )


if __name__ == "__main__":
    sys.exit(main())
