"""Gives damaged, random and hostile input to whatever reads, and holds it to its promise.

Each case ends in a refusal that is ours, or in the numbers that were written: never in another traceback, a
wait of more than two seconds, more than a gigabyte of memory, or changed numbers. Every case is made of the
seed and its number alone, so that one can be tried again: --first N --count 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import _records
from sfcore import exchange, inspection, store
from sfcore.checks import HyperparameterError
from sfcore.exchange import CheckpointError
from sfcore.meta import Meta
from sfcore.sources import READERS

SECONDS, BYTES = 2.0, 1 << 30
OURS = (CheckpointError, HyperparameterError)
DEAF = (
    40  # CPU seconds of a case after which a process is killed that hears no signal, because it is deep in C
)
# Reads, and says whether that is what was written: None where there is nothing to compare with.
Reading = Callable[[], bool | None]
Case = Callable[[random.Random, Path], Reading]


class Hang(BaseException):
    """A case took too long; no reader catches it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Ends a case that works longer, or waits ten times as long: the machine may have other work."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, seconds),
        signal.SIGALRM: (signal.ITIMER_REAL, 10 * seconds),
    }
    before = {number: signal.signal(number, ring) for number in timers}
    for timer, after in timers.values():
        signal.setitimer(timer, after, 0.1)  # again, where a callback has swallowed it
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def attempt(case: Case, draw: random.Random, folder: Path) -> str:
    """Returns "right", "refused", "read", or what is wrong."""
    read = case(draw, folder)
    try:
        with at_most(SECONDS):
            same = read()
    except OURS:
        return "refused"
    except Hang:
        return f"more than {SECONDS} s"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:200]}"
    return {True: "right", None: "read", False: "changed numbers"}[same]


def _array(draw: random.Random) -> np.ndarray:
    shape = [draw.randrange(4) for _ in range(draw.randrange(3))]
    dtype = draw.choice([np.float32, np.float64, np.int64, np.uint8])
    return np.frombuffer(draw.randbytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)


def _leaves(draw: random.Random, roles: Sequence[str]) -> dict[str, np.ndarray]:
    names = [draw.choice(["w", "b", "layer.0.weight", "ä", "a/b"]) + str(i) for i in range(3)]
    return {f"{role}{name}": _array(draw) for role in roles for name in names}


def damage(draw: random.Random, whole: bytes) -> bytes:
    """Returns a file's bytes after something that happens to files, or that somebody does to them."""
    held = bytearray(whole)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        place = draw.randrange(len(held) + 1)
        how = draw.randrange(8)
        if how == 0 and held:
            held[place % len(held)] ^= 1 << draw.randrange(8)
        elif how == 1:
            del held[place:]
        elif how == 2:
            span = draw.randrange(1, 64)
            held[place : place + span] = bytes(min(span, len(held) - place))
        elif how == 3:
            held[place:place] = draw.randbytes(draw.randrange(1, 32))
        elif how == 4:
            del held[place : place + draw.randrange(1, 32)]
        elif how == 5:  # a number in a header or a record becomes another
            digits = [i for i, byte in enumerate(held) if 48 <= byte < 58]
            if digits:
                at = draw.choice(digits)
                held[at : at + 1] = draw.choice(
                    [b"0", b"9", b"-1", b"1e9", b"99999999999999999999", b'"x"', b"[]"]
                )
        elif how == 6 and len(held) >= 8:
            held[:8] = struct.pack("<Q", draw.choice([0, 1, 2**31, 2**63, draw.randrange(1 << 20)]))
        else:
            held[place : place + 16] = held[: min(16, len(held) - place)]
    return bytes(held)


def rummage(draw: random.Random, folder: Path) -> None:
    """Damages files of a folder of checkpoints: their bytes, or what they are."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        path, how = draw.choice(files), draw.randrange(10)
        if path.is_symlink() or not path.is_file():
            continue
        if how < 6:
            path.write_bytes(damage(draw, path.read_bytes()))
            continue
        other = draw.choice(files)
        if how == 6 and other.is_file() and not other.is_symlink():
            path.write_bytes(other.read_bytes())
            continue
        path.unlink()
        if how == 7:
            path.mkdir()
        elif how == 8:
            path.symlink_to(draw.choice([path.name, "/dev/zero", "/proc/self/mem"]))
        elif how == 9 and draw.random() < 0.5:
            os.mkfifo(path)


def a_checkpoint(draw: random.Random, folder: Path) -> Reading:
    """Damages one file of a checkpoint."""
    state = _leaves(draw, ["y/", "z/", "v/"])
    weights = _leaves(draw, [""])
    meta = Meta(framework=draw.choice(["torch", "jax"]), optimizer="adamw", step=draw.randrange(1000))
    path = store.write(folder / "run", meta, state, weights)
    file = path / draw.choice([store.STATE, store.INFERENCE, store.META])
    file.write_bytes(damage(draw, file.read_bytes()))

    def read() -> bool:
        inspection.inspect(path)
        written = {store.STATE: state, store.INFERENCE: weights}
        return all(same(store.read(path, name)[1], arrays) for name, arrays in written.items())

    return read


def inspecting(path: Path) -> Reading:
    """Returns a reading of something of which nothing says what the numbers were."""

    def read() -> None:
        inspection.inspect(path)

    return read


def weights_alone(draw: random.Random, folder: Path) -> Reading:
    """Damages weights without a record beside them; in the header of ours there is one."""
    path, weights = folder / "model.safetensors", _leaves(draw, [""])
    is_ours = draw.random() < 0.5
    about = {"format": "pt", "weights_hold": "x", "step": "7"} if is_ours else None
    exchange.write_tensors(path, weights, about, sealed=is_ours)
    path.write_bytes(damage(draw, path.read_bytes()))

    def read() -> bool | None:
        inspection.inspect(path)
        found, trained, _ = store.weights(path)
        if exchange.read_header(path)[1] is None:  # nothing says what the numbers were
            return None
        return trained == 7 and same(found, weights)

    return read


def random_files(draw: random.Random, folder: Path) -> Reading:
    """Writes nonsense that begins like something known, under a name that promises it."""
    start = draw.choice(
        [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", struct.pack("<Q", 40) + b"{", b"{", b"\0" * 16]
    )
    name = draw.choice(
        ["model.safetensors", "optimizer.pt", "meta.json", "x", "_METADATA", "state.safetensors"]
    )
    (folder / name).write_bytes(start + draw.randbytes(draw.randrange(200)))
    return inspecting(folder / name if draw.random() < 0.8 else folder)


def hostile(draw: random.Random, folder: Path) -> Reading:  # noqa: C901 - a list of attacks
    """Writes a file that asks for more than it is: memory, time, depth, other files."""
    path = folder / "model.safetensors"

    def header(text: bytes, data: bytes = b"") -> None:
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    def field(**options: Any) -> dict[str, Any]:
        return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | options

    size = 1 << draw.randrange(30, 62)
    how = draw.randrange(12)
    if how == 0:
        header(json.dumps({"w": field(shape=[size], data_offsets=[0, 4 * size])}).encode(), b"1234")
    elif how == 1:
        header(b"[" * draw.choice([1000, 100_000, 2_000_000]))
    elif how == 2:
        header(b'{"a":' * draw.choice([1000, 100_000]) + b"1")
    elif how == 3:
        count = draw.choice([100_000, 600_000])
        empty = json.dumps(field(shape=[0], data_offsets=[0, 0]))
        header(("{" + ",".join(f'"{i}":{empty}' for i in range(count)) + "}").encode())
    elif how == 4:
        header(json.dumps({"w": field(shape=[1] * draw.choice([65, 10_000]))}).encode(), b"1234")
    elif how == 5:
        header(json.dumps({"w": field(shape=[0, size], data_offsets=[0, 0])}).encode())
    elif how == 6:
        header(b'{"w":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,4]}}', b"1234")
    elif how == 7:
        os.mkfifo(path)
    elif how == 8:
        path.symlink_to(draw.choice(["/dev/zero", "/dev/stdin", path.name, "/proc/self/mem"]))
    elif how == 9:
        with path.open("wb") as file:  # much of nothing, which no disk holds
            file.write(struct.pack("<Q", draw.choice([2, 90_000_000])) + b"{}")
            file.truncate(1 << 40)
    elif how == 10:
        nul = draw.choice(["\0", "\ud800", "../../x", "a" * 100_000])
        header(json.dumps({nul: field()}).encode("utf-8", "surrogatepass"), b"1234")
    else:
        header(
            json.dumps({"w": field(), "__metadata__": {"weights_hold": "x", "step": "9" * 10_000}}).encode(),
            b"1234",
        )
    return inspecting(path)


def a_kernel(draw: random.Random, folder: Path) -> Reading:
    """Damages a kept kernel: only the bytes that were tried may be loaded."""
    from sfcore.native import build

    whole = _kernel()
    path = folder / build._name("key", whole)
    changed = damage(draw, whole)
    path.write_bytes(changed)
    return lambda: (build._not_whole(path, "key") is None) == (changed == whole)


_whole_kernel: list[bytes] = []


def _kernel() -> bytes:
    from sfcore.native import build

    if not _whole_kernel:
        library = build.find()
        if isinstance(library, str):
            raise RuntimeError(library)
        _whole_kernel.append(Path(library._name).read_bytes())
    return _whole_kernel[0]


def same(found: dict[str, np.ndarray], written: dict[str, np.ndarray]) -> bool:
    """Tells whether arrays have the same names, dtypes, shapes and bits."""
    return found.keys() == written.keys() and all(
        found[name].dtype == array.dtype
        and found[name].shape == array.shape
        and found[name].tobytes() == array.tobytes()
        for name, array in written.items()
    )


CASES: dict[str, Case] = {
    "checkpoint": a_checkpoint,
    "weights": weights_alone,
    "random": random_files,
    "hostile": hostile,
    "kernel": a_kernel,
}
# Part -> the module with its case. A module may have make(folder), which writes what all cases begin with,
# and warm(folder), which a process calls before its first one; both run in forks of this process.
PARTS = dict.fromkeys(CASES, "fuzz") | {
    "torch": "fuzz_torch",
    "import": "fuzz_torch",
    "restore torch": "fuzz_torch",
    "pickles": "fuzz_pickles",
    "orbax": "fuzz_jax",
    "restore jax": "fuzz_jax",
    "plan": "fuzz_plan",
}


def load(part: str) -> Any:
    """Returns the module with a part's case."""
    return importlib.import_module(f"benchmarks.{PARTS[part]}")


def _work(part: str, seed: int, numbers: range, report: int, made: Path, folder: Path) -> None:
    """Tries cases in a process of its own; tells how each ended."""
    module = load(part)
    if hasattr(module, "warm"):
        module.warm(made)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + BYTES, resource.RLIM_INFINITY))
    with os.fdopen(report, "w", encoding="utf-8") as out:
        for number in numbers:
            used = resource.getrusage(resource.RUSAGE_SELF)
            end = int(used.ru_utime + used.ru_stime) + DEAF
            resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
            place = folder / str(number)
            place.mkdir()
            outcome = attempt(module.CASES[part], random.Random(f"{part} {seed} {number}"), place)
            shutil.rmtree(place)
            print(json.dumps([number, outcome]), file=out, flush=True)


def _make(part: str, folder: Path) -> None:
    make = getattr(load(part), "make", None)
    child = os.fork() if make else 0
    if make and child == 0:
        code = 1
        try:
            make(folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if make and os.waitpid(child, 0)[1]:
        raise RuntimeError(f"what the cases of {part!r} begin with could not be made")


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def fuzz(part: str, count: int, seed: int = 0, first: int = 0, workers: int = 2) -> dict[str, object]:
    """Returns how many cases ended in what way, and the first problems.

    A process that dies is a problem of the case that it was at.
    """
    for reader in entry_points(group=READERS):
        reader.load()  # here: the workers are forks, and what imports a framework takes seconds
    _kernel()
    outcomes: Counter[str] = Counter()
    problems: list[str] = []
    tqdm.set_lock(threading.RLock())  # its own is shared with the forks, and one that is killed may hold it
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=count, desc=part, leave=False) as bar:
        made, folder = Path(temporary, "made"), Path(temporary, "cases")
        made.mkdir()
        folder.mkdir()
        _make(part, made)
        for start in range(first, first + count, 1000 * workers):
            chunk = range(start, min(start + 1000 * workers, first + count))
            running = []
            for worker in range(workers):
                mine = chunk[worker::workers]
                reading, writing = os.pipe()
                child = os.fork()
                if child == 0:
                    os.close(reading)
                    try:
                        _work(part, seed, mine, writing, made, folder)
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        os._exit(0)
                os.close(writing)
                running.append((child, mine, reading))
            for child, mine, reading in running:
                with os.fdopen(reading, encoding="utf-8") as lines:
                    ended = dict(json.loads(line) for line in lines)
                os.waitpid(child, 0)
                for number in [n for n in mine if n not in ended][:1]:
                    ended[number] = "the process died"
                for number, outcome in ended.items():
                    good = outcome in ("right", "refused", "read")
                    outcomes[outcome if good else "problem"] += 1
                    if not good and len(problems) < 20:
                        problems.append(f"--part {part} --seed {seed} --first {number}: {outcome}")
                bar.update(len(ended))
    return {"cases": sum(outcomes.values()), **outcomes, "problems": problems}


def main(argv: Sequence[str]) -> int:
    """Prints one JSON line a part; the exit code is 0 if no case was a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks fuzz", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--part", choices=tuple(PARTS), action="append", help="default: all")
    parser.add_argument(
        "--count", action="append", default=[], help="cases of each part, or PART=N; default: 1000"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first case; default: 0")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/fuzz.jsonl")
    arguments = parser.parse_args(argv)
    named = [one.rpartition("=") for one in arguments.count]
    counts = {part: int(number) for part, _, number in named}  # "" for all
    good = True
    for part in arguments.part or PARTS:
        found = fuzz(part, counts.get(part, counts.get("", 1000)), arguments.seed, arguments.first)
        print(json.dumps({"part": part, **found}, indent=1))
        if arguments.out:
            # A long run may be taken in pieces, each with a row.
            piece = f"{part} from {arguments.first}" if arguments.first else part
            row = {"part": piece, "seed": arguments.seed, **found}
            row |= {"device": "cpu", "versions": _records.versions()}
            _records.replace_part(arguments.out / "fuzz.jsonl", piece, [row])
        good = good and not found["problems"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
