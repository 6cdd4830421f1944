"""The torch rows of `benchmarks precision`: ours in every precision, and the others in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytorch_optimizer
import schedulefree
import torch
from torch import Tensor

import sftorch
from benchmarks import precision_problem
from benchmarks.precision_problem import EVERY, Problem, Run
from sftorch.state import forms


class Method(NamedTuple):
    """One row: what it is called, the parameters' dtype, how its optimizer is made."""

    label: str
    dtype: torch.dtype
    make: Callable[..., Any]
    rounds_y: bool = False


def _lean(params: Any, lr: float) -> Any:
    return sftorch.AdamWScheduleFree(params, lr=lr, precision="lean")


def _eight(params: Any, lr: float) -> Any:
    return sftorch.AdamWScheduleFree(params, lr=lr, precision="8bit")


METHODS = {
    "float32": Method("float32", torch.float32, sftorch.AdamWScheduleFree),
    "exact": Method("bfloat16, exact", torch.bfloat16, sftorch.AdamWScheduleFree),
    "exact-float16": Method("float16, exact", torch.float16, sftorch.AdamWScheduleFree),
    "lean": Method("bfloat16, lean", torch.bfloat16, _lean),
    "8bit": Method("bfloat16, 8bit", torch.bfloat16, _eight),
    "8bit-float32": Method("float32, 8bit", torch.float32, _eight),
    "rounded": Method("bfloat16, only z and v float32", torch.bfloat16, sftorch.AdamWScheduleFree, True),
    "schedulefree": Method("schedulefree, bfloat16", torch.bfloat16, schedulefree.AdamWScheduleFree),
    "pytorch_optimizer": Method(
        "pytorch_optimizer, bfloat16", torch.bfloat16, pytorch_optimizer.ScheduleFreeAdamW
    ),
}
BETA = 0.9
OPTIONS: dict[str, Any] = {"pytorch_optimizer": {"betas": (BETA, 0.999)}}


def train(name: str, problem: Problem, lr: float) -> Run:
    """Trains one row on one seed."""
    method = METHODS[name]
    params = {
        key: torch.nn.Parameter(torch.tensor(weight).to(method.dtype))  # a copy: the others start here too
        for key, weight in problem.weights.items()
    }
    optimizer = method.make(list(params.values()), lr=lr, **OPTIONS.get(name, {}))
    optimizer.train()
    inputs, targets = torch.from_numpy(problem.inputs), torch.from_numpy(problem.targets)
    curve = [precision_problem.loss(problem, problem.weights)]
    for step, batch in enumerate(problem.batches, start=1):
        chosen = torch.from_numpy(batch)
        optimizer.zero_grad()
        _loss(params, inputs[chosen], targets[chosen]).backward()
        optimizer.step()
        if method.rounds_y:
            for p in params.values():
                optimizer.state[p]["y_rest"].zero_()
        if step % EVERY == 0:
            curve.append(precision_problem.loss(problem, _x(optimizer, params)))
    x = {key: torch.from_numpy(value).to(method.dtype) for key, value in _x(optimizer, params).items()}
    shipped = precision_problem.loss(problem, {key: value.float().numpy() for key, value in x.items()})
    return Run(curve, shipped, _bytes(optimizer, params["w1"]))


def _loss(params: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the batch's loss; the arithmetic is float32, so that only what is stored is narrow."""
    w1, b1, w2, b2 = (p.float() for p in params.values())
    return (torch.tanh(inputs @ w1 + b1) @ w2 + b2 - targets).square().mean()


@torch.no_grad()
def _x(optimizer: Any, params: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Returns x in float32, as precisely as the optimizer's state knows it, and touches nothing."""
    found = {}
    for name, p in params.items():
        state = optimizer.state[p]
        y = forms.joined(p, state).float()
        x = (
            forms.x_from_y(y, state, BETA)
            if "gap" in state
            else y + (1 / BETA - 1) * (y - state["z"].float())
        )
        found[name] = x.numpy()
    return found


def _bytes(optimizer: Any, p: Tensor) -> float:
    kept = [value for value in optimizer.state[p].values() if isinstance(value, Tensor) and value.numel() > 1]
    return float(sum(tensor.nbytes for tensor in (p, *kept)) / p.numel())
