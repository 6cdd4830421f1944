"""Checks of what a torch user passes in, each before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfcore import checks
from sfcore.checks import HyperparameterError, Rule, nearest

_UNSUPPORTED = {
    "capturable": Rule(
        "False", lambda v: not v, "a step computes its scalars on the host, which a CUDA graph cannot replay"
    ),
    "differentiable": Rule(
        "False", lambda v: not v, "the step writes in place; use sfjax to differentiate through a step"
    ),
    "maximize": checks.FLAG,
    "foreach": Rule(
        "None, True or False",
        lambda v: v is None or isinstance(v, bool),
        "True is usual; inner_momentum, which schedulefree after 1.4.1 has in this place, goes by name",
    ),
    "fused": Rule("None, True or False", lambda v: v is None or isinstance(v, bool), "None picks for you"),
}


def as_list(params: Any) -> list[Any]:
    """Returns the parameters or groups as a list; an empty one, a bare tensor and a set are refused."""
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors or groups, got a Tensor: pass [tensor]")
    if isinstance(params, set | frozenset):
        raise TypeError("params must be ordered, got a set: pass a list")
    if not isinstance(params, Iterable):
        raise TypeError(f"params must be an iterable, got {type(params).__name__}: pass model.parameters()")
    return list(params)


def as_groups(params: Any) -> list[Any]:
    """Returns the constructor's argument as a list, which must not be empty."""
    listed = as_list(params)
    if not listed:
        raise ValueError(
            "params must be non-empty, got an empty iterable: pass model.parameters(), "
            "and make a new iterator if it was used before"
        )
    return listed


def as_group(param_group: Any, known: Iterable[str], taken: Iterable[Tensor]) -> dict[str, Any]:
    """Returns a copy of a group, its parameters as a list.

    Args:
        param_group: what the user calls a group.
        known: names of the optimizer's options.
        taken: parameters that the optimizer already has.
    """
    if not isinstance(param_group, dict):
        kind = type(param_group).__name__
        raise TypeError(f"param_group must be a dict, got {kind}: pass {{'params': [...]}}")
    if "params" not in param_group:
        raise ValueError(f"param_group must have the key 'params', got the keys {list(param_group)}: add it")
    params = param_group["params"]
    params = [params] if isinstance(params, Tensor) else as_list(params)
    _check_tensors(params, {id(p) for p in taken})
    _check_names(param_group, set(known) | {"params", "param_names"})
    return param_group | {"params": params}


def _check_tensors(params: list[Any], seen: set[int]) -> None:
    """Raises unless every parameter is a new floating-point or complex leaf."""
    for index, item in enumerate(params):
        p = item[1] if isinstance(item, tuple) and len(item) == 2 else item
        if not isinstance(p, Tensor):
            kind = type(p).__name__
            raise TypeError(f"params[{index}] must be a Tensor, got {kind}: pass model.parameters()")
        if not p.is_leaf:
            raise ValueError(
                f"params[{index}] must be a leaf tensor, got the result of an operation of shape "
                f"{tuple(p.shape)}: pass the tensor it was made from, or .detach() it"
            )
        if not (p.is_floating_point() or p.is_complex()):
            raise ValueError(
                f"params[{index}] must be floating point or complex, got {p.dtype}: "
                "leave it out, or make it a buffer"
            )
        if p.is_conj():
            raise ValueError(
                f"params[{index}] must hold its own values, got a conjugate view of shape "
                f"{tuple(p.shape)}, which the step cannot write to: make it of tensor.resolve_conj()"
            )
        if id(p) in seen:
            raise ValueError(
                f"params[{index}] must be in one group, once, got a tensor of shape {tuple(p.shape)} a "
                "second time: leave one of them out"
            )
        seen.add(id(p))


def _check_names(group: dict[str, Any], known: set[str]) -> None:
    """Raises on a group option that looks like a misspelling; other extra keys are the user's own."""
    found = []
    for key in group:
        meant = None if key in known else nearest(str(key), known)
        # "weight_decay_scale" and "no_weight_decay" are names of somebody's own, not slips.
        if meant and f"{meant}_" not in key and f"_{meant}" not in key:
            found.append(f"option {key!r} must be a known name, got an unknown one: did you mean {meant!r}?")
    if found:
        raise HyperparameterError(found)


def find_group_problems(group: dict[str, Any]) -> list[str]:
    """Returns the problems of the options that torch has and the equations do not."""
    found = [
        checks.problem(name, rule, group[name])
        for name, rule in _UNSUPPORTED.items()
        if name in group and not rule.holds(group[name])
    ]
    if "betas" in group and not split_betas(group["betas"]):
        found.append(f"betas must be a pair (beta, b2), got {group['betas']!r}: (0.9, 0.999) is usual")
    return found


def check_gradients(params: Iterable[Tensor]) -> None:
    """Raises on a gradient that the step cannot use."""
    for p in params:
        grad = p.grad
        if grad is not None and grad.layout is not torch.strided:
            raise RuntimeError(
                f"gradients must be dense, got {grad.layout} for a parameter of shape {tuple(p.shape)}: "
                "use sparse=False in the embedding"
            )


def check_entries(entries: Mapping[str, Any], held: Iterable[Tensor]) -> None:
    """Raises unless the tensors of a model are those that an optimizer holds, and no copies of them.

    A copy has the shape of its original, which the model then lacks. So a model is refused that has none of
    the optimizer's parameters, or that lacks one and has a trainable tensor of the same shape in its place.
    Frozen ones may have any shape: a teacher, or what lies below an adapter.

    Args:
        entries: `model.state_dict(keep_vars=True)`.
        held: the optimizer's parameters.
    """
    own = set(held)
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in tensors.items() if value not in own}
    absent = {p.shape for p in own - set(tensors.values())}
    copies = [name for name, value in others.items() if value.requires_grad and value.shape in absent]
    if len(others) < len(tensors) and not copies:
        return
    first = next(iter(copies or others), None)
    lacks = "" if first is None else f", the first other {first!r} of shape {tuple(tensors[first].shape)}"
    raise ValueError(
        f"model must be the one whose parameters this optimizer holds, got one with "
        f"{len(tensors) - len(others)} of them among its {len(tensors)} tensors{lacks}: pass the original, "
        "and for a copy call copy.load_state_dict(optimizer.eval_state_dict(original)), or copy both at "
        "once, copy.deepcopy((model, optimizer))"
    )


def split_betas(betas: Any) -> dict[str, Any]:
    """Returns betas by canonical name, for the rules to judge; nothing if it is no pair."""
    if isinstance(betas, tuple | list) and len(betas) == 2:
        return {"beta": betas[0], "b2": betas[1]}
    return {}


def as_number(value: Any) -> Any:
    """Returns a one-element tensor or NumPy float as a float, anything else as it is for the rules to judge.

    NumPy's would carry their dtype into the sum of weights, which in 16 bits soon stops growing.
    """
    one = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, np.floating)
    return float(value) if one else value
