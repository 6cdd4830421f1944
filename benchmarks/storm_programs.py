"""Random training programs, cut at random moments and lines, which must end in the bits of the uncut run.

Cuts: "kill" is SIGKILL at any moment; "moment" is KeyboardInterrupt at any moment, which ends the process;
"line" the same at any line of ours; "again" likewise, but the same process restores and goes on.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

# Members of the family that came after the first laws.
MEMBERS = ("muon", "normuon", "plus", "gpa", "anneal", "amuse")
OPTIONS: dict[str, Sequence[Any]] = {
    "optimizer": ("sgd", "adamw", "radam", "wrapper", *MEMBERS),
    "precision": ("float32", "float32", "bfloat16", "lean", "8bit"),
    "accumulate": (1, 1, 2, 4),
    "background": (True, False),
    "saves": (0.1, 0.3, 0.8),
    "evaluates": (0.0, 0.2),
    "scheduler": (False, True),
    "keep_newest": (1, 2),
}
ROUNDED = ("lean", "8bit")
CUTS = ("kill", "moment", "line", "again")
MOST_CUTS = 6  # of one program
ROOT = str(Path(__file__).resolve().parent.parent)
OURS = tuple(os.path.join(ROOT, name) for name in ("sfcore", "sftorch", "sfjax", "benchmarks"))
ENDED, CUT, FAILED = 0, 130, 1


@dataclass(frozen=True)
class Program:
    """One training program.

    Attributes:
        optimizer, precision, accumulate, background, keep_newest: as a user chooses them; "lean" and "8bit"
            are bfloat16 with that precision.
        scheduler: whether a scheduler drives lr; in JAX a schedule does.
        updates: their number.
        saves, evaluates: micro-batches, counted from the start, before which it saves or is in eval mode.
        waits: of the saves those that are waited for.
    """

    optimizer: str
    precision: str
    accumulate: int
    background: bool
    keep_newest: int
    scheduler: bool
    updates: int
    saves: frozenset[int]
    evaluates: frozenset[int]
    waits: frozenset[int]

    @property
    def micro_batches(self) -> int:
        """In all."""
        return self.updates * self.accumulate


def program(draw: random.Random) -> tuple[Program, dict[str, str]]:
    """Returns a program, and the options that were drawn as text."""
    drawn = {name: draw.choice(values) for name, values in OPTIONS.items()}
    if drawn["precision"] in ROUNDED:
        drawn["optimizer"] = "adamw"
    updates = draw.randrange(4, 12)
    micro_batches = range(updates * drawn["accumulate"])

    def some(share: float) -> frozenset[int]:
        return frozenset(one for one in micro_batches if draw.random() < share)

    own = {name: drawn[name] for name in drawn if name not in ("saves", "evaluates")}
    saves = some(drawn["saves"]) or frozenset([draw.choice(micro_batches)])
    made = Program(**own, updates=updates, saves=saves, evaluates=some(drawn["evaluates"]), waits=some(0.5))
    return made, {name: f"{name}={value}" for name, value in drawn.items()}


class Lines:
    """Counts the lines of ours that the main thread comes to, and raises KeyboardInterrupt at one of them."""

    def __init__(self, at: int | None):
        self.count, self._at = 0, at

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Is the trace function of a call."""
        return self._line if frame.f_code.co_filename.startswith(OURS) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self._at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


@contextmanager
def cutting(kind: str, moment: float, line: int) -> Iterator[Lines]:
    """Lets a KeyboardInterrupt come in the block, after some seconds or at a line; a kill is another's."""
    lines = Lines(line if kind in ("line", "again") else None)
    if kind == "moment":
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, max(moment, 1e-4))
    if kind in ("line", "again", "count"):
        sys.settrace(lines)
    try:
        yield lines
    finally:
        sys.settrace(None)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def until_done(start: Callable[[], str], again: bool) -> str:
    """Returns what comes of a run; an interrupted one is started again in the same process if `again`."""
    while True:
        try:
            return start()
        except KeyboardInterrupt:
            if not again:
                raise


def attempt(
    run: Callable[[Program, Path, bool], str], one: Program, folder: Path, kind: str, moment: float, line: int
) -> tuple[int, str]:
    """Runs a program in a process of its own until it ends or is cut; returns how, and what it printed.

    That is its digest, and the seconds and lines that it took; of a failed one its error.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os._exit(_run(run, one, folder, kind, moment, line, writing))
    os.close(writing)
    if kind == "kill":
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, encoding="utf-8") as told:
        said = told.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (CUT if code == -signal.SIGKILL and not said else FAILED if code < 0 else code), said


def _run(
    run: Callable[[Program, Path, bool], str],
    one: Program,
    folder: Path,
    kind: str,
    moment: float,
    line: int,
    writing: int,
) -> int:
    said, code, begin = "", FAILED, time.monotonic()
    try:
        with cutting(kind, moment, line) as lines:
            said = run(one, folder, kind == "again")
        said += f" {time.monotonic() - begin} {lines.count}"
        code = ENDED
    except KeyboardInterrupt:
        code = CUT
    except BaseException:
        said = traceback.format_exc()[-3000:]
    os.write(writing, said.encode())
    return code


def storm(
    framework: str, run: Callable[[Program, Path, bool], str], numbers: range, seed: int, folder: Path
) -> dict[str, object]:
    """Returns how many programs were cut how often and in what way, and what was wrong with any."""
    options: Counter[str] = Counter()
    cuts: Counter[str] = Counter()
    problems: list[str] = []
    for number in tqdm(numbers, desc=f"{framework} programs"):
        draw = random.Random(f"{framework} {seed} {number}")
        one, drawn = program(draw)
        options.update(drawn.values())
        calm, warm, stormy = (folder / f"{number}-{name}" for name in ("calm", "warm", "storm"))
        # Twice: the first compiles, and counts lines; the second takes as long as those that are cut.
        ended, first = attempt(run, one, calm, "count", 0, 0)
        again, second = attempt(run, one, warm, "none", 0, 0)
        if ended != ENDED or again != ENDED:
            wrong = [f"the uncut run failed: {first if ended != ENDED else second}"]
        elif first.split()[0] != second.split()[0]:
            wrong = ["the uncut run has other bits the second time"]
        else:
            digest, seconds, lines = first.split()[0], float(second.split()[1]), int(first.split()[2])
            wrong = _cut(run, one, draw, stormy, digest, seconds, lines, cuts)
        problems += [f"{framework} --seed {seed} --first {number}: {one}: {what}" for what in wrong]
        for place in (calm, warm, stormy):
            shutil.rmtree(place, ignore_errors=True)
    return {
        "programs": len(numbers),
        "cuts": dict(sorted(cuts.items())),
        "options": dict(sorted(options.items())),
        "problems": problems[:20],
    }


def kills(
    run: Callable[[Program, Path, bool], str],
    optimizer: str,
    count: int,
    updates: int,
    seed: int,
    folder: Path,
    life: float,
) -> dict[str, object]:
    """Returns what came of SIGKILLs at random moments of one long program that saves every third update.

    Args:
        run: of a framework.
        optimizer: of the program.
        count: kills, unless the program comes to its end before.
        updates: of the program.
        seed: of the moments.
        folder: for its checkpoints.
        life: seconds that an attempt lives at most.

    Raises:
        RuntimeError: if an attempt fails by itself: something unreadable was left behind.
    """
    saves = frozenset(range(0, updates, 3))
    one = Program(optimizer, "float32", 1, True, 2, False, updates, saves, frozenset(), frozenset())
    draw, killed, stormy = random.Random(f"{optimizer} {seed}"), 0, folder / "storm"

    def taken(place: Path, kind: str, moment: float) -> tuple[int, str]:
        code, said = attempt(run, one, place, kind, moment, 0)
        if code == FAILED:
            raise RuntimeError(f"{one.optimizer}: a run must end well, got: {said}")
        return code, said.split()[0] if said else ""

    _, calm = taken(folder / "calm", "none", 0)
    with tqdm(total=count, desc=f"{optimizer} kills") as bar:
        while killed < count and taken(stormy, "kill", draw.uniform(0, life))[0] == CUT:
            killed += 1
            bar.update()
    _, ended = taken(stormy, "none", 0)
    left = [
        path.name for path in stormy.iterdir() if path.name.startswith(".partial") or path.name == ".replaced"
    ]
    return {"kills": killed, "same bits": ended == calm, "leftovers": left}


def _cut(
    run: Callable[[Program, Path, bool], str],
    one: Program,
    draw: random.Random,
    folder: Path,
    digest: str,
    seconds: float,
    lines: int,
    cuts: Counter[str],
) -> list[str]:
    """Cuts a program again and again, lets it end, and returns what is wrong."""
    done = []
    for _ in range(draw.randrange(1, MOST_CUTS + 1)):
        kind, share = draw.choice(CUTS), draw.random()
        done.append(f"{kind} at {share:.3f}")
        code, said = attempt(run, one, folder, kind, share * seconds, 1 + int(share * lines))
        cuts[kind if code == CUT or kind == "again" else "ended before"] += 1
        if code == FAILED:
            return [f"after {', '.join(done)}: {said}"]
        if code == ENDED and said.split()[0] != digest:
            return [f"after {', '.join(done)}: other bits"]
        if code == ENDED:
            break
    code, said = attempt(run, one, folder, "none", 0, 0)
    if code != ENDED:
        return [f"after {', '.join(done)}, uncut: {said}"]
    left = [
        path.name for path in folder.iterdir() if path.name.startswith(".partial") or path.name == ".replaced"
    ]
    wrong = [f"after {', '.join(done)}: other bits"] if said.split()[0] != digest else []
    return wrong + [f"after {', '.join(done)}: left {left}"] * bool(left)
