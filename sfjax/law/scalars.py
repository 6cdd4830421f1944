"""A tree's clock, and all scalars of its next step: once a step for the whole tree.

The equations are those of `sfcore.averaging`. Scalars have the widest float JAX has enabled (float32, or
float64 with jax_enable_x64), whatever the parameters are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sfcore import averaging
from sfcore.averaging import AVERAGES, BETAS, STEP_SIZES, coefficients, sum_of_powers, weighed
from sfcore.laws import Law


class Clock(NamedTuple):
    """What a tree of parameters remembers of its time; all of shape ().

    Attributes:
        b1: the interpolation beta that built y.
        step: int32, finished updates.
        lr_max: largest lr_t so far.
        weight_sum: sum of the averaging weights so far, prior steps included.
        weight_sum_low: what rounding has cut off weight_sum, so that 10^7 steps still add up in float32;
            0 in float64.
    """

    b1: jax.Array
    step: jax.Array
    lr_max: jax.Array
    weight_sum: jax.Array
    weight_sum_low: jax.Array


class Next(NamedTuple):
    """The scalars of a step, for all leaves; all of shape ().

    Attributes:
        clock: the clock after it, with the beta that builds its y.
        t: its one-based time, which is clock.step.
        c: the averaging weight.
        lr_t: the step size with all factors.
        k1, k2: the shares of z - y (or z - x, if that is stored) and of delta by which y moves.
        stores_x: whether the old beta is 0. stores_z: the contrary.
        will_store_x: whether the new beta is 0; a Python bool where it is known.
        per_gap: (1 - beta) / beta of the old beta, which takes y - z to x - y.
    """

    clock: Clock
    t: jax.Array
    c: jax.Array
    lr_t: jax.Array
    k1: jax.Array
    k2: jax.Array
    stores_x: jax.Array
    stores_z: jax.Array
    will_store_x: Any
    per_gap: jax.Array


def as_scalar(value: Any) -> jax.Array:
    """Returns a number, or an array of one element, as a new scalar of the widest enabled float.

    A new one, because a state may be donated and must not share a buffer with what its user keeps.
    """
    return jnp.array(value.real, dtype=jnp.result_type(float)).reshape(())


def full_lr(lr: Any) -> jax.Array:
    """Returns the lr without its ramp: a schedule's largest value at the steps 0, 1, 2, 4, ... 2^20."""
    if not callable(lr):
        return as_scalar(lr)
    steps = [0, *(2**i for i in range(21))]
    return jnp.stack([as_scalar(lr(jnp.asarray(step, jnp.int32))) for step in steps]).max()


def prior_weight(prior_steps: Any, r: Any, lr: Callable[[], jax.Array], weight_lr_power: Any) -> jax.Array:
    """Returns the weight_sum that `prior_steps` earlier steps at the full lr would have left."""
    if isinstance(prior_steps, int | float) and prior_steps == 0:
        return as_scalar(0.0)
    if isinstance(r, int | float) and (r == 0 or isinstance(prior_steps, int | float)):
        counted = as_scalar(prior_steps if r == 0 else sum_of_powers(prior_steps, r))
    else:
        last = jnp.asarray(prior_steps, jnp.int32)
        counted = jax.lax.fori_loop(
            1, last + 1, lambda i, total: total + as_scalar(i) ** as_scalar(r), as_scalar(0.0)
        )
    return averaging.prior_weight(counted, lr(), as_scalar(weight_lr_power), jnp)  # type: ignore[no-any-return]


def first_clock(values: Mapping[str, Any]) -> Clock:
    """Returns the clock of a new state; the prior steps weigh in with the lr before its ramp."""
    prior, r, power = (values[name] for name in ("prior_steps", "r", "weight_lr_power"))
    return Clock(
        b1=as_scalar(values["beta"]),
        step=jnp.zeros((), jnp.int32),
        lr_max=as_scalar(0.0),
        weight_sum=prior_weight(prior, r, lambda: full_lr(values["lr"]), power),
        weight_sum_low=as_scalar(0.0),
    )


def next_step(law: Law, clock: Clock, values: Mapping[str, Any]) -> Next:
    """Returns the scalars of the next step of a clock.

    Args:
        law: whose rules they follow.
        clock: before the step.
        values: the options by canonical name: Python numbers, scalars, and for lr also a schedule.
    """
    step, lr = clock.step + 1, values["lr"]  # S1
    t = as_scalar(step)
    factor = STEP_SIZES[law.step_size].factor(t, values, jnp)
    lr_t = as_scalar(lr(clock.step) if callable(lr) else lr) * factor
    scalars = {name: as_scalar(values[name]) for name in ("r", "weight_lr_power", "prior_steps")}
    lr_max, weight = weighed(t, lr_t, clock.lr_max, {**values, **scalars}, jnp)
    added = weight + clock.weight_sum_low
    weight_sum = clock.weight_sum + added
    grown = weight_sum - clock.weight_sum
    # Exact also where a step weighs more than all before it, as in a warm-up.
    weight_sum_low = (clock.weight_sum - (weight_sum - grown)) + (added - grown)
    if weight_sum.dtype == jnp.float64:  # wide enough by itself, and all that the torch twin has
        weight_sum_low = jnp.zeros_like(weight_sum)
    of_step = BETAS[values["beta_rule"]](t, values, jnp)
    c = AVERAGES[law.averaging](weight, weight_sum, jnp, t, {**values, "q": of_step.q})
    new, old, stores_x = as_scalar(of_step.beta), clock.b1, clock.b1 == 0
    divisor = jnp.where(stores_x, 1.0, old)
    moved = new - old
    if values["beta_rule"] != "constant":
        # To more digits than the difference has, unless another rule built y: what is left is rounding.
        follows = jnp.abs(moved - of_step.change) <= 4 * jnp.finfo(new.dtype).eps
        moved = jnp.where(follows, of_step.change, moved)
    k1, k2 = coefficients(c, new, moved, divisor)
    return Next(
        clock=Clock(new, step, lr_max, weight_sum, weight_sum_low),
        t=t,
        c=c,
        lr_t=lr_t,
        k1=jnp.where(stores_x, -new * (1.0 - c), k1),
        k2=k2,
        stores_x=stores_x,
        stores_z=old > 0,
        # A rule begins above 0 and rises.
        will_store_x=values["beta"] == 0 if isinstance(values["beta"], int | float) else new == 0,
        per_gap=(1.0 - old) / divisor,
    )
