"""What every Schedule-Free torch optimizer is: checked groups, per-parameter clocks, state that loads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sfcore import checks, hyperparameters
from sftorch import _checks, _describe, _held, _lean, _reconcile, _scalars, _state_dict
from sftorch._compiler import uncompiled, without_compiler
from sftorch._scalars import Clock


class Batch(NamedTuple):
    """Parameters of one group that share clock, device and dtype, with the scalars of their next step.

    Attributes:
        params: those that have a gradient.
        states: their state.
        clock: theirs after the step.
        c: averaging weight of the step.
        lr_t: its step size, with warm-up and rectification.
    """

    params: list[Tensor]
    states: list[dict[str, Any]]
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


class ScheduleFreeOptimizer(torch.optim.Optimizer, ABC):
    """Abstract base: groups and their checks, clocks, metrics, state dict. No step.

    A parameter's clock starts at its first gradient, so its bias correction and its average are its
    own; lr and warm-up belong to the group. `group["k"]`, `["lr_max"]`, `["weight_sum"]` are the
    clock of a parameter that had a gradient in every step, as in schedulefree 1.4.1.
    """

    hyperparameters: ClassVar[type] = hyperparameters.ScheduleFree
    _rest: ClassVar[str] = _held.Y_REST  # of what the parameters hold between steps
    _may_be_lean: ClassVar[bool] = False
    _loaded: _reconcile.Loaded | None = None
    _is_half_restored = False  # by a restore that was interrupted
    _built_lrs: tuple[float, ...] = ()
    _watch: Any = None
    describe = _describe.describe

    def __init__(self, params: ParamsT, defaults: dict[str, Any]):
        super().__init__(_checks.as_groups(params), defaults | new_books())

    @abstractmethod
    def _values(self, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Returns a group's hyperparameters by canonical name, and the names its user knows."""

    @abstractmethod
    def _books(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the dict that holds a group's bookkeeping, and the options that are ours."""

    @abstractmethod
    def _beta(self, group: dict[str, Any]) -> float:
        """Returns the configured interpolation beta."""

    @abstractmethod
    def _lr_factor(self, group: dict[str, Any], t: int) -> float:
        """Returns what multiplies the group's lr at a parameter's time t (RAdam's rect, else 1)."""

    @abstractmethod
    def _buffers(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Returns the names of the state tensors beside z that a parameter of this group needs."""

    @uncompiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, in the mode the optimizer is in; everything is checked before.

        Args:
            param_group: `{"params": ..., option: value, ...}`; missing options take the defaults.

        Raises:
            HyperparameterError: with every option that is out of range or misspelt.
        """
        group = _checks.as_group(param_group, self.defaults, self._params())
        group |= self._opening_books(self.defaults | group)
        without_compiler(torch.optim.Optimizer.add_param_group)(self, group)
        self._note_lr(self.param_groups[-1])

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets all gradients to None, or to zeros in place, as torch's optimizers do."""
        without_compiler(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    def _note_lr(self, group: dict[str, Any]) -> None:
        """Notes what lr a new group was built with; a resume compares it, whatever the run made of lr."""
        self._built_lrs = (*self._built_lrs, float(group["lr"]))

    def _built_lr(self, group: dict[str, Any]) -> float | None:
        """Returns the lr that a group of this optimizer was built with, None if it is not known."""
        index = next(i for i, one in enumerate(self.param_groups) if one is group)
        return self._built_lrs[index] if index < len(self._built_lrs) else None

    def _opening_books(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the books of a group that joins now, after checking its options."""
        values, names = self._values(group)
        found = checks.find_problems(self.hyperparameters, values, names)
        found += _checks.find_group_problems(self._books(group))
        found += _lean.find_problems(self._books(group), values.get("beta"), self._may_be_lean)
        if found:
            raise checks.HyperparameterError(found)
        prior = _scalars.prior_weight(
            values["prior_steps"], values["r"], values["lr"], values["weight_lr_power"]
        )
        in_train_mode = self._books(self.param_groups[0])["train_mode"] if self.param_groups else True
        return new_books() | {"train_mode": in_train_mode, "prior_weight": prior, "weight_sum": prior}

    def _check_settings(self) -> None:
        """Raises if a scheduler or a user has since put nonsense into a group."""
        found = []
        for group in self.param_groups:
            values, names = self._values(group)
            values["prior_steps"] = 0  # that one was weighed at the start; a scheduler may set lr to 0 now
            found += checks.find_problems(self.hyperparameters, values, names)
            found += _checks.find_group_problems(self._books(group))
            found += _lean.find_problems(self._books(group), values.get("beta"), self._may_be_lean)
        if found:
            raise checks.HyperparameterError(found)

    def metrics(self) -> list[dict[str, float]]:
        """Returns what the last step of each group used, for logging.

        Returns:
            One dict a group: `lr` (with warm-up and rectification), `lr_max`, `c` (averaging weight),
            `weight_sum`, `step` (finished updates), `effective_lr` (the multiple of the newest
            direction by which y moved). The keys of `sfjax.metrics`. After `Checkpoints.restore` also
            `restart_steps`, `restart_moved` and `restart_jump`.

        Example:
            >>> import sftorch, torch
            >>> optimizer = sftorch.SGDScheduleFree([torch.nn.Parameter(torch.ones(2))])
            >>> optimizer.metrics()[0]["step"]
            0
        """
        found = []
        restart = self._watch.metrics() if self._watch else {}
        for group in self.param_groups:
            books = self._books(group)
            lr_t, c = books["scheduled_lr"], books["c"]
            of_step = {"lr": lr_t, "lr_max": books["lr_max"], "c": c, "weight_sum": books["weight_sum"]}
            effective = _scalars.effective_lr(lr_t, c, self._beta(group))
            found.append(of_step | {"step": books["k"], "effective_lr": effective} | restart)
        return found

    @uncompiled
    def state_dict(self) -> dict[str, Any]:
        """Returns the state in torch's shape, with what tells apart the weights that x and y are.

        Each started parameter has "x_print" and "y_print", 64-bit prints of the bits of its x and y;
        each group has "shapes" and "weights_hold", "x" or "y", what the parameters hold now.
        """
        return _state_dict.pack(self, without_compiler(torch.optim.Optimizer.state_dict)(self))

    @uncompiled
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of its namesake in schedulefree 1.4.1, as a copy.

        Weights and state can be loaded in any order, and saved in either mode: the optimizer stays in
        the mode it is in and puts into the weights what that mode wants, as soon as it recognises them;
        `train()` and `eval()` raise if they never match. State is never narrowed (torch would cast fp32
        state of a bf16 parameter to bf16), and options that the state dict lacks keep their defaults.

        Raises:
            ValueError: with every name, shape and entry that does not fit; nothing has changed then.
        """
        _state_dict.check(self, state_dict)
        live_mode = self._books(self.param_groups[0])["train_mode"]
        holds = _reconcile.saved_holds(self, state_dict)
        self._load(state_dict)
        self._is_half_restored = False
        _reconcile.accept(self, live_mode, holds)

    def _load(self, state_dict: dict[str, Any]) -> None:
        without_compiler(torch.optim.Optimizer.load_state_dict)(self, state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, p in zip(saved_ids, self._params(), strict=True):
            saved = state_dict["state"].get(index, {})
            for name, value in saved.items():
                if not isinstance(value, Tensor):
                    continue
                dtype = _held.loaded_dtype(name, saved, p)
                if dtype is None:
                    del self.state[p][name]
                else:
                    self.state[p][name] = value.detach().to(device=p.device, dtype=dtype, copy=True)
        for group in self.param_groups:
            for p in self._started(group):
                if "step" not in self.state[p]:
                    self.state[p].update(self._group_clock(group)._asdict())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_loaded": self._loaded, "_built_lrs": self._built_lrs}

    def _wanted(self, group: dict[str, Any]) -> str:
        """Returns what a group's parameters hold in its mode, "x" or "y"."""
        return "x"

    def _is_lean(self, group: dict[str, Any]) -> bool:
        """Tells whether a group's state is kept in the lean form of `_lean`."""
        return False

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _started(self, group: dict[str, Any]) -> list[Tensor]:
        return [p for p in group["params"] if _held.has_started(self.state.get(p, {}))]

    def _start(self, group: dict[str, Any]) -> None:
        """Creates the state of parameters at their first gradient: x = y = z, and a clock at 0."""
        buffers, lean = self._buffers(group), self._is_lean(group)
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not _held.has_started(state):
                state.update(_lean.first(p, lean))
                state.update(Clock(0, 0.0, self._books(group)["prior_weight"])._asdict())
            elif "step" not in state:  # upstream's state has the group's clock only
                state.update(self._group_clock(group)._asdict())
            if lean != ("gap" in state):
                _lean.convert_(state, _held.joined(p, state, self._rest), lean)
            _held.fit_rest(p, state, self._rest)
            for name in buffers:
                if name not in state:
                    like = state["gap" if lean else "z"]
                    state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)

    def _y_beta(self, group: dict[str, Any]) -> float:
        """Returns the beta that built y, which a changed configuration does not change."""
        y_beta: float | None = self._books(group)["y_beta"]
        return self._beta(group) if y_beta is None else y_beta

    def _group_clock(self, group: dict[str, Any]) -> Clock:
        books = self._books(group)
        return Clock(books["k"], books["lr_max"], books["weight_sum"])

    def _group_lr(self, group: dict[str, Any]) -> float:
        """Returns the group's lr with warm-up."""
        values, _ = self._values(group)
        return values["lr"] * _scalars.ramp(self._books(group)["k"] + 1, values.get("warmup_steps", 0))  # S2

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
        # Neighbours mostly share their key: with thousands of small tensors, this loop is much of a step.
        table: dict[tuple[Any, ...], tuple[list[Tensor], list[dict[str, Any]]]] = {}
        last = None
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p]
                key = (state["step"], state["lr_max"], state["weight_sum"], p.dtype, p.device)
                if key != last:
                    params, states = table.setdefault(key, ([], []))
                    last = key
                params.append(p)
                states.append(state)
        for (*clock, _, _), (params, states) in table.items():
            yield Batch(params, states, *self._next(Clock(*clock), group, lr))

    def _finish(self, group: dict[str, Any], lr: float) -> None:
        """Advances the group's own clock by one step."""
        after, c, lr_t = self._next(self._group_clock(group), group, lr)
        self._books(group).update(
            k=after.step, lr_max=after.lr_max, weight_sum=after.weight_sum, scheduled_lr=lr_t, c=c
        )
