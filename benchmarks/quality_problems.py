"""The problems of `benchmarks quality`, in NumPy alone: data, first weights and batches, the same for both
twins.

Every problem has a training, a validation and a test part. Rates are tuned on the validation loss; what a
table shows is the test loss. A seed gives the first weights and the batches; it does not change the parts.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from benchmarks import quality_data

SPLIT, WEIGHTS, BATCHES = range(3)  # what a random stream is for
Weights = dict[str, np.ndarray]


class Part(NamedTuple):
    """Inputs and targets; of text (n, context + 1) characters and nothing, of a quadratic nothing."""

    inputs: np.ndarray
    targets: np.ndarray


class Data(NamedTuple):
    """What a problem's batches are drawn from, and what measures.

    Attributes:
        train: (n, ...) examples; of text all its characters, (n,).
        validation, test: as a batch is.
    """

    train: Part
    validation: Part
    test: Part


class Problem(NamedTuple):
    """One problem: all numbers that a result depends on.

    Attributes:
        name, label: in results, and in tables.
        model: "mlp" (also without a hidden layer), "transformer" or "quadratic".
        sizes: of the MLP, inputs first; (characters, width, layers, heads, context); (dimensions,).
        load: gives the data.
        batch: examples in a step.
        steps: of a run.
        rates: those tried, for AdamW and its like.
        noise: standard deviation of a quadratic's gradient.
        dtype: of weights and inputs.
    """

    name: str
    label: str
    model: str
    sizes: tuple[int, ...]
    load: Callable[[], Data]
    batch: int
    steps: int
    rates: tuple[float, ...]
    noise: float = 0.0
    dtype: str = "float32"

    @property
    def data(self) -> Data:
        return _loaded(self.load, self.dtype)

    def random(self, purpose: int, seed: int) -> np.random.Generator:
        """Returns the stream of a purpose; problems of the same sizes share their first weights."""
        return np.random.default_rng([zlib.crc32(repr((self.model, self.sizes)).encode()), purpose, seed])

    def weights(self, seed: int) -> Weights:
        """Returns the first weights: float32 numbers, whatever their dtype."""
        drawn = WEIGHTS_OF[self.model](self.random(WEIGHTS, seed), self.sizes)
        return {name: weight.astype(np.float32).astype(self.dtype) for name, weight in drawn.items()}

    def batches(self, seed: int, steps: int) -> np.ndarray:
        """Returns the examples (or starts) of the first steps, (steps, batch); of a quadratic the noise."""
        random = self.random(BATCHES, seed)
        if self.model == "quadratic":
            return (self.noise * random.standard_normal((steps, *self.sizes))).astype(np.float32)
        last = len(self.data.train.inputs) - (self.sizes[-1] if self.model == "transformer" else 0)
        return random.integers(0, last, (steps, self.batch), dtype=np.int32)

    def matrices(self) -> set[str]:
        """Returns the weights that Muon takes: matrices, but for embeddings and the last layer."""
        return {
            name for name, weight in self.weights(0).items() if weight.ndim == 2 and name.startswith("hidden")
        }


@functools.cache
def _loaded(load: Callable[[], Data], dtype: str) -> Data:
    return Data(*(Part(_typed(part.inputs, dtype), part.targets) for part in load()))


def _typed(inputs: np.ndarray, dtype: str) -> np.ndarray:
    """Returns numbers in a dtype, and characters as they are."""
    return inputs.astype(dtype, copy=False) if inputs.dtype.kind == "f" else inputs


def _mlp(random: np.random.Generator, sizes: tuple[int, ...]) -> Weights:
    """Returns He-normal layers; the last one is small, and zero where there is no other."""
    weights: Weights = {}
    layers = len(sizes) - 1
    for index in range(layers):
        name, scale = (f"hidden{index}", 1.0) if index < layers - 1 else ("head", 0.3 * (layers > 1))
        shape = sizes[index : index + 2]
        weights[f"{name}_w"] = scale * (2 / sizes[index]) ** 0.5 * random.standard_normal(shape)
        weights[f"{name}_b"] = np.zeros(sizes[index + 1])
    return weights


def _transformer(random: np.random.Generator, sizes: tuple[int, ...]) -> Weights:
    characters, width, layers, _, context = sizes

    def normal(rows: int, columns: int, scale: float) -> np.ndarray:
        return scale * random.standard_normal((rows, columns))

    weights = {"embed": normal(characters, width, 0.3), "position": normal(context, width, 0.1)}
    for layer in range(layers):
        for name, scale in (("q", 1.0), ("k", 1.0), ("v", 1.0), ("o", 0.3)):
            weights[f"hidden{layer}_{name}"] = normal(width, width, scale * width**-0.5)
        weights[f"hidden{layer}_up"] = normal(width, 4 * width, width**-0.5)
        weights[f"hidden{layer}_down"] = normal(4 * width, width, 0.3 * (4 * width) ** -0.5)
    return weights | {"head": normal(width, characters, 0.3 * width**-0.5)}


def _quadratic(random: np.random.Generator, sizes: tuple[int, ...]) -> Weights:
    return {"w": random.standard_normal(sizes)}


WEIGHTS_OF = {"mlp": _mlp, "transformer": _transformer, "quadratic": _quadratic}


def curvatures(dimensions: int) -> np.ndarray:
    """Returns the curvatures of the quadratic: 1 down to 1/100, evenly in their logarithm."""
    return np.logspace(0, -2, dimensions).astype(np.float32)


def _split(arrays: quality_data.Arrays, held: int) -> Data:
    """Returns two held-out parts of a given size, and the rest; the order is drawn once."""
    inputs, classes = arrays
    order = np.random.default_rng([SPLIT, len(inputs)]).permutation(len(inputs))
    parts = (order[2 * held :], order[:held], order[held : 2 * held])
    return Data(*(Part(inputs[part], classes[part]) for part in parts))


def _digits() -> Data:
    return _split(quality_data.digits(), 400)


def _fashion() -> Data:
    inputs, classes = quality_data.fashion("train")
    centre = inputs.mean(0)
    tests, test_classes = quality_data.fashion("test")
    inputs, tests = (inputs - centre) / 0.3, (tests - centre) / 0.3
    held = 5000
    return Data(
        Part(inputs[:-held], classes[:-held]),
        Part(inputs[-held:], classes[-held:]),
        Part(tests, test_classes),
    )


def _kjv() -> Data:
    """The first 90% of the text are trained on; the next 5% are for validation, the last for the test."""
    text, _ = quality_data.kjv()
    at, width = [int(0.9 * len(text)), int(0.95 * len(text)), len(text)], KJV_SIZES[-1] + 1
    random, nothing, parts = np.random.default_rng(SPLIT), np.zeros(0, np.int32), []
    for first, last in pairwise(at):
        starts = random.integers(first, last - width, 256)
        parts.append(Part(text[starts[:, None] + np.arange(width)], nothing))
    return Data(Part(text[: at[0]], nothing), *parts)


def _convex(name: str) -> Data:
    arrays = quality_data.convex(name)
    return _split(arrays, len(arrays[0]) // 5)


def _nothing() -> Data:
    none = np.zeros(0, np.float32)
    return Data(*(Part(none, none) for _ in range(3)))


def rates(first: float, factor: float, count: int) -> tuple[float, ...]:
    """Returns a grid, to three digits."""
    return tuple(float(f"{first * factor**index:.3g}") for index in range(count))


GRID = rates(0.001, 2, 6)
HIGHER = rates(0.002, 2, 6)
WIDE = rates(0.001, 10**0.5, 7)
KJV_SIZES = (63, 32, 2, 2, 32)
FASHION_SIZES = (196, 64, 64, 10)
FASHION_STEPS = 2000
DIGITS = Problem("digits", "digits, batch 32", "mlp", (64, 64, 64, 10), _digits, 32, 600, HIGHER)
FASHION = Problem(
    "fashion", "Fashion-MNIST, batch 64", "mlp", FASHION_SIZES, _fashion, 64, FASHION_STEPS, GRID
)
KJV = Problem("kjv", "characters of the KJV, batch 8", "transformer", KJV_SIZES, _kjv, 8, 1000, HIGHER)
QUADRATIC = Problem("quadratic", "quadratic, noisy", "quadratic", (64,), _nothing, 1, 1000, WIDE, 1.0)
# Inputs, classes, steps: 100 epochs of the smaller ones, as the paper has it; batch 16.
CONVEX = {
    "iris": (4, 3, 600),
    "wine": (13, 3, 700),
    "glass": (9, 6, 800),
    "vehicle": (18, 4, 3000),
    "vowel": (9, 11, 3600),
    "dna": (180, 3, 2400),
    "letter": (16, 26, 4000),
}
PROBLEMS = {
    problem.name: problem
    for problem in (
        FASHION,
        FASHION._replace(name="fashion-half", steps=FASHION_STEPS // 2),
        FASHION._replace(name="fashion-quarter", steps=FASHION_STEPS // 4),
        KJV,
        DIGITS,
        DIGITS._replace(name="digits-large", label="digits, batch 499 of 997", batch=499, steps=300),
        QUADRATIC,
        QUADRATIC._replace(name="quadratic-quiet", label="quadratic, little noise", noise=0.01),
        *(
            Problem(
                name,
                name.capitalize(),
                "mlp",
                (inputs, classes),
                functools.partial(_convex, name),
                16,
                steps,
                WIDE,
            )
            for name, (inputs, classes, steps) in CONVEX.items()
        ),
    )
}
