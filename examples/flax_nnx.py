"""Flax NNX: a CNN with BatchNorm and Dropout, data from grain, exact resumes, x with statistics of its own.

`python examples/flax_nnx.py out/nnx 100`, then `... 200`: it goes on with the very next batch.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import grain
import jax
import optax
from flax import nnx

import _digits
import sfjax.nnx
from sfjax.checkpoint import Checkpoints
from sfjax.recalibrate import recalibrate

# Nothing that edits updates may come after the Schedule-Free optimizer; it has the only warm-up.
TX = sfjax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(0.02, warmup_steps=5))
DIGITS = _digits.load()


class Network(nnx.Module):
    """(n, 64) -> (n, 10)."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        images = nnx.relu(self.norm(self.conv(images.reshape(-1, 8, 8, 1))))
        return self.out(self.dropout(images.reshape(len(images), -1)))


@nnx.jit(donate_argnums=(0, 1))
def train_step(model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> None:
    def loss(model: Network) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    sfjax.nnx.step(model, optimizer, nnx.grad(loss)(model))


@nnx.jit
def predict(model: Any, batch: Any) -> jax.Array:
    return model(batch[0])


def batches() -> grain.DatasetIterator:
    """Returns an endless iterator over training batches, which knows its place."""
    rows = grain.MapDataset.range(len(DIGITS.train_images)).shuffle(seed=0).repeat().batch(64)
    return iter(rows.map(lambda i: (DIGITS.train_images[i], DIGITS.train_labels[i])).to_iter_dataset())


def main(folder: Path, steps: int) -> float:
    """Trains up to a step; returns the share of the test digits that x gets right."""
    model, data = Network(nnx.Rngs(0)), batches()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    with Checkpoints(folder) as checkpoints:
        restored = sfjax.nnx.restore(checkpoints, model, optimizer, extra_state={"data": data})
        for _ in range(restored.meta.step if restored else 0, steps):
            train_step(model, optimizer, *next(data))
        shipped = sfjax.nnx.eval_model(model, optimizer)  # x; the model goes on with y
        recalibrate(shipped, islice(batches(), 20), predict)
        statistics = nnx.state(shipped, nnx.BatchStat)
        sfjax.nnx.save(checkpoints, model, optimizer, extra_state={"data": data}, buffers=statistics)
    right = predict(shipped, (DIGITS.test_images, None)).argmax(-1) == DIGITS.test_labels
    return float(right.mean())


if __name__ == "__main__":
    print(f"{main(Path(sys.argv[1]), int(sys.argv[2])):.1%} of the test digits are right at x")
