"""The torch rows of `benchmarks precision`: ours in every precision, and the others.

bitsandbytes and torchao bring AdamW with its moments in 8 bits, for tensors of 4,096 elements and more. Here
that is every matrix with rows, as with ours: their limits are lowered, torchao's block is the matrix. They
have no average, so they are held to torch's AdamW in float32, at the same constant rate.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
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
    """One row.

    Attributes:
        label: what it is called.
        dtype: of the parameters.
        make: (parameters, lr=...) -> optimizer; with seed=... if it rounds at random.
        rounds_y: whether the rest of y is thrown away after every step.
        reference: the row whose loss its own is held to, seed by seed.
        needs: the package that it is of, if that may be missing.
        is_drawn: whether it is one of ours that rounds at random.
    """

    label: str
    dtype: torch.dtype
    make: Callable[..., Any]
    rounds_y: bool = False
    reference: str = "float32"
    needs: str = ""
    is_drawn: bool = False


def _adamw(params: Any, lr: float) -> Any:
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


def _bitsandbytes(params: Any, lr: float) -> Any:
    optim = importlib.import_module("bitsandbytes").optim
    return optim.AdamW8bit(params, lr=lr, weight_decay=0.0, min_8bit_size=LEAST)


def _torchao(params: Any, lr: float) -> Any:
    made = importlib.import_module("torchao.optim").AdamW8bit

    class Lowered(made):  # type: ignore[misc, valid-type]
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            if p.numel() < LEAST:
                return torch.zeros_like(p)
            found: Tensor = self._subclass_zeros(p.detach(), signed, self.block_size)
            return found

    return Lowered(params, lr=lr, weight_decay=0.0, block_size=LEAST, bf16_stochastic_round=True)


LEAST = precision_problem.INPUTS * precision_problem.HIDDEN  # elements of the one matrix with rows
LEAN, EIGHT = (partial(sftorch.AdamWScheduleFree, precision=form) for form in ("lean", "8bit"))
METHODS = {
    "float32": Method("float32", torch.float32, sftorch.AdamWScheduleFree),
    "exact": Method("bfloat16, exact", torch.bfloat16, sftorch.AdamWScheduleFree),
    "exact-float16": Method("float16, exact", torch.float16, sftorch.AdamWScheduleFree),
    "lean": Method("bfloat16, lean", torch.bfloat16, LEAN, is_drawn=True),
    "8bit": Method("bfloat16, 8bit", torch.bfloat16, EIGHT, is_drawn=True),
    "8bit-float32": Method("float32, 8bit", torch.float32, EIGHT, is_drawn=True),
    "rounded": Method("bfloat16, only z and v float32", torch.bfloat16, sftorch.AdamWScheduleFree, True),
    "schedulefree": Method("schedulefree, bfloat16", torch.bfloat16, schedulefree.AdamWScheduleFree),
    "pytorch_optimizer": Method(
        "pytorch_optimizer, bfloat16", torch.bfloat16, pytorch_optimizer.ScheduleFreeAdamW
    ),
    "adamw": Method("torch.optim.AdamW, float32", torch.float32, _adamw, reference="adamw"),
    "bitsandbytes": Method(
        "bitsandbytes AdamW8bit, bfloat16", torch.bfloat16, _bitsandbytes, False, "adamw", "bitsandbytes"
    ),
    "bitsandbytes-float32": Method(
        "bitsandbytes AdamW8bit, float32", torch.float32, _bitsandbytes, False, "adamw", "bitsandbytes"
    ),
    "torchao": Method(
        "torchao AdamW8bit, bfloat16 up or down at random",
        torch.bfloat16,
        _torchao,
        False,
        "adamw",
        "torchao",
    ),
}
BETA = 0.9
OPTIONS: dict[str, Any] = {"pytorch_optimizer": {"betas": (BETA, 0.999)}}


def train(name: str, problem: Problem, lr: float, draw: int = 0) -> Run:
    """Trains one row on one seed, and one of the rounding."""
    method = METHODS[name]
    params = {
        key: torch.nn.Parameter(torch.tensor(weight).to(method.dtype))  # a copy: the others start here too
        for key, weight in problem.weights.items()
    }
    options = OPTIONS.get(name, {}) | ({"seed": draw} if method.is_drawn else {})
    optimizer = method.make(list(params.values()), lr=lr, **options)
    if hasattr(optimizer, "train"):
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
            curve.append(precision_problem.loss(problem, _x(method, optimizer, params)))
    x = {
        key: torch.from_numpy(value).to(method.dtype) for key, value in _x(method, optimizer, params).items()
    }
    shipped = precision_problem.loss(problem, {key: value.float().numpy() for key, value in x.items()})
    return Run(curve, shipped, _bytes(optimizer, params["w1"]))


def _loss(params: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the batch's loss; the arithmetic is float32, so that only what is stored is narrow."""
    w1, b1, w2, b2 = (p.float() for p in params.values())
    return (torch.tanh(inputs @ w1 + b1) @ w2 + b2 - targets).square().mean()


@torch.no_grad()
def _x(method: Method, optimizer: Any, params: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Returns x in float32, as precisely as the optimizer's state knows it, and touches nothing.

    Of an optimizer without an average it is a copy of the weights.
    """
    found = {}
    for name, p in params.items():
        state = optimizer.state[p]
        if method.reference == "adamw":
            found[name] = p.float().numpy(force=True)
            continue
        y = forms.joined(p, state).float()
        x = (
            forms.x_from_y(y, state, BETA)
            if "gap" in state
            else y + (1 / BETA - 1) * (y - state["z"].float())
        )
        found[name] = x.numpy()
    return found


def _bytes(optimizer: Any, p: Tensor) -> float:
    """Returns the bytes of a parameter and its state, an element, but for a table of what codes mean."""
    state = optimizer.state[p]
    kept = [
        getattr(value, part)
        for value in state.values()
        for part in ("codes", "scale")
        if hasattr(value, part)
    ]
    kept += [
        value
        for name, value in state.items()
        if isinstance(value, Tensor) and not hasattr(value, "codes") and value.ndim and "qmap" not in name
    ]
    return float(sum(tensor.nbytes for tensor in (p, *kept)) / p.numel())
