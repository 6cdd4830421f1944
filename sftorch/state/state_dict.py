"""A state dict and the weights beside it, in any order: what do the weights hold, and is that what is wanted?

`state_dict()` notes two prints of each started parameter, of its x and of its y. After `load_state_dict`
the weights are compared with them, at once and again at every use, until the first step has been taken.
State without prints (schedulefree's) is believed: its weights hold what its saved mode says.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sftorch.law.parts import is_divided, laid_out_like, note_written, part, parts_of
from sftorch.state import eight, forms, prints
from sftorch.state.compiler import uncompiled, without_compiler
from sftorch.state.groups import GroupedOptimizer
from sftorch.state.meshes import gather_anew, together

PRINTS = ("x_print", "y_print")
HOLD = "weights_hold"
_ASIDE = ("y", *forms.RESTS)
_WORDS = ("gap", *forms.RESTS)  # int16 ones, which neither gloo nor NCCL gathers, are saved as int32
# What torch.compile and (Distributed)DataParallel put into parameters' names.
WRAPPERS = ("_orig_mod", "module")


@dataclass
class Loaded:
    """What is known of the weights between a load and the first step after it.

    Attributes:
        saved: parameter -> "x" or "y", what the weights saved beside the state hold.
        prints: parameter -> (print of x, print of y), where the state has them.
        aside: parameter -> what its state was loaded with: the y of eval mode, and the rests of a 16-bit
            parameter's y and x.
        settled: parameter -> (print, "x" or "y"), what was last found or put there; empty before that.
    """

    saved: dict[Tensor, str] = field(default_factory=dict)
    prints: dict[Tensor, tuple[int, int]] = field(default_factory=dict)
    aside: dict[Tensor, dict[str, Tensor]] = field(default_factory=dict)
    settled: dict[Tensor, tuple[int, str]] = field(default_factory=dict)

    def look(self) -> dict[Tensor, int]:
        """Returns parameter -> print of what it holds now."""
        return dict(zip(self.saved, prints.take(self.saved), strict=True))

    def candidates(self, p: Tensor, found: int) -> set[str]:
        """Returns the iterates that a parameter of this print can be; several where x equals y."""
        as_settled = {self.settled[p][1]} if self.unchanged(p, found) else set()
        if p not in self.prints:
            return as_settled or {self.saved[p]}
        return as_settled | {name for name, known in zip("xy", self.prints[p], strict=True) if known == found}

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

    def reset(self, p: Tensor, found: int, state: dict[str, Any]) -> None:
        """Puts back what was loaded beside other weights than those of a moment ago; both may be x or y."""
        if self.is_as_saved(p, found):
            for name in state.keys() & set(_ASIDE) - self.aside[p].keys():
                del state[name]
            state.update(self.aside[p])


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
        RuntimeError: if they are neither the saved x nor the saved y, or a step was ended midway; nothing has
            changed then.
    """
    if or_raise:
        optimizer._require_whole()
    loaded: Loaded | None = optimizer._loaded
    if loaded is None:
        return
    found = loaded.look()
    held = {p: loaded.held(p, print_) for p, print_ in found.items()}
    strange = [p for p, name in held.items() if name is None]
    try:
        with together(optimizer._params()):
            if strange:
                raise RuntimeError(_neither(optimizer, strange, len(held)))
    except RuntimeError:
        if or_raise:
            raise
        return
    other = [p for p, name in held.items() if name != loaded.saved[p] and not loaded.unchanged(p, found[p])]
    if other:
        name = held[other[0]]
        warnings.warn(
            f"the weights hold {name} in {len(other)} of {len(held)} parameters, but the optimizer's state "
            f"was saved beside weights that hold {loaded.saved[other[0]]}: they are put right. {name} and z "
            "give the other iterate to rounding; save both in the same mode to get the same bits",
            stacklevel=3,
        )
    for group in optimizer.param_groups:
        if train_mode is not None:
            optimizer._books(group)["train_mode"] = train_mode
        for p in optimizer._started(group):
            loaded.reset(p, found[p], optimizer.state[p])
            _put(optimizer, group, p, str(held[p]))
    wanted = {p: optimizer._wanted(group) for group in optimizer.param_groups for p in group["params"]}
    note_written(loaded.saved)
    gather_anew(optimizer, loaded.saved)
    loaded.settled = {p: (print_, wanted[p]) for p, print_ in loaded.look().items()}


def _put(optimizer: ScheduleFreeOptimizer, group: dict[str, Any], p: Tensor, held: str) -> None:
    """Makes a parameter that holds x or y hold what its mode wants; y is put aside where that is x.

    Writes into no tensor of the state: it may be needed again as it was loaded.
    """
    state = parts_of(optimizer.state[p])
    _put_part(optimizer, group, part(p), state, held)
    forms.put_parts_(p, optimizer.state[p], state)


def _put_part(
    optimizer: ScheduleFreeOptimizer, group: dict[str, Any], p: Tensor, state: dict[str, Any], held: str
) -> None:
    """Does it with the part of a DTensor, or a whole parameter."""
    beta = optimizer._y_beta(group)
    y, rests = state.pop("y", None), {name: state[name] for name in forms.RESTS if name in state}
    at_rest = not hasattr(optimizer, "eval")  # the closure forms: x is the parameter itself
    if held == "y":
        y = p.detach().clone(memory_format=torch.preserve_format)
    if held == "y" or (at_rest and y is not None and forms.X_REST not in rests):
        x = forms.x_from_y(forms.joined(y, rests), state, beta)
    else:
        x = forms.joined(p, rests, forms.X_REST)
        if beta == 0 and "x" not in state:
            wide = torch.promote_types(x.dtype, torch.float32)
            state["x"] = x.detach().to(wide, copy=True)
    if at_rest:
        state.pop("x", None)
        p.copy_(_keep(state, p.dtype, forms.X_REST, x))
        return
    if y is None:
        y = _keep(state, p.dtype, forms.Y_REST, forms.y_from_x(x, state, beta))
    state.pop(forms.X_REST, None)
    if optimizer._wanted(group) == "y":
        p.copy_(y)
        return
    if held == "y":
        p.copy_(x)
    state["y"] = y


def _keep(state: dict[str, Any], dtype: torch.dtype, rest: str, value: Tensor) -> Tensor:
    """Returns what a parameter is to hold of a value; its state gets the rest, and keeps no other."""
    for name in forms.RESTS:
        if name != rest:
            state.pop(name, None)
    if value.dtype == dtype:
        return value
    upper, lower = forms.split(value, dtype)
    if lower is not None:
        old = state.get(rest)
        if old is not None and old.dtype is torch.int8:
            lower = eight.with_rest(old, lower)
        state[rest] = lower
    return upper


def _neither(optimizer: ScheduleFreeOptimizer, strange: list[Tensor], total: int) -> str:
    params = ((g, i, p) for g, of in enumerate(optimizer.param_groups) for i, p in enumerate(of["params"]))
    group, place = next((g, i) for g, i, p in params if p is strange[0])
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
    found = loaded.look()
    names = {p: loaded.candidates(p, print_) for p, print_ in found.items()}
    with together(optimizer._params()):
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
        loaded.reset(p, found[p], optimizer.state[p])
        optimizer.state[p].pop("y", None)
    optimizer._loaded = None


def groups_of(state_dict: Any) -> list[dict[str, Any]]:
    """Returns the groups of what must be a state dict."""
    known: dict[str, Any] = state_dict if isinstance(state_dict, dict) else {}
    groups: Any = known.get("param_groups")
    state: Any = known.get("state")
    are_there = isinstance(groups, list) and isinstance(state, dict)
    if not are_there or not all(isinstance(one, dict) for one in (*groups, *state.values())):
        raise ValueError(
            f"state_dict must have the keys 'state' and 'param_groups', got {type(state_dict).__name__} "
            "without: pass what optimizer.state_dict() returned"
        )
    return groups


def check(optimizer: ScheduleFreeOptimizer, state_dict: dict[str, Any]) -> None:
    """Raises unless a state dict fits the optimizer, with every problem at once."""
    groups, live = groups_of(state_dict), optimizer.param_groups
    if len(groups) != len(live):
        raise ValueError(
            f"state_dict must have {len(live)} parameter groups like the optimizer, got {len(groups)}: "
            "build the optimizer with the groups it was saved with"
        )
    found: list[str] = []
    for number, (saved, group) in enumerate(zip(groups, live, strict=True)):
        found += _problems(optimizer, f"group {number}", saved, group, state_dict["state"])
    if found:
        raise ValueError(
            "state_dict does not fit the optimizer; nothing has changed:\n  " + "\n  ".join(found)
        )


def _problems(
    optimizer: ScheduleFreeOptimizer, name: str, saved: dict[str, Any], group: dict[str, Any], state: Any
) -> Iterator[str]:
    own = {"k", optimizer.law.words("torch")["beta"]}
    if "params" not in saved or not own <= optimizer._books(saved).keys():
        yield (
            f"{name} must be of {type(optimizer).__name__} here or in schedulefree, got the keys "
            f"{sorted(saved)}: use sftorch.checkpoint, which carries over what other optimizers share"
        )
        return
    indices, params = saved["params"], group["params"]
    if len(indices) != len(params):
        yield (
            f"{name} must have {len(params)} parameters, got {len(indices)}: build the model as it was saved"
        )
        return
    # What the saved options ask for; an option that they lack was added later, and asks for nothing.
    buffers = optimizer._buffers(dict.fromkeys(optimizer.defaults, 0) | saved)
    iterates = {"z", "gap"} if optimizer._may_be_lean else {"z"}
    notes = (saved.get("shapes"), saved.get("param_names"), group.get("param_names"))
    columns = (column or [None] * len(params) for column in notes)
    for place, (index, p, shape, old, new) in enumerate(zip(indices, params, *columns, strict=True)):
        where, values = f"parameter {place} of {name}", state.get(index, {})
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        if old is not None and new is not None and _unwrapped(old) != _unwrapped(new):
            yield f"{where} must be {new!r}, got {old!r}: pass the parameters in the order they were saved in"
        kept = iterates & tensors.keys()
        shape = tensors[min(kept)].shape if kept else shape
        if shape is not None and list(shape) != list(p.shape):
            yield f"{where} must have shape {tuple(p.shape)}, got {tuple(shape)}"
        has_started = values.keys() - {"base"}  # some bases (Adagrad) have state before the first step
        needed = buffers if kept else ("z", *buffers)
        gap = tensors.get("gap")
        needed = (*needed, eight.SCALE) if gap is not None and not gap.is_floating_point() else needed
        lacking = [one for one in needed if one not in tensors] if has_started else []
        if lacking:
            yield (
                f"{where} must have the state {lacking[0]!r}, got {sorted(values)}: load the state of an "
                "optimizer of this class, or use sftorch.checkpoint to carry over what is shared"
            )


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class ScheduleFreeOptimizer(GroupedOptimizer):
    """Abstract: groups whose state is saved and loaded, beside weights that are saved in either mode."""

    _loaded: Loaded | None = None
    _is_half_restored = False  # by a restore that was interrupted
    _is_half_stepped = False  # in a step, or by one that an interrupt or an error has ended
    _plan: Any = None  # of the last step, if it may do for the next
    # Parameters that took the coming step in backward already; None without `step_in_backward`.
    _ahead: set[Tensor] | None = None

    @uncompiled
    def state_dict(self) -> dict[str, Any]:
        """Returns the state in torch's shape, with what tells apart the weights that x and y are.

        Each started parameter has "x_print" and "y_print", 64-bit prints of the bits of its x and y;
        each group has "shapes" and "weights_hold", "x" or "y", what the parameters hold now.
        """
        self._require_whole()
        packed: dict[str, Any] = without_compiler(torch.optim.Optimizer.state_dict)(self)
        # What was loaded and is not settled keeps the notes it came with.
        pending = self._loaded if self._loaded is not None and not self._loaded.settled else None
        state = {index: dict(values) for index, values in packed["state"].items()}
        groups = [
            # A wrapper's books are a dict of their own in the group.
            {name: dict(value) if isinstance(value, dict) else value for name, value in group.items()}
            for group in packed["param_groups"]
        ]
        known = {} if pending else self._prints()
        for group, live in zip(groups, self.param_groups, strict=True):
            group["shapes"] = [list(p.shape) for p in live["params"]]
            started = self._started(live)
            group[HOLD] = pending.saved[started[0]] if pending and started else self._wanted(live)
            notes = pending.prints if pending else known
            for index, p in zip(group["params"], live["params"], strict=True):
                if p in notes:
                    state[index].update(zip(PRINTS, notes[p], strict=True))
                for name in set(_WORDS) & state.get(index, {}).keys():
                    value = state[index][name]
                    if is_divided(value) and value.dtype == torch.int16:
                        state[index][name] = value.to(torch.int32)
        return packed | {"state": state, "param_groups": groups}

    @torch.no_grad()
    def _prints(self) -> dict[Tensor, tuple[int, int]]:
        """Returns the prints of x and y of each started parameter."""
        owned = [(p, group) for group in self.param_groups for p in self._started(group)]
        flat = prints.take(iterate for p, group in owned for iterate in self._x_and_y(p, group))
        return {
            p: notes for (p, _), notes in zip(owned, zip(flat[::2], flat[1::2], strict=True), strict=True)
        }

    def _x_and_y(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns the x and y, in its dtype, of a parameter that holds x."""
        state = self.state[p]
        y = forms.y_from_x(forms.joined(p, state, forms.X_REST), state, self._y_beta(group))
        return p, forms.split(y, p.dtype)[0]

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
        with together(self._params()):
            check(self, state_dict)
        live_mode = self._books(self.param_groups[0])["train_mode"]
        with together(self._params()):
            self._load(state_dict)
        self._agrees = False
        self._is_half_restored = False
        loaded = Loaded()
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            # schedulefree's closure forms have no mode
            hold = saved.get(HOLD, "y" if self._books(saved).get("train_mode") else "x")
            books = self._books(group)
            books["train_mode"] = live_mode
            values, _ = self._values(group)
            if values["beta_rule"] != "constant" and "beta_rule" not in self._books(saved):
                books["y_beta"] = books["y_beta"] or values["beta"]  # no rule built that y
            for note in (HOLD, "shapes"):
                group.pop(note, None)
            for p in self._started(group):
                state = self.state[p]
                notes = tuple(state.pop(key, None) for key in PRINTS)
                if None not in notes:
                    loaded.prints[p] = notes
                loaded.saved[p] = hold
                loaded.aside[p] = {name: state[name] for name in _ASIDE if name in state}
        self._loaded = loaded if loaded.saved else None
        settle(self, or_raise=False)

    def _load(self, state_dict: dict[str, Any]) -> None:
        self._forget_step()
        without_compiler(torch.optim.Optimizer.load_state_dict)(self, state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, p in zip(saved_ids, self._params(), strict=True):
            saved = state_dict["state"].get(index, {})
            for name, value in saved.items():
                if not isinstance(value, Tensor):
                    continue
                # y is the parameter itself, put aside in eval mode; all else is at least float32, but in the
                # lean form.
                stays = name in _ASIDE or "gap" in saved
                dtype = value.dtype if stays else torch.promote_types(value.dtype, torch.float32)
                if name in _WORDS and dtype == torch.int32:  # of a state in parts
                    dtype = torch.int16
                value = value.detach().to(device=p.device, dtype=dtype, copy=True)
                is_cut = value.shape == p.shape or name == eight.SCALE
                self.state[p][name] = laid_out_like(p, value) if is_cut else value
                fits = dtype == (torch.int8 if eight.SCALE in saved else forms.rest_dtype(p.dtype))
                if name in forms.RESTS and not fits:
                    del self.state[p][name]  # it belongs to weights of another dtype, which these are not
        for group in self.param_groups:
            for p in self._started(group):
                if "step" not in self.state[p]:
                    self.state[p].update(self._group_clock(group)._asdict())

    def _begin(self) -> None:
        """Raises unless gradients are, or will be, taken where the step needs them."""

    def _require_whole(self) -> None:
        """Raises if the last step has not come to its end."""
        if self._is_half_stepped:
            without = "; optimizer.rebase() goes on without, from the weights as they are"
            raise RuntimeError(
                "weights and state must be of one step, got those of a step that an interrupt or an error "
                "ended midway: restore the last checkpoint, or load the weights and the state that were "
                f"saved last{without if hasattr(self, 'rebase') else ''}"
            )

    def _forget_step(self) -> None:
        """Forgets what was known of the coming step: other state has come in its place."""
        self._plan = None
        self._is_half_stepped = False
        if self._ahead is not None:
            self._ahead.clear()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_built_lrs", "_loaded", "_is_half_stepped")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}


def check_optimizer(optimizer: Any) -> None:
    """Raises unless this is one of ours."""
    if not isinstance(optimizer, ScheduleFreeOptimizer):
        raise TypeError(
            f"optimizer must be one of sftorch's, got {type(optimizer).__name__}: pass it after the model; "
            "sftorch.trainers.unwrap gives the one inside a trainer's wrapper"
        )
