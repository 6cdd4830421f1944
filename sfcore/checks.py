"""Argument rules and their errors, shared by both twins: "name must be RULE, got VALUE"."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast


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


class UnknownOptionError(HyperparameterError, TypeError):
    """A call was refused for options that nobody knows, and whatever else is wrong with it.

    It is a TypeError too, as Python's own about an unexpected keyword is.
    """


@dataclass(frozen=True)
class Rule:
    """One rule for one value: its words, its test, and what to do about a value that fails."""

    text: str
    holds: Callable[[Any], bool]
    fix: str


def _is_number(value: Any) -> bool:
    if type(value) in (float, int):  # nearly always, and an abstract class takes its time
        return True
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
MOMENTUM = Rule("a number in [0, 1)", lambda v: _finite(v) and 0 <= v < 1, "0.95 is the usual value")
ITERATIONS = Rule(
    "a whole number from 1 to 99",
    lambda v: _whole(v) and 1 <= v < 100 and not isinstance(v, bool),
    "5 is the usual value",
)
STEPS = Rule(
    "a whole number of optimizer steps >= 0",
    _whole,
    "pass steps, not a fraction: round(fraction * total_optimizer_steps)",
)
SPAN = Rule(
    "0, or a number of optimizer steps >= 1",
    lambda v: _finite(v) and (v == 0 or v >= 1),
    "pass steps, not a fraction: round(fraction * total_optimizer_steps)",
)
MULTIPLE = Rule(
    "a finite number >= 0",
    lambda v: _finite(v) and v >= 0,
    "1 / (1 - beta) is neutral, 0 switches it off",
)
EXPONENT = Rule("a finite number > 0", lambda v: _finite(v) and v > 0, "0.8 is the usual value")
FRACTION = Rule("a finite number > 0", lambda v: _finite(v) and v > 0, "1 where nothing was clipped")
FLAG = Rule("True or False", lambda v: isinstance(v, bool), "pass a bool")

# Of arguments that are no hyperparameters.
COUNT = Rule("a whole number >= 0", lambda v: isinstance(v, numbers.Integral) and _whole(v), "pass int(...)")
NUMBER = Rule("a number", _is_number, "pass float(...)")
FINITE = Rule("a finite number", _finite, "pass float(...)")
SECONDS = Rule("a number of seconds >= 0", lambda v: _is_number(v) and v >= 0, "0 does not wait")
TEXT = Rule("text", lambda v: isinstance(v, str), "pass a str")
PATH = Rule("a path", lambda v: isinstance(v, str | os.PathLike), "pass a str or a pathlib.Path")
MAPPING = Rule("a mapping", lambda v: isinstance(v, Mapping), "pass a dict")
FUNCTION = Rule("a function", callable, "pass it itself, without calling it")
LOSS = Rule(
    "a number, or an array of one",
    lambda v: _is_number(v) or math.prod(getattr(v, "shape", (0,))) == 1,
    "pass the loss of one update, such as its mean",
)
NAMES = Rule(
    "a collection of names", lambda v: isinstance(v, Collection) and not isinstance(v, str), "pass a list"
)
BATCHES = Rule(
    "an iterable",
    lambda v: isinstance(v, Iterable) and not isinstance(v, str),
    "pass some training batches",
)
# Of a call that averages statistics over batches.
CALL = Rule("a function", callable, "pass one of (model, batch)")


def one_of(*known: Any, fix: str) -> Rule:
    """Returns the rule of an argument that must be one of a few values."""
    text = " or ".join(map(repr, known))
    return Rule(text, lambda v: not isinstance(v, bool) and v in known, fix)


def optional(rule: Rule, fix: str = "") -> Rule:
    """Returns the rule of an argument that may also be None, with words of its own on what to do."""
    return Rule(f"None or {rule.text}", lambda v: v is None or rule.holds(v), fix or rule.fix)


def kind_of(text: str, kind: type | tuple[type, ...], fix: str) -> Rule:
    """Returns the rule of an argument that must be an instance of a class."""
    return Rule(text, lambda v: isinstance(v, kind), fix)


def problem(name: str, rule: Rule, value: Any) -> str:
    """Returns the sentence for a value that breaks a rule."""
    return f"{name} must be {rule.text}, got {value!r}: {rule.fix}"


def require(error: type[Exception], **given: tuple[Rule, Any]) -> None:
    """Raises an error with the sentence of every argument that breaks its rule.

    Args:
        error: its type: `HyperparameterError` for a configuration, TypeError for what is of another kind.
        given: name -> (rule, value).

    Example:
        >>> from sfcore import checks
        >>> try:
        ...     checks.require(TypeError, path=(checks.PATH, 3), call=(checks.FUNCTION, print))
        ... except TypeError as caught:
        ...     print(caught)
        path must be a path, got 3: pass a str or a pathlib.Path
    """
    if found := [
        problem(name, rule, value) for name, (rule, value) in given.items() if not rule.holds(value)
    ]:
        raise error(found) if issubclass(error, HyperparameterError) else error("\n".join(found))


def find_problems(kind: type, values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> list[str]:
    """Returns every problem of `values` under the rules of `kind`, in the order of its fields.

    Args:
        kind: a dataclass of `sfcore.hyperparameters`.
        values: field name -> value; a field that is missing is not checked (a JAX tracer has no
            value yet, so its owner leaves it out).
        names: field name -> the name its user knows it by; the field name by default.
    """
    names = names or {}
    rules = _rules(kind)
    shown = {name: names.get(name, name) for name in rules}
    found = [
        problem(shown[name], rule, values[name])
        for name, rule in rules.items()
        if name in values and not rule.holds(values[name])
    ]
    if not found:
        found = kind.joint_problems(values, shown)  # type: ignore[attr-defined]
    return found


@functools.cache
def _rules(kind: type) -> dict[str, Rule]:
    return {field.name: field.metadata["rule"] for field in fields(kind)}


def check(kind: type, values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Raises `HyperparameterError` with every problem that `find_problems` finds."""
    found = find_problems(kind, values, names)
    if found:
        raise HyperparameterError(found)


Call = TypeVar("Call", bound=Callable[..., Any])


def with_known_options(
    find: Callable[[Mapping[str, Any]], list[str]], words: Callable[[], Mapping[str, str]] = dict
) -> Callable[[Call], Call]:
    """Makes a constructor or factory name every misspelt keyword together with all else that is wrong.

    Args:
        find: argument -> value, defaults included, to the problems of those values. Only asked after a
            misspelling: the callee checks its values itself.
        words: what the other twin, or the equations, call an argument -> its name here.

    Returns:
        A decorator. What it decorates keeps its signature and costs nothing in a call that is well spelt.

    Raises:
        UnknownOptionError: from the decorated; names the class that the user wrote, the nearest names, and
            every value that is out of range.

    Example:
        >>> from sfcore import checks
        >>> @checks.with_known_options(lambda of: [f"lr is {of['lr']}"], lambda: {"learning_rate": "lr"})
        ... def sgd(params, lr=1.0, warmup_steps=0): ...
        >>> try:
        ...     sgd([], warm_up=5, learning_rate=0.1)
        ... except checks.UnknownOptionError as error:
        ...     print(error)
        sgd has no option 'warm_up', got 5: did you mean 'warmup_steps'?
        sgd has no option 'learning_rate', got 0.1: it is called 'lr' here
        lr is 1.0
    """

    def decorate(function: Call) -> Call:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            unknown = [name for name in kwargs if name not in signature.parameters]
            if not unknown:
                return function(*args, **kwargs)
            known = {name: value for name, value in kwargs.items() if name not in unknown}
            bound = signature.bind_partial(*args, **known)
            bound.apply_defaults()
            first = next(iter(signature.parameters), "")
            owner = type(args[0]).__name__ if first == "self" else function.__name__
            names = [name for name in signature.parameters if name != "self"]
            found = [_unknown(owner, name, kwargs[name], names, words()) for name in unknown]
            raise UnknownOptionError([*found, *find(bound.arguments)])

        return cast(Call, call)

    return decorate


def _unknown(owner: str, name: str, value: Any, known: list[str], words: Mapping[str, str]) -> str:
    meant = words.get(name)
    if meant in known:
        fix = f"it is called {meant!r} here"
    else:
        # Nobody else's word can be meant, so a distant one is worth naming.
        near = nearest(name, known, cutoff=0.55)
        fix = f"did you mean {near!r}?" if near else f"it has {', '.join(known)}"
    return f"{owner} has no option {name!r}, got {value!r}: {fix}"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.8) -> str | None:
    """Returns the known name that `name` is most likely a misspelling of, or None.

    Args:
        cutoff: how much of both must agree, from 0 to 1, default 0.8.

    Example:
        >>> from sfcore.checks import nearest
        >>> nearest("weigth_decay", ["lr", "weight_decay"])
        'weight_decay'
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
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
