"""Steps inside backward: each gradient is used as soon as it is complete, and freed."""

from __future__ import annotations

import functools
import gc

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sftorch.step.plan import GroupPlan, YAtRest


class InBackward:
    """What `step_in_backward` returns; `remove()` goes back to ordinary steps."""

    def __init__(self, optimizer: YAtRest):
        self._optimizer = optimizer
        plans: dict[Tensor, GroupPlan | None] = {}
        self._hooks = [
            p.register_post_accumulate_grad_hook(functools.partial(_step_one, optimizer, plans, index))
            for index, group in enumerate(optimizer.param_groups)
            for p in group["params"]
            if p.requires_grad
        ]
        optimizer._ahead = set()

    def remove(self) -> None:
        """Takes the hooks away; call it after `optimizer.step()`, not between backward and step."""
        for hook in self._hooks:
            hook.remove()
        self._optimizer._ahead = None


def step_in_backward(optimizer: YAtRest) -> InBackward:
    """Lets backward step each parameter when its gradient is complete, and free the gradient.

    So the gradients of a model never exist all at once. The loop stays as it is: `optimizer.step()` after
    backward steps what is left (parameters that were frozen or added later), and ends the step for
    schedulers, warm-up and the group's clock. The trajectory is that of ordinary steps, bit for bit.

    What needs all gradients at once cannot work. A second backward before `step()`, as in gradient
    accumulation, raises. These go unnoticed, because nobody asks the optimizer: clipping by global norm
    (it finds no gradients; clip each by `p.register_hook`) and GradScaler (the step would use scaled
    gradients). If backward raises, some parameters may have taken the step: `optimizer.step()` ends it.

    Args:
        optimizer: SGDScheduleFree, AdamWScheduleFree or RAdamScheduleFree, whose gradients are None.

    Returns:
        A handle whose `remove()` undoes it.

    Raises:
        TypeError: for the closure forms, the wrapper and Polyak steps, which need all gradients at once.
        RuntimeError: if it is on already, or a parameter has a gradient; and with DistributedDataParallel,
            which averages gradients after they were used, here or in the first backward pass.

    Example:
        >>> import sftorch, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.01)
        >>> handle = sftorch.step_in_backward(optimizer)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> model.weight.grad is None
        True
        >>> optimizer.step()
        >>> handle.remove()
    """
    if not isinstance(optimizer, YAtRest):
        raise TypeError(
            "optimizer must be SGDScheduleFree, AdamWScheduleFree or RAdamScheduleFree, got "
            f"{type(optimizer).__name__}: the others need all gradients at once"
        )
    if optimizer._carried:
        raise TypeError(
            f"optimizer must not be {type(optimizer).__name__}, which takes Polyak steps: it needs all "
            "gradients and the loss before the first parameter moves; take ordinary steps"
        )
    if optimizer._ahead is not None:
        raise RuntimeError("optimizer must step in backward once, got it twice: remove() the first handle")
    if any(p.grad is not None for p in optimizer._params()):
        raise RuntimeError(
            "gradients must be None when steps move into backward, got some: call optimizer.zero_grad() first"
        )
    _refuse_replicas(optimizer)
    return InBackward(optimizer)


def _refuse_replicas(optimizer: YAtRest) -> None:
    """Raises if DistributedDataParallel has wrapped parameters of an optimizer; a look at every object."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    own = set(optimizer._params())
    for one in gc.get_objects():
        if issubclass(type(one), DistributedDataParallel) and not own.isdisjoint(one.parameters()):
            raise RuntimeError(
                "step_in_backward must not be used with DistributedDataParallel, which averages gradients "
                "only after they were used: divide the model with torch.distributed.fsdp.fully_shard "
                "(FSDP2), or take ordinary steps"
            )


@torch.no_grad()
def _step_one(optimizer: YAtRest, plans: dict[Tensor, GroupPlan | None], index: int, p: Tensor) -> None:
    """Takes the coming step of one parameter, as a group of its own, and frees its gradient."""
    ahead = optimizer._ahead
    assert ahead is not None  # hooks and set come and go together
    if not plans:  # the first one: replicas may have been made since
        _refuse_replicas(optimizer)
    if p in ahead:
        p.grad = None  # or step() would take it for one that is left
        raise RuntimeError(
            f"parameters must have one backward a step, got a second for one of shape {tuple(p.shape)}: "
            "call optimizer.step() after each backward; gradients cannot accumulate while steps are in it"
        )
    plan = optimizer._prepare_one(optimizer.param_groups[index], p, plans.get(p))
    optimizer._is_half_stepped = True
    optimizer._run([plan])
    optimizer._close([plan], is_whole=False)
    # The random words of a rounded form depend on the other groups, too.
    plans[p] = plan if plan.may_be_kept and not optimizer._is_rounded(plan.group) else None
    ahead.add(p)
    p.grad = None
