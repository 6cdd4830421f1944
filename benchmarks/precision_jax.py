"""The JAX rows of `benchmarks precision`: ours in every precision, and optax.contrib in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sfjax
from benchmarks import precision_problem
from benchmarks.precision_problem import EVERY, Problem, Run


class Method(NamedTuple):
    """One row: what it is called, the parameters' dtype, how its transformation is made, and its x."""

    label: str
    dtype: Any
    make: Callable[..., Any]
    x: Callable[[Any, Any], Any]
    is_drawn: bool = False


def _x(state: Any, params: Any) -> Any:
    return sfjax.schedule_free_eval_params(state, params, jnp.float32)


def _contrib_x(state: Any, params: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32), optax.contrib.schedule_free_eval_params(state, params)
    )


LEAN, EIGHT = (partial(sfjax.schedule_free_adamw, precision=form) for form in ("lean", "8bit"))
METHODS = {
    "float32": Method("float32 (JAX)", jnp.float32, sfjax.schedule_free_adamw, _x),
    "exact": Method("bfloat16, exact (JAX)", jnp.bfloat16, sfjax.schedule_free_adamw, _x),
    "exact-float16": Method("float16, exact (JAX)", jnp.float16, sfjax.schedule_free_adamw, _x),
    "lean": Method("bfloat16, lean (JAX)", jnp.bfloat16, LEAN, _x, True),
    "8bit": Method("bfloat16, 8bit (JAX)", jnp.bfloat16, EIGHT, _x, True),
    "8bit-float32": Method("float32, 8bit (JAX)", jnp.float32, EIGHT, _x, True),
    "optax.contrib": Method(
        "optax.contrib, bfloat16", jnp.bfloat16, optax.contrib.schedule_free_adamw, _contrib_x
    ),
}


def train(name: str, problem: Problem, lr: float, draw: int = 0) -> Run:
    """Trains one row on one seed, and one of the rounding; the steps between two losses are one loop."""
    method = METHODS[name]
    tx = method.make(lr, **({"seed": draw} if method.is_drawn else {}))
    params = {key: jnp.asarray(weight, method.dtype) for key, weight in problem.weights.items()}
    inputs, targets = jnp.asarray(problem.inputs), jnp.asarray(problem.targets)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        grads = jax.grad(_loss)(params, inputs[batch], targets[batch])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    go = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches)[0])
    carry, curve = (params, tx.init(params)), [precision_problem.loss(problem, problem.weights)]
    with jax.numpy_dtype_promotion("standard"):  # optax.contrib mixes dtypes
        for batches in problem.batches.reshape(-1, EVERY, problem.batches.shape[1]):
            carry = go(carry, jnp.asarray(batches, jnp.int32))
            curve.append(_loss_at(problem, method.x(carry[1], carry[0])))
        x = jax.tree.map(lambda leaf: leaf.astype(method.dtype), method.x(carry[1], carry[0]))
    return Run(curve, _loss_at(problem, x), _bytes(carry, params["w1"]))


def final_losses(problems: Sequence[Problem], lr: float) -> dict[str, list[float]]:
    """Returns row -> the loss at x after the last step, one a problem."""
    return {name: [train(name, problem, lr).curve[-1] for problem in problems] for name in METHODS}


def _loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the batch's loss; the arithmetic is float32, so that only what is stored is narrow."""
    w1, b1, w2, b2 = (params[name].astype(jnp.float32) for name in ("w1", "b1", "w2", "b2"))
    return jnp.mean((jnp.tanh(inputs @ w1 + b1) @ w2 + b2 - targets) ** 2)


def _loss_at(problem: Problem, x: Any) -> float:
    return precision_problem.loss(problem, {key: np.asarray(leaf, np.float32) for key, leaf in x.items()})


def _bytes(carry: Any, like: jax.Array) -> float:
    (params, state), name = carry, "w1"
    assert params[name].shape == like.shape
    own = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path((params, state))
        if path and getattr(path[-1], "key", None) == name
    ]
    return float(sum(leaf.nbytes for leaf in own) / like.size)
