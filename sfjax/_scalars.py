"""A tree's clock, and its next step on jnp scalars: once a step for the whole tree.

The mirror of `sftorch/_scalars.py`; the equations are in `sfcore.averaging`. Scalars have the widest float
JAX has enabled (float32, or float64 with jax_enable_x64), whatever the parameters are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sfcore import averaging
from sfcore.laws import Law
from sfjax._types import ScalarOrSchedule


class Clock(NamedTuple):
    """What a tree of parameters remembers of its time; all of shape ().

    Attributes:
        step: int32, finished updates.
        lr_max: largest lr_t so far.
        weight_sum: sum of the averaging weights so far, prior steps included.
        weight_sum_low: what rounding has cut off weight_sum, so that 10^7 steps still add up in float32;
            0 in float64.
    """

    step: jax.Array
    lr_max: jax.Array
    weight_sum: jax.Array
    weight_sum_low: jax.Array


def as_scalar(value: Any) -> jax.Array:
    """Returns a number, or an array of one element, as a new scalar of the widest enabled float.

    A new one, because a state may be donated and must not share a buffer with what its user keeps.
    """
    return jnp.array(value.real, dtype=jnp.result_type(float)).reshape(())


def lr_schedule(learning_rate: ScalarOrSchedule) -> Callable[[jax.Array], jax.Array]:
    """Returns step -> lr(step) for a number, an array of one element, a tracer or a schedule."""

    def lr(step: jax.Array) -> jax.Array:
        value = learning_rate(step) if callable(learning_rate) else learning_rate
        return as_scalar(value)

    return lr


def full_lr(learning_rate: ScalarOrSchedule) -> jax.Array:
    """Returns the lr without its ramp: a schedule's largest value at the steps 0, 1, 2, 4, ... 2^20."""
    lr = lr_schedule(learning_rate)
    steps = [0, *(2**i for i in range(21))] if callable(learning_rate) else [0]
    return jnp.stack([lr(jnp.asarray(step, jnp.int32)) for step in steps]).max()


def step_size(law: Law, options: Any) -> Callable[[jax.Array], jax.Array]:
    """Returns t -> what multiplies lr(step) under a law: warm-up, or RAdam's rectification (S2)."""
    rule = averaging.STEP_SIZES[law.step_size]
    read = {name: _decay(getattr(options, name)) for name in rule.needs}
    return lambda t: rule.factor(as_scalar(t), read, jnp)  # type: ignore[no-any-return]


def prior_weight(prior_steps: Any, r: Any, lr: Callable[[], jax.Array], weight_lr_power: Any) -> jax.Array:
    """Returns the weight_sum that `prior_steps` earlier steps at the full lr would have left."""
    if isinstance(prior_steps, int | float) and prior_steps == 0:
        return as_scalar(0.0)
    if isinstance(r, int | float) and (r == 0 or isinstance(prior_steps, int | float)):
        counted = as_scalar(prior_steps if r == 0 else averaging.sum_of_powers(prior_steps, r))
    else:
        last = jnp.asarray(prior_steps, jnp.int32)
        counted = jax.lax.fori_loop(
            1, last + 1, lambda i, total: total + as_scalar(i) ** as_scalar(r), as_scalar(0.0)
        )
    return averaging.prior_weight(counted, lr(), as_scalar(weight_lr_power), jnp)  # type: ignore[no-any-return]


def next_scalars(
    clock: Clock, lr_t: jax.Array, r: Any, weight_lr_power: Any, prior_steps: Any, average: str = "weights"
) -> tuple[Clock, jax.Array]:
    """Returns the clock after a step of size lr_t, and the averaging weight c of that step."""
    t = clock.step + 1  # S1
    lr_max = averaging.largest_lr(clock.lr_max, lr_t, jnp)
    r, power, prior = map(as_scalar, (r, weight_lr_power, prior_steps))
    weight = averaging.step_weight(as_scalar(t), lr_max, r, power, prior, jnp)
    added = weight + clock.weight_sum_low
    weight_sum = clock.weight_sum + added
    grown = weight_sum - clock.weight_sum
    # Exact also where a step weighs more than all before it, as in a warm-up.
    weight_sum_low = (clock.weight_sum - (weight_sum - grown)) + (added - grown)
    if weight_sum.dtype == jnp.float64:  # wide enough by itself, and all that the torch twin has
        weight_sum_low = jnp.zeros_like(weight_sum)
    c = averaging.AVERAGES[average](weight, weight_sum, jnp)
    return Clock(t, lr_max, weight_sum, weight_sum_low), c


def _decay(value: Any) -> Any:
    """Returns a decay as it is where it is known, for its logarithm in doubles, else as a scalar."""
    return value if isinstance(value, int | float) else as_scalar(value)


def bias_correction(decay: Any, t: jax.Array) -> jax.Array:
    """Returns 1 - decay^t without cancellation, also for decay = 0."""
    return averaging.bias_correction(_decay(decay), as_scalar(t), jnp)  # type: ignore[no-any-return]


def rectification(b2: Any, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns RAdam's rect at time t, and whether rho_t > 4 so that it may be used."""
    return averaging.rectification(_decay(b2), as_scalar(t), jnp)


effective_lr = averaging.effective_lr
