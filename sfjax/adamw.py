"""Schedule-Free AdamW: the direction is the gradient over its root mean square (S6)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from sfjax import _scalars
from sfjax._directed import Direction, as_like, directed, known_options, on_reals
from sfjax._types import Scalar, ScalarOrSchedule, Whole


class MomentsState(NamedTuple):
    """Buffers of AdamW and RAdam.

    Attributes:
        nu: second moment v; tree of the parameters, at least float32.
        mu: first moment, the same; None without inner momentum.
    """

    nu: Any
    mu: Any


def adamw_direction(grads: Any, state: MomentsState, t: jax.Array, hp: Any) -> tuple[Any, MomentsState]:
    """Returns AdamW's direction for a tree of gradients, and the next moments."""
    m1 = 0.0 if state.mu is None else hp.inner_momentum
    correction2, correction1 = _scalars.bias_correction(hp.b2, t), _scalars.bias_correction(m1, t)

    @on_reals
    def leaf(g: jax.Array, v: jax.Array, *m: jax.Array) -> tuple[jax.Array, ...]:
        v = _average(v, g * g, hp.b2)
        m = tuple(_average(one, g, m1) for one in m)
        numerator = m[0] / as_like(correction1, g) if m else g
        return numerator / (_root(v / as_like(correction2, g)) + as_like(hp.eps, g)), v, *m  # S6

    moments = (state.nu,) if state.mu is None else (state.nu, state.mu)
    leaves, tree = jax.tree.flatten(grads)
    out = [leaf(*of) for of in zip(leaves, *map(jax.tree.leaves, moments), strict=True)]
    columns = zip(*out, strict=True) if out else [[] for _ in range(1 + len(moments))]
    directions, nu, *mu = (tree.unflatten(column) for column in columns)
    return directions, MomentsState(nu, mu[0] if mu else None)


def _average(old: jax.Array, new: jax.Array, decay: Any) -> jax.Array:
    """Returns decay old + (1 - decay) new.

    By 1 - decay alone: 0.9999 rounded to float32 beside 1 - 0.9999 would bias the average by 1.6e-4.
    """
    share = as_like(1.0 - decay, old)
    return (old - share * old) + share * new


def _root(v: jax.Array) -> jax.Array:
    """Returns sqrt(v) with the gradient 0, not NaN, where a parameter has had no gradient."""
    positive = v > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, v, 1.0)), v)


ADAMW = Direction("adamw", adamw_direction, MomentsState)


@known_options("adamw")
def schedule_free_adamw(
    learning_rate: ScalarOrSchedule = 0.0025,
    warmup_steps: Whole | None = 0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | None = 0.0,
    weight_lr_power: Scalar = 2.0,
    state_dtype: DTypeLike | None = None,
    *,
    r: Scalar = 0.0,
    prior_steps: Whole = 0,
    inner_momentum: Scalar = 0.0,
    precision: Literal["exact", "lean"] = "exact",
    seed: Whole = 0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Schedule-Free AdamW (arXiv 2405.15682). The parameters hold y; `schedule_free_eval_params` gives x.

    Args:
        learning_rate: >= 0, default 0.0025: number, array of one element, traced value, or schedule of
            the step from 0. 1 to 10 times that of scheduled AdamW is a usual start.
        warmup_steps: updates of linear warm-up, default 0 (None is 0); about 5% of a run helps.
        b1: interpolation beta of y = beta x + (1 - beta) z, in [0, 1], default 0.9.
        b2: decay of the second moment, in [0, 1), default 0.999. inject_hyperparams rounds it to the
            parameters' dtype, and bfloat16 makes 1 of it: then pass hyperparam_dtype=jnp.float32.
        eps: added to the denominator outside the root, > 0, default 1e-8.
        weight_decay: decoupled decay taken at y, >= 0, default 0 (None is 0).
        weight_lr_power: the average weighs a step by the largest lr so far to this power, >= 0, default 2.
        state_dtype: dtype of z (at b1 = 0 of x); None (default) is the parameter's own, at least float32.
        r: the average also weighs step t by t^r, >= 0, default 0.
        prior_steps: the initial weights count as the average of this many earlier steps, default 0.
        inner_momentum: decay of a first moment in the numerator, in [0, 1); the number 0 (default) keeps
            no buffer, so name it in static_args of inject_hyperparams.
        precision: "exact" (default) keeps parameters of 16 bits as a float32 run would have them; "lean"
            keeps z - y and v in bfloat16, rounded at random, and the rest of y in int16: 8 bytes a parameter
            in all where "exact" takes 14. Wider parameters are not concerned.
        seed: of the rounding, default 0; whole, >= 0.
        mask: tree of bools, or function of params giving one: the leaves that decay; None is all.

    Returns:
        A transformation whose `update` needs params. Its state is a `ScheduleFreeState`.

    Raises:
        HyperparameterError: with every value that is out of range (a ValueError).

    Example:
        >>> import jax.numpy as jnp, optax, sfjax
        >>> tx = sfjax.schedule_free_adamw(0.01, warmup_steps=10, weight_decay=0.1)
        >>> params = {"w": jnp.ones(3)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> x = sfjax.schedule_free_eval_params(state, params)
    """
    return directed(ADAMW, locals())
