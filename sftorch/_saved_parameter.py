"""One parameter of a checkpoint under the live optimizer: its value, state and gradient, as new tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfcore._iterates import beta_of
from sfcore.changes import comparable
from sfcore.meta import Meta
from sftorch import _arrays, _changes
from sftorch._capture import CLOCK, ROLES, kind_of
from sftorch.law.scalars import Clock
from sftorch.state import forms
from sftorch.state.modes import TrainEvalOptimizer
from sftorch.state.state_dict import ScheduleFreeOptimizer


def placed(array: np.ndarray, like: Tensor) -> Tensor:
    """Returns an array as a tensor on another tensor's device, with its strides."""
    host = _arrays.to_tensor(array)
    new = torch.empty_like(like, dtype=host.dtype, requires_grad=False)
    return new.copy_(host)


@dataclass
class Saved:
    """One parameter of a checkpoint, to be put under a live optimizer.

    Attributes:
        group: the live one that holds it.
        saved: the record of the group that it was saved in.
        beta: of the live group, what its y must be built with.
    """

    optimizer: ScheduleFreeOptimizer
    meta: Meta
    arrays: Mapping[str, np.ndarray]
    group: dict[str, Any]
    saved: dict[str, Any]
    beta: float
    p: Tensor
    name: str

    def state_and_value(self) -> tuple[dict[str, Any], Tensor]:
        """Returns the new state, {} if it had not started, and what the parameter is to hold."""
        clock = self.meta.parameters[self.name]["clock"]
        held = placed(self.arrays[f"y/{self.name}"], self.p)
        return ({}, held.to(self.p.dtype)) if clock is None else self._started(clock, held)

    def fresh(self) -> set[str]:
        """Returns what starts anew although the parameter had started: "v", "m"."""
        if self.meta.parameters[self.name]["clock"] is None:
            return set()
        roles = {ROLES[key] for key in self.optimizer._buffers(self.group)}
        return {role for role in roles if f"{role}/{self.name}" not in self.arrays}

    def gradient(self) -> Tensor | None:
        """Returns the gradient accumulated so far, None if there was none."""
        saved = self.arrays.get(f"grad/{self.name}")
        return None if saved is None else placed(saved, self.p)

    def base_state(self) -> dict[str, Any]:
        """Returns the state in a wrapper's base, {} if that is another optimizer now."""
        name = type(self.optimizer.base).__name__  # type: ignore[attr-defined]
        if self.saved.get("torch", {}).get("base") != name:
            return {}
        on_device = self.group.get("capturable") or self.group.get("fused")
        state = _arrays.decode(self.meta.parameters[self.name].get("base", {}), self.arrays)
        for key, value in state.items():
            # torch keeps its step counters on the host unless the whole step runs on the device.
            if isinstance(value, Tensor) and (key != "step" or on_device):
                # Earlier versions let the base step 16-bit parameters themselves.
                narrow = value.dtype == self.p.dtype and forms.rest_dtype(value.dtype) is not None
                state[key] = value.to(self.p.device, torch.float32 if narrow else None)
        return state

    def _started(self, clock: Mapping[str, Any], held: Tensor) -> tuple[dict[str, Any], Tensor]:
        state = {
            key: placed(self.arrays[f"{role}/{self.name}"], self.p)
            for key, role in ROLES.items()
            if f"{role}/{self.name}" in self.arrays
        }
        held = self._converted(state, held)
        needed = self.optimizer._buffers(self.group)
        new_v = "v" in self.fresh()
        same = comparable(self.meta.optimizer, kind_of(self.optimizer))
        values = _changes.values_of(self.optimizer, self.group, self.saved)
        before = Clock(*(clock[key] for key in CLOCK))
        after = _changes.carry(before, self.saved["hyperparameters"], values, same, new_v)
        value, rest = (held, None) if held.dtype == self.p.dtype else forms.split(held, self.p.dtype)
        rests = {} if rest is None else {self.optimizer._rest: rest}
        kept = "gap" if "gap" in state else "z"
        iterate = state[kept]
        # In the order in which a first step makes them.
        buffers = {key: state[key] if key in state else torch.zeros_like(iterate) for key in needed}
        stored = {k: state[k] for k in ("x",) if k in state}
        state = {kept: iterate, **after._asdict(), **rests, **buffers, **stored}
        if (
            isinstance(self.optimizer, TrainEvalOptimizer)
            and not self.optimizer._books(self.group)["train_mode"]
        ):
            state["y"], value = value, forms.x_from_y(held, state, self.beta).to(self.p.dtype)
        return state, value

    def _converted(self, state: dict[str, Any], held: Tensor) -> Tensor:
        """Returns in full what the parameter holds at rest; the closure forms hold x, the others y."""
        beta = beta_of(self.saved)
        holds_x, wants_x = self.meta.weights_hold == "x", not isinstance(self.optimizer, TrainEvalOptimizer)
        lean = self.optimizer._is_lean(self.group)
        if not holds_x:
            if not wants_x and beta != self.beta:
                held = self._rebuilt(state, held, beta)
            forms.convert_(state, held, lean)
        elif not wants_x:
            if self.beta == 0:
                state["x"] = held.to(state["z"].dtype)
            held = forms.y_from_x(held, state, self.beta)
            forms.convert_(state, held, lean)
        if wants_x and not holds_x:
            held = forms.x_from_y(held, state, beta)
        if wants_x:
            state.pop("x", None)
        return held

    def _rebuilt(self, state: dict[str, Any], held: Tensor, beta: float) -> Tensor:
        """Returns the y that the live group's beta makes where its own group had another, so that x stays."""
        forms.convert_(state, held, False)
        x = forms.x_from_y(held, state, beta)
        state.pop("x", None)
        if self.beta == 0:
            state["x"] = x
        return forms.y_from_x(x, state, self.beta)
