"""Where recorded gradients come from: small smooth losses on leaves of awkward shapes.

Gradients use elementwise + - * / and sqrt and uniform noise only, operations that IEEE 754 and NumPy's
generators fix to the last bit, so that a golden file comes out the same on every machine. They are
taken along a plain descent path of their own, not at any optimizer's y: a replayed gradient need not
belong to the point it is applied at, and a run with lr = 100 still sees sane ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parity_tests.reference import Arrays

SHAPES = {"kernel": (5, 3), "bias": (3,), "scalar": (), "empty": (0, 4), "large": (2, 1, 3)}
LONGEST = 300


@dataclass(frozen=True)
class Problem:
    """A seeded loss sum(slope * scale * sqrt(1 + u^2)), u = (p - target) / scale, and its noise.

    Attributes:
        id, why: name and reason.
        scales: leaf -> size of its values.
        slopes: leaf -> size of its gradients.
        silent: (first, last) steps whose gradients are exactly zero.
        spike: one step in `spike` is 1000 times the usual size; 0 for none.
    """

    id: str
    why: str
    seed: int
    scales: dict[str, float]
    slopes: dict[str, float]
    silent: tuple[int, int] = (0, 0)
    spike: int = 0


ONES = dict.fromkeys(SHAPES, 1.0)
PROBLEMS = {
    p.id: p
    for p in (
        Problem("smooth", "leaves of one size, the usual case", 1, ONES, ONES),
        Problem(
            "scales",
            "values and gradients of very different sizes, and spikes: a shared scalar must not blend leaves",
            2,
            {"kernel": 1.0, "bias": 1e-3, "scalar": 10.0, "empty": 1.0, "large": 1e3},
            {"kernel": 1.0, "bias": 1e-5, "scalar": 1e3, "empty": 1.0, "large": 1e-2},
            spike=13,
        ),
        Problem(
            "zeros",
            "gradients exactly zero: for the first four steps, a while later, and in one leaf for ever",
            3,
            ONES,
            ONES | {"bias": 0.0},
            silent=(20, 25),
        ),
    )
}


@dataclass(frozen=True)
class Record:
    """Initial values and gradients, as numbers that float32 holds exactly: both precisions replay the same.

    Attributes:
        params: leaf -> float64 array of the leaf's shape.
        grads: leaf -> float64 array of shape [steps, *leaf shape].
    """

    params: Arrays
    grads: Arrays

    def step(self, index: int) -> Arrays:
        """Returns the gradients of update `index`, counted from 0."""
        return {k: g[index] for k, g in self.grads.items()}


def record(problem: Problem, steps: int = LONGEST) -> Record:
    """Returns the problem's initial values and its gradients, generated anew."""
    params: Arrays = {}
    grads: Arrays = {}
    for number, (leaf, shape) in enumerate(SHAPES.items()):
        noise = np.random.Generator(np.random.PCG64([problem.seed, number]))
        scale, slope = problem.scales[leaf], problem.slopes[leaf]
        start = as_float32(scale * (2 * noise.random(shape) - 1))
        target = scale * (2 * noise.random(shape) - 1)
        path, noted = start, []
        for k in range(steps):
            u = (path - target) / scale
            g = slope * (u / np.sqrt(1 + u * u) + 0.5 * (2 * noise.random(shape) - 1))
            path = path - 0.05 * scale / slope * g if slope else path
            if k < 4 * (problem.silent != (0, 0)) or problem.silent[0] <= k < problem.silent[1]:
                g = 0 * g
            if problem.spike and k % problem.spike == problem.spike - 1:
                g = 1000 * g
            noted.append(as_float32(g))
        params[leaf], grads[leaf] = start, np.stack(noted)
    return Record(params, grads)


def as_float32(a: np.ndarray) -> np.ndarray:
    """Returns the nearest float32 numbers, as float64."""
    return np.asarray(a, np.float32).astype(np.float64)
