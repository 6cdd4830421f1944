"""Float32 parameters that stand in a wrapped optimizer's place for 16-bit ones while it steps or loads.

What it makes of them, its own buffers included, is then float32, and no step is lost to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sftorch import _halves


def needed_for(params: Iterable[Tensor]) -> list[Tensor]:
    """Returns the 16-bit parameters."""
    return [p for p in params if _halves.rest_dtype(p.dtype) is not None]


def widen_state(base: torch.optim.Optimizer, params: Iterable[Tensor]) -> None:
    """Puts into float32 what a base that makes its state at once (Adagrad) made of 16-bit parameters."""
    for p in needed_for(params):
        for name, value in base.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.dtype == p.dtype:
                base.state[p][name] = value.to(torch.float32)


@contextmanager
def in_place_of(base: torch.optim.Optimizer, values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Puts float32 values in the place of parameters, with their gradients, inside a `with` block.

    Args:
        base: any torch optimizer; its groups and the keys of its state are as before afterwards.
        values: parameter -> float32 tensor, whose memory the stand-in shares.
    """
    stand_ins = {p: torch.nn.Parameter(value) for p, value in values.items()}
    for p, stand_in in stand_ins.items():
        stand_in.grad = None if p.grad is None else p.grad.to(torch.float32)
    _swap(base, stand_ins)
    try:
        yield
    finally:
        _swap(base, {stand_in: p for p, stand_in in stand_ins.items()})


def _swap(base: torch.optim.Optimizer, others: Mapping[Tensor, Tensor]) -> None:
    if not others:
        return
    for group in base.param_groups:
        group["params"][:] = [others.get(p, p) for p in group["params"]]
    for p in [p for p in base.state if p in others]:
        base.state[others[p]] = base.state.pop(p)
