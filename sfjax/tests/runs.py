"""What the tests share: one small tree with recorded gradients, a run, and comparisons that say where."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sfjax
from sfjax.tests.plain import Point, plain_run

# The laws of schedulefree, which `plain_run` computes too. Others: checkpoint_runs.
FACTORIES = {
    "sgd": sfjax.schedule_free_sgd,
    "adamw": sfjax.schedule_free_adamw,
    "radam": sfjax.schedule_free_radam,
}
# RAdam's first four steps move nothing and the next ones little; at b2 = 0.9 a short run gets somewhere.
OPTIONS: dict[str, dict[str, Any]] = {"sgd": {}, "adamw": {}, "radam": {"b2": 0.9}}


def float64() -> AbstractContextManager[Any]:
    """Returns a context in which JAX computes in float64."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # jax < 0.8

    return enable_x64(True)


def start(seed: int = 0) -> dict[str, Any]:
    """Returns a tree of NumPy float64 leaves: a matrix, a number, and two nested vectors."""
    rng = np.random.default_rng(seed)
    return {
        "a": rng.standard_normal((3, 2)),
        "b": np.asarray(rng.standard_normal()),
        "c": {"d": rng.standard_normal(5), "e": rng.standard_normal((2, 2))},
    }


def leaf(seed: int = 0) -> dict[str, Any]:
    """Returns a tree of one NumPy float64 vector, for what no tree can change."""
    return {"w": np.random.default_rng(seed).standard_normal(5)}


def gradients(steps: int, seed: int = 1, like: Any = None) -> list[Any]:
    """Returns recorded gradients for `steps` steps."""
    rng = np.random.default_rng(seed)
    tree = start() if like is None else like
    return [
        jax.tree.map(lambda leaf: np.asarray(rng.standard_normal(leaf.shape)), tree) for _ in range(steps)
    ]


def typed(tree: Any, dtype: Any = float) -> Any:
    """Returns JAX arrays of the leaves of a NumPy tree."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def run(tx: Any, params: Any, grads: Sequence[Any], state: Any = None) -> tuple[Any, Any]:
    """Returns (params, state) after one jitted update a gradient tree; gradients take the params' dtypes."""
    update = jax.jit(tx.update)
    state = tx.init(params) if state is None else state
    for g in grads:
        g = jax.tree.map(lambda leaf, p: jnp.asarray(leaf, p.dtype), g, params)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def plain_points(optimizer: str, params: Any, grads: Sequence[Any], **options: Any) -> Any:
    """Returns a tree of `Point`, one a leaf, computed without sfjax."""
    leaves, tree = jax.tree.flatten(params)
    columns = [[jax.tree.leaves(g)[i] for g in grads] for i in range(len(leaves))]
    options = {**OPTIONS[optimizer], **options}
    return tree.unflatten(
        [plain_run(optimizer, p, g, **options) for p, g in zip(leaves, columns, strict=True)]
    )


def of(points: Any, name: str) -> Any:
    """Returns the tree of one field of a tree of `Point`."""
    return jax.tree.map(lambda p: getattr(p, name), points, is_leaf=lambda p: isinstance(p, Point))


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Raises unless the trees are alike and each leaf is right to tolerance times its largest entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True
    ):
        got, want = (np.asarray(a, np.complex128 if np.iscomplexobj(a) else np.float64) for a in (got, want))
        assert got.shape == want.shape, jax.tree_util.keystr(path)
        size = max(1e-300, float(np.abs(want).max(initial=0.0)))
        np.testing.assert_allclose(
            got, want, rtol=0, atol=tolerance * size, err_msg=jax.tree_util.keystr(path)
        )


def assert_same(actual: Any, expected: Any) -> None:
    """Raises unless both trees are the same bit for bit, dtypes included."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True
    ):
        assert got.dtype == want.dtype, jax.tree_util.keystr(path)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want), err_msg=jax.tree_util.keystr(path))


def assert_iterates(state: Any, params: Any, points: Any, tolerance: float) -> None:
    """Raises unless x, y and z are those of the plain run."""
    x, y, z = sfjax.iterates(state, params)
    assert_close(y, of(points, "y"), tolerance)
    assert_close(z, of(points, "z"), tolerance)
    assert_close(x, of(points, "x"), tolerance)
