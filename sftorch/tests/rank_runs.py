"""What several processes do with one folder of checkpoints, started by test_checkpoint_ranks.py."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import sftorch
from sfcore import exchange
from sfcore.preemption import Preemption
from sfcore.shards import Spread
from sftorch.checkpoint import CheckpointError, Checkpoints

STATE = ("z", "gap", "scale", "x", "exp_avg", "exp_avg_sq", "y", "y_rest", "x_rest")
SAVED, LAST = 3, 23  # steps of a run that is saved
STOPPED = 18  # steps, at most, of one that is told to stop


class Net(torch.nn.Module):
    """7, 5 and 1 rows: parts of different sizes, none at all on some ranks, and a buffer."""

    def __init__(self, dtype):
        super().__init__()
        self.a, self.b, self.c = torch.nn.Linear(6, 7), torch.nn.Linear(7, 5), torch.nn.Linear(5, 1)
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
        self.to(dtype)

    def forward(self, inputs):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(inputs)))))


class Even(Net):
    """8 and 4 rows, which TP wants."""

    def __init__(self, dtype):
        super().__init__(dtype)
        self.a, self.b, self.c = torch.nn.Linear(6, 8), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1)
        self.to(dtype)


class Wide(Net):
    """Rows that are long enough for 8 bits, in numbers that TP wants and FSDP divides unevenly."""

    def __init__(self, dtype):
        super().__init__(dtype)
        self.a, self.b, self.c = torch.nn.Linear(20, 20), torch.nn.Linear(20, 18), torch.nn.Linear(18, 1)
        self.to(dtype)


def divided(kind, model, world):
    """Returns a model laid out in one way, and what is called in its place."""
    if kind == "one":
        return model, model
    if kind == "ddp":
        return model, DistributedDataParallel(model)
    if kind in ("tp", "tp x fsdp"):
        shape = (world,) if kind == "tp" else (world // 2, 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("tp",) if kind == "tp" else ("dp", "tp"))
        plan = {"a": ColwiseParallel(), "b": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        if kind == "tp":
            return model, model
        fully_shard(model, mesh=mesh["dp"])
        return model, model
    hybrid = kind == "hsdp"
    shape, names = ((world // 2, 2), ("replicate", "shard")) if hybrid else ((world,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in (model.a, model.b):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, model


def build(kind, world, seed=0, dtype="float32", lr=0.01, **options):
    torch.manual_seed(seed)
    kinds = {"even": Even, "wide": Wide}
    model = kinds.get(options.pop("net", None), Net)(getattr(torch, dtype))
    if options.pop("no buffer", False):
        del model.seen
    model, called = divided(kind, model, world)
    if options.pop("wrapper", False):
        base = torch.optim.AdamW(model.parameters(), lr=lr, foreach=False)
        return model, called, sftorch.ScheduleFreeWrapper(base, momentum=0.9)
    return model, called, sftorch.AdamWScheduleFree(model.parameters(), lr=lr, **options)


def train(called, optimizer, first, last):
    p = next(called.parameters())
    for step in range(first, last):
        # The same batch on all ranks: the mean of equal gradients has the bits of each.
        inputs = torch.randn(8, p.shape[1], generator=torch.Generator().manual_seed(step)).to(p.dtype)
        optimizer.zero_grad()
        called(inputs).square().mean().backward()
        optimizer.step()


def whole(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.int16:  # gloo has none
        tensor = tensor.to(torch.int32)
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def everything(model, optimizer):
    """Returns weights, buffers and state in full, by name."""
    found = {name: whole(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    base = getattr(optimizer, "base", None)
    for name, p in model.named_parameters():
        found |= {f"{name} {k}": whole(v) for k, v in optimizer.state[p].items() if k in STATE}
        if base is not None:
            found |= {f"{name} base {k}": whole(v) for k, v in base.state[p].items()}
    return found


def drawn():
    """Returns a number of each generator."""
    return torch.rand(1).item(), float(np.random.rand()), random.random()


def seed_all(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def saved(rank, world, folder, kind, options, mode="train", background=True):
    """Saves after some steps and goes on; returns everything then and at the end, and what is drawn."""
    model, called, optimizer = build(kind, world, **options)
    if hasattr(model, "seen"):
        model.seen += 5
    seed_all(100 + rank)
    train(called, optimizer, 0, SAVED)
    getattr(optimizer, mode)()
    with Checkpoints(folder, background=background) as checkpoints:
        checkpoints.save(model, optimizer, position=10 + rank, extra={"rank": torch.tensor(rank)})
    then, numbers = everything(model, optimizer), drawn()
    optimizer.train()
    train(called, optimizer, SAVED, LAST)
    return {"then": then, "end": everything(model, optimizer), "drawn": numbers}


@contextlib.contextmanager
def joining():
    """Yields a list of the arrays in pieces that are joined in the block."""
    found, join = [], Spread.__array__

    def noted(self, *arguments, **options):
        found.append(self.name)
        return join(self, *arguments, **options)

    Spread.__array__ = noted
    try:
        yield found
    finally:
        Spread.__array__ = join


def restored(rank, world, folder, kind, options, mode="train", resume="auto"):
    """Restores and goes on; returns what `saved` does, and what the restore said."""
    model, called, optimizer = build(kind, world, seed=9, **options)
    seed_all(200 + rank)
    getattr(optimizer, mode)()
    with Checkpoints(folder) as checkpoints, joining() as joined:
        found = checkpoints.restore(model, optimizer, resume=resume)
    then, numbers = everything(model, optimizer), drawn()
    optimizer.train()
    train(called, optimizer, SAVED, LAST)
    return {
        "then": then,
        "end": everything(model, optimizer),
        "drawn": numbers,
        "notices": found.notices,
        "position": found.meta.position if found.meta else None,
        "extra": found.extra,
        "joined": joined,
    }


def refused(rank, world, folder, kind, resume="auto"):
    """Restores what must not be restored; returns the error and whether anything has changed."""
    model, called, optimizer = build(kind, world, seed=9)
    train(called, optimizer, 0, 2)
    before, numbers = everything(model, optimizer), torch.get_rng_state()
    try:
        Checkpoints(folder).restore(model, optimizer, resume=resume)
    except CheckpointError as error:
        said = str(error)
    after = everything(model, optimizer)
    unchanged = all(torch.equal(after[name], before[name]) for name in before)
    return {"error": said, "unchanged": unchanged and torch.equal(torch.get_rng_state(), numbers)}


def bad_calls(rank, world, folder, kind):
    """Returns what is said where the ranks do not call the same, and what is then in the folder."""
    model, called, optimizer = build(kind, world)
    train(called, optimizer, 0, 2)
    found = {}

    def refused(case, model=model, optimizer=optimizer, **options):
        try:
            with Checkpoints(folder, background=False, wait_for_ranks=0.5) as checkpoints:
                checkpoints.save(model, optimizer, **options)
        except (CheckpointError, TypeError) as error:
            found[case] = str(error)

    refused("step", step=7 + rank)
    other = torch.nn.Linear(6, 3 + rank)
    refused("model", other, sftorch.AdamWScheduleFree(other.parameters()))
    refused(
        "optimizer",
        other,
        (sftorch.SGDScheduleFree if rank else sftorch.AdamWScheduleFree)(other.parameters()),
    )
    refused("argument", position=-rank)
    refused("every argument", position=-1)
    refused("type", optimizer if rank else model)
    refused("extra", extra={"it": object() if rank else 1})
    refused("metric", metrics={"loss": float("nan") if rank else 0.1})
    if rank == 0:
        refused("never")
    left = sorted(file.name for file in folder.iterdir()) if folder.exists() else []
    return {"said": found, "left": left, "step": optimizer.metrics()[0]["step"]}


def accumulated(rank, world, folder, kind, synchronised):
    """Saves in the middle of an update; returns what is said, or the gradients saved and restored."""
    model, called, optimizer = build(kind, world)
    train(called, optimizer, 0, 2)
    optimizer.zero_grad()
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(rank))
    with contextlib.ExitStack() as stack:
        if not synchronised and kind == "ddp":
            stack.enter_context(called.no_sync())
        elif not synchronised:
            model.set_requires_gradient_sync(False)
        called(inputs).square().mean().backward()
    try:
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(model, optimizer, accumulation=(2, 1))
    except CheckpointError as error:
        return str(error)
    before = {name: whole(p.grad) for name, p in model.named_parameters()}
    other, _, optimizer = build(kind, world, seed=9)
    Checkpoints(folder).restore(other, optimizer)
    return [before, {name: whole(p.grad) for name, p in other.named_parameters()}]


def preempted(rank, world, folder, kind, signalled, at):
    """Trains until one rank gets SIGTERM in the middle of an update; returns the exit code, and the end."""
    model, called, optimizer = build(kind, world)
    seed_all(rank)
    checkpoints, code = Checkpoints(folder), None

    def save():
        checkpoints.save(model, optimizer)
        return checkpoints.wait()

    restored = checkpoints.restore(model, optimizer)
    done = restored.meta.step if restored else 0
    try:
        with checkpoints, Preemption(save, ranks=checkpoints.ranks) as preemption:
            for step in range(done, STOPPED):
                with preemption.updating():
                    if step == at and rank == signalled:
                        os.kill(os.getpid(), signal.SIGTERM)
                    train(called, optimizer, step, step + 1)
                    torch.rand(1)
                time.sleep(0.02)
    except SystemExit as error:
        code = error.code
    return {
        "code": code,
        "from": done,
        "step": optimizer.metrics()[0]["step"],
        "end": everything(model, optimizer),
    }


def one_writer(rank, world, folder, kind):
    """Saves beside another run that holds the folder; returns what is said."""
    model, called, optimizer = build(kind, world)
    train(called, optimizer, 0, 2)
    try:
        Checkpoints(folder).save(model, optimizer)
    except CheckpointError as error:
        return str(error)


def failing_disk(rank, world, folder, kind, background):
    """Saves where one rank cannot write; returns what each says, and whether the next save succeeds."""
    model, called, optimizer = build(kind, world)
    train(called, optimizer, 0, 2)
    write, said = exchange.write_tensors, []

    def broken(*arguments, **options):
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments, **options)

    with Checkpoints(folder, background=background) as checkpoints:
        checkpoints.save(model, optimizer)
        checkpoints.wait()
        train(called, optimizer, 2, 3)
        exchange.write_tensors = broken
        try:
            checkpoints.save(model, optimizer)
            checkpoints.wait()
        except CheckpointError as error:
            said.append(str(error))
        exchange.write_tensors = write
        dist.barrier()  # rank 0 has removed what was left
        left = sorted(file.name for file in folder.glob("*"))
        dist.barrier()
        train(called, optimizer, 3, 4)
        checkpoints.save(model, optimizer)
        path = checkpoints.wait()
    return {"said": said, "left": left, "path": str(path)}


def polyak(rank, world, folder, kind, averages=True):
    """Returns the weights after 100 Polyak steps on other batches on each rank; `averages` or a mistake."""
    if not averages:
        sftorch.plus._mean = lambda loss, device: float(loss)
    torch.manual_seed(0)
    model, called = divided(kind, Net(torch.float64), world)
    optimizer = sftorch.AdamCScheduleFreePlusPaper(model.parameters(), 0.3, polyak_beta=0.9, r=1.0)
    for step in range(100):
        draw = torch.Generator().manual_seed(world * step + rank)
        inputs = torch.randn(8, 6, generator=draw, dtype=torch.float64)
        optimizer.zero_grad()
        loss = (called(inputs) - inputs.sin().sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step(loss=loss.detach())
    return [whole(p).tolist() for p in model.parameters()]
