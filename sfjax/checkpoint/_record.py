"""Writes and reads the record of a checkpoint: what `sfcore.meta.Meta` says of a JAX run."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import optax

from sfcore import checks, laws
from sfcore.checks import HyperparameterError, Rule, hint
from sfcore.exchange import CheckpointError
from sfcore.laws import LAWS
from sfcore.meta import Meta, as_accumulation, number_in, precision_of, with_batch_size
from sfjax.checkpoint._leaves import CLOCK, Group, groups, held, named, nodes, norms, parameters
from sfjax.step.plan import STATES

_CONFIGURATION = Rule(
    "a dataclass of sfcore.hyperparameters or a dict of its fields",
    checks.MAPPING.holds,
    "such as SGD(lr=0.1)",
)
_MICRO_BATCHES = Rule(
    "the number of micro-batches an update, or (that, how many are in the gradient)",
    checks.optional(checks.COUNT).holds,
    "leave it out where optax.MultiSteps knows",
)
_PACKAGES = ("schedulefree-twin", "jax", "jaxlib", "optax", "orbax-checkpoint", "numpy")


class Configured(NamedTuple):
    """What is known of the configuration of one Schedule-Free state.

    Attributes:
        optimizer: the name of its law, or "adamw or radam" where nobody said which.
        values: canonical hyperparameters, as far as they were given.
        chosen: those that a start from weights alone must leave as they are.
    """

    optimizer: str
    values: dict[str, Any]
    chosen: dict[str, Any]


def canonical(hyperparameters: Any) -> Configured:
    """Returns what a user gave as hyperparameters, with "" for an optimizer that is not told.

    Args:
        hyperparameters: a dataclass of `sfcore.hyperparameters`; a dict of its fields, with the
            optimizer's name under "optimizer" if it should be recorded; or None.

    Raises:
        HyperparameterError: for a name that no optimizer has.
    """
    if hyperparameters is None:
        return Configured("", {}, {})
    if is_dataclass(hyperparameters):
        optimizer = next((law.name for law in LAWS.values() if type(hyperparameters) is law.options), "")
        values = {name: _plain(value) for name, value in asdict(hyperparameters).items()}  # type: ignore[arg-type]
        # It has every field, so its 0 is no choice.
        unset = {("prior_steps", 0), ("warmup_steps", 0)}
        return Configured(optimizer, values, {k: v for k, v in values.items() if (k, v) not in unset})
    checks.require(HyperparameterError, hyperparameters=(_CONFIGURATION, hyperparameters))
    values = dict(hyperparameters)
    optimizer = values.pop("optimizer", None)
    known = {name for law in LAWS.values() for name in law.defaults}
    wrong = [f"{name!r}{hint(name, known)}" for name in values if name not in known]
    if optimizer not in (None, *LAWS):
        wrong.append(f"optimizer {optimizer!r}")
    if wrong:
        raise HyperparameterError(
            [f"hyperparameters must be named {', '.join(sorted(known))}, got {one}" for one in wrong]
        )
    values = {name: _plain(value) for name, value in values.items()}
    return Configured(optimizer or "", values, values)


def _plain(value: Any) -> Any:
    return "schedule" if callable(value) else number_in(value)


def check_configured(hyperparameters: Any, accumulation: Any, batch_size: Any = None) -> None:
    """Raises unless these are what `Checkpoints` takes, before anything is read or written.

    Raises:
        HyperparameterError: with every name that no optimizer has, or every value that is out of range.
        CheckpointError: for the others.
    """
    several = hyperparameters if isinstance(hyperparameters, list | tuple) else [hyperparameters]
    known, found = laws.options(), list[str]()
    for one in several:
        # A schedule is known by its word only, and None is 0 where a factory takes it so.
        told = {k: v for k, v in canonical(one).values.items() if v is not None and v != "schedule"}
        rules = {name: known[name].metadata["rule"] for name in told}
        found += [
            checks.problem(name, rules[name], v) for name, v in told.items() if not rules[name].holds(v)
        ]
    if found:
        raise HyperparameterError(found)
    accumulated((), accumulation, batch_size)


def configured(hyperparameters: Any, own: Sequence[Group]) -> list[Configured]:
    """Returns the configuration of each state.

    Args:
        hyperparameters: as `canonical` takes them, or a list or tuple of one such a state, in tree order.
        own: the states.

    Raises:
        HyperparameterError: if their number is neither one nor that of the states.
    """
    several = isinstance(hyperparameters, list | tuple)
    given = (
        [canonical(one) for one in hyperparameters] if several else [canonical(hyperparameters)] * len(own)
    )
    if len(given) != len(own):
        raise HyperparameterError(
            [
                f"hyperparameters must be one for all or one for each of the {len(own)} Schedule-Free "
                f"states, got {len(given)}: pass them in the order of sfjax.find_states(opt_state)"
            ]
        )
    return [
        one._replace(optimizer=one.optimizer or _told_by(group.state))
        for group, one in zip(own, given, strict=True)
    ]


def _told_by(state: Any) -> str:
    """Returns what the state alone tells of the optimizer; AdamW and RAdam look the same."""
    base = state.base_optimizer_state
    return laws.recognise(held(base).values()) if type(base) in STATES else "wrapper"


def clock_of(state: Any) -> dict[str, Any]:
    """Returns the clock of a Schedule-Free state of host numbers.

    `weight_sum` is exact, both parts added; `beta` is the one that built y; `lr` and `c` are the last step's.
    """
    values = {field: np.asarray(getattr(state, field)).item() for field in CLOCK}
    total = values["weight_sum"] + values.pop("weight_sum_low")
    return values | {"beta": values.pop("b1"), "weight_sum": total}


def clock_from(clock: Mapping[str, Any], dtype: Any) -> dict[str, np.ndarray]:
    """Returns the scalars of a Schedule-Free state for a clock, the reverse of `clock_of`.

    Args:
        clock: step, lr_max, weight_sum and beta; lr and c if known.
        dtype: of the scalars but step, float32 or float64.
    """
    high = np.asarray(clock["weight_sum"], dtype)
    rest = {"b1": clock["beta"], "weight_sum": high, "weight_sum_low": clock["weight_sum"] - float(high)}
    values = {"lr": 0.0, "c": 0.0, **clock, **rest}
    scalars = {field: np.asarray(values[field], dtype) for field in CLOCK if field != "step"}
    return scalars | {"step": np.asarray(values["step"], np.int32)}


def make(tree: Any, hyperparameters: Any, accumulation: Mapping[str, int], **values: Any) -> Meta:
    """Returns the record of a state of host arrays, but for `tensors`.

    Args:
        tree: {"params", "opt_state"} of host arrays.
        hyperparameters: as for `configured`.
        accumulation: from `accumulated`.
        values: further fields of Meta.
    """
    own = groups(tree["params"], tree["opt_state"])
    of_groups: list[dict[str, Any]] = [
        {
            "optimizer": one.optimizer,
            "hyperparameters": {"beta": clock["beta"]} | one.values,
            "clock": clock,
            "parameters": group.parameters,
        }
        for group, clock, one in zip(
            own, [clock_of(group.state) for group in own], configured(hyperparameters, own), strict=True
        )
    ]
    leaves = dict(zip(*named(tree)[:2], strict=True))
    for index, norm in norms(tree["params"], tree["opt_state"]).items():
        of_groups[index]["clock"]["grad_l1_ema"] = float(leaves[norm])
    clocks = {name: group["clock"] for group in of_groups for name in group["parameters"]}
    about = {
        name: {"shape": list(array.shape), "dtype": array.dtype.name, "clock": clocks.get(name)}
        for name, array in parameters(tree["params"]).items()
    }
    return Meta(
        framework="jax",
        optimizer="+".join(dict.fromkeys(group["optimizer"] for group in of_groups)),
        groups=of_groups,
        parameters=about,
        accumulation=dict(accumulation),
        precision=precision_of(about),
        weights_hold="y",
        versions=versions(),
        **values,
    )


def accumulated(opt_state: Any, given: Any, batch_size: int | None = None) -> dict[str, int]:
    """Returns Meta.accumulation; the position comes from the state of optax.MultiSteps unless it is given.

    Args:
        opt_state: of host arrays.
        given: micro-batches an update, or (that, position), or None. MultiSteps does not say how many an
            update takes, so its `steps` is then 0, for unknown.
        batch_size: of a micro-batch, if it is known.

    Raises:
        CheckpointError: for a position that is not in an update of so many micro-batches.
    """
    if isinstance(given, Iterable):
        return as_accumulation(given, batch_size)
    positions = [int(np.asarray(node.mini_step)) for _, node in nodes(opt_state, optax.MultiStepsState)]
    unknown = 0 if positions else 1
    checks.require(CheckpointError, accumulation=(_MICRO_BATCHES, number_in(given)))
    steps = unknown if given is None else int(given)
    found = {"steps": steps, "position": positions[0] if positions else 0}
    return with_batch_size(found, batch_size)


def versions() -> dict[str, str]:
    """Returns package -> version of what a checkpoint may depend on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
