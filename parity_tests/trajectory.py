"""What a run leaves behind: x, y and z of every leaf at some steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from parity_tests.reference import Arrays

SEQUENCES = ("x", "y", "z")
Iterates = tuple[Arrays, Arrays, Arrays]


@dataclass(frozen=True)
class Trajectory:
    """Iterates of one run.

    Attributes:
        steps: finished updates at each row, rising; row 0 is step 0, the initial values.
        x, y, z: leaf -> float64 array of shape [len(steps), *leaf shape].
    """

    steps: np.ndarray
    x: Arrays
    y: Arrays
    z: Arrays

    def sequence(self, name: str) -> Arrays:
        """Returns the leaves of x, y or z."""
        return {"x": self.x, "y": self.y, "z": self.z}[name]

    def at(self, steps: np.ndarray) -> Trajectory:
        """Returns the rows of the given steps; a step that was not recorded is an error."""
        missing = sorted(set(steps.tolist()) - set(self.steps.tolist()))
        if missing:
            raise AssertionError(f"steps must be recorded, got a run without steps {missing}")
        rows = np.searchsorted(self.steps, steps)
        return Trajectory(steps, *({k: a[rows] for k, a in self.sequence(s).items()} for s in SEQUENCES))


def stack(rows: Mapping[int, Iterates]) -> Trajectory:
    """Returns the trajectory of a run that noted step -> (x, y, z), steps rising from 0."""
    x, y, z = (
        {k: np.stack([np.asarray(row[i][k], np.float64) for row in rows.values()]) for k in rows[0][0]}
        for i in range(3)
    )
    return Trajectory(np.array(list(rows)), x, y, z)
