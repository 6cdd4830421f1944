"""Rules about schedulers: SF101 to SF107."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sfcore.checks import nearest
from sfcore.plan._model import Problem
from sfcore.plan._rules import problem
from sfcore.plan._run import Run
from sfcore.plan._tables import DATA_DRIVEN, SCHEDULERS, SHAPE, WARMUP, is_adafactor

# What a form fills in for every scheduler: no statement.
_UNSAID = {"scheduler_cycles": (0, 1), "scheduler_power": (0, 1), "scheduler_min_lr_ratio": (0,)}


def find(run: Run) -> Iterator[Problem]:
    """Yields the problems of the scheduler."""
    if run.ignored:
        yield from ignored_by_trainer(run)
        return
    yield from unknown(run)
    if run.scheduler is None:
        return
    yield from needless_warmup(run)
    yield from decaying(run)
    yield from missing(run)
    yield from without_effect(run)
    if run.scheduler_name == "adafactor" and not is_adafactor(run.optimizer):
        fix = f"choose {run.config.name('scheduler')} = constant, or the optimizer Adafactor"
        yield problem(run, "SF107", "scheduler", "adafactor", fix, {"scheduler": "constant"})


def given_warmups(run: Run) -> list[str]:
    """Returns the neutral fields of the scheduler's warm-up that say something."""
    return [name for name in WARMUP if run.config.values.get(name)]


def no_warmup(run: Run) -> dict[str, Any]:
    """Returns the changes that leave the scheduler no warm-up."""
    shared = run.config.source.shares_warmup
    return {
        name: None if run.config.places[name].key in ("scheduler_warmup_fraction", "warmup_ratio") else 0
        for name in given_warmups(run)
        if not (shared and run.own_warmup and run.config.places[name].key == "warmup_steps")
    }


def to_the_optimizer(run: Run) -> dict[str, Any]:
    """Returns the changes that hand the scheduler's warm-up to the optimizer; None of them if unknown."""
    changes = no_warmup(run)
    if not changes or "warmup_steps" not in run.kind.uses or run.own_warmup:
        return changes
    if run.scheduler_warmup != run.scheduler_warmup:  # part of a run of unknown length
        return {}
    return changes | {"warmup_steps": round(run.scheduler_warmup)}


def ignored_by_trainer(run: Run) -> Iterator[Problem]:
    """SF103: whatever the scheduler is told, under a dummy scheduler."""
    values, name = run.config.values, run.config.name
    if run.has_schedule and run.scheduler_name != "constant":
        field = "scheduler" if run.scheduler_name else "scheduler_class"
        changes: dict[str, Any] = {"scheduler": "constant", "scheduler_class": None, "scheduler_args": None}
        given = {key: value for key, value in changes.items() if key in values}
        fix = f"choose {name('scheduler')} = constant, which is what the run does"
        yield problem(run, "SF103", field, values.get(field), fix, given)
    for field in given_warmups(run):
        changes = to_the_optimizer(run)
        steps = changes.get("warmup_steps", "STEPS")
        option = f"{run.config.source.prefix}{run.config.source.inner}"
        fix = f"put warmup_steps={steps} into {option} and set this to 0"
        if "warmup_steps" not in run.kind.uses:
            fix = "set it to 0"
        elif not changes:
            fix += ", or say samples= so that the steps can be computed"
        yield problem(run, "SF103", field, values[field], fix, changes)
    for field in SHAPE:
        if field in values and values[field] not in _UNSAID.get(field, (0,)):
            yield problem(run, "SF103", field, values[field], "remove it", {field: None})


def unknown(run: Run) -> Iterator[Problem]:
    """SF106: a scheduler that nobody knows."""
    name = run.scheduler_name
    if name is None or name in SCHEDULERS or name in DATA_DRIVEN:
        return
    near = nearest(name, SCHEDULERS)
    fix = f"did you mean {near}?" if near else f"choose one of {', '.join(SCHEDULERS)}"
    yield problem(run, "SF106", "scheduler", name, fix, {"scheduler": near} if near else None)


def needless_warmup(run: Run) -> Iterator[Problem]:
    """SF101: a warm-up for a scheduler that has none, unless the same field is the optimizer's own."""
    if run.scheduler is None or "warmup" not in run.scheduler.forbids:
        return
    shared = run.config.source.shares_warmup and run.own_warmup
    for field in given_warmups(run):
        if shared and run.config.places[field].key == "warmup_steps":
            continue
        ways = f"choose {run.config.name('scheduler')} = constant_with_warmup, or set this to 0"
        if run.kind.schedule_free:
            changes, ways = to_the_optimizer(run), "give warmup_steps to the optimizer, or set this to 0"
        elif run.scheduler_name == "constant":
            changes = {"scheduler": "constant_with_warmup"}
        else:
            changes, ways = no_warmup(run), "set it to 0"
        yield problem(run, "SF101", field, run.config.values[field], ways, changes)


def decaying(run: Run) -> Iterator[Problem]:
    """SF102: a scheduler that lowers the lr of a Schedule-Free optimizer."""
    if run.kind.schedule_free and run.scheduler is not None and run.scheduler.decays:
        changes = {"scheduler": "constant"} | (to_the_optimizer(run) if run.scheduler_acts else {})
        fix = f"choose {run.config.name('scheduler')} = constant"
        yield problem(run, "SF102", "scheduler", run.scheduler_name, fix, changes)


def missing(run: Run) -> Iterator[Problem]:
    """SF104: what the scheduler needs and nobody has said."""
    if run.scheduler is None or (run.kind.schedule_free and run.scheduler.decays):
        return  # the second is to go, so it needs nothing
    for field in run.scheduler.needs:
        if field == "total_steps":
            # A trainer counts its data when it starts.
            said = run.total_steps is not None or not run.config.source.bare_is_ours
        else:
            said = bool(run.config.get(field))
        if not said:
            fix = f"set {run.config.name(field)}, or choose {run.config.name('scheduler')} = constant"
            detail = f"It is {run.scheduler_name}."
            yield problem(run, "SF104", field, None, fix, {"scheduler": "constant"} | no_warmup(run), detail)


def without_effect(run: Run) -> Iterator[Problem]:
    """SF105: what the scheduler does not look at."""
    if run.scheduler is None:
        return
    ignores = run.scheduler.ignores()
    for field in (*given_warmups(run), *SHAPE):
        value = run.config.values.get(field)
        if ("warmup" if field in WARMUP else field) not in ignores or value is None:
            continue
        if value not in _UNSAID.get(field, (0,)):
            change: dict[str, Any] = {field: 0 if field in WARMUP else None}
            detail = f"It is {run.scheduler_name}."
            yield problem(
                run, "SF105", field, value, "remove it, or choose another scheduler", change, detail
            )
