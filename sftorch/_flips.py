"""x from y and z in one pass over memory, for eval(), train() and eval_params(), by the native kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sftorch import _fused
from sftorch._iterates import as_real
from sftorch._native import build, call
from sftorch._native.call import Kind
from sftorch._parts import part

if TYPE_CHECKING:
    from sftorch._modes import TrainEvalOptimizer


def by_speed(
    optimizer: TrainEvalOptimizer, group: dict[str, Any], *names: str
) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
    """Sorts the started parameters of a group into those that the kernel can flip, and the others.

    Args:
        optimizer: whose state they have.
        group: of its own.
        names: of the state tensors that are needed.

    Returns:
        The first, a list of their state tensors for each name, and the others.
    """
    started, states = optimizer._started(group), optimizer.state
    wanted = group.get("fused") is not False and group.get("foreach") is not False
    if not wanted or not optimizer._y_beta(group) or isinstance(build.find(), str):
        return [], [[] for _ in names], started
    fast: list[Tensor] = []
    slow: list[Tensor] = []
    for p in started:
        tensors = [states[p][name] for name in names if name in states[p]]
        fits = p.is_cpu and len(tensors) == len(names) and _fused.alike(*map(_real, (p, *tensors)))
        (fast if fits else slow).append(p)
    return fast, [[states[p][name] for p in fast] for name in names], slow


def recover(
    optimizer: TrainEvalOptimizer, group: dict[str, Any]
) -> tuple[dict[Tensor, Tensor], list[Tensor]]:
    """Returns parameter -> x, new tensors, for parameters that hold y, and the parameters that are left."""
    fast, (zs,), slow = by_speed(optimizer, group, "z")
    xs = [torch.empty_like(p, requires_grad=False) for p in fast]
    _run(Kind.RECOVER, fast, zs, xs, optimizer._y_beta(group))
    return dict(zip(fast, xs, strict=True)), slow


def put_aside(optimizer: TrainEvalOptimizer, group: dict[str, Any]) -> list[Tensor]:
    """Puts x into parameters that hold y, and y into their state; returns the parameters that are left."""
    fast, (zs,), slow = by_speed(optimizer, group, "z")
    ys = [torch.empty_like(p, requires_grad=False) for p in fast]
    _run(Kind.PUT_ASIDE, fast, zs, ys, optimizer._y_beta(group))
    torch.autograd.graph.increment_version(fast)
    for p, y in zip(fast, ys, strict=True):
        optimizer.state[p]["y"] = y
    return slow


def untouched(optimizer: TrainEvalOptimizer, group: dict[str, Any]) -> set[Tensor]:
    """Returns parameters that surely hold what `put_aside` put into them; others may do so too."""
    fast, (zs, ys), _ = by_speed(optimizer, group, "z", "y")
    changed = _run(Kind.HOLDS, fast, zs, ys, optimizer._y_beta(group))
    return set() if changed else set(fast)


def _run(kind: Kind, params: list[Tensor], zs: list[Tensor], xs: list[Tensor], beta: float) -> bool:
    found = False
    for dtype in {z.dtype for z in zs}:
        rows = [row for row in zip(params, zs, xs, strict=True) if row[1].dtype == dtype]
        columns = ([_real(t) for t in column] for column in zip(*rows, strict=True))
        # The same doubles as in _iterates.recover_x, rounded to the tensors' dtype by both.
        found |= call.run(kind, dict(zip("yzx", columns, strict=True)), {"c": 1.0 / beta - 1.0})
    return found


def _real(tensor: Tensor) -> Tensor:
    return as_real(part(tensor).detach())
