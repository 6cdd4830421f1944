"""S1-S9 by hand: NumPy float64, one leaf, x, y and z all stored. Knows nothing of sfjax."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Point(NamedTuple):
    """Where one leaf is after a run, with the scalars of the last step."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    lr: float
    lr_max: float
    c: float
    weight_sum: float


def rect(b2: float, t: int) -> float:
    """Returns RAdam's rectification, 0 where rho_t <= 4."""
    power = b2**t
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * power / (1.0 if b2 == 0 else -math.expm1(t * math.log(b2)))
    return (
        math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) if rho > 4 else 0.0
    )


def plain_run(
    optimizer: str,
    start: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    lr: float | Callable[[int], float] = 0.1,
    b1: float | Callable[[int], float] = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    prior_steps: int = 0,
    inner_momentum: float = 0.0,
    silent_sgd_phase: bool = True,
) -> Point:
    """Returns where "sgd", "adamw" or "radam" takes `start`; lr and b1 may be functions of the step."""
    wide = np.complex128 if np.iscomplexobj(start) else np.float64
    x = y = z = np.array(start, wide)
    v, m = np.zeros_like(z), np.zeros_like(z)
    lr_max = c = lr_t = weight_sum = 0.0
    if prior_steps:
        full = max(lr(s) for s in (0, *(2**i for i in range(21)))) if callable(lr) else lr
        weight_sum = math.fsum(i**r * full**weight_lr_power for i in range(1, prior_steps + 1))
    for step, g in enumerate(grads):
        g, t = np.asarray(g, wide), step + 1
        beta = b1(step) if callable(b1) else b1
        lr_t = lr(step) if callable(lr) else lr
        lr_t *= min(1.0, t / warmup_steps) if warmup_steps else 1.0
        d, v = g, parts(lambda a, b: b2 * a + (1 - b2) * b * b, v, g)
        if optimizer == "radam":
            lr_t *= rect(b2, t) or float(not silent_sgd_phase)
        if optimizer != "sgd" and not (optimizer == "radam" and rect(b2, t) == 0):
            m = inner_momentum * m + (1 - inner_momentum) * g
            d = parts(lambda a, b, t=t: a / (np.sqrt(b / (1 - b2**t)) + eps), m / (1 - inner_momentum**t), v)
        lr_max = max(lr_max, lr_t)
        weight = (t + prior_steps) ** r * lr_max**weight_lr_power
        weight_sum += weight
        c = weight / weight_sum if weight_sum > 0 else 0.0
        z = z - lr_t * (d + weight_decay * y)
        x = (1 - c) * x + c * z
        y = beta * x + (1 - beta) * z
    return Point(x, y, z, lr_t, lr_max, c, weight_sum)


def parts(function: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """Returns function of the real parts, and of the imaginary ones if there are any."""
    if not np.iscomplexobj(arrays[0]):
        return function(*arrays)
    return function(*(a.real for a in arrays)) + 1j * function(*(a.imag for a in arrays))
