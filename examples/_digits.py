"""What both frameworks are given: settings, the digits, the first weights and the batches. NumPy only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

LAYERS = (64, 128, 64, 10)
TEST_SIZE = 360  # of 1,797 images: a fifth
SPLIT_SEED = 0  # the same test set in every run, whatever --seed says
PIXEL_NOISE = 0.3  # added to the training images, so that the gradient stays noisy to the end

Weights = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Settings:
    """One run, the same for both frameworks."""

    optimizer: str
    lr: float
    beta: float
    weight_decay: float
    warmup_steps: int
    clip: float
    steps: int
    batch_size: int
    accumulate: int
    seed: int
    every: int


@dataclass(frozen=True)
class Digits:
    """Images are float32 of shape (n, 64) in [0, 1], labels int64 of shape (n,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@dataclass(frozen=True)
class Point:
    """One evaluation. `train_loss` is the mean over the batches since the last one, taken at y."""

    step: int
    train_loss: float
    test_loss_x: float
    test_accuracy_x: float
    test_loss_y: float
    test_accuracy_y: float
    x: np.ndarray  # every weight in one float64 vector, in the order of `flatten`
    y: np.ndarray


def make_point(step: int, losses: Iterable[Any], at_x: Sequence[Any], at_y: Sequence[Any]) -> Point:
    """Returns a point of either framework; `at_x` and `at_y` are (test loss, test accuracy, weights)."""
    return Point(
        step=step,
        train_loss=float(np.mean([float(loss) for loss in losses])),
        test_loss_x=float(at_x[0]),
        test_accuracy_x=float(at_x[1]),
        test_loss_y=float(at_y[0]),
        test_accuracy_y=float(at_y[1]),
        x=flatten(at_x[2]),
        y=flatten(at_y[2]),
    )


def load() -> Digits:
    """Returns scikit-learn's handwritten digits, split once and for all."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int64)
    return Digits(images[TEST_SIZE:], labels[TEST_SIZE:], images[:TEST_SIZE], labels[:TEST_SIZE])


def initial_weights(seed: int) -> Weights:
    """Returns one (kernel (inputs, outputs), bias (outputs,)) a layer, float32, He-normal and zero."""
    rng = np.random.default_rng([seed, 0])
    return [
        (
            rng.normal(0, np.sqrt(2 / inputs), (inputs, outputs)).astype(np.float32),
            np.zeros(outputs, np.float32),
        )
        for inputs, outputs in pairwise(LAYERS)
    ]


def batches(settings: Settings, digits: Digits) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields `steps` batches, each cut into micro-batches: (accumulate, n, 64) and (accumulate, n)."""
    rng = np.random.default_rng([settings.seed, 1])
    order = np.empty(0, np.int64)
    for _ in range(settings.steps):
        while len(order) < settings.batch_size:
            order = np.concatenate([order, rng.permutation(len(digits.train_images))])
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        noise = rng.normal(0, PIXEL_NOISE, (settings.batch_size, LAYERS[0])).astype(np.float32)
        images, labels = digits.train_images[chosen] + noise, digits.train_labels[chosen]
        parts = settings.accumulate
        yield images.reshape(parts, -1, LAYERS[0]), labels.reshape(parts, -1)


def flatten(weights: Weights) -> np.ndarray:
    """Returns all weights as one float64 vector."""
    return np.concatenate([leaf.ravel() for layer in weights for leaf in layer]).astype(np.float64)
