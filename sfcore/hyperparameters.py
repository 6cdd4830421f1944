"""The options of each law: names, defaults, ranges, meaning, and what a resume with another value does.

Names are those of the equations S1-S9, written once for both twins; what users of each framework call
them is in the rows of `sfcore.laws`. A law's dataclass inherits the options that it shares with others.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sfcore import checks
from sfcore.checks import Rule

NEXT = "the configured value holds from the next step"
_WEIGHS = "later steps are weighed anew; the sum so far is put in the new units, so that c goes on as it was"
_MOVES = "y moves in the next step so that x stays"


def option(default: Any, rule: Rule, doc: str, effect: str = NEXT) -> Any:
    """Returns a field of an options dataclass.

    Args:
        default: of both twins.
        rule: what a value must be.
        doc: what it does, half a sentence.
        effect: what becomes of a run that is resumed with another value.
    """
    return field(default=default, metadata={"rule": rule, "doc": doc, "effect": effect})


_LR = "step size; 1 to 10 times the AdamW rate of a scheduled run, 10 to 50 times for SGD"
_LR_EFFECT = f"{NEXT}; a larger lr also weighs its steps more in the average"


@dataclass(frozen=True)
class ScheduleFree:
    """What every Schedule-Free optimizer has (S2-S5, S9)."""

    lr: float = option(0.0025, checks.STEP_SIZE, _LR, _LR_EFFECT)
    beta: float = option(
        0.9,
        checks.INTERPOLATION,
        "interpolation y = beta x + (1 - beta) z; 0 is Polyak, 1 primal averaging",
        _MOVES,
    )
    r: float = option(0.0, checks.NON_NEGATIVE, "the average weighs step t by t^r", _WEIGHS)
    weight_lr_power: float = option(
        2.0, checks.NON_NEGATIVE, "the average weighs a step by the largest lr so far to this power", _WEIGHS
    )
    prior_steps: int = option(
        0,
        checks.STEPS,
        "the initial weights count as the average of this many earlier steps",
        "the average so far is kept; with r > 0 later steps count as that much older",
    )

    c_warmup: int = option(
        0,
        checks.STEPS,
        "x is z in this many first steps, which do not count in the average (F5)",
        "steps that have been taken stay in the average as they are",
    )
    refined_c: float = option(
        0.0,
        checks.MULTIPLE,
        "c is multiplied by (1 - beta) times this, up to 1 (F5, arXiv 2507.09846); 0 is off",
    )
    window: float = option(
        0,
        checks.SPAN,
        "c is at least 1 / window: the average forgets what is older (F5); 0 is off",
    )
    window_rule: str = option(
        "floor",
        checks.one_of("floor", "constant", fix="'constant' is c = 1 / window in every step"),
        "whether 1 / window is the least c, or c itself",
    )
    weight_lr: str = option(
        "max",
        checks.one_of("max", "current", fix="'max' is usual"),
        "the lr that weighs a step: the largest so far, or its own (F3)",
        _WEIGHS,
    )
    beta_rule: str = option(
        "constant",
        checks.one_of(
            "constant", "anneal", "amuse", fix="'constant' is usual, also beside a schedule for beta"
        ),
        "how beta goes on: as it is, to beta_max, or to 1 by a power of time (F9)",
        _MOVES,
    )
    beta_max: float = option(
        0.965, checks.INTERPOLATION, "beta at the end of 'anneal' (F9, arXiv 2605.19095)", _MOVES
    )
    beta_anneal_steps: int = option(
        0, checks.STEPS, "the steps in which 'anneal' takes beta to beta_max (F9)", _MOVES
    )
    beta_hold_steps: int = option(
        0,
        checks.STEPS,
        "the steps in which 'amuse' leaves beta as it is, mostly the warm-up (F9, arXiv 2605.22432)",
        _MOVES,
    )
    rho: float = option(
        0.8, checks.EXPONENT, "the power of time by which 'amuse' lets 1 - beta fall (F9)", _MOVES
    )

    @staticmethod
    def joint_problems(values: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
        """Returns the problems between values that are each in range."""
        found, on = [], {name for name, value in values.items() if not isinstance(value, str) and value}
        if "prior_steps" in on and values.get("lr", 1.0) == 0:
            found.append(
                f"{names['lr']} must be > 0 when prior_steps > 0, got {values['lr']!r}: "
                "the earlier steps are weighed with the full lr; pass it here and ramp it with warmup_steps"
            )
        if {"prior_steps", "c_warmup"} <= on:
            found.append(
                f"{names['c_warmup']} must be 0 when prior_steps > 0, got {values['c_warmup']!r}: "
                "its steps would throw the earlier weights away; leave one of them out"
            )
        if {"window", "refined_c"} <= on:
            found.append(
                f"{names['refined_c']} must be 0 when window > 0, got {values['refined_c']!r}: "
                "both say how long the average is; leave one of them out"
            )
        if values.get("window_rule") == "constant" and not values.get("window", 1):
            found.append(
                f"{names['window']} must be > 0 when window_rule is 'constant', got {values['window']!r}: "
                "the average is c = 1 / window there"
            )
        return found + _problems_of_beta(values, names)


def _problems_of_beta(values: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Returns what of a rule for beta does not go together."""
    rule, beta = values.get("beta_rule", "constant"), values.get("beta")
    if rule == "constant":
        return []
    where, found = f"with the rule {rule!r}", []
    if beta is not None and not 0 < beta < 1:
        found.append(
            f"{names['beta']} must be > 0 and < 1 {where}, got {beta!r}: 1 - beta falls from there; "
            "0.9 is usual"
        )
    if rule == "anneal":
        if not values.get("beta_anneal_steps", 1):
            found.append(
                f"{names['beta_anneal_steps']} must be > 0 {where}, got {values['beta_anneal_steps']!r}: "
                "pass the steps that it takes, such as those of the run"
            )
        last = values.get("beta_max")
        if last is not None and not (last < 1 and (beta is None or beta <= last)):
            found.append(
                f"{names['beta_max']} must be < 1 and not below the first beta {where}, got {last!r}: "
                "0.965 is usual"
            )
    elif values.get("beta_hold_steps", 2) < 2:
        found.append(
            f"{names['beta_hold_steps']} must be > 1 {where}, got {values['beta_hold_steps']!r}: "
            "the steps of the warm-up are usual"
        )
    return found


@dataclass(frozen=True)
class Adaptive(ScheduleFree):
    """Options of a direction that divides by a root mean square."""

    b2: float = option(0.999, checks.DECAY_RATE, "decay of the second moment v", f"{NEXT}; v keeps its value")
    eps: float = option(1e-8, checks.POSITIVE, "added to the denominator, outside the root")


@dataclass(frozen=True)
class Decayed(ScheduleFree):
    """The option of a law that decays weights itself."""

    weight_decay: float = option(0.0, checks.NON_NEGATIVE, "decoupled decay, taken at y (S6)")


def _decay_power() -> Any:
    return option(
        1,
        checks.one_of(
            1, 2, "normalized", fix="the last two are AdamC's: 2 needs a decay 1 / lr times larger"
        ),
        "weight_decay is multiplied by lr, by its square, or by that over the largest lr so far (F6)",
    )


def _decay_at() -> Any:
    return option(
        "y",
        checks.one_of("y", "z", fix="schedulefree decays at y, a torch base in a wrapper at z"),
        "the point that decays: what the parameters hold, or the base iterate (F6)",
    )


@dataclass(frozen=True)
class Based(ScheduleFree):
    """The options around an Optax base, which is told where the parameters are."""

    decay_at: str = _decay_at()


@dataclass(frozen=True)
class Placed(Decayed):
    """The options of a law that may be told where and how it decays weights."""

    decay_at: str = _decay_at()
    decay_power: int | str = _decay_power()


@dataclass(frozen=True)
class Ramped(ScheduleFree):
    """The option of a law that has a warm-up of its own."""

    warmup_steps: int = option(
        0,
        checks.STEPS,
        "optimizer steps of linear warm-up (S2)",
        "the ramp goes on at the step it had reached",
    )


# Bases from right to left are the order of the options.
@dataclass(frozen=True)
class SGD(Ramped, Placed):
    """Schedule-Free SGD: the direction is the gradient."""

    lr: float = option(1.0, checks.STEP_SIZE, _LR, _LR_EFFECT)


@dataclass(frozen=True)
class AdamW(Ramped, Placed, Adaptive):
    """Schedule-Free AdamW: the direction is the gradient over its root mean square."""

    inner_momentum: float = option(
        0.0,
        checks.DECAY_RATE,
        "decay of a first moment in the numerator; 0 keeps no buffer",
        "the first moment starts from zero, or is dropped at 0",
    )


@dataclass(frozen=True)
class RAdam(Placed, Adaptive):
    """Schedule-Free RAdam: AdamW whose lr is rectified, in place of a warm-up."""

    silent_sgd_phase: bool = option(
        True,
        checks.FLAG,
        "nothing moves until the variance estimate is usable; False takes SGD steps there",
        "it matters in the first steps only",
    )

    @staticmethod
    def joint_problems(values: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
        found = ScheduleFree.joint_problems(values, names)
        # rho_inf = 2 / (1 - b2) - 1 must exceed 4, or rho_t never does and nothing ever moves.
        if values.get("silent_sgd_phase", False) and values.get("b2", 0.999) <= 0.6:
            found.append(
                f"{names['b2']} must be > 0.6 when silent_sgd_phase is True, got {values['b2']!r}: "
                "below that the rectified phase never begins and nothing would move"
            )
        return found


@dataclass(frozen=True)
class Muon(Ramped, Placed, Adaptive):
    """Schedule-Free Muon: the direction of matrices is the polar factor of a momentum; AdamW for the rest."""

    mu: float = option(
        0.95,
        checks.MOMENTUM,
        "decay of the momentum that a polar factor is taken of",
        f"{NEXT}; it keeps its value",
    )
    ns_steps: int = option(5, checks.ITERATIONS, "Newton-Schulz iterations that approximate the polar factor")
    nesterov: bool = option(True, checks.FLAG, "the polar factor is of h = (1 - mu) g + mu m, not of m")
    normalize: str = option(
        "none",
        checks.one_of("none", "rows", fix="'rows' is NorMuon"),
        "rows of a polar factor are brought to one size, by a second moment of each",
        "the second moment of the rows starts from zero, or is dropped",
    )
    b2_rows: float = option(
        0.95,
        checks.DECAY_RATE,
        "decay of the second moment u of rows, with normalize='rows'",
        f"{NEXT}; u keeps its value",
    )
    adjust_lr: str = option(
        "match_rms_adamw",
        checks.one_of("match_rms_adamw", "original", fix="the first suits the lr of AdamW"),
        "how long a step of a matrix is: 0.2 sqrt(max(rows, cols)), or sqrt(max(1, rows / cols))",
    )
    output_axis: str = option(
        "first",
        checks.one_of("first", "last", fix="torch and Equinox have outputs first, Flax last"),
        "the axis that rows of a matrix are counted along; all others are its columns",
        "rows are those of the new axis; with weights laid out the other way, as in Flax, it is the same run",
    )
    adam_lr_ratio: float = option(1.0, checks.NON_NEGATIVE, "the lr of what is no matrix is lr times this")


@dataclass(frozen=True)
class Wrapper(Decayed):
    """Schedule-Free around any base optimizer, which owns lr and its own decay."""

    decay_power: int | str = _decay_power()


def defaults(options: type) -> dict[str, Any]:
    """Returns option -> default of a dataclass of options, in its order.

    Example:
        >>> from sfcore.hyperparameters import SGD, defaults
        >>> defaults(SGD)["lr"]
        1.0
    """
    return dict(_defaults(options))


@functools.cache
def _defaults(options: type) -> dict[str, Any]:
    return {one.name: one.default for one in fields(options)}


def weighed(*records: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of S4, each from the first record that has it, else its default.

    Example:
        >>> from sfcore.hyperparameters import weighed
        >>> weighed({"r": 1.0}, {"r": 2.0, "prior_steps": 5})
        {'r': 1.0, 'weight_lr_power': 2.0, 'prior_steps': 5}
    """
    usual = defaults(ScheduleFree)
    return {
        name: next((one[name] for one in records if name in one), usual[name])
        for name in ("r", "weight_lr_power", "prior_steps")
    }
