"""S1-S5 and the bias corrections, on Python doubles: once a step for all parameters of one clock.

The mirror of `sfjax/_scalars.py`. Nothing here touches a tensor.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Clock(NamedTuple):
    """What a parameter remembers of its own time.

    Attributes:
        step: finished updates of this parameter.
        lr_max: largest lr_t so far.
        weight_sum: sum of the averaging weights so far, prior steps included.
    """

    step: int
    lr_max: float
    weight_sum: float


def ramp(t: int, warmup_steps: int) -> float:
    """Returns warmup(t) of S2; the last warm-up step has the full lr."""
    return min(1.0, t / warmup_steps) if warmup_steps > 0 else 1.0  # S2


def prior_weight(prior_steps: int, r: float, lr: float, weight_lr_power: float) -> float:
    """Returns the weight_sum that `prior_steps` earlier steps at the full lr would have left."""
    counted = float(prior_steps) if r == 0 else math.fsum(i**r for i in range(1, int(prior_steps) + 1))
    return counted * lr**weight_lr_power if prior_steps else 0.0


def next_scalars(
    clock: Clock, lr_t: float, r: float, weight_lr_power: float, prior_steps: int
) -> tuple[Clock, float]:
    """Returns the clock after a step of size lr_t, and the averaging weight c of that step."""
    t = clock.step + 1  # S1
    lr_max = max(clock.lr_max, lr_t)  # S3
    weight = (t + prior_steps) ** r * lr_max**weight_lr_power  # S4
    weight_sum = clock.weight_sum + weight
    c = weight / weight_sum if weight_sum > 0 else 0.0  # S5
    return Clock(t, lr_max, weight_sum), c


def bias_correction(decay: float, t: int) -> float:
    """Returns 1 - decay^t without cancellation, also for decay = 0."""
    return -math.expm1(t * math.log(decay)) if decay > 0 else 1.0


def rectification(b2: float, t: int) -> float | None:
    """Returns RAdam's rect at time t, or None while rho_t <= 4 and the variance is unusable."""
    rho_inf = 2.0 / (1.0 - b2) - 1.0
    rho_t = rho_inf - 2.0 * t * b2**t / bias_correction(b2, t)
    if rho_t <= 4.0:
        return None
    return math.sqrt((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t))


def effective_lr(lr_t: float, c: float, beta: float) -> float:
    """Returns the multiple of the newest direction by which y moves in this step (S9*)."""
    return lr_t * (1.0 - beta * (1.0 - c))
