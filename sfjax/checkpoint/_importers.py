"""Takes over the state of optax.contrib.schedule_free and of plain Adam, wherever they sit in a chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfcore import laws
from sfcore.exchange import CheckpointError
from sfcore.meta import Meta
from sfjax.checkpoint import _record
from sfjax.checkpoint._leaves import check_arrays, check_trees, groups, host_arrays
from sfjax.checkpoint._orbax import Saved
from sfjax.checkpoint._restore import Restored, restore_into
from sfjax.checkpoint._weights import opening
from sfjax.state.arguments import Configurations, MicroBatches
from sfjax.state.find import _pure

# By their fields, so that states which Orbax restored without a target, as dicts, are known too.
_CONTRIB = {"b1", "weight_sum", "step_count", "max_lr", "base_optimizer_state", "z"}
_ADAM = {"count", "mu", "nu"}
_RMS = {"count", "nu"}


def import_optax(
    source_state: Any,
    source_params: Any,
    params: Any,
    opt_state: Any,
    *,
    hyperparameters: Configurations | None = None,
    accumulation: MicroBatches | None = None,
) -> Restored:
    """Returns the start of an sfjax run that goes on from an Optax one.

    optax.contrib.schedule_free (0.2.8): y, z, the sum of weights and the largest lr are kept, and v of a
    base with a second moment. Its step_count is one ahead of the updates that it finished. Its update
    decodes y with the b1 that it was built with, which is not always the one in its state: pass the former
    as {"beta": ...} in hyperparameters. Without, the state's is taken, rounded back to the shortest
    number: 0.8984375 in bfloat16 was 0.9.

    Plain adam or adamw: v and its step are kept, and x = y = z = the weights, which count as the average
    of earlier steps as in `start_from_weights`.

    Args:
        source_state: the state of any chain with one of them in it, typed, or as Orbax restores it
            without a target.
        source_params: the parameters beside it (y of contrib's).
        params, opt_state: targets: shapes, dtypes and shardings of the sfjax run.
        hyperparameters: of the sfjax run; `lr` is needed for plain Adam, as in `start_from_weights`.
        accumulation: as for `Checkpoints.restore`.

    Raises:
        CheckpointError: if neither is found, or parameters do not fit.

    Example:
        >>> import jax.numpy as jnp, optax, sfjax
        >>> from sfjax.checkpoint import import_optax
        >>> params = {"w": jnp.ones(3)}
        >>> old = optax.chain(optax.clip(1.0), optax.contrib.schedule_free_adamw(0.01))
        >>> tx = sfjax.schedule_free_adamw(0.01)
        >>> start = import_optax(old.init(params), params, params, tx.init(params))
        >>> float(sfjax.find_state(start.opt_state).b1) > 0.89
        True
    """
    check_trees(params, opt_state)
    check_arrays("source_params", source_params, "pass the parameters beside source_state", or_none=False)
    _record.check_configured(hyperparameters, accumulation)
    source, weights = _pure(source_state), host_arrays(source_params)
    own = groups(params, opt_state)
    given = _record.configured(hyperparameters, own)
    contrib = _find(source, _CONTRIB)
    if contrib:
        saved = _from_contrib(contrib, weights, [one.values for one in given])
    else:
        adam = _find(source, _ADAM)
        if len(adam) != 1:
            raise CheckpointError(
                f"source_state must hold optax.contrib.schedule_free's state or one of Adam, got {len(adam)} "
                f"of Adam in {type(source_state).__name__}: pass the whole state, or one part at a time"
            )
        saved = _from_adam(adam[0], weights, own, given)
    return restore_into(
        saved,
        params,
        opt_state,
        hyperparameters=hyperparameters,
        accumulation=accumulation,
        differences=list(saved.meta.extra.pop("notices")),
    )


def _from_contrib(
    found: Sequence[Mapping[str, Any]], weights: Mapping[str, np.ndarray], given: Sequence[Mapping[str, Any]]
) -> Saved:
    arrays = {f"y/{name}": leaf for name, leaf in weights.items()}
    recorded: list[dict[str, Any]] = []
    notices = []
    for index, node in enumerate(found):
        z = host_arrays(node["z"])
        stored = np.asarray(node["b1"])
        chosen = given[min(index, len(given) - 1)].get("beta") if given else None
        beta = shortest(stored) if chosen is None else chosen
        if beta == 0:
            raise CheckpointError("b1 must be > 0 in a state of optax.contrib, got 0: its x is not a number")
        if stored.dtype.name in ("bfloat16", "float16"):
            notices.append(
                f"optax.contrib kept its scalars in {stored.dtype.name}, where the sum of weights stops "
                "growing at a few hundred steps: the average is a short one, and goes on from there"
            )
        clock = contrib_clock(node, beta)
        arrays |= {f"z/{name}": _wide(leaf) for name, leaf in z.items()}
        base = node["base_optimizer_state"]
        second = (_find(base, _ADAM) or _find(base, _RMS))[:1]
        for one in second:
            arrays |= {f"v/{name}": _wide(leaf) for name, leaf in host_arrays(one["nu"]).items()}
        kind, about = laws.recognise(["v"] if second else []), {"beta": float(beta)}
        recorded.append({"optimizer": kind, "hyperparameters": about, "clock": clock, "parameters": list(z)})
    step = max(group["clock"]["step"] for group in recorded)
    return _saved("optax.contrib", step, recorded, arrays, notices)


def contrib_clock(state: Mapping[str, Any], beta: float) -> dict[str, Any]:
    """Returns the clock of a state of optax.contrib, whose step_count is one ahead of its updates."""
    return {
        "step": int(np.asarray(state["step_count"])) - 1,
        "lr_max": float(np.asarray(state["max_lr"])),
        "weight_sum": float(np.asarray(state["weight_sum"])),
        "beta": float(beta),
    }


def _from_adam(
    node: Mapping[str, Any], weights: Mapping[str, np.ndarray], own: Any, given: Sequence[Any]
) -> Saved:
    v = host_arrays(node["nu"])
    unknown = sorted(v.keys() - weights.keys())
    if unknown:
        raise CheckpointError(
            f"source_params must be those of Adam's state, got none for its {unknown[0]!r}: pass the "
            "parameters that it trained, and a state without optax.flatten"
        )
    arrays = {f"y/{name}": leaf for name, leaf in weights.items()}
    arrays |= {f"z/{name}": _wide(weights[name]) for name in v}
    arrays |= {f"v/{name}": _wide(leaf) for name, leaf in v.items()}
    arrays |= {f"m/{name}": _wide(leaf) for name, leaf in host_arrays(node["mu"]).items()}
    step = int(np.asarray(node["count"]))
    recorded, notices = [], []
    for group, one in zip(own, given, strict=True):
        clock, sentence = opening(group.state, one, step)
        notices.append(sentence)
        about = {"optimizer": laws.recognise(["v"]), "hyperparameters": {}, "clock": clock | {"step": step}}
        recorded.append(about | {"parameters": group.parameters})
    return _saved("Adam", step, recorded, arrays, notices)


def _saved(
    source: str, step: int, recorded: list[dict[str, Any]], arrays: dict[str, np.ndarray], notices: list[str]
) -> Saved:
    meta = Meta(framework="jax", optimizer=source, step=step, groups=recorded, extra={"notices": notices})
    return Saved(Path(f"the state of {source}"), meta, arrays, {name: name for name in arrays})


def _find(tree: Any, names: set[str]) -> list[Mapping[str, Any]]:
    """Returns the outermost nodes whose fields or keys are exactly these, as mappings."""
    if hasattr(tree, "_fields"):
        tree = tree._asdict()
    if isinstance(tree, Mapping):
        if set(tree) == names:
            return [tree]
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return [node for below in tree for node in _find(below, names)]
    return []


def _wide(array: np.ndarray) -> np.ndarray:
    """Returns a buffer in at least float32, as sfjax keeps it."""
    return array.astype(np.promote_types(array.dtype, np.float32))


def shortest(value: np.ndarray) -> float:
    """Returns the number with the fewest decimals that rounds to a value in its dtype.

    Example:
        >>> import numpy as np
        >>> from sfjax.checkpoint._importers import shortest
        >>> shortest(np.float32(0.9))
        0.9
    """
    value = np.asarray(value)
    for decimals in range(1, 18):
        candidate = round(float(value), decimals)
        if np.asarray(candidate, value.dtype) == value:
            return candidate
    return float(value)
