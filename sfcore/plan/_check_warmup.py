"""Rules about warm-up and the count of steps: SF201 to SF208."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sfcore.plan import _fields
from sfcore.plan._check_schedule import given_warmups, no_warmup
from sfcore.plan._model import Problem
from sfcore.plan._rules import problem
from sfcore.plan._run import Run

_SHARE = 0.05  # of the run; README of facebookresearch/schedule_free, and the paper's experiments


def find(run: Run) -> Iterator[Problem]:
    """Yields the problems of warm-ups and counts."""
    yield from two_owners(run)
    yield from not_whole(run)
    yield from said_twice(run)
    yield from too_long(run)
    yield from run_in_micro_batches(run)
    yield from on_radam(run)
    yield from none_at_all(run)
    yield from several_devices(run)


def two_owners(run: Run) -> Iterator[Problem]:
    """SF201: the optimizer and the scheduler both ramp the lr."""
    if run.owner != "both":
        return
    name, found = run.config.name, f"optimizer {run.own_warmup:g}, scheduler {run.scheduler_warmup:g} steps"
    if run.config.source.shares_warmup:
        fix = f"choose {name('scheduler')} = constant, so that only the optimizer warms up"
        yield problem(run, "SF201", "warmup_steps", found, fix, {"scheduler": "constant"})
    else:
        fix = f"keep {name('warmup_steps')} and set {name(given_warmups(run)[0])} to 0"
        yield problem(run, "SF201", given_warmups(run)[0], found, fix, no_warmup(run))


def _fields_of_steps(run: Run) -> list[str]:
    """Returns the fields that mean a number of steps and hold one, each place once."""
    found: dict[Any, str] = {}
    for field in ("warmup_steps", "scheduler_warmup_steps"):
        if field in run.config.places and run.config.values[field] > 0:
            found.setdefault(run.config.places[field], field)
    return list(found.values())


def not_whole(run: Run) -> Iterator[Problem]:
    """SF202: a fraction where steps are meant."""
    for field in _fields_of_steps(run):
        value = run.config.values[field]
        if float(value).is_integer():
            continue
        steps = value if value > 1 else value * run.total_steps if run.total_steps else None
        fix = "pass steps, not a fraction: round(fraction * total_optimizer_steps)"
        if steps is not None and math.isfinite(steps):
            fix = f"pass {max(1, round(steps))}, which is that part of {run.total_steps} steps"
            yield problem(run, "SF202", field, value, fix, {field: max(1, round(steps))})
        else:
            fix += f"; say {run.config.name('total_steps')}, and fix=True computes it"
            yield problem(run, "SF202", field, value, fix)


def said_twice(run: Run) -> Iterator[Problem]:
    """SF203: steps and a share of the run."""
    given = given_warmups(run)
    places = {run.config.places[name] for name in given}
    if len(places) < 2:
        return
    for field in given:
        if field != "scheduler_warmup_steps":
            fix = f"keep {run.config.name(given[0])} and take this away"
            value = None if field == "scheduler_warmup_fraction" else 0
            yield problem(run, "SF203", field, run.config.values[field], fix, {field: value})


def too_long(run: Run) -> Iterator[Problem]:
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
        unit = total * (run.devices if run.config.source.steps_per_process and field != "warmup_steps" else 1)
        value = run.config.values[field]
        in_steps = field in ("warmup_steps", "scheduler_warmup_steps")
        right = max(1, round(value / run.accumulation))
        if in_steps and run.accumulation > 1 and steps < total * run.accumulation and right < total:
            fix = f"divide it by {run.config.name('accumulation')} = {run.accumulation}: {right}"
            yield problem(run, "SF205", field, value, fix, {field: right}, f"The run has {total}.")
        else:
            share = {"scheduler_warmup_fraction": _SHARE, "scheduler_warmup_percent": 100 * _SHARE}
            right = share.get(field, max(1, round(_SHARE * unit))) if total > 1 else 0
            fix = f"5% of the run is usual: {right:g}"
            yield problem(run, "SF204", field, value, fix, {field: right}, f"The run has {total} steps.")


def run_in_micro_batches(run: Run) -> Iterator[Problem]:
    """SF205: the length of the run in micro-batches of its own data."""
    get = run.config.values.get
    total, epochs, micro = get("total_steps"), get("epochs"), run.micro_steps_per_epoch
    if not (total and epochs and micro and run.accumulation > 1) or run.total_steps != total:
        return
    if abs(total - epochs * micro) <= 0.01 * total:
        right = math.ceil(epochs * math.ceil(micro / run.accumulation))
        fix = f"divide it by {run.config.name('accumulation')} = {run.accumulation}: {right}"
        yield problem(run, "SF205", "total_steps", total, fix, {"total_steps": right})


def on_radam(run: Run) -> Iterator[Problem]:
    """SF206: a warm-up on RAdam, given to it or by a scheduler."""
    if not run.kind.rectified:
        return
    values = run.config.values
    places: dict[Any, str] = {}
    for field in ("warmup_steps", *(given_warmups(run) if run.scheduler_acts else ())):
        if values.get(field):
            places.setdefault(run.config.places[field], field)
    for field in places.values():
        change = {field: None if field == "warmup_steps" and not run.config.source.shares_warmup else 0}
        yield problem(run, "SF206", field, values[field], "remove it", change)


def none_at_all(run: Run) -> Iterator[Problem]:
    """SF207: Schedule-Free SGD or AdamW from scratch without a warm-up."""
    wanted = "warmup_steps" in run.kind.uses and run.owner == "nobody" and not given_warmups(run)
    if wanted and not run.config.get("prior_steps") and not run.config.get("resume"):
        right = max(1, round(_SHARE * run.total_steps)) if run.total_steps else None
        fix = f"set it to {right}" if right else "set it to 5% of the optimizer steps"
        changes = {"warmup_steps": right} if right and right < (run.total_steps or 0) else None
        yield problem(run, "SF207", "warmup_steps", run.config.get("warmup_steps", 0), fix, changes)


def several_devices(run: Run) -> Iterator[Problem]:
    """SF208: steps of a scheduler that counts every process."""
    steps = run.config.values.get("scheduler_warmup_steps")
    if not (run.config.source.steps_per_process and run.devices > 1 and run.scheduler_acts and steps):
        return
    fix, changes = "write it as a fraction of the run", None
    if run.total_steps and _fields.whole(steps) and steps < run.total_steps:
        fraction = round(steps / run.total_steps, 6)
        fix = f"{fix}: {fraction}"
        changes = {"scheduler_warmup_steps": None, "scheduler_warmup_fraction": fraction}
    detail = f"On {run.devices} devices it is {run.scheduler_warmup:g} optimizer steps."
    yield problem(run, "SF208", "scheduler_warmup_steps", steps, fix, changes, detail)
