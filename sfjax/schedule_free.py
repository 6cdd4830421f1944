"""Schedule-Free around any Optax optimizer."""

from __future__ import annotations

from typing import Any, Literal

import jax
import optax
from jax.typing import DTypeLike

from sfcore import hyperparameters
from sfcore.laws import LAWS
from sfjax.law.iterates import wide_dtype
from sfjax.state import arguments
from sfjax.state.arguments import Scalar, ScalarOrSchedule, Whole
from sfjax.state.forms import ScheduleFreeState as ScheduleFreeState
from sfjax.step.plan import build


def schedule_free(
    base_optimizer: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    weight_lr_power: Scalar = 2.0,
    state_dtype: DTypeLike | None = None,
    *,
    r: Scalar = 0.0,
    prior_steps: Whole = 0,
    c_warmup: Whole = 0,
    refined_c: Scalar = 0.0,
    window: Scalar = 0,
    window_rule: Literal["floor", "constant"] = "floor",
    weight_lr: Literal["max", "current"] = "max",
    b1_rule: Literal["constant", "anneal", "amuse"] = "constant",
    b1_max: Scalar = 0.965,
    b1_anneal_steps: Whole = 0,
    b1_hold_steps: Whole = 0,
    rho: Scalar = 0.8,
    decay_at: Literal["y", "z"] = "y",
) -> optax.GradientTransformationExtraArgs:
    """Makes any Optax optimizer Schedule-Free: delta (S6) is whatever the base does, with gradients at y.

    The parameters hold y; evaluate and ship `schedule_free_eval_params(state, params)`. Switch off the
    base's own momentum, and put everything that edits gradients before this in a chain, nothing after:
    an update changed afterwards corrupts x.

    Args:
        base_optimizer: built with the same learning_rate; its updates contain the lr.
        learning_rate: >= 0: number, array of one element, traced value, or schedule of the step from 0.
            The base and the averaging weight read a schedule at the same step.
        b1: interpolation beta of y = beta x + (1 - beta) z, in [0, 1], default 0.9. A value other than the
            state's moves y so that x stays.
        weight_lr_power: the average weighs a step by the largest lr so far to this power, >= 0, default 2.
        state_dtype: dtype of z (at b1 = 0 of x); None (default) is the parameter's own, at least float32.
        r: the average also weighs step t by t^r, >= 0, default 0.
        prior_steps: the initial weights count as the average of this many earlier steps, default 0. A
            schedule's full lr is then its largest value at the steps 0, 1, 2, 4, ... 2^20.
        c_warmup: x is z in this many first steps, which do not count in the average (F5), default 0.
        refined_c: c is multiplied by (1 - beta) times this, up to 1 (F5), >= 0; 0 (default) is off.
        window: c is at least 1 / window, so that the average forgets what is older (F5); 0 (default) is off.
        window_rule: "floor" (default), or "constant" for c = 1 / window in every step.
        weight_lr: a step is weighed by "max" (default), the largest lr so far, or by "current", its own.
        b1_rule: "constant" (default); "anneal" lets 1 - b1 fall to 1 - b1_max, on a line of logarithms,
            "amuse" by a power of time (F9), so that x stays the weighted mean. Not beside a schedule for b1.
        b1_max: where "anneal" ends, >= b1 and < 1, default 0.965.
        b1_anneal_steps: the steps in which it gets there.
        b1_hold_steps: steps > 1 before "amuse" begins, mostly those of the warm-up.
        rho: of "amuse", > 0, default 0.8: 1 - b1 is its first one times ((b1_hold_steps - 1) / (t - 1))^rho.
        decay_at: where decay inside the base is taken: at y (default), as in Optax's schedule_free, or at z,
            as in `sftorch.ScheduleFreeWrapper` (F6). The base gets this point as its params.

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
    values = arguments.read(
        hyperparameters.Based,
        lr=learning_rate,
        beta=b1,
        r=r,
        weight_lr_power=weight_lr_power,
        prior_steps=prior_steps,
        c_warmup=c_warmup,
        refined_c=refined_c,
        window=window,
        window_rule=window_rule,
        weight_lr=weight_lr,
        beta_rule=b1_rule,
        beta_max=b1_max,
        beta_anneal_steps=b1_anneal_steps,
        beta_hold_steps=b1_hold_steps,
        rho=rho,
        decay_at=decay_at,
    )
    del values["decay_at"]
    inner = arguments.as_transformation("base_optimizer", base_optimizer)

    def delta(grads: Any, state: Any, ys: Any, zs: Any, k: Any, extra_args: Any) -> tuple[Any, Any]:
        return inner.update(grads, state, ys if decay_at == "y" else zs(), **extra_args)

    def init(params: Any) -> Any:
        return inner.init(jax.tree.map(lambda p: p.astype(wide_dtype(p)), params))

    return build(init, delta, LAWS["wrapper"], values, state_dtype)
