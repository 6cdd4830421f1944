"""Checks of the trees that users pass in, with what to do about a wrong one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_BELONG = "pass the params that tx.init got, their gradients and their state"


def check_params(params: Any) -> None:
    """Raises TypeError unless every leaf is an array of floating-point or complex numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None:
            raise TypeError(
                f"params must be arrays, got {type(leaf).__name__} at params{jax.tree_util.keystr(path)}: "
                "convert them with jax.tree.map(jnp.asarray, params)"
            )
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"params must be floating point or complex, got {dtype} at "
                f"params{jax.tree_util.keystr(path)}: leave such leaves out, with a filter of your framework "
                "or with optax.partition and optax.set_to_zero"
            )


def check_same(name: str, tree: Any, params: Any) -> None:
    """Raises ValueError unless tree has the structure and the shapes of params."""
    structure, wanted = jax.tree.structure(tree), jax.tree.structure(params)
    if structure != wanted:
        raise ValueError(f"{name} must have the tree of params, got {structure} for {wanted}: {_BELONG}")
    leaves = jax.tree.leaves(tree)
    for (path, p), leaf in zip(jax.tree_util.tree_leaves_with_path(params), leaves, strict=True):
        if jnp.shape(leaf) != jnp.shape(p):
            raise ValueError(
                f"{name} must have the shapes of params, got {jnp.shape(leaf)} for {jnp.shape(p)} at "
                f"params{jax.tree_util.keystr(path)}: {_BELONG}"
            )


def decay_mask(mask: Any, params: Any) -> Any:
    """Returns a tree of bools of params' tree, from a tree or prefix of it, a function of params, or None."""
    mask = True if mask is None else mask(params) if callable(mask) else mask
    try:
        return jax.tree.map(lambda flag, below: jax.tree.map(lambda _: bool(flag), below), mask, params)
    except ValueError as error:
        raise ValueError(
            f"mask must be a tree of bools like params or a prefix of it, got {jax.tree.structure(mask)} for "
            f"{jax.tree.structure(params)}: pass a function of params to follow whatever tree there is"
        ) from error
