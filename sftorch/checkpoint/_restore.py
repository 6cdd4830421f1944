"""From a verified checkpoint to live state: everything is built and checked first, then put in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfcore import changes
from sfcore.averaging import beta_after
from sfcore.changes import comparable
from sfcore.exchange import CheckpointError
from sfcore.iterates import beta_of
from sfcore.meta import Meta
from sftorch.checkpoint import _arrays, _changes, _parts
from sftorch.checkpoint._record import (
    MODEL_EXTRA,
    is_extra_state,
    parameter_names,
    put_extra_state,
    roles,
    unwrapped,
)
from sftorch.law.parts import like, note_written, part
from sftorch.schedule_free import ScheduleFreeWrapper
from sftorch.state import eight, forms
from sftorch.state.groups import new_books
from sftorch.state.meshes import row_groups
from sftorch.state.modes import TrainEvalOptimizer
from sftorch.state.state_dict import ScheduleFreeOptimizer


def placed(array: np.ndarray, like: Tensor) -> Tensor:
    """Returns an array as a tensor with another one's device and strides, if it can be in its own memory."""
    host = _arrays.to_tensor(array)
    is_all = array.base is None or array.base.nbytes == array.nbytes  # else it would keep more than its own
    if is_all and like.device.type == "cpu" and host.stride() == like.stride() and not like.is_neg():
        return host
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
        """Returns the new state, {} if it had not started, and what the parameter('s part) is to hold."""
        clock = self.meta.parameters[self.name]["clock"]
        held = self._placed(f"y/{self.name}")
        if clock is None:
            return {}, held.to(self.p.dtype)
        state, value = self._started(clock, held)
        return {
            key: like(self.p, one, key == eight.SCALE)
            if isinstance(one, Tensor) and key not in self._of_rows()
            else one
            for key, one in state.items()
        }, value

    def _placed(self, leaf: str) -> Tensor:
        if leaf.partition("/")[0] in self._of_rows().values():  # whole on every process
            return _arrays.to_tensor(np.asarray(self.arrays[leaf])).to(self.p.device)
        if leaf.startswith(f"{eight.SCALE}/"):
            rows = _parts.rows_taken(self.arrays[leaf], self.p)
            return _arrays.to_tensor(rows).to(self.p.device)
        return placed(_parts.taken(self.arrays[leaf], self.p), part(self.p.detach()))

    def _of_rows(self) -> dict[str, str]:
        """Returns the name in a state -> role of the buffers that are one number a row."""
        return {one.torch: one.role for one in self.optimizer.law.buffers if one.of_rows}

    def fresh(self) -> set[str]:
        """Returns what starts anew although the parameter had started: "v", "m"."""
        if self.meta.parameters[self.name]["clock"] is None:
            return set()
        kept = roles()
        needed = {kept[key] for key in self.optimizer._buffers(self.group)}
        return {role for role in needed if not self._has(role)}

    def _has(self, role: str) -> bool:
        """Tells whether the checkpoint has this of the parameter, in the shape that is kept now."""
        array = self.arrays.get(f"{role}/{self.name}")
        buffer = next((one for one in self.optimizer.law.buffers if one.role == role), None)
        if array is None or buffer is None or not buffer.of_rows:
            return array is not None
        return tuple(array.shape) == buffer.shape(self.p.shape, self.optimizer._values(self.group)[0])

    def gradient(self) -> Tensor | None:
        """Returns the gradient accumulated so far, None if there was none."""
        leaf = f"grad/{self.name}"
        return like(self.p, self._placed(leaf)) if leaf in self.arrays else None

    def base_state(self) -> dict[str, Any]:
        """Returns the state in a wrapper's base, {} if that is another optimizer now."""
        name = type(self.optimizer.base).__name__  # type: ignore[attr-defined]
        if self.saved.get("torch", {}).get("base") != name:
            return {}
        on_device = self.group.get("capturable") or self.group.get("fused")
        start = f"base/{self.name}/"
        leaves = [leaf for leaf in self.arrays if leaf.startswith(start)]
        alike = {leaf for leaf in leaves if self.arrays[leaf].shape == tuple(self.p.shape)} - {f"{start}step"}
        arrays = {
            leaf: _parts.taken(self.arrays[leaf], self.p) if leaf in alike else np.asarray(self.arrays[leaf])
            for leaf in leaves
        }
        state = _arrays.decode(self.meta.parameters[self.name].get("base", {}), arrays)
        for key, value in state.items():
            # torch keeps its step counters on the host unless the whole step runs on the device.
            if isinstance(value, Tensor) and (key != "step" or on_device):
                # Earlier versions let the base step 16-bit parameters themselves.
                narrow = value.dtype == self.p.dtype and forms.rest_dtype(value.dtype) is not None
                moved = value.to(self.p.device, torch.float32 if narrow else None)
                state[key] = like(self.p, moved) if f"{start}{key}" in alike else moved
        return state

    def _started(self, clock: Mapping[str, Any], held: Tensor) -> tuple[dict[str, Any], Tensor]:
        state = {key: self._placed(f"{role}/{self.name}") for key, role in roles().items() if self._has(role)}
        held = self._converted(state, held)
        needed = self.optimizer._buffers(self.group)
        anew = bool(self.fresh() & {one.role for one in self.optimizer.law.buffers if not one.when})
        same = comparable(self.meta.optimizer, self.optimizer.law.name)
        values = _changes.values_of(self.optimizer, self.group, self.saved)
        after = _changes.carry(clock, self.saved["hyperparameters"], values, same, anew)
        value, rest = (held, None) if held.dtype == self.p.dtype else forms.split(held, self.p.dtype)
        rests = {} if rest is None else {self.optimizer._rest: rest}
        kept = "gap" if "gap" in state else "z"
        iterate = state[kept]
        # In the order in which a first step makes them.
        buffers = {
            key: state[key] if key in state else self.optimizer._new_buffer(key, iterate, self.group)
            for key in needed
        }
        stored = {k: state[k] for k in ("x", eight.SCALE) if k in state}
        state = {kept: iterate, **after._asdict(), **rests, **buffers, **stored}
        if self.optimizer._form(self.p, self.group) == forms.EIGHT:
            eight.pack_(state)  # with the rest of y, which is there only now
            if not row_groups(self.p):  # else the first step does it, in which all processes take part
                forms.convert_(self.p, state, held, forms.EIGHT)
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
        form = self.optimizer._form(self.p, self.group)
        if form == forms.EIGHT:
            stays = beta == self.beta and forms.is_in_codes(state, self.optimizer._buffers(self.group))
            form = forms.EIGHT if stays else forms.EXACT
        if not holds_x:
            if not wants_x and beta != self.beta:
                held = self._rebuilt(state, held, beta)
            forms.convert_(self.p, state, held, form)
        elif not wants_x:
            if self.beta == 0:
                state["x"] = held.to(state["z"].dtype)
            held = forms.y_from_x(held, state, self.beta)
            forms.convert_(self.p, state, held, form)
        if wants_x and not holds_x:
            held = forms.x_from_y(held, state, beta)
        if wants_x:
            state.pop("x", None)
        return held

    def _rebuilt(self, state: dict[str, Any], held: Tensor, beta: float) -> Tensor:
        """Returns the y that the live group's beta makes where its own group had another, so that x stays."""
        forms.convert_(self.p, state, held, forms.EXACT)
        x = forms.x_from_y(held, state, beta)
        state.pop("x", None)
        if self.beta == 0:
            state["x"] = x
        return forms.y_from_x(x, state, self.beta)


@dataclass
class Plan:
    """New values, ready to be put in place; nothing in it shares memory with live state."""

    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (live, new, its part)
    states: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    base_states: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    gradients: dict[Tensor, Tensor | None] = field(default_factory=dict)
    books: list[dict[str, Any]] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)
    model_extra: dict[str, Any] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)  # what starts anew


def check_model(
    path: Path, meta: Meta, arrays: Mapping[str, np.ndarray], model: nn.Module, names: Mapping[Tensor, str]
) -> None:
    """Raises unless names, shapes and dtypes agree, with every problem at once."""
    live: dict[str, Tensor] = {f"y/{name}": p for p, name in names.items()}
    for entry, value in unwrapped(model).state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and value not in names and not is_extra_state(entry):
            live[f"buffer/{entry}"] = value
    saved = {leaf for leaf in arrays if leaf.startswith(("y/", "buffer/"))}
    found = [
        f"{leaf!r} must be in the checkpoint, got none of that name"
        for leaf in live
        # BatchNorm's counter has no counterpart in Flax and keeps its live value.
        if leaf not in saved and not leaf.endswith(".num_batches_tracked")
    ]
    found += [
        f"{leaf!r} must be in the model and its optimizer, got none of that name"
        for leaf in sorted(saved - live.keys())
    ]
    found += [
        f"{leaf!r} must have elements of its own in the model, got an expanded view: register tensor.clone()"
        for leaf, tensor in live.items()
        if tensor.layout == torch.strided
        and any(size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    ]
    for leaf in live.keys() & saved:
        role, _, name = leaf.partition("/")
        about = meta.parameters.get(name, {}) if role == "y" else {}
        for what, here, there in (
            ("shape", tuple(live[leaf].shape), arrays[leaf].shape),
            # The y of a 16-bit parameter is stored in full.
            ("dtype", _arrays.name_of(live[leaf].dtype), about.get("dtype", arrays[leaf].dtype.name)),
        ):
            if here != there:
                found.append(
                    f"{leaf!r} must have the {what} {there} of the checkpoint, got {here} in the model"
                )
    if found:
        raise CheckpointError(
            f"{path} does not fit the model; nothing has changed. Build the model and the optimizer "
            "as they were saved, or start from the weights alone with resume='weights:PATH':\n  "
            + "\n  ".join(sorted(found))
        )


# Restored for an evaluation in inference mode, the state must still be one that a step can write to.
@torch.inference_mode(False)
@torch.no_grad()
def plan(
    path: Path,
    meta: Meta,
    arrays: Mapping[str, np.ndarray],
    model: nn.Module,
    optimizer: ScheduleFreeOptimizer,
) -> tuple[Plan, list[changes.Change]]:
    """Builds the new state on the parameters' devices and the table of differences; changes nothing.

    Raises:
        CheckpointError: if the checkpoint is another framework's, came from JAX without its hyperparameters,
            or does not fit the model.
    """
    if meta.framework != "torch":
        raise CheckpointError(
            f"{path} must be a torch checkpoint, got framework {meta.framework!r}: convert it with "
            f"python -m sfcore convert {path} DST --to torch"
        )
    if any("lr" not in group["hyperparameters"] for group in meta.groups):
        raise CheckpointError(
            f"{path} must record the lr of every group, got none: save it in JAX with hyperparameters=..., "
            "or start from the weights alone with resume='weights:PATH'"
        )
    names = parameter_names(model, optimizer)
    check_model(path, meta, arrays, model, names)
    owners = _changes.saved_owners(meta)
    groups = _changes.saved_groups(optimizer, meta, names)
    table = _changes.compare(optimizer, meta, groups)
    new = Plan()
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        _plan_group(new, optimizer, meta, group, saved)
        for p in group["params"]:
            own = owners[names[p]]  # regrouped, it may come from another than the first one's
            one = Saved(optimizer, meta, arrays, group, own, beta_of(saved), p, names[p])
            new.states[p], value = one.state_and_value()
            new.copies.append((p, value))
            new.gradients[p] = one.gradient()
            new.fresh |= one.fresh()
            if isinstance(optimizer, ScheduleFreeWrapper):
                new.base_states[p] = one.base_state()
    for entry, value in unwrapped(model).state_dict(keep_vars=True).items():
        if f"buffer/{entry}" in arrays:
            whole = _parts.taken(arrays[f"buffer/{entry}"], value)
            new.copies.append((value, placed(whole, part(value.detach()))))
    extra = {leaf: np.asarray(array) for leaf, array in arrays.items() if leaf.startswith("extra/")}
    new.model_extra = _arrays.decode(meta.extra.get(MODEL_EXTRA, {}), extra)
    return new, table


def _plan_group(
    new: Plan, optimizer: ScheduleFreeOptimizer, meta: Meta, group: dict[str, Any], saved: dict[str, Any]
) -> None:
    values = _changes.values_of(optimizer, group, saved)
    old, clock, about = saved["hyperparameters"], saved["clock"], saved.get("torch", {})
    books = {"scheduled_lr": clock.get("lr", 0.0), "c": clock.get("c", 0.0)}
    books |= {k: v for k, v in about.get("books", {}).items() if k in new_books()}
    same = changes.comparable(meta.optimizer, optimizer.law.name)
    _, lr_max, weight_sum = _changes.carry(clock, old, values, same, False)
    books |= {"k": clock["step"], "lr_max": lr_max, "weight_sum": weight_sum}
    # Groups of ScheduleFree+ and GPA have no such option, and only get one from another's checkpoint.
    if "prior_steps" in optimizer._books(group) or values["prior_steps"]:
        books["prior_steps"] = values["prior_steps"]
    if not isinstance(optimizer, TrainEvalOptimizer):
        books["y_beta"] = None
    elif books.get("y_beta") is None and beta_of(saved) != beta_after(clock["step"], values):
        books["y_beta"] = beta_of(saved)
    weighed = ("prior_steps", "r", "weight_lr_power")
    if not same or any(old.get(name, values[name]) != values[name] for name in weighed):
        books["prior_weight"] = optimizer._books(group)["prior_weight"]
    options = {}
    before, now, _ = _changes.lrs(optimizer, group, saved)
    if before == now:
        options = {
            k: v for k, v in _changes.options_of(saved).items() if k in ("lr", "initial_lr") and k in group
        }
    options |= _changes.scheduled_beta(optimizer, group, saved)
    options |= {name: clock.get(name, group[name]) for name in optimizer._carried}
    if isinstance(optimizer, ScheduleFreeWrapper) and about.get("base") == type(optimizer.base).__name__:
        options |= _changes.base_options(optimizer, group, saved)[0]
    new.books.append(books)
    new.options.append(options)


def without_partial_update(new: Plan, meta: Meta) -> tuple[Meta, list[str]]:
    """Forgets the gradients of an unfinished update whose length has changed: their scale would be wrong."""
    moved, dropped = changes.at_last_update(meta, changes.DROPPED)
    if dropped:
        new.gradients = dict.fromkeys(new.gradients)
    return moved, dropped


@torch.no_grad()
def commit(new: Plan, model: nn.Module, optimizer: ScheduleFreeOptimizer) -> None:
    """Puts a plan in place; the live mode stays."""
    optimizer._is_half_restored = True
    optimizer._loaded = None
    optimizer._forget_step()
    for live, value in new.copies:
        part(live).copy_(value)
    note_written(live for live, _ in new.copies)
    _put_states(optimizer, new.states)
    if isinstance(optimizer, ScheduleFreeWrapper):
        _put_states(optimizer.base, new.base_states)
        optimizer._show_base_state()
    for p, gradient in new.gradients.items():
        p.grad = gradient
    for group, books, options in zip(optimizer.param_groups, new.books, new.options, strict=True):
        optimizer._books(group).update(books)
        for key, value in options.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = value
    _put_entries(unwrapped(model), new.model_extra)
    optimizer._is_half_restored = False


def _put_states(optimizer: torch.optim.Optimizer, states: Mapping[Tensor, dict[str, Any]]) -> None:
    for p, state in states.items():
        optimizer.state.pop(p, None)
        if state:
            optimizer.state[p] = state


def _put_entries(model: nn.Module, entries: Mapping[str, Any]) -> None:
    """Gives the modules what they have in the state dict beside parameters and buffers."""
    own = {entry: value for entry, value in entries.items() if not is_extra_state(entry)}
    for entry in entries.keys() - own.keys():
        put_extra_state(model, entry, entries[entry])
    if own:  # what a module's _save_to_state_dict() adds, only its _load_from_state_dict() can read
        model.load_state_dict(model.state_dict(keep_vars=True) | own)
