"""What a check returns: problems, changes, the states of fields, and the plan itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as option
from typing import Any

import numpy as np

from sfcore.checks import HyperparameterError

ERROR, WARNING = "error", "warning"


class ConfigError(ValueError):
    """A configuration could not be read at all.

    Attributes:
        line, column: where the text stops making sense, from 1; None where there is no text.
    """

    def __init__(self, message: str, line: int | None = None, column: int | None = None):
        super().__init__(message)
        self.line, self.column = line, column


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration.

    Attributes:
        code: "SF101" and so on; docs/rules.md lists them.
        severity: "error" (the run fails, or is not the one that is written down) or "warning".
        field: the name that the user's own file or trainer has for it.
        found: the value that breaks the rule.
        rule: what the field must be.
        why: what happens otherwise.
        fix: what to do, in the user's own field names.
        changes: the fix as data, neutral field -> value; empty where only the user can know.
    """

    code: str
    severity: str
    field: str
    found: Any
    rule: str
    why: str
    fix: str
    changes: Mapping[str, Any] = option(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"{self.code} {self.field} must be {self.rule}, got {self.found!r}: {self.fix}. {self.why}"


@dataclass(frozen=True)
class Change:
    """One repair: the field in the user's own words, its value before and after, and the code it is for."""

    code: str
    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.code} {self.field}: {self.before!r} -> {self.after!r}"


@dataclass(frozen=True)
class FieldState:
    """What a form shows for one field.

    Attributes:
        enabled: whether the field has any effect with the other choices as they are.
        value: what to show and to save now.
        reason: why it is disabled; "" when enabled.
        restore: what to show again once the choice that disabled it is undone.
    """

    enabled: bool
    value: Any
    reason: str
    restore: Any


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run will do, and what is wrong with it.

    Attributes:
        source: where the configuration comes from, in words.
        config: the configuration, repaired with `fix=True`; what `check` takes.
        facts: the keyword arguments given beside it, repaired with `fix=True`.
        files: path -> fields of the file of settings that a command line names, repaired with `fix=True`.
        problems: every error and every warning, by code.
        changes: what `fix=True` has changed; empty without.
        optimizer, scheduler: the names as given; scheduler is None when there is none.
        scheduler_ignored: whether the trainer ignores it, and keeps the lr as it is.
        warmup_steps: optimizer steps until the full lr, whoever ramps it; a fraction stays one, and what is
            a part of a run of unknown length is NaN.
        warmup_owner: "optimizer", "scheduler", "both" or "nobody".
        total_steps: optimizer steps of the run, after accumulation; None where it cannot be known.
        epochs, devices, accumulation: None where it is not known; devices and accumulation default to 1.
        resumed: (micro-batches that a resumed run will train on, those that are left of the run), on each
            device; None where nothing is resumed, or where it cannot be known.
        lr: float64 of shape (steps,), the step size lr_t of S2; steps is total_steps, 1000 where that is
            unknown and not needed, 0 where it is needed and unknown, and at most 10^7.
        c: float64 of shape (steps,), the averaging weight of S5; empty for other optimizers.
    """

    source: str
    config: Any
    facts: Mapping[str, Any]
    files: Mapping[str, Any]
    problems: tuple[Problem, ...]
    changes: tuple[Change, ...]
    optimizer: str
    scheduler: str | None
    scheduler_ignored: bool
    warmup_steps: float
    warmup_owner: str
    total_steps: int | None
    epochs: float | None
    devices: int
    accumulation: int
    resumed: tuple[int, int] | None
    lr: np.ndarray = option(repr=False)
    c: np.ndarray = option(repr=False)

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that must be repaired."""
        return tuple(p for p in self.problems if p.severity == ERROR)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """The problems that may be meant."""
        return tuple(p for p in self.problems if p.severity == WARNING)

    def raise_for_errors(self) -> None:
        """Raises `sfcore.HyperparameterError` with every error at once, if there is one."""
        if self.errors:
            raise HyperparameterError(str(problem) for problem in self.errors)
