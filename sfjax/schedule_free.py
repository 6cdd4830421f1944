"""The wrapper: its state, S1-S9 over a tree, and the public `schedule_free`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sfcore import hyperparameters
from sfjax import _iterates, _scalars, _trees


class ScheduleFreeState(NamedTuple):
    """State of every Schedule-Free transformation.

    Attributes:
        b1: the interpolation beta that built y, which decodes it; shape ().
        step: finished updates; int32, shape ().
        lr: lr_t of the last update; shape ().
        lr_max: largest lr_t so far; shape ().
        c: averaging weight of the last update; shape ().
        weight_sum: sum of the averaging weights so far; shape ().
        weight_sum_low: what rounding has cut off weight_sum; shape ().
        base_optimizer_state: the base's state, or the direction's buffers.
        z: tree of the parameters, at least float32 unless state_dtype says otherwise. At b1 = 0 the
            parameters themselves are z and this holds x.
    """

    b1: jax.Array
    step: jax.Array
    lr: jax.Array
    lr_max: jax.Array
    c: jax.Array
    weight_sum: jax.Array
    weight_sum_low: jax.Array
    base_optimizer_state: Any
    z: Any


class Base(NamedTuple):
    """What moves z.

    Attributes:
        init: params -> base state.
        delta: (grads, base state, params, lr_t, t, extra_args) -> (tree of S6's delta, base state).
    """

    init: Callable[[Any], Any]
    delta: Callable[..., tuple[Any, Any]]


def build(
    base: Base,
    lr_at: Callable[[jax.Array], jax.Array],
    full_lr: Callable[[], jax.Array],
    *,
    b1: Any,
    weight_lr_power: Any,
    state_dtype: Any,
    r: Any,
    prior_steps: Any,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation; `lr_at` is S2 as a function of the step, `full_lr` the lr without its ramp."""

    def init_fn(params: Any) -> ScheduleFreeState:
        _trees.check_params(params)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            return jax.eval_shape(init_fn, params)
        return ScheduleFreeState(
            b1=_scalars.as_scalar(b1),
            step=jnp.zeros((), jnp.int32),
            lr=_scalars.as_scalar(0.0),
            lr_max=_scalars.as_scalar(0.0),
            c=_scalars.as_scalar(0.0),
            weight_sum=_scalars.prior_weight(prior_steps, r, full_lr, weight_lr_power),
            weight_sum_low=_scalars.as_scalar(0.0),
            base_optimizer_state=base.init(params),
            # A copy, so that params and state can both be donated.
            z=jax.tree.map(lambda p: jnp.array(p, _trees.state_dtype_of(p, state_dtype), copy=True), params),
        )

    def update_fn(
        updates: Any, state: ScheduleFreeState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ScheduleFreeState]:
        _trees.check_same(updates, params, state.z)
        lr_t = lr_at(state.step)
        before = _scalars.Clock(state.step, state.lr_max, state.weight_sum, state.weight_sum_low)
        clock, c = _scalars.next_scalars(before, lr_t, r, weight_lr_power, prior_steps)
        delta, base_state = base.delta(
            updates, state.base_optimizer_state, params, lr_t, clock.step, extra_args
        )
        k = _iterates.coefficients(c, state.b1, b1)

        def leaf(y: jax.Array, z: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _iterates.advance(y, z, d.astype(_trees.wide_dtype(y, z.dtype)), k)

        ys, tree = jax.tree.flatten(params)
        moved = [leaf(*of) for of in zip(ys, jax.tree.leaves(state.z), jax.tree.leaves(delta), strict=True)]
        return tree.unflatten([step for step, _ in moved]), ScheduleFreeState(
            b1=_scalars.as_scalar(b1),
            lr=lr_t,
            c=c,
            base_optimizer_state=base_state,
            z=tree.unflatten([z for _, z in moved]),
            **clock._asdict(),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def schedule_free(
    base_optimizer: optax.GradientTransformation,
    learning_rate: _scalars.ScalarOrSchedule,
    b1: Any = 0.9,
    weight_lr_power: Any = 2.0,
    state_dtype: Any = None,
    *,
    r: Any = 0.0,
    prior_steps: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes any Optax optimizer Schedule-Free: delta (S6) is whatever the base does, with gradients at y.

    The parameters hold y; evaluate and ship `schedule_free_eval_params(state, params)`. Switch off the
    base's own momentum, and put everything that edits gradients before this in a chain, nothing after:
    an update changed afterwards corrupts x.

    Args:
        base_optimizer: built with the same learning_rate; its updates contain the lr. Decay inside it is
            taken at y.
        learning_rate: >= 0: number, array of one element, traced value, or schedule of the step from 0.
            The base and the averaging weight read a schedule at the same step.
        b1: interpolation beta of y = beta x + (1 - beta) z, in [0, 1], default 0.9. A value other than the
            state's moves y so that x stays.
        weight_lr_power: the average weighs a step by the largest lr so far to this power, >= 0, default 2.
        state_dtype: dtype of z; None (default) is the parameter's own, at least float32.
        r: the average also weighs step t by t^r, >= 0, default 0.
        prior_steps: the initial weights count as the average of this many earlier steps, default 0. A
            schedule's full lr is then its largest value at the steps 0, 1, 2, 4, ... 2^20.

    Returns:
        A transformation whose `update` needs params. Its state is a `ScheduleFreeState`.

    Raises:
        HyperparameterError: with every value that is out of range (a ValueError).

    Example:
        >>> import jax.numpy as jnp, optax, sfjax
        >>> tx = sfjax.schedule_free(optax.sgd(0.5), learning_rate=0.5)
        >>> params = jnp.array([1.0, 2.0])
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> sfjax.schedule_free_eval_params(state, params).tolist()
        [0.5, 1.0]
    """
    averaging = {"weight_lr_power": weight_lr_power, "r": r, "prior_steps": prior_steps}
    _trees.check_hyperparameters(
        hyperparameters.ScheduleFree, {"lr": learning_rate, "beta": b1, **averaging}
    )
    inner = optax.with_extra_args_support(base_optimizer)

    def delta(grads: Any, state: Any, params: Any, lr_t: Any, t: Any, extra_args: Any) -> tuple[Any, Any]:
        return inner.update(grads, state, params, **extra_args)

    return build(
        Base(inner.init, delta),
        _scalars.lr_schedule(learning_rate),
        lambda: _scalars.full_lr(learning_rate),
        b1=b1,
        state_dtype=state_dtype,
        **averaging,
    )
