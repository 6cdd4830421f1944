"""A parameter's own time, on Python doubles: once a step for all parameters of one clock.

The equations are those of `sfcore.averaging`. Nothing here touches a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sfcore import averaging
from sfcore.averaging import AVERAGES, BETAS, STEP_SIZES, floats, sum_of_powers, weighed
from sfcore.laws import Law


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


class Next(NamedTuple):
    """The scalars of a step: the clock after it, its averaging weight, its step size with all factors, the
    beta that builds y in it, and by how much that is not the one before."""

    clock: Clock
    c: float
    lr_t: float
    beta: float
    change: float


def prior_weight(prior_steps: int, r: float, lr: float, weight_lr_power: float) -> float:
    """Returns the weight_sum that `prior_steps` earlier steps at the full lr would have left."""
    return float(averaging.prior_weight(sum_of_powers(prior_steps, r), lr, weight_lr_power))


def next_step(
    law: Law, clock: Clock, group_step: int, values: Mapping[str, Any], factor: float = 1.0
) -> Next:
    """Returns the scalars of the next step of a clock: a parameter's, or the group's own.

    Args:
        law: whose rules they follow.
        clock: before the step.
        group_step: finished steps of the group, whose warm-up and whose beta it is.
        values: its options by canonical name, lr as it is now.
        factor: what else multiplies the lr.
    """
    rule, t = STEP_SIZES[law.step_size], clock.step + 1  # S1
    lr_t = float(factor * values["lr"] * rule.factor(group_step + 1 if rule.of_group else t, values, floats))
    lr_max, weight = weighed(t, lr_t, clock.lr_max, values)
    weight_sum = clock.weight_sum + weight
    beta, q, change = BETAS[values["beta_rule"]](group_step + 1, values, floats)
    options = {**values, "q": q} if values["refined_c"] else values
    c = float(AVERAGES[law.averaging](weight, weight_sum, floats, t, options))
    return Next(Clock(t, lr_max, weight_sum), c, lr_t, beta, change)
