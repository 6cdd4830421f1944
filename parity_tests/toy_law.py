"""A law that lives in the tests only: Schedule-Free Adagrad. What a new optimizer takes is in this file.

Its row, a direction in each twin, a rule of the reference, and for the suite its defaults by hand and a bad
value. Where each part stands in the library: CONTRIBUTING.md, "An optimizer, file by file". If the library
takes these names or the buffer `sum`, rename them here and in `test_toy_law.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from parity_tests import cases, coverage
from parity_tests.cases import Case
from parity_tests.invalid import bad
from parity_tests.reference import Reference, Rule
from sfcore import checks, hyperparameters
from sfcore.laws import Buffer, Law
from sfjax.step.plan import Direction as JaxDirection
from sfjax.step.plan import directed, known_options
from sftorch.closure import XAtRest
from sftorch.step.backends import Direction
from sftorch.step.plan import DirectedOptimizer, YAtRest, given

# The row


@dataclass(frozen=True)
class Options(hyperparameters.Ramped, hyperparameters.Decayed):
    """Schedule-Free Adagrad: the direction is the gradient over the root of the sum of its squares."""

    lr: float = hyperparameters.option(0.05, checks.STEP_SIZE, "step size")
    eps: float = hyperparameters.option(1e-8, checks.POSITIVE, "added to the denominator, outside the root")


SUM = Buffer("sum", "sum", "total", "sum of squared gradients", lean="")
ROW = Law(
    "adagrad",
    "Adagrad",
    Options,
    torch="AdagradScheduleFree",
    jax="schedule_free_adagrad",
    torch_names={"beta": "momentum"},
    buffers=(SUM,),
    direction="adagrad",
)

# torch


def adagrad_single(grad: Tensor, buffers: dict[str, Tensor], eps: Any) -> Tensor:
    """Returns Adagrad's direction; the sum is updated in place."""
    total = buffers["sum"].add_(grad * grad)
    return grad / (total.sqrt() + eps)  # S6


def adagrad_foreach(grads: list[Tensor], buffers: dict[str, list[Tensor]], eps: float) -> list[Tensor]:
    """The same for lists."""
    torch._foreach_addcmul_(buffers["sum"], grads, grads)
    denominators = torch._foreach_sqrt(buffers["sum"])
    torch._foreach_add_(denominators, eps)
    return list(torch._foreach_div(grads, denominators))  # S6


ADAGRAD = Direction(adagrad_single, adagrad_foreach)


class AdagradDirection(DirectedOptimizer):
    """Abstract: constructor and direction of Adagrad."""

    law = ROW

    def __init__(
        self,
        params: Any,
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        *,
        eps: float = 1e-8,
        prior_steps: int = 0,
        c_warmup: int = 0,
        refined_c: float = 0.0,
        window: int = 0,
        window_rule: str = "floor",
        weight_lr: str = "max",
        beta_rule: str = "constant",
        beta_max: float = 0.965,
        beta_anneal_steps: int = 0,
        beta_hold_steps: int = 0,
        rho: float = 0.8,
        maximize: bool = False,
        fused: bool | None = None,
        precision: str = "exact",
        seed: int = 0,
        capturable: bool = False,
        differentiable: bool = False,
    ):
        super().__init__(params, given(locals()))

    def _direction(self, values: Mapping[str, Any], t: int) -> tuple[Direction, tuple[float, ...]]:
        return ADAGRAD, (values["eps"],)


class AdagradScheduleFree(AdagradDirection, YAtRest):
    """The parameters hold y."""


class AdagradScheduleFreeClosure(AdagradDirection, XAtRest):
    """The parameters hold x between steps."""


# JAX


class SumState(NamedTuple):
    """The buffer, a tree of the parameters."""

    total: Any


def adagrad_leaf(g: jax.Array, buffers: dict[str, jax.Array], eps: jax.Array) -> Any:
    """Returns Adagrad's direction of one gradient, and the next sum."""
    total = buffers["total"] + g * g
    return g / (jnp.sqrt(total) + eps), {"total": total}  # S6


def adagrad_numbers(values: Mapping[str, Any], t: jax.Array) -> tuple[Any, ...]:
    """Returns what `adagrad_leaf` is called with at time t."""
    return (values["eps"],)


@known_options("adagrad")
def schedule_free_adagrad(
    learning_rate: Any = 0.05,
    warmup_steps: Any = 0,
    b1: Any = 0.9,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    weight_lr_power: Any = 2.0,
    state_dtype: Any = None,
    *,
    r: Any = 0.0,
    prior_steps: Any = 0,
    c_warmup: Any = 0,
    refined_c: Any = 0.0,
    window: Any = 0,
    window_rule: Any = "floor",
    weight_lr: Any = "max",
    b1_rule: Any = "constant",
    b1_max: Any = 0.965,
    b1_anneal_steps: Any = 0,
    b1_hold_steps: Any = 0,
    rho: Any = 0.8,
    precision: Any = "exact",
    seed: Any = 0,
    mask: Any = None,
) -> Any:
    """Schedule-Free Adagrad."""
    return directed(JaxDirection("adagrad", adagrad_leaf, adagrad_numbers, SumState), locals())


# The reference, and what the suite wants to know


def rule(run: Reference, k: str, g: np.ndarray, t: int, usable: bool) -> np.ndarray:
    """Returns what leaf k moves against (S6)."""
    total = run.buffers["sum"]
    total[k] = total[k] + g * g
    return g / (np.sqrt(total[k]) + run.options["eps"])


PARTS: dict[str, Any] = {
    "torch": {
        "AdagradScheduleFree": AdagradScheduleFree,
        "AdagradScheduleFreeClosure": AdagradScheduleFreeClosure,
    },
    "jax": schedule_free_adagrad,
    "rule": Rule(rule),
    "defaults": cases.AVERAGING | {"lr": 0.05, "weight_decay": 0.0, "warmup_steps": 0, "eps": 1e-8},
    "more": [
        Case("adagrad-eps", "eps as large as the gradients", "moments", "adagrad", {"eps": 1.0}),
        Case(
            "adagrad-ramp",
            "with a ramp and decay",
            "warm-up",
            "adagrad",
            {"warmup_steps": 5, "weight_decay": 0.1},
        ),
    ],
    "bad": [
        bad("eps", 0.0, "a finite number > 0", "1e-8 is the usual value"),
        bad("warmup_steps", -1, "a whole number of optimizer steps >= 0", "not a fraction"),
    ],
}


def joined(**parts: Any) -> ExitStack:
    """Makes the law part of the library and of the suite, whole or without some parts."""
    return coverage.joined(ROW, **(PARTS | parts))
