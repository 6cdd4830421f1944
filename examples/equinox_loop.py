"""Equinox: the arrays of the model are what is trained, saved and averaged; the rest of it is code.

`python examples/equinox_loop.py out/equinox 100`, then `... 200`: it goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax

import _digits
import sfjax
from sfjax.checkpoint import Checkpoints

TX = sfjax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(0.02, warmup_steps=5))
DIGITS = _digits.load()


@eqx.filter_jit(donate="all-except-first")
def train_step(batch: Any, model: Any, state: Any) -> tuple[Any, Any]:
    images, labels = batch

    def loss(model: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(images), labels).mean()

    grads = eqx.filter_grad(loss)(model)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    params, state = TX.step(params, state, gradients=grads)
    return eqx.combine(params, static), state


@eqx.filter_jit
def predict(model: Any, images: Any) -> jax.Array:
    return jax.vmap(model)(images).argmax(-1)


def batch(number: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.random.default_rng(number).choice(len(DIGITS.train_images), 64)
    return DIGITS.train_images[rows], DIGITS.train_labels[rows]


def main(folder: Path, steps: int) -> float:
    """Trains up to a step; returns the share of the test digits that x gets right."""
    model = eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    state = TX.init(params)
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(params, state)
        if restored:
            model, state = eqx.combine(restored.params, static), restored.opt_state
        for number in range(restored.meta.step if restored else 0, steps):
            model, state = train_step(batch(number), model, state)
        params = eqx.filter(model, eqx.is_inexact_array)
        checkpoints.save(steps, params, state)
    x = eqx.combine(sfjax.schedule_free_eval_params(state, params), static)  # the model still holds y
    return float((predict(x, DIGITS.test_images) == DIGITS.test_labels).mean())


if __name__ == "__main__":
    print(f"{main(Path(sys.argv[1]), int(sys.argv[2])):.1%} of the test digits are right at x")
