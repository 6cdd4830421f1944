"""A parameter's own time, on Python doubles: once a step for all parameters of one clock.

The equations are those of `sfcore.averaging`. Nothing here touches a tensor.
"""

from __future__ import annotations

from typing import NamedTuple

from sfcore import averaging
from sfcore.averaging import AVERAGES, largest_lr, step_weight, sum_of_powers


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


def prior_weight(prior_steps: int, r: float, lr: float, weight_lr_power: float) -> float:
    """Returns the weight_sum that `prior_steps` earlier steps at the full lr would have left."""
    return float(averaging.prior_weight(sum_of_powers(prior_steps, r), lr, weight_lr_power))


def next_scalars(
    clock: Clock, lr_t: float, r: float, weight_lr_power: float, prior_steps: int, rule: str = "weights"
) -> tuple[Clock, float]:
    """Returns the clock after a step of size lr_t, and the averaging weight c of that step.

    Args:
        clock: before the step.
        lr_t: with warm-up and rectification.
        r, weight_lr_power, prior_steps: as configured.
        rule: which average, a name in `sfcore.averaging.AVERAGES`.
    """
    t = clock.step + 1  # S1
    lr_max = largest_lr(clock.lr_max, lr_t)
    weight = step_weight(t, lr_max, r, weight_lr_power, prior_steps)
    weight_sum = clock.weight_sum + weight
    return Clock(t, lr_max, weight_sum), float(AVERAGES[rule](weight, weight_sum, averaging.floats))
