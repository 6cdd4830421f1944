"""Gradient accumulation whose micro-steps touch the gradient and its mean, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sfjax.law.iterates import wide_dtype
from sfjax.state import arguments
from sfjax.state.arguments import Schedule
from sfjax.state.forms import on_every_device, zeros_alike
from sfjax.step import native
from sfjax.step.transformation import Transformation, by_name, stepped


class Accumulation(Transformation):
    """What `accumulate` returns: a transformation (init, update) with a cheaper way to go on, `step`.

    Attributes:
        step: (params, state, *, gradients, **extra_args) -> (params, state). As update and
            optax.apply_updates, but a micro-step leaves params where they are. Gradients look like params,
            so they are taken by name alone: nothing could notice a call that mistakes one for the other.

    Example:
        >>> import optax, sfjax
        >>> isinstance(sfjax.accumulate(optax.sgd(0.1), 4), sfjax.Accumulation)
        True
    """


def accumulate(
    optimizer: optax.GradientTransformation, every: int | np.integer[Any] | Schedule
) -> Accumulation:
    """Updates once in `every` micro-steps, with the mean of their gradients.

    As optax.MultiSteps: the same means, the same state (an `optax.MultiStepsState`), so that a checkpoint
    of one goes on in the other. A micro-step of MultiSteps reads and writes all of gradients, mean,
    parameters and optimizer state; `step` reads gradients and mean and writes the mean, 12 bytes a float32
    parameter where MultiSteps moves 36. On a CPU it does so in one native pass over all leaves, where a
    step of `Transformation` would be native; there every operation is rounded as it stands. `update` has to
    give updates of zero for someone to add: with optax.apply_updates 28 bytes (`python -m benchmarks hlo`).

    Use it in jax.jit, with params and state donated in this order: JAX gives the results the donated buffers
    in order, and copies all of them where state comes first. It skips no gradients: NaN goes where it goes in
    the optimizer, so put optax.apply_if_finite inside. Not differentiable in reverse mode, as it is a loop.

    Args:
        optimizer: any Optax transformation, with everything that should see the mean (clipping) in it.
        every: micro-steps an update, a whole number >= 1 or a schedule of the number of updates so far.

    Returns:
        A transformation with the further method `step`. Means are kept in at least float32, and given to the
        optimizer as they are.

    Raises:
        ValueError: for a number below 1 or a type that is no number.
        TypeError: for an optimizer that is no transformation.

    Example:
        >>> import jax, jax.numpy as jnp, sfjax
        >>> tx = sfjax.accumulate(sfjax.schedule_free_sgd(0.5), every=2)
        >>> params = jnp.ones(2)
        >>> state = tx.init(params)
        >>> step = jax.jit(tx.step, donate_argnums=(0, 1))
        >>> for gradients in (jnp.array([1.0, 0.0]), jnp.array([3.0, 0.0])):
        ...     params, state = step(params, state, gradients=gradients)
        >>> params.tolist(), sfjax.schedule_free_eval_params(state, params).tolist()
        ([0.0, 1.0], [0.0, 1.0])
    """
    if not callable(every) and (isinstance(every, bool) or not isinstance(every, Integral) or every < 1):
        raise ValueError(
            f"every must be a whole number >= 1 or a schedule, got {every!r}: pass how many micro-batches "
            "make one update"
        )
    inner = arguments.as_transformation("optimizer", optimizer)

    def init_fn(params: Any) -> optax.MultiStepsState:
        counters = {name: jnp.zeros((), jnp.int32) for name in ("mini_step", "gradient_step")}
        return optax.MultiStepsState(
            **on_every_device(counters, params),
            inner_opt_state=inner.init(params),
            acc_grads=jax.tree.map(lambda p: zeros_alike(p, wide_dtype(p)), params),
        )

    def go(
        mean: Any, state: Any, start: Any, move: Callable[[Any, Any, Any], tuple[Any, Any]]
    ) -> tuple[Any, Any]:
        """Returns what `move` makes of (mean, inner state, start) where an update is due, else start."""
        taken = state.mini_step + 1
        due = taken >= (every(state.gradient_step) if callable(every) else int(every))

        # At most one turn of a loop, not a conditional: XLA keeps what a loop carries in place.
        def turn(carry: Any) -> Any:
            _, one, inner_state = carry
            one, new = move(mean, inner_state, one)
            # In the dtypes that the state had, as optax.MultiSteps does.
            new = jax.tree.map(lambda a, b: a if a.dtype == b.dtype else a.astype(b.dtype), new, inner_state)
            return jnp.zeros_like(due), one, new

        _, moved, inner_state = jax.lax.while_loop(
            lambda carry: carry[0], turn, (due, start, state.inner_opt_state)
        )
        return moved, state._replace(
            mini_step=jnp.where(due, 0, taken),
            gradient_step=state.gradient_step + due.astype(jnp.int32),
            inner_opt_state=inner_state,
            acc_grads=mean,
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.MultiStepsState]:
        def move(mean: Any, inner_state: Any, _: Any) -> tuple[Any, Any]:
            return inner.update(mean, inner_state, params, **extra_args)

        like, _ = jax.eval_shape(lambda: move(state.acc_grads, state.inner_opt_state, None))
        # On explicit axes the layout is part of the type, which a loop keeps; it is that of the means.
        zeros = jax.tree.map(lambda u, mean: jnp.zeros_like(mean, dtype=u.dtype), like, state.acc_grads)
        taken = state.mini_step + 1
        mean = jax.tree.map(lambda g, old: _mean(g, old, taken), updates, state.acc_grads)
        return go(mean, state, zeros, move)

    def step(params: Any, state: Any, gradients: Any, extra_args: Any) -> tuple[Any, optax.MultiStepsState]:
        def move(mean: Any, inner_state: Any, p: Any) -> tuple[Any, Any]:
            return stepped(inner, p, inner_state, mean, extra_args)

        mean = native.means(_mean, state.mini_step + 1, state.acc_grads, gradients)
        return go(mean, state, params, move)

    found = Accumulation(init_fn, update_fn)
    found.step = by_name(step)
    return found


def _mean(g: jax.Array, old: jax.Array, taken: jax.Array) -> jax.Array:
    """Returns the mean of `taken` gradients from the newest and the mean of the others."""
    g = g.astype(old.dtype)
    # The first is taken as it is, so that nobody has to zero the mean of the update before.
    return jnp.where(taken == 1, g, old + (g - old) / taken.astype(old.real.dtype).astype(old.dtype))
