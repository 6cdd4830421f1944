"""What two processes do with DTensors, started by test_divided.py: each case returns what its tests look at.

`python -m sftorch.tests.divided_runs RANK FOLDER` joins over a file, runs all cases, saves the results.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import sftorch
from sftorch import _directed
from sftorch._native import call
from sftorch.checkpoint import Checkpoints
from sftorch.checkpoint._steps import steps_of
from sftorch.tests.plain import CLASSES, CLOSURES, STEP_SIZE

WORLD = 2
KINDS = {
    "sgd": (CLASSES["sgd"], {}),
    "adamw": (CLASSES["adamw"], {"inner_momentum": 0.8, "weight_decay": 0.1}),
    "radam": (CLASSES["radam"], {"silent_sgd_phase": False}),
    "x stored": (CLASSES["sgd"], {"momentum": 0.0}),
    "closure": (CLOSURES["adamw"], {}),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
RUNS = [
    (kind, dtype, fused)
    for kind in KINDS
    for dtype in DTYPES
    for fused in (None, True)
    if (kind, dtype, fused) != ("closure", torch.bfloat16, True)  # that one raises, in one process too
]
STATE = ("z", "x", "exp_avg", "exp_avg_sq", "y", "y_rest", "x_rest")


class Calls:
    """Counts the tensors that the kernel steps or flips, and those that other paths step."""

    def __init__(self):
        self.kernel = self.others = 0
        run, single, foreach = call.run, _directed._run_single, _directed._run_foreach

        def counting(kind, tables, *rest, **options):
            self.kernel += len(tables["y"])
            return run(kind, tables, *rest, **options)

        def counting_others(path):
            def counted(move, scalars):
                self.others += len(move.ys)
                return path(move, scalars)

            return counted

        call.run = counting
        _directed._run_single, _directed._run_foreach = counting_others(single), counting_others(foreach)

    def taken(self):
        found = (self.kernel, self.others)
        self.kernel = self.others = 0
        return found


class Net(torch.nn.Module):
    """7, 5 and 1 rows: shards of different sizes, and none at all on the second process."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = torch.nn.Linear(6, 7), torch.nn.Linear(7, 5), torch.nn.Linear(5, 1)
        self.to(dtype)

    def forward(self, inputs):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(inputs)))))


def whole(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.int16:  # gloo has none
        tensor = tensor.to(torch.int32)
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def everything(model, optimizer):
    """Returns weights and state in full, by name."""
    found = {name: whole(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name} {k}": whole(v) for k, v in optimizer.state[p].items() if k in STATE}
    return found


def train(model, optimizer, first, last):
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        # The same batch on all processes: the mean of two equal gradients has the bits of each.
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)

        def closure(inputs=inputs):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        if isinstance(optimizer, tuple(CLOSURES.values())):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def stepped(calls, kind, dtype, fused):
    """Returns weights, state and x of a run in parts and of a whole one, and how many tensors went where."""
    make, options = KINDS[kind]
    runs, counts = [], []
    for divided in (True, False):
        model = Net(dtype)
        if divided:
            for layer in (model.a, model.b):
                fully_shard(layer)
            fully_shard(model)
        optimizer = make(model.parameters(), lr=STEP_SIZE, fused=fused, **options)
        calls.taken()
        train(model, optimizer, 0, 5)
        counts.append(calls.taken())
        runs.append([everything(model, optimizer)])
        if kind != "closure":
            shipped = optimizer.eval_state_dict(model)
            runs[-1].append({name: whole(value) for name, value in shipped.items()})
            calls.taken()
            optimizer.eval()
            runs[-1].append(everything(model, optimizer))
            optimizer.train()
            runs[-1].append(everything(model, optimizer))
            counts[-1] += calls.taken()
        train(model, optimizer, 5, 7)
        runs[-1].append(everything(model, optimizer))
    return {"runs": runs, "counts": counts}


def resumed(dtype):
    """Returns the end of a run in parts, and of one that went on from its state dict."""
    ends = []
    model = fully_shard(Net(dtype))
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=STEP_SIZE)
    train(model, optimizer, 0, 4)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    divided = all(isinstance(s["z"], DTensor) for s in state["state"].values())
    train(model, optimizer, 4, 6)
    ends.append(everything(model, optimizer))
    model = fully_shard(Net(dtype))
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=1.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    optimizer.load_state_dict(state)
    train(model, optimizer, 4, 6)
    ends.append(everything(model, optimizer))
    return {"ends": ends, "divided": divided}


def of_other_placements(mesh, rank):
    """Returns a parameter after a step along gradients that lie otherwise than it does, and the whole one."""
    start, gradient = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    placed = {
        "whole": distribute_tensor(gradient, mesh, [Replicate()]),
        "a sum": DTensor.from_local(gradient / 2, mesh, [Partial()], run_check=False),
        "by columns": distribute_tensor(gradient, mesh, [Shard(1)]),
    }
    found = {}
    for fused in (None, True, False):
        for name, grad in placed.items():
            p = torch.nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
            optimizer = sftorch.AdamWScheduleFree([p], lr=STEP_SIZE, fused=fused)
            p.grad = grad
            optimizer.step()
            assert p.grad is grad
            assert grad.placements == placed[name].placements
            found[f"{name}, fused={fused}"] = whole(p)
        p = torch.nn.Parameter(start.clone())
        optimizer = sftorch.AdamWScheduleFree([p], lr=STEP_SIZE, fused=fused)
        p.grad = gradient
        optimizer.step()
        found[f"alone, fused={fused}"] = whole(p)
    return found


def beside_plain_ones(mesh, calls):
    """Returns how many tensors went where in a step of DTensors and plain tensors in one group."""
    params = [
        torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])),
        torch.nn.Parameter(torch.ones(3)),
        torch.nn.Parameter(distribute_tensor(torch.ones(5), mesh, [Replicate()])),
    ]
    counts = []
    for options in ({}, {"fused": False}, {"fused": False, "foreach": False}):
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        calls.taken()
        optimizer.step()
        counts.append(calls.taken())
    return counts


def refused(mesh):
    """Returns what is said where no kernel can run, and whether anything moved."""
    found = {}
    cases = {
        "float16": (torch.ones(4, 2, dtype=torch.float16), None),
        "a plain gradient": (torch.ones(4, 2), torch.ones(4, 2)),
    }
    for name, (start, grad) in cases.items():
        p = torch.nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
        optimizer = sftorch.SGDScheduleFree([p], lr=STEP_SIZE, fused=True)
        p.grad = torch.ones_like(p) if grad is None else grad
        try:
            optimizer.step()
        except RuntimeError as error:
            still = torch.equal(whole(p), start) and optimizer.metrics()[0]["step"] == 0
            found[name] = (str(error), still)
    return found


def noticed(mesh):
    """Returns what autograd says of a graph that still needs the weights of before a step."""
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    found = []
    for fused in (True, False):
        optimizer = sftorch.SGDScheduleFree([p], lr=STEP_SIZE, fused=fused)
        p.grad = None
        loss = p.square().sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        try:
            loss.backward()
        except RuntimeError as error:
            found.append(str(error))
    return found


def watched(folder):
    """Returns the samples of a run in parts, and what a restore in an empty folder finds."""
    model = fully_shard(Net(torch.bfloat16))
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=STEP_SIZE)
    nothing = Checkpoints(folder / "none").restore(model, optimizer)
    train(model, optimizer, 0, 3)
    steps = steps_of(optimizer)
    recent = steps.recent(steps.rows())
    return {"nothing": nothing, "steps": len(steps.rows()), "recent": recent}


def main(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mesh, calls = init_device_mesh("cpu", (WORLD,)), Calls()
    found = {
        "stepped": {run: stepped(calls, *run) for run in RUNS},
        "resumed": {dtype: resumed(dtype) for dtype in DTYPES},
        "other placements": of_other_placements(mesh, rank),
        "beside plain ones": beside_plain_ones(mesh, calls),
        "refused": refused(mesh),
        "noticed": noticed(mesh),
        "watched": watched(folder),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
