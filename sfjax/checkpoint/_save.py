"""Takes a run to the host and writes it: fast while the run waits, thorough in the background."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sfcore import exchange, files, store
from sfcore.meta import Meta
from sfjax.checkpoint import _folder, _record
from sfjax.checkpoint._leaves import Named, groups, parameters, roles
from sfjax.checkpoint._storable import Snapshot, array_like, is_key, is_object, is_weak, object_state
from sfjax.state.find import schedule_free_eval_params


@jax.jit
def evaluated(opt_state: Any, params: Any) -> Any:
    """Returns x, computed on the device while the host copies."""
    return schedule_free_eval_params(opt_state, params)


@dataclass
class Host:
    """A run on the host.

    Attributes:
        arrays: name -> array, of every leaf that is one.
        tree: the tree of these; None for leaves that are objects.
        stored: the tree as Orbax gets it: None for empty arrays too, which it does not hold.
        about: name -> what the record says of a leaf beside its content.
        objects: name -> JSON, of leaves that are no arrays.
    """

    arrays: dict[str, np.ndarray]
    tree: Any
    stored: Any
    about: dict[str, dict[str, Any]]
    objects: dict[str, Any] = field(default_factory=dict)


def on_host(flat: Named, snapshot: Snapshot) -> Host:
    """Returns a copy of a run's leaves.

    Raises:
        CheckpointError: for a leaf that cannot be stored.
    """
    leaves = dict(zip(flat.names, flat.leaves, strict=True))
    objects = {name: object_state(name, leaf) for name, leaf in leaves.items() if is_object(leaf)}
    like = {name: array_like(name, leaf) for name, leaf in leaves.items() if name not in objects}
    arrays = dict(zip(like, snapshot.take(list(like.values())), strict=True))
    tree = flat.pure.unflatten([arrays.get(name) for name in flat.names])
    about = recorded_roles(tree["params"], tree["opt_state"])
    for name in arrays:
        if is_key(leaves[name]):
            about[name] = {"key": str(jax.random.key_impl(leaves[name]))}
        elif is_weak(leaves[name]):
            about[name] = about.get(name, {}) | {"weak": True}
    held = [arrays[name] if name in arrays and arrays[name].size else None for name in flat.names]
    return Host(arrays, tree, flat.pure.unflatten(held), about, objects)


def recorded_roles(params: Any, opt_state: Any) -> dict[str, dict[str, Any]]:
    """Returns name -> {"role"}, where `stored` is said to be what it is."""
    buffer = {
        name: "x" if group.state.b1 == 0 else "z"
        for group in groups(params, opt_state)
        for name in group.parameters
    }
    found = {}
    for name, role in roles(params, opt_state).items():
        kind, _, parameter = role.partition("/")
        found[name] = {"role": f"{buffer[parameter]}/{parameter}" if kind == "stored" else role}
    return found


@dataclass
class Job:
    """What the background does: hashes everything, and writes the record and the inference weights.

    Attributes:
        meta: the record, but for its hashes.
        host: the run.
        x, buffers: name -> leaf, on the device or not, for the inference weights.
    """

    meta: Meta
    host: Host
    x: Mapping[str, Any]
    buffers: Mapping[str, Any]

    def write_meta(self, folder: Path) -> None:
        """Writes the record into a folder."""
        x = {name: np.asarray(leaf) for name, leaf in self.x.items()}
        buffers = {name: np.asarray(leaf) for name, leaf in self.buffers.items()}
        self.meta.tensors = {
            _folder.STATE: _record.of_arrays(self.host.arrays, self.host.about),
            _folder.INFERENCE_FILE: _record.of_arrays(x | buffers, {}),
        }
        y = parameters(self.host.tree["params"])
        self.meta.fingerprints = {"x": exchange.fingerprint(x), "y": exchange.fingerprint(y)}
        files.write_text(folder / _folder.META_FILE, self.meta.to_json())

    def write_inference(self, folder: Path) -> None:
        """Writes the inference weights into a folder, and for Orbax's sake a word about them as JSON."""
        leaves = {name: np.asarray(leaf) for name, leaf in {**self.x, **self.buffers}.items()}
        exchange.write_tensors(folder / _folder.INFERENCE_FILE, leaves, store.about_inference(self.meta))
        about = {"weights_hold": "x", "step": self.meta.step, "file": _folder.INFERENCE_FILE}
        files.write_text(folder / _folder.META_FILE, json.dumps(about))
