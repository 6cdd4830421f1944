"""Bad hyperparameters, one table for both packages: canonical name, value, and what the error must say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sfcore import laws


@dataclass(frozen=True)
class BadOption:
    """One refusal that both packages owe.

    Attributes:
        id: what is wrong.
        name: the canonical option that the message must name, as its user knows it.
        options: canonical options to pass, `name` among them.
        rule: what must follow "NAME must be".
        fix: what the message must advise.
    """

    id: str
    name: str
    options: dict[str, Any]
    rule: str
    fix: str

    @property
    def optimizers(self) -> list[str]:
        """The laws that have the options."""
        return [name for name, law in laws.directed().items() if self.options.keys() <= law.defaults.keys()]


def bad(name: str, value: Any, rule: str, fix: str, **more: Any) -> BadOption:
    """Returns the refusal of a value, together with those of further options."""
    return BadOption(f"{name}={value!r}", name, {name: value} | more, rule, fix)


_SIZE, _UNIT = "a finite number >= 0", "a number in [0, 1]"
_DECAY, _STEPS, _POSITIVE = (
    "a number in [0, 1)",
    "a whole number of optimizer steps >= 0",
    "a finite number > 0",
)

BAD_OPTIONS = [
    bad("lr", -1.0, _SIZE, "negate the loss"),
    bad("lr", math.nan, _SIZE, "negate the loss"),
    bad("lr", math.inf, _SIZE, "negate the loss"),
    bad("lr", 0.0, "> 0 when prior_steps > 0", "ramp it with warmup_steps", prior_steps=10),
    bad("beta", -0.1, _UNIT, "0.9 suits most runs"),
    bad("beta", 1.1, _UNIT, "0.9 suits most runs"),
    bad("beta", math.nan, _UNIT, "0.9 suits most runs"),
    bad("b2", -1.0, _DECAY, "0.999 is the usual value"),
    bad("b2", 1.0, _DECAY, "0.999 is the usual value"),
    bad("b2", math.nan, _DECAY, "0.999 is the usual value"),
    bad("b2", 0.5, "> 0.6 when silent_sgd_phase is True", "nothing would move", silent_sgd_phase=True),
    bad("eps", 0.0, _POSITIVE, "1e-8 is the usual value"),
    bad("eps", -1e-8, _POSITIVE, "1e-8 is the usual value"),
    bad("eps", math.nan, _POSITIVE, "1e-8 is the usual value"),
    bad("weight_decay", -0.1, _SIZE, "pass 0"),
    bad("weight_decay", math.inf, _SIZE, "pass 0"),
    bad("warmup_steps", -1, _STEPS, "not a fraction"),
    bad("warmup_steps", 0.03, _STEPS, "round(fraction * total_optimizer_steps)"),
    bad("warmup_steps", math.nan, _STEPS, "not a fraction"),
    bad("r", -1.0, _SIZE, "pass 0"),
    bad("r", math.nan, _SIZE, "pass 0"),
    bad("weight_lr_power", -2.0, _SIZE, "pass 0"),
    bad("prior_steps", -1, _STEPS, "not a fraction"),
    bad("prior_steps", 2.5, _STEPS, "not a fraction"),
    bad("c_warmup", 5, "0 when prior_steps > 0", "leave one of them out", prior_steps=3),
    bad("c_warmup", 0.5, _STEPS, "not a fraction"),
    bad("refined_c", -1.0, _SIZE, "0 switches it off"),
    bad("refined_c", 5.0, "0 when window > 0", "leave one of them out", window=8),
    bad("window", -1, "0, or a number of optimizer steps >= 1", "not a fraction"),
    bad("window", 0.05, "0, or a number of optimizer steps >= 1", "not a fraction"),
    bad("window", 0, "> 0 when window_rule is 'constant'", "c = 1 / window", window_rule="constant"),
    bad("window_rule", "least", "'floor' or 'constant'", "in every step"),
    bad("weight_lr", "last", "'max' or 'current'", "'max' is usual"),
    bad("beta_rule", "rising", "'constant' or 'anneal' or 'amuse'", "'constant' is usual"),
    bad(
        "beta", 0.0, "> 0 and < 1 with the rule 'amuse'", "0.9 is usual", beta_rule="amuse", beta_hold_steps=5
    ),
    bad("beta", 1.0, "> 0 and < 1 with the rule 'anneal'", "0.9 is usual", beta_rule="anneal"),
    bad(
        "beta_max",
        1.0,
        "< 1 and not below the first beta with the rule 'anneal'",
        "0.965 is usual",
        beta_rule="anneal",
        beta_anneal_steps=5,
    ),
    bad(
        "beta_max",
        0.5,
        "< 1 and not below the first beta with the rule 'anneal'",
        "0.965 is usual",
        beta_rule="anneal",
        beta_anneal_steps=5,
        beta=0.9,
    ),
    bad("beta_max", 1.5, _UNIT, "0.9 suits most runs"),
    bad("beta_anneal_steps", 0, "> 0 with the rule 'anneal'", "the steps that it takes", beta_rule="anneal"),
    bad("beta_anneal_steps", -3, _STEPS, "not a fraction"),
    bad("beta_hold_steps", 1, "> 1 with the rule 'amuse'", "the steps of the warm-up", beta_rule="amuse"),
    bad("beta_hold_steps", 0.1, _STEPS, "not a fraction"),
    bad("rho", 0.0, _POSITIVE, "0.8 is the usual value"),
    bad("rho", math.inf, _POSITIVE, "0.8 is the usual value"),
    bad("decay_at", "x", "'y' or 'z'", "schedulefree"),
    bad("decay_power", 3, "1 or 2 or 'normalized'", "AdamC"),
    bad("decay_power", "normalised", "1 or 2 or 'normalized'", "AdamC"),
    bad("inner_momentum", 1.0, _DECAY, "0 switches it off"),
    bad("inner_momentum", -0.5, _DECAY, "0 switches it off"),
    bad("mu", 1.0, _DECAY, "0.95 is the usual value"),
    bad("mu", -0.5, _DECAY, "0.95 is the usual value"),
    bad("ns_steps", 0, "a whole number from 1 to 99", "5 is the usual value"),
    bad("ns_steps", 100, "a whole number from 1 to 99", "5 is the usual value"),
    bad("ns_steps", 2.5, "a whole number from 1 to 99", "5 is the usual value"),
    bad("nesterov", "yes", "True or False", "pass a bool"),
    bad("normalize", "columns", "'none' or 'rows'", "NorMuon"),
    bad("b2_rows", 1.0, _DECAY, "0 switches it off"),
    bad("adjust_lr", "none", "'match_rms_adamw' or 'original'", "the lr of AdamW"),
    bad("output_axis", "middle", "'first' or 'last'", "Flax"),
    bad("adam_lr_ratio", -1.0, _SIZE, "pass 0"),
    bad("silent_sgd_phase", "yes", "True or False", "pass a bool"),
    bad("weight_decay", "0.1", _SIZE, "pass 0"),
    bad("r", True, _SIZE, "pass 0"),
]
MISSPELT = {"weigth_decay": 0.1, "warmup": 5, "learning_rte": 0.1}
