"""A state dict and the weights beside it, in any order: what do the weights hold, and is that what is wanted?

`state_dict()` notes two prints of each started parameter, of its x and of its y. After `load_state_dict`
the weights are compared with them, at once and again at every use, until the first step has been taken.
State without prints (schedulefree's, or of DTensors, which are stored in parts) is believed: its
weights hold what its saved mode says.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sftorch import _halves, _held, _prints
from sftorch._compiler import uncompiled
from sftorch._parts import part

if TYPE_CHECKING:
    from sftorch._core import ScheduleFreeOptimizer

PRINTS = ("x_print", "y_print")
HOLD = "weights_hold"


@dataclass
class Loaded:
    """What is known of the weights between a load and the first step after it.

    Attributes:
        saved: parameter -> "x" or "y", what the weights saved beside the state hold.
        prints: parameter -> (print of x, print of y), where the state has them.
        y: parameter -> the saved y, where the state was saved in eval mode.
        rests: parameter -> the saved rests of a 16-bit parameter's y and x, as far as the state has them.
        settled: parameter -> (print, "x" or "y"), what was last found or put there; empty before that.
    """

    saved: dict[Tensor, str] = field(default_factory=dict)
    prints: dict[Tensor, tuple[int, int]] = field(default_factory=dict)
    y: dict[Tensor, Tensor] = field(default_factory=dict)
    rests: dict[Tensor, dict[str, Tensor]] = field(default_factory=dict)
    settled: dict[Tensor, tuple[int, str]] = field(default_factory=dict)

    def candidates(self, p: Tensor, found: int) -> set[str]:
        """Returns the iterates that a parameter of this print can be; several where x equals y."""
        if p not in self.prints:
            return {self.settled[p][1]} if self.unchanged(p, found) else {self.saved[p]}
        same = {name for name, known in zip("xy", self.prints[p], strict=True) if known == found}
        return same | ({self.settled[p][1]} if self.unchanged(p, found) else set())

    def held(self, p: Tensor, found: int) -> str | None:
        """Returns which iterate a parameter of this print holds; None if it is neither."""
        names = self.candidates(p, found)
        expected = self.saved[p] if self.is_as_saved(p, found) else self.settled[p][1]
        return expected if expected in names else next(iter(names), None)

    def unchanged(self, p: Tensor, found: int) -> bool:
        """Tells whether a parameter is what it was when it was last settled."""
        return p in self.settled and self.settled[p][0] == found

    def is_as_saved(self, p: Tensor, found: int) -> bool:
        """Tells whether the state as it was loaded belongs to a parameter, and not what was made of it."""
        return not self.unchanged(p, found) or (p in self.prints and self.prints[p][1] == found)


def saved_holds(optimizer: ScheduleFreeOptimizer, state_dict: dict[str, Any]) -> list[str]:
    """Returns what the weights saved beside each group hold; schedulefree's closure forms have no mode."""
    return [
        group.get(HOLD, "y" if optimizer._books(group).get("train_mode") else "x")
        for group in state_dict["param_groups"]
    ]


def accept(optimizer: ScheduleFreeOptimizer, live_mode: bool, holds: list[str]) -> None:
    """Takes the notes out of state that has just been loaded, sets the live mode, and tries to settle."""
    loaded = Loaded()
    for group, hold in zip(optimizer.param_groups, holds, strict=True):
        optimizer._books(group)["train_mode"] = live_mode
        for note in (HOLD, "shapes"):
            group.pop(note, None)
        for p in optimizer._started(group):
            state = optimizer.state[p]
            notes = tuple(state.pop(key, None) for key in PRINTS)
            if None not in notes:
                loaded.prints[p] = notes
            loaded.saved[p] = hold
            if "y" in state:
                loaded.y[p] = state["y"]
            loaded.rests[p] = _rests(state)
    optimizer._loaded = loaded if loaded.saved else None
    settle(optimizer, or_raise=False)


# An evaluation may settle; what it makes in inference mode, the next step could not write to.
@uncompiled
@torch.inference_mode(False)
@torch.no_grad()
def settle(optimizer: ScheduleFreeOptimizer, train_mode: bool | None = None, or_raise: bool = True) -> None:
    """Finds out what loaded weights hold, and puts in what the mode wants.

    Args:
        optimizer: of any class.
        train_mode: the mode to go to, None for the one it is in.
        or_raise: False leaves weights that are neither as they are.

    Raises:
        RuntimeError: if they are neither the saved x nor the saved y; nothing has changed then.
    """
    loaded: Loaded | None = optimizer._loaded
    if loaded is None:
        return
    found = dict(zip(loaded.saved, _prints.take(part(p.detach()) for p in loaded.saved), strict=True))
    held = {p: loaded.held(p, print_) for p, print_ in found.items()}
    strange = [p for p, name in held.items() if name is None]
    if strange:
        if or_raise:
            raise RuntimeError(_neither(optimizer, strange, len(held)))
        return
    _warn(loaded, held, found)
    for group in optimizer.param_groups:
        if train_mode is not None:
            optimizer._books(group)["train_mode"] = train_mode
        for p in optimizer._started(group):
            if loaded.is_as_saved(p, found[p]):
                _reset(optimizer.state[p], loaded, p)
            _put(optimizer, group, p, str(held[p]))
    now = _prints.take(part(p.detach()) for p in loaded.saved)
    wanted = {p: optimizer._wanted(group) for group in optimizer.param_groups for p in group["params"]}
    loaded.settled = {p: (print_, wanted[p]) for p, print_ in zip(loaded.saved, now, strict=True)}


def _rests(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: state[name] for name in _held.RESTS if name in state}


def _reset(state: dict[str, Any], loaded: Loaded, p: Tensor) -> None:
    """Puts back what was loaded beside other weights than those of a moment ago; both may be x or y."""
    saved = loaded.rests[p] | ({"y": loaded.y[p]} if p in loaded.y else {})
    for name in ("y", *_held.RESTS):
        if name not in saved:
            state.pop(name, None)
    state.update(saved)


def _put(optimizer: ScheduleFreeOptimizer, group: dict[str, Any], p: Tensor, held: str) -> None:
    """Makes a parameter that holds x or y hold what its mode wants; y is put aside where that is x.

    Writes into no tensor of the state: it may be needed again as it was loaded.
    """
    state, beta = optimizer.state[p], optimizer._y_beta(group)
    y, rests = state.pop("y", None), _rests(state)
    at_rest = not hasattr(optimizer, "eval")  # the closure forms: x is the parameter itself
    if held == "y":
        y = p.detach().clone(memory_format=torch.preserve_format)
    if held == "y" or (at_rest and y is not None and _held.X_REST not in rests):
        x = _held.x_from_y(_held.joined(y, rests), state, beta)
    else:
        x = _held.joined(p, rests, _held.X_REST)
        if beta == 0 and "x" not in state:
            wide = torch.promote_types(x.dtype, torch.float32)
            state["x"] = x.detach().to(wide, copy=True)
    if at_rest:
        state.pop("x", None)
        p.copy_(_keep(state, p.dtype, _held.X_REST, x))
        return
    if y is None:
        y = _keep(state, p.dtype, _held.Y_REST, _held.y_from_x(x, state, beta))
    state.pop(_held.X_REST, None)
    if optimizer._wanted(group) == "y":
        p.copy_(y)
        return
    if held == "y":
        p.copy_(x)
    state["y"] = y


def _keep(state: dict[str, Any], dtype: torch.dtype, rest: str, value: Tensor) -> Tensor:
    """Returns what a parameter is to hold of a value; its state gets the rest, and keeps no other."""
    for name in _held.RESTS:
        if name != rest:
            state.pop(name, None)
    if value.dtype == dtype:
        return value
    upper, lower = _halves.split(value, dtype)
    if lower is not None:
        state[rest] = lower
    return upper


def _warn(loaded: Loaded, held: dict[Tensor, str | None], found: dict[Tensor, int]) -> None:
    other = [p for p, name in held.items() if name != loaded.saved[p] and not loaded.unchanged(p, found[p])]
    if other:
        name = held[other[0]]
        warnings.warn(
            f"the weights hold {name} in {len(other)} of {len(held)} parameters, but the optimizer's state "
            f"was saved beside weights that hold {loaded.saved[other[0]]}: they are put right. {name} and z "
            "give the other iterate to rounding; save both in the same mode to get the same bits",
            stacklevel=4,
        )


def _neither(optimizer: ScheduleFreeOptimizer, strange: list[Tensor], total: int) -> str:
    places = {
        p: (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])
    }
    group, place = places[strange[0]]
    return (
        "weights must be the x or the y of the loaded optimizer state, got others in "
        f"{len(strange)} of {total} parameters, the first at index {place} of group {group} with shape "
        f"{tuple(strange[0].shape)}: load the weights that were saved with it (and pass the "
        "parameters in the same order), or call optimizer.rebase() to take the weights as they are for x, y "
        "and z"
    )


@uncompiled
@torch.no_grad()
def before_step(optimizer: ScheduleFreeOptimizer) -> None:
    """Checks that the first step after a load has its gradient at y, and ends the watch.

    Raises:
        RuntimeError: if the weights hold something else; nothing has moved then.
    """
    loaded: Loaded | None = optimizer._loaded
    if loaded is None:
        return
    found = dict(zip(loaded.saved, _prints.take(part(p.detach()) for p in loaded.saved), strict=True))
    names = {p: loaded.candidates(p, print_) for p, print_ in found.items()}
    strange = [p for p, candidates in names.items() if not candidates]
    if strange:
        raise RuntimeError(_neither(optimizer, strange, len(names)))
    at_x = [p for p, candidates in names.items() if "y" not in candidates]
    if at_x:
        raise RuntimeError(
            f"weights must hold y in the first step after load_state_dict, got x in {len(at_x)} of "
            f"{len(names)} parameters: call optimizer.train() after loading the weights and before the "
            "forward pass, and take the gradient anew"
        )
    for p in names:
        if loaded.is_as_saved(p, found[p]):
            _reset(optimizer.state[p], loaded, p)
        optimizer.state[p].pop("y", None)
    optimizer._loaded = None
