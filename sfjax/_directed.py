"""From a direction of our own (S6) to a transformation: lr, warm-up and decay are applied here, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sfjax import _scalars, _trees
from sfjax.schedule_free import Base, build


class Direction(NamedTuple):
    """What an optimizer does with a gradient.

    Attributes:
        init: params -> buffers.
        next: (gradients in wide dtype, buffers, t) -> (direction in the same dtype, buffers).
        lr_factor: t -> what multiplies lr(step): warm-up, or RAdam's rect.
    """

    init: Callable[[Any], Any]
    next: Callable[[Any, Any, jax.Array], tuple[Any, Any]]
    lr_factor: Callable[[jax.Array], jax.Array]


def directed(
    direction: Direction, learning_rate: Any, weight_decay: Any, mask: Any, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns the Schedule-Free transformation along `direction`; `options` are those of `build`."""
    lr = _scalars.lr_schedule(learning_rate)

    def delta(grads: Any, state: Any, params: Any, lr_t: Any, t: Any, extra_args: Any) -> tuple[Any, Any]:
        wide = jax.tree.map(lambda g, y: g.astype(_trees.wide_dtype(y)), grads, params)
        directions, state = direction.next(wide, state, t)

        def leaf(d: jax.Array, y: jax.Array, decays: bool) -> jax.Array:
            if decays and not (isinstance(weight_decay, int | float) and weight_decay == 0):
                d = d + jnp.asarray(weight_decay, d.dtype) * y.astype(d.dtype)
            return -lr_t.astype(d.dtype) * d  # S6

        return jax.tree.map(leaf, directions, params, _decay_mask(mask, params)), state

    return build(
        Base(direction.init, delta),
        lambda step: lr(step) * direction.lr_factor(step + 1),
        lambda: _scalars.full_lr(learning_rate),
        **options,
    )


def _decay_mask(mask: Any, params: Any) -> Any:
    """Returns a tree of bools of params' tree, from a prefix tree, a function of params, or None."""
    mask = True if mask is None else mask(params) if callable(mask) else mask
    return jax.tree.map(lambda flag, below: jax.tree.map(lambda _: flag, below), mask, params)


def on_reals(function: Callable[..., tuple[jax.Array, ...]]) -> Callable[..., tuple[jax.Array, ...]]:
    """Lets an elementwise function of real leaves take complex ones, as pairs of reals."""

    def wrapped(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        if not jnp.iscomplexobj(leaves[0]):
            return function(*leaves)
        real = function(*(leaf.real for leaf in leaves))
        imaginary = function(*(leaf.imag for leaf in leaves))
        return tuple(jax.lax.complex(a, b) for a, b in zip(real, imaginary, strict=True))

    return wrapped
