"""`check` reads, asks every rule, and repairs if told to; `field_states` is what a form asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from sfcore.checks import nearest
from sfcore.plan import _config, _course_rules, _rules, _sd_rules, _written
from sfcore.plan._config import SOURCES, Config, ConfigLike, SourceName
from sfcore.plan._model import Change, ConfigError, FieldState, Plan, Problem
from sfcore.plan._run import Run
from sfcore.plan._sd_scripts import ONLY_OURS
from sfcore.plan._tables import SHAPE, WARMUP, inner, is_ours

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
        ConfigError: if the configuration cannot be read, with line and column where it is text; for a code
            that no rule has.

    Example:
        >>> from sfcore.plan import check
        >>> plan = check(optimizer="AdamW", scheduler="constant", warmup_steps=100, total_steps=1000)
        >>> plan.errors[0].code, plan.errors[0].field
        ('SF101', 'warmup_steps')
        >>> check(plan.config, fix=True).config["scheduler"]
        'constant_with_warmup'
    """
    return judged(_config.read(config, source, facts), fix, known_codes(ignore))[0]


def judged(found: Config, fix: bool, ignored: frozenset[str]) -> tuple[Plan, Config]:
    """Returns the plan of a configuration, and what the configuration is after the repair."""

    def look(found: Config) -> tuple[Problem, ...]:
        problems = (one for one in _problems(Run(found)) if one.code not in ignored)
        return tuple(sorted(problems, key=lambda one: one.code))

    problems, changes = look(found), []
    for _ in range(_ROUNDS if fix else 0):
        wanted, codes = _merge(problems)
        if not wanted:
            break
        before, found = found, changed(found, wanted)
        changes += _listed(before, found, codes)
        problems = look(found)
    return _plan(found, problems, changes), found


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns a configuration with changes made: neutral field -> value, None to take it away."""
    new = _written.written(config, changes)
    # A command line is no named source: it tells itself.
    named = next((key for key, known in SOURCES.items() if known is config.source), None)
    return _config.read(new.original, named, new.facts, new.files)


def known_codes(codes: Iterable[str]) -> frozenset[str]:
    """Returns codes of rules.

    Raises:
        ConfigError: for one that no rule has, with the nearest that one has.
    """
    given = frozenset([codes] if isinstance(codes, str) else codes)
    for code in sorted(given - {*_rules.RULES}, key=str):
        near = nearest(str(code).upper(), _rules.RULES)
        fix = f"did you mean {near}?" if near else "docs/rules.md lists them"
        raise ConfigError(f"ignore must be codes of rules, got {code!r}: {fix}")
    return given


def _computable(problems: Iterable[Problem]) -> bool:
    """Returns whether what the values come to can be computed: each is of its kind and in its range."""
    return not any(problem.code in ("SF002", "SF301") for problem in problems)


def _problems(run: Run) -> Iterator[Problem]:
    """Yields every problem; after values that nothing can be computed with, none of what follows."""
    sd = run.config.source.dummy_scheduler
    found = list(run.config.problems)
    for look in (*_rules.VALUES, *(_sd_rules.VALUES if sd else ())):
        found += look(run)
    yield from found
    rest: list[Callable[[Run], Iterator[Problem]]] = []
    if run.kind.schedule_free and not any(one.code == "SF301" for one in found):
        rest += _rules.SUGGESTIONS
    if _computable(found):
        rest += [*_course_rules.COURSE, *(_sd_rules.COURSE if sd else ())]
        if run.kind.schedule_free:
            rest += [*_rules.SURROUNDINGS, *(_sd_rules.SURROUNDINGS if sd else ())]
    for look in rest:
        yield from look(run)


def _merge(problems: Iterable[Problem]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the changes of all problems that do not contradict an earlier one, and field -> code."""
    wanted: dict[str, Any] = {}
    codes: dict[str, str] = {}
    for problem in problems:
        if all(wanted.get(field, value) == value for field, value in problem.changes.items()):
            wanted |= problem.changes
            codes |= {field: problem.code for field in problem.changes if field not in codes}
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
    run, known = Run(config), _computable(problems)
    scheduler = config.get("scheduler_class") or config.get("scheduler")
    return Plan(
        source=config.source.title,
        config=config.original,
        facts=config.facts,
        files=config.files,
        problems=problems,
        changes=tuple(changes),
        optimizer=run.optimizer,
        scheduler=None if scheduler is None else str(scheduler),
        scheduler_ignored=run.ignored and scheduler is not None,
        warmup_steps=run.warmup if known else 0.0,
        warmup_owner=run.owner if known else "nobody",
        total_steps=run.total_steps,
        epochs=run.epochs,
        devices=run.devices,
        accumulation=run.accumulation,
        resumed=run.resumed if known else None,
        lr=run.lr_t if known else np.empty(0),
        c=run.c if known else np.empty(0),
    )


def field_states(
    config: ConfigLike = None,
    *,
    before: Mapping[str, FieldState] | None = None,
    source: SourceName | None = None,
    **facts: Any,
) -> dict[str, FieldState]:
    """Returns for every field that a choice can switch off: on or off, its value, why, and what to restore.

    A form calls it after every change. A disabled field shows and saves `value`; when the choice that
    disabled it is undone, the field is enabled again with the value it had, which `before` remembers.

    Args:
        config, source, facts: as for `check`.
        before: what the call before this one returned; default None: the first.

    Returns:
        The user's name of the field -> its state.

    Example:
        >>> from sfcore.plan import field_states
        >>> form = {"optimizer": "AdamW", "lr_scheduler": "constant", "lr_warmup": 10}
        >>> off = field_states(form)
        >>> off["lr_warmup"].enabled, off["lr_warmup"].value, off["lr_warmup"].restore
        (False, 0, 10)
        >>> form |= {"lr_scheduler": "cosine", "lr_warmup": off["lr_warmup"].value}
        >>> field_states(form, before=off)["lr_warmup"].value
        10
    """
    run, before = Run(_config.read(config, source, facts)), before or {}
    named = ((field, run.config.name(field)) for field in switchable(run))
    return by_name(run.config, states(run, {field: before[name] for field, name in named if name in before}))


def by_name(config: Config, found: Mapping[str, FieldState]) -> dict[str, FieldState]:
    """Returns the states by the user's names, of which one may be several neutral fields."""
    named: dict[str, FieldState] = {}
    for field, state in found.items():
        name = config.name(field)
        if name not in named or (state.enabled and not named[name].enabled):
            named[name] = state
    return named


def states(run: Run, before: Mapping[str, FieldState]) -> dict[str, FieldState]:
    """Returns the same by neutral fields, of which several may be one field of the user's."""
    found: dict[str, FieldState] = {}
    for field in switchable(run):
        reason, given, off = _reason(run, field), run.config.values.get(field), off_value(field)
        earlier = before.get(field)
        kept = earlier.restore if earlier and not earlier.enabled and given in (None, off) else given
        found[field] = FieldState(not reason, off if reason else kept, reason, kept)
    return found


def off_value(field: str) -> Any:
    """Returns what a disabled field holds."""
    return 0 if field in WARMUP or field == "warmup_steps" else "constant" if field == "scheduler" else None


def switchable(run: Run) -> Iterator[str]:
    """Yields the neutral fields that a choice can switch off, of those that the trainer has."""
    source = run.config.source
    arguments = inner() if source.inner or source.bare_is_ours else ()
    for field in ("scheduler", "scheduler_class", "scheduler_args", *WARMUP, *SHAPE, *arguments):
        if field in source.fields or field in run.config.places or field in arguments:
            yield field


def _reason(run: Run, field: str) -> str:
    """Returns why a field is without effect; "" where it has one."""
    if field == "warmup_steps" and field not in run.kind.uses:
        return f"{run.kind.name} has no warm-up of its own"
    if field in inner():
        return f"{run.kind.name} has no {field}" if field in run.kind.forbids else _lacks(run, field)
    if run.ignored:
        trainer = run.config.source.title.removesuffix(" command line")
        return f"{trainer} ignores it with {run.optimizer}, which needs no schedule"
    setting = "warmup" if field in WARMUP else field
    if run.scheduler is None or setting in ("scheduler", "scheduler_class"):
        return ""
    if setting in (*run.scheduler.needs, *run.scheduler.uses):
        return ""
    if setting == "scheduler_args":
        return f"{run.scheduler_name} takes no arguments"
    if setting == "warmup" and run.config.source.shares_warmup and "warmup_steps" in run.kind.uses:
        return ""  # the same field is the optimizer's own
    verb = "has no" if setting in run.scheduler.forbids else "does not look at"
    return f"{run.scheduler_name} {verb} {'warm-up' if setting == 'warmup' else setting}"


def _lacks(run: Run, field: str) -> str:
    """Returns why the class that will be built does not take an argument of its family; "" if it does."""
    source = run.config.source
    if field in ONLY_OURS and run.kind.schedule_free and not is_ours(run.optimizer, source.bare_is_ours):
        here = run.kind.law is not None and field in run.kind.uses and not source.shares_warmup
        instead = f"; {_rules.full_name(run)} has" if here else ""
        return f"{run.optimizer} has no {field}{instead}"
    takes = run.built.arguments if source.dummy_scheduler else None
    called = {"beta": ("betas", "momentum", "beta1"), "b2": ("betas",)}.get(field, (field,))
    return "" if takes is None or {*called} & {*takes} else f"{run.optimizer} has no {field}"
