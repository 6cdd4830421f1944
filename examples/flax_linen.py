"""Flax linen: a CNN with BatchNorm and Dropout, accumulated gradients, exact resumes, x with its statistics.

`python examples/flax_linen.py out/linen 200`, then `... 400`: it goes on, within an update too.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import linen

import _digits
import sfjax.linen
from sfjax.checkpoint import Checkpoints
from sfjax.recalibrate import recalibrate_linen

# Clipping sees the mean of two micro-batches; warm-up counts updates, and nothing else warms up.
ADAMW = sfjax.schedule_free_adamw(0.02, warmup_steps=5)
TX = sfjax.accumulate(sfjax.chain(optax.clip_by_global_norm(1.0), ADAMW), every=2)
DIGITS = _digits.load()


class Network(linen.Module):  # (n, 64) -> (n, 10)
    @linen.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        images = linen.Conv(16, (3, 3), 2)(images.reshape(-1, 8, 8, 1))
        images = linen.relu(linen.BatchNorm(use_running_average=not train)(images)).reshape(len(images), -1)
        return linen.Dense(10)(linen.Dropout(0.1, deterministic=not train)(images))


MODEL = Network()


class State(sfjax.linen.TrainState):
    key: jax.Array  # for dropout; saved like every field


@partial(jax.jit, donate_argnums=0)
def train_step(state: State, images: jax.Array, labels: jax.Array) -> State:
    key, dropout = jax.random.split(state.key)

    def loss(params: Any) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = MODEL.apply(variables, images, True, mutable="batch_stats", rngs={"dropout": dropout})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    grads, new = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, key=key, **new)


def batch(number: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.random.default_rng(number).choice(len(DIGITS.train_images), 32)
    return DIGITS.train_images[rows], DIGITS.train_labels[rows]


def main(folder: Path, micro_steps: int) -> float:
    """Trains up to a micro-step; returns the share of the test digits that x gets right."""
    key = jax.random.key(0)
    state = State.create(apply_fn=MODEL.apply, tx=TX, key=key, **MODEL.init(key, DIGITS.test_images, False))
    with Checkpoints(folder) as checkpoints:
        state, _ = sfjax.linen.restore(checkpoints, state)
        for number in range(int(state.step), micro_steps):
            state = train_step(state, *batch(number))
        train = partial(MODEL.apply, train=True, rngs={"dropout": jax.random.key(1)})
        x = recalibrate_linen(train, state.eval_variables, map(batch, range(20)))
        sfjax.linen.save(checkpoints, state, buffers=x["batch_stats"], position=micro_steps)
    logits: Any = MODEL.apply(x, DIGITS.test_images, train=False)
    return float((logits.argmax(-1) == DIGITS.test_labels).mean())


if __name__ == "__main__":
    print(f"{main(Path(sys.argv[1]), int(sys.argv[2])):.1%} of the test digits are right at x")
