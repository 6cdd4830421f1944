"""Two problems to restart on. Every tensor has a leading axis of seeds: all seeds train side by side.

The updates of Schedule-Free AdamW and RAdam are elementwise, so the runs do not touch each other, and
seed k sees the same numbers whatever the number of seeds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

INITIAL, SPLIT, BATCHES = range(3)  # what a random stream is for


class Batch(NamedTuple):
    """Inputs (seeds, n, ...) and classes (seeds, n), int64."""

    inputs: Tensor
    targets: Tensor


class Problem(ABC):
    """Abstract: initial weights, batches, a validation set and the loss."""

    name: str
    label: str
    lr: float
    micro_batch = 16
    default_seeds: int  # so many that the median of ours over RAdam's is known to 0.2 to 0.8%

    def __init__(self, seeds: int):
        self.seeds = seeds

    @abstractmethod
    def initial(self) -> list[Tensor]:
        """Returns the first weights, each (seeds, ...), float32."""

    @abstractmethod
    def batch(self, step: int, size: int) -> Batch:
        """Returns the training batch of an optimizer step, the same for every method."""

    @abstractmethod
    def validation(self) -> Batch:
        """Returns the validation set, which no batch draws from."""

    @abstractmethod
    def logits(self, weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """Returns (seeds, n, classes)."""

    def losses(self, weights: Sequence[Tensor], batch: Batch) -> Tensor:
        """Returns the mean cross-entropy of each seed, (seeds,)."""
        logits = self.logits(weights, batch.inputs).flatten(0, 1)
        each = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), reduction="none")
        return each.view(self.seeds, -1).mean(1)

    def rngs(self, purpose: int, step: int = 0) -> list[np.random.Generator]:
        """Returns one generator a seed."""
        return [np.random.default_rng([seed, purpose, step]) for seed in range(self.seeds)]


class Digits(Problem):
    """scikit-learn's 1,797 handwritten digits, split anew for each seed; an MLP of 17,226 weights."""

    name = "digits"
    label = "handwritten digits, MLP of 17 thousand weights"
    lr = 0.01
    default_seeds = 240
    layers = (64, 128, 64, 10)
    held_out = 360
    noise = 0.3  # added to training pixels, so that the gradient stays noisy to the end

    def __init__(self, seeds: int):
        super().__init__(seeds)
        images, classes = load_digits(return_X_y=True)
        self.images = torch.from_numpy((images / 16).astype(np.float32))
        self.classes = torch.from_numpy(classes.astype(np.int64))
        orders = np.stack([rng.permutation(len(images)) for rng in self.rngs(SPLIT)])
        self.held, self.train = torch.from_numpy(orders).split(
            [self.held_out, len(images) - self.held_out], dim=1
        )

    def initial(self) -> list[Tensor]:
        return dense_layers(self.rngs(INITIAL), self.layers)

    def batch(self, step: int, size: int) -> Batch:
        rngs = self.rngs(BATCHES, step)
        chosen = np.stack([rng.integers(0, self.train.shape[1], size) for rng in rngs])
        chosen = self.train.gather(1, torch.from_numpy(chosen))
        noise = np.stack([rng.standard_normal((size, self.layers[0]), np.float32) for rng in rngs])
        return Batch(self.images[chosen] + self.noise * torch.from_numpy(noise), self.classes[chosen])

    def validation(self) -> Batch:
        return Batch(self.images[self.held], self.classes[self.held])

    def logits(self, weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
        return dense(weights, inputs)


class Text(Problem):
    """The next character of Python's own help text, from the eight before it; an MLP on embeddings."""

    name = "text"
    label = "next character of Python's help text, MLP of 127 thousand weights"
    lr = 0.005
    default_seeds = 20
    context = 8
    embedding = 16
    hidden = (256, 256)
    held_out = 0.1  # the end of the text
    points = 1024  # of validation

    def __init__(self, seeds: int):
        super().__init__(seeds)
        from pydoc_data.topics import topics  # ships with Python: 700 thousand characters

        text = "\n".join(topics[name] for name in sorted(topics))
        self.characters = sorted(set(text))
        index = {character: i for i, character in enumerate(self.characters)}
        self.text = torch.tensor([index[character] for character in text])
        self.cut = int(len(text) * (1 - self.held_out))

    def initial(self) -> list[Tensor]:
        rngs, classes = self.rngs(INITIAL), len(self.characters)
        table = np.stack([rng.standard_normal((classes, self.embedding), np.float32) for rng in rngs])
        layers = (self.context * self.embedding, *self.hidden, classes)
        return [torch.from_numpy(table), *dense_layers(rngs, layers)]

    def windows(self, starts: np.ndarray) -> Batch:
        """Returns the characters from each start, and the one that follows them."""
        at = torch.from_numpy(starts)
        return Batch(self.text[at[..., None] + torch.arange(self.context)], self.text[at + self.context])

    def batch(self, step: int, size: int) -> Batch:
        last = self.cut - self.context
        return self.windows(np.stack([rng.integers(0, last, size) for rng in self.rngs(BATCHES, step)]))

    def validation(self) -> Batch:
        last = len(self.text) - self.context
        return self.windows(np.stack([rng.integers(self.cut, last, self.points) for rng in self.rngs(SPLIT)]))

    def logits(self, weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
        table, *layers = weights
        vectors = table[torch.arange(self.seeds)[:, None, None], inputs]
        return dense(layers, vectors.flatten(2))


PROBLEMS: tuple[type[Problem], ...] = (Digits, Text)


def dense_layers(rngs: Sequence[np.random.Generator], sizes: Sequence[int]) -> list[Tensor]:
    """Returns each layer's kernel (seeds, inputs, outputs), He-normal, and bias (seeds, 1, outputs), 0."""
    layers = []
    for inputs, outputs in pairwise(sizes):
        kernels = np.stack([rng.standard_normal((inputs, outputs), np.float32) for rng in rngs])
        layers += [
            torch.from_numpy(kernels) * (2 / inputs) ** 0.5,
            torch.zeros(len(rngs), 1, outputs),
        ]
    return layers


def dense(layers: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Returns what an MLP with ReLU between its layers makes of (seeds, n, inputs)."""
    hidden = inputs
    for index in range(0, len(layers), 2):
        kernel, bias = layers[index], layers[index + 1]
        hidden = torch.baddbmm(bias, hidden.relu() if index else hidden, kernel)
    return hidden
