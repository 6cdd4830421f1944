"""Generalized primal averaging: Schedule-Free around any Optax optimizer, with an average that forgets."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from sfcore import checks, hyperparameters
from sfcore.laws import LAWS
from sfjax.law.iterates import wide_dtype
from sfjax.state import arguments
from sfjax.state.arguments import ScalarOrSchedule
from sfjax.step.native import Scalars
from sfjax.step.plan import build


def generalized_primal_averaging(
    base_optimizer: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    mu_y: float = 0.7,
    mu_x: float = 0.9967,
    weight_decay: float = 0.0,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Generalized primal averaging (arXiv 2512.17131): `schedule_free` whose c is 1 - mu_x in every step.

    The decay moves x, y and z together, so that x stays the average of z; in a program of Meta's it moved z
    alone, and x grew. Decay inside the base is taken at y.

    Args:
        base_optimizer: built with the same learning_rate and without decay, as optax.adam(learning_rate) is.
        learning_rate: >= 0: a number or a schedule of the step from 0.
        mu_y: the interpolation y = mu_y x + (1 - mu_y) z, in [0, 1], default 0.7.
        mu_x: the share of x that stays in a step, in [0, 1), default 0.9967.
        weight_decay: decoupled decay at z, >= 0, default 0.
        state_dtype: dtype of z; None (default) is the parameter's own, at least float32.

    Returns:
        A transformation whose `update` needs params. Its state is a `ScheduleFreeState`.

    Raises:
        HyperparameterError: with every value that is out of range (a ValueError).

    Example:
        >>> import jax.numpy as jnp, optax, sfjax
        >>> tx = sfjax.generalized_primal_averaging(optax.adam(0.01), 0.01, weight_decay=0.1)
        >>> params = jnp.array([1.0, 2.0])
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
        >>> params = optax.apply_updates(params, updates)
    """
    checks.require(
        checks.HyperparameterError,
        mu_y=(checks.INTERPOLATION, mu_y),
        mu_x=(checks.DECAY_RATE, mu_x),
        weight_decay=(checks.NON_NEGATIVE, weight_decay),
    )
    usual = hyperparameters.defaults(hyperparameters.ScheduleFree)
    usual |= {"lr": learning_rate, "beta": mu_y, "window": 1.0 / (1.0 - mu_x), "window_rule": "constant"}
    values = arguments.read(hyperparameters.ScheduleFree, **usual)
    inner = arguments.as_transformation("base_optimizer", base_optimizer)

    def delta(grads: Any, state: Any, ys: Any, zs: Any, scalars: Scalars, extra_args: Any) -> tuple[Any, Any]:
        moved, state = inner.update(grads, state, ys, **extra_args)
        if weight_decay:
            pull = scalars.next.lr_t * weight_decay  # F6
            moved = jax.tree.map(lambda d, z: d - jnp.asarray(pull, d.dtype) * z.astype(d.dtype), moved, zs())
        return moved, state

    def init(params: Any) -> Any:
        return inner.init(jax.tree.map(lambda p: p.astype(wide_dtype(p)), params))

    return build(init, delta, LAWS["wrapper"], values, state_dtype)
