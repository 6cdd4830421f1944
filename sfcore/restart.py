"""What a start from weights alone does unless it is told otherwise: data, and one pure function.

Plain Schedule-Free has c = 1 in its first step, so x jumps to z and the loaded weights are gone. The
policy counts them as the average of 800 earlier steps, and needs no warm-up. Measured on two problems
after 1000 steps of AdamW, with 1, 8 and 32 micro-batches an optimizer step; medians of ratios within a
seed, 240 seeds of digits and 20 of text:

- The worst validation loss in the first 100 steps is at most 1.004 times that of the same run continued
  with its exact state. schedulefree's AdamW: 1.08 to 7.1 times, with 50 steps of warm-up 1.04 to 1.8;
  its RAdam: 1.00 to 1.11.
- After 300 steps the loss is 0.4 to 6% below RAdam's in all six cases, by two to fourteen standard errors.
  It is 1 to 5% above that of the exact continuation: that is what z and v were worth.

Other numbers of prior steps, 60 seeds of digits and 20 of text: up to 200, x rises by 5 to 12% on digits
in the first 100 steps, and up to 400 text without accumulation ends 0.7 to 3% above RAdam. From 600 to
1600 all end below RAdam's, or within a standard error of it; 800 is in the middle. A warm-up of 20 to 100
steps beside 800 gains at most 1% on digits with 32 micro-batches, and costs up to 2.3% with 1 and 8.

No one number suits all. After only 300 steps of training, 800 ends 0 to 1.3% below RAdam (digits, 60 seeds),
and 300 ends 5 to 7% below. So where it is known for how many steps the weights were trained, that number
is used (`trained_steps`).

    python -m benchmarks resume                                        the table; an hour on a free core
    python -m benchmarks resume --sweep --problem text                 other numbers of prior steps
    python -m benchmarks resume --sweep --problem digits --seeds 60
    python -m benchmarks resume --sweep --problem digits --seeds 60 --trained 300
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from sfcore import checks, hyperparameters
from sfcore.checks import HyperparameterError, Rule

_KIND = Rule(
    "a dataclass of sfcore.hyperparameters",
    lambda v: isinstance(v, type) and issubclass(v, hyperparameters.ScheduleFree),
    "AdamW is one",
)
WEIGHTS_ONLY: Mapping[str, int] = MappingProxyType({"prior_steps": 800, "warmup_steps": 0})


def weights_only_policy(
    explicit: Mapping[str, Any],
    kind: type[hyperparameters.ScheduleFree] = hyperparameters.AdamW,
    *,
    trained_steps: int | None = None,
) -> dict[str, Any]:
    """Returns the arguments that a start from weights alone adds to an optimizer; explicit ones win.

    Args:
        explicit: arguments that the user has given, by canonical name; those that the policy does not
            speak of are left out of the result. 0 is explicit too: `{"prior_steps": 0}` is plain
            Schedule-Free.
        kind: the optimizer's dataclass; what it does not have is left out (RAdam has no warm-up).
        trained_steps: optimizer steps that the weights were trained for, where that is known (>= 0);
            prior_steps is then this number. Default None: unknown.

    Returns:
        `prior_steps` and, where `kind` has it, `warmup_steps`.

    Raises:
        HyperparameterError: for trained_steps out of range, or an argument of another kind.

    Example:
        >>> from sfcore.hyperparameters import RAdam
        >>> from sfcore.restart import weights_only_policy
        >>> weights_only_policy({"lr": 0.01})
        {'prior_steps': 800, 'warmup_steps': 0}
        >>> weights_only_policy({"warmup_steps": 50}, trained_steps=5000)
        {'prior_steps': 5000, 'warmup_steps': 50}
        >>> weights_only_policy({"prior_steps": 100}, RAdam, trained_steps=5000)
        {'prior_steps': 100}
    """
    checks.require(
        HyperparameterError,
        explicit=(checks.MAPPING, explicit),
        kind=(_KIND, kind),
        trained_steps=(checks.optional(checks.STEPS), trained_steps),
    )
    policy = dict(WEIGHTS_ONLY)
    if trained_steps is not None:
        policy["prior_steps"] = trained_steps
    known = {field.name for field in fields(kind)}
    return {name: explicit.get(name, value) for name, value in policy.items() if name in known}
