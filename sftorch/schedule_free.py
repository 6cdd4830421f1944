"""Schedule-Free around any torch optimizer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from sfcore.averaging import coefficients, decay_scale
from sfcore.laws import LAWS
from sftorch.law import iterates
from sftorch.law.parts import note_written
from sftorch.law.scalars import Next, next_step
from sftorch.state import arguments, forms
from sftorch.state.compiler import uncompiled
from sftorch.state.groups import Batch
from sftorch.state.meshes import together
from sftorch.state.modes import TrainEvalOptimizer
from sftorch.state.state_dict import ScheduleFreeOptimizer, groups_of
from sftorch.step.plan import given

_BASE = "base"
_DRAWER = "schedule_free"
Tensors = Mapping[Tensor, Tensor]


class ScheduleFreeWrapper(TrainEvalOptimizer):
    """Makes any torch optimizer Schedule-Free: the base steps z, gradients are taken at y (S6: delta is
    whatever the base does to z).

    It is a torch.optim.Optimizer that shares the base's groups, so lr schedulers work on either, and
    keeps the base's state apart. What it adds to a group lies under the one key "schedule_free". Use a
    base without momentum of its own, or with little. For 16-bit parameters the base steps float32 stand-ins.
    torch.compile passes over its step, which then runs as it is.

    Args:
        base: the optimizer to wrap, before its first step; its groups must have an "lr".
        momentum: interpolation beta of y = beta x + (1 - beta) z, in [0, 1], default 0.9.
        weight_decay_at_y: decoupled decay taken at y, >= 0, default 0; the base's own is taken at z.
        decay_power: it is multiplied by lr to this power, 1 (default) or 2 (AdamC); "normalized" is AdamC's
            too, lr^2 over the largest lr so far, whose weight_decay_at_y is like AdamW's.
        r: the average weighs step t by t^r, >= 0, default 0.
        weight_lr_power: and by the largest lr so far to this power, >= 0, default 2.
        prior_steps: the initial weights count as the average of this many earlier steps, default 0.
        c_warmup: x is z in this many first steps, which do not count in the average (F5), default 0.
        refined_c: c is multiplied by (1 - beta) times this, up to 1 (F5), >= 0; 0 (default) is off.
        window: c is at least 1 / window, so that the average forgets what is older (F5); 0 (default) is off.
        window_rule: "floor" (default), or "constant" for c = 1 / window in every step.
        weight_lr: a step is weighed by "max" (default), the largest lr so far, or by "current", its own.
        beta_rule: "constant" (default); "anneal" lets 1 - beta fall to 1 - beta_max, on a line of logarithms,
            "amuse" by a power of time (F9), so that x stays the weighted mean. Not beside a scheduler that
            cycles momentum.
        beta_max: where "anneal" ends, >= beta and < 1, default 0.965.
        beta_anneal_steps: the steps in which it gets there.
        beta_hold_steps: steps > 1 before "amuse" begins, mostly those of the warm-up.
        rho: of "amuse", > 0, default 0.8: 1 - beta is its first value times
            ((beta_hold_steps - 1) / (t - 1))^rho.

    Raises:
        HyperparameterError: with every value that is out of range.
        TypeError: if base is not a torch optimizer.

    Example:
        >>> import sftorch, torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = sftorch.ScheduleFreeWrapper(torch.optim.RMSprop([w], lr=0.01))
        >>> w.square().sum().backward()
        >>> optimizer.step()
    """

    law = LAWS["wrapper"]

    # Keyword-only: schedulefree orders these arguments differently, and a swap would go unnoticed.
    def __init__(
        self,
        base: torch.optim.Optimizer,
        *,
        momentum: float = 0.9,
        weight_decay_at_y: float = 0.0,
        decay_power: Literal[1, 2, "normalized"] = 1,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
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
    ):
        self.options = given(locals())
        self.base = self.options.pop("base")
        _check_base(base)
        self.param_groups = []
        drawers = [self._new_drawer(group) for group in base.param_groups]
        for group, drawer in zip(base.param_groups, drawers, strict=True):
            group[_DRAWER] = drawer
        torch.optim.Optimizer.__init__(self, base.param_groups, base.defaults)
        self.param_groups = base.param_groups
        _widen_state(base, self._params())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base, in the mode the wrapper is in; everything is checked before.

        Args:
            param_group: `{"params": ..., option: value, ...}`; missing options take the base's defaults.
        """
        if any(param_group is group for group in self.base.param_groups):
            self.param_groups.append(param_group)  # the constructor hands over the base's own
            self._note_built(param_group)
            return
        group = arguments.as_group(param_group, self.base.defaults, self._params())
        drawer = self._new_drawer(self.base.defaults | group)
        self.base.add_param_group(group | {_DRAWER: drawer})
        self._note_built(self.base.param_groups[-1])

    def state_dict(self) -> dict[str, Any]:
        """Returns the whole state in torch's shape; the base's lies under "base" in each parameter's."""
        self._show_base_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned into the wrapper and into the base, as a copy.

        Raises:
            ValueError: for the state dict of another optimizer; nothing has changed then.
        """
        if not all(_DRAWER in group for group in groups_of(state_dict)):
            raise ValueError(
                f"state_dict must be a ScheduleFreeWrapper's, got groups without {_DRAWER!r}: "
                "load it into an optimizer of the class that saved it"
            )
        super().load_state_dict(state_dict)

    def _load(self, state_dict: dict[str, Any]) -> None:
        groups, state = state_dict["param_groups"], state_dict["state"]
        # A copy, because torch would share the tensors with the state dict.
        base = {index: copy.deepcopy(of_p[_BASE]) for index, of_p in state.items() if _BASE in of_p}
        own = {index: {k: v for k, v in of_p.items() if k != _BASE} for index, of_p in state.items()}
        # Torch casts what it loads to the parameter's dtype.
        wide = {p: torch.empty_like(p, dtype=torch.float32) for p in _narrow(self._params())}
        with _in_place_of(self.base, wide):
            self.base.load_state_dict({"state": copy.deepcopy(base), "param_groups": groups})
        self._keep_dtypes(state, [index for group in groups for index in group["params"]])
        super()._load({"state": own, "param_groups": groups})
        self.param_groups = self.base.param_groups
        self._show_base_state()

    def _keep_dtypes(self, state: dict[int, dict[str, Any]], indices: list[int]) -> None:
        """Undoes torch's cast of float32 beside float64 parameters, such as NAdam's mu_product."""
        for index, p in zip(indices, self._params(), strict=True):
            of_p = state.get(index, {})
            if "z" not in of_p or of_p["z"].dtype != torch.float64:
                continue
            for name, value in of_p.get(_BASE, {}).items():
                if isinstance(value, Tensor) and value.dtype == torch.float32:
                    self.base.state[p][name] = self.base.state[p][name].to(torch.float32)

    def _show_base_state(self) -> None:
        """Puts the base's own dicts into ours, where whatever saves optimizers looks for state."""
        for p in self._params():
            if p in self.base.state:
                self.state[p][_BASE] = self.base.state[p]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"base": self.base, "options": self.options}

    def _new_drawer(self, group: dict[str, Any]) -> dict[str, Any]:
        if "lr" not in group:
            raise ValueError(f"base must have an lr in its groups, got the options {list(group)}")
        return self.options | self._opening_books(group | {_DRAWER: self.options})

    def _values(self, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        values, names = super()._values(group | group[_DRAWER])
        if "d" in group:  # Prodigy and D-Adaptation keep the scale of their lr there
            values["lr"] *= arguments.as_number(group["d"])
        return values, names

    def _books(self, group: dict[str, Any]) -> dict[str, Any]:
        drawer: dict[str, Any] = group[_DRAWER]
        return drawer

    @uncompiled
    def _prepare(self) -> dict[Tensor, dict[str, Any]]:
        """Returns the state of the parameters that are to move."""
        self._begin()
        with together(self._to_agree()):
            self._check_settings()
            arguments.check_gradients(self._params())
        self._agrees = True
        moving: dict[Tensor, dict[str, Any]] = {}
        for group in self.param_groups:
            moving |= {p: self._ready(p, group) for p in group["params"] if p.grad is not None}
        self.state.update(moving)
        for group in self.param_groups:
            self._settle_beta(group)
        return moving

    @staticmethod
    def _run(plan: dict[Tensor, dict[str, Any]]) -> None:
        pass  # the base's arithmetic is not to be compiled either

    @uncompiled
    def _close(self, plan: dict[Tensor, dict[str, Any]]) -> None:
        y = {p: p.detach().clone() for p in plan}
        z = {p: plan[p]["z"].clone() for p in _narrow(plan)}
        try:
            for p in y.keys() - z.keys():
                p.copy_(plan[p]["z"])
            with _in_place_of(self.base, z):
                self.base.step()
        except BaseException:
            for p, value in y.items():
                p.copy_(value)
            raise
        for group in self.param_groups:
            values, _ = self._values(group)  # after the base's step, in which Prodigy sets d
            clock = self._group_clock(group)
            for batch in self._batches({p: plan[p] for p in group["params"] if p in plan}):
                self._fold(batch, next_step(self.law, batch.clock, clock.step, values), values, y, z)
            self._finish(group, next_step(self.law, clock, clock.step, values), plan)
        self._show_base_state()

    def _fold(self, batch: Batch, after: Next, values: dict[str, Any], y: Tensors, moved: Tensors) -> None:
        """Takes S6-S9 with what the base did: to stand-ins of 16-bit parameters, else to the parameters."""
        k1, k2 = coefficients(after.c, after.beta, after.change, after.beta - after.change or 1.0)
        scale = decay_scale(after.lr_t, after.clock.lr_max, values["decay_power"])  # F6
        wd = values["weight_decay"] * scale
        for p, state in zip(batch.params, batch.states, strict=True):
            z = state["z"]
            step = moved.get(p, p) - z
            full = forms.joined(y[p], state)
            delta = step - after.lr_t * wd * full.to(z.dtype)  # S6
            iterates.fold_single_(full, z, delta, k1, k2)
            forms.put_(p, state, full)
        self._finish_batch(batch, after)
        note_written(batch.params)


def _check_base(base: Any) -> None:
    kind = type(base).__name__
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"base must be a torch.optim.Optimizer, got {kind}: make it first and pass it")
    if isinstance(base, ScheduleFreeOptimizer):
        raise TypeError(f"base must not be Schedule-Free itself, got {kind}: use it as it is")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(f"base must be an optimizer that steps without a closure, got {kind}: wrap another")


# Float32 parameters that stand in place of 16-bit ones while a wrapped optimizer steps or loads. What it
# makes of them, its own buffers included, is then float32, and no step is lost to rounding.


def _narrow(params: Iterable[Tensor]) -> list[Tensor]:
    """Returns the 16-bit parameters."""
    return [p for p in params if forms.rest_dtype(p.dtype) is not None]


def _widen_state(base: torch.optim.Optimizer, params: Iterable[Tensor]) -> None:
    """Puts into float32 what a base that makes its state at once (Adagrad) made of 16-bit parameters."""
    for p in _narrow(params):
        for name, value in base.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.dtype == p.dtype:
                base.state[p][name] = value.to(torch.float32)


@contextmanager
def _in_place_of(base: torch.optim.Optimizer, values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Puts float32 values in the place of parameters, with their gradients, inside a `with` block.

    Args:
        base: any torch optimizer; its groups and the keys of its state are as before afterwards.
        values: parameter -> float32 tensor, whose memory the stand-in shares.
    """
    stand_ins = {p: torch.nn.Parameter(value) for p, value in values.items()}
    for p, stand_in in stand_ins.items():
        stand_in.grad = None if p.grad is None else p.grad.to(torch.float32)
    _swap(base, stand_ins)
    try:
        yield
    finally:
        _swap(base, {stand_in: p for p, stand_in in stand_ins.items()})


def _swap(base: torch.optim.Optimizer, others: Mapping[Tensor, Tensor]) -> None:
    if not others:
        return
    for group in base.param_groups:
        group["params"][:] = [others.get(p, p) for p in group["params"]]
    for p in [p for p in base.state if p in others]:
        base.state[others[p]] = base.state.pop(p)
