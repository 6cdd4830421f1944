"""S1-S5 and the bias corrections, on jnp scalars: once a step for the whole tree.

The mirror of `sftorch/_scalars.py`. Scalars have the widest float JAX has enabled (float32, or float64
with jax_enable_x64), whatever the parameters are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ScalarOrSchedule = Any

# coth(u) - 1/u = u/3 - u^3/45 + ...: Bernoulli numbers, to 2e-14 for u < 0.5.
_LANGEVIN = (
    1 / 3,
    -1 / 45,
    2 / 945,
    -1 / 4725,
    2 / 93555,
    -1382 / 638512875,
    4 / 18243225,
    -3617 / 162820783125,
)


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


def ramp(t: jax.Array, warmup_steps: Any) -> jax.Array:
    """Returns warmup(t) of S2; the last warm-up step has the full lr."""
    steps = as_scalar(warmup_steps)
    return jnp.where(steps > 0, jnp.minimum(1.0, as_scalar(t) / jnp.maximum(steps, 1.0)), 1.0)  # S2


def prior_weight(prior_steps: Any, r: Any, lr: Callable[[], jax.Array], weight_lr_power: Any) -> jax.Array:
    """Returns the weight_sum that `prior_steps` earlier steps at the full lr would have left."""
    if isinstance(prior_steps, int | float) and prior_steps == 0:
        return as_scalar(0.0)
    if isinstance(r, int | float) and r == 0:
        counted = as_scalar(prior_steps)
    elif isinstance(r, int | float) and isinstance(prior_steps, int | float):
        counted = as_scalar(math.fsum(i**r for i in range(1, int(prior_steps) + 1)))
    else:
        last = jnp.asarray(prior_steps, jnp.int32)
        counted = jax.lax.fori_loop(
            1, last + 1, lambda i, total: total + as_scalar(i) ** as_scalar(r), as_scalar(0.0)
        )
    return jnp.where(counted > 0, counted * _power(lr(), weight_lr_power), 0.0)


def _power(base: jax.Array, exponent: Any) -> jax.Array:
    """Returns base ** exponent for base >= 0, with a finite gradient at base = 0 for every exponent."""
    exponent, positive = as_scalar(exponent), base > 0
    return jnp.where(positive, jnp.where(positive, base, 1.0) ** exponent, as_scalar(exponent == 0))


def next_scalars(
    clock: Clock, lr_t: jax.Array, r: Any, weight_lr_power: Any, prior_steps: Any
) -> tuple[Clock, jax.Array]:
    """Returns the clock after a step of size lr_t, and the averaging weight c of that step."""
    t = clock.step + 1  # S1
    lr_max = jnp.maximum(clock.lr_max, lr_t)  # S3
    age = as_scalar(t) + as_scalar(prior_steps)
    weight = _power(age, r) * _power(lr_max, weight_lr_power)  # S4
    added = weight + clock.weight_sum_low
    weight_sum = clock.weight_sum + added
    grown = weight_sum - clock.weight_sum
    # Exact also where a step weighs more than all before it, as in a warm-up.
    weight_sum_low = (clock.weight_sum - (weight_sum - grown)) + (added - grown)
    if weight_sum.dtype == jnp.float64:  # wide enough by itself, and all that the torch twin has
        weight_sum_low = jnp.zeros_like(weight_sum)
    c = jnp.where(weight_sum > 0, weight / jnp.where(weight_sum > 0, weight_sum, 1.0), 0.0)  # S5
    return Clock(t, lr_max, weight_sum, weight_sum_low), c


def log_decay(decay: Any) -> Any:
    """Returns log(decay), in Python doubles where the value is known: float32 would round 0.999 first."""
    if isinstance(decay, int | float):
        return math.log(decay) if decay > 0 else -math.inf
    return jnp.log(as_scalar(decay))


def bias_correction(decay: Any, t: jax.Array) -> jax.Array:
    """Returns 1 - decay^t without cancellation, also for decay = 0."""
    return -jnp.expm1(as_scalar(t) * as_scalar(log_decay(decay)))


def _rest(u: jax.Array) -> jax.Array:
    """Returns 1 + 1/u - coth(u) for u > 0."""
    small = jnp.minimum(u, 0.5)
    series = 1.0 - small * jnp.polyval(jnp.asarray(_LANGEVIN[::-1], u.dtype), small * small)
    large = jnp.maximum(u, 0.5)
    # From 40 on, coth(u) - 1 is 0 in any case; the bound keeps expm1, and so the gradient, finite.
    return jnp.where(u < 0.5, series, 1.0 / large - 2.0 / jnp.expm1(2.0 * jnp.minimum(large, 40.0)))


def rectification(b2: Any, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns RAdam's rect at time t, and whether rho_t > 4 so that it may be used.

    The published rho_t is the difference of two numbers near rho_inf, which loses 2e-4 in float32.
    With u = -log(b2) / 2 it is rho_inf = coth(u), rho_t = 1 + t rest(t u) - rest(u).
    """
    u = jnp.minimum(-0.5 * as_scalar(log_decay(b2)), 40.0)  # coth is 1 from there on, also for b2 = 0
    t = as_scalar(t)
    rho_inf = 1.0 / jnp.tanh(u)
    rho_t = 1.0 + t * _rest(t * u) - _rest(u)
    usable = rho_t > 4.0
    rho, inf = jnp.where(usable, rho_t, 5.0), jnp.where(usable, rho_inf, 5.0)
    return jnp.sqrt((rho - 4) * (rho - 2) * inf / ((inf - 4) * (inf - 2) * rho)), usable


def effective_lr(lr_t: jax.Array, c: jax.Array, beta: jax.Array) -> jax.Array:
    """Returns the multiple of the newest direction by which y moves in this step (S9*)."""
    return lr_t * (1.0 - beta * (1.0 - c))
