"""The twins beside each other, closed loop: each follows the gradients of its own network on real data.

Rounding feeds back through the gradients here. Over 50 steps that is not yet felt; over thousands it
would be (1e-4 after 3000), which is why the goldens replay recorded gradients instead.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from sklearn.datasets import load_digits

from parity_tests.cases import Case
from parity_tests.compare import assert_same
from parity_tests.drivers import DRIVERS, Run
from parity_tests.drivers.jax_runs import precision
from parity_tests.reference import Arrays
from parity_tests.tolerances import TOLERANCES
from parity_tests.trajectory import Trajectory, stack

STEPS, BATCH, WIDTHS = 50, 64, (64, 24, 10)
CASES = [
    Case("sgd", "as in the tutorial", "twins", "sgd", {"lr": 2.0, "warmup_steps": 10, "weight_decay": 1e-3}),
    Case(
        "adamw",
        "as in the tutorial",
        "twins",
        "adamw",
        {"lr": 0.02, "warmup_steps": 10, "weight_decay": 0.01},
    ),
    Case(
        "adamw-inner", "momentum on top", "twins", "adamw", {"lr": 0.01, "inner_momentum": 0.5, "beta": 0.95}
    ),
    Case("radam", "as in the tutorial", "twins", "radam", {"lr": 0.02}),
    Case("adamw-polyak", "x stored, y = z", "twins", "adamw", {"lr": 0.02, "beta": 0.0, "prior_steps": 5}),
]


def initial_weights() -> Arrays:
    """Returns kernels of shape [inputs, outputs] and biases, uniform as torch.nn.Linear draws them."""
    noise = np.random.default_rng(0)
    weights: Arrays = {}
    for number, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS)):
        bound = inputs**-0.5
        weights[f"kernel{number}"] = noise.uniform(-bound, bound, (inputs, outputs))
        weights[f"bias{number}"] = noise.uniform(-bound, bound, outputs)
    return weights


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the same seeded batches of real handwritten digits every time."""
    images, labels = load_digits(return_X_y=True)
    noise = np.random.default_rng(1)
    for _ in range(STEPS):
        chosen = noise.integers(0, len(labels), BATCH)
        yield images[chosen] / 16, labels[chosen]


class FlaxNetwork:
    """Flax's network, and the gradients of its loss."""

    def __init__(self, dtype: str):
        self.dtype = dtype
        model = nn.Sequential([nn.Dense(WIDTHS[1], dtype=dtype), nn.tanh, nn.Dense(WIDTHS[2], dtype=dtype)])

        def loss(weights: Arrays, images: jax.Array, labels: jax.Array) -> jax.Array:
            layers = {
                f"layers_{2 * i}": {"kernel": weights[f"kernel{i}"], "bias": weights[f"bias{i}"]}
                for i in range(2)
            }
            logits = model.apply({"params": layers}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        self.grad = jax.jit(jax.grad(loss))

    def gradients(self, weights: Arrays, images: np.ndarray, labels: np.ndarray) -> Arrays:
        with precision(self.dtype):
            cast = {k: jnp.asarray(w, self.dtype) for k, w in weights.items()}
            grads = self.grad(cast, jnp.asarray(images, self.dtype), jnp.asarray(labels))
            return {k: np.asarray(g) for k, g in grads.items()}


flax_network = functools.cache(FlaxNetwork)  # compiled once a dtype


class TorchNetwork:
    """torch's network, which keeps its kernels the other way round, and the gradients of its loss."""

    def __init__(self, dtype: str):
        self.dtype = getattr(torch, dtype)
        first, second = (torch.nn.Linear(*pair, dtype=self.dtype) for pair in (WIDTHS[:2], WIDTHS[1:]))
        self.layers = [first, second]
        self.model = torch.nn.Sequential(first, torch.nn.Tanh(), second)

    def gradients(self, weights: Arrays, images: np.ndarray, labels: np.ndarray) -> Arrays:
        self.model.zero_grad()
        for i, layer in enumerate(self.layers):
            layer.weight.data = torch.tensor(weights[f"kernel{i}"].T, dtype=self.dtype)
            layer.bias.data = torch.tensor(weights[f"bias{i}"], dtype=self.dtype)
        logits = self.model(torch.tensor(images, dtype=self.dtype))
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
        found: Arrays = {}
        for i, layer in enumerate(self.layers):
            found[f"kernel{i}"] = layer.weight.grad.numpy().T.copy()  # type: ignore[union-attr]
            found[f"bias{i}"] = layer.bias.grad.numpy().copy()  # type: ignore[union-attr]
        return found


def train(run: Run, network: FlaxNetwork | TorchNetwork, lr: float) -> Trajectory:
    """Returns the trajectory of a run that follows its own network's gradients at its own y."""
    rows = {0: run.iterates()}
    for step, (images, labels) in enumerate(batches()):
        run.update(network.gradients(rows[step][1], images, labels), lr)
        rows[step + 1] = run.iterates()
    return stack(rows)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_twins_train_the_same_network_alike(case: Case, dtype: str):
    start = initial_weights()
    lr = case.options["lr"]
    ours = train(DRIVERS["sfjax"].start(case, start, dtype), flax_network(dtype), lr)
    theirs = train(DRIVERS["sftorch foreach"].start(case, start, dtype), TorchNetwork(dtype), lr)
    assert_same(f"sfjax against sftorch on digits, {case.id}", ours, theirs, TOLERANCES[dtype, "closed loop"])


def test_the_closed_loop_learns_so_that_its_agreement_means_something():
    run = DRIVERS["sftorch foreach"].start(CASES[1], initial_weights(), "float64")
    network = TorchNetwork("float64")
    trained = train(run, network, CASES[1].options["lr"])
    images, labels = load_digits(return_X_y=True)
    correct = []
    for step in (0, STEPS):
        network.gradients({k: a[step] for k, a in trained.x.items()}, images / 16, labels)
        logits = network.model(torch.tensor(images / 16))
        correct.append(float((logits.argmax(1).numpy() == labels).mean()))
    assert correct[0] < 0.25
    assert correct[1] > 0.85
