"""Lists in groups of bounded size, and S6-S9* of Adam's direction on lists by torch's own fused operation.

The fused operation has no averages, but S7 is its step from z, and around it y is x: with the beta that built
y, (1 - k2) / (1 - k1),

    x = y + w (z - y)     z' = z - lr_t (direction + decay)     y' = x + k2 (z' - x)

with w = (k1 - k2) / (1 - k2). That reads and writes 56 bytes a parameter, with decay 68, where the plain
operations take 92 and 104 (`python -m benchmarks launches`). Its scratch are first moments, which must be 0.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfcore.averaging import bias_correction
from sftorch.law.parts import PLAIN, is_fake

Tensors = list[Tensor]
Cut = tuple[
    int, int, int | None
]  # of a tensor of a list: its place, begin and end; the end of a whole is None

# Elements of a group. On a CPU what a group touches stays in the cache from call to call. On CUDA a call of a
# list makes a launch for each 21M elements at most, so larger groups would save none.
GROUP = {"cpu": 1 << 18, "cuda": 1 << 25}
ALIGNED = 8  # elements: each tensor's scratch begins at a multiple, so that a GPU can load 16 bytes at once
# By this much of its distance from 1 b2 may be rounded: from 0.99997 on, float32 leaves too few.
B2_SLACK = 1e-3
LEAST_BETA = 0.01  # of those that x is taken from; below, y has too little of it
LEAST_EPS = 1e-30  # float32 keeps what is larger


def groups_of(lists: Sequence[Tensors]) -> list[list[Cut]]:
    """Returns which tensors of some lists go together, large ones in pieces.

    Args:
        lists: of one length, the tensors at one place of one number of elements.
    """
    first = lists[0]
    limit = GROUP.get(first[0].device.type) if first else None
    if limit is None:
        return [[(i, 0, None) for i in range(len(first))]]
    found: list[list[Cut]] = [[]]
    room = limit
    for i, tensor in enumerate(first):
        size = tensor.numel()
        if size > limit and all(tensors[i].is_contiguous() for tensors in lists):
            cuts: list[Cut] = [(i, begin, min(begin + limit, size)) for begin in range(0, size, limit)]
        else:
            cuts = [(i, 0, None)]
        for cut in cuts:
            taken = size if cut[2] is None else cut[2] - cut[1]
            if taken > room and found[-1]:
                found.append([])
                room = limit
            found[-1].append(cut)
            room -= taken
    return found


def cut(tensors: Tensors, cuts: Iterable[Cut]) -> Tensors:
    """Returns views of the tensors of a group, flat where they are pieces; nothing for an empty list."""
    if not tensors:
        return []
    return [
        tensors[i] if end is None else tensors[i].view(-1).narrow(0, begin, end - begin)
        for i, begin, end in cuts
    ]


class Memory(NamedTuple):
    """What the fused operation is given beside its lists.

    Attributes:
        moments: for first moments, of shape (n,).
        time: float32 of shape ().
    """

    moments: Tensor
    time: Tensor


class Numbers(NamedTuple):
    """What the operations of `step_` are called with.

    Attributes:
        to_x: w.
        to_y: k2, but for what rounding w has done to k1.
        lr, eps: with the root of the bias correction in them.
        b2: the decay of v.
        z_by_x, z_by_z: what z loses of x and of itself before the fused operation.
        decay: its own, of z.
    """

    to_x: float
    to_y: float
    lr: float
    eps: float
    b2: float
    z_by_x: float
    z_by_z: float
    decay: float


def numbers_of(numbers: Sequence[float], dtype: torch.dtype) -> Numbers | None:
    """Returns the numbers of a step, from those of a `Move` with Adam's direction; None if it needs others.

    That is a step at c = 0, c = 1 or lr = 0, one whose y has no part of x, and one of an extreme b2 or eps.

    The fused operation rounds b2 and 1 - b2 to the tensors' dtype, each by itself, which at 0.999 makes a
    float32 v too large by 1.3e-5. Rounded before, both are exact and v is a mean, to 4e-8 of 8,000 steps of
    random gradients (`average_single_`: 3e-8); its memory is off by the 1.3e-5 instead.
    What rounding leaves of the decay of z, 1 - 1e-7, is taken from x, and what it leaves of w from k2. The
    decay is rounded apart from the step, as in torch.optim.AdamW; the plain operations round their sum.
    """
    lr_t, wd_y, wd_z, k1, k2, own_b2, eps, _, correction, _ = numbers
    near = np.float32 if dtype == torch.float32 else float
    b2 = float(near(own_b2))
    if not (lr_t > 0 and 0 < k1 < 1 and LEAST_BETA * (1 - k1) <= 1 - k2 and (wd_y == 0 or wd_z == 0)):
        return None
    if abs(b2 - own_b2) > B2_SLACK * (1 - own_b2):
        return None
    if b2 != own_b2 and correction < 1:  # the correction of the b2 that is used, at the same time
        correction = bias_correction(b2, math.log1p(-correction) / math.log(own_b2))
    root, beta = math.sqrt(correction), (1 - k2) / (1 - k1)
    loss = lr_t * wd_y
    of_z = 1 - float(near(1 - loss * (1 - beta)))
    if eps * root < LEAST_EPS or not of_z < 0.5:
        return None
    to_x = float(near((k1 - k2) / (1 - k2)))
    lr = lr_t * root
    z_by_x = (loss - of_z) / (1 - of_z)
    return Numbers(to_x, (k1 - to_x) / (1 - to_x), lr, eps * root, b2, z_by_x, lr_t * wd_z, of_z / lr)


def why_plain(ys: Tensors, zs: Tensors, vs: Tensors, grads: Tensors) -> str:
    """Returns why `step_` does not take lists, "" if it does: it walks their memory as it lies.

    Example:
        >>> import torch
        >>> from sftorch.law.lists import why_plain
        >>> one = [torch.ones(2, 3)]
        >>> why_plain(one, one, one, [torch.ones(3, 2).t()])
        'tensors of a parameter lie in different orders'
    """
    first = ys[0]
    kind = first.device.type
    if kind not in GROUP or first.dtype not in (torch.float32, torch.float64) or not _is_there(kind):
        return f"torch has no fused operation for {first.dtype} on {kind}"
    every = (*ys, *zs, *vs, *grads)
    if not PLAIN.issuperset(map(type, every)) and not all(map(is_fake, every)):
        return "there are tensors of other classes"
    if {(t.dtype, t.device) for t in every} != {(first.dtype, first.device)}:
        return "there are tensors of other dtypes or devices"
    if any(t.is_neg() for t in every):
        return "there are tensors with a pending sign"
    strides = [y.stride() for y in ys]
    if any([t.stride() for t in tensors] != strides for tensors in (zs, vs, grads)):
        return "tensors of a parameter lie in different orders"
    return "" if all(map(_is_dense, ys)) else "there are tensors with gaps"


def _is_dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


@functools.cache
def _is_there(device: str) -> bool:
    """Tells whether this torch has the private operation; on a CPU it came later, so it is tried."""
    if not hasattr(torch, "_fused_adamw_"):
        return False
    if device != "cpu":
        return True
    y, z, v, g = torch.ones(4, 1).unbind()
    number = Numbers(0.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0)
    try:
        memory = memory_for([[y]])
        step_([y], [z], [v], [g], number, moments_in(memory, [y]), memory.time, False)
    except (RuntimeError, TypeError):  # no kernel; other arguments
        return False
    return True


def memory_for(groups: Iterable[Tensors]) -> Memory:
    """Returns what is needed beside any of some groups, one at a time."""
    listed = list(groups)
    moments = listed[0][0].new_empty(max(sum(map(_room, tensors)) for tensors in listed))
    # At the time infinity there is no bias correction.
    return Memory(moments, torch.full((), math.inf, dtype=torch.float32, device=moments.device))


def moments_in(memory: Memory, tensors: Tensors) -> Tensors:
    """Returns first moments like the tensors of a group, and last the memory that they take, to be zeroed."""
    begins = list(itertools.accumulate(map(_room, tensors), initial=0))
    of_all = memory.moments
    found = [of_all.as_strided(t.shape, t.stride(), at) for t, at in zip(tensors, begins, strict=False)]
    return [*found, of_all.narrow(0, 0, begins[-1])]


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() // ALIGNED) * ALIGNED


def step_(
    ys: Tensors,
    zs: Tensors,
    vs: Tensors,
    grads: Tensors,
    of: Numbers,
    moments: Tensors,
    time: Tensor,
    maximize: bool,
) -> None:
    """Takes one step of every y and z along Adam's direction, in place.

    Args:
        ys, zs, vs, grads: that `why_plain` has nothing against.
        of: the numbers of the step.
        moments, time: of `moments_in` and `memory_for`.
        maximize: ascend instead of descend.
    """
    *moments, all_of_them = moments
    all_of_them.zero_()
    if of.to_x:
        torch._foreach_lerp_(ys, zs, of.to_x)
    if of.z_by_x:
        torch._foreach_add_(zs, ys, alpha=-of.z_by_x)
    if of.z_by_z:
        torch._foreach_add_(zs, zs, alpha=-of.z_by_z)
    torch._fused_adamw_(
        zs,
        [grad.data for grad in grads],  # they are read only, but torch would tell autograd of a write
        moments,
        vs,
        [],
        [time] * len(ys),
        lr=of.lr,
        beta1=0.0,
        beta2=of.b2,
        weight_decay=of.decay,
        eps=of.eps,
        amsgrad=False,
        maximize=maximize,
    )  # S6, S7
    torch._foreach_lerp_(ys, zs, of.to_y)  # S8, S9
