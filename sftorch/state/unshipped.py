"""One warning where y is about to be shipped: what people save in train mode is rarely what they meant.

torch tells an optimizer nothing of its modules. A search of the heap for them takes as long as one for
garbage, and torch warns of global hooks where a model is compiled. So `nn.Module.state_dict`, and the merges
of peft where that is loaded, have a look around them, from an optimizer's start until it has warned or is
gone. Steps and forward passes are as ever.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from sftorch.state.modes import TrainEvalOptimizer

_watched: set[weakref.ref[TrainEvalOptimizer]] = set()
_looking: dict[tuple[type, str], Any] = {}  # what has a look around it, while that is in place
_MERGES = ("merge_and_unload", "merge_adapter")


def watch(optimizer: TrainEvalOptimizer) -> None:
    """Has an optimizer warned about, once."""
    _watched.add(weakref.ref(optimizer, _forget))
    _look_at(nn.Module, "state_dict", _with_a_look)
    tuner = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTuner", None)
    for name in _MERGES if tuner else ():
        _look_at(tuner, name, _with_a_look_at_a_merge)


def _look_at(owner: Any, name: str, around: Callable[[Any], Any]) -> None:
    if (owner, name) not in _looking:
        _looking[owner, name] = around(vars(owner)[name])
        setattr(owner, name, _looking[owner, name])


def _forget(optimizer: weakref.ref[TrainEvalOptimizer]) -> None:
    """Takes the looks away with the last optimizer, but for one that somebody has put something around."""
    _watched.discard(optimizer)
    if _watched:
        return
    for (owner, name), looking in list(_looking.items()):
        if vars(owner)[name] is looking:
            setattr(owner, name, looking.__wrapped__)
            del _looking[owner, name]


def _with_a_look(state_dict: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(state_dict)
    def looking(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # The inner calls, of each module, have a destination; with keep_vars nobody saves.
        if not args and "destination" not in kwargs and not kwargs.get("keep_vars"):
            _look(self)
        return state_dict(self, *args, **kwargs)

    return looking


def _with_a_look_at_a_merge(merge: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(merge)
    def looking(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _look(self, merge.__name__)
        return merge(self, *args, **kwargs)

    return looking


def _look(model: nn.Module, merge: str = "") -> None:
    """Warns of each optimizer whose y a state dict of the model would hold, or a merge would take."""
    if torch.compiler.is_compiling():
        return
    for reference in list(_watched):
        optimizer = reference()
        # While x is shipped, it is what a state dict gives; a merge reads the parameters.
        if optimizer is None or not optimizer._trains_at_y() or (optimizer._ships_x and not merge):
            continue
        ours = set(map(id, optimizer._params()))
        if any(id(p) in ours for p in model.parameters()):
            _forget(reference)
            because = f"as its {type(optimizer).__name__} is in train mode; what should be shipped is x."
            if merge:
                told = (
                    f"{merge} of a {type(model).__name__} merges y, {because} Call it inside of "
                    "`with optimizer.evaluation():`, or after optimizer.eval(). This is said once"
                )
            else:
                told = (
                    f"the state dict of a {type(model).__name__} is one of y, {because} Call "
                    "sftorch.ship_x(model, optimizer) once, and every state dict is x; or call "
                    "optimizer.eval() before and optimizer.train() after. A checkpoint to go on from may "
                    "have y, beside optimizer.state_dict(). This is said once"
                )
            warnings.warn(told, stacklevel=3)
