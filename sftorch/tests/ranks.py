"""Some processes of one group, forked from a program that has imported torch once.

`python -m sftorch.tests.ranks MODULE WORLD FOLDER WORD...` calls `MODULE.main(rank, folder, *words)` in each,
and writes what it returns to FOLDER/RANK.pt. They meet over a file, so that no port is needed.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(seconds=60)  # of a process for the others


def run(module: str, world: int, folder: Path, *words: str, seconds: float = 200.0) -> list[Any]:
    """Returns what each process returned.

    Raises:
        AssertionError: with what they wrote, if one of them raised or any of them hangs.
    """
    command = [sys.executable, "-m", "sftorch.tests.ranks", module, str(world), str(folder), *words]
    log = folder / "log"
    with log.open("wb") as file:
        started = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        code = started.wait(timeout=seconds)
    finally:
        started.kill()
    assert code == 0, log.read_text()[-6000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _main(module: str, world: int, folder: Path, *words: str) -> int:
    program = importlib.import_module(module)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "the state dict of a .* is one of y")  # taken on purpose, to go on from
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os._exit(_one(program, rank, world, folder, words))
        children.append(child)
    return max([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], key=abs)


def _one(program: Any, rank: int, world: int, folder: Path, words: tuple[str, ...]) -> int:
    try:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
        torch.save(program.main(rank, folder, *words), folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:]))
