"""Cuts training runs at random, saves in flight, until they have had enough; then lets them end and compares
them with the run that was never cut.

- kills: one long run, the example's, under SIGKILL at random moments; with --ranks of several processes, with
  --optimizer a program of that one.
- programs: random short programs under SIGKILL and under KeyboardInterrupt at random moments and lines.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks import _records, storm_programs, storm_ranks
from sfcore.lock import LOCK

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Seconds that an attempt lives at most. jax compiles for most of it.
LIFE = {"torch": 0.8, "jax": 8.0}


def attempt(framework: str, steps: int, out: Path, save_every: int | None, life: float | None) -> int | None:
    """Runs the example in a process of its own; returns its exit code, or None if it was killed."""
    options = ["--resume", "auto", "--save-every", str(save_every)] if save_every else []
    child = os.fork()
    if child == 0:
        os._exit(_train(framework, steps, out, options))
    if life is not None:
        end = time.monotonic() + life
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == -signal.SIGKILL else code


def _train(framework: str, steps: int, out: Path, options: list[str]) -> int:
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        import train

        train.main(
            [
                "--framework",
                framework,
                "--steps",
                str(steps),
                "--every",
                str(steps),
                "--out",
                str(out),
                *options,
            ]
        )
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def storm(
    framework: str, kills: int, steps: int, seed: int, folder: Path, life: float | None = None
) -> dict[str, object]:
    """Returns what came of a storm of kills on one framework; `life` is that of LIFE by default.

    Raises:
        RuntimeError: if an attempt failed by itself: something unreadable was left behind.
    """
    draw = random.Random(seed)
    calm, stormy = folder / f"{framework}-calm", folder / f"{framework}-storm"
    _require(attempt(framework, steps, calm, None, None), calm)
    killed = 0
    with tqdm(total=kills, desc=f"{framework} kills") as bar:
        while killed < kills:
            code = attempt(framework, steps, stormy, 3, draw.uniform(0, life or LIFE[framework]))
            if code is None:
                killed += 1
                bar.update()
            else:
                _require(code, stormy)
                break  # it came to its end: more steps are needed for so many kills
    # Its saves are no longer cut, so that one is enough.
    _require(attempt(framework, steps, stormy, steps, None), stormy)
    checkpoints = stormy / "checkpoints" / framework
    return {
        "kills": killed,
        "same bits": _digest(calm, framework) == _digest(stormy, framework),
        "leftovers": [path.name for path in checkpoints.iterdir() if not _is_checkpoint(path.name)],
    }


def _is_checkpoint(name: str) -> bool:
    """Tells a checkpoint, and what stays of the lock, from what a save has left behind."""
    return name.isdigit() or name.startswith("step_") or name in ("inference", LOCK)


def _require(code: int | None, out: Path) -> None:
    if code != 0:
        raise RuntimeError(f"a run must end well, got the exit code {code}: see {out.with_suffix('.log')}")


def _digest(out: Path, framework: str) -> object:
    return json.loads((out / "result.json").read_text())["frameworks"][framework]["sha256"]


def main(argv: Sequence[str]) -> int:
    """Prints one JSON line a framework and kind; the exit code is 0 if every run ended in the same bits."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks storm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kind", choices=("kills", "programs"), default="kills", help="default: kills")
    parser.add_argument("--framework", choices=tuple(LIFE), action="append", help="default: both")
    parser.add_argument("--kills", type=int, default=100, help="of each framework; default: 100")
    parser.add_argument("--steps", type=int, default=2000, help="of the run; default: 2000")
    parser.add_argument("--programs", type=int, default=200, help="of each framework; default: 200")
    parser.add_argument("--first", type=int, default=0, help="number of the first program; default: 0")
    parser.add_argument("--seed", type=int, default=0, help="of programs and moments; default: 0")
    parser.add_argument(
        "--ranks", type=int, default=1, help="processes of the run that is killed; default: 1"
    )
    parser.add_argument(
        "--optimizer", choices=storm_programs.MEMBERS, help="of a run that is killed; default: the example's"
    )
    parser.add_argument("--life", type=float, help=f"seconds an attempt lives at most; default: {LIFE}")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="also write DIR/storm.jsonl; default: print only"
    )
    arguments = parser.parse_args(argv)
    tqdm.set_lock(threading.RLock())  # its own is shared with the forks, and one that is killed may hold it
    kills = _kills if arguments.ranks == 1 else _kills_of_ranks
    kills = _kills_of_a_member if arguments.optimizer else kills
    storms = {"kills": kills, "programs": _programs}[arguments.kind]
    rows = [storms(framework, arguments) for framework in arguments.framework or tuple(LIFE)]
    return 0 if all(rows) else 1


def _kills(framework: str, arguments: argparse.Namespace) -> bool:
    sys.path.insert(0, str(EXAMPLES))
    __import__(f"train_{framework}")  # once, here: an attempt is a fork, and starts at once
    with tempfile.TemporaryDirectory() as folder:
        found = storm(
            framework, arguments.kills, arguments.steps, arguments.seed, Path(folder), arguments.life
        )
    settings = {"steps": arguments.steps, "seed": arguments.seed, "life": arguments.life or LIFE[framework]}
    _report(framework, settings | found, arguments.out)
    enough = found["kills"] == arguments.kills
    return found["same bits"] is True and not found["leftovers"] and enough


def _kills_of_ranks(framework: str, arguments: argparse.Namespace) -> bool:
    # Once, here: an attempt is a fork, and starts at once.
    __import__({"torch": "sftorch.checkpoint", "jax": "sfjax.checkpoint"}[framework])
    if framework == "torch":
        __import__("torch.distributed.fsdp")
    life = arguments.life or storm_ranks.LIFE[framework]
    with tempfile.TemporaryDirectory() as folder:
        found = storm_ranks.storm(
            framework, arguments.ranks, arguments.kills, arguments.steps, arguments.seed, Path(folder), life
        )
    settings = {"ranks": arguments.ranks, "steps": arguments.steps, "seed": arguments.seed, "life": life}
    _report(f"{arguments.ranks} ranks {framework}", settings | found, arguments.out)
    enough = found["kills"] == arguments.kills
    return found["same bits"] is True and not found["leftovers"] and enough


def _kills_of_a_member(framework: str, arguments: argparse.Namespace) -> bool:
    run = importlib.import_module(f"benchmarks.storm_{framework}").run
    optimizer, life = arguments.optimizer, arguments.life or LIFE[framework]
    settings = {"steps": arguments.steps, "seed": arguments.seed, "life": life}
    with tempfile.TemporaryDirectory() as folder:
        found = storm_programs.kills(
            run, optimizer, arguments.kills, arguments.steps, arguments.seed, Path(folder), life
        )
    _report(f"{optimizer} {framework}", settings | found, arguments.out)
    return found["same bits"] is True and not found["leftovers"] and found["kills"] == arguments.kills


def _programs(framework: str, arguments: argparse.Namespace) -> bool:
    run = importlib.import_module(f"benchmarks.storm_{framework}").run
    numbers = range(arguments.first, arguments.first + arguments.programs)
    with tempfile.TemporaryDirectory() as folder:
        found = storm_programs.storm(framework, run, numbers, arguments.seed, Path(folder))
    _report(f"programs {framework}", {"seed": arguments.seed} | found, arguments.out)
    return not found["problems"]


def _report(part: str, found: dict[str, object], out: Path | None) -> None:
    print(json.dumps({"part": part} | found))
    if out:
        row = {"part": part} | found | {"device": "cpu", "versions": _records.versions()}
        _records.replace_part(out / "storm.jsonl", part, [row])
