"""State that goes from one layout to another by torch.distributed.checkpoint, for test_state_crosses.py.

In any number of processes: FSDP2, DDP, and "alone", a plain model of which every process has its own.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sftorch
from sftorch.tests.layout_runs import Net, digest

LAYOUTS = ("fsdp", "ddp", "alone")
SAVED, LAST = 3, 23  # steps
PRECISIONS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "lean": (torch.bfloat16, {"precision": "lean"}),
    "8bit": (torch.bfloat16, {"precision": "8bit"}),
    "8bit, float32": (torch.float32, {"precision": "8bit", "inner_momentum": 0.5}),
}


def build(layout: str, precision: str, seed: int) -> tuple[nn.Module, Any]:
    dtype, options = PRECISIONS[precision]
    torch.manual_seed(seed)
    model: nn.Module = (Net((20, 19, 17)) if precision.startswith("8bit") else Net()).to(dtype)
    if layout == "fsdp":
        fully_shard(model)
    elif layout == "ddp":
        model = DistributedDataParallel(model)
    return model, sftorch.AdamWScheduleFree(model.parameters(), lr=0.05, **options)


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    inner = getattr(model, "module", model)
    for step in range(first, last):
        # The same batch everywhere: the mean of equal gradients has the bits of each.
        inputs = torch.randn(8, inner.a.in_features, generator=torch.Generator().manual_seed(step))
        inputs = inputs.to(inner.c.weight.dtype)
        optimizer.zero_grad()
        model(inputs).float().square().mean().backward()
        optimizer.step()


def forward(self: Net, inputs: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(inputs)))))
    return hidden


Net.forward = forward  # type: ignore[method-assign]


def everything(model: nn.Module, optimizer: Any) -> dict[str, str]:
    found = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("module.")
        found[name] = digest(p)
        state = optimizer.state[p]
        found |= {f"{name} {key}": digest(v) for key, v in state.items() if isinstance(v, torch.Tensor)}
    return found


def saved(layout: str, precision: str, flat: bool, folder: Path) -> dict[str, str]:
    """Saves a run after some steps; returns what it holds after some more."""
    model, optimizer = build(layout, precision, seed=0)
    train(model, optimizer, 0, SAVED)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    train(model, optimizer, SAVED, LAST)
    return everything(model, optimizer)


def loaded(layout: str, precision: str, flat: bool, folder: Path) -> dict[str, str]:
    """Returns what a run holds that goes on from there."""
    model, optimizer = build(layout, precision, seed=9)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    optimizer.train()
    train(model, optimizer, SAVED, LAST)
    return everything(model, optimizer)


def in_full(precision: str, of_first: bool) -> list[dict[str, str]]:
    """Returns the end of a run by FSDP2, and of two that go on from its full state: by FSDP2, and alone."""
    model, optimizer = build("fsdp", precision, seed=0)
    train(model, optimizer, 0, SAVED)
    options = StateDictOptions(full_state_dict=True, cpu_offload=of_first)
    weights, state = get_state_dict(model, optimizer, options=options)
    train(model, optimizer, SAVED, LAST)
    ends = [everything(model, optimizer)]
    boxed: list[Any] = [(weights, state)]
    if of_first:  # only the first process has them
        dist.broadcast_object_list(boxed)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=of_first)
    for layout in ("fsdp", "alone"):
        model, optimizer = build(layout, precision, seed=9)
        own = options if layout == "fsdp" else StateDictOptions(full_state_dict=True)
        weights, state = copy.deepcopy(boxed[0])  # torch changes what it is given
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=own)
        optimizer.train()
        train(model, optimizer, SAVED, LAST)
        ends.append(everything(model, optimizer))
    return ends


def whole_state_of_one() -> list[dict[str, str]]:
    """Returns the ends of a plain run, and of one by FSDP2 that load_state_dict gave its plain state dict."""
    model, optimizer = build("alone", "bfloat16", seed=0)
    train(model, optimizer, 0, SAVED)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = optimizer.state_dict()
    divided, resumed = build("fsdp", "bfloat16", seed=9)
    resumed.load_state_dict(state)
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        for name, p in divided.named_parameters():
            p.copy_(distribute_tensor(weights[name], p.device_mesh, p.placements))
    resumed.train()
    train(model, optimizer, SAVED, LAST)
    train(divided, resumed, SAVED, LAST)
    return [everything(model, optimizer), everything(divided, resumed)]


def main(rank: int, world: int, folder: Path, *words: str) -> dict[str, Any]:
    """Crosses from each layout to each in all precisions of `words`, also from folders that they name."""
    precisions = [word for word in words if word in PRECISIONS]
    others = [Path(word) for word in words if word not in PRECISIONS]
    found: dict[str, Any] = {"end": {}, "crossed": {}, "from others": []}
    for precision in precisions:
        for flat in (False, True):
            for layout in LAYOUTS:
                place = f"{precision} {flat} {layout}"
                found["end"][precision, flat, layout] = saved(layout, precision, flat, folder / place)
                for to in LAYOUTS:
                    crossed = loaded(to, precision, flat, folder / place)
                    found["crossed"][precision, flat, layout, to] = crossed
                    found["from others"] += [loaded(to, precision, flat, other / place) for other in others]
    if not others:
        found["full"] = {(p, first): in_full(p, first) for p in precisions for first in (False, True)}
        found["whole"] = whole_state_of_one()
    return found
