"""What differs between a checkpoint and the configuration that resumes it, where both are known."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sfcore.changes import Change, carried_sum, effect_of, kind_of, of_batches, of_optimizer, same
from sfcore.exchange import CheckpointError
from sfcore.laws import JAX_NAMES
from sfcore.meta import Meta
from sfjax.checkpoint._record import Configured

_INJECTED = (
    "optax.inject_hyperparams keeps the saved value in its state, and goes on with it; write the configured "
    "one into opt_state.hyperparams"
)


def compare(
    meta: Meta,
    groups: Sequence[tuple[Mapping[str, Any], Configured]],
    accumulation: Mapping[str, int] | None,
    injected: Collection[str] = (),
) -> list[Change]:
    """Returns the table.

    Args:
        meta: the checkpoint's record.
        groups: (saved group, configuration) a state of the target; hyperparameters that either leaves out
            are not compared.
        accumulation: the configured Meta.accumulation, or None if it is not known.
        injected: arguments that the state itself holds, from `_leaves.injected`.
    """
    found = []
    for index, (group, configured) in enumerate(groups):
        number, saved = index if len(groups) > 1 else None, group["hyperparameters"]
        kind = kind_of(meta, group)
        if not same(kind, configured.optimizer):
            found.append(of_optimizer(number, kind, configured.optimizer))
        found += [
            Change(name, number, saved[name], value, _effect(name, injected))
            for name, value in configured.values.items()
            if name in saved and not _equal(saved[name], value) and not _goes_on(name, saved, configured)
            if name != "beta" or not _is_in_doubt(group, configured)
        ]
    now = accumulation or {}
    return found + of_batches(meta.accumulation, now.get("steps"), now.get("batch_size"))


def _goes_on(name: str, saved: Mapping[str, Any], configured: Configured) -> bool:
    """Tells whether the saved beta is that of a step, which a record without its rule has for the first."""
    rule = configured.values.get("beta_rule", "constant")
    return name == "beta" and "beta_rule" not in saved and rule != "constant"


def doubts(groups: Sequence[tuple[Mapping[str, Any], Configured]]) -> list[str]:
    """Returns a sentence a state whose beta has risen, where nobody said whether a rule has raised it."""
    return [
        f"beta: it has risen to {group['hyperparameters']['beta']:g}, or was that, and begins at "
        f"{configured.values['beta']:g}: if by b1_rule, it goes on as it was, else y moves in the next step "
        "so that x stays; say which with hyperparameters=, here or when saving"
        for group, configured in groups
        if _is_in_doubt(group, configured)
    ]


def _is_in_doubt(group: Mapping[str, Any], configured: Configured) -> bool:
    """Tells whether both betas are known from states alone, which do not know of a rule."""
    saved, now = group["hyperparameters"], configured.values.get("beta")
    unknown = "beta_rule" not in saved and not {"beta", "beta_rule"} & {*configured.chosen}
    told = saved.get("beta")
    return unknown and now is not None and told is not None and not _equal(told, now) and told > now


def _effect(name: str, injected: Collection[str]) -> str:
    return _INJECTED if JAX_NAMES.get(name, name) in injected else effect_of(name)


def _equal(saved: Any, configured: Any) -> bool:
    if isinstance(saved, float) and isinstance(configured, float):
        # beta may have been read off a float32 state.
        return abs(saved - configured) <= 1e-7 * abs(configured)
    return bool(saved == configured)


def carry(
    clock: dict[str, Any], saved: Mapping[str, Any], configured: Mapping[str, Any], same_units: bool
) -> dict[str, Any]:
    """Returns the clock under the configured hyperparameters.

    Args:
        clock: as saved.
        saved, configured: hyperparameters, as far as they are known.
        same_units: False if the lr of the saved optimizer means something else.

    Raises:
        CheckpointError: if the units change and the configured lr is not known.
    """
    lr = None if same_units else configured.get("lr")
    if not same_units and (not isinstance(lr, int | float) or lr <= 0):
        raise CheckpointError(
            f"hyperparameters must give lr > 0 when another kind of optimizer resumes, got {lr!r}: "
            "pass hyperparameters=sfcore.hyperparameters.SGD(lr=...), or AdamW or RAdam; "
            "of a schedule, its largest value"
        )
    lr_max, weight_sum = carried_sum(clock, saved, configured, lr)
    return clock | {"lr_max": lr_max, "weight_sum": weight_sum}
