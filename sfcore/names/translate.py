"""A checkpoint's leaves and record under the names and layouts of the other framework.

What only one framework has stays under its own names: state of a wrapped optimizer (base/), random
states (rng/) and the user's own (extra/). Torch's counters of batches travel as extra/torch/NAME.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from sfcore import laws
from sfcore import names as _names
from sfcore.changes import LEFT_BEHIND, at_last_update
from sfcore.exchange import of_role
from sfcore.iterates import beta_of
from sfcore.meta import Meta
from sfcore.names import NameMap
from sfcore.names._flax import torch_only

_KEPT = ("base", "rng", "extra")
_CARRIED = "extra/torch/"


def name_map(meta: Meta, state: Mapping[str, np.ndarray], to: str, user: _names.UserMap) -> NameMap:
    """Returns the map for a checkpoint, from its own names and shapes and the user's map.

    Raises:
        NamesError: with every leaf whose counterpart cannot be told.
    """
    shapes = {name: array.shape for role in ("y", "buffer") for name, array in of_role(state, role).items()}
    if to == "torch":
        return _names.to_torch(shapes, user)
    kinds = {name: about["kind"] for name, about in meta.parameters.items() if "kind" in about}
    return _names.to_jax(shapes, user, kinds)


def translate(
    meta: Meta, state: Mapping[str, np.ndarray], inference: Mapping[str, np.ndarray], to: str, names: NameMap
) -> tuple[Meta, dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
    """Returns (record, leaves, inference weights, notices) for the other framework.

    Args:
        meta, state, inference: of a checkpoint whose framework is not `to`.
        to: "jax" or "torch".
        names: from `name_map`, or of the user's making.

    Raises:
        NamesError: with every leaf that does not fit the map.
    """
    rename = names.to_torch if to == "torch" else names.to_jax
    found = renamed(state, rename)
    found |= {leaf: array for leaf, array in state.items() if leaf.partition("/")[0] in _KEPT}
    found = _with_counters(found, of_role(state, "buffer"), to)
    x = rename(inference)
    x |= {name: array for name, array in of_role(found, "buffer").items() if torch_only(name)}
    moved, notices = _record(meta, names, to, found)
    return moved, found, x, notices


def renamed(
    state: Mapping[str, np.ndarray], rename: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the leaves of every parameter under other names and in other layouts; others are left out."""
    found: dict[str, np.ndarray] = {}
    buffers, wholes = laws.roles(), of_role(state, "y")
    for role in ("y", "x", "z", *buffers, "buffer"):
        arrays = of_role(state, role)
        of_rows = role in buffers and buffers[role].of_rows
        moved = _rows(arrays, wholes, rename) if of_rows else rename(arrays)
        found |= {f"{role}/{name}": array for name, array in moved.items()}
    return found


def _rows(
    arrays: Mapping[str, np.ndarray],
    wholes: Mapping[str, np.ndarray],
    rename: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Returns numbers of rows as `renamed` does: of size 1 in all axes but those that rows lie along."""

    def spread(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return rename({name: np.broadcast_to(one, wholes[name].shape) for name, one in values.items()})

    places = spread({name: np.arange(one.size).reshape(one.shape) for name, one in arrays.items()})

    def kept(place: np.ndarray, axis: int) -> slice:
        return slice(None if (place != place.take([0], axis)).any() else 1)

    return {
        name: array[tuple(kept(places[name], axis) for axis in range(array.ndim))]
        for name, array in spread(arrays).items()
    }


def _with_counters(
    leaves: dict[str, np.ndarray], buffers: Mapping[str, np.ndarray], to: str
) -> dict[str, np.ndarray]:
    """Moves torch's counters of batches aside, or back; a model that never had them gets zeros."""
    if to == "jax":
        return leaves | {f"{_CARRIED}{name}": array for name, array in buffers.items() if torch_only(name)}
    found = {leaf: array for leaf, array in leaves.items() if not leaf.startswith(_CARRIED)}
    for leaf in leaves:
        if leaf.startswith("buffer/") and leaf.endswith(".running_mean"):
            counter = leaf.removesuffix("running_mean") + "num_batches_tracked"
            found[counter] = leaves.get(_CARRIED + counter.removeprefix("buffer/"), np.zeros((), np.int64))
    return found


def _record(meta: Meta, names: NameMap, to: str, leaves: Mapping[str, np.ndarray]) -> tuple[Meta, list[str]]:
    """Returns the record under the other names, and what could not be kept."""

    def others(name: str) -> list[str]:
        return [names.torch_name(name)] if to == "torch" else names.jax_names(name)

    parameters: dict[str, dict[str, Any]] = {}
    for name, about in meta.parameters.items():
        for other in others(name):
            parameters[other] = about | {"shape": list(leaves[f"y/{other}"].shape)}
    groups = [
        _group(group, to)
        | {"parameters": list(dict.fromkeys(o for n in group["parameters"] for o in others(n)))}
        for group in meta.groups
    ]
    moved, notices = at_last_update(meta, LEFT_BEHIND)
    return replace(moved, framework=to, parameters=parameters, groups=groups), notices


def _group(group: Mapping[str, Any], to: str) -> dict[str, Any]:
    """Returns a group in which the beta that built y is where the other framework looks for it."""
    beta = beta_of(group)
    if to == "jax":
        return {**group, "clock": {**group["clock"], "beta": beta}}
    own = group.get("torch", {})
    return {**group, "torch": {**own, "books": {**own.get("books", {}), "y_beta": beta}}}
