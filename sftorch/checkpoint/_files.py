"""What torch.save wrote: state dicts of optimizers and models, alone or together in one dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfcore import laws
from sfcore.averaging import beta_after
from sfcore.iterates import widened
from sfcore.meta import Meta, number_in
from sfcore.sources import Source, unknown
from sftorch.checkpoint import _arrays, _importers, _unpickle
from sftorch.checkpoint._record import roles
from sftorch.law.scalars import Clock
from sftorch.state import eight, forms, prints

_LIGHTNING = "optimizer_states"  # a list
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def read(path: Path) -> Source:
    """Reads a torch file; nothing in it is executed.

    Raises:
        CheckpointError: if it is damaged, holds other objects, or no state dict of a known kind.
    """
    content = _unpickle.load(path)
    optimizers = _find(content, lambda value: "param_groups" in value or "schedulefree_state" in value)
    models = _find(content, _is_weights)
    if len(optimizers) > 1 or len(models) > 1:
        names = sorted(optimizers if len(optimizers) > 1 else models)
        raise unknown(
            path, f"several state dicts of one kind, {', '.join(names)}: save each in a file of its own"
        )
    model: Mapping[str, Any] = next(iter(models.values()), {})
    weights = {name: _arrays.to_numpy(value) for name, value in model.items() if _is_tensor(value)}
    if not optimizers:
        if not weights:
            raise unknown(path, f"a torch file without a state dict ({_keys(content)})")
        return Source(path, "weights without optimizer state (torch)", weights=weights)
    try:
        return _of_optimizer(path, next(iter(optimizers.values())), weights)
    except (*_importers.STRANGE, ValueError) as error:
        raise unknown(
            path, f"an optimizer's state with other entries than its program has ({error!r})"
        ) from error


def _find(content: Any, test: Any) -> dict[str, Any]:
    """Returns key -> mapping of the content itself or of its entries that pass a test."""
    if not isinstance(content, Mapping):
        return {}
    if test(content):
        return {"": content}
    entries = {str(key): value for key, value in content.items()}
    several = entries.pop(_LIGHTNING, None)
    several = several if isinstance(several, list) else []
    entries |= {f"{_LIGHTNING}[{index}]": value for index, value in enumerate(several)}
    return {key: value for key, value in entries.items() if isinstance(value, Mapping) and test(value)}


def _is_weights(value: Mapping[Any, Any]) -> bool:
    """Tells a model's state dict from a training dict, which may hold tensors too: random states."""
    if not all(isinstance(key, str) for key in value) or not any(map(_is_tensor, value.values())):
        return False
    return not any(isinstance(v, Mapping) for key, v in value.items() if not key.endswith("_extra_state"))


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "layout")


def _keys(content: Any) -> str:
    return f"keys {sorted(map(str, content))[:8]}" if isinstance(content, Mapping) else type(content).__name__


def _of_optimizer(path: Path, state_dict: Mapping[str, Any], weights: dict[str, np.ndarray]) -> Source:
    try:
        found = _importers.recognise(_with_note(state_dict))
    except ValueError as error:
        raise unknown(path, f"the state of an optimizer that is not known ({error})") from error
    indices = [index for group in found.groups for index in group["params"]]
    names, named = _names(found, indices, weights)
    if named and not _are_its_own(found, names, weights):
        names, named = {index: str(index) for index in indices}, False
    meta = Meta(
        framework="torch",
        optimizer=found.kind,
        step=max((int(group["clock"].step) for group in found.groups), default=0),
        groups=[_group(found, group, names) for group in found.groups],
        weights_hold=found.holds or "y",
    )
    source = Source(
        path, f"state of {found.program} ({found.kind})", meta, weights=weights or None, named=named
    )
    for group in found.groups:
        for index in group["params"]:
            _add_parameter(source, names[index], found.states.get(index, {}), group["clock"], weights)
    if weights and named:
        held = set(names.values())
        source.state |= {f"buffer/{name}": array for name, array in weights.items() if name not in held}
    _note(source, found, bool(weights))
    return source


def _with_note(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a state dict whose groups say what the weights hold; our older ones have a flag only."""
    if "param_groups" not in state_dict:
        return state_dict
    groups = [
        {"weights_hold": "y" if group.get("schedule_free", group).get("train_mode", True) else "x"} | group
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def _names(
    found: Any, indices: Sequence[Any], weights: Mapping[str, np.ndarray]
) -> tuple[dict[Any, str], bool]:
    """Returns index -> name, and whether these are the model's names or only numbers."""
    given = [name for group in found.groups for name in group["options"].get("param_names") or ()]
    if len(given) == len(indices):
        return dict(zip(indices, given, strict=True)), True
    candidates = [name for name in weights if name.rpartition(".")[2] not in _BUFFERS]
    kept = [found.states.get(index, {}) for index in indices]
    z = [values.get("z", values.get("gap")) for values in kept]
    fits = len(candidates) == len(indices) and all(
        tensor is None or tuple(tensor.shape) == weights[name].shape
        for name, tensor in zip(candidates, z, strict=True)
    )
    if fits:
        return dict(zip(indices, candidates, strict=True)), True
    return {index: str(index) for index in indices}, False


def _are_its_own(found: Any, names: Mapping[Any, str], weights: Mapping[str, np.ndarray]) -> bool:
    """Tells whether weights are those that a state was saved with, as far as it has prints of them."""
    own = f"{found.holds}_print"
    printed = {
        name: found.states[index][own]
        for index, name in names.items()
        if name in weights and own in found.states.get(index, {})
    }
    taken = prints.take(_arrays.to_tensor(weights[name]) for name in printed)
    return taken == list(printed.values())


def _says_beta(found: Any) -> bool:
    """Tells whether the options have the interpolation; of other programs' wrappers they are the base's."""
    return found.kind != "wrapper" or found.program == "sftorch"


def _group(found: Any, group: Mapping[str, Any], names: Mapping[Any, str]) -> dict[str, Any]:
    options = group["options"]
    law = laws.LAWS["adamw" if found.kind == "plain" else found.kind]
    values = law.of_torch_group(options)
    if not _says_beta(found):
        values.pop("beta", None)
    values = {name: number_in(value) for name, value in values.items()}
    strange = [name for name, value in values.items() if not isinstance(value, int | float | str | None)]
    if strange:
        raise TypeError(f"{strange[0]} must be a number, got a {type(values[strange[0]]).__name__}")
    step, lr_max, weight_sum = group["clock"]
    clock = {"step": int(step), "lr_max": float(lr_max), "weight_sum": float(weight_sum)}
    if options.get("y_beta") is not None:
        clock["beta"] = float(options["y_beta"])
    elif values.get("beta_rule", "constant") != "constant":  # a closure form, which has no y at rest
        clock["beta"] = beta_after(int(step), values)
    return {
        "hyperparameters": values,
        "clock": clock,
        "parameters": [names[index] for index in group["params"]],
    }


def _add_parameter(
    source: Source, name: str, values: Mapping[str, Any], clock: Any, weights: Mapping[str, np.ndarray]
) -> None:
    """Adds a parameter's leaves, and its entry in the record."""
    kept = {role: values[key] for key, role in roles().items() if key in values}
    if eight.SCALE in values and "gap" in values:
        kept["gap"] = eight.gap_code(values)
    state = {f"{role}/{name}": _arrays.to_numpy(value) for role, value in kept.items()}
    held = weights.get(name) if source.named else None
    own = None
    if "z" in values or "gap" in values:
        own = clock._asdict() | {key: values[key] for key in Clock._fields if key in values}
        own = {key: (int if key == "step" else float)(value) for key, value in own.items()}
        if "y" in values:  # put aside by eval(), so that what the weights hold is x
            held = _arrays.to_numpy(values["y"])
    if held is not None:
        state[f"y/{name}"] = _in_full(source, held, values)
        state = widened(state)
    some = held if held is not None else state.get(f"z/{name}", np.zeros(0, np.float32))
    assert source.meta is not None
    source.meta.parameters[name] = {"shape": list(some.shape), "dtype": some.dtype.name, "clock": own}
    source.state |= state


def _in_full(source: Source, held: np.ndarray, values: Mapping[str, Any]) -> np.ndarray:
    """Returns the y (or x, where the weights hold that) of a 16-bit parameter with what its state adds."""
    assert source.meta is not None
    holds_x = source.meta.weights_hold == "x" and "y" not in values
    rest = values.get("x_rest" if holds_x else "y_rest")
    return held if rest is None else _arrays.to_numpy(forms.join(_arrays.to_tensor(held), rest))


def _note(source: Source, found: Any, has_weights: bool) -> None:
    assert source.meta is not None
    if any("y" in values for values in found.states.values()):
        source.notes.append("saved in eval mode with y put aside: weights saved beside it hold x")
        source.meta.weights_hold, source.holds = "y", "x"
    elif found.holds is None:
        source.notes.append("it does not say what the weights saved beside it hold; y is assumed")
    else:
        source.notes.append(f"weights saved beside it hold {found.holds}")
    if not _says_beta(found):
        source.notes.append("it does not say the beta that built y; 0.9, the default, is assumed for x")
    if not has_weights:
        source.notes.append(
            "the file holds no weights; x, and y unless it was put aside, need those saved beside it"
        )
    elif not source.named:
        source.notes.append(
            "the weights in the file do not match the optimizer's parameters in number, shape and content"
        )
    elif len(found.groups) > 1 and not all("param_names" in group["options"] for group in found.groups):
        source.notes.append("the groups' parameters take the names of the weights in the order of the file")
    if not source.named:
        source.notes.append("parameters are numbered: the file does not say their names")
