"""Where other Schedule-Free programs differ from S1 to S9, each with its reason and where to read about it.

Expectations are strict: `test_peers.py` fails when a listed difference is gone, so that the list stays
true, and when a difference appears that is not listed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from parity_tests.cases import Case


@dataclass(frozen=True)
class KnownDifference:
    """One way in which one program differs.

    Attributes:
        id: name of the difference.
        program: what the driver's name begins with.
        applies: whether a case shows it.
        raises: what the comparison ends with: AssertionError where the numbers differ, else the
            program's own exception.
        reason: what the program does instead.
        link: where it is discussed, or the program's source where it is not.
    """

    id: str
    program: str
    applies: Callable[[Case], bool]
    raises: type[Exception]
    reason: str
    link: str


def _beta(case: Case) -> float:
    return case.options["beta"]


def _seen_ahead(case: Case) -> bool:
    """Tells whether reading lr one step ahead changes the averaging weights."""
    ahead = [*case.lrs[1:], case.lrs[-1]]
    return case.schedule != "constant" and not np.allclose(
        _averaging(case, ahead), _averaging(case, case.lrs)
    )


def _averaging(case: Case, lrs: list[float]) -> np.ndarray:
    """Returns c of every step of SGD or AdamW without warm-up, 0 where no weight has been seen yet."""
    weights = np.maximum.accumulate(lrs) ** case.options["weight_lr_power"]
    total = np.cumsum(weights)
    return weights / np.where(total > 0, total, 1)


def _takes_polyak_steps(case: Case, *, silent: bool = False, smoothed: bool | None = None) -> bool:
    """Tells whether a case of ScheduleFree+ begins without gradients, and smooths its norm."""
    smooths = case.options.get("polyak_beta", 0.0) > 0
    return case.optimizer == "plus" and (case.problem == "zeros") == silent and smoothed in (None, smooths)


_PLUS = "https://github.com/facebookresearch/schedule_free/blob/70785b5/schedulefree/adamc_schedulefree_plus_paper.py"
_UPSTREAM = "https://github.com/facebookresearch/schedule_free/blob/main/schedulefree/"
_OPTAX = "https://github.com/google-deepmind/optax/"
_KOZISTR = "https://github.com/kozistr/pytorch_optimizer/"

KNOWN_DIFFERENCES = (
    KnownDifference(
        "sgd-refuses-ends",
        "schedulefree",
        lambda case: case.optimizer == "sgd" and _beta(case) in (0, 1),
        ValueError,
        "momentum must lie strictly between 0 and 1: neither Polyak nor primal averaging",
        _UPSTREAM + "sgd_schedulefree.py",
    ),
    KnownDifference(
        "beta-0-divides",
        "schedulefree",
        lambda case: case.optimizer != "sgd" and _beta(case) == 0,
        ZeroDivisionError,
        "x is always recovered as z + (y - z) / beta, which does not exist at beta = 0",
        _UPSTREAM + "adamw_schedulefree.py",
    ),
    KnownDifference(
        "beta-0-nan",
        "optax.contrib",
        lambda case: _beta(case) == 0,
        AssertionError,
        "x is recovered by dividing by b1 in every step: NaN at b1 = 0, as its docstring warns",
        "https://optax.readthedocs.io/en/latest/api/contrib.html#optax.contrib.schedule_free",
    ),
    KnownDifference(
        "warmup-from-0",
        "optax.contrib",
        lambda case: (
            case.options.get("warmup_steps", 0) > 0 and case.schedule == "constant" and _beta(case) > 0
        ),
        AssertionError,
        "the ramp starts at lr 0, not at lr / warmup_steps, and the averaging weight reads it one step "
        "ahead of the update",
        _OPTAX + "pull/1744",
    ),
    KnownDifference(
        "warmup-of-a-schedule",
        "optax.contrib",
        lambda case: case.options.get("warmup_steps", 0) > 0 and case.schedule != "constant",
        TypeError,
        "warmup_steps multiplies a number only; with a schedule it fails while tracing",
        "https://optax.readthedocs.io/en/latest/api/contrib.html#optax.contrib.schedule_free_sgd",
    ),
    KnownDifference(
        "schedule-read-ahead",
        "optax.contrib",
        lambda case: _seen_ahead(case) and case.options.get("warmup_steps", 0) == 0 and _beta(case) > 0,
        AssertionError,
        "the averaging weight reads a schedule one step ahead of the update",
        _OPTAX + "pull/1744",
    ),
    KnownDifference(
        "refuses-ends",
        "pytorch_optimizer",
        lambda case: _beta(case) in (0, 1),
        ValueError,
        "beta must lie strictly between 0 and 1",
        _KOZISTR + "blob/main/pytorch_optimizer/optimizer/schedulefree.py",
    ),
    KnownDifference(
        "epsilon-in-root",
        "pytorch_optimizer",
        lambda case: case.id in ("adamw-scales", "adamw-b2-0", "adamw-eps-scales"),
        AssertionError,
        "AdamW adds 1e-15 inside the root besides eps outside; it shows where some gradients are small",
        _KOZISTR + "blob/main/pytorch_optimizer/base/optimizer.py",
    ),
    KnownDifference(
        "sgd-phase-lr-1",
        "pytorch_optimizer",
        lambda case: case.options.get("silent_sgd_phase") is False and case.problem != "zeros",
        AssertionError,
        "RAdam with silent_sgd_phase=False takes its SGD steps with lr 1 whatever lr is",
        _KOZISTR + "pull/351",
    ),
    KnownDifference(
        "amuse-decodes",
        "kjeiun/amuse 4c6383f",
        lambda case: case.options["beta_rule"] == "amuse",
        AssertionError,
        "AMUSE reads x out of y by the beta of the step, not by the one that built y",
        "https://github.com/kjeiun/amuse/blob/4c6383f/src/optim/AMUSE.py",
    ),
    KnownDifference(
        "plus-corrects-twice",
        "facebookresearch/schedule_free 70785b5",
        lambda case: _takes_polyak_steps(case, smoothed=True),
        AssertionError,
        "ScheduleFree+ keeps the norm as it was corrected for its start, and corrects it in every step anew",
        _PLUS,
    ),
    KnownDifference(
        "plus-clipped",
        "facebookresearch/schedule_free 70785b5",
        lambda case: _takes_polyak_steps(case, smoothed=False) and getattr(case, "clip", 1.0) != 1,
        AssertionError,
        "a Polyak step grows by what gradients were clipped by, since the loss is not",
        _PLUS,
    ),
    KnownDifference(
        "plus-divides-by-0",
        "facebookresearch/schedule_free 70785b5",
        lambda case: _takes_polyak_steps(case, silent=True),
        ZeroDivisionError,
        "a Polyak step divides by the norm of a gradient that may be 0",
        _PLUS,
    ),
)


def known(program: str, case: Case) -> KnownDifference | None:
    """Returns the listed difference that a case shows in a program, if there is one."""
    found = [d for d in KNOWN_DIFFERENCES if program.startswith(d.program) and d.applies(case)]
    if len(found) > 1:
        raise ValueError(
            f"differences must not overlap, got {[d.id for d in found]} for {case.id} in {program}"
        )
    return found[0] if found else None
