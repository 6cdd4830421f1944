"""Checks of what a torch user passes in, each before anything changes."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfcore import checks
from sfcore.checks import HyperparameterError, Rule, nearest
from sftorch.law.parts import is_divided
from sftorch.state import eight, forms

_THREE = "None, True or False"
# Options that torch has and the equations do not.
_RULES = {
    "capturable": Rule(
        "False", lambda v: not v, "a step computes its scalars on the host, which a CUDA graph cannot replay"
    ),
    "differentiable": Rule(
        "False", lambda v: not v, "the step writes in place; use sfjax to differentiate through a step"
    ),
    "maximize": checks.FLAG,
    "foreach": Rule(
        _THREE,
        lambda v: v is None or isinstance(v, bool),
        "True is usual; inner_momentum, which schedulefree after 1.4.1 has in this place, goes by name",
    ),
    "fused": Rule(_THREE, lambda v: v is None or isinstance(v, bool), "None picks for you"),
    "use_muon": Rule(
        _THREE, lambda v: v is None or isinstance(v, bool), "None finds matrices by shape and name"
    ),
    "betas": Rule(
        "a pair (beta, b2)", lambda v: isinstance(v, tuple | list) and len(v) == 2, "(0.9, 0.999) is usual"
    ),
    "seed": Rule(
        "a whole number >= 0",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0,
        "0 is usual",
    ),
    "precision": Rule(
        "'exact', 'lean' or '8bit'",
        lambda v: isinstance(v, str) and v in ("exact", "lean", "8bit"),
        "'exact' is usual",
    ),
}


def as_list(params: Any, or_empty: bool = True) -> list[Any]:
    """Returns the parameters or groups as a list; a bare tensor and a set are refused."""
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors or groups, got a Tensor: pass [tensor]")
    if isinstance(params, set | frozenset):
        raise TypeError("params must be ordered, got a set: pass a list")
    if not isinstance(params, Iterable):
        raise TypeError(f"params must be an iterable, got {type(params).__name__}: pass model.parameters()")
    listed = list(params)
    if not listed and not or_empty:
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
    found, names = [], {*known, "params", "param_names"}
    for key in param_group:
        meant = None if key in names else nearest(str(key), names)
        # "weight_decay_scale" and "no_weight_decay" are names of somebody's own, not slips.
        if meant and f"{meant}_" not in key and f"_{meant}" not in key:
            found.append(f"option {key!r} must be a known name, got an unknown one: did you mean {meant!r}?")
    if found:
        raise HyperparameterError(found)
    return param_group | {"params": params}


def _check_tensors(params: list[Any], seen: set[int]) -> None:
    """Raises unless every parameter is a new floating-point or complex leaf."""
    for index, item in enumerate(params):
        p = item[1] if isinstance(item, tuple) and len(item) == 2 else item
        if not isinstance(p, Tensor):
            kind = type(p).__name__
            raise TypeError(f"params[{index}] must be a Tensor, got {kind}: pass model.parameters()")
        shape, wrong = tuple(p.shape), ""
        if not p.is_leaf:
            wrong = f"be a leaf tensor, got the result of an operation of shape {shape}: pass the tensor it "
            wrong += "was made from, or .detach() it"
        elif not (p.is_floating_point() or p.is_complex()):
            wrong = f"be floating point or complex, got {p.dtype}: leave it out, or make it a buffer"
        elif p.is_conj():
            wrong = f"hold its own values, got a conjugate view of shape {shape}, which the step cannot "
            wrong += "write to: make it of tensor.resolve_conj()"
        elif getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
            wrong = f"be whole or a DTensor, got one of FullyShardedDataParallel (FSDP1), of shape {shape}: "
            wrong += "use torch.distributed.fsdp.fully_shard (FSDP2)"
        elif id(p) in seen:
            wrong = (
                f"be in one group, once, got a tensor of shape {shape} a second time: leave one of them out"
            )
        if wrong:
            raise ValueError(f"params[{index}] must {wrong}")
        seen.add(id(p))


def refuse_partitioner() -> None:
    """Raises if ZeroRedundancyOptimizer is making this optimizer, to show it a part of the parameters."""
    kind = getattr(sys.modules.get("torch.distributed.optim"), "ZeroRedundancyOptimizer", None)
    frame = sys._getframe(1) if kind is not None else None
    while frame is not None:
        if issubclass(type(frame.f_locals.get("self")), kind):  # type: ignore[arg-type]
            raise TypeError(
                "optimizer_class of ZeroRedundancyOptimizer must be one without modes, got a Schedule-Free "
                "one: its eval() and train() would reach the parameters of one process only. Divide model "
                "and state with torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )
        frame = frame.f_back


def refuse_flat_partitions(built: int, params: list[Tensor]) -> None:
    """Raises if DeepSpeed has put its flat partitions into a group in place of the parameters.

    Args:
        built: elements that the group was built with.
        params: those it has now.
    """
    if "deepspeed" not in sys.modules or sum(p.numel() for p in params) == built:
        return
    raise RuntimeError(
        f"params must be those of the model, got {len(params)} of shape {tuple(params[0].shape)} in their "
        "place, as DeepSpeed's ZeRO has them: eval() would put x into its flat copies, and the model would "
        "not see it. Divide model and state with torch.distributed.fsdp.fully_shard (FSDP2), or set "
        "zero_optimization.stage to 0"
    )


def find_problems(group: Mapping[str, Any], beta: Any, may_be: Collection[str]) -> list[str]:
    """Returns the problems of the options that torch has and the equations do not.

    Args:
        group: with its options and parameters; a wrapper's drawer, which has few of them.
        beta: its interpolation.
        may_be: the precisions that the optimizer has.
    """
    given = {name: rule for name, rule in _RULES.items() if name in group}
    found = [
        checks.problem(name, rule, group[name]) for name, rule in given.items() if not rule.holds(group[name])
    ]
    precision = group.get("precision")
    if precision not in ("lean", "8bit"):
        return found
    start, got = "precision must be 'exact'", f"got {precision!r}"
    if "lean" not in may_be:
        found.append(f"{start} in this class, {got}: use the class without 'Closure' in its name")
    elif precision not in may_be:
        found.append(
            f"precision must be 'exact' or 'lean' in this class, {got}: its buffers have no such form"
        )
    if beta == 0:
        found.append(f"{start} at beta = 0, {got}: z is y there, and the gap between them says nothing")
    params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]  # with a name or without
    dtypes = forms.LEAN_DTYPES if precision == "lean" else eight.DTYPES
    wrong = [p for p in params if p.dtype not in dtypes]
    if wrong:
        found.append(f"{start} for {wrong[0].dtype} parameters, {got}: give them a group of their own")
    return found


def check_module(model: Any) -> None:
    """Raises unless this is a model."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}: pass the model itself")


def check_gradients(params: Iterable[Tensor], or_sparse: bool = False) -> None:
    """Raises on a gradient that the step cannot use; without moments it can use a sparse one."""
    layouts = {torch.strided, torch.sparse_coo} if or_sparse else {torch.strided}
    for p in params:
        grad = p.grad
        if grad is not None and grad.layout not in layouts:
            raise RuntimeError(
                f"gradients must be dense, got {grad.layout} for a parameter of shape {tuple(p.shape)}: "
                "use sparse=False in the embedding, or SGD"
            )
        if grad is not None and is_divided(p) != is_divided(grad):
            raise RuntimeError(
                f"gradients must be DTensors where their parameters are, got {type(grad).__name__} for "
                f"{type(p).__name__} of shape {tuple(p.shape)}: divide it with distribute_tensor(grad, "
                "p.device_mesh, p.placements)"
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


def as_number(value: Any) -> Any:
    """Returns a one-element tensor or NumPy float as a float, anything else as it is for the rules to judge.

    NumPy's would carry their dtype into the sum of weights, which in 16 bits soon stops growing.
    """
    one = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, np.floating)
    return float(value) if one else value
