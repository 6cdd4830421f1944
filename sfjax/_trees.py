"""Checks and dtypes of parameter trees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.shard_alike import shard_alike

from sfcore import checks


def check_hyperparameters(kind: type, values: Mapping[str, Any]) -> None:
    """Raises with every value that is out of range; tracers and schedules have no value to judge yet."""
    known = {name: _concrete(value) for name, value in values.items() if not callable(value)}
    names = {"lr": "learning_rate", "beta": "b1"}
    checks.check(kind, {name: v for name, v in known.items() if not isinstance(v, jax.core.Tracer)}, names)


def _concrete(value: Any) -> Any:
    """Returns a one-element array as a Python number; anything else as it is."""
    if isinstance(value, jax.core.Tracer) or not isinstance(value, jax.Array | np.ndarray | np.generic):
        return value
    return value.item() if value.size == 1 else value


def check_params(params: Any) -> None:
    """Raises unless every leaf is floating point or complex."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"params must be floating point or complex in every leaf, got {dtype or type(leaf).__name__} at "
                f"params{jax.tree_util.keystr(path)}: leave such leaves out with optax.masked or a filter"
            )


def check_same(updates: Any, params: Any, z: Any) -> None:
    """Raises unless updates, params and the state's z have one tree and the same shapes."""
    if params is None:
        raise ValueError("params must be passed to update(), got None: call tx.update(grads, state, params)")
    shape = jax.tree.structure(params)
    for name, tree in (("updates", updates), ("state.z", z)):
        if jax.tree.structure(tree) != shape:
            raise ValueError(
                f"{name} must have the tree of params, got {jax.tree.structure(tree)} for {shape}: "
                "pass the gradients and the state of these params"
            )
        for (path, p), leaf in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(tree), strict=True):
            if jnp.shape(p) != jnp.shape(leaf):
                raise ValueError(
                    f"{name} must have the shapes of params, got {jnp.shape(leaf)} for {jnp.shape(p)} at "
                    f"{jax.tree_util.keystr(path)}"
                )


def wide_dtype(leaf: Any, dtype: Any = None) -> Any:
    """Returns the dtype to compute in: that of leaf and dtype, at least float32."""
    wide = np.promote_types(leaf.dtype, jnp.float32)
    return wide if dtype is None else np.promote_types(wide, dtype)


def state_dtype_of(leaf: Any, state_dtype: Any) -> Any:
    """Returns the dtype of a leaf's buffers: state_dtype if given, else at least float32."""
    if state_dtype is None:
        return wide_dtype(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return np.promote_types(state_dtype, jnp.complex64)
    return jnp.dtype(state_dtype)


def zeros_alike(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Returns zeros of leaf's shape, laid out over devices as leaf is, also inside jit."""
    zeros = jnp.zeros_like(leaf, dtype=dtype)
    return shard_alike(zeros, leaf.astype(dtype))[0] if isinstance(leaf, jax.core.Tracer) else zeros
