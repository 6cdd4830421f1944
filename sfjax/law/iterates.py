"""S7-S9* on single leaves: elementwise, no trees, no state. The mirror of `sftorch/law/iterates.py`.

`stored` is the optimizer's one buffer beside y. It holds z; at beta = 0, where y is z, it holds x, so
that Polyak averaging needs no second buffer and the state has one tree for every beta.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sfjax.law.scalars import Next


def wide_dtype(*leaves: Any) -> Any:
    """Returns the dtype to compute in: one that holds all leaves, at least float32."""
    return functools.reduce(np.promote_types, (leaf.dtype for leaf in leaves), np.dtype(np.float32))


def as_held(value: jax.Array, dtype: Any) -> jax.Array:
    """Returns value rounded as dtype will hold it; XLA may drop a pair of casts, but not this."""
    if value.dtype == dtype or jnp.iscomplexobj(value):
        return value
    info = jnp.finfo(dtype)
    if info.nexp >= 8:
        return jax.lax.reduce_precision(value, info.nexp, info.nmant)
    # reduce_precision would flush float16's subnormals, below 6e-5, to zero.
    smallest = float(info.smallest_subnormal)
    normal = jax.lax.reduce_precision(value, info.nexp + 1, info.nmant)
    subnormal = jax.lax.round(value / smallest, jax.lax.RoundingMethod.TO_NEAREST_EVEN) * smallest
    return jnp.where(jnp.abs(value) < float(info.smallest_normal), subnormal, normal)


def recover_x(y: jax.Array, stored: jax.Array, beta: jax.Array) -> jax.Array:
    """Returns x = (y - (1 - beta) z) / beta in the wide dtype, without its cancellation."""
    wide = wide_dtype(y, stored)
    y, stored = y.astype(wide), stored.astype(wide)
    per_gap = (1.0 - beta) / jnp.where(beta == 0, 1.0, beta)
    return jnp.where(beta == 0, stored, y + per_gap.astype(wide) * (y - stored))


def recover_z(y: jax.Array, stored: jax.Array, beta: jax.Array) -> jax.Array:
    """Returns z in stored's dtype."""
    return jnp.where(beta == 0, y.astype(stored.dtype), stored)


def advance(
    y: jax.Array, stored: jax.Array, delta: jax.Array, k: Next, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns by how much y moves in a step, and the new z.

    Args:
        y, stored, delta: of one wide dtype, as the results are; delta is S6.
        k: the scalars of the step.
        dtype: that z' will be stored in.
    """
    k1, k2 = k.k1.astype(y.dtype), k.k2.astype(y.dtype)
    z = jnp.where(k.stores_x, y, stored)
    z_new = z + delta  # S7
    # y' built on an unrounded z' would move x by the rounding in every step.
    if dtype != y.dtype:
        z_new = jnp.where(k.will_store_x, z_new, as_held(z_new, dtype))
    # z once more, by another condition: XLA's CPU backend would write a z that two results share to memory.
    z = jnp.where(k.stores_z, stored, y)
    # In terms of z_new, not delta: one fusion on every backend.
    return k1 * jnp.where(k.stores_x, y - stored, stored - y) + k2 * (z_new - z), z_new  # S9*


def average(y: jax.Array, stored: jax.Array, y_new: jax.Array, k: Next) -> jax.Array:
    """Returns the new x where the new beta is 0.

    In terms of y', which at beta = 0 is z' as the parameter holds it: still one fusion.
    """
    x = jnp.where(k.stores_x, stored, y + k.per_gap.astype(y.dtype) * (y - stored))
    return x + k.c.astype(y.dtype) * (y_new - x)  # S8
