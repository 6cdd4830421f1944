"""The sweeps of `benchmarks quality`: one program for all rates and seeds of a row.

The learning rate is a traced argument of the transformation, so that runs differ in data alone: weights and
states have two leading axes, seeds and rates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sfjax
from benchmarks.quality_methods import Method, Setting, setting, transformation
from benchmarks.quality_problems import Problem, curvatures

CHUNK = 50  # steps of one compiled loop


class Model(NamedTuple):
    """What a problem is to JAX.

    Attributes:
        batch: (data, indices of one step) -> batch.
        loss: (weights, batch) -> mean loss.
        error: (weights, batch) -> share of wrong classes.
    """

    batch: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], Any]
    error: Callable[[Any, Any], Any]


def model(problem: Problem) -> Model:
    """Returns the functions of a problem."""
    if problem.model == "quadratic":
        h = curvatures(problem.sizes[0])
        return Model(
            lambda data, noise: noise,
            lambda w, noise: jnp.sum(0.5 * h * w["w"] ** 2 + (noise * w["w"] if noise.size else 0.0)),
            lambda w, noise: jnp.float32(0),
        )
    if problem.model == "mlp":
        logits = functools.partial(_mlp, layers=len(problem.sizes) - 1)
        take = _examples
    else:
        logits = functools.partial(_transformer, sizes=problem.sizes)
        take = functools.partial(_windows, width=problem.sizes[-1] + 1)
    return Model(
        take,
        lambda w, batch: optax.softmax_cross_entropy_with_integer_labels(
            logits(w, batch[0]), batch[1]
        ).mean(),
        lambda w, batch: jnp.mean(jnp.argmax(logits(w, batch[0]), -1) != batch[1]),
    )


def _examples(data: Any, chosen: jax.Array) -> Any:
    return data[0][chosen], data[1][chosen]


def _windows(data: Any, starts: jax.Array, width: int) -> Any:
    return _shifted(data[0][starts[:, None] + jnp.arange(width)])


def _shifted(windows: jax.Array) -> Any:
    """Returns characters, and those that follow them."""
    return windows[:, :-1], windows[:, 1:]


def _mlp(w: Any, inputs: jax.Array, layers: int) -> jax.Array:
    hidden = inputs
    for index in range(layers - 1):
        hidden = jax.nn.relu(hidden @ w[f"hidden{index}_w"] + w[f"hidden{index}_b"])
    return hidden @ w["head_w"] + w["head_b"]


def _transformer(w: Any, tokens: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Returns (batch, context, characters): pre-norm blocks without gains."""
    _, width, layers, heads, context = sizes

    def normed(hidden: jax.Array) -> jax.Array:
        return hidden * jax.lax.rsqrt(jnp.mean(hidden * hidden, -1, keepdims=True) + 1e-6)

    past = jnp.tril(jnp.ones((context, context), bool))
    hidden = w["embed"][tokens] + w["position"]
    for layer in range(layers):
        at = normed(hidden)
        q, k, v = (
            (at @ w[f"hidden{layer}_{name}"]).reshape(*tokens.shape, heads, width // heads) for name in "qkv"
        )
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * (width // heads) ** -0.5
        shares = jax.nn.softmax(jnp.where(past, scores, -1e9), -1)
        mixed = jnp.einsum("bhts,bshd->bthd", shares, v).reshape(hidden.shape)
        hidden = hidden + mixed @ w[f"hidden{layer}_o"]
        hidden = hidden + jax.nn.relu(normed(hidden) @ w[f"hidden{layer}_up"]) @ w[f"hidden{layer}_down"]
    return normed(hidden) @ w["head"]


class Losses(NamedTuple):
    """Of every point (steps done), seed and rate, each (points, seeds, rates)."""

    validation: np.ndarray
    test: np.ndarray
    error: np.ndarray


class Programs(NamedTuple):
    """The compiled functions of a row, for all runs at once."""

    start: Callable[..., Any]
    advance: Callable[..., Any]
    measure: Callable[..., Any]


def programs(problem: Problem, method: Method, run: Setting) -> Programs:
    """Returns what starts, advances and measures the runs of a row."""
    parts = model(problem)

    def start(weights: Any, rate: jax.Array) -> Any:
        return transformation(method, run, rate).init(weights)

    def one(weights: Any, state: Any, rate: jax.Array, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(parts.loss)(weights, batch)
        updates, state = transformation(method, run, rate).update(grads, state, weights, value=loss)
        return optax.apply_updates(weights, updates), state

    every: Any = jax.vmap(jax.vmap(one, (0, 0, 0, None)), (0, 0, None, 0))

    def advance(weights: Any, states: Any, rates: jax.Array, data: Any, chosen: jax.Array) -> Any:
        def body(carry: Any, of_step: jax.Array) -> Any:
            batch = jax.vmap(lambda indices: parts.batch(data, indices))(of_step)
            return every(*carry, rates, batch), None

        return jax.lax.scan(body, (weights, states), chosen)[0]

    def shipped(weights: Any, state: Any) -> Any:
        return sfjax.schedule_free_eval_params(state, weights) if method.schedule_free else weights

    def measure(weights: Any, states: Any, validation: Any, test: Any) -> Any:
        def of_run(weights: Any, state: Any) -> Any:
            x = shipped(weights, state)
            return parts.loss(x, validation), parts.loss(x, test), parts.error(x, test)

        # One seed after the other: all activations at once would not fit in a cache.
        return jax.lax.map(lambda of_seed: jax.vmap(of_run)(*of_seed), (weights, states))

    return Programs(
        jax.jit(jax.vmap(jax.vmap(start, (0, 0)), (0, None))),
        jax.jit(advance, donate_argnums=(0, 1)),
        jax.jit(measure),
    )


def sweep(
    problem: Problem, method: Method, rates: Sequence[float], seeds: Sequence[int], points: Sequence[int]
) -> Losses:
    """Trains every seed at every rate, side by side, and measures at x after each of the points.

    Args:
        problem, method: the row.
        rates: as they are, without the method's scale.
        seeds: of first weights and batches.
        points: numbers of steps, rising; no step is taken after the last.

    Returns:
        The losses; not a number where a run diverged.
    """
    run = setting(method, problem.steps, problem.matrices())
    made = programs(problem, method, run)
    drawn = [problem.weights(seed) for seed in seeds]
    shape = (len(seeds), len(rates))
    weights = {
        name: jnp.broadcast_to(np.stack([w[name] for w in drawn])[:, None], (*shape, *drawn[0][name].shape))
        for name in drawn[0]
    }
    batches = np.stack([problem.batches(seed, points[-1]) for seed in seeds], 1)
    data = tuple(map(jnp.asarray, problem.data.train))
    held = [_held(problem, part) for part in (problem.data.validation, problem.data.test)]
    lrs = jnp.asarray(rates, problem.dtype)
    states = made.start(weights, lrs)
    found, done = [], 0
    for point in points:
        while done < point:
            until = min(done + CHUNK, point)
            weights, states = made.advance(weights, states, lrs, data, batches[done:until])
            done = until
        found.append([np.asarray(one) for one in made.measure(weights, states, *held)])
    return Losses(*(np.stack(one) for one in zip(*found, strict=True)))


def _held(problem: Problem, part: Any) -> Any:
    """Returns a held-out part as a batch."""
    if problem.model == "quadratic":
        return jnp.zeros(0)
    inputs, targets = map(jnp.asarray, part)
    return _shifted(inputs) if problem.model == "transformer" else (inputs, targets)
