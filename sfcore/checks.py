"""Argument rules and their errors, shared by both twins: "name must be RULE, got VALUE"."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any


class HyperparameterError(ValueError):
    """A configuration was refused; the message lists every problem at once, one a line.

    Attributes:
        problems: one sentence each, "name must be RULE, got VALUE: what to do".

    Example:
        >>> from sfcore.checks import HyperparameterError, check
        >>> from sfcore.hyperparameters import SGD
        >>> try:
        ...     check(SGD, {"lr": -1.0, "warmup_steps": 0.03})
        ... except HyperparameterError as error:
        ...     print(len(error.problems))
        2
    """

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


@dataclass(frozen=True)
class Rule:
    """One rule for one value: its words, its test, and what to do about a value that fails."""

    text: str
    holds: Callable[[Any], bool]
    fix: str


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    try:
        return _is_number(value) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _whole(value: Any) -> bool:
    return _finite(value) and value >= 0 and float(value).is_integer()


STEP_SIZE = Rule(
    "a finite number >= 0",
    lambda v: _finite(v) and v >= 0,
    "to ascend, negate the loss instead of the step size",
)
NON_NEGATIVE = Rule("a finite number >= 0", lambda v: _finite(v) and v >= 0, "pass 0 to switch it off")
POSITIVE = Rule("a finite number > 0", lambda v: _finite(v) and v > 0, "1e-8 is the usual value")
INTERPOLATION = Rule(
    "a number in [0, 1]",
    lambda v: _finite(v) and 0 <= v <= 1,
    "0.9 suits most runs, 0.95 to 0.98 very long ones",
)
DECAY_RATE = Rule(
    "a number in [0, 1)", lambda v: _finite(v) and 0 <= v < 1, "0.999 is the usual value, 0 switches it off"
)
STEPS = Rule(
    "a whole number of optimizer steps >= 0",
    _whole,
    "pass steps, not a fraction: round(fraction * total_optimizer_steps)",
)
FLAG = Rule("True or False", lambda v: isinstance(v, bool), "pass a bool")


def problem(name: str, rule: Rule, value: Any) -> str:
    """Returns the sentence for a value that breaks a rule."""
    return f"{name} must be {rule.text}, got {value!r}: {rule.fix}"


def find_problems(kind: type, values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> list[str]:
    """Returns every problem of `values` under the rules of `kind`, in the order of its fields.

    Args:
        kind: a dataclass of `sfcore.hyperparameters`.
        values: field name -> value; a field that is missing is not checked (a JAX tracer has no
            value yet, so its owner leaves it out).
        names: field name -> the name its user knows it by; the field name by default.
    """
    names = names or {}
    shown = {field.name: names.get(field.name, field.name) for field in fields(kind)}
    found = [
        problem(shown[field.name], field.metadata["rule"], values[field.name])
        for field in fields(kind)
        if field.name in values and not field.metadata["rule"].holds(values[field.name])
    ]
    if not found:
        found = kind.joint_problems(values, shown)  # type: ignore[attr-defined]
    return found


def check(kind: type, values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Raises `HyperparameterError` with every problem that `find_problems` finds."""
    found = find_problems(kind, values, names)
    if found:
        raise HyperparameterError(found)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that `name` is most likely a misspelling of, or None.

    Example:
        >>> from sfcore.checks import nearest
        >>> nearest("weigth_decay", ["lr", "weight_decay"])
        'weight_decay'
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
    return close[0] if close else None


def hint(name: str, known: Iterable[str]) -> str:
    """Returns what to add to the sentence about an unknown name: the nearest, or nothing.

    Example:
        >>> from sfcore.checks import hint
        >>> hint("weigth_decay", ["lr", "weight_decay"]), hint("foo", ["lr"])
        ("; did you mean 'weight_decay'?", '')
    """
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""
