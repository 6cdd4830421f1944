"""Models whose `state_dict()` is x, whoever asks for it: a trainer, an EMA copy, peft, `torch.save`.

Trainers save what `model.state_dict()` returns, and most ask in the middle of training, where the parameters
hold y. Hooks of the modules put x there instead, and see what is loaded.
"""

from __future__ import annotations

import logging
import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sftorch.state import arguments, prints
from sftorch.state.forms import has_started
from sftorch.state.modes import SHIPPED, TrainEvalOptimizer
from sftorch.state.state_dict import settle

_log = logging.getLogger("sftorch")


def ship_x(model: nn.Module, optimizer: TrainEvalOptimizer) -> XShipped:
    """Makes `model.state_dict()` give x from now on, in training too, until it is told to stop.

    So `torch.save`, `save_pretrained`, peft, accelerate, Lightning, fastai and EMA copies write x, without a
    word to the optimizer. The entries are new tensors (tied weights share one), and the metadata of each
    module says `"weights_hold": "x"`. `keep_vars=True` gives the parameters themselves, as ever.
    `optimizer.state_dict()` is that of eval mode: with both loaded, in any order, training goes on in the
    same bits. In a run, `load_state_dict` of the model's own x leaves y in place; other weights become x, y
    and z (as by `optimizer.rebase()`), unless an optimizer's state is loaded as well. A copy of the model
    (`copy.deepcopy`, pickle) turns into x of the moment it was made when it is first asked, unless its
    weights have changed by then; copied together with the optimizer, it goes on by itself. What reads the
    parameters and not a state dict, such as a merge of adapters, still needs `optimizer.evaluation()` around
    it.

    Args:
        model: a module with parameters of the optimizer, before or after torch.compile, DDP or peft wrap it.
        optimizer: one of sftorch's with train and eval mode; what a trainer made of it is opened by
            `sftorch.trainers.unwrap`.

    Returns:
        A handle: `remove()` ends it, and so does the end of a `with` block over it.

    Raises:
        TypeError: for another optimizer, or no module.
        ValueError: for a copy of the model, or another model.

    Example:
        >>> import sftorch, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = sftorch.SGDScheduleFree(model.parameters(), lr=0.5)
        >>> shipped = sftorch.ship_x(model, optimizer)
        >>> for _ in range(3):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> torch.equal(model.state_dict()["weight"], optimizer.eval_params()[model.weight])
        True
        >>> torch.equal(model.state_dict()["weight"], model.weight)  # which holds y
        False
        >>> shipped.remove()
        >>> torch.equal(model.state_dict()["weight"], model.weight)
        True
    """
    return XShipped(model, optimizer)


class XShipped:
    """What `ship_x` returns: `remove()` ends it, and so does the end of a `with` block over it."""

    def __init__(self, model: nn.Module, optimizer: TrainEvalOptimizer):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {model!r}: pass the module that is trained"
            )
        if not isinstance(optimizer, TrainEvalOptimizer):
            raise TypeError(
                "optimizer must be one of sftorch's with train() and eval(), got "
                f"{type(optimizer).__name__}: sftorch.trainers.unwrap gives the one inside a trainer's "
                "wrapper, and the closure forms hold x anyway"
            )
        arguments.check_entries(model.state_dict(keep_vars=True), optimizer._params())
        self._optimizer = optimizer
        optimizer._ship_x(1)
        self._handles = [model.register_load_state_dict_post_hook(_settle)]
        for module in model.modules():
            if module._parameters:
                loading = _Loading()
                self._handles += [
                    module.register_state_dict_post_hook(_Saving(module)),
                    module.register_load_state_dict_pre_hook(loading.before),
                    module.register_load_state_dict_post_hook(loading.after),
                ]

    def remove(self) -> None:
        """Ends it for this model; nothing is left behind."""
        if self._handles:
            self._optimizer._ship_x(-1)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> XShipped:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _owner(p: Tensor) -> tuple[TrainEvalOptimizer, dict[str, Any]] | None:
    """Returns the optimizer that knows the x of a parameter, and the parameter's group there."""
    found = SHIPPED.get(p)
    optimizer = None if found is None else found[0]()
    return None if optimizer is None else (optimizer, optimizer.param_groups[found[1]])


class _Saving:
    """Hook of a module: puts the x of its own parameters into a state dict.

    Args:
        module: it may be copied, and the hook with it.
        kept: parameter's name -> (print of its y, x), in a copy of the model.
    """

    def __init__(self, module: nn.Module | None, kept: dict[str, tuple[int, Tensor]] | None = None):
        self._module = None if module is None else weakref.ref(module)
        self._kept = kept or {}

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> None:
        for name, p in module._parameters.items():
            held = state_dict.get(prefix + name)
            if p is None or held is None or held is p:  # not saved, or asked for as it is
                continue
            owner = _owner(p)
            if owner is not None:
                shared = _made_for(state_dict)
                x = shared[p]() if p in shared else None
                state_dict[prefix + name] = x = _x(p, *owner) if x is None else x
                shared[p] = weakref.ref(x)
            elif name in self._kept:
                # Into the copy itself, as an EMA of timm writes to the entries of its copy's state dict.
                y_print, x = self._kept.pop(name)
                if prints.take([p]) == [y_print]:
                    p.detach().copy_(x)
        local_metadata["weights_hold"] = "x"

    def _of_copy(self) -> tuple[Any, ...]:
        """Returns what makes the hook of a copy: it must know x, as a copy has no optimizer."""
        module = None if self._module is None else self._module()
        kept = dict(self._kept)
        for name, p in {} if module is None else module._parameters.items():
            owner = None if p is None else _owner(p)
            if p is not None and owner is not None:
                kept[name] = (prints.take([p])[0], _x(p, *owner))
        return None, kept

    def __deepcopy__(self, memo: dict[int, Any]) -> _Saving:
        _, kept = self._of_copy()
        module = None if self._module is None else memo.get(id(self._module()))
        return _Saving(module, kept)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Saving, self._of_copy()


# The state dict that is being made, and the x in it: tied weights share one, as they do in the model.
_made: tuple[Any, dict[Tensor, Any]] = (lambda: None, {})


def _made_for(state_dict: dict[str, Any]) -> dict[Tensor, Any]:
    global _made
    if _made[0]() is not state_dict:
        try:
            _made = (weakref.ref(state_dict), {})
        except TypeError:  # a plain dict, which a caller gave
            return {}
    return _made[1]


@torch.no_grad()
def _x(p: Tensor, optimizer: TrainEvalOptimizer, group: dict[str, Any]) -> Tensor:
    """Returns the x of a parameter as a new tensor of its dtype."""
    settle(optimizer)
    if optimizer._wanted(group) == "y" and has_started(optimizer.state.get(p, {})):
        return optimizer._x(p, group).to(p.dtype, copy=True)
    return p.detach().clone()


class _Loading:
    """Hooks of a module around a load: its own x leaves y in place, other weights become x, y and z."""

    def __init__(self) -> None:
        self._before: dict[Tensor, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def before(self, module: nn.Module, *_: Any) -> None:
        """Keeps what the parameters hold, and their x."""
        self._before = {}
        for p in module._parameters.values():
            owner = None if p is None else _owner(p)
            if (
                p is None or owner is None or owner[0]._loaded is not None
            ):  # that is settled when all is loaded
                continue
            if has_started(owner[0].state.get(p, {})):
                self._before[p] = (p.detach().clone(), _x(p, *owner))

    @torch.no_grad()
    def after(self, module: nn.Module, incompatible: Any) -> None:
        """Compares."""
        others = 0
        for p, (held, x) in self._before.items():
            owner = _owner(p)
            if owner is None or _same(p, held):
                continue
            if _same(p, x):
                p.copy_(held)
            else:
                owner[0]._rebase(p, owner[1])
                others += 1
        self._before = {}
        if others:
            _log.warning(
                "weights of another moment were loaded into %d parameters of a %s: they are x, y and z now, "
                "unless the optimizer's state is loaded too",
                others,
                type(module).__name__,
            )


def _same(a: Tensor, b: Tensor) -> bool:
    first, second = prints.take([a, b])
    return first == second


def _settle(model: nn.Module, incompatible: Any) -> None:
    """Puts right what was loaded beside an optimizer's state, as soon as all of it is there."""
    owners = {id(owner[0]): owner[0] for p in model.parameters() if (owner := _owner(p)) is not None}
    for optimizer in owners.values():
        settle(optimizer, or_raise=False)
