"""The wrapper: its state, S1-S9 over a tree, and the public `schedule_free`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from sfcore import averaging, hyperparameters
from sfcore.laws import LAWS, Law
from sfjax import _arguments, _halves, _iterates, _layout, _lean, _scalars, _trees
from sfjax._types import Scalar, ScalarOrSchedule, Whole


class ScheduleFreeState(NamedTuple):
    """State of every Schedule-Free transformation.

    Attributes:
        b1: the interpolation beta that built y, which decodes it; shape ().
        step: finished updates; int32, shape ().
        lr: lr_t of the last update; shape ().
        lr_max: largest lr_t so far; shape ().
        c: averaging weight of the last update; shape ().
        weight_sum: sum of the averaging weights so far; shape ().
        weight_sum_low: what rounding has cut off weight_sum in float32; 0 in float64; shape ().
        base_optimizer_state: the base's state, or the direction's buffers.
        z: tree of the parameters, at least float32 unless state_dtype says otherwise. At b1 = 0 the
            parameters themselves are z and this holds x. With precision="lean", z - y in bfloat16 for
            parameters of 16 bits.
        y_rest: tree of the parameters in float32, lean: int16 units: what y is more than a parameter of 16
            bits holds. None at wider leaves, and None as a whole where all are wider.

    Example:
        >>> import jax.numpy as jnp, sfjax
        >>> state = sfjax.schedule_free_sgd(0.1, b1=0.5).init(jnp.ones(3, jnp.bfloat16))
        >>> isinstance(state, sfjax.ScheduleFreeState), float(state.b1), state.z.dtype.name
        (True, 0.5, 'float32')
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
    y_rest: Any = None


class Base(NamedTuple):
    """What moves z.

    Attributes:
        init: params -> base state.
        delta: (grads, base state, y, z, lr_t, t, extra_args) -> (tree of S6's delta, base state). Parameters
            of 16 bits come to both as their full y, in float32; z is a function that returns its tree.
    """

    init: Callable[[Any], Any]
    delta: Callable[..., tuple[Any, Any]]


def build(
    base: Base,
    hp: hyperparameters.ScheduleFree,
    lr_at: Callable[[jax.Array], jax.Array],
    state_dtype: Any,
    lean: bool = False,
    seed: Any = 0,
    law: Law = LAWS["wrapper"],
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation; `lr_at` is S2 as a function of the step, `hp` is what `_arguments` read.

    In the lean form the base's state is a NamedTuple of trees like the parameters.
    """
    rest_dtype = _lean.REST if lean else jnp.float32
    state_dtype = _arguments.read_dtype(state_dtype)
    kept_rests = False

    def stored_dtype(p: Any) -> Any:
        if state_dtype is None:
            return _iterates.wide_dtype(p)
        return np.promote_types(state_dtype, np.complex64) if jnp.iscomplexobj(p) else state_dtype

    def first(p: Any) -> Any:
        if lean and _halves.is_low(p):
            return _layout.zeros_alike(p, _lean.NARROW)
        return jnp.array(p, stored_dtype(p), copy=True)  # a copy, so that params and state can be donated

    def init_fn(params: Any) -> ScheduleFreeState:
        nonlocal kept_rests
        _trees.check_params(params)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            wide = _layout.abstract_init(lambda p: init_fn(p)._replace(y_rest=None), params)
            return wide._replace(y_rest=_halves.initial(params, rest_dtype))
        y_rest = _halves.initial(params, rest_dtype)
        base_state = base.init(_halves.widened(params))
        # optax.tree.map_params calls this with a placeholder, to match it with a state that was made before.
        kept_rests = kept_rests or y_rest is not None
        return ScheduleFreeState(
            **_layout.on_every_device(_initial_scalars(hp), params),
            base_optimizer_state=(
                _lean.narrowed(base_state, params, seed, jnp.zeros((), jnp.int32)) if lean else base_state
            ),
            z=jax.tree.map(first, params),
            y_rest=params if kept_rests and not jax.tree.leaves(params) else y_rest,
        )

    def update_fn(
        updates: Any, state: ScheduleFreeState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ScheduleFreeState]:
        _check(updates, state, params)
        lr_t = lr_at(state.step)
        before = _scalars.Clock(state.step, state.lr_max, state.weight_sum, state.weight_sum_low)
        clock, c = _scalars.next_scalars(
            before, lr_t, hp.r, hp.weight_lr_power, hp.prior_steps, law.averaging
        )
        beta, _ = averaging.BETAS[law.beta_rule](hp.beta, clock.step, vars(hp), jnp)
        held, tree = jax.tree.flatten(params)
        rests = _halves.rests(state.y_rest, held, tree)
        if any(rest is not None and _halves.is_lean(rest) != lean for rest in rests):
            raise ValueError(
                f"state must be of precision={'lean' if lean else 'exact'!r}, got the other: restore it with "
                "sfjax.checkpoint, which converts"
            )
        y = tree.unflatten(map(_halves.whole, held, rests))
        base_state = _lean.widened(state.base_optimizer_state) if lean else state.base_optimizer_state

        def zs() -> Any:
            stored = zip(held, jax.tree.leaves(state.z), rests, strict=True)
            return tree.unflatten(_iterates.recover_z(p, z, state.b1, rest) for p, z, rest in stored)

        delta, base_state = base.delta(updates, base_state, y, zs, lr_t, clock.step, extra_args)
        if lean:
            base_state = _lean.narrowed(base_state, params, seed, clock.step)
        k = _iterates.coefficients(c, state.b1, beta)
        columns = zip(held, jax.tree.leaves(state.z), jax.tree.leaves(delta), rests, strict=True)
        moved = [
            _lean.advance(p, z, d, k, rest, _lean.Draw(seed, i, clock.step))
            if _halves.is_lean(rest)
            else _iterates.advance(p, z, d, k, rest)
            for i, (p, z, d, rest) in enumerate(columns)
        ]
        return tree.unflatten([update for update, _, _ in moved]), ScheduleFreeState(
            b1=_scalars.as_scalar(beta),
            lr=lr_t,
            c=c,
            base_optimizer_state=base_state,
            z=tree.unflatten([z for _, z, _ in moved]),
            y_rest=state.y_rest if state.y_rest is None else tree.unflatten([rest for *_, rest in moved]),
            **clock._asdict(),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _initial_scalars(hp: hyperparameters.ScheduleFree) -> dict[str, jax.Array]:
    """Returns the scalars of a new state; the prior steps weigh in with the lr before its ramp."""
    prior = _scalars.prior_weight(hp.prior_steps, hp.r, lambda: _scalars.full_lr(hp.lr), hp.weight_lr_power)
    zeros = {name: _scalars.as_scalar(0.0) for name in ("lr", "lr_max", "c", "weight_sum_low")}
    return {
        "b1": _scalars.as_scalar(hp.beta),
        "step": jnp.zeros((), jnp.int32),
        "weight_sum": prior,
        **zeros,
    }


def _check(updates: Any, state: Any, params: Any) -> None:
    """Raises unless update() got gradients, state and parameters that belong together."""
    if params is None:
        raise ValueError("params must be passed to update(), got None: call tx.update(grads, state, params)")
    if not isinstance(state, ScheduleFreeState):
        raise TypeError(
            f"state must be a ScheduleFreeState of sfjax, got {type(state).__name__}: pass what tx.init "
            "returned; restore a checkpoint with jax.eval_shape(tx.init, params) as its target"
        )
    _trees.check_same("updates", updates, params)
    _trees.check_same("state.z", state.z, params)


def schedule_free(
    base_optimizer: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    weight_lr_power: Scalar = 2.0,
    state_dtype: DTypeLike | None = None,
    *,
    r: Scalar = 0.0,
    prior_steps: Whole = 0,
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
        state_dtype: dtype of z (at b1 = 0 of x); None (default) is the parameter's own, at least float32.
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
    hp = _arguments.read(
        hyperparameters.ScheduleFree,
        lr=learning_rate,
        beta=b1,
        r=r,
        weight_lr_power=weight_lr_power,
        prior_steps=prior_steps,
    )
    if not callable(getattr(base_optimizer, "update", None)):
        raise TypeError(
            f"base_optimizer must be an optax transformation, got {base_optimizer!r}: "
            "pass one like optax.sgd(learning_rate)"
        )
    inner = optax.with_extra_args_support(base_optimizer)

    def delta(
        grads: Any, state: Any, ys: Any, zs: Any, lr_t: Any, t: Any, extra_args: Any
    ) -> tuple[Any, Any]:
        wide = jax.tree.map(lambda g, y: g.astype(_iterates.wide_dtype(y)), grads, ys)
        return inner.update(wide, state, ys, **extra_args)

    return build(Base(inner.init, delta), hp, _scalars.lr_schedule(hp.lr), state_dtype)
