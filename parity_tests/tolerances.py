"""How far apart two runs may be: one table, and beside each number what was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """An error passes if it is at most `relative` times the leaf's largest displacement plus `ulps`.

    Attributes:
        relative: share of the largest distance of the leaf from its start, in any sequence of the run.
        ulps: units in the last place of the leaf's largest value, in `dtype`.
        dtype: the precision the run was computed in.
        measured: what the number was chosen from.
    """

    relative: float
    ulps: float
    dtype: str
    measured: str


# (precision, kind of comparison); what was measured is the largest figure over all drivers and cases.
TOLERANCES: dict[tuple[str, str], Tolerance] = {
    ("float64", "regenerate"): Tolerance(1e-15, 1, "float64", "0 on the machine that wrote them"),
    # The worst are adamw-lr-small, whose leaves move by 4e-6 in 60 steps, by x = y + (1/beta - 1)(y - z).
    ("float64", "golden"): Tolerance(1e-12, 16, "float64", "5.6e-13, 9 ulps where leaves hardly move"),
    ("float32", "golden"): Tolerance(5e-5, 16, "float32", "4.1e-5, 13 ulps where leaves hardly move"),
    # z - x of a leaf whose ulp is 3e-4 of its way enters a difference that leaves 5% of the loss.
    ("float32", "golden, plus-everything"): Tolerance(2e-3, 16, "float32", "1e-3 to 2e-3, all drivers alike"),
    # One step moves a leaf of size 1000 by 1e-2: its rounding of one ulp is most of the error.
    ("float64", "single step"): Tolerance(1e-12, 4, "float64", "3.6e-13, 1 ulp"),
    ("float32", "single step"): Tolerance(5e-5, 4, "float32", "1.8e-5, 1.3 ulps"),
    ("float64", "closed loop"): Tolerance(1e-12, 16, "float64", "6.1e-15"),
    ("float32", "closed loop"): Tolerance(5e-5, 16, "float32", "2.4e-6"),
    # RAdam: upstream's 1 - b2**t loses 2e-11 of rect at t = 6, in a step that is small beside the run.
    ("float64", "upstream"): Tolerance(1e-12, 1, "float64", "4.6e-13 for RAdam, 1.2e-14 for the others"),
    # optax.contrib divides by b1 in every step.
    ("float64", "peers"): Tolerance(1e-12, 32, "float64", "7.5e-13, 19 ulps where leaves hardly move"),
    # Recovering x divides by beta, which is as small as 0.25 here.
    ("float64", "hypothesis"): Tolerance(1e-12, 64, "float64", "2.4e-13, 14 ulps"),
}
