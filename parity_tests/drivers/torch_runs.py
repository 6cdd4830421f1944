"""Runs in PyTorch: sftorch in its forms, schedulefree and pytorch_optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity_tests.cases import AVERAGING, Case
from parity_tests.drivers import names
from parity_tests.reference import Arrays, Reference
from parity_tests.trajectory import Iterates
from sfcore import laws

Make = Callable[[Case, list[Tensor]], Any]


class TorchRun:
    """An optimizer whose parameters hold y, fed with recorded gradients."""

    def __init__(self, make: Make, case: Case, params: Arrays, dtype: str):
        self.dtype = getattr(torch, dtype)
        self.beta = case.options["beta"]
        self.params = {k: torch.nn.Parameter(self.tensor(p)) for k, p in params.items()}
        self.optimizer = make(case, list(self.params.values()))

    def tensor(self, a: np.ndarray) -> Tensor:
        return torch.tensor(a, dtype=self.dtype)

    def update(self, grads: Arrays, lr: float, **told: Any) -> None:
        """Takes one step with the schedule's lr."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for k, p in self.params.items():
            p.grad = self.tensor(grads[k])
        self.step(**told)

    def step(self, **told: Any) -> None:
        self.optimizer.step(**told)

    def iterates(self) -> Iterates:
        """Returns x, y and z, without touching the run."""
        y = {k: p.detach() for k, p in self.params.items()}
        z = {k: self.optimizer.state[p].get("z", p).detach() for k, p in self.params.items()}
        seen = (self.average(y, z), y, z)
        x_seen, y_seen, z_seen = ({k: a.numpy().copy() for k, a in s.items()} for s in seen)
        return x_seen, y_seen, z_seen

    def average(self, y: dict[str, Tensor], z: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns x as the program's own eval() makes it, and puts y back as it was."""
        held = {k: a.clone() for k, a in y.items()}
        self.optimizer.eval()
        x = {k: p.detach().clone() for k, p in self.params.items()}
        for k, p in self.params.items():
            p.data.copy_(held[k])
        for group in self.optimizer.param_groups:
            group["train_mode"] = True
        return x


class OurRun(TorchRun):
    """sftorch: x is asked for, and state can be put in."""

    def average(self, y: dict[str, Tensor], z: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.optimizer.eval_params()
        return {k: x[p] for k, p in self.params.items()}

    def put(self, truth: Reference) -> None:
        """Overwrites weights and state with the reference's; state exists once a step has been taken."""
        clock = {"step": truth.step, "lr_max": truth.lr_max, "weight_sum": truth.weight_sum}
        buffers = {one.torch: truth.buffers[role] for role, one in laws.roles().items()}
        buffers |= {"z": truth.z, "x": truth.x}
        for k, p in self.params.items():
            p.data = self.tensor(truth.y[k])
            state = self.optimizer.state[p]
            state.update(clock | {name: self.tensor(a[k]) for name, a in buffers.items() if name in state})
        for group in self.optimizer.param_groups:
            group.update(k=truth.step, lr_max=truth.lr_max, weight_sum=truth.weight_sum)


class ClosureRun(TorchRun):
    """The closure forms, whose parameters hold x between steps."""

    def step(self, **told: Any) -> None:
        self.optimizer.step(lambda: 0.0)

    def iterates(self) -> Iterates:
        _, x, z = super().iterates()
        return x, self.peek(x, z), z

    def peek(self, x: Arrays, z: Arrays) -> Arrays:
        """Returns y by S9: upstream's shows it inside the closure only, where looking would take a step."""
        return {k: np.asarray(self.beta * x[k] + (1 - self.beta) * z[k]) for k in x}

    def average(self, y: dict[str, Tensor], z: dict[str, Tensor]) -> dict[str, Tensor]:
        return y


class OurClosureRun(ClosureRun):
    """sftorch's closure forms: y is what the closure really sees."""

    def peek(self, x: Arrays, z: Arrays) -> Arrays:
        seen: Arrays = {}

        def closure() -> float:
            seen.update({k: p.detach().numpy().copy() for k, p in self.params.items()})
            raise _Seen  # a closure that raises must leave everything as it was

        with contextlib.suppress(_Seen):
            self.optimizer.step(closure)
        return seen


class _Seen(Exception):
    pass


class WrapperRun(OurRun):
    """sftorch.ScheduleFreeWrapper around torch's own optimizer; the ramp of S2 is the base's lr."""

    def __init__(self, make: Make, case: Case, params: Arrays, dtype: str):
        super().__init__(make, case, params, dtype)
        self.warmup, self.t = case.options["warmup_steps"], 0

    def update(self, grads: Arrays, lr: float, **told: Any) -> None:
        self.t += 1
        super().update(grads, lr * min(1.0, self.t / self.warmup) if self.warmup else lr)


def ours(
    case: Case, params: list[Tensor], suffix: str = "", foreach: bool = True, fused: bool = False
) -> Any:
    """Returns sftorch's optimizer for a case."""
    import sftorch

    make = getattr(sftorch, names.row(case.optimizer).torch + suffix)
    return make(params, foreach=foreach, fused=fused, **names.for_torch(case.optimizer, case.options))


def wrapped(case: Case, params: list[Tensor]) -> Any:
    """Returns the same optimizer, made of torch's own and the wrapper."""
    import sftorch

    o = case.options
    if case.optimizer == "sgd":
        base: torch.optim.Optimizer = torch.optim.SGD(params, lr=o["lr"])
    else:
        base = torch.optim.Adam(params, lr=o["lr"], betas=(o["inner_momentum"], o["b2"]), eps=o["eps"])
    averaging = {k: o[k] for k in AVERAGING if k not in ("lr", "beta")}
    return sftorch.ScheduleFreeWrapper(
        base,
        momentum=o["beta"],
        weight_decay_at_y=o["weight_decay"],
        decay_power=o["decay_power"],
        **averaging,
    )


def upstream(case: Case, params: list[Tensor], suffix: str = "", foreach: bool = True) -> Any:
    """Returns the schedulefree package's optimizer for a case."""
    import schedulefree

    make = getattr(schedulefree, laws.LAWS[case.optimizer].elsewhere["schedulefree"] + suffix)
    optimizer = make(params, foreach=foreach, **names.for_upstream(case.optimizer, case.options))
    if not suffix:
        optimizer.train()
    return optimizer


def pytorch_optimizer(case: Case, params: list[Tensor]) -> Any:
    """Returns the pytorch_optimizer package's optimizer for a case."""
    import pytorch_optimizer

    make = getattr(pytorch_optimizer, laws.LAWS[case.optimizer].elsewhere["pytorch_optimizer"])
    refined = {"decoupling_c": case.options["refined_c"]} if case.optimizer == "adamw" else {}
    return make(params, **refined, **names.for_upstream(case.optimizer, case.options))
