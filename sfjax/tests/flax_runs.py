"""Data for the tests with Flax: a subset of the digits, and the same micro-batch for the same number."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import sfjax

BATCH = 32
WRAPPERS = {"MultiSteps": optax.MultiSteps, "accumulate": sfjax.accumulate}


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns 512 images of shape (8, 8, 1) in [0, 1], and their labels."""
    images, labels = load_digits(return_X_y=True)
    return (images[:512] / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels[:512].astype(np.int32)


def batch(number: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the micro-batch of a number, the same whenever it is asked for."""
    images, labels = digits()
    chosen = np.random.default_rng(number).choice(len(images), BATCH, replace=False)
    return jnp.asarray(images[chosen], dtype), jnp.asarray(labels[chosen])


def drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns a kernel that depends on the key; JAX's own take half a second to compile for each shape."""
    seed = 1.0 + jax.random.key_data(key)[-1].astype(jnp.float32) % 97.0
    noise = jnp.sin(seed * jnp.arange(1.0, 1.0 + np.prod(shape)))
    return (noise * (2.0 / np.prod(shape[:-1])) ** 0.5).reshape(shape).astype(dtype)


@cache  # the same object again, so that a step compiles once for all tests
def transformation(accumulation: str) -> Any:
    """Returns clip and AdamW, updated once in two micro-batches."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(0.02, 4, weight_decay=0.01))
    return WRAPPERS[accumulation](tx, 2)


def host(tree: Any) -> Any:
    """Returns the leaves of a tree by name, as NumPy arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)

    def plain(leaf: Any) -> np.ndarray:
        leaf = jnp.asarray(leaf)
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(leaf) if is_key else leaf)

    return {jax.tree_util.keystr(path, simple=True, separator="/"): plain(leaf) for path, leaf in leaves}
