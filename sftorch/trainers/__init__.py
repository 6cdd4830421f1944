"""sftorch inside the trainers that people use: `hf` for transformers, `lightning` for Lightning.

Each framework is imported by its own module only, when that is first used. accelerate needs nothing but
`unwrap`; sd-scripts (Kohya_SS) needs nothing, see docs/kohya.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfcore.lazy import on_demand as _on_demand
from sftorch.state.modes import TrainEvalOptimizer

__all__ = ["unwrap"]

if TYPE_CHECKING:
    from sftorch.trainers import hf as hf
    from sftorch.trainers import lightning as lightning
else:  # a type checker would take it for leave to use any name
    __getattr__, __dir__ = _on_demand(globals(), ("hf", "lightning"))


def unwrap(optimizer: object) -> TrainEvalOptimizer:
    """Returns the sftorch optimizer inside a trainer's wrapper, with all of its methods.

    Args:
        optimizer: one of sftorch's, or what accelerate, Lightning or DeepSpeed made of it.

    Raises:
        TypeError: if there is none of sftorch's with train and eval mode inside.

    Example:
        >>> import sftorch, torch
        >>> from sftorch.trainers import unwrap
        >>> optimizer = sftorch.SGDScheduleFree([torch.nn.Parameter(torch.ones(2))])
        >>> unwrap(optimizer) is optimizer  # and unwrap(accelerator.prepare(optimizer)) is, too
        True
    """
    inner = optimizer
    # Lightning's wrapper is an instance of the class it wraps, with a __dict__ of its own.
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, TrainEvalOptimizer):
        kind = type(inner)
        raise TypeError(
            f"optimizer must be one of sftorch's with train() and eval(), got {kind.__module__}."
            f"{kind.__qualname__}: build it with sftorch.AdamWScheduleFree, RAdamScheduleFree, "
            "SGDScheduleFree or ScheduleFreeWrapper"
        )
    return inner
