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


# (precision, kind of comparison)
TOLERANCES: dict[tuple[str, str], Tolerance] = {
    ("float64", "regenerate"): Tolerance(1e-15, 1, "float64", "0 on the machine that wrote them"),
    ("float64", "golden"): Tolerance(1e-12, 16, "float64", "TODO"),
    ("float32", "golden"): Tolerance(5e-5, 16, "float32", "TODO"),
    ("float64", "single step"): Tolerance(1e-12, 4, "float64", "TODO"),
    ("float32", "single step"): Tolerance(5e-5, 4, "float32", "TODO"),
    ("float64", "closed loop"): Tolerance(1e-12, 16, "float64", "6.2e-15 (radam, z[bias1])"),
    ("float32", "closed loop"): Tolerance(5e-5, 16, "float32", "2.4e-6 (radam, x[bias1])"),
    ("float64", "upstream"): Tolerance(1e-12, 16, "float64", "TODO"),
    ("float64", "peers"): Tolerance(1e-12, 32, "float64", "19 ulps: optax.contrib divides by b1 in every step"),
    ("float64", "hypothesis"): Tolerance(1e-12, 64, "float64", "14 ulps at beta = 0.27: recovering x divides by beta"),
}
