"""A run of several processes under SIGKILL: of a random rank at a random moment, saves in flight.

The others are killed a moment later, as torchrun and jax.distributed do, and all start again: until there
were enough kills, and then to the end. Torch: FSDP2 over gloo, dropout and data of every rank's own random
numbers. JAX: a mesh over jax.distributed, with a generator of its own on every process.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sfcore.lock import LOCK

# Seconds that an attempt lives at most.
LIFE = {"torch": 1.5, "jax": 6.0}
EVERY = 2  # steps between saves
Run = Callable[[int, int, str, Path, int], str]


def run_torch(rank: int, world: int, meeting: str, folder: Path, steps: int) -> str:
    """Trains to the end from where the folder is; returns a digest of weights, state and random numbers."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    import sftorch
    from sftorch.checkpoint import Checkpoints
    from sftorch.law.parts import part

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 33), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(33, 4)
    )
    fully_shard(model)
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.01)
    torch.manual_seed(10 + rank)
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(model, optimizer)
        done = restored.meta.step if restored and restored.meta else 0
        for step in range(done + 1, steps + 1):
            optimizer.zero_grad()
            model(torch.rand(6, 8)).square().mean().backward()
            optimizer.step()
            if step % EVERY == 0:
                checkpoints.save(model, optimizer)
    found = hashlib.sha256(torch.rand(1).numpy().tobytes())
    for p in model.parameters():
        state = optimizer.state[p]
        for tensor in (p, state["z"], state["exp_avg_sq"]):
            found.update(part(tensor.detach()).contiguous().numpy().tobytes())
    return _together(found.hexdigest(), dist, world)


def _together(digest: str, dist: Any, world: int) -> str:
    every = [""] * world
    dist.all_gather_object(every, digest)
    return " ".join(every)


def run_jax(rank: int, world: int, meeting: str, folder: Path, steps: int) -> str:
    """As `run_torch`; the digest is of the shards on this process, and so are the others'."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec

    import sfjax
    from sfjax.checkpoint import Checkpoints

    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(meeting, world, rank, initialization_timeout=30)
    mesh = jax.make_mesh((world,), ("d",))

    def over_all(array: Any, *axes: str) -> Any:
        return jax.make_array_from_callback(
            array.shape, NamedSharding(mesh, PartitionSpec(*axes)), lambda i: array[i]
        )

    start = np.random.default_rng(0)
    params = {
        "w": over_all(start.standard_normal((8 * world, 4)).astype(np.float32), "d"),
        "b": over_all(np.zeros(4, np.float32)),
    }
    tx = sfjax.schedule_free_adamw(0.01)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step_of(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(lambda p: jnp.square(batch @ p["w"] + p["b"]).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    data = np.random.default_rng(10 + rank)
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(params, state, extra_state={"data": data})
        done = 0
        if restored:
            params, state, done = restored.params, restored.opt_state, restored.meta.step
        for step in range(done + 1, steps + 1):
            mine = data.random((3, 8 * world)).astype(np.float32)
            batch = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("d")), mine)
            params, state = step_of(params, state, batch)
            if step % EVERY == 0:
                checkpoints.save(step, params, state, extra_state={"data": data})
    found = hashlib.sha256(data.random(1).tobytes())
    for leaf in jax.tree.leaves((params, state)):
        for shard in leaf.addressable_shards:
            found.update(np.asarray(shard.data).tobytes())
    mine = np.frombuffer(found.digest(), np.uint8)
    return str(np.asarray(multihost_utils.process_allgather(mine)).tobytes().hex())


RUNS: dict[str, Run] = {"torch": run_torch, "jax": run_jax}


def attempt(
    framework: str, world: int, folder: Path, steps: int, draw: random.Random | None, life: float
) -> tuple[list[str] | None, bool]:
    """Runs all ranks in processes of their own.

    Returns:
        what they returned, or None if they were killed; whether a save was in flight then.

    Args:
        draw: of the rank that is killed and of the moments, every second one in a save; None lets them end.
        life: seconds that they live at most, before a save is waited for.

    Raises:
        RuntimeError: if one failed by itself.
    """
    scratch = folder.with_suffix(f".{time.monotonic_ns()}")
    scratch.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = f"127.0.0.1:{port}" if framework == "jax" else str(scratch / "meeting")
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _child(RUNS[framework], rank, world, meeting, folder, steps, scratch)
        children.append(child)
    left = set(children)
    end = None if draw is None else time.monotonic() + draw.uniform(0, life)
    until_saving = draw is not None and draw.random() < 0.5
    before = _partial(folder)
    codes = {}
    while left and (end is None or time.monotonic() < end or (until_saving and _partial(folder) <= before)):
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.discard(child)
                codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            break
        time.sleep(0.0005)
    failed, saving = any(codes.values()), False
    if left and draw is not None and not failed:
        time.sleep(draw.uniform(0, 0.004) if until_saving else 0)
        os.kill(draw.choice(sorted(left)), signal.SIGKILL)
        saving = not _partial(folder) <= before  # now: the others put it away when they notice
        time.sleep(draw.uniform(0, 0.3))
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if failed:
        said = "\n".join(file.read_text() for file in sorted(scratch.glob("*.log")))
        raise RuntimeError(f"ranks must end well, got the exit codes {list(codes.values())}:\n{said[-6000:]}")
    ended = None if left else [(scratch / f"{rank}.end").read_text() for rank in range(world)]
    return ended, saving


def _partial(folder: Path) -> set[Path]:
    return set(folder.glob(".partial-*"))


def _child(run: Run, rank: int, world: int, meeting: str, folder: Path, steps: int, scratch: Path) -> None:
    log = os.open(scratch / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        (scratch / f"{rank}.end").write_text(run(rank, world, meeting, folder, steps))
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def storm(
    framework: str, ranks: int, kills: int, steps: int, seed: int, folder: Path, life: float | None = None
) -> dict[str, object]:
    """Returns what came of so many kills; `life` is that of LIFE by default.

    Raises:
        RuntimeError: if an attempt failed by itself: something unreadable was left behind.
    """
    draw = random.Random(seed)
    calm, stormy = folder / f"{framework}-calm", folder / f"{framework}-storm"
    expected, _ = attempt(framework, ranks, calm, steps, None, 0)
    killed, ended, in_flight = 0, None, 0
    with tqdm(total=kills, desc=f"{framework} kills") as bar:
        while killed < kills and ended is None:
            ended, saving = attempt(framework, ranks, stormy, steps, draw, life or LIFE[framework])
            killed += ended is None
            in_flight += saving
            bar.update(ended is None)
    if ended is None:
        ended, _ = attempt(framework, ranks, stormy, steps, None, 0)
    names = [path.name for path in stormy.iterdir()]
    return {
        "kills": killed,
        "in a save": in_flight,
        "same bits": ended == expected,
        "leftovers": [n for n in names if not (n.isdigit() or n.startswith("step_") or n == LOCK)],
    }
