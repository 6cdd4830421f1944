"""What the suite holds of each law; a law of which it lacks a part is named, with the part."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack
from typing import Any

from parity_tests import cases, drivers, invalid, reference
from parity_tests.cases import Case
from sfcore import laws
from sfcore.laws import Law

TWINS = ("sfjax", "sftorch")


def find_gaps() -> list[str]:
    """Returns a sentence for everything that the suite lacks of a law, or has of none."""
    found = [gap for law in laws.directed().values() for gap in _gaps(law)]
    for driver in drivers.DRIVERS.values():
        for name in driver.runs():
            if name not in {**laws.LAWS, **laws.MEMBERS}:
                found.append(f"driver {driver.name!r} must run laws, got {name!r}: register its row")
    return found


def _gaps(law: Law) -> Iterator[str]:
    where = f"law {law.name!r} must have"
    if law.name not in reference.RULES:
        yield f"{where} a rule in parity_tests.reference.RULES, got none: write its equations in NumPy"
    by_hand = cases.DEFAULTS.get(law.name)
    if by_hand is None:
        yield f"{where} its defaults in parity_tests.cases.DEFAULTS, got none: write them out by hand"
    elif by_hand != law.defaults:
        yield f"{where} the row's defaults {law.defaults}, got {by_hand} in parity_tests.cases.DEFAULTS"
    own = [case for case in cases.CASES.values() if case.optimizer == law.name]
    for option in law.defaults:
        if not any(option in case.changed for case in own):
            yield f"{where} a case in parity_tests.cases.CASES that varies {option!r}, got none: add one"
        if not any(law.name in bad.optimizers and bad.name == option for bad in invalid.BAD_OPTIONS):
            yield f"{where} a bad value of {option!r} in parity_tests.invalid.BAD_OPTIONS, got none: add one"
    for twin in TWINS:
        if not any(law.name in one.runs() for one in drivers.TWINS if one.name.startswith(twin)):
            yield f"{where} a driver of {twin} in parity_tests.drivers.TWINS that runs it, got none: add it"
        name = law.torch if twin == "sftorch" else law.jax
        if not hasattr(importlib.import_module(twin), name):
            yield f"{where} {twin}.{name}, got no such name: write the direction, name it in __init__.py"


def joined(
    law: Law,
    *,
    torch: Mapping[str, Any],
    jax: Any,
    rule: reference.Rule | None,
    defaults: Mapping[str, Any] | None,
    lr: float = 0.05,
    more: Iterable[Case] = (),
    bad: Iterable[invalid.BadOption] = (),
) -> ExitStack:
    """Makes a law part of the library and of the suite; used as a context manager, it goes again at the end.

    Args:
        law: its row.
        torch: its class by the row's name, and its closure form by that name with "Closure".
        jax: its factory.
        rule: of the reference; None leaves it out, to see that it is missed.
        defaults: written out by hand; None leaves them and every case out.
        lr: moves the problems' leaves by about their size.
        more, bad: cases and bad values of its own options.
    """
    with ExitStack() as undo:
        undo.enter_context(laws.register(law))
        for module, made in (("sftorch", torch), ("sfjax", {law.jax: jax} if jax else {})):
            for name, value in made.items():
                _put(undo, vars(importlib.import_module(module)), name, value)
        if rule is not None:
            _put(undo, reference.RULES, law.name, rule)
        if defaults is not None:
            _put(undo, cases.DEFAULTS, law.name, dict(defaults))
            _put(undo, cases.LRS, law.name, lr)
            for case in (*cases.of_law(law.name), *more):
                _put(undo, cases.CASES, case.id, case)
        for one in bad:
            invalid.BAD_OPTIONS.append(one)
            undo.callback(invalid.BAD_OPTIONS.remove, one)
        return undo.pop_all()


def _put(undo: ExitStack, table: MutableMapping[str, Any], name: str, value: Any) -> None:
    if name in table:
        raise ValueError(f"{name!r} must be new, got one that is there: take another name")
    table[name] = value
    undo.callback(table.pop, name)
