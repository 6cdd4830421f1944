"""The same gradients on parameters in many layouts, for test_layouts.py: weights, state and prints of each.

Started by `sftorch.tests.launcher` in two processes or in four, which is as many shards as there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sftorch
from sfcore.native import build
from sftorch.checkpoint import Checkpoints

OPTIMIZERS = {
    "sgd": (sftorch.SGDScheduleFree, {"lr": 0.3, "weight_decay": 0.01}),
    "adamw": (sftorch.AdamWScheduleFree, {"lr": 0.05, "weight_decay": 0.1}),
    # Rectified from the seventh step on, plain SGD before.
    "muon": (sftorch.MuonScheduleFree, {"lr": 0.05, "normalize": "rows", "weight_decay": 0.1}),
    "radam": (sftorch.RAdamScheduleFree, {"lr": 0.05, "betas": (0.9, 0.9), "silent_sgd_phase": False}),
}
PRECISIONS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float16": (torch.float16, {"foreach": False}),  # foreach rounds otherwise, in one process too
    "lean": (torch.bfloat16, {"precision": "lean"}),
    "8bit": (torch.bfloat16, {"precision": "8bit"}),
    "8bit, float32": (
        torch.float32,
        {"precision": "8bit", "fused": None if isinstance(build.find(), str) else True},
    ),
    "8bit, no kernel": (torch.bfloat16, {"precision": "8bit", "fused": False}),
    "8bit, later": (torch.bfloat16, {"fused": False}),
}
STEPS = {"sgd": 4, "adamw": 4, "muon": 4, "radam": 8}


class Net(nn.Module):
    """Shards of different sizes, and none at all for some processes; more than one chunk of a print."""

    def __init__(self, sizes: tuple[int, ...] = (6, 7, 5)) -> None:
        super().__init__()
        first, second, third = sizes
        self.a, self.b, self.c = nn.Linear(first, second), nn.Linear(second, third), nn.Linear(third, 1)


def net(dtype: torch.dtype, precision: str = "") -> Net:
    torch.manual_seed(0)
    return (Net((20, 19, 17)) if precision.startswith("8bit") else Net()).to(dtype)


def may_be(kind: str, precision: str, layout: str = "") -> bool:
    """Tells whether an optimizer has a precision, and a layout has the bits of one process then."""
    if not precision.startswith("8bit"):
        return True
    fused = PRECISIONS[precision][1].get("fused")
    # Rows in parts take torch's operations, in which AdamW's root is another one than the kernel's.
    takes_parts = fused is False or (kind == "sgd" and fused is None)
    return kind != "muon" and ("tp" not in layout or takes_parts)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.dtype == torch.int16:  # which gloo does not gather
        tensor = tensor.to(torch.int32)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def digest(tensor: torch.Tensor) -> str:
    value = whole(tensor).contiguous()
    return hashlib.sha256(value.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def tensor_parallel(model: Net, mesh: Any) -> None:
    parallelize_module(model, mesh, {"a": ColwiseParallel(), "b": RowwiseParallel()})


def layouts(world: int) -> dict[str, Callable[[Net], None]]:
    """Returns what divides a model, by name; `1` has it whole."""
    flat = init_device_mesh("cpu", (world,))
    found: dict[str, Callable[[Net], None]] = {
        "1": lambda model: None,
        f"fsdp {world}": lambda model: _fsdp(model, flat),
        f"tp {world}": lambda model: tensor_parallel(model, flat),
    }
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))

        def both(model: Net) -> None:
            tensor_parallel(model, mesh["model"])
            _fsdp(model, mesh["data"])

        found |= {"hsdp 2 x 2": lambda model: _fsdp(model, mesh), "tp 2 x fsdp 2": both}
    return found


def _fsdp(model: Net, mesh: Any) -> None:
    for layer in (model.a, model.b):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def scalar(model: Net, dtype: torch.dtype) -> nn.Parameter:
    """Returns a 0-d parameter that lies whole on every process, as a DTensor if the model has some."""
    value = torch.tensor(0.7, dtype=dtype)
    p = next(model.parameters())
    if isinstance(p, DTensor):
        return nn.Parameter(distribute_tensor(value, p.device_mesh, [Replicate()] * p.device_mesh.ndim))
    return nn.Parameter(value)


def run(divide: Callable[[Net], None], kind: str, precision: str) -> dict[str, Any]:
    """Returns the digests of weights and state after some steps, at y and at x, and the prints."""
    dtype, chosen = PRECISIONS[precision]
    make, options = OPTIMIZERS[kind]
    model = net(dtype, precision)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    divide(model)
    model.scale = scalar(model, dtype)
    shapes["scale"] = torch.Size()
    model.register_parameter("plain", nn.Parameter(torch.full((3,), 0.5, dtype=dtype)))  # beside DTensors
    shapes["plain"] = torch.Size([3])
    params = dict(model.named_parameters())
    optimizer = make(list(params.values()), **options, **chosen)
    random = torch.Generator().manual_seed(1)
    for step in range(STEPS[kind]):
        if precision == "8bit, later" and step == STEPS[kind] - 2:
            optimizer.param_groups[0]["precision"] = "8bit"
        if precision == "8bit, later" and step == STEPS[kind] - 1:  # the gaps move
            group = optimizer.param_groups[0]
            group |= {"momentum": 0.8} if "momentum" in group else {"betas": (0.8, group["betas"][1])}
        for name, shape in shapes.items():
            grad, p = torch.randn(shape, generator=random).to(dtype), params[name]
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = grad
        optimizer.step()
    found: dict[str, Any] = {}
    for name, p in params.items():
        found[f"{name} y"] = digest(p)
        state = optimizer.state[p]
        found |= {f"{name} {key}": digest(v) for key, v in state.items() if isinstance(v, torch.Tensor)}
    found |= {f"{name} x": digest(value) for name, value in optimizer.eval_state_dict(model).items()}
    saved = optimizer.state_dict()["state"]
    found |= {f"{i} {key}": state[key] for i, state in saved.items() for key in ("x_print", "y_print")}
    optimizer.eval()
    found |= {f"{name} in eval mode": digest(p) for name, p in params.items()}
    optimizer.train()
    found |= {f"{name} back": digest(p) for name, p in params.items()}
    return found


def given(model: Net, step: int) -> None:
    """Puts the gradients of a step into a model, laid out as it is."""
    random = torch.Generator().manual_seed(step)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=random)
        divided: Any = p
        whole = not isinstance(p, DTensor)
        p.grad = grad if whole else distribute_tensor(grad, divided.device_mesh, divided.placements)


def resumed(world: int, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Returns digests of a run of NorMuon, and of one that went on from its middle in another layout."""
    make, options = OPTIMIZERS["muon"]
    found = []
    for name, first in ((f"fsdp {world}", 0), (f"tp {world}", 2)):
        model = net(torch.float32)
        layouts(world)[name](model)
        optimizer = make(model.named_parameters(), **options)
        with Checkpoints(folder / "muon") as checkpoints:
            if first:
                checkpoints.restore(model, optimizer)
            for step in range(first, 4):
                given(model, step)
                optimizer.step()
                if step == 1:
                    checkpoints.save(model, optimizer)
                    checkpoints.wait()
        digests = {}
        for key, p in model.named_parameters():
            tensors = {k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
            digests |= {f"{key} {k}": digest(v) for k, v in ({"y": p} | tensors).items()}
        found.append(digests)
    return found[0], found[1]


def large(world: int) -> dict[str, Any]:
    """Returns the prints of a tensor of several chunks in each layout, rows and columns cut unevenly."""
    from sftorch.state import prints

    mesh = init_device_mesh("cpu", (world,))
    value = torch.randn(1031, 517, generator=torch.Generator().manual_seed(2))
    found = {"whole": prints.take([value])}
    for dim in (0, 1):
        found[f"cut along {dim}"] = prints.take([distribute_tensor(value, mesh, [Shard(dim)])])
    cut = distribute_tensor(value, mesh, [Shard(1)])
    with torch.no_grad():
        if dist.get_rank() == world - 1:
            cut.to_local()[500, 3] += 1.0
    found["changed"] = prints.take([cut])
    return found


def distances(world: int) -> dict[str, float]:
    """Returns the norm of x - z of one parameter in each layout."""
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for name, dim in (("whole", None), ("rows", 0), ("columns", 1)):
        start, grad = torch.randn(2, 9, 7, generator=torch.Generator().manual_seed(3))
        p = nn.Parameter(start if dim is None else distribute_tensor(start, mesh, [Shard(dim)]))
        optimizer = sftorch.SGDScheduleFree([p], lr=0.3)
        for _ in range(3):
            p.grad = grad if dim is None else distribute_tensor(grad, mesh, [Shard(dim)])
            optimizer.step()
        found[name] = optimizer.metrics(distance=True)[0]["x_z_distance"]
    return found


def main(rank: int, world: int, folder: Path, *kinds: str) -> dict[str, Any]:
    found = {
        (name, kind, precision): run(divide, kind, precision)
        for name, divide in layouts(world).items()
        for kind in kinds
        for precision in PRECISIONS
        if may_be(kind, precision, name)
    }
    more = {"resumed": resumed(world, folder)} if "muon" in kinds else {}
    return {"runs": found, "large": large(world), "distances": distances(world)} | more
