"""Finds Schedule-Free states in any optimizer state, and x through them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from sfcore.averaging import effective_lr
from sfjax.law.iterates import recover_x, recover_z
from sfjax.state import arguments, forms
from sfjax.state.forms import ScheduleFreeState


def find_states(opt_state: Any) -> list[ScheduleFreeState]:
    """Returns every Schedule-Free state in an optimizer state, however it is wrapped.

    Args:
        opt_state: state of any Optax transformation, or of a flax.nnx.Optimizer; any tree.

    Returns:
        The states in tree order; an empty list if there are none.

    Example:
        >>> import jax.numpy as jnp, optax, sfjax
        >>> tx = optax.chain(optax.clip(1.0), sfjax.schedule_free_sgd(0.1))
        >>> len(sfjax.find_states(tx.init(jnp.ones(3))))
        1
    """
    nodes = jax.tree.leaves(_pure(opt_state), is_leaf=lambda node: isinstance(node, ScheduleFreeState))
    return [node for node in nodes if isinstance(node, ScheduleFreeState)]


def find_state(opt_state: Any) -> ScheduleFreeState:
    """Returns the one Schedule-Free state in an optimizer state.

    Args:
        opt_state: as for `find_states`.

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
            f"opt_state must hold one Schedule-Free state, got {len(found)}: "
            "take them from find_states(opt_state), one at a time"
        )
    return found[0]


# What optax.apply_updates returns is to pyright any tree or number: an x of that type could not be indexed.
def schedule_free_eval_params(state: Any, params: Any, dtype: DTypeLike | None = None) -> Any:
    """Returns x, the parameters to evaluate, save and ship; `params`, which hold y, are not changed.

    It takes y for granted: x of x is something else, except at b1 = 0, at b1 = 1 and before the first update.

    Args:
        state: a `ScheduleFreeState`, or any optimizer state that holds one or several: chain, MultiSteps,
            masked, partition, inject_hyperparams, flatten, flax.nnx.Optimizer's, and so on. Of a vmapped run
            in jax.vmap.
        params: what the last update left, of the tree that tx.init got.
        dtype: of x; None (default) is the parameters' own. jnp.float32 shows all that is known of x where
            parameters have 16 bits.

    Returns:
        A tree like params; leaves that no Schedule-Free state holds are as they are.

    Raises:
        ValueError: if there is no Schedule-Free state (the message says what was found), or if its tree or
            shapes are not those of params.

    Example:
        >>> import jax.numpy as jnp, optax, sfjax
        >>> tx = optax.MultiSteps(sfjax.schedule_free_sgd(0.1), 2)
        >>> params = jnp.ones(3)
        >>> sfjax.schedule_free_eval_params(tx.init(params), params).tolist()
        [1.0, 1.0, 1.0]
    """
    arguments.check_dtype(dtype)
    return _overlay(
        _require(state), params, recover_x, lambda x, p: x.astype(p.dtype if dtype is None else dtype)
    )


def iterates(state: Any, params: Any) -> tuple[Any, Any, Any]:
    """Returns (x, y, z), trees like params: x and y in params' dtypes, z in its own.

    Args:
        state, params: as for `schedule_free_eval_params`.

    Raises:
        ValueError: as `schedule_free_eval_params`.

    Example:
        >>> import jax.numpy as jnp, sfjax
        >>> params = jnp.ones(3)
        >>> x, y, z = sfjax.iterates(sfjax.schedule_free_sgd(0.1).init(params), params)
    """
    z = _overlay(_require(state), params, recover_z)
    return schedule_free_eval_params(state, params), params, z


def metrics(opt_state: Any, params: Any = None) -> dict[str, jax.Array]:
    """Returns what the last update used, for logging.

    Args:
        opt_state: any optimizer state that holds one Schedule-Free state.
        params: what the last update left; default None, and then `x_z_distance` is not measured.

    Returns:
        Scalars `lr` (with warm-up and rectification), `lr_max`, `c` (averaging weight), `weight_sum`,
        `step` (finished updates), `effective_lr` (the multiple of the newest direction by which y moved),
        and with params `x_z_distance` (Euclidean norm of x - z over all parameters). The keys of the torch
        twin's `optimizer.metrics()`.

    Raises:
        ValueError: if there is no Schedule-Free state, or more than one.

    Example:
        >>> import jax.numpy as jnp, sfjax
        >>> sorted(sfjax.metrics(sfjax.schedule_free_sgd(0.1).init(jnp.ones(3))))
        ['c', 'effective_lr', 'lr', 'lr_max', 'step', 'weight_sum']
    """
    state = find_state(opt_state)
    told = {name: getattr(state, name) for name in ("lr", "lr_max", "c", "weight_sum", "step")}
    told["effective_lr"] = effective_lr(state.lr, state.c, state.b1)
    if params is not None:
        wide = None if any(map(jnp.iscomplexobj, jax.tree.leaves(params))) else state.lr.dtype
        x = schedule_free_eval_params(opt_state, params, dtype=wide)
        z = iterates(opt_state, params)[2]
        gaps = jax.tree.map(lambda x, z: jnp.sum(jnp.square(jnp.abs(x - z.astype(x.dtype)))), x, z)
        squares = [gap.astype(state.lr.dtype) for gap in jax.tree.leaves(gaps)]
        told["x_z_distance"] = jnp.sqrt(sum(squares, jnp.zeros((), state.lr.dtype)))
    return told


def _pure(tree: Any) -> Any:
    """Returns a tree of arrays for a tree of flax.nnx variables; others as they are."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree
    # It was called pure before flax 0.12, and was not there before 0.10.7, which sfjax.nnx does not serve.
    as_pure: Any = getattr(nnx, "as_pure", None) or getattr(nnx, "pure", lambda tree: tree)
    return as_pure(tree)


def _require(opt_state: Any) -> list[ScheduleFreeState]:
    found = find_states(opt_state)
    if not found:
        raise ValueError(
            f"opt_state must hold a ScheduleFreeState of sfjax, got {_kinds(opt_state)}: "
            "pass what tx.init and tx.update of an sfjax transformation return; "
            "restore a checkpoint with jax.eval_shape(tx.init, params) as its target"
        )
    return found


def _kinds(opt_state: Any) -> str:
    """Returns the names of the outermost type of a tree and of every state in it."""
    names: list[str] = []

    def note(node: Any) -> bool:
        kind = type(node)
        if not names or hasattr(kind, "_fields"):
            module = [part for part in kind.__module__.split(".") if part[0] != "_" and part != "builtins"]
            names.append(".".join([*module, kind.__qualname__]))
        return False

    jax.tree.leaves(opt_state, is_leaf=note)
    return ", ".join(dict.fromkeys(names))


def _overlay(
    states: list[ScheduleFreeState],
    params: Any,
    recover: Callable[[Any, Any, Any], Any],
    cast: Callable[[Any, Any], Any] = lambda found, p: found,
) -> Any:
    """Returns params with what (y, the buffer beside it, beta) give for the leaves that states hold.

    A state has MaskedNode for the others; `cast` takes what was found, and the parameter.
    """

    def found(p: Any, stored: Any, rest: Any, scale: Any, beta: Any) -> Any:
        if isinstance(stored, optax.MaskedNode):
            return p
        shape = getattr(p, "shape", type(p).__name__)
        if shape != stored.shape:
            raise ValueError(
                f"params must have the shapes that tx.init got, got {shape} for {stored.shape}: "
                "pass what the last update left"
            )
        return cast(recover(*forms.opened(p, stored, rest, scale), beta), p)

    new = _pure(params)
    for state in states:
        if state.b1.ndim:
            raise ValueError(
                f"state must be of one run, got the shape {state.b1.shape} of runs: "
                "call jax.vmap(sfjax.schedule_free_eval_params)(state, params)"
            )
        z, rest = (_unflattened(tree, new) for tree in (state.z, state.y_rest))
        stored, tree = jax.tree.flatten(z, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
        try:
            below = tree.flatten_up_to(new)
        except ValueError as error:
            raise ValueError(
                f"params must have the tree that tx.init got, got {jax.tree.structure(new)} for {tree}: "
                "pass what the last update left (with flax.nnx, nnx.state(model, nnx.Param); with Equinox, "
                "what eqx.filter gave to tx.init)"
            ) from error
        rests, scales = (
            [None] * len(stored) if one is None else tree.flatten_up_to(one) for one in (rest, state.scale)
        )
        columns = zip(below, stored, rests, scales, strict=True)
        new = tree.unflatten(found(*leaves, state.b1) for leaves in columns)
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(new))


def _unflattened(z: Any, params: Any) -> Any:
    """Returns z as a tree like params, also where it is the one vector of all parameters of optax.flatten."""
    leaves, tree = jax.tree.flatten(params)
    shapes = [getattr(leaf, "shape", ()) for leaf in leaves]
    if not hasattr(z, "shape") or z.ndim != 1 or shapes == [z.shape]:
        return z
    sizes = [math.prod(shape) for shape in shapes]
    if sum(sizes) != z.size:
        raise ValueError(
            f"params must have the {z.size} numbers that tx.init got, got {sum(sizes)}: "
            "pass what the last update left; optax.flatten goes outside of masked and partition"
        )
    parts = jnp.split(z, np.cumsum(sizes)[:-1])
    return tree.unflatten([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])
