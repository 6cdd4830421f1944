"""A start from weights alone: they are taken for x, y and z, under a policy that protects them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfcore import store
from sfcore.exchange import CheckpointError
from sfcore.restart import WEIGHTS_ONLY, weights_only_policy
from sftorch.checkpoint import _arrays, _parts, _unpickle
from sftorch.checkpoint._record import is_extra_state, put_extra_state, unwrapped
from sftorch.law import scalars
from sftorch.law.parts import is_divided, note_written, part
from sftorch.state.groups import new_books
from sftorch.state.modes import TrainEvalOptimizer
from sftorch.state.state_dict import WRAPPERS, ScheduleFreeOptimizer

_WRAPPED = ("state_dict", "model_state_dict", "model")
NO_STATE = "no optimizer state: starting from x"


def read(path: Path) -> tuple[dict[str, Any], int | None, list[str]]:
    """Returns what `sfcore.store.weights` does, as tensors on the CPU.

    What torch.save wrote may have modules' extra state beside the tensors.

    Args:
        path: one of our checkpoints or a folder of them, a safetensors file, or what torch.save wrote of
            `model.state_dict()`, also under a key "state_dict", "model_state_dict" or "model".

    Raises:
        CheckpointError: if it cannot be read or holds no weights.
    """
    if path.is_dir() or path.suffix == ".safetensors":
        arrays, trained, notices = store.weights(path)
        return {name: _arrays.to_tensor(array) for name, array in arrays.items()}, trained, notices
    loaded = _unpickle.load(path)
    for key in _WRAPPED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not any(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(
            f"{path} must hold a model's state dict, got {type(loaded).__name__}: save model.state_dict()"
        )
    entries = {str(name): value for name, value in loaded.items()}
    return {n: v for n, v in entries.items() if isinstance(v, Tensor) or is_extra_state(n)}, None, []


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns entry -> live tensor, without the modules' extra state, which may be a new tensor each time."""
    entries = unwrapped(model).state_dict(keep_vars=True).items()
    return {k: value for k, value in entries if isinstance(value, Tensor) and not is_extra_state(k)}


def _named_as(live: Mapping[str, Tensor], weights: dict[str, Any]) -> dict[str, Any]:
    """Returns weights without what wrappers put before every name, unless the model has names like these."""
    while weights and not weights.keys() & live.keys():
        word = next((f"{w}." for w in WRAPPERS if all(name.startswith(f"{w}.") for name in weights)), None)
        if word is None:
            break
        weights = {name.removeprefix(word): value for name, value in weights.items()}
    return weights


def check(
    path: Path, weights: Mapping[str, Tensor], model: nn.Module, held: Set[Tensor]
) -> dict[str, Tensor]:
    """Returns entry -> live tensor of what the file has, which are all of `held`.

    Raises:
        CheckpointError: with every name and shape that does not fit.
    """
    live = _tensors_of(model)
    absent = live.keys() - weights.keys() - _spared(live, weights, held)
    found = [f"{name!r} must be in the file, got none of that name" for name in live if name in absent]
    found += [f"{name!r} must be in the model, got none of that name" for name in weights if name not in live]
    found += [
        f"{name!r} must have the model's shape {tuple(live[name].shape)}, got {tuple(weights[name].shape)}"
        for name in live
        if name in weights and live[name].shape != weights[name].shape
    ]
    if found:
        raise CheckpointError(
            f"{path} does not fit the model; nothing has changed. Build the model as it was saved, or load "
            "the weights that fit yourself, call no restore, and build the optimizer with prior_steps="
            f"{WEIGHTS_ONLY['prior_steps']}, without which its first step throws them away:\n  "
            + "\n  ".join(found)
        )
    return {name: value for name, value in live.items() if name in weights}


def _spared(live: Mapping[str, Tensor], weights: Mapping[str, Tensor], held: Set[Tensor]) -> set[str]:
    """Returns the entries that a file need not have.

    These are other names of a tensor that it has (tied weights, which safetensors stores once), and
    what is not trained: frozen parameters, and the buffers of modules of which it has nothing (a LoRA).
    """
    there = {live[name] for name in weights if name in live}
    modules = {name.rpartition(".")[0] for name in weights}

    def is_frozen(name: str, value: Tensor) -> bool:
        if isinstance(value, nn.Parameter):
            return value not in held and not value.requires_grad
        return name.rpartition(".")[0] not in modules

    return {name for name, value in live.items() if value in there or is_frozen(name, value)}


def _left(model: nn.Module, loaded: Mapping[str, Tensor]) -> list[str]:
    """Returns a notice of what the file does not have."""
    there = set(loaded.values())
    left = [name for name, value in _tensors_of(model).items() if value not in there]
    if not left:
        return []
    return [f"{len(left)} weights are not trained and not in the file: they stay, the first {left[0]!r}"]


def prepare(
    path: Path, model: nn.Module, optimizer: ScheduleFreeOptimizer
) -> Callable[[int | None], list[str]]:
    """Reads and checks weights; returns what puts them in place.

    That puts the weights into the model, empties the optimizer and applies the policy; it takes prior_steps,
    checked already, in place of the policy's (None leaves it to the optimizer's own, and then the policy),
    and returns notices.

    Args:
        path: as for `read`.
        model: built as the saved one was.
        optimizer: over its parameters.

    Raises:
        CheckpointError: if the weights cannot be read or do not fit; nothing has changed then.
    """
    weights, trained, said = read(path)
    weights = _named_as(_tensors_of(model), weights)
    extra = {name: weights.pop(name) for name in list(weights) if is_extra_state(name)}
    live = check(path, weights, model, set(optimizer._params()))
    notices = [f"{path}: {NO_STATE}", *said, *_left(model, live)]
    cast = {n: weights[n].dtype for n, value in live.items() if weights[n].dtype != value.dtype}
    if cast:
        name = next(iter(cast))
        notices.append(
            f"{len(cast)} weights are converted to the model's dtype, the first {name!r}: "
            f"{_arrays.name_of(cast[name])} to {_arrays.name_of(live[name].dtype)}"
        )

    @torch.no_grad()
    def put(prior_steps: int | None) -> list[str]:
        optimizer._is_half_restored = True
        for name, value in live.items():
            part(value).copy_(_own_part(weights[name], value))
        note_written(live.values())
        for name in extra.keys() & unwrapped(model).state_dict(keep_vars=True).keys():
            put_extra_state(model, name, extra[name])
        return notices + empty(optimizer, prior_steps, trained)

    return put


def _own_part(whole: Tensor, like: Tensor) -> Tensor:
    """Returns what of a whole tensor belongs to this rank's part of another."""
    return _arrays.to_tensor(_parts.taken(_arrays.to_numpy(whole), like)) if is_divided(like) else whole


def empty(
    optimizer: ScheduleFreeOptimizer, prior_steps: int | None = None, trained: int | None = None
) -> list[str]:
    """Forgets the optimizer's state and opens its groups' books anew, under the policy; returns notices."""
    given = {} if prior_steps is None else {"prior_steps": prior_steps}
    optimizer._loaded = None
    if isinstance(optimizer, TrainEvalOptimizer):
        optimizer._forget_step()
    optimizer.state.clear()
    if hasattr(optimizer, "base"):
        optimizer.base.state.clear()
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
    notices = [
        notice
        for index, group in enumerate(optimizer.param_groups)
        for notice in open_books(optimizer, index, group, given, trained)
    ]
    optimizer._is_half_restored = False
    return notices


def open_books(
    optimizer: ScheduleFreeOptimizer,
    index: int,
    group: dict[str, Any],
    given: Mapping[str, int] | None = None,
    trained: int | None = None,
) -> list[str]:
    """Begins a group's clock, with prior_steps and warmup_steps as the policy says; returns notices.

    What is given, and what differs from the optimizer's default, was asked for and stays.
    """
    books, prior, notices = optimizer._books(group), 0.0, []
    values, _ = optimizer._values(group)
    usual = {field.name: field.default for field in fields(optimizer.law.options)}
    asked = {name: value for name, value in values.items() if value != usual[name]} | dict(given or {})
    lr = full_lr(group, values)
    if lr == 0:
        notices = [f"group {index}: lr is 0, so the loaded weights cannot be weighed; pass the full lr"]
    else:
        for name, value in weights_only_policy(asked, optimizer.law.options, trained_steps=trained).items():
            if name in values and value != values[name]:
                (group if name in group else books)[name] = value
                notices.append(
                    f"group {index}: {name} is set to {value} for a start from weights; "
                    "pass another to change it"
                )
        values, _ = optimizer._values(group)
        prior = scalars.prior_weight(values["prior_steps"], values["r"], lr, values["weight_lr_power"])
    kept = {"train_mode": books["train_mode"], "prior_weight": prior, "weight_sum": prior}
    books.update(new_books() | kept)
    return notices


def full_lr(group: Mapping[str, Any], values: Mapping[str, Any]) -> float:
    """Returns a group's lr as it was before a scheduler changed it, which may begin with a ramp from 0."""
    return float(group.get("initial_lr", values["lr"]))
