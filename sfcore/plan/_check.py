"""`check`: reads, asks every rule, and repairs if told to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sfcore.plan import _check_schedule, _check_values, _check_warmup, _check_wiring, _read, _write
from sfcore.plan._config import Config
from sfcore.plan._model import Change, Plan, Problem
from sfcore.plan._read import ConfigLike, SourceName
from sfcore.plan._run import Run

_ROUNDS = 8  # a repair may lay bare the next problem; none of the rules' chains is longer than 4


def check(
    config: ConfigLike = None,
    *,
    fix: bool = False,
    source: SourceName | None = None,
    ignore: Iterable[str] = (),
    **facts: Any,
) -> Plan:
    """Returns what a run will do and everything that is wrong with it, before it starts.

    Args:
        config: a mapping of fields; the path of a TOML or JSON file (sd-scripts, Kohya_SS preset, HF
            TrainingArguments, or our own); a command line of sd-scripts, as text or as a list of words; an
            HF TrainingArguments object. Default None: the keyword arguments alone.
        fix: repair what can be repaired without guessing; `Plan.changes` lists every change, and
            `Plan.config` and `Plan.facts` hold what came out. What is left is in `Plan.problems`.
        source: "own", "sd-scripts", "kohya" or "hf", where the fields alone do not tell.
        ignore: codes that are meant as they are, such as "SF102".
        facts: what a configuration cannot say, or the whole of it: `samples`, `devices`, `batchnorm`,
            `param_dtype`, `weights`, ...; docs/rules.md lists all fields.

    Raises:
        ConfigError: if the configuration cannot be read; with line and column where it is text.

    Example:
        >>> from sfcore.plan import check
        >>> plan = check(optimizer="AdamW", scheduler="constant", warmup_steps=100, total_steps=1000)
        >>> plan.errors[0].code, plan.errors[0].field
        ('SF101', 'warmup_steps')
        >>> check(plan.config, fix=True).config["scheduler"]
        'constant_with_warmup'
    """
    ignored = frozenset(ignore)
    found = _read.read(config, source, facts)
    problems, changes = _problems(found, ignored), []
    for _ in range(_ROUNDS if fix else 0):
        wanted, codes = _merge(problems)
        if not wanted:
            break
        before = found
        original, left = _write.written(before, wanted)
        found = _read.read(original, _key(before), left)
        changes += _listed(before, found, codes)
        problems = _problems(found, ignored)
    return _plan(found, problems, changes)


def _key(config: Config) -> SourceName | None:
    """Returns the name of a source that `read` takes; None for a command line, which tells itself."""
    return next((key for key, source in _read.SOURCES.items() if source is config.source), None)


def _problems(config: Config, ignored: frozenset[str]) -> tuple[Problem, ...]:
    run = Run(config)
    found = [*config.problems, *_check_values.find(run)]
    if not any(p.code in ("SF002", "SF301") for p in found):  # the others compute with these values
        found += [*_check_schedule.find(run), *_check_warmup.find(run), *_check_wiring.find(run)]
    return tuple(sorted((p for p in found if p.code not in ignored), key=lambda p: p.code))


def _merge(problems: Iterable[Problem]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the changes of all problems that do not contradict an earlier one, and field -> code."""
    wanted: dict[str, Any] = {}
    codes: dict[str, str] = {}
    for problem in problems:
        if all(wanted.get(field, value) == value for field, value in problem.changes.items()):
            for field, value in problem.changes.items():
                wanted[field] = value
                codes.setdefault(field, problem.code)
    return wanted, codes


def _listed(before: Config, after: Config, codes: Mapping[str, str]) -> list[Change]:
    old, new = _by_name(before), _by_name(after)
    changes: dict[str, Change] = {}
    for field, code in codes.items():
        for name in (before.name(field), after.name(field)):
            if old.get(name) != new.get(name):
                changes.setdefault(name, Change(code, name, old.get(name), new.get(name)))
    return list(changes.values())


def _by_name(config: Config) -> dict[str, Any]:
    """Returns the values by the user's own names."""
    found: dict[str, Any] = {}
    for field, value in config.values.items():
        name = config.name(field)
        found[name] = (found[name], value) if field == "b2" and name in found else value
    return found


def _plan(config: Config, problems: tuple[Problem, ...], changes: Iterable[Change]) -> Plan:
    run = Run(config)
    computable = not any(p.code in ("SF002", "SF301") for p in problems)
    scheduler = config.get("scheduler_class") or config.get("scheduler")
    return Plan(
        source=config.source.title,
        config=config.original,
        facts=config.facts,
        problems=problems,
        changes=tuple(changes),
        optimizer=run.optimizer,
        scheduler=None if scheduler is None else str(scheduler),
        warmup_steps=run.warmup if computable else 0.0,
        warmup_owner=run.owner if computable else "nobody",
        total_steps=run.total_steps,
        epochs=run.epochs,
        devices=run.devices,
        accumulation=run.accumulation,
        lr=run.lr_t if computable else np.empty(0),
        c=run.c if computable else np.empty(0),
    )
