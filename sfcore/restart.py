"""What a start from weights alone does unless it is told otherwise: data, and one pure function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from sfcore import hyperparameters

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
    policy = dict(WEIGHTS_ONLY)
    if trained_steps is not None:
        policy["prior_steps"] = trained_steps
    known = {field.name for field in fields(kind)}
    return {name: explicit.get(name, value) for name, value in policy.items() if name in known}
