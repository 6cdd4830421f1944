"""sftorch inside the trainers that people use: `hf` (transformers), `lightning`, `fastai`, `sd_scripts`.

Each framework is imported by its own module only, when that is first used. accelerate needs nothing but
`unwrap`; sd-scripts (Kohya_SS) needs nothing to train, see docs/kohya.md, and `sd_scripts` to resume.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sfcore.lazy import on_demand as _on_demand
from sftorch.state.modes import TrainEvalOptimizer

__all__ = ["flat_metrics", "unwrap"]

if TYPE_CHECKING:
    from sftorch.trainers import fastai as fastai
    from sftorch.trainers import hf as hf
    from sftorch.trainers import lightning as lightning
    from sftorch.trainers import sd_scripts as sd_scripts
else:  # a type checker would take it for leave to use any name
    __getattr__, __dir__ = _on_demand(globals(), ("fastai", "hf", "lightning", "sd_scripts"))


def unwrap(optimizer: object) -> TrainEvalOptimizer:
    """Returns the sftorch optimizer inside a trainer's wrapper, with all of its methods.

    Args:
        optimizer: one of sftorch's, or what accelerate, Lightning, DeepSpeed or fastai made of it.

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
    while (held := getattr(inner, "optimizer", getattr(inner, "opt", None))) is not None:
        inner = held
    if not isinstance(inner, TrainEvalOptimizer):
        kind = type(inner)
        raise TypeError(
            f"optimizer must be one of sftorch's with train() and eval(), got {kind.__module__}."
            f"{kind.__qualname__}: build it with sftorch.AdamWScheduleFree, RAdamScheduleFree, "
            "SGDScheduleFree or ScheduleFreeWrapper"
        )
    return inner


def flat_metrics(optimizer: object) -> dict[str, float]:
    """Returns what to log of a step as one flat dict of floats, for TensorBoard, W&B and the like.

    Args:
        optimizer: as for `unwrap`.

    Returns:
        "schedule_free/NAME" for each name of `optimizer.metrics(distance=True)`, of the first group: lr (with
        warm-up), lr_max, effective_lr, c, weight_sum, step, and after a restart restart_steps, restart_moved
        and restart_jump; of later groups "schedule_free/GROUP/NAME". x_z_distance is that of all together.

    Raises:
        TypeError: as `unwrap`.

    Example:
        >>> import sftorch, torch
        >>> from sftorch.trainers import flat_metrics
        >>> optimizer = sftorch.SGDScheduleFree([torch.nn.Parameter(torch.ones(2))])
        >>> flat_metrics(optimizer)["schedule_free/x_z_distance"]
        0.0
    """
    groups = unwrap(optimizer).metrics(distance=True)
    distance = math.hypot(*(group.pop("x_z_distance") for group in groups))
    return {"schedule_free/x_z_distance": distance} | {
        f"schedule_free/{number}/{name}" if number else f"schedule_free/{name}": float(value)
        for number, group in enumerate(groups)
        for name, value in group.items()
    }
