"""What every Schedule-Free torch optimizer is: checked groups, per-parameter clocks, state that loads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sfcore import checks, hyperparameters
from sftorch import _checks, _iterates, _scalars
from sftorch._scalars import Clock


class Batch(NamedTuple):
    """Parameters of one group that share clock, device and dtype, and the scalars of their next step."""

    params: list[Tensor]
    clock: Clock
    c: float
    lr_t: float


def new_books() -> dict[str, Any]:
    """Returns the bookkeeping of a new group; the first five names are upstream's."""
    return {
        "k": 0,
        "train_mode": True,
        "weight_sum": 0.0,
        "lr_max": 0.0,
        "scheduled_lr": 0.0,
        "c": 0.0,
        "y_beta": None,
        "prior_weight": 0.0,
    }


def as_real(tensor: Tensor) -> Tensor:
    """Returns a complex tensor as its pairs of reals, which is how the step treats it."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


class ScheduleFreeOptimizer(torch.optim.Optimizer, ABC):
    """Abstract base: groups and their checks, clocks, metrics, state dict. No step.

    A parameter's clock starts at its first gradient, so its bias correction and its average are its
    own; lr and warm-up belong to the group. `group["k"]`, `["lr_max"]`, `["weight_sum"]` are the
    clock of a parameter that had a gradient in every step, as in schedulefree 1.4.1.
    """

    hyperparameters: ClassVar[type] = hyperparameters.ScheduleFree

    def __init__(self, params: Any, defaults: dict[str, Any]):
        super().__init__(_checks.as_list(params), defaults | new_books())

    @abstractmethod
    def _values(self, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Returns a group's hyperparameters by canonical name, and the names its user knows."""

    @abstractmethod
    def _buffers(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Returns the names of the state tensors beside z that a parameter of this group needs."""

    @abstractmethod
    def _lr_factor(self, group: dict[str, Any], t: int) -> float:
        """Returns what multiplies the group's lr at a parameter's time t (RAdam's rect, else 1)."""

    @abstractmethod
    def _beta(self, group: dict[str, Any]) -> float:
        """Returns the configured interpolation beta."""

    @staticmethod
    def books(group: dict[str, Any]) -> dict[str, Any]:
        """Returns a group's bookkeeping: the group itself, or its drawer if the group is a base optimizer's."""
        return group.get("schedule_free", group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, in the mode the optimizer is in; everything is checked before.

        Args:
            param_group: `{"params": ..., option: value, ...}`; missing options take the defaults.

        Raises:
            HyperparameterError: with every option that is out of range or misspelt.
        """
        group = _checks.as_group(param_group, self.defaults)
        group |= self._opening_books(self.defaults | group)
        super().add_param_group(group)

    def _opening_books(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the books of a group that joins now, after checking its hyperparameters."""
        values, names = self._values(group)
        checks.check(self.hyperparameters, values, names)
        prior = _scalars.prior_weight(
            values["prior_steps"], values["r"], values["lr"], values["weight_lr_power"]
        )
        in_train_mode = self.books(self.param_groups[0])["train_mode"] if self.param_groups else True
        return new_books() | {"train_mode": in_train_mode, "prior_weight": prior, "weight_sum": prior}

    def metrics(self) -> list[dict[str, float]]:
        """Returns what the last step of each group used, for logging.

        Returns:
            One dict a group: `lr` (with warm-up and rectification), `lr_max`, `c` (averaging weight),
            `weight_sum`, `step` (finished updates), `effective_lr` (the multiple of the newest
            direction by which y moved). The keys of `sfjax.metrics`.

        Example:
            >>> import sftorch, torch
            >>> optimizer = sftorch.SGDScheduleFree([torch.nn.Parameter(torch.ones(2))])
            >>> optimizer.metrics()[0]["step"]
            0
        """
        found = []
        for group in self.param_groups:
            books, beta = self.books(group), self._beta(group)
            lr_t, c = books["scheduled_lr"], books["c"]
            found.append(
                {
                    "lr": lr_t,
                    "lr_max": books["lr_max"],
                    "c": c,
                    "weight_sum": books["weight_sum"],
                    "step": books["k"],
                    "effective_lr": _scalars.effective_lr(lr_t, c, beta),
                }
            )
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of its namesake in schedulefree 1.4.1.

        State keeps the dtype it was saved in (torch would cast fp32 state of a bf16 parameter to
        bf16); options that the state dict lacks keep their defaults.
        """
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved_ids, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and self.state[p][name].dtype != value.dtype:
                    self.state[p][name] = value.to(device=p.device, copy=True)
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state.get(p, {}):
                    self._set_clock(p, self._clock(p, group))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    def _clock(self, p: Tensor, group: dict[str, Any]) -> Clock:
        """Returns a parameter's clock; state of upstream's has none of its own and takes the group's."""
        state = self.state[p]
        if "step" in state:
            return Clock(state["step"], state["lr_max"], state["weight_sum"])
        return self._group_clock(group)

    def _group_clock(self, group: dict[str, Any]) -> Clock:
        books = self.books(group)
        return Clock(books["k"], books["lr_max"], books["weight_sum"])

    def _set_clock(self, p: Tensor, clock: Clock) -> None:
        self.state[p].update(clock._asdict())

    def _start(self, p: Tensor, group: dict[str, Any]) -> None:
        """Creates a parameter's state at its first gradient: x = y = z, and a clock at 0."""
        wide = torch.promote_types(p.dtype, torch.float32)
        z = p.detach().to(wide, copy=True, memory_format=torch.preserve_format)
        state = self.state[p]
        state["z"] = z
        for name in self._buffers(group):
            state[name] = torch.zeros_like(z, memory_format=torch.preserve_format)
        if self._beta(group) == 0:
            state["x"] = z.clone()
        self._set_clock(p, Clock(0, 0.0, self.books(group)["prior_weight"]))

    def _group_lr(self, group: dict[str, Any]) -> float:
        """Returns the group's lr with warm-up; a scheduler that wrote nonsense is refused here."""
        values, names = self._values(group)
        if not checks.STEP_SIZE.holds(values["lr"]):
            raise checks.HyperparameterError([checks.problem(names["lr"], checks.STEP_SIZE, values["lr"])])
        return values["lr"] * _scalars.ramp(self.books(group)["k"] + 1, group.get("warmup_steps", 0))  # S2

    def _next(self, clock: Clock, group: dict[str, Any], lr: float) -> tuple[Clock, float, float]:
        """Returns the clock after its next step, that step's c, and its lr_t."""
        values, _ = self._values(group)
        lr_t = lr * self._lr_factor(group, clock.step + 1)
        after, c = _scalars.next_scalars(
            clock, lr_t, values["r"], values["weight_lr_power"], values["prior_steps"]
        )
        return after, c, lr_t

    def _batches(self, group: dict[str, Any], lr: float) -> Iterator[Batch]:
        """Yields the parameters that have a gradient, by clock, device and dtype."""
        table: dict[tuple[Clock, torch.device, torch.dtype], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                if "z" not in self.state[p]:
                    self._start(p, group)
                table.setdefault((self._clock(p, group), p.device, p.dtype), []).append(p)
        for (clock, _, _), params in table.items():
            yield Batch(params, *self._next(clock, group, lr))

    def _finish(self, group: dict[str, Any], lr: float) -> None:
        """Advances the group's own clock by one step."""
        after, c, lr_t = self._next(self._group_clock(group), group, lr)
        self.books(group).update(
            k=after.step, lr_max=after.lr_max, weight_sum=after.weight_sum, scheduled_lr=lr_t, c=c
        )

    def _x(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Returns a parameter's x, in z's dtype, while the parameter holds y."""
        state = self.state[p]
        if "x" in state:
            return state["x"]
        return _iterates.recover_x(p, state["z"], self._y_beta(group))

    def _y_beta(self, group: dict[str, Any]) -> float:
        """Returns the beta that built y, which a changed configuration does not change."""
        y_beta = self.books(group)["y_beta"]
        return self._beta(group) if y_beta is None else y_beta
