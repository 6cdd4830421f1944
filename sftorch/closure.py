"""The closure forms: the parameters hold x between steps, and y only inside the closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sftorch.adamw import AdamWDirection
from sftorch.muon import MuonDirection
from sftorch.radam import RAdamDirection
from sftorch.sgd import SGDDirection
from sftorch.state import forms
from sftorch.state.compiler import uncompiled, uncompiled_itself
from sftorch.state.meshes import gather_anew
from sftorch.state.modes import Loss
from sftorch.state.state_dict import settle
from sftorch.step.plan import DirectedOptimizer, given


class XAtRest(DirectedOptimizer):
    """Abstract: `step(closure)` for parameters that hold x, so that nothing needs to be switched."""

    _rest = forms.X_REST  # in a step, y's

    def step(self, closure: Callable[[], Loss]) -> Loss:  # type: ignore[override]
        """Takes one step; `p.grad` is read and never written.

        Args:
            closure: required; clears the gradients, evaluates the model (which then holds y), calls
                backward and returns the loss.

        Returns:
            The closure's loss.

        Raises:
            TypeError: without a closure. If the closure raises, or the step cannot be taken, the parameters
                hold x again.
        """
        if not callable(closure):
            raise TypeError(
                f"closure must be a function, got {closure!r}: pass one that evaluates the model and calls "
                "backward, or use the class without 'Closure' in its name"
            )
        with torch.no_grad():
            return self._take_step(closure)

    @uncompiled_itself
    def _take_step(self, closure: Callable[[], Loss]) -> Loss:
        x = self._extrapolate()
        try:
            with torch.enable_grad():
                loss = closure()
            plan = self._prepare(x)
        except BaseException:
            self._restore(x)
            raise
        self._restore({p: value for p, value in x.items() if p.grad is None})
        self._is_half_stepped = True
        self._run(plan)
        self._close(plan)
        return loss

    @uncompiled
    def _extrapolate(self) -> dict[Tensor, Tensor]:
        """Puts y into the parameters and returns parameter -> x."""
        settle(self)
        self._loaded = None
        self._check_settings()
        params = self._params()
        x = {p: forms.joined(p.detach().clone(), self.state.get(p, {}), self._rest) for p in params}
        for group in self.param_groups:
            beta = self._beta(group)
            for p in self._started(group):
                y = forms.y_from_x(x[p], self.state[p], beta)  # S9
                forms.put_(p, self.state[p], y, self._rest)
        gather_anew(self, params)
        return x

    @uncompiled
    def _restore(self, x: dict[Tensor, Tensor]) -> None:
        for p, value in x.items():
            if forms.has_started(self.state.get(p, {})):
                forms.put_(p, self.state[p], value, self._rest)
            else:
                p.copy_(value)
        gather_anew(self, x)


class SGDScheduleFreeClosure(SGDDirection, XAtRest):
    """Schedule-Free SGD whose parameters hold x; arguments as `SGDScheduleFree`, `step` needs a closure.

    Example:
        >>> import sftorch, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = sftorch.SGDScheduleFreeClosure(model.parameters(), lr=0.5)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(1, 2)).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)  # the model holds x again
    """

    # Here, and only here, schedulefree has weight_decay before momentum.
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0,
        momentum: float = 0.9,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        *,
        prior_steps: int = 0,
        c_warmup: int = 0,
        refined_c: float = 0.0,
        window: float = 0,
        window_rule: Literal["floor", "constant"] = "floor",
        weight_lr: Literal["max", "current"] = "max",
        beta_rule: Literal["constant", "anneal", "amuse"] = "constant",
        beta_max: float = 0.965,
        beta_anneal_steps: int = 0,
        beta_hold_steps: int = 0,
        rho: float = 0.8,
        decay_at: Literal["y", "z"] = "y",
        decay_power: Literal[1, 2, "normalized"] = 1,
        maximize: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ):
        super().__init__(params, **given(locals()))


class AdamWScheduleFreeClosure(AdamWDirection, XAtRest):
    """Schedule-Free AdamW whose parameters hold x; arguments as `AdamWScheduleFree`, `step` needs a closure.

    Example:
        >>> import sftorch, torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = sftorch.AdamWScheduleFreeClosure([w], lr=0.1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """


class RAdamScheduleFreeClosure(RAdamDirection, XAtRest):
    """Schedule-Free RAdam whose parameters hold x; arguments as `RAdamScheduleFree`, `step` needs a closure.

    Example:
        >>> import sftorch, torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = sftorch.RAdamScheduleFreeClosure([w], lr=0.1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """


class MuonScheduleFreeClosure(MuonDirection, XAtRest):
    """Schedule-Free Muon whose parameters hold x; arguments as `MuonScheduleFree`, `step` needs a closure.

    Example:
        >>> import sftorch, torch
        >>> w = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = sftorch.MuonScheduleFreeClosure([w], lr=0.1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """
