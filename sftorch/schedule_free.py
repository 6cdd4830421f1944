"""Schedule-Free around any torch optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfcore import hyperparameters
from sftorch import _checks, _iterates
from sftorch._core import Batch
from sftorch._modes import TrainEvalOptimizer

_BASE = "base."


class ScheduleFreeWrapper(TrainEvalOptimizer):
    """Makes any torch optimizer Schedule-Free: the base steps z, gradients are taken at y (S6: delta is
    whatever the base does to z).

    It is a torch.optim.Optimizer that shares the base's groups, so lr schedulers work on either, and
    keeps the base's state apart. What it adds to a group lies under the one key "schedule_free". Use a
    base without momentum of its own, or with little. For 16-bit parameters the base sees z rounded.

    Args:
        base: the optimizer to wrap, before its first step; its groups must have an "lr".
        momentum: interpolation beta of y = beta x + (1 - beta) z, in [0, 1], default 0.9.
        weight_decay_at_y: decoupled decay taken at y, >= 0, default 0; the base's own is taken at z.
        r: the average weighs step t by t^r, >= 0, default 0.
        weight_lr_power: and by the largest lr so far to this power, >= 0, default 2.
        prior_steps: the initial weights count as the average of this many earlier steps, default 0.

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

    hyperparameters = hyperparameters.Wrapper

    # Keyword-only: schedulefree orders these arguments differently, and a swap would go unnoticed.
    def __init__(
        self,
        base: torch.optim.Optimizer,
        *,
        momentum: float = 0.9,
        weight_decay_at_y: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        prior_steps: int = 0,
    ):
        if not isinstance(base, torch.optim.Optimizer):
            raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
        self.base = base
        self.options = {
            "momentum": momentum,
            "weight_decay_at_y": weight_decay_at_y,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "prior_steps": prior_steps,
        }
        self.param_groups = []
        drawers = [self._drawer(group) for group in base.param_groups]
        for group, drawer in zip(base.param_groups, drawers, strict=True):
            group["schedule_free"] = drawer
        torch.optim.Optimizer.__init__(self, base.param_groups, {})
        self.param_groups = base.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base, in the mode the wrapper is in; everything is checked before."""
        if "schedule_free" in param_group:  # the constructor hands over the base's own groups
            self.param_groups.append(param_group)
            return
        group = _checks.as_group(param_group, self.base.defaults)
        drawer = self._drawer(self.base.defaults | group)
        self.base.add_param_group(group)
        self.base.param_groups[-1]["schedule_free"] = drawer

    def state_dict(self) -> dict[str, Any]:
        """Returns the whole state in torch's shape; the base's entries carry the prefix "base."."""
        packed = super().state_dict()
        packed["state"] = {index: dict(own) for index, own in packed["state"].items()}
        for index, own in self.base.state_dict()["state"].items():
            packed["state"].setdefault(index, {}).update({_BASE + name: value for name, value in own.items()})
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, into the wrapper and into the base."""
        own, base = {}, {}
        for index, values in state_dict["state"].items():
            own[index] = {n: v for n, v in values.items() if not n.startswith(_BASE)}
            inner = {n.removeprefix(_BASE): v for n, v in values.items() if n.startswith(_BASE)}
            if inner:
                base[index] = inner
        self.base.load_state_dict({"state": base, "param_groups": state_dict["param_groups"]})
        super().load_state_dict({"state": own, "param_groups": state_dict["param_groups"]})
        self.param_groups = self.base.param_groups

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"base": self.base, "options": self.options}

    def _drawer(self, group: dict[str, Any]) -> dict[str, Any]:
        if "lr" not in group:
            raise ValueError(f"base must have an lr in its groups, got the options {sorted(group)}")
        return self.options | self._opening_books(group | {"schedule_free": self.options})

    def _values(self, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        drawer = self.books(group)
        shared = {name: drawer[name] for name in ("r", "weight_lr_power", "prior_steps")}
        lr = _checks.as_number(group["lr"]) * group.get("d", 1.0)  # Prodigy and D-Adaptation keep their scale in d
        values = {"lr": lr, "beta": drawer["momentum"], "weight_decay": drawer["weight_decay_at_y"]}
        return shared | values, {"beta": "momentum", "weight_decay": "weight_decay_at_y"}

    def _beta(self, group: dict[str, Any]) -> float:
        return self.books(group)["momentum"]

    def _buffers(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ()

    def _lr_factor(self, group: dict[str, Any], t: int) -> float:
        return 1.0

    def _step_groups(self) -> None:
        active = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, group in active:
            if "z" not in self.state.get(p, {}):
                self._start(p, group)
        y = {p: p.detach().clone() for p, _ in active}
        try:
            for p, _ in active:
                p.copy_(self.state[p]["z"])
            self.base.step()
        except BaseException:
            for p, value in y.items():
                p.copy_(value)
            raise
        for group in self.param_groups:
            lr = self._group_lr(group)
            for batch in self._batches(group, lr):
                self._fold(group, batch, y)
                self._finish_batch(batch)
            self._finish(group, lr)

    def _fold(self, group: dict[str, Any], batch: Batch, y: dict[Tensor, Tensor]) -> None:
        decay = self.books(group)["weight_decay_at_y"]
        for p in batch.params:
            z = self.state[p]["z"]
            # z.to(p.dtype) is what the base started from, so a 16-bit parameter adds no rounding of z.
            moved = p.to(z.dtype) - z.to(p.dtype).to(z.dtype)
            delta = moved - batch.lr_t * decay * y[p].to(z.dtype)  # S6
            p.copy_(y[p])
            _iterates.fold_single_(p, z, delta, batch.c, self._beta(group))
