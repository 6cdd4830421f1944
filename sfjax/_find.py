"""Finds Schedule-Free states in any optimizer state, and x through them."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sfjax import _iterates, _scalars
from sfjax.schedule_free import ScheduleFreeState


def _is_state(node: Any) -> bool:
    return isinstance(node, ScheduleFreeState)


def _pure(tree: Any) -> Any:
    """Returns a tree of arrays for a tree of flax.nnx variables; others as they are."""
    nnx = sys.modules.get("flax.nnx")
    return tree if nnx is None else nnx.as_pure(tree)


def find_states(opt_state: Any) -> list[ScheduleFreeState]:
    """Returns every Schedule-Free state in an optimizer state, however it is wrapped.

    Args:
        opt_state: state of any Optax transformation, or of a flax.nnx.Optimizer.

    Returns:
        The states in tree order; an empty list if there are none.

    Example:
        >>> import jax.numpy as jnp, optax, sfjax
        >>> tx = optax.chain(optax.clip(1.0), sfjax.schedule_free_sgd(0.1))
        >>> len(sfjax.find_states(tx.init(jnp.ones(3))))
        1
    """
    return [node for node in jax.tree.leaves(_pure(opt_state), is_leaf=_is_state) if _is_state(node)]


def find_state(opt_state: Any) -> ScheduleFreeState:
    """Returns the one Schedule-Free state in an optimizer state.

    Raises:
        ValueError: if there is none, or more than one.

    Example:
        >>> import jax.numpy as jnp, optax, sfjax
        >>> tx = optax.chain(optax.clip(1.0), sfjax.schedule_free_sgd(0.1))
        >>> int(sfjax.find_state(tx.init(jnp.ones(3))).step)
        0
    """
    found = _require(opt_state)
    if len(found) > 1:
        raise ValueError(
            f"opt_state must hold one Schedule-Free state, got {len(found)}: use find_states for all of them"
        )
    return found[0]


def _require(opt_state: Any) -> list[ScheduleFreeState]:
    found = find_states(opt_state)
    if not found:
        kinds: list[str] = []
        jax.tree.map(
            lambda node: None,
            opt_state,
            is_leaf=lambda node: bool(kinds.append(type(node).__name__)),  # type: ignore[func-returns-value]
        )
        raise ValueError(
            f"opt_state must hold a ScheduleFreeState, got none in {', '.join(dict.fromkeys(kinds)) or 'nothing'}: "
            "pass the state that sfjax's tx.init and tx.update return (optax.contrib's is another type)"
        )
    return found


def schedule_free_eval_params(state: Any, params: Any) -> Any:
    """Returns x, the parameters to evaluate, save and ship; `params`, which hold y, are not changed.

    Args:
        state: a `ScheduleFreeState`, or any optimizer state that holds one or several: chain, MultiSteps,
            masked, partition, inject_hyperparams, flatten, flax.nnx.Optimizer's, and so on.
        params: what the last update left, of the tree that tx.init got.

    Returns:
        A tree like params, of the same dtypes; leaves that no Schedule-Free state holds are as they are.

    Raises:
        ValueError: if there is no Schedule-Free state; the message says what was found.

    Example:
        >>> import jax.numpy as jnp, optax, sfjax
        >>> tx = optax.MultiSteps(sfjax.schedule_free_sgd(0.1), 2)
        >>> params = jnp.ones(3)
        >>> sfjax.schedule_free_eval_params(tx.init(params), params).tolist()
        [1.0, 1.0, 1.0]
    """
    x = params
    for found in _require(state):
        x = _overlay(x, found, _iterates.recover_x)
    return x


def iterates(state: Any, params: Any) -> tuple[Any, Any, Any]:
    """Returns (x, y, z), trees like params: x and y in params' dtypes, z in its own.

    Args:
        state, params: as for `schedule_free_eval_params`.

    Example:
        >>> import jax.numpy as jnp, sfjax
        >>> params = jnp.ones(3)
        >>> x, y, z = sfjax.iterates(sfjax.schedule_free_sgd(0.1).init(params), params)
    """
    z = params
    for found in _require(state):
        z = _overlay(z, found, _iterates.recover_z, keep_dtype=False)
    return schedule_free_eval_params(state, params), params, z


def _overlay(params: Any, state: ScheduleFreeState, recover: Any, keep_dtype: bool = True) -> Any:
    """Returns params with the leaves that the state holds recovered; MaskedNode marks those it does not."""

    def leaf(stored: Any, y: Any) -> Any:
        if isinstance(stored, optax.MaskedNode):
            return y
        value = recover(y, stored, state.b1)
        return value.astype(y.dtype) if keep_dtype else value

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    pure = _pure(params)
    leaves, tree = jax.tree.flatten(pure)
    if _is_flat(state.z, leaves):
        y = jnp.concatenate([jnp.ravel(p) for p in leaves])
        parts = jnp.split(leaf(state.z, y), jnp.cumsum(jnp.array([p.size for p in leaves]))[:-1])
        new = [part.reshape(p.shape).astype(p.dtype if keep_dtype else part.dtype) for part, p in zip(parts, leaves, strict=True)]
    else:
        new = jax.tree.leaves(jax.tree.map(leaf, state.z, pure, is_leaf=is_masked))
    return jax.tree.unflatten(jax.tree.structure(params), new)


def _is_flat(z: Any, leaves: list[Any]) -> bool:
    """Tells whether z is optax.flatten's one vector of all parameters."""
    if not isinstance(z, jax.Array) or z.ndim != 1:
        return False
    return len(leaves) != 1 or leaves[0].shape != z.shape


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Returns what the last update used, for logging.

    Args:
        opt_state: any optimizer state that holds one Schedule-Free state.

    Returns:
        Scalars `lr` (with warm-up and rectification), `lr_max`, `c` (averaging weight), `weight_sum`,
        `step` (finished updates), `effective_lr` (the multiple of the newest direction by which y moved).
        The keys of the torch twin's `optimizer.metrics()`.

    Raises:
        ValueError: if there is no Schedule-Free state, or more than one.

    Example:
        >>> import jax.numpy as jnp, sfjax
        >>> sorted(sfjax.metrics(sfjax.schedule_free_sgd(0.1).init(jnp.ones(3))))
        ['c', 'effective_lr', 'lr', 'lr_max', 'step', 'weight_sum']
    """
    state = find_state(opt_state)
    return {
        "lr": state.lr,
        "lr_max": state.lr_max,
        "c": state.c,
        "weight_sum": state.weight_sum,
        "step": state.step,
        "effective_lr": _scalars.effective_lr(state.lr, state.c, state.b1),
    }
