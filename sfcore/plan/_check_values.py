"""Rules about the optimizer's own values: SF003, SF301 to SF306."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from sfcore import checks, laws
from sfcore.plan import _fields
from sfcore.plan._fields import whole
from sfcore.plan._model import Problem
from sfcore.plan._rules import problem
from sfcore.plan._run import Run
from sfcore.plan._tables import is_ours, misspelt

_OURS = ("prior_steps", "inner_momentum")
_FAR = 10.0
_COUNT = checks.Rule(
    "a number >= 1", lambda value: whole(value) is not None, "leave it out if it is not known"
)
_COUNTS = ("total_steps", "samples", "batch_size", "accumulation", "devices")


def find(run: Run) -> Iterator[Problem]:
    """Yields the problems of hyperparameters."""
    yield from name(run)
    yield from arguments(run)
    out_of_range = list(ranges(run))
    yield from out_of_range
    if not out_of_range and run.kind.schedule_free:
        yield from rate(run)
        yield from beta(run)
        yield from second_moment(run)


def name(run: Run) -> Iterator[Problem]:
    """SF003: an optimizer that nobody knows, or that HF Trainer cannot build."""
    near = misspelt(run.optimizer)
    if near:
        yield problem(run, "SF003", "optimizer", run.optimizer, f"did you mean {near}?", {"optimizer": near})
    elif run.config.source.shares_warmup and "." in run.optimizer:
        fix = (
            "build it yourself and pass optimizers=(optimizer, None) to Trainer, or take one of its own names"
        )
        there = run.kind.law.elsewhere.get("transformers") if run.kind.law else None
        changes = {"optimizer": there} if there else None
        yield problem(run, "SF003", "optimizer", run.optimizer, fix, changes)


def full_name(run: Run) -> str:
    """Returns this project's torch class of the same family; of an unknown one, the usual."""
    law = run.kind.law or laws.LAWS["adamw"]
    return f"sftorch.{law.torch}"


def package_fix(run: Run) -> tuple[str, dict[str, Any]]:
    """Returns how to come to a class that has this project's options, and the changes; none in HF Trainer."""
    if run.config.source.shares_warmup:
        return f"build {full_name(run)} yourself and pass optimizers=(optimizer, None) to Trainer", {}
    if is_ours(run.optimizer, run.config.source.bare_is_ours):
        return "", {}
    fix = f"choose {run.config.name('optimizer')} = {full_name(run)}"
    if run.config.source.dummy_scheduler:
        fix += " (sd-scripts wants the package schedulefree installed beside it)"
    return fix, {"optimizer": full_name(run)}


def arguments(run: Run) -> Iterator[Problem]:
    """SF306: an argument of another optimizer, or of this project's own class."""
    shared = run.config.source.shares_warmup
    for field, value in run.config.values.items():
        of_trainer = shared and run.config.places[field].item == "" and field in run.config.source.fields
        # RAdam's warm-up is SF206.
        others = field in run.kind.forbids and not (field == "warmup_steps" and run.kind.rectified)
        if others and not of_trainer and value:
            yield problem(run, "SF306", field, value, f"{run.kind.name} has none: remove it", {field: None})
        elif field in _OURS and value and run.kind.uses:
            fix, changes = package_fix(run)
            if fix:
                yield problem(run, "SF306", field, value, fix, changes, f"{run.optimizer} has none.")


def ranges(run: Run) -> Iterator[Problem]:
    """SF301: values that no optimizer takes, one by one, then between them."""
    values = run.config.values
    own = {field.name for field in fields(run.kind.rules)} if run.kind.rules else set()
    for field, value in values.items():
        if _fields.FIELDS[field].kind != "number" or field in own:
            continue
        rule = _COUNT if field in _COUNTS else checks.NON_NEGATIVE
        if not rule.holds(value):
            yield _out_of_range(run, field, rule.text, rule.fix, None)
    if run.kind.rules is None:
        return
    known = {field.name: field for field in fields(run.kind.rules)}
    given = {name: values[name] for name in known if name in values}
    given.setdefault("lr", run.lr)
    bad = False
    for name, value in given.items():
        rule = known[name].metadata["rule"]
        fraction = (
            name == "warmup_steps" and isinstance(value, float) and 0 < value < math.inf
        )  # SF202 says more
        if not rule.holds(value) and not fraction:
            bad = True
            yield _out_of_range(run, name, rule.text, rule.fix, known[name].default)
    full = {name: given.get(name, known[name].default) for name in known}
    for sentence in [] if bad else run.kind.rules.joint_problems(full, {name: name for name in known}):
        name = sentence.split(" ", 1)[0]
        text, fix = re.split(r", got [^:]*: ", sentence.split(" must be ", 1)[1], maxsplit=1)
        yield _out_of_range(run, name, text, fix, known[name].default)


def _out_of_range(run: Run, name: str, rule: str, fix: str, default: Any) -> Problem:
    found = problem(run, "SF301", name, run.config.get(name), fix, {name: default})
    return Problem(**{**vars(found), "rule": rule})


def rate(run: Run) -> Iterator[Problem]:
    """SF302 and SF303: a step size of another optimizer, or of none."""
    law = run.kind.law
    if law is None or law.lr_range is None or run.lr == 0:
        return
    (low, high), usual = law.lr_range, law.defaults["lr"]
    text = f"{low:g} to {high:g} is useful ({law.lr_source})"
    if law.direction == "gradient" and run.lr < low / 5:
        yield problem(run, "SF303", "lr", run.lr, f"start from {usual:g}; {text}", {"lr": usual})
    elif not low / _FAR <= run.lr <= high * _FAR:
        yield problem(run, "SF302", "lr", run.lr, f"{text}; start from {usual:g}", {"lr": usual})


def beta(run: Run) -> Iterator[Problem]:
    """SF304: beta taken for a momentum."""
    value = run.config.get("beta", 0.9)
    if not 0.8 <= value <= 0.99:
        yield problem(
            run, "SF304", "beta", value, "0.9 suits most runs, 0.95 to 0.98 very long ones", {"beta": 0.9}
        )


def second_moment(run: Run) -> Iterator[Problem]:
    """SF305: a horizon of a few steps, or of more than the run has."""
    value = run.config.get("b2", 0.999)
    if "b2" not in run.kind.uses or not isinstance(value, int | float):
        return
    longer = value > 0.999 and run.total_steps is not None and 1 / (1 - value) > run.total_steps
    if value < 0.9 or longer:
        detail = f"Here it averages {1 / (1 - value):.0f} steps."
        yield problem(run, "SF305", "b2", value, "0.999 is the usual value", {"b2": 0.999}, detail)
