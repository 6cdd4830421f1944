"""A parameter's clock, and its next step on Python doubles: once a step for all parameters of one clock.

The mirror of `sfjax/_scalars.py`; the equations are in `sfcore.averaging`. Nothing here touches a tensor.
"""

from __future__ import annotations

from typing import NamedTuple

from sfcore import averaging


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


ramp, bias_correction, effective_lr = averaging.ramp, averaging.bias_correction, averaging.effective_lr


def prior_weight(prior_steps: int, r: float, lr: float, weight_lr_power: float) -> float:
    """Returns the weight_sum that `prior_steps` earlier steps at the full lr would have left."""
    counted = averaging.sum_of_powers(prior_steps, r)
    return float(averaging.prior_weight(counted, lr, weight_lr_power))


def next_scalars(
    clock: Clock, lr_t: float, r: float, weight_lr_power: float, prior_steps: int
) -> tuple[Clock, float]:
    """Returns the clock after a step of size lr_t, and the averaging weight c of that step."""
    t = clock.step + 1  # S1
    lr_max = averaging.largest_lr(clock.lr_max, lr_t)
    weight = averaging.step_weight(t, lr_max, r, weight_lr_power, prior_steps)
    weight_sum = clock.weight_sum + weight
    return Clock(t, lr_max, weight_sum), averaging.averaging_weight(weight, weight_sum)


def rectification(b2: float, t: int) -> float | None:
    """Returns RAdam's rect at time t, or None while rho_t <= 4 and the variance is unusable."""
    rect, usable = averaging.rectification(b2, t)
    return rect if usable else None
