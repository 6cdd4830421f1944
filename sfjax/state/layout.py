"""Where the state lies: its trees like the parameters, its scalars on every device of their mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec


def zeros_alike(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Returns zeros of leaf's shape, laid out over devices as leaf is, also inside jit."""
    zeros = jnp.zeros_like(leaf, dtype=dtype)
    if not isinstance(leaf, jax.core.Tracer):
        return zeros
    # A choice between both, so that one layout has to serve both. The compiler may see which it is only
    # after it has laid them out, and then drops the choice.
    true = jax.lax.optimization_barrier(jnp.asarray(True))
    return jax.lax.select(true, zeros, leaf.astype(dtype))


def on_every_device(tree: Any, params: Any) -> Any:
    """Returns a tree of scalars on the mesh of params, if these are concrete and have one.

    Scalars on one device would move to the mesh in the first jitted update, and compile it twice.
    """
    sharding = _everywhere(params)
    concrete = not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((tree, params)))
    return jax.device_put(tree, sharding) if sharding and concrete else tree


def abstract_init(init: Callable[[Any], Any], params: Any) -> Any:
    """Returns init(params) for params of `jax.ShapeDtypeStruct`, with their shardings."""
    everywhere = _everywhere(params)

    def scalar(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    def buffer(leaf: Any, p: Any) -> jax.ShapeDtypeStruct:
        if leaf.shape != p.shape:
            return scalar(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(p, "sharding", None))

    state = jax.eval_shape(init, params)
    return optax.tree.map_params(init, buffer, state, params, transform_non_params=scalar)


def _everywhere(params: Any) -> NamedSharding | None:
    """Returns the sharding of a scalar that every device of params' mesh has, or None without a mesh."""
    for leaf in jax.tree.leaves(params):
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None
