"""S7-S9* on single leaves: elementwise, no trees, no state. The mirror of `sftorch/_iterates.py`.

`stored` is the optimizer's one buffer beside y. It holds z; at beta = 0, where y is z, it holds x, so
that Polyak averaging needs no second buffer and the state has one tree for every beta.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sfjax._scalars import as_scalar


class Coefficients(NamedTuple):
    """The scalars of one step, computed once for all leaves; all of shape ().

    Attributes:
        c: the averaging weight.
        keep: 1 - beta (1 - c), the share of delta that y takes.
        stretch: what takes y - z (or x - z, if that is stored) of the old beta to the new one's.
        stores_x: whether the old beta is 0.
        will_store_x: whether the new beta is 0; a Python bool where it is known.
        per_gap: (1 - beta) / beta of the old beta, which takes y - z to x - y.
    """

    c: jax.Array
    keep: jax.Array
    stretch: jax.Array
    stores_x: jax.Array
    will_store_x: Any
    per_gap: jax.Array


def coefficients(c: jax.Array, old_beta: jax.Array, beta: Any) -> Coefficients:
    """Returns the coefficients of a step that finds y built with old_beta and leaves it built with beta."""
    stores_x = old_beta == 0
    divisor = jnp.where(stores_x, 1.0, old_beta)
    new = as_scalar(beta)
    return Coefficients(
        c=c,
        keep=1.0 - new * (1.0 - c),
        stretch=new / divisor,
        stores_x=stores_x,
        will_store_x=beta == 0 if isinstance(beta, int | float) else new == 0,
        per_gap=(1.0 - old_beta) / divisor,
    )


def _gap(y: jax.Array, stored: jax.Array, stores_x: jax.Array) -> jax.Array:
    """Returns y - z, or x - z where x is stored."""
    return jnp.where(stores_x, stored - y, y - stored)


def recover_x(y: jax.Array, stored: jax.Array, old_beta: jax.Array) -> jax.Array:
    """Returns x = (y - (1 - beta) z) / beta in stored's dtype, without its cancellation."""
    k = coefficients(as_scalar(0.0), old_beta, 1.0)
    y, per_gap = y.astype(stored.dtype), k.per_gap.astype(stored.dtype)
    return jnp.where(k.stores_x, stored, y + per_gap * (y - stored))


def recover_z(y: jax.Array, stored: jax.Array, old_beta: jax.Array) -> jax.Array:
    """Returns z in stored's dtype."""
    return jnp.where(old_beta == 0, y.astype(stored.dtype), stored)


def advance(y: jax.Array, stored: jax.Array, delta: jax.Array, k: Coefficients) -> tuple[jax.Array, jax.Array]:
    """Takes one step of y and z by delta.

    Args:
        y: a parameter leaf. stored: its buffer, as the module says. delta: S6, in the wide dtype.
        k: the scalars of the step.

    Returns:
        The update y' - y in y's dtype, and the new buffer in stored's dtype.
    """
    wide = delta.dtype
    c, keep, stretch, per_gap = (s.astype(wide) for s in (k.c, k.keep, k.stretch, k.per_gap))
    y_wide, s = y.astype(wide), stored.astype(wide)
    z = jnp.where(k.stores_x, y_wide, s)
    z_new = (z + delta).astype(stored.dtype).astype(wide)  # S7
    # In terms of z_new, not delta: one fusion on every backend. stretch is exactly 1 while beta stays.
    moved = stretch * _gap(y_wide, s, k.stores_x)
    step = (moved - (y_wide - z)) - c * moved + keep * (z_new - z)  # S9*
    if k.will_store_x is False:
        return _as_update(y, step), z_new.astype(stored.dtype)
    x = jnp.where(k.stores_x, s, y_wide + per_gap * (y_wide - s))
    x_new = x + c * (z_new - x)  # S8
    return _as_update(y, step), jnp.where(k.will_store_x, x_new, z_new).astype(stored.dtype)


def _as_update(y: jax.Array, step: jax.Array) -> jax.Array:
    """Returns step in y's dtype so that y + update is y' rounded once."""
    if y.dtype == step.dtype:
        return step
    wide = y.astype(step.dtype)
    return ((wide + step).astype(y.dtype).astype(step.dtype) - wide).astype(y.dtype)
