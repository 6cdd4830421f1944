"""S6-S9* on tensors: elementwise, no state. The mirror of `sfjax/_iterates.py`.

The `_single_` form is the specification; `_foreach_` does the same to lists. Scalars are Python
floats, or 0-d tensors under torch.compile. z is never narrower than y.
"""

from __future__ import annotations

import torch
from torch import Tensor

Scalar = float | Tensor


def as_real(tensor: Tensor) -> Tensor:
    """Returns a complex tensor as its pairs of reals, which is how the step treats it."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def recover_x(y: Tensor, z: Tensor, beta: float) -> Tensor:
    """Returns x = (y - (1 - beta) z) / beta in z's dtype, for beta > 0, without its cancellation."""
    y = y.to(z.dtype)
    return y + (1.0 / beta - 1.0) * (y - z)


def interpolate(x: Tensor, z: Tensor, beta: float) -> Tensor:
    """Returns y = beta x + (1 - beta) z in z's dtype; exactly z at beta = 0 and x at beta = 1."""
    return torch.lerp(z, x.to(z.dtype), beta)  # S9


def fold_single_(y: Tensor, z: Tensor, delta: Tensor, c: Scalar, beta: float) -> None:
    """Moves y and z by delta, in place."""
    wide = y.to(z.dtype)
    y.copy_(wide + (c * (z - wide) + (1.0 - beta * (1.0 - c)) * delta))  # S9*
    z.add_(delta)  # S7


def advance_single_(
    y: Tensor, z: Tensor, direction: Tensor, lr_t: Scalar, weight_decay: float, c: Scalar, beta: float
) -> None:
    """Takes one step of y and z along -direction, in place."""
    delta = -lr_t * (direction + weight_decay * y.to(z.dtype))  # S6
    fold_single_(y, z, delta, c, beta)


def advance_foreach_(
    ys: list[Tensor],
    zs: list[Tensor],
    directions: list[Tensor],
    lr_t: float,
    weight_decay: float,
    c: float,
    beta: float,
) -> None:
    """Takes one step of every y and z along its -direction, in place; y and z share a dtype."""
    if weight_decay:
        directions = list(torch._foreach_add(directions, ys, alpha=weight_decay))  # S6
    torch._foreach_lerp_(ys, zs, c)
    torch._foreach_add_(ys, directions, alpha=-lr_t * (1.0 - beta * (1.0 - c)))  # S9*
    torch._foreach_add_(zs, directions, alpha=-lr_t)  # S7


def average_single_(
    y: Tensor, x: Tensor, z: Tensor, direction: Tensor, lr_t: float, weight_decay: float, c: float
) -> None:
    """Takes one step of z along -direction and averages it into x, which replaces y, in place."""
    z.add_(-lr_t * (direction + weight_decay * y.to(z.dtype)))  # S6 S7
    x = x.to(z.dtype)
    y.copy_(x + c * (z - x))  # S8


def average_foreach_(
    ys: list[Tensor],
    xs: list[Tensor],
    zs: list[Tensor],
    directions: list[Tensor],
    lr_t: float,
    weight_decay: float,
    c: float,
) -> None:
    """The same for lists that share a dtype; xs are used up."""
    if weight_decay:
        directions = list(torch._foreach_add(directions, ys, alpha=weight_decay))  # S6
    torch._foreach_add_(zs, directions, alpha=-lr_t)  # S7
    torch._foreach_lerp_(xs, zs, c)  # S8
    torch._foreach_copy_(ys, xs)
