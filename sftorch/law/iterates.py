"""S6-S9* on tensors: elementwise, no state. The mirror of `sfjax/law/iterates.py`.

The `_single_` form is the specification; `_foreach_` does the same to lists. Numbers are the first
five of `Move`: Python floats, or 0-d tensors under torch.compile. z is never narrower than y.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Scalar = float | Tensor
Tensors = list[Tensor]


def as_real(tensor: Tensor) -> Tensor:
    """Returns a complex tensor as its pairs of reals, which is how the step treats it."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def recover_x(y: Tensor, z: Tensor, beta: float) -> Tensor:
    """Returns x = (y - (1 - beta) z) / beta in z's dtype, for beta > 0, without its cancellation."""
    y = y.to(z.dtype)
    # Operators would make three tensors, whose fresh memory costs more than the arithmetic.
    return (y - z).mul_(1.0 / beta - 1.0).add_(y)


def interpolate(x: Tensor, z: Tensor, beta: float) -> Tensor:
    """Returns y = beta x + (1 - beta) z in z's dtype; exactly z at beta = 0 and x at beta = 1."""
    return torch.lerp(z, x.to(z.dtype), beta)  # S9


def counts(number: Scalar) -> bool:
    """Tells whether a number may be another than 0; what a compiled program is given may."""
    return isinstance(number, Tensor) or number != 0


def delta_single(y: Tensor, z: Tensor, direction: Tensor, lr_t: Scalar, wd_y: Scalar, wd_z: Scalar) -> Tensor:
    """Returns by how much z moves, for a y in z's dtype."""
    pulled = direction + wd_y * y
    if counts(wd_z):
        pulled = pulled + wd_z * z
    return -lr_t * pulled  # S6


def fold_single_(y: Tensor, z: Tensor, delta: Tensor, k1: Scalar, k2: Scalar) -> None:
    """Moves y and z by delta, in place."""
    wide = y.to(z.dtype)
    y.copy_(wide + (k1 * (z - wide) + k2 * delta))  # S9*
    z.add_(delta)  # S7


def advance_single_(y: Tensor, z: Tensor, direction: Tensor, numbers: Sequence[Scalar]) -> None:
    """Takes one step of y and z along -direction, in place."""
    lr_t, wd_y, wd_z, k1, k2 = numbers
    fold_single_(y, z, delta_single(y.to(z.dtype), z, direction, lr_t, wd_y, wd_z), k1, k2)


def average_single_(y: Tensor, x: Tensor, z: Tensor, direction: Tensor, numbers: Sequence[Scalar]) -> None:
    """Takes one step of z along -direction and averages it into x, which replaces y, in place."""
    lr_t, wd_y, wd_z, c, _ = numbers
    z.add_(delta_single(y.to(z.dtype), z, direction, lr_t, wd_y, wd_z))  # S7
    x = x.to(z.dtype)
    y.copy_(x + c * (z - x))  # S8


def _pulled(directions: Tensors, ys: Tensors, zs: Tensors, wd_y: float, wd_z: float) -> Tensors:
    """Returns the directions with the decays, S6 but for -lr_t."""
    for weight, points in ((wd_y, ys), (wd_z, zs)):
        if weight:
            directions = list(torch._foreach_add(directions, points, alpha=weight))  # S6
    return directions


def advance_foreach_(ys: Tensors, zs: Tensors, directions: Tensors, numbers: Sequence[float]) -> None:
    """Takes one step of every y and z along its -direction, in place; y and z share a dtype."""
    lr_t, wd_y, wd_z, k1, k2 = numbers
    if wd_y or wd_z:
        directions = _pulled(directions, ys, zs, wd_y, wd_z)
    torch._foreach_lerp_(ys, zs, k1)
    torch._foreach_add_(ys, directions, alpha=-lr_t * k2)  # S9*
    torch._foreach_add_(zs, directions, alpha=-lr_t)  # S7


def average_foreach_(
    ys: Tensors, xs: Tensors, zs: Tensors, directions: Tensors, numbers: Sequence[float]
) -> None:
    """The same for lists that share a dtype; xs are used up."""
    lr_t, wd_y, wd_z, c, _ = numbers
    if wd_y or wd_z:
        directions = _pulled(directions, ys, zs, wd_y, wd_z)
    torch._foreach_add_(zs, directions, alpha=-lr_t)  # S7
    torch._foreach_lerp_(xs, zs, c)  # S8
    torch._foreach_copy_(ys, xs)
