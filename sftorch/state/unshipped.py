"""One warning where a model's state dict gives y: what people save in train mode is rarely what they meant.

torch tells an optimizer nothing of its modules. A search of the heap for them takes as long as one for
garbage, and torch warns of global hooks where a model is compiled. So `nn.Module.state_dict` has a look
around it, from an optimizer's start until it has warned or is gone. Steps and forward passes are as ever.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from sftorch.state.modes import TrainEvalOptimizer

_watched: set[weakref.ref[TrainEvalOptimizer]] = set()
_looking: Any = None  # torch's state_dict with the look around it, while that is in place


def watch(optimizer: TrainEvalOptimizer) -> None:
    """Has an optimizer warned about, once."""
    global _looking
    _watched.add(weakref.ref(optimizer, _forget))
    if _looking is None:
        _looking = _with_a_look(nn.Module.state_dict)
        nn.Module.state_dict = _looking  # type: ignore[method-assign]


def _forget(optimizer: weakref.ref[TrainEvalOptimizer]) -> None:
    """Takes the look away with the last optimizer, unless somebody has put something around it since."""
    global _looking
    _watched.discard(optimizer)
    there = vars(nn.Module)["state_dict"]
    if not _watched and there is _looking:
        nn.Module.state_dict = there.__wrapped__  # type: ignore[method-assign]
        _looking = None


def _with_a_look(state_dict: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(state_dict)
    def looking(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # The inner calls, of each module, have a destination; with keep_vars nobody saves.
        if not args and "destination" not in kwargs and not kwargs.get("keep_vars"):
            _look(self)
        return state_dict(self, *args, **kwargs)

    return looking


def _look(model: nn.Module) -> None:
    if torch.compiler.is_compiling():
        return
    for reference in list(_watched):
        optimizer = reference()
        if optimizer is None or not optimizer._gives_y():
            continue
        ours = set(map(id, optimizer._params()))
        if any(id(p) in ours for p in model.parameters()):
            _forget(reference)
            warnings.warn(
                f"the state dict of a {type(model).__name__} is one of y, as its {type(optimizer).__name__} "
                "is in train mode; what should be shipped is x. Call sftorch.ship_x(model, optimizer) once, "
                "and every state dict is x; or call optimizer.eval() before and optimizer.train() after. A "
                "checkpoint to go on from may have y, beside optimizer.state_dict(). This is said once",
                stacklevel=3,
            )
