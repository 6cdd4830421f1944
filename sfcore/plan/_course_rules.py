"""The rules of schedulers, of warm-up and of the count of steps: the functions that look."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sfcore import laws
from sfcore.checks import nearest
from sfcore.plan._config import Place
from sfcore.plan._rules import Problems, problem
from sfcore.plan._run import Run
from sfcore.plan._tables import DATA_DRIVEN, SCHEDULERS, SHAPE, WARMUP, is_adafactor, whole

# Schedulers: SF101 to SF107.

# What a form fills in for every scheduler: no statement.
_UNSAID = {"scheduler_cycles": (0, 1), "scheduler_power": (0, 1), "scheduler_min_lr_ratio": (0,)}


def given_warmups(run: Run) -> list[str]:
    """Returns the neutral fields of the scheduler's warm-up that say something."""
    return [name for name in WARMUP if run.config.values.get(name)]


def _is_own(run: Run, field: str) -> bool:
    """Returns whether a field of the scheduler's warm-up is the optimizer's own too."""
    shared = run.config.source.shares_warmup and run.own_warmup
    return bool(shared and run.config.places[field].key == "warmup_steps")


def no_warmup(run: Run) -> dict[str, Any]:
    """Returns the changes that leave the scheduler no warm-up."""
    of_none = ("scheduler_warmup_fraction", "warmup_ratio")  # fields that have no 0
    given = [name for name in given_warmups(run) if not _is_own(run, name)]
    return {name: None if run.config.places[name].key in of_none else 0 for name in given}


def _to_the_optimizer(run: Run) -> dict[str, Any]:
    """Returns the changes that hand the scheduler's warm-up to the optimizer; None of them if unknown."""
    changes = no_warmup(run)
    if not changes or "warmup_steps" not in run.kind.uses or run.own_warmup:
        return changes
    if not math.isfinite(run.scheduler_warmup):  # part of a run of unknown length, or of one without end
        return {}
    return changes | {"warmup_steps": round(run.scheduler_warmup)}


def ignored_by_trainer(run: Run) -> Problems:
    """SF103: whatever the scheduler is told, under a dummy scheduler."""
    values, name = run.config.values, run.config.name
    if run.has_schedule and run.scheduler_name != "constant":
        field = "scheduler" if run.scheduler_name else "scheduler_class"
        changes: dict[str, Any] = {"scheduler": "constant", "scheduler_class": None, "scheduler_args": None}
        given = {key: value for key, value in changes.items() if key in values}
        fix = f"choose {name('scheduler')} = constant, which is what the run does"
        yield problem(run, "SF103", field, fix, given, found=values.get(field))
    for field in given_warmups(run):
        changes = _to_the_optimizer(run)
        steps = changes.get("warmup_steps", "STEPS")
        option = f"{run.config.source.prefix}{run.config.source.inner}"
        fix = f"put warmup_steps={steps} into {option} and set this to 0"
        if "warmup_steps" not in run.kind.uses:
            fix = "set it to 0"
        elif not changes:
            fix += ", or say samples= so that the steps can be computed"
        yield problem(run, "SF103", field, fix, changes)
    for field in SHAPE:
        if field in values and values[field] not in _UNSAID.get(field, (0,)):
            yield problem(run, "SF103", field, "remove it", {field: None})


def scheduler(run: Run) -> Problems:
    """SF101 to SF107, of which there is only SF103 where the trainer ignores the scheduler."""
    if run.ignored:
        yield from ignored_by_trainer(run)
        return
    name, kind = run.scheduler_name, run.scheduler
    known = run.config.source.dummy_scheduler or name in (None, *SCHEDULERS, *DATA_DRIVEN)
    if name is not None and not known:
        near = nearest(name, SCHEDULERS)
        fix = f"did you mean {near}?" if near else f"choose one of {', '.join(SCHEDULERS)}"
        yield problem(run, "SF106", "scheduler", fix, {"scheduler": near} if near else None, found=name)
    if kind is None:
        return
    yield from needless_warmup(run)
    if run.kind.shuns_schedules and kind.decays:
        fix = f"choose {run.config.name('scheduler')} = constant"
        changes = {"scheduler": "constant"} | (_to_the_optimizer(run) if run.scheduler_acts else {})
        yield problem(run, "SF102", "scheduler", fix, changes, found=name)
    if run.config.source.dummy_scheduler or not (run.kind.shuns_schedules and kind.decays):
        yield from missing(run, kind.needs)  # elsewhere, what is to go needs nothing
    ignores = kind.ignores()
    for field in (*given_warmups(run), *SHAPE):
        value = run.config.values.get(field)
        without_effect = ("warmup" if field in WARMUP else field) in ignores
        if without_effect and value is not None and value not in _UNSAID.get(field, (0,)):
            change = {field: 0 if field in WARMUP else None}
            fix = "remove it, or choose another scheduler"
            yield problem(run, "SF105", field, fix, change, f"It is {name}.")
    is_one = is_adafactor(run.optimizer)
    if run.config.source.dummy_scheduler:  # it asks for the very class of transformers
        is_one = (
            run.optimizer.lower() == "adafactor" or run.optimizer == "transformers.optimization.Adafactor"
        )
    if name == "adafactor" and not is_one:
        fix = f"choose {run.config.name('scheduler')} = constant, or the optimizer Adafactor"
        yield problem(run, "SF107", "scheduler", fix, {"scheduler": "constant"}, found=name)


def needless_warmup(run: Run) -> Problems:
    """SF101: a warm-up for a scheduler that has none, unless the same field is the optimizer's own."""
    if run.scheduler is None or "warmup" not in run.scheduler.forbids:
        return
    for field in given_warmups(run) if run.scheduler_warmup else ():
        if _is_own(run, field):
            continue
        if run.kind.schedule_free:
            changes, fix = _to_the_optimizer(run), "give warmup_steps to the optimizer, or set this to 0"
        elif run.scheduler_name == "constant":
            changes = {"scheduler": "constant_with_warmup"}
            fix = f"choose {run.config.name('scheduler')} = constant_with_warmup, or set this to 0"
        else:
            changes, fix = no_warmup(run), "set it to 0"
        yield problem(run, "SF101", field, fix, changes)


def missing(run: Run, needs: tuple[str, ...]) -> Problems:
    """SF104: what the scheduler needs and nobody has said."""
    for field in needs:
        said = bool(run.config.get(field))
        if field == "total_steps":  # a trainer counts its data when it starts
            said = run.total_steps is not None or not run.config.source.bare_is_ours
        if run.config.source.dummy_scheduler:
            # Of the others, `built_scheduler` speaks; a decay has its default, 0.
            said = (
                field != "scheduler_min_lr_ratio"
                or "min_lr" in run.config.schedule_arguments
                or (run.config.get(field) is not None)
            )
        if not said:
            fix = f"set {run.config.name(field)}, or choose {run.config.name('scheduler')} = constant"
            changes = {"scheduler": "constant"} | no_warmup(run)
            yield problem(run, "SF104", field, fix, changes, f"It is {run.scheduler_name}.", None)


# Warm-up and the count of steps: SF201 to SF208.

_SHARE = 0.05  # of the run; README of facebookresearch/schedule_free, and the paper's experiments


def two_owners(run: Run) -> Problems:
    """SF201: the optimizer and the scheduler both ramp the lr."""
    if run.owner != "both":
        return
    name, found = run.config.name, f"optimizer {run.own_warmup:g}, scheduler {run.scheduler_warmup:g} steps"
    if run.config.source.shares_warmup:
        fix = f"choose {name('scheduler')} = constant, so that only the optimizer warms up"
        yield problem(run, "SF201", "warmup_steps", fix, {"scheduler": "constant"}, found=found)
    else:
        first = given_warmups(run)[0]
        fix = f"keep {name('warmup_steps')} and set {name(first)} to 0"
        yield problem(run, "SF201", first, fix, no_warmup(run), found=found)


def _each_place_once(run: Run, names: Iterator[str]) -> list[str]:
    """Returns the given fields that say something, of those that share a place in the file the first."""
    found: dict[Place, str] = {}
    for name in names:
        if run.config.values.get(name):
            found.setdefault(run.config.places[name], name)
    return list(found.values())


def not_whole(run: Run) -> Problems:
    """SF202: a fraction where steps are meant."""
    for field in _each_place_once(run, iter(("warmup_steps", "scheduler_warmup_steps"))):
        value = run.config.values[field]
        if value < 0 or float(value).is_integer():
            continue
        steps = value if value > 1 else value * run.total_steps if run.total_steps else None
        if steps is not None and math.isfinite(steps):
            fix = f"pass {max(1, round(steps))}, which is that part of {run.total_steps} steps"
            yield problem(run, "SF202", field, fix, {field: max(1, round(steps))})
        else:
            fix = "pass steps, not a fraction: round(fraction * total_optimizer_steps); say "
            yield problem(
                run, "SF202", field, f"{fix}{run.config.name('total_steps')}, and fix=True computes it"
            )


def said_twice(run: Run) -> Problems:
    """SF203: steps and a share of the run."""
    given = given_warmups(run)
    if len({run.config.places[name] for name in given}) < 2:
        return
    for field in given:
        if field != "scheduler_warmup_steps":
            fix = f"keep {run.config.name(given[0])} and take this away"
            yield problem(
                run, "SF203", field, fix, {field: None if field == "scheduler_warmup_fraction" else 0}
            )


def too_long(run: Run) -> Problems:
    """SF204 and SF205: a warm-up that does not end before the run."""
    total = run.total_steps
    if total is None:
        return
    acting = (["warmup_steps"] if run.own_warmup else []) + (given_warmups(run) if run.scheduler_acts else [])
    seen = set()
    for field in acting:
        place = run.config.places[field]
        steps = run.own_warmup if field == "warmup_steps" else run.scheduler_warmup
        if place in seen or not steps >= total:
            continue
        seen.add(place)
        unit = total * (1 if field == "warmup_steps" else run.scheduler_devices)
        in_steps = field in ("warmup_steps", "scheduler_warmup_steps")
        right: float = max(1, round(run.config.values[field] / run.accumulation))
        if in_steps and run.accumulation > 1 and steps < total * run.accumulation and right < total:
            fix = f"divide it by {run.config.name('accumulation')} = {run.accumulation}: {right}"
            yield problem(run, "SF205", field, fix, {field: right}, f"The run has {total}.")
        else:
            share = {"scheduler_warmup_fraction": _SHARE, "scheduler_warmup_percent": 100 * _SHARE}
            right = share.get(field, max(1, round(_SHARE * unit))) if total > 1 else 0
            fix = f"5% of the run is usual: {right:g}"
            yield problem(run, "SF204", field, fix, {field: right}, f"The run has {total} steps.")


def run_in_micro_batches(run: Run) -> Problems:
    """SF205: the length of the run in micro-batches of its own data."""
    get = run.config.values.get
    total, epochs, micro = get("total_steps"), get("epochs"), run.micro_steps_per_epoch
    if not (total and epochs and micro and run.accumulation > 1) or run.total_steps != total:
        return
    if abs(total - epochs * micro) <= 0.01 * total:
        right = math.ceil(epochs * math.ceil(micro / run.accumulation))
        fix = f"divide it by {run.config.name('accumulation')} = {run.accumulation}: {right}"
        yield problem(run, "SF205", "total_steps", fix, {"total_steps": right})


def warmup_on_radam(run: Run) -> Problems:
    """SF206: a warm-up on RAdam, given to it or by a scheduler."""
    if not run.kind.rectified:
        return
    for field in _each_place_once(
        run, iter(("warmup_steps", *(given_warmups(run) if run.scheduler_acts else ())))
    ):
        own = field == "warmup_steps" and not run.config.source.shares_warmup
        yield problem(run, "SF206", field, "remove it", {field: None if own else 0})


def no_warmup_at_all(run: Run) -> Problems:
    """SF207: from scratch without the warm-up that the optimizer has."""
    wanted = "warmup_steps" in run.kind.uses and run.owner == "nobody" and not given_warmups(run)
    wanted = wanted and run.kind.law is not laws.MEMBERS["plus"]  # whose step follows the loss
    if wanted and not run.config.get("prior_steps") and not run.config.get("resume"):
        right = max(1, round(_SHARE * run.total_steps)) if run.total_steps else None
        fix = f"set it to {right}" if right else "set it to 5% of the optimizer steps"
        changes = {"warmup_steps": right} if right and right < (run.total_steps or 0) else None
        yield problem(run, "SF207", "warmup_steps", fix, changes, found=run.config.get("warmup_steps", 0))


def several_devices(run: Run) -> Problems:
    """SF208: steps of a scheduler that counts every process."""
    steps = run.config.values.get("scheduler_warmup_steps")
    if not (run.scheduler_devices > 1 and run.scheduler_acts and steps):
        return
    fix, changes = "write it as a fraction of the run", None
    if run.total_steps and whole(steps) and steps < run.total_steps:
        fraction = round(steps / run.total_steps, 6)
        fix = f"{fix}: {fraction}"
        changes = {"scheduler_warmup_steps": None, "scheduler_warmup_fraction": fraction}
    detail = f"On {run.devices} devices it is {run.scheduler_warmup:g} optimizer steps."
    yield problem(run, "SF208", "scheduler_warmup_steps", fix, changes, detail)


COURSE = (
    scheduler,
    two_owners,
    not_whole,
    said_twice,
    too_long,
    run_in_micro_batches,
    warmup_on_radam,
    no_warmup_at_all,
    several_devices,
)
