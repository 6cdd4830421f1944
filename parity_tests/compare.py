"""Comparisons that raise, and say where: step, sequence, leaf, index, both values, the error in ulps.

Errors are relative to movement, not to position: to the largest distance of the leaf from its start,
in any sequence of the whole run, plus what a few ulps of its largest value come to.
"""

from __future__ import annotations

import numpy as np

from parity_tests.tolerances import Tolerance
from parity_tests.trajectory import SEQUENCES, Trajectory

Errors = dict[tuple[str, str], np.ndarray]


def relative_errors(got: Trajectory, want: Trajectory, tolerance: Tolerance) -> Errors:
    """Returns (sequence, leaf) -> errors of shape [steps of want, elements]; NaN counts as inf.

    The scale is displacement + ulps / relative, so that one number is both what `tolerance.relative`
    bounds and what the conformance matrix prints.

    Raises:
        AssertionError: if `got` lacks a step or a leaf, or a shape differs.
    """
    got = got.at(want.steps)
    for name in SEQUENCES:
        mine, theirs = ({k: a.shape for k, a in run.sequence(name).items()} for run in (got, want))
        if mine != theirs:
            raise AssertionError(f"{name} must have leaves and shapes {theirs}, got {mine}")
    errors = {}
    for leaf in want.x:
        displacement, size = _movement(want, leaf)
        scale = displacement + tolerance.ulps / tolerance.relative * ulp(size, tolerance.dtype)
        for name in SEQUENCES:
            error = np.abs(got.sequence(name)[leaf] - want.sequence(name)[leaf])
            # An empty leaf has no size from which reshape could infer a -1.
            flat = error.reshape(len(error), int(np.prod(error.shape[1:]))) / scale
            errors[name, leaf] = np.where(np.isnan(flat), np.inf, flat)
    return errors


def _movement(run: Trajectory, leaf: str) -> tuple[float, float]:
    """Returns the leaf's largest distance from its start and its largest value, in any sequence."""
    values = np.stack([run.sequence(name)[leaf] for name in SEQUENCES])
    return float(np.abs(values - values[:, :1]).max(initial=0)), float(np.abs(values).max(initial=0))


def ulp(value: float, dtype: str) -> float:
    """Returns the distance from a value to the next larger number of a dtype."""
    return float(np.spacing(np.asarray(abs(value), dtype)))


def largest(got: Trajectory, want: Trajectory, tolerance: Tolerance) -> float:
    """Returns the largest relative error of a run; inf where one of the two is NaN."""
    return max(float(e.max(initial=0)) for e in relative_errors(got, want, tolerance).values())


def assert_same(name: str, got: Trajectory, want: Trajectory, tolerance: Tolerance) -> None:
    """Raises AssertionError at the first step that is out of tolerance, with the worst element there.

    Args:
        name: what was compared, for the message.
        got, want: two runs; every step of `want` is compared.
        tolerance: from `tolerances.TOLERANCES`.
    """
    errors = relative_errors(got, want, tolerance)
    worst = np.stack([e.max(axis=1, initial=0) for e in errors.values()])  # [sequence and leaf, step]
    failed = ~(worst <= tolerance.relative)
    if failed.any():
        row = int(failed.any(axis=0).argmax())
        place = list(errors)[int(worst[:, row].argmax())]
        where = describe(got, want, tolerance, *place, row, int(errors[place][row].argmax()))
        raise AssertionError(
            f"{name}: {where}; at most {tolerance.relative:g} is allowed. "
            f"First of {int(failed.any(axis=0).sum())} failing steps out of {len(want.steps)} compared"
        )


def describe(
    got: Trajectory, want: Trajectory, tolerance: Tolerance, sequence: str, leaf: str, row: int, element: int
) -> str:
    """Returns the sentence about one element: where it is, both values, and how far they are apart."""
    step = int(want.steps[row])
    theirs = want.sequence(sequence)[leaf][row]
    mine = got.at(want.steps).sequence(sequence)[leaf][row]
    index = ", ".join(str(int(i)) for i in np.unravel_index(element, theirs.shape))
    a, b = float(mine.flat[element]), float(theirs.flat[element])
    displacement, _ = _movement(want, leaf)
    relative = relative_errors(got, want, tolerance)[sequence, leaf][row, element]
    return (
        f"{sequence}[{leaf!r}]{f'[{index}]' if index else ''} after step {step}: got {a!r}, want {b!r}; "
        f"the error {abs(a - b):.3g} is {abs(a - b) / ulp(b, tolerance.dtype):.3g} ulps of the value, or "
        f"{relative:.3g} of the largest displacement {displacement:.3g} plus a few ulps of the parameter"
    )
