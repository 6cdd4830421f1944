"""Starts jobs on a folder that another one writes into: who may save, and is what was promised still there?

- overlap: a job starts at any moment of the life of another, which may be killed, and waits for it to end.
- pair: two equal jobs start at once; one is refused by name.
- dead: a job starts the moment its predecessor has been killed, and must not be kept waiting.

In each, the newest checkpoint that a job was promised verifies before its next save, and when all is over.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import _records, powercut_run
from sfcore import sources
from sfcore.exchange import CheckpointError
from sfcore.lock import is_written_to

TRIALS = {"overlap": 1000, "pair": 200, "dead": 100}
LONG = 60.0  # seconds after which a job that waits has been forgotten


class Job:
    """A process that saves step after step until it is told to end; a fork, so that it starts at once."""

    def __init__(self, framework: str, folder: Path, wait: float):
        told, tell = os.pipe()
        reading, writing = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(tell)
            os.close(reading)
            code = 1
            try:
                _save_until_told(framework, folder, wait, told, os.fdopen(writing, "w", encoding="utf-8"))
                code = 0
            finally:
                os._exit(code)
        os.close(told)
        os.close(writing)
        self._tell = tell
        self._said = os.fdopen(reading, encoding="utf-8")
        self.lines: list[dict[str, Any]] = []

    def hear(self) -> dict[str, Any]:
        """Returns what it says next; {} when it has ended."""
        line = self._said.readline()
        try:
            self.lines.append(json.loads(line))
        except ValueError:  # it was killed in the middle
            return {}
        return self.lines[-1]

    def kill(self) -> None:
        """Ends it without a word."""
        os.kill(self.process, signal.SIGKILL)

    def end(self) -> None:
        """Tells it to end, hears all, and waits."""
        with suppress(BrokenPipeError):
            os.write(self._tell, b".")  # closing is not enough: later jobs have inherited it
        os.close(self._tell)
        while self.hear():
            pass
        self._said.close()
        os.waitpid(self.process, 0)

    @property
    def promised(self) -> int:
        """The newest step that a save has acknowledged, 0 if there is none."""
        return max([line["saved"] for line in self.lines if "saved" in line], default=0)

    @property
    def outcome(self) -> str:
        """How it ended."""
        last = self.lines[-1] if self.lines else {}
        return last.get("ended", "killed")


def _save_until_told(framework: str, folder: Path, wait: float, told: int, out: Any) -> None:
    def say(**what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    stop = threading.Event()

    def listen() -> None:
        os.read(told, 1)
        stop.set()

    threading.Thread(target=listen, daemon=True).start()
    make, save = powercut_run.FRAMEWORKS[framework]()
    try:
        is_written_to(folder, wait)  # as a restore does: it waits as long as a save would
        step = _newest(folder)
        with make(folder, wait_for_writer=wait) as checkpoints:
            while True:
                step += 1
                save(checkpoints, step, {"loss": float(step)})
                last = checkpoints.wait()
                say(saved=step)
                if stop.wait(0.002):
                    break
                sources.load(last)  # verifies every leaf
        say(ended="well")
    except CheckpointError as error:
        say(ended="refused" if "must have one writer" in str(error) else f"failed: {error}")
    except BaseException:
        say(ended=f"failed: {traceback.format_exc()[-600:]}")


def _newest(folder: Path) -> int:
    """Returns the step of the newest checkpoint that verifies, 0 if there is none."""
    try:
        meta = sources.load(folder).meta
    except CheckpointError:
        return 0
    return 0 if meta is None else meta.step


def overlap(framework: str, folder: Path, draw: random.Random) -> tuple[str, list[str]]:
    """Starts a job beside one that lives, and lets that one end or be killed."""
    first = Job(framework, folder, 0.0)
    first.hear()
    time.sleep(draw.uniform(0, 0.05))
    second = Job(framework, folder, LONG)
    time.sleep(draw.uniform(0, 0.3))
    if draw.random() < 0.5:
        first.kill()
    first.end()
    second.hear()
    second.end()
    wrong = [f"the second job ended: {second.outcome}"] if second.outcome != "well" else []
    if first.outcome not in ("well", "killed"):
        wrong.append(f"the first job ended: {first.outcome}")
    return "waited", wrong + _lost(folder, max(first.promised, second.promised))


def pair(framework: str, folder: Path, draw: random.Random) -> tuple[str, list[str]]:
    """Starts two jobs at once, and ends them when each has saved or been refused."""
    jobs = [Job(framework, folder, 0.0), Job(framework, folder, 0.0)]
    for job in jobs:
        job.hear()
    time.sleep(draw.uniform(0, 0.05))
    for job in jobs:
        job.end()
    outcomes = sorted(job.outcome for job in jobs)
    wrong = [] if outcomes == ["refused", "well"] else [f"the jobs ended: {outcomes}"]
    return "refused", wrong + _lost(folder, max(job.promised for job in jobs))


def dead(framework: str, folder: Path, draw: random.Random) -> tuple[str, list[str]]:
    """Kills a job that has the folder, and starts the next, which may not wait."""
    first = Job(framework, folder, 0.0)
    first.hear()
    time.sleep(draw.uniform(0, 0.02))
    first.kill()
    first.end()
    second = Job(framework, folder, 0.0)
    second.hear()
    second.end()
    wrong = [f"the second job ended: {second.outcome}"] if second.outcome != "well" else []
    return "took over", wrong + _lost(folder, max(first.promised, second.promised))


def _lost(folder: Path, promised: int) -> list[str]:
    reading, writing = os.pipe()
    child = os.fork()  # what reads for JAX starts threads, after which nothing can be forked
    if child == 0:
        os.write(writing, str(_newest(folder)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        newest = int(told.read() or -1)
    os.waitpid(child, 0)
    return (
        [f"step {promised} was promised, and {newest} is the newest that is whole"]
        if newest < promised
        else []
    )


KINDS: dict[str, Callable[[str, Path, random.Random], tuple[str, list[str]]]] = {
    "overlap": overlap,
    "pair": pair,
    "dead": dead,
}


def run(framework: str, kind: str, trials: int, seed: int) -> dict[str, object]:
    """Returns how often what happened, and the first problems."""
    counts: Counter[str] = Counter()
    problems: list[str] = []
    tqdm.set_lock(threading.RLock())  # its own is shared with the forks, and one that is killed may hold it
    with tempfile.TemporaryDirectory() as place:
        for trial in tqdm(range(trials), desc=f"{framework} {kind}"):
            folder = Path(place, str(trial))
            what, wrong = KINDS[kind](framework, folder, random.Random(f"{kind} {seed} {trial}"))
            shutil.rmtree(folder, ignore_errors=True)
            counts["problem" if wrong else what] += 1
            problems += [f"{kind} {seed} {trial}: {one}" for one in wrong]
    return {"trials": trials, **counts, "problems": problems[:20]}


def main(argv: Sequence[str]) -> int:
    """Prints one JSON line a framework and kind; the exit code is 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks overlap", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--framework", choices=("torch", "jax"), action="append", help="default: both")
    parser.add_argument("--kind", choices=tuple(KINDS), action="append", help="default: all")
    parser.add_argument("--trials", type=int, help=f"of each kind; default: {TRIALS}")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/overlap.jsonl")
    arguments = parser.parse_args(argv)
    good = True
    for framework in arguments.framework or ("torch", "jax"):
        powercut_run.load(framework)  # here, once: the jobs are forks
        for kind in arguments.kind or KINDS:
            found = run(framework, kind, arguments.trials or TRIALS[kind], arguments.seed)
            print(json.dumps({"framework": framework, "kind": kind, **found}))
            if arguments.out:
                part = f"{framework} {kind}"
                row = {"part": part, "seed": arguments.seed, **found}
                row |= {"device": "cpu", "versions": _records.versions()}
                _records.replace_part(arguments.out / "overlap.jsonl", part, [row])
            good = good and not found["problems"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
