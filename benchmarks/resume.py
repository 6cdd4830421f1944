"""What a restart costs: `python -m benchmarks resume`.

(b) A restart from weights alone, with 1, 8 and 32 micro-batches an optimizer step, on two problems, for
ours and for the others: about an hour on one free core. Writes OUT/resume.jsonl, OUT/resume.png
and OUT/restart.png, the picture of docs/resuming.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

from benchmarks import _records, resume_figure, resume_rows
from benchmarks.resume_methods import METHODS, sweep
from benchmarks.resume_problems import PROBLEMS
from benchmarks.resume_restart import Setting, compare, steps_of
from benchmarks.resume_rows import Row

ACCUMULATIONS = (1, 8, 32)
DEFAULT_SEEDS = ", ".join(f"{kind.default_seeds} for {kind.name}" for kind in PROBLEMS)
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if the default policy misses its target."""
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = read(options.out / "resume.jsonl") if options.report else restart(options)
    console = Console()
    console.print(resume_rows.tables(found))
    if options.sweep:
        return 0
    resume_figure.draw(found, options.out / "resume.png")
    resume_figure.draw_first(found, options.out / "restart.png")
    if options.markdown:
        _records.write_between_markers(options.markdown, resume_rows.PART, resume_rows.markdown(found))
    misses = resume_rows.misses(found)
    console.print("\n".join(misses) or "target met in every setting", highlight=False)
    return int(bool(misses))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments, or exits with what is wrong with them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks resume", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="digits only, 3 seeds, accumulation 1 and 8: half a minute")
    add("--seeds", type=int, metavar="N", help=f"default: {DEFAULT_SEEDS}")
    add("--trained", type=int, default=1000, metavar="N", help="steps before the restart; default: 1000")
    add("--sweep", action="store_true", help="other policies, to resume_sweep.jsonl")
    add("--problem", choices=[kind.name for kind in PROBLEMS], help="this one only; default: all")
    add("--report", action="store_true", help="run nothing: figure and table from OUT/resume.jsonl")
    add("--out", type=Path, metavar="DIR", help="default: benchmarks/results; out/benchmarks with --quick")
    add("--markdown", type=Path, metavar="FILE", help="write the table between <!-- restart --> and its end")
    options = parser.parse_args(argv)
    options.seeds = 3 if options.seeds is None and options.quick else options.seeds
    options.out = options.out or (Path("out/benchmarks") if options.quick else RESULTS)
    for name in ("seeds", "trained"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be a whole number >= 1, got {value}: pass 1 or more")
    if options.markdown and (options.quick or options.sweep or options.problem):
        parser.error(
            "--markdown must come alone, not with --quick, --sweep or --problem: a page holds full runs"
        )
    return options


def read(path: Path) -> list[Row]:
    """Returns the rows of (b) that an earlier run left."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["part"] == resume_rows.PART]


def restart(options: argparse.Namespace) -> list[Row]:
    """Returns the rows of (b); the file grows with every setting, so an interrupted run leaves some."""
    kinds = [kind for kind in PROBLEMS if options.problem in (None, kind.name)][
        : 1 if options.quick else None
    ]
    accumulations = ACCUMULATIONS[: 2 if options.quick else None]
    problems = [kind(options.seeds or kind.default_seeds) for kind in kinds]
    settings = [Setting(problem, n, options.trained) for problem in problems for n in accumulations]
    methods, path, part = METHODS, options.out / "resume.jsonl", resume_rows.PART
    if options.sweep:
        names = "+".join(kind.name for kind in kinds)
        methods, path = sweep(options.trained), options.out / "resume_sweep.jsonl"
        part = f"sweep {names} {options.trained}"
    found: list[Row] = []
    with tqdm(total=sum(steps_of(s, methods) for s in settings), unit="step", smoothing=0.05) as bar:
        for setting in settings:
            bar.set_description(f"{setting.problem.name}, accumulate {setting.accumulate}")
            found += resume_rows.rows(setting, *compare(setting, methods, bar.update), part)
            # Only the figure needs the curves, and a sweep has none.
            drop = {"curve"} if options.sweep else set()
            _records.replace_part(path, part, [{k: row[k] for k in row if k not in drop} for row in found])
    return found
