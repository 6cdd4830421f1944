"""Every rule as data: code, severity, what must hold, why. The functions that look for them are beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfcore.plan._model import ERROR, WARNING, Problem
from sfcore.plan._run import Run


@dataclass(frozen=True)
class Rule:
    """One rule: its severity, what it says a field must be, and what happens otherwise."""

    severity: str
    rule: str
    why: str


RULES: dict[str, Rule] = {
    "SF001": Rule(ERROR, "a known field", "A misspelt field is ignored by some programs and stops others."),
    "SF002": Rule(ERROR, "of the field's kind", "The trainer would stop at it."),
    "SF003": Rule(ERROR, "a known optimizer", "The trainer would stop at it, after everything is loaded."),
    "SF101": Rule(
        ERROR,
        "0 with a scheduler that has no warm-up",
        "sd-scripts and Kohya_SS raise deep in the training script, after everything is loaded; others "
        "ignore the warm-up.",
    ),
    "SF102": Rule(
        ERROR,
        "constant with a Schedule-Free optimizer",
        "The average already does what a decay is for; with one, the run needs a known end again, and "
        "late steps count as much in the average as early ones although they hardly move.",
    ),
    "SF103": Rule(
        ERROR,
        "left at its default with a Schedule-Free optimizer",
        "sd-scripts and Kohya_SS install a dummy scheduler for an optimizer whose name ends in ScheduleFree, "
        "and ignore this without a word.",
    ),
    "SF104": Rule(
        ERROR, "set for this scheduler", "The scheduler cannot be built without it, or not as meant."
    ),
    "SF105": Rule(WARNING, "left at its default with this scheduler", "The scheduler ignores it."),
    "SF106": Rule(ERROR, "a known scheduler", "The trainer would stop at it, after everything is loaded."),
    "SF107": Rule(
        ERROR, "used with the optimizer Adafactor", "sd-scripts asserts it; others compute nonsense."
    ),
    "SF201": Rule(ERROR, "the only warm-up", "The two ramps are multiplied: the lr rises as t^2."),
    "SF202": Rule(
        ERROR,
        "a whole number of optimizer steps >= 0",
        "A fraction is taken for a number of steps: 0.03 makes the first step 33 times the lr, in HF Trainer "
        "too, which hands it on as it is.",
    ),
    "SF203": Rule(
        ERROR, "the only statement of the warm-up", "Of steps and a share of the run only one is used."
    ),
    "SF204": Rule(ERROR, "shorter than the run", "The lr never reaches the one that is written down."),
    "SF205": Rule(
        ERROR,
        "counted in optimizer steps",
        "A step is one update, not one micro-batch; counted so, it is as many times too large.",
    ),
    "SF206": Rule(ERROR, "absent with RAdam", "RAdam rectifies its lr in place of a warm-up, and has none."),
    "SF207": Rule(
        WARNING,
        "about 5% of the run",
        "Schedule-Free SGD and AdamW are better with a warm-up (README of facebookresearch/schedule_free).",
    ),
    "SF208": Rule(
        WARNING,
        "a fraction of the run on several devices",
        "accelerate counts one scheduler step for every process, so a number of steps ends that many "
        "times sooner; a fraction does not.",
    ),
    "SF301": Rule(ERROR, "in its range", "The optimizer refuses it, or computes nonsense with it."),
    "SF302": Rule(WARNING, "near the useful range", "Far outside it nothing is learnt, or all is lost."),
    "SF303": Rule(
        WARNING,
        "of the size of SGD's step sizes",
        "This is the size of AdamW's; SGD's steps are not normalised, so it hardly moves.",
    ),
    "SF304": Rule(
        WARNING,
        "from 0.8 to 0.99",
        "beta is no momentum: it places y between z and x. At 0 upstream and optax divide by 0, small ones "
        "are unstable, and near 1 the gradient is taken at the average, which hardly moves.",
    ),
    "SF305": Rule(
        WARNING,
        "from 0.9 to 0.999, or to a horizon within the run",
        "v averages 1 / (1 - b2) steps: few are noise, and more than the run has never settle.",
    ),
    "SF306": Rule(
        ERROR, "an argument that this optimizer has", "The optimizer raises when it is built, or ignores it."
    ),
    "SF401": Rule(
        ERROR,
        "given together with prior_steps",
        "Its first step has c = 1 and throws the loaded weights away: on digits the validation loss rose to "
        "2.4 to 7.2 times with AdamW, most with accumulation, and to 1.1 times with RAdam "
        "(python -m benchmarks resume).",
    ),
    "SF501": Rule(
        ERROR,
        "float32 (autocast may be float16)",
        "y is rounded to it in every step, and gradients below 6e-8 are 0.",
    ),
    "SF502": Rule(
        WARNING,
        "float32 (autocast may be bfloat16)",
        "y is rounded to it in every step; steps below half an ulp are lost, and a run stalls.",
    ),
    "SF503": Rule(
        ERROR,
        "on where the model has BatchNorm",
        "Running statistics belong to y, and x is evaluated: they must be averaged anew at x.",
    ),
    "SF504": Rule(
        ERROR,
        "in an order with the Schedule-Free optimizer last",
        "What edits the updates after it moves y but not z, and corrupts x; nothing can notice it.",
    ),
    "SF505": Rule(
        WARNING,
        "off with Schedule-Free",
        "x is an average already, and an average of y or of weights that flip between x and y is neither.",
    ),
    "SF506": Rule(ERROR, "what saves x", "The parameters hold y while training, which is not what to ship."),
    "SF507": Rule(
        ERROR,
        "a name that ends in ScheduleFree",
        "sd-scripts knows Schedule-Free by that; otherwise it never switches to x, and ships y.",
    ),
}


def problem(
    run: Run,
    code: str,
    field: str,
    found: Any,
    fix: str,
    changes: Mapping[str, Any] | None = None,
    detail: str = "",
) -> Problem:
    """Returns the problem of a rule, in the words of the user's configuration.

    Args:
        field: neutral.
        fix: what to do, with the user's names.
        changes: the same as data; None where only the user can know.
        detail: what more there is to say about this run.
    """
    rule = RULES[code]
    why = f"{rule.why} {detail}".strip()
    return Problem(code, rule.severity, run.config.name(field), found, rule.rule, why, fix, changes or {})
