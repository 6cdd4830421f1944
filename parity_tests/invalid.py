"""Bad hyperparameters, one table for both packages: canonical name, value, and what the error must say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BadOption:
    """One refusal that both packages owe.

    Attributes:
        id: what is wrong.
        name: the canonical option that the message must name, as its user knows it.
        options: canonical options to pass, `name` among them.
        rule: what must follow "NAME must be".
        fix: what the message must advise.
        optimizers: those that have the option.
    """

    id: str
    name: str
    options: dict[str, Any]
    rule: str
    fix: str
    optimizers: tuple[str, ...]


ALL = ("sgd", "adamw", "radam")
RAMPED = ("sgd", "adamw")
ADAPTIVE = ("adamw", "radam")


def _bad(
    name: str, value: Any, rule: str, fix: str, optimizers: tuple[str, ...] = ALL, **more: Any
) -> BadOption:
    return BadOption(f"{name}={value!r}", name, {name: value} | more, rule, fix, optimizers)


_SIZE, _UNIT = "a finite number >= 0", "a number in [0, 1]"
_DECAY, _STEPS, _POSITIVE = (
    "a number in [0, 1)",
    "a whole number of optimizer steps >= 0",
    "a finite number > 0",
)

BAD_OPTIONS = [
    _bad("lr", -1.0, _SIZE, "negate the loss"),
    _bad("lr", math.nan, _SIZE, "negate the loss"),
    _bad("lr", math.inf, _SIZE, "negate the loss"),
    _bad("lr", 0.0, "> 0 when prior_steps > 0", "ramp it with warmup_steps", prior_steps=10),
    _bad("beta", -0.1, _UNIT, "0.9 suits most runs"),
    _bad("beta", 1.1, _UNIT, "0.9 suits most runs"),
    _bad("beta", math.nan, _UNIT, "0.9 suits most runs"),
    _bad("b2", -1.0, _DECAY, "0.999 is the usual value", ADAPTIVE),
    _bad("b2", 1.0, _DECAY, "0.999 is the usual value", ADAPTIVE),
    _bad("b2", math.nan, _DECAY, "0.999 is the usual value", ADAPTIVE),
    _bad("b2", 0.5, "> 0.6 when silent_sgd_phase is True", "nothing would move", ("radam",)),
    _bad("eps", 0.0, _POSITIVE, "1e-8 is the usual value", ADAPTIVE),
    _bad("eps", -1e-8, _POSITIVE, "1e-8 is the usual value", ADAPTIVE),
    _bad("eps", math.nan, _POSITIVE, "1e-8 is the usual value", ADAPTIVE),
    _bad("weight_decay", -0.1, _SIZE, "pass 0"),
    _bad("weight_decay", math.inf, _SIZE, "pass 0"),
    _bad("warmup_steps", -1, _STEPS, "not a fraction", RAMPED),
    _bad("warmup_steps", 0.03, _STEPS, "round(fraction * total_optimizer_steps)", RAMPED),
    _bad("warmup_steps", math.nan, _STEPS, "not a fraction", RAMPED),
    _bad("r", -1.0, _SIZE, "pass 0"),
    _bad("r", math.nan, _SIZE, "pass 0"),
    _bad("weight_lr_power", -2.0, _SIZE, "pass 0"),
    _bad("prior_steps", -1, _STEPS, "not a fraction"),
    _bad("prior_steps", 2.5, _STEPS, "not a fraction"),
    _bad("inner_momentum", 1.0, _DECAY, "0 switches it off", ("adamw",)),
    _bad("inner_momentum", -0.5, _DECAY, "0 switches it off", ("adamw",)),
    _bad("silent_sgd_phase", "yes", "True or False", "pass a bool", ("radam",)),
    _bad("weight_decay", "0.1", _SIZE, "pass 0"),
    _bad("r", True, _SIZE, "pass 0"),
]
MISSPELT = {"weigth_decay": 0.1, "warmup": 5, "learning_rte": 0.1}
