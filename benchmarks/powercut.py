"""Cuts the power after each operation on the files of a run that saves, and reads what would be on the disk.

A run is recorded (powercut.c): what it opened, wrote, synced, renamed and removed, in order. Each beginning
of that record is then replayed on a disk that keeps what was synced, and of the rest as little as the file
system may (nothing; all names and no contents; a random part). A checkpoint that `wait` has acknowledged must
be there to the byte until the run itself removes it, and what bears a checkpoint's name must be whole.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks import _records

SOURCE = Path(__file__).with_name("powercut.c")
OPEN, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, MKDIR, RMDIR, UNKNOWN = range(1, 10)
NAMES = ["open", "write", "truncate", "sync", "rename", "unlink", "mkdir", "rmdir", "unknown"]
_HEAD = struct.Struct("<iiiiqq")
FOLDER, ACKNOWLEDGED = "checkpoints", "acknowledged"
DRAWS = 2  # random disks looked at after each operation


class Operation(NamedTuple):
    """One line of a record; paths are relative to the root."""

    kind: int
    path: str
    other: str
    truncates: bool
    offset: int
    content: bytes


def preload(folder: Path) -> Path:
    """Builds what is preloaded to record; returns its path.

    Raises:
        RuntimeError: if there is no C compiler, or not Linux.
    """
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        raise RuntimeError("recording needs Linux and a C compiler in PATH as cc")
    made = folder / "powercut.so"
    options = ["-O1", "-shared", "-fPIC", "-o", str(made), str(SOURCE), "-ldl", "-lpthread"]
    subprocess.run([compiler, *options], check=True)
    return made


def record(framework: str, saves: int, seed: int, folder: Path) -> tuple[Path, list[Operation]]:
    """Runs a program that saves; returns the folder that it saved into and all that it did there."""
    root, log = (folder / "root").resolve(), folder / "log"
    root.mkdir()
    around = {"LD_PRELOAD": str(preload(folder)), "POWERCUT_ROOT": str(root), "POWERCUT_LOG": str(log)}
    program = [sys.executable, "-m", "benchmarks.powercut_run", framework, str(root), str(saves), str(seed)]
    subprocess.run(program, env=os.environ | around, cwd=SOURCE.parent.parent, check=True)
    return root, list(_read(log.read_bytes(), str(root)))


def _read(log: bytes, root: str) -> Iterator[Operation]:
    at = 0
    while at < len(log):
        kind, first, second, flags, offset, length = _HEAD.unpack_from(log, at)
        at += _HEAD.size
        parts = []
        for size in (first, second, length):
            parts.append(log[at : at + size])
            at += size
        path, other = (os.fsdecode(part).removeprefix(root).lstrip("/") for part in parts[:2])
        yield Operation(kind, path, other, bool(flags), offset, parts[2])


@dataclass
class Node:
    """A file or a folder: what is there, and what of it was there when it was last synced."""

    entries: dict[str, Node] | None  # None for a file
    content: bytearray = field(default_factory=bytearray)
    synced_entries: dict[str, Node] = field(default_factory=dict)
    synced_content: bytes = b""

    @classmethod
    def folder(cls) -> Node:
        return cls({})

    def sync(self) -> None:
        if self.entries is None:
            self.synced_content = bytes(self.content)
        else:
            self.synced_entries = dict(self.entries)


Tree = dict[str, bytes]  # relative path -> content; of a folder that is empty, its path and a slash


class Disk:
    """A folder as a record leads to it."""

    def __init__(self) -> None:
        self.root = Node.folder()

    def take(self, one: Operation) -> None:
        """Does one operation.

        Raises:
            RuntimeError: for one that the record could not see in full.
        """
        if one.kind == UNKNOWN:
            raise RuntimeError(f"{one.path} must be written by calls that the record sees, got {one.other}")
        if one.kind == SYNC:
            node = self._find(one.path)
            if node is not None:
                node.sync()
            return
        above, name = self._above(one.path)
        if one.kind == OPEN:
            node = above.setdefault(name, Node(None))
            if one.truncates:
                node.content.clear()
        elif one.kind == WRITE:
            content = above[name].content
            content.extend(bytes(max(0, one.offset - len(content))))
            content[one.offset : one.offset + len(one.content)] = one.content
        elif one.kind == TRUNCATE:
            content = above[name].content
            content.extend(bytes(max(0, one.offset - len(content))))
            del content[one.offset :]
        elif one.kind == MKDIR:
            above[name] = Node.folder()
        elif one.kind == RENAME:
            into, new = self._above(one.other)
            into[new] = above.pop(name)
        else:
            del above[name]

    def _find(self, path: str) -> Node | None:
        node: Node | None = self.root
        for part in filter(None, path.split("/")):
            node = (node.entries or {}).get(part) if node is not None else None
        return node

    def _above(self, path: str) -> tuple[dict[str, Node], str]:
        folder, _, name = path.rpartition("/")
        node = self._find(folder)
        if node is None or node.entries is None:
            raise RuntimeError(f"the record must make {folder!r} before {path!r}: it does not see all")
        return node.entries, name

    def tree(self, keep: Keep) -> Tree:
        """Returns what is there if the power goes now, and `keep` says of each node what of it stays."""
        return dict(_walk(self.root, "", keep))


class Keep(NamedTuple):
    """What a disk keeps beyond what was synced: the probability that a folder's names stay, or contents."""

    name: str
    names: float
    contents: float


NOW = Keep("everything", 1.0, 1.0)
DISKS = (Keep("nothing more", 0.0, 0.0), Keep("names", 1.0, 0.0), Keep("contents", 0.0, 1.0))


def _walk(
    node: Node, path: str, keep: Keep, draw: random.Random | None = None
) -> Iterator[tuple[str, bytes]]:
    entries = node.entries or {}
    chance = draw.random() if draw else 0.5
    if entries != node.synced_entries and not keep.names > chance:
        entries = node.synced_entries
    for name, child in sorted(entries.items()):
        below = f"{path}/{name}" if path else name
        if child.entries is not None:
            yield f"{below}/", b""
            yield from _walk(child, below, keep, draw)
        else:
            kept = keep.contents > (draw.random() if draw else 0.5)
            yield below, bytes(child.content) if kept else child.synced_content


def trees(disk: Disk, draw: random.Random, draws: int) -> Iterator[tuple[str, Tree]]:
    """Yields the name of a disk and what is on it if the power goes now."""
    for keep in DISKS:
        yield keep.name, disk.tree(keep)
    for _ in range(draws):
        yield "a random part", dict(_walk(disk.root, "", Keep("", 0.5, 0.5), draw))


def under(tree: Tree, folder: str) -> Tree:
    """Returns the part of a tree below a folder."""
    return {
        path[len(folder) + 1 :]: content for path, content in tree.items() if path.startswith(f"{folder}/")
    }


def checkpoints(tree: Tree) -> dict[str, Tree]:
    """Returns path -> content of whatever bears a checkpoint's name."""
    names = {path.split("/")[1] for path in tree if path.startswith(f"{FOLDER}/")}
    named = [name for name in names if name.startswith("step_") or name.isdigit()]
    return {name: under(tree, f"{FOLDER}/{name}") for name in named}


def replay(operations: Sequence[Operation], seed: int, draws: int = DRAWS) -> dict[str, object]:
    """Returns how many beginnings were looked at, and what was wrong with any."""
    disk, draw = Disk(), random.Random(seed)
    whole: dict[str, list[Tree]] = {}  # name -> what it was when it was there and nothing changed in it
    acknowledged: dict[str, Tree] = {}
    problems: list[str] = []
    seen = 0
    for count, one in enumerate(tqdm(operations, desc="power cuts", leave=False)):
        before = checkpoints(disk.tree(NOW)) if one.kind in (RENAME, UNLINK, RMDIR) else {}
        disk.take(one)
        if one.kind == MKDIR and one.path.startswith(f"{ACKNOWLEDGED}/"):
            acknowledged |= checkpoints(disk.tree(NOW))
        if one.kind in (RENAME, UNLINK, RMDIR):
            there = checkpoints(disk.tree(NOW))
            for name in before.keys() - there.keys():
                acknowledged.pop(name, None)  # the run itself has taken it away
            for name, content in there.items():
                if content not in whole.setdefault(name, []):
                    whole[name].append(content)
        for where, tree in trees(disk, draw, draws):
            seen += 1
            found = checkpoints(tree)
            wrong = [f"{name} is acknowledged and lost" for name in acknowledged.keys() - found.keys()]
            for name, content in found.items():
                known = [acknowledged[name]] if name in acknowledged else whole.get(name, [])
                if content not in known:
                    lacking = (
                        [p for p in known[-1] if content.get(p) != known[-1][p]] if known else ["all of it"]
                    )
                    wrong.append(f"{name} is not whole: {lacking[:3]}")
            if wrong and len(problems) < 20:
                kind = NAMES[one.kind - 1]
                problems.append(f"after operation {count} ({kind} {one.path}), kept {where}: {sorted(wrong)}")
    return {
        "operations": len(operations),
        "disks": seen,
        "acknowledged": _count(operations),
        "problems": problems,
    }


def _count(operations: Sequence[Operation]) -> int:
    return sum(one.kind == MKDIR and one.path.startswith(f"{ACKNOWLEDGED}/") for one in operations)


def on_disk(root: Path) -> Tree:
    """Returns what is really there."""
    found = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        found.update({f"{name}/": b""} if path.is_dir() else {name: path.read_bytes()})
    return found


def run(framework: str, saves: int, seed: int, draws: int = DRAWS) -> dict[str, object]:
    """Records a run and cuts its power everywhere.

    Raises:
        RuntimeError: if the record does not lead to the files that are really there: it has not seen all.
    """
    with tempfile.TemporaryDirectory() as folder:
        root, operations = record(framework, saves, seed, Path(folder))
        disk = Disk()
        for one in operations:
            disk.take(one)
        real, replayed = on_disk(root), disk.tree(NOW)
        differ = sorted(
            path for path in real.keys() | replayed.keys() if real.get(path) != replayed.get(path)
        )
        if differ:
            raise RuntimeError(f"the record must lead to the files on the disk, which differ in {differ[:5]}")
    return replay(operations, seed, draws)


def main(argv: Sequence[str]) -> int:
    """Prints one JSON line a framework; the exit code is 0 if nothing was lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks powercut", description=__doc__)
    parser.add_argument("--framework", choices=("torch", "jax"), action="append", help="default: both")
    parser.add_argument("--saves", type=int, default=20, help="of each framework; default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of the run and the disks; default: 0")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/powercut.jsonl")
    arguments = parser.parse_args(argv)
    good = True
    for framework in arguments.framework or ("torch", "jax"):
        found = run(framework, arguments.saves, arguments.seed)
        print(json.dumps({"framework": framework, **found}, indent=1))
        if arguments.out:
            row = {"part": framework, "saves": arguments.saves, "seed": arguments.seed, **found}
            row |= {"device": "cpu", "versions": _records.versions()}
            _records.replace_part(arguments.out / "powercut.jsonl", framework, [row])
        good = good and found["problems"] == []
    return 0 if good else 1
