"""The closure forms: the parameters hold x between steps, and y only inside the closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sftorch import _checks, _iterates
from sftorch._core import Batch, as_real
from sftorch._modes import DirectedOptimizer
from sftorch.adamw import AdamWDirection
from sftorch.radam import RAdamDirection
from sftorch.sgd import SGDDirection


class XAtRest(DirectedOptimizer):
    """Abstract: `step(closure)` for parameters that hold x, so that nothing needs to be switched."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        """Takes one step; `p.grad` is read and never written.

        Args:
            closure: required; clears the gradients, evaluates the model (which then holds y), calls
                backward and returns the loss.

        Returns:
            The closure's loss.

        Raises:
            TypeError: without a closure. If the closure raises, the parameters hold x again.
        """
        if not callable(closure):
            raise TypeError(
                f"closure must be a function, got {closure!r}: pass one that evaluates the model and calls "
                "backward, or use the class without 'Closure' in its name"
            )
        lrs = [self._group_lr(group) for group in self.param_groups]
        x = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        try:
            self._extrapolate()
            with torch.enable_grad():
                loss = closure()
            for group in self.param_groups:
                _checks.check_gradients(group["params"])
        except BaseException:
            self._restore(x)
            raise
        self._restore({p: value for p, value in x.items() if p.grad is None})
        for group, lr in zip(self.param_groups, lrs, strict=True):
            for batch in self._batches(group, lr):
                self._advance(group, batch, x)
            self._finish(group, lr)
        return loss

    def _restore(self, x: dict[Tensor, Tensor]) -> None:
        for p, value in x.items():
            p.copy_(value)

    def _extrapolate(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state.get(p, {}):
                    p.copy_(_iterates.interpolate(p, self.state[p]["z"], self._beta(group)))  # S9

    def _advance(self, group: dict[str, Any], batch: Batch, x: dict[Tensor, Tensor]) -> None:
        grads, zs, buffers = self._gathered(group, batch)
        ys, xs = [as_real(p) for p in batch.params], [as_real(x[p]) for p in batch.params]
        lr_t, decay, c = batch.lr_t, group["weight_decay"], batch.c
        if group["foreach"] and all(y.dtype == z.dtype for y, z in zip(ys, zs, strict=True)):
            directions = self._direction_foreach(grads, buffers, group, batch.clock.step)
            _iterates.average_foreach_(ys, xs, zs, directions, lr_t, decay, c)
        else:
            for i, (y, x_p, z, grad) in enumerate(zip(ys, xs, zs, grads, strict=True)):
                own = {name: tensors[i] for name, tensors in buffers.items()}
                direction = self._direction_single(grad, own, group, batch.clock.step)
                _iterates.average_single_(y, x_p, z, direction, lr_t, decay, c)
        for p in batch.params:
            self._set_clock(p, batch.clock)


class SGDScheduleFreeClosure(SGDDirection, XAtRest):
    """Schedule-Free SGD whose parameters hold x; arguments as `SGDScheduleFree`, `step` needs a closure.

    Example:
        >>> import sftorch, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = sftorch.SGDScheduleFreeClosure(model.parameters(), lr=0.5)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(1, 2)).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)  # the model holds x again
    """


class AdamWScheduleFreeClosure(AdamWDirection, XAtRest):
    """Schedule-Free AdamW whose parameters hold x; arguments as `AdamWScheduleFree`, `step` needs a closure.

    Example:
        >>> import sftorch, torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = sftorch.AdamWScheduleFreeClosure([w], lr=0.1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """


class RAdamScheduleFreeClosure(RAdamDirection, XAtRest):
    """Schedule-Free RAdam whose parameters hold x; arguments as `RAdamScheduleFree`, `step` needs a closure.

    Example:
        >>> import sftorch, torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = sftorch.RAdamScheduleFreeClosure([w], lr=0.1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """
