"""Checks of what a torch user passes in, each before anything changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sfcore.checks import HyperparameterError, nearest


def as_list(params: Any) -> list[Any]:
    """Returns the parameters or groups as a list; an empty one and a bare tensor are refused."""
    if isinstance(params, Tensor):
        raise TypeError(
            "params must be an iterable of tensors or of parameter groups, got a Tensor: pass [tensor]"
        )
    listed = list(params)
    if not listed:
        raise ValueError(
            "params must be a non-empty iterable, got an empty one: pass model.parameters(), "
            "and a fresh iterator if it was used before"
        )
    return listed


def _check_tensors(params: Iterable[Any]) -> None:
    """Raises unless every parameter is a floating-point or complex leaf."""
    for index, item in enumerate(params):
        p = item[1] if isinstance(item, tuple) and len(item) == 2 else item
        if not isinstance(p, Tensor):
            raise TypeError(f"params[{index}] must be a Tensor, got {type(p).__name__}: pass model.parameters()")
        if not p.is_leaf:
            raise ValueError(
                f"params[{index}] must be a leaf tensor, got the result of an operation of shape "
                f"{tuple(p.shape)}: pass the tensor it was made from, or .detach() it"
            )
        if not (p.is_floating_point() or p.is_complex()):
            raise ValueError(
                f"params[{index}] must be floating point or complex, got {p.dtype}: leave it out, or make it a buffer"
            )


def as_group(param_group: Any, known: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of a parameter group with its parameters as a list, after checking both."""
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}: pass {{'params': [...]}}")
    if "params" not in param_group:
        raise ValueError(f"param_group must have the key 'params', got {sorted(param_group)}: add it")
    _check_group_keys(param_group, known)
    params = param_group["params"]
    if isinstance(params, set):
        raise TypeError("params must be an ordered collection, got a set: pass a list")
    params = [params] if isinstance(params, Tensor) else list(params)
    _check_tensors(params)
    return param_group | {"params": params}


def _check_group_keys(group: dict[str, Any], known: Iterable[str]) -> None:
    """Raises on a group option that looks like a misspelling; other extra keys are the user's own."""
    known = set(known) | {"params", "param_names"}
    found = [
        f"group option {key!r} must be one of the optimizer's, got an unknown name: did you mean {meant!r}?"
        for key in group
        if key not in known and (meant := nearest(key, known))
    ]
    if found:
        raise HyperparameterError(found)


def check_unsupported(**flags: bool) -> None:
    """Raises for torch.optim options that cannot be honoured."""
    reasons = {
        "capturable": "the scalars of a step are Python doubles on the host, which a CUDA graph cannot replay",
        "differentiable": "the step updates y and z in place; write it with sfjax to differentiate through it",
    }
    found = [f"{name} must be False, got True: {reasons[name]}" for name, flag in flags.items() if flag]
    if found:
        raise HyperparameterError(found)


def check_gradients(params: Iterable[Tensor]) -> None:
    """Raises on a gradient that the step cannot use."""
    for p in params:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise RuntimeError(
                f"gradients must be dense, got {p.grad.layout} for a parameter of shape {tuple(p.shape)}: "
                "use sparse=False in the embedding"
            )


def as_pair(betas: Any) -> tuple[Any, Any]:
    """Returns betas as two values; their ranges are checked by the rules."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise HyperparameterError([f"betas must be a pair (beta, b2), got {betas!r}: (0.9, 0.999) is usual"])
    return betas[0], betas[1]


def as_number(lr: Any) -> Any:
    """Returns a one-element tensor as a float, anything else as it is for the rules to judge."""
    return float(lr) if isinstance(lr, Tensor) and lr.numel() == 1 else lr
