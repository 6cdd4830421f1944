"""Plain optax: params, state, a random key. What comes before the step and what comes after it.

`python examples/optax_loop.py out/optax 100`, then `... 200`: it goes on where it was.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import _digits
import sfjax
from sfjax.checkpoint import Checkpoints

# Clip before it; nothing that edits updates may come after it.
TX = sfjax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(0.02, warmup_steps=5))
DIGITS = _digits.load()


def logits_of(params: Any, images: Any) -> jax.Array:
    for layer in params[:-1]:
        images = jax.nn.silu(images @ layer["kernel"] + layer["bias"])
    return images @ params[-1]["kernel"] + params[-1]["bias"]


@partial(jax.jit, donate_argnums=(0, 1))
def train_step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array, jax.Array]:
    key, chosen, noise = jax.random.split(key, 3)
    rows = jax.random.randint(chosen, (64,), 0, len(DIGITS.train_images))
    images, labels = (jnp.asarray(part)[rows] for part in (DIGITS.train_images, DIGITS.train_labels))
    images += 0.1 * jax.random.normal(noise, images.shape)

    def loss_of(params: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, images), labels).mean()

    loss, grads = jax.value_and_grad(loss_of)(params)  # params hold y
    params, state = TX.step(params, state, gradients=grads)
    return params, state, key, loss


def main(folder: Path, steps: int) -> float:
    """Trains up to a step; returns the share of the test digits that x gets right."""
    params = [{"kernel": jnp.asarray(k), "bias": jnp.asarray(b)} for k, b in _digits.initial_weights(0)]
    key = jax.random.key(0)
    state = TX.init(params)
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(params, state, extra_state={"key": key})
        if restored:
            params, state, key = restored.params, restored.opt_state, restored.extra_state["key"]
        for step in range(restored.meta.step if restored else 0, steps):
            params, state, key, loss = train_step(params, state, key)
            checkpoints.observe(params, state, loss)  # says so if the restart went wrong
            if (step + 1) % 50 == 0 or step + 1 == steps:
                checkpoints.save(step + 1, params, state, extra_state={"key": key})
    x = sfjax.schedule_free_eval_params(state, params)  # to evaluate and to ship
    return float((logits_of(x, DIGITS.test_images).argmax(-1) == DIGITS.test_labels).mean())


if __name__ == "__main__":
    print(f"{main(Path(sys.argv[1]), int(sys.argv[2])):.1%} of the test digits are right at x")
