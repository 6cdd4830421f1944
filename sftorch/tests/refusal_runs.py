"""What is wrong on one process or on all, for test_refused_together.py: weights, state, gradients, options.

In two processes, under FSDP2 and TP. Each case returns what a process heard, and whether anything changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import sftorch
from sftorch.tests import layout_runs
from sftorch.tests.layout_runs import Net, digest

MAKES = {
    "sgd": lambda params, **options: sftorch.SGDScheduleFree(params, lr=0.1, **options),
    "adamw": lambda params, **options: sftorch.AdamWScheduleFree(params, lr=0.1, **options),
    "wrapper": lambda params, **options: sftorch.ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.1)),
}


class Run(NamedTuple):
    model: nn.Module
    optimizer: Any

    @property
    def weight(self) -> DTensor:
        return self.model.a.weight  # type: ignore[union-attr, return-value]

    def local(self, name: str = "a.weight") -> torch.Tensor:
        return dict(self.model.named_parameters())[name].detach().to_local()  # type: ignore[attr-defined]


def started(
    layout: str, dtype: torch.dtype, kind: str = "adamw", steps: int = 3, seed: int = 0, **options: Any
) -> Run:
    torch.manual_seed(seed)
    model = Net().to(dtype)
    layout_runs.layouts(2)[layout](model)
    model.register_parameter("plain", nn.Parameter(torch.full((3,), 0.5, dtype=dtype)))
    run = Run(model, MAKES[kind](model.parameters(), **options))
    for step in range(steps):
        give_gradients(run, step)
        run.optimizer.step()
    return run


def give_gradients(run: Run, step: int) -> None:
    for place, p in enumerate(run.model.parameters()):
        p.grad = torch.full_like(p, 0.1 * (step + 1) - 0.05 * place)


def on(rank: int, act: Callable[[], Any]) -> None:
    if dist.get_rank() == rank:
        act()


def add(tensor: torch.Tensor, value: float = 1.0) -> None:
    if tensor.numel():
        tensor.view(-1)[-1] += value


# Touched while the parameters hold x.
def touched(
    layout: str,
    dtype: torch.dtype,
    ranks: tuple[int, ...],
    name: str = "a.weight",
    value: float = 1.0,
    kind: str = "adamw",
    **options: Any,
) -> Any:
    run = started(layout, dtype, kind, **options)
    run.optimizer.eval()
    for rank in ranks:
        on(rank, lambda: add(run.model.plain.detach() if name == "plain" else run.local(name), value))
    return run, run.optimizer.train


# State of other weights than those that are there.
def other_weights(
    layout: str, dtype: torch.dtype, ranks: tuple[int, ...], use: str = "train", **options: Any
) -> Any:
    state = copy.deepcopy(started(layout, dtype, **options).optimizer.state_dict())
    run = started(layout, dtype, steps=3, **options)
    for rank in ranks:
        on(rank, lambda: add(run.local()))
    run.optimizer.load_state_dict(state)
    give_gradients(run, 3)
    return run, getattr(run.optimizer, use)


def of_another_model(layout: str, use: str) -> Any:
    state = copy.deepcopy(started(layout, torch.float32).optimizer.state_dict())
    run = started(layout, torch.float32, seed=5)
    run.optimizer.load_state_dict(state)
    give_gradients(run, 3)
    return run, getattr(run.optimizer, use)


def changed_after_a_load(layout: str) -> Any:
    run = started(layout, torch.float32)
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    on(1, lambda: add(run.local("b.bias")))
    return run, run.optimizer.eval


def gradient_at_x() -> Any:
    run = started("fsdp 2", torch.float32)
    run.optimizer.eval()
    weights = [p.detach().clone() for p in run.model.parameters()]
    state = copy.deepcopy(run.optimizer.state_dict())
    run = started("fsdp 2", torch.float32, seed=5)
    run.optimizer.load_state_dict(state)
    with torch.no_grad():
        for p, value in zip(run.model.parameters(), weights, strict=True):
            p.copy_(value)
    give_gradients(run, 3)
    return run, run.optimizer.step


# A state dict that does not fit on one process.
def unfit(change: Callable[[dict[str, Any]], Any]) -> Any:
    run = started("fsdp 2", torch.float32)
    state = copy.deepcopy(run.optimizer.state_dict())
    on(1, lambda: change(state))
    return run, lambda: run.optimizer.load_state_dict(state)


# The first step.
def first_step(
    change: Callable[[Run], Any], dtype: torch.dtype = torch.float32, kind: str = "adamw", **options: Any
) -> Any:
    run = started("fsdp 2", dtype, kind, steps=0, **options)
    give_gradients(run, 0)
    on(1, lambda: change(run))
    return run, run.optimizer.step


def plain_gradient(run: Run) -> None:
    run.weight.grad = None
    run.model.plain.grad = DTensor.from_local(torch.ones(3), run.weight.device_mesh)  # type: ignore[union-attr]


def sparse_gradient(run: Run) -> None:
    run.model.plain.grad = torch.ones(3).to_sparse()  # type: ignore[union-attr]


def set_option(name: str, value: Any) -> Callable[[Run], None]:
    return lambda run: run.optimizer.param_groups[0].update({name: value})


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES: dict[str, Callable[[], Any]] = {
    "touched on rank 0": lambda: touched("fsdp 2", F32, (0,)),
    "touched on rank 1": lambda: touched("fsdp 2", F32, (1,)),
    "touched on both": lambda: touched("fsdp 2", F32, (0, 1)),
    "touched under TP": lambda: touched("tp 2", F32, (1,)),
    "touched where the other part is empty": lambda: touched("fsdp 2", F32, (0,), "c.weight"),
    "touched a plain tensor on rank 1": lambda: touched("fsdp 2", F32, (1,), "plain"),
    "touched in bfloat16": lambda: touched("fsdp 2", BF16, (1,)),
    "touched in float16": lambda: touched("tp 2", F16, (1,)),
    "touched in lean": lambda: touched("fsdp 2", BF16, (1,), precision="lean"),
    "touched without a kernel": lambda: touched("fsdp 2", F32, (1,), fused=False),
    "touched into NaN": lambda: touched("fsdp 2", F32, (1,), value=float("nan")),
    "touched at beta 0": lambda: touched("fsdp 2", F32, (1,), kind="sgd", momentum=0.0),
    "touched around a base": lambda: touched("fsdp 2", F32, (1,), kind="wrapper"),
    "other weights on rank 0, train": lambda: other_weights("fsdp 2", F32, (0,)),
    "other weights on rank 1, eval": lambda: other_weights("fsdp 2", F32, (1,), "eval"),
    "other weights on rank 1, step": lambda: other_weights("fsdp 2", F32, (1,), "step"),
    "other weights under TP": lambda: other_weights("tp 2", F32, (1,)),
    "other weights in bfloat16": lambda: other_weights("fsdp 2", BF16, (1,), "eval_params"),
    "other weights in lean": lambda: other_weights("fsdp 2", BF16, (0,), precision="lean"),
    "another model's weights, train": lambda: of_another_model("fsdp 2", "train"),
    "another model's weights, step": lambda: of_another_model("tp 2", "step"),
    "changed after a load": lambda: changed_after_a_load("fsdp 2"),
    "changed after a load, one of two copies": lambda: changed_after_a_load("tp 2"),
    "a gradient taken at x": gradient_at_x,
    "a state dict without state": lambda: unfit(lambda state: state.pop("state")),
    "a state dict without a group": lambda: unfit(lambda state: state["param_groups"].pop()),
    "a state dict that lacks z": lambda: unfit(lambda state: state["state"][0].pop("z")),
    "a state dict of another shape": lambda: unfit(lambda s: s["state"][0].update(z=torch.ones(2))),
    "a state dict of other parameters": lambda: unfit(lambda state: state["param_groups"][0]["params"].pop()),
    "a gradient that is a DTensor alone": lambda: first_step(plain_gradient),
    "a sparse gradient": lambda: first_step(sparse_gradient),
    "no learning rate": lambda: first_step(set_option("lr", -1.0)),
    "no kernel for float16": lambda: first_step(set_option("fused", True), F16, fused=False),
    "in eval mode on one": lambda: first_step(set_option("train_mode", False)),
    "no learning rate around a base": lambda: first_step(set_option("lr", -1.0), kind="wrapper"),
}


def heard(case: Callable[[], Any]) -> dict[str, Any]:
    """Returns what a process hears that uses what is wrong, and whether that changed anything."""
    run, use = case()
    optimizer = run.optimizer

    def held() -> list[Any]:
        modes = [optimizer._books(group)["train_mode"] for group in optimizer.param_groups]
        return [*modes, *map(digest, run.model.parameters())]

    before = held()
    try:
        use()
        said = None
    except Exception as error:
        said = (type(error).__name__, str(error))
    return {"said": said, "changed": held() != before}


def plain_step_collectives() -> dict[str, int]:
    """Returns how many collectives some calls take, by name."""
    from torch.distributed.tensor.debug import CommDebugMode

    counts: dict[str, int] = {}
    run = started("fsdp 2", torch.float32, steps=2)
    for name, call in {
        "step": run.optimizer.step,
        "eval": run.optimizer.eval,
        "train": run.optimizer.train,
        "eval_params": run.optimizer.eval_params,
        "state_dict": run.optimizer.state_dict,
        "metrics": run.optimizer.metrics,
    }.items():
        give_gradients(run, 5)
        original, seen = dist.all_reduce, [0]

        def counted(*args: Any, original: Any = original, seen: list[int] = seen, **more: Any) -> Any:
            seen[0] += 1
            return original(*args, **more)

        dist.all_reduce = counted
        try:
            with CommDebugMode() as mode:
                call()
        finally:
            dist.all_reduce = original
        counts[name] = max(seen[0], mode.get_total_counts())
    return counts


def evaluated() -> list[list[float]]:
    """Returns the losses of a run that is evaluated between its steps: by FSDP2, and alone."""
    runs = []
    for layout in ("fsdp 2", "1"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        if layout != "1":
            from torch.distributed.fsdp import fully_shard

            fully_shard(model[0])
            fully_shard(model)
        for make in (sftorch.AdamWScheduleFree, sftorch.AdamWScheduleFreeClosure):
            optimizer = make(model.parameters(), lr=0.05)
            losses = []
            for step in range(5):
                inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))

                def closure(inputs: Any = inputs, model: Any = model, optimizer: Any = optimizer) -> Any:
                    optimizer.zero_grad()
                    loss = model(inputs).square().mean()
                    loss.backward()
                    return loss

                if make is sftorch.AdamWScheduleFree:
                    losses.append(closure().item())
                    optimizer.step()
                    optimizer.eval()
                else:
                    losses.append(optimizer.step(closure).item())
                with torch.no_grad():
                    losses.append(model(inputs).square().mean().item())
                if make is sftorch.AdamWScheduleFree:
                    optimizer.train()
            runs.append(losses)
    return runs


def main(rank: int, world: int, folder: Path) -> dict[str, Any]:
    init_device_mesh("cpu", (2,))
    return {
        "heard": {name: heard(case) for name, case in CASES.items()},
        "collectives": plain_step_collectives(),
        "evaluated": evaluated(),
    }
