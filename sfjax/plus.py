"""ScheduleFree+: AdamC whose step size follows the loss. Experimental."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from sfcore import checks
from sfcore.averaging import BETAS, polyak, smoothed_norm
from sfjax.adamw import schedule_free_adamw
from sfjax.law.iterates import recover_z
from sfjax.law.scalars import as_scalar
from sfjax.state import forms
from sfjax.state.arguments import Scalar, ScalarOrSchedule, Whole
from sfjax.state.eight import gap_of
from sfjax.state.forms import ScheduleFreeState


class ScheduleFreePlusState(NamedTuple):
    """State of `schedule_free_plus`.

    Attributes:
        grad_l1_ema: smoothed norm of the gradient, corrected for its start, of shape (); 0 before the first.
        inner: of the Schedule-Free AdamW that takes the steps.

    Example:
        >>> import jax.numpy as jnp, sfjax
        >>> state = sfjax.schedule_free_plus().init(jnp.ones(2))
        >>> isinstance(state, sfjax.ScheduleFreePlusState), float(state.grad_l1_ema)
        (True, 0.0)
    """

    grad_l1_ema: jax.Array
    inner: ScheduleFreeState


def schedule_free_plus(
    learning_rate: ScalarOrSchedule = 1.0,
    warmup_steps: Whole | None = 0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | None = 0.0,
    weight_lr_power: Scalar = 2.0,
    state_dtype: DTypeLike | None = None,
    *,
    r: Scalar = 0.0,
    c_warmup: Whole = 0,
    b1_max: Scalar = 0.965,
    b1_anneal_steps: int = 0,
    inner_momentum: Scalar = 0.9,
    polyak_beta: float = 0.0,
    f_star: Scalar = 0.0,
    axis_name: Hashable | None = None,
    precision: Literal["exact", "lean", "8bit"] = "exact",
    seed: Whole = 0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """ScheduleFree+ (arXiv 2605.19095): `tx.update(grads, state, params, value=loss)`. Experimental.

    Schedule-Free AdamW with inner momentum, AdamC's decay and a Polyak step size: the learning rate is
    multiplied by max(0, loss - f_star + b1 <g, z - x>) over the smoothed norm sqrt(pi / 2) |g|_1. Every
    device must have the gradients of the whole batch. Without a gradient nothing moves.

    `update` takes, beside what an optimizer takes:
        value: the loss at params; of several micro-batches or devices an array of all, whose mean is taken.
            optax.MultiSteps shows only that of the last micro-step: pass the mean of all there.
        clip: what gradients were multiplied by before the update, > 0, default 1.

    Args:
        learning_rate: multiple of the Polyak step, >= 0, default 1: a number or a schedule.
        warmup_steps, b1, eps, weight_lr_power, state_dtype, r, c_warmup, precision, seed, mask: as for
            `schedule_free_adamw`.
        b2: decay of the second moment, in [0, 1), default 0.95.
        weight_decay: decoupled decay at y, times the rate squared (AdamC), >= 0, default 0; 20 to 50 is
            usual.
        b1_max: where b1 rises to, default 0.965.
        b1_anneal_steps: the steps in which it does; 0 (default): it stays.
        inner_momentum: decay of the first moment in the numerator, in [0, 1), default 0.9.
        polyak_beta: decay of the smoothed norm, in [0, 1); 0 (default) takes that of the step.
        f_star: what the loss can fall to, default 0; with label noise or a language model it is above 0.
        axis_name: of jax.pmap or jax.shard_map, over which the loss is averaged; default None.

    Returns:
        A transformation whose `update` needs params and value. Its state is a `ScheduleFreePlusState`.

    Raises:
        HyperparameterError: with every value that is out of range (a ValueError).

    Example:
        >>> import jax, jax.numpy as jnp, optax, sfjax
        >>> tx = sfjax.schedule_free_plus()
        >>> params = jnp.array([1.0, 2.0])
        >>> state = tx.init(params)
        >>> loss, grads = jax.value_and_grad(lambda w: jnp.sum(w**2))(params)
        >>> updates, state = tx.update(grads, state, params, value=loss)
        >>> params = optax.apply_updates(params, updates)
    """
    checks.require(
        checks.HyperparameterError,
        polyak_beta=(checks.DECAY_RATE, polyak_beta),
        f_star=(checks.FINITE, f_star if not isinstance(f_star, jax.Array) else 0.0),
    )
    rule: Literal["constant", "anneal"] = "anneal" if b1_anneal_steps else "constant"

    def adamc(rate: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
        return schedule_free_adamw(
            rate,
            warmup_steps,
            b1,
            b2,
            eps,
            weight_decay,
            weight_lr_power,
            state_dtype,
            r=r,
            c_warmup=c_warmup,
            b1_rule=rule,
            b1_max=b1_max,
            b1_anneal_steps=b1_anneal_steps,
            decay_power=2,
            inner_momentum=inner_momentum,
            precision=precision,
            seed=seed,
            mask=mask,
        )

    usual = adamc(learning_rate)
    values = {"beta": b1, "beta_rule": rule, "beta_max": b1_max, "beta_anneal_steps": b1_anneal_steps}

    def init_fn(params: Any) -> ScheduleFreePlusState:
        inner = usual.init(params)
        first = jnp.zeros_like(inner.lr) if isinstance(inner.lr, jax.Array) else inner.lr
        return ScheduleFreePlusState(first, inner)

    def update_fn(
        updates: Any,
        state: ScheduleFreePlusState,
        params: Any = None,
        *,
        value: Any = None,
        clip: Any = 1.0,
        **_: Any,
    ) -> tuple[Any, ScheduleFreePlusState]:
        if value is None:
            raise TypeError(
                "value must be the loss, got None: call tx.update(grads, state, params, value=loss)"
            )
        if isinstance(clip, int | float):
            checks.require(ValueError, clip=(checks.FRACTION, clip))
        if not isinstance(state, ScheduleFreePlusState):
            raise TypeError(
                f"state must be a ScheduleFreePlusState, got {type(state).__name__}: pass what tx.init "
                "returned"
            )
        old = state.inner
        held, rests, scales, _tree = forms.leaves_of(updates, old, params, precision)
        columns = zip(jax.tree.leaves(updates), held, jax.tree.leaves(old.z), rests, scales, strict=True)
        pairs = [(g, _gap(p, stored, rest, scale, old.b1)) for g, p, stored, rest, scale in columns]
        t = as_scalar(old.step + 1)
        share = BETAS[rule](t, values, jnp).beta / jnp.where(old.b1 > 0, old.b1, 1.0)
        l1 = sum((_total(jnp.abs(one)) for g, _ in pairs for one in _reals(g)), as_scalar(0.0))
        inner = sum(
            (_total(a * b) for g, gap in pairs for a, b in zip(_reals(g), _reals(gap), strict=True)),
            as_scalar(0.0),
        )
        loss = jnp.mean(jnp.asarray(value, old.lr.dtype))
        loss = loss if axis_name is None else jax.lax.pmean(loss, axis_name)
        norm = smoothed_norm(state.grad_l1_ema, l1 / clip, polyak_beta, t, jnp)
        factor = polyak(loss - f_star, share * inner / clip, norm, jnp)
        rate = learning_rate(old.step) if callable(learning_rate) else learning_rate
        updates, new = adamc(rate * factor).update(updates, old, params)
        return updates, ScheduleFreePlusState(norm, new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _gap(p: jax.Array, stored: jax.Array, rest: Any, scale: Any, b1: jax.Array) -> jax.Array:
    """Returns z - y of a leaf."""
    if scale is not None:
        return gap_of(stored, rest, scale)
    if forms.is_lean(rest):
        return stored.astype(jnp.float32)
    y = forms.whole(p, rest)
    return recover_z(y, stored, b1) - y


def _reals(leaf: jax.Array) -> list[jax.Array]:
    return [jnp.real(leaf), jnp.imag(leaf)] if jnp.iscomplexobj(leaf) else [leaf]


def _total(leaf: jax.Array) -> jax.Array:
    """Returns the sum of a leaf in the widest float."""
    return jnp.sum(leaf, dtype=jnp.result_type(float))
