"""Whose state dict is it? Those of other programs, by the names of the equations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sftorch.law.scalars import Clock
from sftorch.state.state_dict import HOLD


@dataclass
class Source:
    """What a foreign state dict says, by the names of the equations.

    Attributes:
        program: whose it is, for the notices.
        kind: "sgd", "adamw", "radam", "wrapper", or "plain" for an optimizer that is not Schedule-Free.
        groups: one dict a group: "params" (indices), "options" (as saved), "clock".
        states: index -> name -> value.
        holds: "x" or "y", what the weights saved beside it are; None if it does not say.
    """

    program: str
    kind: str
    groups: list[dict[str, Any]]
    states: Mapping[Any, Mapping[str, Any]]
    holds: str | None
    base: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict)


def recognise(state_dict: Mapping[str, Any]) -> Source:
    """Returns what a state dict is.

    Raises:
        ValueError: if it is of no known program.
    """
    if "schedulefree_state" in state_dict:
        return _pytorch_optimizer_wrapper(state_dict)
    groups, states = state_dict.get("param_groups"), state_dict.get("state")
    if not groups or states is None:
        raise ValueError(
            f"state_dict must be what optimizer.state_dict() returned, got the keys {sorted(state_dict)}: "
            "pass the entry of the file that holds the optimizer"
        )
    first = groups[0]
    if "y_beta" in _books(first):
        return _ours(groups, states)
    if "weight_sum" in first and "k" in first:
        wrapper = "betas" not in first and "scheduled_lr" not in first
        return _schedule_free("schedulefree", "wrapper" if wrapper else _kind(first), groups, states, "k")
    if "weight_sum" in first and "step" in first:
        return _schedule_free("pytorch_optimizer", _kind(first), groups, states, "step")
    if "betas" in first and "weight_sum" not in first and any("exp_avg_sq" in s for s in states.values()):
        plain = [{"params": g["params"], "options": g, "clock": Clock(0, 0.0, 0.0)} for g in groups]
        return Source("torch.optim.AdamW", "plain", plain, states, "y")
    raise ValueError(
        "state_dict must be of schedulefree, pytorch_optimizer's ScheduleFree* or torch.optim.AdamW, got the "
        f"options {sorted(first)}: start from the weights with Checkpoints.restore(resume='weights:PATH')"
    )


def _books(group: Mapping[str, Any]) -> Mapping[str, Any]:
    books: Mapping[str, Any] = group.get("schedule_free", group)
    return books


def _ours(groups: Any, states: Any) -> Source:
    """Returns the state dict of another of our classes."""
    kind = "wrapper" if "schedule_free" in groups[0] else _kind(groups[0])
    merged = [group | _books(group) for group in groups]
    clocks = [Clock(g["k"], g["lr_max"], g["weight_sum"]) for g in merged]
    found = [
        {"params": g["params"], "options": g, "clock": clock} for g, clock in zip(merged, clocks, strict=True)
    ]
    base = {index: values["base"] for index, values in states.items() if "base" in values}
    return Source("sftorch", kind, found, states, groups[0][HOLD], base)


def _kind(options: Mapping[str, Any]) -> str:
    if "betas" not in options:
        return "sgd"
    return "radam" if "silent_sgd_phase" in options else "adamw"


def _schedule_free(program: str, kind: str, groups: Any, states: Any, counter: str) -> Source:
    found = [
        # lr_max is -1 before the first step in both programs.
        {
            "params": g["params"],
            "options": g,
            "clock": Clock(g[counter], max(g["lr_max"], 0.0), g["weight_sum"]),
        }
        for g in groups
    ]
    base = {}
    if kind == "wrapper":
        base = {i: {k: v for k, v in values.items() if k != "z"} for i, values in states.items()}
        states = {i: {"z": values["z"]} for i, values in states.items() if "z" in values}
    holds = None if kind == "wrapper" else "y" if groups[0].get("train_mode") else "x"
    return Source(program, kind, found, states, holds, base)


def _pytorch_optimizer_wrapper(state_dict: Mapping[str, Any]) -> Source:
    inner = state_dict["base_optimizer"]
    indices = {
        (g, i): index
        for g, group in enumerate(inner["param_groups"])
        for i, index in enumerate(group["params"])
    }
    states = {indices[place]: values for place, values in state_dict["schedulefree_state"].items()}
    groups = [{"step": 0, "lr_max": 0.0, "weight_sum": 0.0} | g for g in inner["param_groups"]]
    source = _schedule_free("pytorch_optimizer", "wrapper", groups, states, "step")
    source.base = inner["state"]
    source.holds = "y" if state_dict["train_mode"] else "x"
    return source
