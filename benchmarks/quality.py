"""Whether one run without a schedule beats a tuned schedule: `python -m benchmarks quality`.

Trains every method at every rate of a grid on five seeds, tunes the rate on validation data, and measures
test data at x; then replays the chosen settings in torch. About half an hour on two cores. `--fetch` brings
the data first. A row is written as soon as it is measured: what is cut short goes on where it was. Writes
OUT/quality.jsonl and OUT/quality.png.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks import _records, quality_data
from benchmarks.quality_methods import METHODS, Method
from benchmarks.quality_problems import CONVEX, PROBLEMS, Problem

RESULTS = Path(__file__).parent / "results"
SEEDS = 5
Row = dict[str, Any]

ADAMW_FORMS = ("sf-adamw", "sf-radam", "sf-sgd", "adamw-cosine", "adamw-linear", "adamw-constant")
ROWS: dict[str, tuple[str, ...]] = (
    {
        "fashion": tuple(METHODS),
        "fashion-half": ("adamw-cosine",),
        "fashion-quarter": ("adamw-cosine",),
        "digits": tuple(METHODS),
        "digits-large": tuple(METHODS),
        "quadratic": (*ADAMW_FORMS, "sf-adamw-95", "sf-adamw-r", "sf-adamw-c", "adamw-wsd"),
        "quadratic-quiet": (*ADAMW_FORMS, "sf-adamw-95", "sf-adamw-r", "sf-adamw-c", "adamw-wsd"),
    }
    | dict.fromkeys(CONVEX, ADAMW_FORMS[:-1])
    | {"kjv": tuple(METHODS)}
)
TWINS = ("fashion", "kjv", "digits", "quadratic")  # problems that torch replays
CURVES = (
    ("fashion", "sf-adamw"),
    ("fashion", "adamw-cosine"),
    ("fashion-half", "adamw-cosine"),
    ("fashion-quarter", "adamw-cosine"),
)
# What a reader may turn, beside its default.
SENSITIVITY: dict[str, tuple[float, ...]] = {
    "b1": (0.5, 0.8, 0.95, 0.98),
    "r": (1.0, 2.0, 4.0, 8.0),
    "warmup": (0.0, 0.02, 0.2, 0.5),
}
BATCHES = (8, 32, 128, 512)


class Job(NamedTuple):
    """One row to measure. `rate` is None in a sweep, else the one that was chosen."""

    part: str
    problem: Problem
    method: Method
    seeds: int
    rate: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.part, self.problem.name, self.method.name

    @property
    def rates(self) -> list[float]:
        if self.rate is not None:
            return [self.rate]
        return [float(f"{rate * self.method.scale:.3g}") for rate in self.problem.rates]

    def asked(self) -> Row:
        """Returns what the row's numbers depend on."""
        problem, method = self.problem, self.method
        return {
            "part": self.part,
            "problem": problem.name,
            "method": method.name,
            "steps": problem.steps,
            "batch": problem.batch,
            "rates": self.rates,
            "seeds": self.seeds,
            "setting": {"law": method.law, "schedule": method.schedule, "warmup": method.warmup}
            | method.options,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if a twin does not land where the other does."""
    options = parse(argv)
    if options.fetch:
        print("\n".join(quality_data.fetch()) or "everything is there")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "quality.jsonl"
    if not options.report:
        run(sweeps(options.quick, options.seeds), options, path)
        run(follow_ups(read(path), options.quick), options, path)
    from benchmarks import quality_figure, quality_report

    found = read(path)
    quality_figure.draw(found, options.out)
    for page in options.markdown:
        quality_report.write(found, page)
    print(quality_report.text(found))
    return int(any(not row["close"] for row in found if row["part"] == "twin"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments, or exits with what is wrong with them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--fetch", action="store_true", help="bring the data that is not there, and do nothing else")
    add("--quick", action="store_true", help="a minute's form: digits and a quadratic, few rates and steps")
    add("--seeds", type=int, default=SEEDS, metavar="N", help=f"default: {SEEDS}")
    add("--only", nargs="+", default=[], metavar="NAME", help="these problems, methods or parts alone")
    add("--jobs", type=int, default=2, metavar="N", help="rows at a time, each on one core; default: 2")
    add("--report", action="store_true", help="run nothing: figures and tables from OUT/quality.jsonl")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    add(
        "--markdown", type=Path, nargs="+", default=[], metavar="FILE",
        help="write the tables between the markers <!-- quality-... --> that a file has",
    )  # fmt: skip
    options = parser.parse_args(argv)
    for name, least in (("seeds", 2), ("jobs", 1)):
        if getattr(options, name) < least:
            parser.error(
                f"--{name} must be a whole number >= {least}, got {getattr(options, name)}: pass more"
            )
    known = {*PROBLEMS, *METHODS, "sweep", "sensitivity", "batch", "curve", "twin"}
    if unknown := [name for name in options.only if name not in known]:
        parser.error(f"--only must be of {', '.join(sorted(known))}, got {', '.join(unknown)}: leave it out")
    return options


def sweeps(quick: bool, seeds: int) -> list[Job]:
    """Returns the sweeps of a run."""
    if quick:
        small = PROBLEMS["digits"]._replace(steps=200, rates=(0.002, 0.008, 0.032))
        noisy = PROBLEMS["quadratic"]._replace(steps=300, rates=(0.003, 0.03, 0.3))
        names = ("sf-adamw", "sf-radam", "adamw-cosine", "adamw-constant")
        return [Job("sweep", problem, METHODS[name], seeds) for problem in (small, noisy) for name in names]
    jobs = [Job("sweep", PROBLEMS[name], METHODS[one], seeds) for name, of in ROWS.items() for one in of]
    jobs += batches(seeds) + sensitivities(seeds)
    # The question's own two first, what takes longest last: a run that is cut short has most of the answers.
    main = ("sf-adamw", "adamw-cosine")
    return sorted(jobs, key=lambda job: (job.method.name not in main, job.problem.name == "kjv"))


def sensitivities(seeds: int) -> list[Job]:
    """Returns Schedule-Free AdamW with one hyperparameter at a time off its default, on short runs."""
    problem, usual = PROBLEMS["fashion-quarter"], METHODS["sf-adamw"]
    jobs = [Job("sensitivity", problem, usual, seeds)]
    for option, values in SENSITIVITY.items():
        for value in values:
            made = (
                usual._replace(warmup=value)
                if option == "warmup"
                else usual._replace(options={option: value})
            )
            jobs.append(Job("sensitivity", problem, made._replace(name=f"{option}={value:g}"), seeds))
    return jobs


def batches(seeds: int) -> list[Job]:
    """Returns digits at several batches, as many steps of each."""
    return [
        Job(
            "batch",
            PROBLEMS["digits"]._replace(name=f"digits-{batch}", batch=batch, steps=300),
            METHODS[name],
            seeds,
        )
        for batch in BATCHES
        for name in ("sf-adamw", "adamw-cosine", "adamw-constant")
    ]


def follow_ups(found: Sequence[Row], quick: bool) -> list[Job]:
    """Returns the curves and the torch runs, at the rates that the sweeps have chosen."""
    made = {(row["problem"], row["method"]): row for row in found if row["part"] == "sweep"}
    wanted = [("twin", problem, method) for problem, method in made if problem in TWINS]
    wanted += [("curve", *pair) for pair in CURVES if pair in made and not quick]
    jobs = []
    for part, problem, method in wanted:
        row = made[problem, method]
        if part == "twin" and not METHODS[method].has_twin:
            continue
        exact = PROBLEMS[problem]._replace(steps=row["steps"])
        jobs.append(Job(part, exact, METHODS[method], row["seeds"], row["chosen"]["rate"]))
    return jobs


def run(jobs: Sequence[Job], options: argparse.Namespace, path: Path) -> None:
    """Measures the rows that are not there yet, and writes each as soon as it is."""
    found = {(row["part"], row["problem"], row["method"]): row for row in read(path)}
    todo = []
    for job in jobs:
        asked, have = job.asked(), found.get(job.key, {})
        if options.only and not {job.part, job.problem.name, job.method.name} & set(options.only):
            continue
        if {name: have.get(name) for name in asked} != asked:
            todo.append(job)
    todo, lacking = _at_hand(todo)
    for problem in lacking:
        print(f"left out: {problem}; python -m benchmarks quality --fetch brings its data")
    if not todo:
        return
    # A process a row, each on a core of its own: small products gain nothing from threads.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        pending = [pool.submit(measure, job, found.get(("sweep", *job.key[1:]))) for job in todo]
        try:
            for done in tqdm(as_completed(pending), total=len(pending), unit="row"):
                write(path, done.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _at_hand(jobs: Sequence[Job]) -> tuple[list[Job], list[str]]:
    """Returns the jobs whose data is there, and the problems of the others."""
    needs = {"fashion": ("fashion-train-images",), "kjv": ("kjv.txt",)}

    def there(name: str) -> bool:
        files = needs.get(name.split("-")[0], (name,) if name in quality_data.SOURCES else ())
        return all(quality_data.have(one) for one in files)

    lacking = list(dict.fromkeys(job.problem.name for job in jobs if not there(job.problem.name)))
    return [job for job in jobs if job.problem.name not in lacking], lacking


def read(path: Path) -> list[Row]:
    """Returns the rows of a file, none if it is not there."""
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def write(path: Path, row: Row) -> None:
    """Puts a row in the place of the one with its name, or at the end; the file is whole at any moment."""
    rows = {(one["part"], one["problem"], one["method"]): one for one in read(path)}
    rows[row["part"], row["problem"], row["method"]] = row
    text = "".join(json.dumps(one, allow_nan=False) + "\n" for one in rows.values())
    scratch = path.with_suffix(".part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def measure(job: Job, swept: Row | None = None) -> Row:
    """Returns the row of a job; `swept` is the sweep that chose its rate."""
    from benchmarks import quality_rows

    begun, used = time.monotonic(), time.process_time()
    row = job.asked() | quality_rows.MEASURES[job.part](job, swept)
    row["seconds"] = {
        "elapsed": round(time.monotonic() - begun, 1),
        "processor": round(time.process_time() - used, 1),
    }
    return row | {"machine": machine(), "versions": _records.versions()}


def machine() -> Row:
    """Returns the processor and its cores."""
    name = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        named = [
            line.partition(":")[2].strip() for line in facts.read_text().splitlines() if "model name" in line
        ]
        name = named[0] if named else name
    return {"processor": name, "cores": os.cpu_count()}
