"""The JAX half of exact.py: `python -m benchmarks.exact_jax whole|resumed FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sfjax
from benchmarks.exact import Combination, combinations, write
from sfcore.exchange import fingerprint
from sfjax.checkpoint import Checkpoints

MAKERS = {
    "sgd": lambda: sfjax.schedule_free_sgd(0.1, 15, weight_decay=0.01),
    "adamw": lambda: sfjax.schedule_free_adamw(0.01, 15, weight_decay=0.01),
    "radam": lambda: sfjax.schedule_free_radam(0.01, weight_decay=0.01),
}


def build(one: Combination, seed: int) -> tuple[Any, Any, Any]:
    """Returns parameters, state, and a jitted micro-step that draws its batch and dropout from a key."""
    keys = jax.random.split(jax.random.key(seed), 2)
    dtype = jnp.dtype(one.precision)
    params = {
        "in": {"kernel": jax.random.normal(keys[0], (8, 16), dtype), "bias": jnp.zeros(16, dtype)},
        "out": {"kernel": jax.random.normal(keys[1], (16, 4), dtype), "bias": jnp.zeros(4, dtype)},
    }
    tx = optax.MultiSteps(MAKERS[one.optimizer](), one.accumulate)

    def loss_of(params: Any, key: jax.Array) -> jax.Array:
        of_images, of_dropout = jax.random.split(key)
        hidden = jnp.tanh(
            jax.random.normal(of_images, (6, 8), dtype) @ params["in"]["kernel"] + params["in"]["bias"]
        )
        hidden = jnp.where(jax.random.bernoulli(of_dropout, 0.8, hidden.shape), hidden / 0.8, 0)
        return (
            (hidden @ params["out"]["kernel"] + params["out"]["bias"]).astype(jnp.float32).__pow__(2).mean()
        )

    @jax.jit
    def micro_step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        key, now = jax.random.split(key)
        loss, gradients = jax.value_and_grad(loss_of)(params, now)
        updates, state = tx.update(gradients, state, params, value=loss)  # for ScheduleFree+
        return optax.apply_updates(params, updates), state, key

    return params, tx.init(params), micro_step


def main(part: str, folder: Path) -> None:
    """Runs every combination, from the start or from its checkpoint."""
    digests = {}
    for one in combinations():
        with Checkpoints(folder / one.name) as checkpoints:
            params, state, micro_step = build(one, seed=0 if part == "whole" else 1)
            key, start = jax.random.key(7), 0
            if part == "resumed":
                restored = checkpoints.restore(
                    params, state, extra_state={"key": key}, accumulation=one.accumulate
                )
                assert restored is not None
                params, state, key = restored.params, restored.opt_state, restored.extra_state["key"]
                start = restored.meta.position
            for taken in range(start, one.micro_batches):
                if part == "whole" and taken == one.saved_at:
                    save(one, params, state, key, checkpoints)
                params, state, key = micro_step(params, state, key)
            digests[one.name] = digest((params, state, jax.random.key_data(key)))
    write(part, folder, digests)


def save(one: Combination, params: Any, state: Any, key: jax.Array, checkpoints: Checkpoints) -> None:
    """Saves, in "eval" right after an evaluation at x."""
    if one.mode == "eval":
        jax.block_until_ready(sfjax.schedule_free_eval_params(state, params))
    place = (one.accumulate, one.saved_at % one.accumulate)
    checkpoints.save(
        one.saved_at // one.accumulate,
        params,
        state,
        extra_state={"key": key},
        position=one.saved_at,
        accumulation=place,
    )
    checkpoints.wait()


def digest(tree: Any) -> str:
    """Returns a SHA-256 of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return fingerprint({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
