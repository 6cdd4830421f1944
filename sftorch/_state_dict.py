"""What `state_dict()` notes beside torch's own entries, and what a state dict must be to be loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sftorch import _halves, _held, _prints
from sftorch._parts import is_divided
from sftorch._reconcile import HOLD, PRINTS

if TYPE_CHECKING:
    from sftorch._core import ScheduleFreeOptimizer


# What torch.compile and (Distributed)DataParallel put into parameters' names.
WRAPPERS = ("_orig_mod", "module")


def pack(optimizer: ScheduleFreeOptimizer, packed: dict[str, Any]) -> dict[str, Any]:
    """Returns torch's state dict, as a new one, with prints, shapes and what the weights hold now.

    State that was loaded and is not settled keeps the notes it came with.
    """
    loaded = optimizer._loaded
    pending = loaded if loaded is not None and not loaded.settled else None
    state = {index: dict(values) for index, values in packed["state"].items()}
    groups = [
        # A wrapper's books are a dict of their own in the group.
        {name: dict(value) if isinstance(value, dict) else value for name, value in group.items()}
        for group in packed["param_groups"]
    ]
    for group, live in zip(groups, optimizer.param_groups, strict=True):
        group["shapes"] = [list(p.shape) for p in live["params"]]
        started = optimizer._started(live)
        group[HOLD] = pending.saved[started[0]] if pending and started else optimizer._wanted(live)
        notes = pending.prints if pending else _take(optimizer, live, started)
        for index, p in zip(group["params"], live["params"], strict=True):
            if p in notes:
                state[index].update(zip(PRINTS, notes[p], strict=True))
    return packed | {"state": state, "param_groups": groups}


@torch.no_grad()
def _take(
    optimizer: ScheduleFreeOptimizer, group: dict[str, Any], started: list[Tensor]
) -> dict[Tensor, tuple[int, int]]:
    """Returns the prints of x and y of each parameter that lies whole on its device."""
    whole = [p for p in started if not is_divided(p)]
    flat = _prints.take(iterate for p in whole for iterate in _x_and_y(optimizer, group, p))
    return dict(zip(whole, zip(flat[::2], flat[1::2], strict=True), strict=True))


def _x_and_y(optimizer: Any, group: dict[str, Any], p: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a parameter's x and y in its dtype, in either mode."""
    state = optimizer.state[p]
    if optimizer._wanted(group) == "y":
        return optimizer._x(p, group).to(p.dtype), p
    if "y" in state:
        y = state["y"]
        return p if optimizer._holds_x(p, group) else optimizer._recover_x(p, y, group).to(p.dtype), y
    y = _held.y_from_x(_held.joined(p, state, _held.X_REST), state, optimizer._y_beta(group))
    return p, _halves.split(y, p.dtype)[0]


def check(optimizer: ScheduleFreeOptimizer, state_dict: dict[str, Any]) -> None:
    """Raises unless a state dict fits the optimizer, with every problem at once."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
    if groups is None or "state" not in state_dict:
        raise ValueError(
            f"state_dict must have the keys 'state' and 'param_groups', got {type(state_dict).__name__} "
            "without: pass what optimizer.state_dict() returned"
        )
    live = optimizer.param_groups
    if len(groups) != len(live):
        raise ValueError(
            f"state_dict must have {len(live)} parameter groups like the optimizer, got {len(groups)}: "
            "build the optimizer with the groups it was saved with"
        )
    found = []
    for number, (saved, group) in enumerate(zip(groups, live, strict=True)):
        found += _group_problems(optimizer, number, saved, group, state_dict["state"])
    if found:
        raise ValueError(
            "state_dict does not fit the optimizer; nothing has changed:\n  " + "\n  ".join(found)
        )


def _group_problems(
    optimizer: ScheduleFreeOptimizer, number: int, saved: dict[str, Any], group: dict[str, Any], state: Any
) -> list[str]:
    _, names = optimizer._values(group)
    own = {"k", names["beta"].partition("[")[0]}
    if not own <= optimizer._books(saved).keys():
        return [
            f"group {number} must be of {type(optimizer).__name__} here or in schedulefree, got the keys "
            f"{sorted(saved)}: use sftorch.checkpoint, which carries over what other optimizers share"
        ]
    if len(saved["params"]) != len(group["params"]):
        return [
            f"group {number} must have {len(group['params'])} parameters, got {len(saved['params'])}: "
            "build the model as it was saved"
        ]
    found = []
    # What the saved options ask for; an option that they lack was added later, and asks for nothing.
    buffers = optimizer._buffers(dict.fromkeys(optimizer.defaults, 0) | saved)
    iterates = {"z", "gap"} if optimizer._may_be_lean else {"z"}
    columns = (
        saved["params"],
        group["params"],
        saved.get("shapes"),
        saved.get("param_names"),
        group.get("param_names"),
    )
    rows = zip(*(column or [None] * len(group["params"]) for column in columns), strict=True)
    for place, (index, p, shape, old, new) in enumerate(rows):
        where, values = f"parameter {place} of group {number}", state.get(index, {})
        if old is not None and new is not None and _unwrapped(old) != _unwrapped(new):
            found.append(
                f"{where} must be {new!r}, got {old!r}: pass the parameters in the order they were saved in"
            )
        kept = iterates & values.keys()
        shape = values[min(kept)].shape if kept else shape
        if shape is not None and list(shape) != list(p.shape):
            found.append(f"{where} must have shape {tuple(p.shape)}, got {tuple(shape)}")
        needed = buffers if kept else ("z", *buffers)
        has_started = values.keys() - {"base"}  # some bases (Adagrad) have state before the first step
        lacking = [name for name in needed if name not in values] if has_started else []
        if lacking:
            found.append(
                f"{where} must have the state {lacking[0]!r}, got {sorted(values)}: load the state of an "
                "optimizer of this class, or use sftorch.checkpoint to carry over what is shared"
            )
    return found


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
