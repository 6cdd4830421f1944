"""Runs cases on several processes over gloo: torch is imported once, and every case forks its ranks.

`Launcher` starts `python -m sftorch.tests.launcher MODULE`, which runs functions of that module:
`function(rank, world, folder, *arguments)` on every rank.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

TIMEOUT = 200.0


class Launcher:
    """A process that has imported what a module's cases need; a context manager."""

    def __init__(self, module):
        root = Path(__file__).parents[2]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sftorch.tests.launcher", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def outcomes(self, world, case, folder, *arguments):
        """Returns for each rank ("ok", result), ("error", text) or ("gone", "")."""
        request = {"world": world, "case": case, "folder": str(folder), "arguments": arguments}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the launcher has ended"
        with open(answer.strip(), "rb") as file:
            return pickle.load(file)

    def run(self, world, case, folder, *arguments):
        """Returns the result of each rank; fails if one has failed."""
        found = self.outcomes(world, case, folder, *arguments)
        assert all(kind == "ok" for kind, _ in found), "\n".join(str(text) for _, text in found)
        return [value for _, value in found]


def run(module, world, folder, *arguments):
    """Returns what `main` of a module returns on each rank."""
    with Launcher(module) as launcher:
        return launcher.run(world, "main", folder, *arguments)


def _rank(module, request, rank, scratch):
    import torch.distributed as dist

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the launcher answers by
    warnings.simplefilter("error")
    # gloo, and torch about its own modules
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "the state dict of a .* is one of y")  # taken on purpose, to go on from
    world = request["world"]
    store = dist.FileStore(f"{scratch}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        value = getattr(module, request["case"])(rank, world, Path(request["folder"]), *request["arguments"])
        outcome = ("ok", value)
    except BaseException:
        outcome = ("error", traceback.format_exc())
    Path(f"{scratch}/{rank}.part").write_bytes(pickle.dumps(outcome))
    os.rename(f"{scratch}/{rank}.part", f"{scratch}/{rank}")
    if outcome[0] == "ok":
        with contextlib.suppress(RuntimeError):  # one that failed is gone
            dist.barrier()
    os._exit(0)


def _outcomes(module, request):
    scratch = tempfile.mkdtemp()
    children = []
    for rank in range(request["world"]):
        child = os.fork()
        if not child:
            _rank(module, request, rank, scratch)
        children.append(child)
    end, left = time.monotonic() + TIMEOUT, set(children)
    while left and time.monotonic() < end:
        left -= {child for child in left if os.waitpid(child, os.WNOHANG)[0]}
        time.sleep(0.01)
    for child in left:
        os.kill(child, 9)
        os.waitpid(child, 0)
    found = []
    for rank in range(request["world"]):
        said = Path(scratch, str(rank))
        found.append(pickle.loads(said.read_bytes()) if said.exists() else ("gone", ""))
    Path(scratch, "outcomes").write_bytes(pickle.dumps(found))
    return f"{scratch}/outcomes"


def main():
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(sys.argv[1])
    for line in sys.stdin:
        sys.stdout.write(_outcomes(module, json.loads(line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
