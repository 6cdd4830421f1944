"""Comparisons that raise, and say where: step, sequence, leaf, index, both values, the error in ulps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parity_tests.tolerances import Tolerance
from parity_tests.trajectory import SEQUENCES, Trajectory


@dataclass(frozen=True)
class Difference:
    """The worst element of one sequence of one leaf at one step.

    `relative` is the error over `displacement + ulps / tolerance.relative`, so that one number is both
    what the tolerance bounds and what the conformance matrix prints.
    """

    sequence: str
    leaf: str
    step: int
    index: tuple[int, ...]
    got: float
    want: float
    displacement: float
    relative: float
    ulps: float

    def __str__(self) -> str:
        place = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        return (
            f"{self.sequence}[{self.leaf!r}]{place} after step {self.step}: got {self.got!r}, want {self.want!r}; "
            f"the error {abs(self.got - self.want):.3g} is {self.relative:.3g} of the largest displacement "
            f"{self.displacement:.3g} (plus a few ulps of the parameter), or {self.ulps:.3g} ulps of the value"
        )


def differences(got: Trajectory, want: Trajectory, tolerance: Tolerance) -> Iterator[Difference]:
    """Yields the worst difference of every leaf, sequence and step of `want`, earliest step first.

    Raises:
        AssertionError: if `got` lacks a step or a leaf, or a shape differs.
    """
    got = got.at(want.steps)
    errors = {}
    for name in SEQUENCES:
        mine, theirs = got.sequence(name), want.sequence(name)
        if set(mine) != set(theirs):
            raise AssertionError(f"leaves of {name} must be {sorted(theirs)}, got {sorted(mine)}")
        for leaf, value in theirs.items():
            if mine[leaf].shape != value.shape:
                raise AssertionError(f"{name}[{leaf!r}] must have shape {value.shape}, got {mine[leaf].shape}")
            if value.size:
                error = np.abs(mine[leaf] - value).reshape(len(value), -1)
                errors[name, leaf] = np.where(np.isnan(error), np.inf, error)
    size = {leaf: _sizes(want, leaf) for _, leaf in errors}
    for row, step in enumerate(want.steps):
        for (name, leaf), error in errors.items():
            displacement, largest = size[leaf]
            scale = displacement + tolerance.ulps / tolerance.relative * ulp(largest, tolerance.dtype)
            worst = int(error[row].argmax())
            index = np.unravel_index(worst, want.sequence(name)[leaf].shape[1:])
            value = float(want.sequence(name)[leaf][row].flat[worst])
            yield Difference(
                sequence=name,
                leaf=leaf,
                step=int(step),
                index=tuple(int(i) for i in index),
                got=float(got.sequence(name)[leaf][row].flat[worst]),
                want=value,
                displacement=displacement,
                relative=float(error[row, worst] / scale),
                ulps=float(error[row, worst] / ulp(abs(value), tolerance.dtype)),
            )


def _sizes(run: Trajectory, leaf: str) -> tuple[float, float]:
    """Returns the leaf's largest distance from its start and its largest value, over all sequences."""
    values = [run.sequence(name)[leaf] for name in SEQUENCES]
    displacement = max(float(np.abs(v - v[0]).max()) for v in values)
    return displacement, max(float(np.abs(v).max()) for v in values)


def ulp(value: float, dtype: str) -> float:
    """Returns the distance from a value to the next larger number of a dtype."""
    return float(np.spacing(np.asarray(value, dtype)))


def largest(got: Trajectory, want: Trajectory, tolerance: Tolerance) -> float:
    """Returns the largest relative difference of two runs; inf where one is NaN."""
    return max(d.relative for d in differences(got, want, tolerance))


def assert_same(name: str, got: Trajectory, want: Trajectory, tolerance: Tolerance) -> None:
    """Raises AssertionError at the first step that is out of tolerance, with the worst element there.

    Args:
        name: what was compared, for the message.
        got, want: two runs; every step of `want` is compared.
        tolerance: from `tolerances.TOLERANCES`.
    """
    failed = [d for d in differences(got, want, tolerance) if not d.relative <= tolerance.relative]
    if failed:
        first = max((d for d in failed if d.step == failed[0].step), key=lambda d: d.relative)
        raise AssertionError(
            f"{name}: {first}; at most {tolerance.relative:g} is allowed ({len(failed)} places in all)"
        )
