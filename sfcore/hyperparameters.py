"""The hyperparameters of each optimizer: names, defaults, ranges and meaning, once for both twins.

Names are those of the equations S1-S9. The twins show their users their own framework's names
(`learning_rate`, `b1` in JAX; `lr`, `betas[0]` or `momentum` in torch) and are tested against these
defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sfcore import checks
from sfcore.checks import Rule


def _option(default: Any, rule: Rule, doc: str) -> Any:
    return field(default=default, metadata={"rule": rule, "doc": doc})


_LR = "step size; 1 to 10 times the AdamW rate of a scheduled run, 10 to 50 times for SGD"


@dataclass(frozen=True)
class ScheduleFree:
    """What every Schedule-Free optimizer has (S2-S5, S9)."""

    lr: float = _option(0.0025, checks.STEP_SIZE, _LR)
    beta: float = _option(
        0.9, checks.INTERPOLATION, "interpolation y = beta x + (1 - beta) z; 0 is Polyak, 1 primal averaging"
    )
    r: float = _option(0.0, checks.NON_NEGATIVE, "the average weighs step t by t^r")
    weight_lr_power: float = _option(
        2.0, checks.NON_NEGATIVE, "the average weighs a step by the largest lr so far to this power"
    )
    prior_steps: int = _option(
        0, checks.STEPS, "the initial weights count as the average of this many earlier steps"
    )

    @staticmethod
    def joint_problems(values: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
        """Returns the problems between values that are each in range."""
        if values.get("prior_steps", 0) > 0 and values.get("lr", 1.0) == 0:
            return [
                f"{names['lr']} must be > 0 when prior_steps > 0, got {values['lr']!r}: "
                "the earlier steps are weighed with the full lr; pass it here and ramp it with warmup_steps"
            ]
        return []


@dataclass(frozen=True)
class SGD(ScheduleFree):
    """Schedule-Free SGD: the direction is the gradient."""

    lr: float = _option(1.0, checks.STEP_SIZE, _LR)
    weight_decay: float = _option(0.0, checks.NON_NEGATIVE, "decoupled decay, taken at y (S6)")
    warmup_steps: int = _option(0, checks.STEPS, "optimizer steps of linear warm-up (S2)")


@dataclass(frozen=True)
class AdamW(ScheduleFree):
    """Schedule-Free AdamW: the direction is the gradient over its root mean square."""

    b2: float = _option(0.999, checks.DECAY_RATE, "decay of the second moment v")
    eps: float = _option(1e-8, checks.POSITIVE, "added to the denominator, outside the root")
    weight_decay: float = _option(0.0, checks.NON_NEGATIVE, "decoupled decay, taken at y (S6)")
    warmup_steps: int = _option(0, checks.STEPS, "optimizer steps of linear warm-up (S2)")
    inner_momentum: float = _option(
        0.0, checks.DECAY_RATE, "decay of a first moment in the numerator; 0 keeps no buffer"
    )


@dataclass(frozen=True)
class RAdam(ScheduleFree):
    """Schedule-Free RAdam: AdamW whose lr is rectified, in place of a warm-up."""

    b2: float = _option(0.999, checks.DECAY_RATE, "decay of the second moment v")
    eps: float = _option(1e-8, checks.POSITIVE, "added to the denominator, outside the root")
    weight_decay: float = _option(0.0, checks.NON_NEGATIVE, "decoupled decay, taken at y (S6)")
    silent_sgd_phase: bool = _option(
        True, checks.FLAG, "nothing moves until the variance estimate is usable; False takes SGD steps there"
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
class Wrapper(ScheduleFree):
    """Schedule-Free around any base optimizer, which owns lr and its own decay."""

    weight_decay: float = _option(0.0, checks.NON_NEGATIVE, "decoupled decay, taken at y (S6)")
