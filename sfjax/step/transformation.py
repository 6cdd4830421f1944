"""A transformation with a further way to go on, `step`, which need not make updates for someone to add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import optax

from sfcore import checks
from sfcore.checks import Rule
from sfjax.state import arguments
from sfjax.state.arguments import Tree

_STEPPING = Rule(
    "a transformation with step",
    lambda v: isinstance(v, Transformation),
    "what edits gradients comes first, and nothing may come after a Schedule-Free optimizer",
)


class Step(Protocol):
    """The signature of `Transformation.step`."""

    def __call__(self, params: Tree, state: Any, *, gradients: Tree, **extra_args: Any) -> tuple[Tree, Any]:
        """Returns (params, state)."""


class Transformation(optax.GradientTransformationExtraArgs):
    """What the factories return: an Optax transformation (init, update) with a faster way to go on, `step`.

    On a CPU `step` runs S6 to S9* of all leaves in one pass over memory, in the C of the torch twin, compiled
    at first use. What that does not know goes the way of update and optax.apply_updates, to the bit: other
    devices, leaves of which one is no float32 or float64, a state_dtype, vmap and derivatives, shard_map with
    check_vma=True, a base of `schedule_free`, and a machine without a C compiler, with one line in the log.
    Both ways are held to the same recorded runs, in float64 within 1e-12 of the largest move, and differ in
    the last places. A step compiled for a CPU belongs to this machine, so give `update` to jax.export.

    Attributes:
        step: (params, state, *, gradients, **extra_args) -> (params, state). Use it in jax.jit with params
            and state donated, in this order: then nothing is copied. Gradients look like params, so they are
            taken by name alone: nothing could notice a call that mistakes one for the other.

    Example:
        >>> import jax, jax.numpy as jnp, sfjax
        >>> tx = sfjax.schedule_free_sgd(0.5)
        >>> params = jnp.array([1.0, 2.0])
        >>> state = tx.init(params)
        >>> step = jax.jit(tx.step, donate_argnums=(0, 1))
        >>> params, state = step(params, state, gradients=jnp.array([1.0, 2.0]))
        >>> params.tolist(), isinstance(tx, sfjax.Transformation)
        ([0.5, 1.0], True)
    """

    step: Step


def by_name(step: Callable[..., Any]) -> Step:
    """Returns (params, state, gradients, extra_args) -> (params, state) as a `Step`, with its errors."""

    def step_fn(params: Any, state: Any, *more: Any, gradients: Any = None, **extra_args: Any) -> Any:
        if more or gradients is None:
            raise TypeError(
                f"gradients must be passed to step() by name, got {2 + len(more)} arguments by position: "
                "call step(params, state, gradients=gradients), with params first"
            )
        return step(params, state, gradients, extra_args)

    return step_fn


def stepped(transformation: Any, params: Any, state: Any, gradients: Any, extra_args: Any) -> tuple[Any, Any]:
    """Returns params and state after a step, by the transformation's own if it has one."""
    if isinstance(transformation, Transformation):
        new: tuple[Any, Any] = transformation.step(params, state, gradients=gradients, **extra_args)
        return new
    updates, state = transformation.update(gradients, state, params, **extra_args)
    return optax.apply_updates(params, updates), state


def chain(*transformations: optax.GradientTransformation) -> Transformation:
    """Returns optax.chain of transformations, whose last has a `step`, as one that has it too.

    The same updates and the same state as of optax.chain, so that a checkpoint of one goes on in the other.

    Args:
        transformations: first what edits gradients, such as clipping; last a Schedule-Free optimizer.

    Raises:
        TypeError: for one that is no transformation, and for a last one without `step`.

    Example:
        >>> import jax.numpy as jnp, optax, sfjax
        >>> tx = sfjax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_sgd(0.5))
        >>> params = jnp.zeros(2)
        >>> params, state = tx.step(params, tx.init(params), gradients=jnp.array([3.0, 4.0]))
        >>> [round(float(p), 4) for p in params]
        [-0.3, -0.4]
    """
    parts = [
        arguments.as_transformation(f"transformations[{i}]", one) for i, one in enumerate(transformations)
    ]
    last = parts[-1] if parts else None
    checks.require(TypeError, **{"the last of transformations": (_STEPPING, last)})
    whole = optax.with_extra_args_support(optax.chain(*parts))

    def step(params: Any, state: Any, gradients: Any, extra_args: Any) -> tuple[Any, Any]:
        after = []
        for one, of_one in zip(parts[:-1], state[:-1], strict=True):
            gradients, of_one = one.update(gradients, of_one, params, **extra_args)
            after.append(of_one)
        params, of_last = stepped(last, params, state[-1], gradients, extra_args)
        return params, (*after, of_last)

    found = Transformation(whole.init, whole.update)
    found.step = by_name(step)
    return found
