"""What differs between a checkpoint and the configuration that resumes it: a table, and what is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sfcore.changes import Change, carried_sum, comparable, effect_of, of_optimizer
from sfcore.hyperparameters import NEXT
from sfcore.meta import Meta
from sftorch.checkpoint import _arrays
from sftorch.law.scalars import Clock
from sftorch.state.state_dict import ScheduleFreeOptimizer

_SCHEDULED = "build the lr scheduler before restore() and load its state to go on with it"


def saved_owners(meta: Meta) -> dict[str, dict[str, Any]]:
    """Returns for each parameter the saved group that held it."""
    return {name: group for group in meta.groups for name in group["parameters"]}


def saved_groups(
    optimizer: ScheduleFreeOptimizer, meta: Meta, names: Mapping[Any, str]
) -> list[dict[str, Any]]:
    """Returns for each live group the saved group of its first parameter."""
    owner = saved_owners(meta)
    return [
        owner[names[group["params"][0]]] if group["params"] else meta.groups[min(i, len(meta.groups) - 1)]
        for i, group in enumerate(optimizer.param_groups)
    ]


def compare(optimizer: ScheduleFreeOptimizer, meta: Meta, groups: list[dict[str, Any]]) -> list[Change]:
    """Returns the table: the optimizer, then group by group what its user configured otherwise."""
    found = []
    if meta.optimizer != optimizer.law.name:
        found.append(of_optimizer(None, meta.optimizer, optimizer.law.name))
    if len(groups) != len(meta.groups):
        effect = "each group goes on from the clock of its first parameter's former group"
        found.append(Change("parameter groups", None, len(meta.groups), len(groups), effect))
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        found += of_group(optimizer, index, group, saved, meta.optimizer)
        if meta.optimizer == optimizer.law.name == "wrapper":
            found += _base(optimizer, index, group, saved)
    return found


def values_of(
    optimizer: ScheduleFreeOptimizer, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the hyperparameters that a group goes on with.

    They are the configured ones, but prior_steps follow the checkpoint unless some are configured: a start
    from weights sets them by itself.
    """
    values, _ = optimizer._values(dict(group))
    return values | {"prior_steps": values["prior_steps"] or saved["hyperparameters"].get("prior_steps", 0)}


def of_group(
    optimizer: ScheduleFreeOptimizer,
    index: int,
    group: Mapping[str, Any],
    saved: Mapping[str, Any],
    saved_kind: str,
) -> list[Change]:
    """Returns the rows for the hyperparameters of one group; learning rates only where they compare."""
    values = values_of(optimizer, group, saved)
    defaults = {field.name: field.default for field in fields(optimizer.law.options)}
    old = defaults | saved["hyperparameters"]
    for option, default in (("maximize", False), ("precision", "exact"), ("seed", 0)):
        if option in group:
            values |= {option: group[option]}
            old |= {option: options_of(saved).get(option, default)}
    del values["lr"]
    if scheduled_beta(optimizer, group, saved):
        del values["beta"]
    rows = [Change(k, index, old[k], v, effect_of(k)) for k, v in values.items() if old.get(k, v) != v]
    before, now, scheduled = lrs(optimizer, group, saved)
    if before != now and comparable(saved_kind, optimizer.law.name):
        effect = f"{effect_of('lr')}; {_SCHEDULED}" if scheduled else effect_of("lr")
        rows.insert(0, Change("lr", index, before, now, effect))
    return rows


def options_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the torch options of a saved group; a checkpoint from JAX has none."""
    found: dict[str, Any] = _arrays.decode(saved.get("torch", {}).get("options", {}), {})
    return found


def lrs(
    optimizer: ScheduleFreeOptimizer, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> tuple[float, float, bool]:
    """Returns the saved and the configured lr, and whether a scheduler that is gone drove the saved one.

    Where a scheduler drives both, its base lr is the configuration. ReduceLROnPlateau notes none; there and
    where the program sets lr itself, it is what the group was built with.
    """
    options = options_of(saved)
    current, now = options.get("lr", saved["hyperparameters"]["lr"]), float(group["lr"])
    was, is_scheduled = "initial_lr" in options, "initial_lr" in group
    if was and is_scheduled:
        return options["initial_lr"], float(group["initial_lr"]), False
    built = optimizer._built_lr(group)  # type: ignore[arg-type]
    if not (was or is_scheduled) and now == built == saved.get("torch", {}).get("built_lr"):
        return now, now, False
    return current, now, was


def scheduled_beta(
    optimizer: ScheduleFreeOptimizer, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the option with the saved beta where OneCycleLR or CyclicLR drives both, {} otherwise."""
    options = options_of(saved)
    driven = all("base_momentum" in one for one in (options, group))  # which these two leave there
    if not driven or optimizer.law.name == "wrapper":  # whose base's momentum they drive
        return {}
    if "betas" in group and "betas" in options:
        return {"betas": (options["betas"][0], *group["betas"][1:])}
    return {key: options[key] for key in ("momentum",) if key in group and key in options}


def _base(optimizer: Any, index: int, group: Mapping[str, Any], saved: Mapping[str, Any]) -> list[Change]:
    about, name = saved.get("torch", {}), type(optimizer.base).__name__
    if about.get("base", name) != name:
        return [Change("base", index, about["base"], name, "the base's state starts anew")]
    changed = base_options(optimizer, group, saved)[1]
    return [Change(key, index, old, new, NEXT) for key, (old, new) in changed.items()]


def base_options(
    optimizer: Any, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Returns the base's options that the checkpoint sets, and those that its user configured otherwise.

    Some bases keep state among their options (Prodigy's d), so a value follows the checkpoint unless
    the default that the base was constructed with has changed too.
    """
    defaults = _arrays.decode(saved.get("torch", {}).get("base_defaults", {}), {})
    restored, changed = {}, {}
    for key, old in options_of(saved).items():
        if key in ("lr", "initial_lr") or key not in optimizer.base.defaults:
            continue
        now = group.get(key)
        if now == old:
            continue
        if key in defaults and defaults[key] != optimizer.base.defaults[key]:
            changed[key] = (old, now)
        else:
            restored[key] = old
    return restored, changed


def carry(
    clock: Mapping[str, Any],
    saved: Mapping[str, Any],
    values: Mapping[str, Any],
    same_units: bool,
    new_v: bool,
) -> Clock:
    """Returns the clock that a parameter or group goes on with under the configured hyperparameters.

    Args:
        clock: as saved: step, lr_max, weight_sum, and more or not.
        saved: the saved hyperparameters.
        values: the configured ones.
        same_units: False if the lr of the saved optimizer means something else.
        new_v: the second moment starts at 0, so its bias correction must start at t = 1.
    """
    new_lr = None if same_units else values["lr"]
    lr_max, weight_sum = carried_sum(clock, saved, values, new_lr)
    return Clock(0 if new_v else clock["step"], lr_max, weight_sum)
