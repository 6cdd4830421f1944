"""Running statistics at the weights that are evaluated: BatchNorm keeps those of y."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from sfcore import checks
from sftorch import _rng
from sftorch.state import arguments

__all__ = ["recalibrate"]

Batch = TypeVar("Batch")


@torch.no_grad()
def recalibrate(
    model: nn.Module, batches: Iterable[Batch], call: Callable[[nn.Module, Batch], object] | None = None
) -> int:
    """Averages running mean and variance over batches, at the weights that the model holds now.

    Call it at x, inside of `optimizer.evaluation()` or after `optimizer.eval()`, before every evaluation and
    before a model is shipped. Every batch counts the same. Only the layers with running statistics work as
    in training; dropout and the rest are in eval mode, as they will be when the statistics are used.

    Args:
        model: BatchNorm, SyncBatchNorm and InstanceNorm with running statistics are found in it. A layer that
            is in eval mode while the model trains is frozen, and left alone.
        batches: some tens of batches of the training size. Of a tuple or a list the first is the input, of a
            mapping the items are keyword arguments.
        call: how to run a batch; default None: `model(input)`, or `model(**batch)` for a mapping.

    Returns:
        The number of batches used; 0 where there is nothing to do, and then none is drawn.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: if there are no batches. After this or any other error, statistics are what they were.
            Training flags and the global random states are always put back.

    Example:
        >>> import sftorch, torch
        >>> from sftorch.recalibrate import recalibrate
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        >>> optimizer = sftorch.AdamWScheduleFree(model.parameters())
        >>> with optimizer.evaluation():
        ...     recalibrate(model, torch.randn(10, 32, 3))
        10
    """
    arguments.check_module(model)
    checks.require(TypeError, batches=(checks.BATCHES, batches), call=(checks.optional(checks.CALL), call))
    found = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    layers = [layer for layer in found if layer.training or not model.training]  # the others are frozen
    if not layers:
        return 0
    flags = {module: module.training for module in model.modules()}
    momenta = {layer: layer.momentum for layer in layers}
    before = {
        layer: {name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)}
        for layer in layers
    }
    randomness = _rng.capture()
    used = 0
    try:
        model.eval()
        for layer in layers:
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None  # torch's word for a plain average
        for batch in batches:
            (call or _run)(model, batch)
            used += 1
        if not used:
            raise ValueError("batches must hold at least one batch, got none: pass some training batches")
    except BaseException:
        for layer, statistics in before.items():
            layer.load_state_dict(statistics, strict=False)
        raise
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, training in flags.items():
            module.training = training
        _rng.restore(randomness)
    return used


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, list | tuple) else batch)
