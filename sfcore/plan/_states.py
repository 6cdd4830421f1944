"""What a form needs: which fields are on, what to show in them, and what to give back later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sfcore.plan import _fields, _read
from sfcore.plan._model import FieldState
from sfcore.plan._read import ConfigLike, SourceName
from sfcore.plan._run import Run
from sfcore.plan._tables import SHAPE, WARMUP


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
    run = Run(_read.read(config, source, facts))
    states: dict[str, FieldState] = {}
    for field in _switchable(run):
        name = run.config.name(field)
        reason = _reason(run, field)
        given = run.config.values.get(field)
        earlier = (before or {}).get(name)
        kept = earlier.restore if earlier and not earlier.enabled and given in (None, _off(field)) else given
        state = FieldState(not reason, _off(field) if reason else kept, reason, kept)
        if name not in states or (reason == "" and not states[name].enabled):
            states[name] = state
    return states


def _switchable(run: Run) -> Iterator[str]:
    source = run.config.source
    inner = _fields.inner() if source.inner or source.bare_is_ours else ()
    for field in ("scheduler", "scheduler_class", "scheduler_args", *WARMUP, *SHAPE, *inner):
        if field in source.fields or field in run.config.places or field in inner:
            yield field


def _off(field: str) -> Any:
    return 0 if field in WARMUP or field == "warmup_steps" else "constant" if field == "scheduler" else None


def _reason(run: Run, field: str) -> str:
    """Returns why a field is without effect; "" where it has one."""
    if field == "warmup_steps" and field not in run.kind.uses:
        return f"{run.kind.name} has no warm-up of its own"
    if field in _fields.inner():
        return f"{run.kind.name} has no {field}" if field in run.kind.forbids else ""
    if run.ignored:
        return f"{run.config.source.title} ignores it with {run.optimizer}, which needs no schedule"
    if field == "scheduler":
        return ""
    setting = "warmup" if field in WARMUP else field
    if run.scheduler is None or setting in (*run.scheduler.needs, *run.scheduler.uses):
        return ""
    if setting in ("scheduler_args", "scheduler_class"):
        return "" if setting == "scheduler_class" else f"{run.scheduler_name} takes no arguments"
    if setting == "warmup" and run.config.source.shares_warmup and "warmup_steps" in run.kind.uses:
        return ""  # the same field is the optimizer's own
    verb = "has no" if setting in run.scheduler.forbids else "does not look at"
    return f"{run.scheduler_name} {verb} {'warm-up' if setting == 'warmup' else setting}"
