"""What a checkpoint holds, gathered from a live model and optimizer without copying: leaves and record."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import sfcore
from sfcore import laws
from sfcore.exchange import CheckpointError
from sfcore.meta import Meta, number_in, precision_of
from sftorch.checkpoint import _arrays, _parts
from sftorch.checkpoint._steps import steps_of
from sftorch.law.parts import part
from sftorch.law.scalars import Clock
from sftorch.schedule_free import ScheduleFreeWrapper
from sftorch.state import eight, forms, state_dict
from sftorch.state.groups import new_books
from sftorch.state.modes import TrainEvalOptimizer
from sftorch.state.state_dict import ScheduleFreeOptimizer

# The rest of a 16-bit y, or of x where the parameters hold that: joined on the way to the file.
REST = "rest"
MODEL_EXTRA = "model_extra_state"


_OTHERS = ("x", "z", "gap", eight.SCALE)  # beside y, what x may be made from


class Average(NamedTuple):
    """How to get a parameter's x from the leaves: at rest in y/, stored in x/, or from y/ and z/ by beta.

    Attributes:
        name: the parameter's.
        beta: the interpolation that built y, None where y/ holds x.
        dtype: the parameter's.
    """

    name: str
    beta: float | None
    dtype: torch.dtype

    def compute(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """Returns x in full; elementwise, so the same bits on any device."""
        held = leaves[f"y/{self.name}"]
        return held if self.beta is None else forms.x_from_y(held, self._stored(leaves), self.beta)

    def ship(self, x: Tensor) -> Tensor:
        """Returns x as the parameter holds it in eval mode."""
        # What rests as x was rounded when it was put there, in a way that differs at ties.
        at_rest = self.beta is None and x.dtype != self.dtype
        return forms.split(x, self.dtype)[0] if at_rest else x.to(self.dtype)

    def needs(self) -> list[str]:
        """Returns the leaves that x may be made from."""
        return [f"{role}/{self.name}" for role in ("y", *_OTHERS)]

    def _stored(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {role: leaves[f"{role}/{self.name}"] for role in _OTHERS if f"{role}/{self.name}" in leaves}


class Capture(NamedTuple):
    """A checkpoint in the making.

    Attributes:
        tensors: leaf -> live tensor; to be copied before the next step.
        own: the same of what is this rank's alone, in a run of several processes and not on rank 0.
        arrays: leaf -> array that is a copy already.
        averages: how to get x, one a parameter.
        inference: entry of model.state_dict() -> parameter (its x) or leaf (as it is).
        meta: the record, without `recent`.
        recent: gives `Meta.recent`; waits for the device.
    """

    tensors: dict[str, Tensor]
    own: dict[str, Tensor]
    arrays: dict[str, np.ndarray]
    averages: list[Average]
    inference: dict[str, str]
    meta: Meta
    recent: Callable[[], dict[str, Any]]


def roles() -> dict[str, str]:
    """Returns torch's name -> role of what is saved of a parameter's state; y is there in eval mode only."""
    same = {name: name for name in ("z", "gap", eight.SCALE, "x")}
    return same | {one.torch: role for role, one in laws.roles().items()}


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the user's module inside torch.compile and (Distributed)DataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def is_extra_state(entry: str) -> bool:
    """Tells whether an entry of model.state_dict() came from get_extra_state(), as a tensor or not."""
    return entry.rpartition(".")[2] == "_extra_state"


def put_extra_state(model: nn.Module, entry: str, value: Any) -> None:
    """Gives a module the extra state that an entry of model.state_dict() holds."""
    unwrapped(model).get_submodule(entry.rpartition(".")[0]).set_extra_state(value)


def parameter_names(model: nn.Module, optimizer: ScheduleFreeOptimizer) -> dict[Tensor, str]:
    """Returns parameter -> name for all that the optimizer holds.

    Raises:
        CheckpointError: naming those that are not in the model.
    """
    _parts.gather_up(model)
    names: dict[Tensor, str] = {p: name for name, p in unwrapped(model).named_parameters()}
    lost = [
        f"parameter {i} of group {g} with shape {tuple(p.shape)}"
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
        if p not in names
    ]
    if lost:
        raise CheckpointError(
            f"model must hold every parameter of the optimizer, got {len(lost)} that it does not, the first: "
            f"{lost[0]}: pass the module that the optimizer was built for"
        )
    return {p: names[p] for p in optimizer._params()}


def trained_by_others(model: nn.Module, optimizer: ScheduleFreeOptimizer) -> list[str]:
    """Returns the names of the weights that want gradients and are none of the optimizer's."""
    held = set(optimizer._params())
    named = unwrapped(model).named_parameters()
    return [name for name, p in named if p.requires_grad and p not in held]


def capture(
    model: nn.Module, optimizer: ScheduleFreeOptimizer, place: Mapping[str, Any], rank: int = 0
) -> Capture:
    """Gathers everything a resume needs, without copying.

    Args:
        model: the module with the parameters, trainable and frozen, and the buffers.
        optimizer: any Schedule-Free optimizer, in either mode.
        place: step, epoch, position, accumulation and metrics, for the record, and extra, the user's own, of
            which tensors become leaves extra/PATH.
        rank: of this process.

    Raises:
        RuntimeError: if the weights are not those of the optimizer's state, as in `optimizer.train()`.
        CheckpointError: for what cannot be saved.
    """
    extra = place["extra"]
    if MODEL_EXTRA in extra:
        raise CheckpointError(f"extra must have keys of yours, got {MODEL_EXTRA!r}: take another name for it")
    if optimizer._is_half_restored:
        raise CheckpointError(
            "optimizer must hold one step's state, got parts of two from a restore that was interrupted: "
            "call restore() again"
        )
    names = parameter_names(model, optimizer)
    state_dict.settle(optimizer)
    if isinstance(optimizer, TrainEvalOptimizer):
        optimizer._require_untouched(optimizer.param_groups)
    tensors: dict[str, Tensor] = {}
    parameters, averages = _parameters(optimizer, names, tensors)
    _note_kinds(unwrapped(model), parameters)
    if place["accumulation"]["position"]:
        tensors |= {f"grad/{name}": p.grad for p, name in names.items() if p.grad is not None}
    others, inference = _model_entries(unwrapped(model), names, tensors)
    own: dict[str, Tensor] = {} if rank else tensors
    recorded = _arrays.encode(extra, own, f"extra/rank{rank}" if rank else "extra")
    if others:
        recorded[MODEL_EXTRA] = _arrays.encode(others, tensors, f"extra/{MODEL_EXTRA}")
    for leaf, tensor in (own | tensors).items():
        _arrays.check_dense(part(tensor), leaf)
    meta = Meta(
        framework="torch",
        optimizer=optimizer.law.name,
        groups=[_group(optimizer, group, names) for group in optimizer.param_groups],
        parameters=parameters,
        precision=precision_of(parameters),
        weights_hold="y" if isinstance(optimizer, TrainEvalOptimizer) else "x",
        versions={
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "schedulefree-twin": sfcore.__version__,
        },
        **{**place, "extra": recorded},
    )
    steps = steps_of(optimizer)
    own = own if rank else {}
    return Capture(tensors, own, {}, averages, inference, meta, partial(steps.recent, steps.rows()))


def _parameters(
    optimizer: ScheduleFreeOptimizer, names: Mapping[Tensor, str], tensors: dict[str, Tensor]
) -> tuple[dict[str, dict[str, Any]], list[Average]]:
    """Adds y, z, v, m, x and base leaves; returns the record of each parameter and the way to its x."""
    parameters, averages, kept = {}, [], roles()
    base = optimizer.base.state if isinstance(optimizer, ScheduleFreeWrapper) else {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            name, state = names[p], optimizer.state.get(p, {})
            tensors[f"y/{name}"] = state.get("y", p)
            about: dict[str, Any] = {"shape": list(p.shape), "dtype": _arrays.name_of(p.dtype), "clock": None}
            if forms.has_started(state):
                about["clock"] = {key: state[key] for key in Clock._fields}
                tensors |= {f"{role}/{name}": state[key] for key, role in kept.items() if key in state}
                if strange := laws.unnamed(state):
                    raise CheckpointError(
                        f"state of {name!r} must be of a law, got {', '.join(strange)}, which no row "
                        "names and nobody would restore: add a Buffer to the row"
                    )
                if optimizer._rest in state:
                    tensors[f"{REST}/{name}"] = state[optimizer._rest]
            if base.get(p):
                about["base"] = _arrays.encode(base[p], tensors, f"base/{name}")
            parameters[name] = about
            holds_y = about["clock"] and isinstance(optimizer, TrainEvalOptimizer)
            beta = optimizer._y_beta(group) if holds_y else None
            averages.append(Average(name, beta, p.dtype))
    return parameters, averages


def _note_kinds(model: nn.Module, parameters: Mapping[str, dict[str, Any]]) -> None:
    """Adds the class of each parameter's module to its record, by which the converter knows its layout."""
    for path, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if name in parameters:
                parameters[name]["kind"] = type(module).__name__


def _model_entries(
    model: nn.Module, names: Mapping[Tensor, str], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Adds buffers and parameters of no group; returns other entries, and the inference map."""
    others, inference = {}, {}
    for entry, value in model.state_dict(keep_vars=True).items():
        if is_extra_state(entry) or not isinstance(value, Tensor):
            others[entry] = value
            if isinstance(value, Tensor):
                inference[entry] = f"extra/{MODEL_EXTRA}/{entry}"
        elif value in names:
            inference[entry] = f"x/{names[value]}"
        else:
            tensors[f"buffer/{entry}"] = value
            inference[entry] = f"buffer/{entry}"
    return others, inference


def _group(
    optimizer: ScheduleFreeOptimizer, group: dict[str, Any], names: Mapping[Tensor, str]
) -> dict[str, Any]:
    """Returns the record of a group; what only torch needs lies under "torch"."""
    values, _ = optimizer._values(group)
    books = optimizer._books(group)
    own: dict[str, Any] = {"books": {key: books[key] for key in new_books() if key != "train_mode"}}
    # A wrapper's books lie apart, because a base may use their names: Prodigy has a "k".
    ours = new_books().keys() if books is group else {"schedule_free"}
    options = {
        key: number_in(value)
        for key, value in group.items()
        if key not in ours and key not in ("params", "param_names")
    }
    own["options"] = _arrays.encode({k: v for k, v in options.items() if _is_plain(v)}, {}, "options")
    own["built_lr"] = optimizer._built_lr(group)
    if isinstance(optimizer, ScheduleFreeWrapper):
        own["base"] = type(optimizer.base).__name__
        defaults = {k: v for k, v in optimizer.base.defaults.items() if _is_plain(v)}
        own["base_defaults"] = _arrays.encode(defaults, {}, "defaults")
    clock = {
        "step": books["k"],
        "lr_max": books["lr_max"],
        "weight_sum": books["weight_sum"],
        "lr": books["scheduled_lr"],
        "c": books["c"],
    }
    if values["beta_rule"] != "constant":
        clock["beta"] = optimizer._y_beta(group)
    clock |= {name: group[name] for name in optimizer._carried}
    return {
        "hyperparameters": {key: number_in(value) for key, value in values.items()},
        "clock": clock,
        "parameters": [names[p] for p in group["params"]],
        "torch": own,
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
