"""Orbax folders: our own, verified against their record, and others with a Schedule-Free state in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sfcore import laws
from sfcore.exchange import of_role
from sfcore.meta import Meta
from sfcore.sources import Source, is_item, is_ours, unknown
from sfjax.checkpoint import _exchange, _orbax
from sfjax.checkpoint._importers import contrib_clock, shortest

_OF_OPTAX = ("z", "nu", "mu", "acc_grads", "trace", "ema")  # trees that have the parameters' names
# The scalars of optax.contrib's state.
_CONTRIB = ("b1", "weight_sum", "step_count", "max_lr")


def read(path: Path) -> Source:
    """Reads one Orbax checkpoint.

    Raises:
        CheckpointError: if it is damaged or has no Schedule-Free state.
    """
    if is_ours(path):
        meta, state, inference = _exchange.read(path)
        what = "checkpoint of schedulefree-twin on Orbax, names and layouts of jax"
        return Source(path, what, meta, dict(state), dict(inference), verified=True)
    items = [path] if is_item(path) else [below for below in sorted(path.iterdir()) if is_item(below)]
    arrays: dict[str, np.ndarray] = {}
    for item in items:
        below = {"": "", "default": ""}.get(item.name if item != path else "", f"{item.name}/")
        arrays |= {below + name: array for name, array in _orbax.read_arrays(item).items()}
    return _foreign(path, arrays)


def _foreign(path: Path, arrays: Mapping[str, np.ndarray]) -> Source:
    places = list(_contrib_states(arrays))
    if not places:
        raise unknown(path, f"an Orbax folder of {len(arrays)} arrays without a Schedule-Free state in it")
    meta = Meta(framework="jax", optimizer="", step=0, weights_hold="y")
    source = Source(path, "state of optax.contrib.schedule_free on Orbax", meta)
    params = _parameters(arrays, [name for place in places for name in _below(arrays, f"{place}z/")])
    for place in places:
        meta.groups.append(_add_state(source, place, arrays, params))
    meta.optimizer = laws.recognise(["v"] if of_role(source.state, "v") else [])
    meta.step = max(group["clock"]["step"] for group in meta.groups)
    source.notes.append("optax.contrib decodes y with the b1 it was built with, which its state may not hold")
    if not params:
        source.notes.append(
            "the parameters, which hold y, were not found beside the state, as one tree or as one called "
            "params: there is no x"
        )
    return source


def _contrib_states(arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
    for name in arrays:
        place = name.removesuffix("weight_sum")
        if name.endswith("weight_sum") and all(place + scalar in arrays for scalar in _CONTRIB):
            yield place


def _below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _parameters(arrays: Mapping[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """Returns the arrays of the one subtree outside the optimizer that has every name of z.

    Of several, such as an average of the user's own, it is the one called "params"; {} if none is.
    """
    starts = [full.removesuffix(names[0]) for full in arrays if names and full.endswith(names[0])]
    found = {}
    for start in starts:
        below, own = _below(arrays, start), start.rstrip("/").rpartition("/")[2]
        if set(names) <= below.keys() and own not in _OF_OPTAX:
            found[start] = own, {name: below[name] for name in names}
    called = [arrays for own, arrays in found.values() if own == "params" or len(found) == 1]
    return called[0] if len(called) == 1 else {}


def _add_state(
    source: Source, place: str, arrays: Mapping[str, np.ndarray], params: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Adds the leaves of one state; returns its group."""
    assert source.meta is not None
    clock = contrib_clock(_below(arrays, place), shortest(arrays[f"{place}b1"]))
    z = _below(arrays, f"{place}z/")
    for name, array in z.items():
        source.state[f"z/{name}"] = array
        if name in params:
            source.state[f"y/{name}"] = params[name]
        about = params.get(name, array)
        source.meta.parameters[name] = {
            "shape": list(about.shape),
            "dtype": about.dtype.name,
            "clock": dict(clock),
        }
    for full, array in _below(arrays, f"{place}base_optimizer_state/").items():
        _, nu, name = full.partition("nu/")
        if nu and name in z:
            source.state[f"v/{name}"] = array
    return {"hyperparameters": {"beta": clock["beta"]}, "clock": clock, "parameters": list(z)}
