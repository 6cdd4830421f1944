"""A run of several processes: each copies, writes and reads what lies on its own devices, and no more.

Orbax writes the arrays, each process its shards; which of several copies of a shard is written is by JAX's
`replica_id`. What is the same on all processes, and no array over all of them, rank 0 writes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sfcore import exchange, files, store, together
from sfcore.exchange import CheckpointError
from sfcore.meta import Meta
from sfcore.ranks import Ranks
from sfcore.shards import Place
from sfjax.checkpoint import _orbax
from sfjax.checkpoint._arrays import array_like, is_key, is_object, is_spread, object_state
from sfjax.checkpoint._leaves import Named
from sfjax.checkpoint._save import Host, about_leaves

_MOST_OWN = 1 << 16  # bytes of one


class _Client:
    """The key-value store of jax.distributed."""

    def __init__(self) -> None:
        from jax._src import distributed

        self._client: Any = distributed.global_state.client
        if self._client is None:
            raise CheckpointError(
                "several processes must be joined by jax.distributed, got no client of it: call "
                "jax.distributed.initialize() first"
            )

    def put(self, key: str, value: bytes) -> None:
        self._client.key_value_set_bytes(key, value, allow_overwrite=True)

    def get(self, key: str) -> bytes | None:
        try:
            found: bytes = self._client.key_value_try_get_bytes(key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise
        return found

    def drop(self, key: str) -> None:
        self._client.key_value_delete(key)


def ranks_of(name: str, limit: float) -> Ranks:
    """Returns the processes of jax.distributed; of none, this one alone."""
    if jax.process_count() == 1:
        return Ranks()
    return Ranks(jax.process_index(), jax.process_count(), _Client(), name, limit)


def on_devices(flat: Named) -> tuple[Host, dict[str, jax.Array]]:
    """Returns a run for the record, with forms of arrays over several processes; and copies of those.

    Raises:
        CheckpointError: for a leaf that cannot be stored.
    """
    leaves = dict(zip(flat.names, flat.leaves, strict=True))
    objects = {name: object_state(name, leaf) for name, leaf in leaves.items() if is_object(leaf)}
    like = {name: array_like(name, leaf) for name, leaf in leaves.items() if name not in objects}
    spread = copied({name: leaf for name, leaf in like.items() if is_spread(leaf)})
    arrays = {name: np.array(leaf) for name, leaf in like.items() if name not in spread}
    shown = arrays | {name: _shown(leaf) for name, leaf in spread.items()}
    tree = flat.pure.unflatten([shown.get(name) for name in flat.names])
    return Host(arrays, tree, about_leaves(tree, leaves, list(like)), objects), spread


def _shown(leaf: jax.Array) -> Any:
    """Returns a number as it is, and of a larger array its form."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if leaf.ndim else np.asarray(leaf)


def copied(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns copies that no step can write to, in the memory of the hosts."""
    if not arrays:
        return {}
    copy = _copy(tuple(_kept_at(leaf.sharding) for leaf in arrays.values()))
    return dict(zip(arrays, copy(list(arrays.values())), strict=True))


def _kept_at(sharding: Any) -> Any:
    on_cpu = any(device.platform == "cpu" for device in sharding.device_set)
    return sharding if on_cpu else sharding.with_memory_kind("pinned_host")


@functools.lru_cache(maxsize=4)
def _copy(shardings: tuple[Any, ...]) -> Any:
    return jax.jit(lambda leaves: [jnp.copy(leaf) for leaf in leaves], out_shardings=list(shardings))


def program_of(step: int, flat: Named) -> dict[str, Any]:
    """Returns what a process tells the others before a save: what must be the same on all."""
    forms = {
        name: [np.dtype(leaf.dtype).name, list(leaf.shape)]
        for name, leaf in zip(flat.names, flat.leaves, strict=True)
        if isinstance(leaf, jax.Array | np.ndarray) and not is_key(leaf)
    }
    return {"step": step, "leaves": forms}


def check_alike(ranks: Ranks, said: Sequence[Mapping[str, Any]]) -> None:
    """Raises `CheckpointError` on every rank, unless all are to save the same step of the same program."""
    ranks.require_same("step", [one["step"] for one in said], "let all processes take the same steps")
    leaves = [one["leaves"] for one in said]
    for leaf in sorted(set().union(*leaves)) if any(one != leaves[0] for one in leaves) else ():
        ranks.require_same(
            f"{leaf!r} (dtype and shape)",
            [one.get(leaf) for one in leaves],
            "build the same program on all processes",
        )


def crcs_of(host: Host) -> dict[str, int]:
    """Returns what a process tells the others of the arrays that are not over all of them."""
    return {name: exchange.describe(array)["crc32"] for name, array in host.arrays.items()}


def own_arrays(ranks: Ranks, host: Host, said: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Returns the arrays that this rank has otherwise than rank 0, as JSON, such as its own PRNG keys.

    Raises:
        CheckpointError: on every rank, for one that is large, or of the parameters or the optimizer.
    """
    different = sorted({name for one in said for name, crc in one.items() if crc != said[0].get(name)})
    for name in different:
        if not name.startswith("extra_state") or host.arrays[name].nbytes > _MOST_OWN:
            raise CheckpointError(
                f"{name} must be the same on every process, or an array over all of them, got different "
                "ones: make it a global array, as jax.make_array_from_process_local_data does"
            )
    return {name: host.arrays[name].tobytes().hex() for name in different} if ranks.rank else {}


def pieces(name: str, array: jax.Array) -> Iterator[tuple[str, Place, np.ndarray]]:
    """Yields (key, where it lies, array) of the shards that this process is to write."""
    mine = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    for number, shard in enumerate(mine):
        place = Place(name, [part.start or 0 for part in shard.index], array.shape)
        yield f"{name}#{number}", place, np.asarray(shard.data)


def _described(name: str, array: jax.Array) -> dict[str, Any]:
    return {key: exchange.describe(piece) | place.as_record() for key, place, piece in pieces(name, array)}


@dataclass
class Job:
    """What the background does, on every process: writes its shards, and rank 0 the record.

    Attributes:
        meta: the record, but for the CRCs of its leaves.
        host: the run, for the record.
        spread: name -> copy of an array over several processes.
        x: name -> leaf of the inference weights, over several processes or not.
        tree: of the structure in which Orbax keeps them.
    """

    ranks: Ranks
    meta: Meta
    host: Host
    spread: Mapping[str, jax.Array]
    x: Mapping[str, Any]
    flat: Named

    def write(self, folder: Path) -> Path:
        """Writes the checkpoint into the folder of its run, with all others; returns its path."""
        with _orbax.refused(folder, self.meta.step):
            return together.put(self.ranks, folder, self.meta.step, self._fill, self._finish, _orbax.LAYOUT)

    def _fill(self, path: Path) -> dict[str, Any]:
        for item in (_orbax.STATE, _orbax.META, _orbax.INFERENCE):
            (path / item).mkdir(exist_ok=True)
        held = {name: self.spread.get(name, self.host.arrays.get(name)) for name in self.flat.names}
        _orbax.write_shards(path / _orbax.STATE, self.flat.pure.unflatten([held[n] for n in self.flat.names]))
        record: dict[str, Any] = {}
        for name, array in self.spread.items():
            record |= _described(name, array)
        own = {name: getattr(self.meta, name) for name in ("epoch", "position", "extra", "recent")}
        return {"state": record, "inference": self._fill_inference(path / _orbax.INFERENCE), "own": own}

    def _fill_inference(self, folder: Path) -> dict[str, Any]:
        arrays: dict[str, np.ndarray] = {}
        places: dict[str, Place] = {}
        for name, leaf in self.x.items():
            if is_spread(leaf):
                for key, place, piece in pieces(name, leaf):
                    arrays[key], places[key] = piece, place
            elif self.ranks.is_first:
                arrays[name] = np.asarray(leaf)
        if not arrays:
            return {}
        file = store.part_name(_orbax.INFERENCE_FILE, self.ranks.rank, self.ranks.count)
        about = store.about_inference(self.meta)
        return {file: exchange.write_tensors(folder / file, arrays, about, sealed=True, places=places)}

    def _finish(self, path: Path, parts: list[Any]) -> None:
        _orbax.end_shards(path / _orbax.STATE)
        leaves: dict[str, Any] = {**self.host.arrays, **self.spread}
        state = {
            name: (
                {"dtype": np.dtype(leaf.dtype).name, "shape": list(leaf.shape)}
                if name in self.spread
                else exchange.describe(leaf)
            )
            | self.host.about.get(name, {})
            for name, leaf in leaves.items()
        }
        tensors = {_orbax.STATE: state}
        for rank, part in enumerate(parts):
            tensors[_orbax.part_of_state(rank, len(parts))] = part["state"]
            tensors |= part["inference"]
        first = parts[0]["own"]
        own = [{k: v for k, v in one["own"].items() if v != first[k]} for one in parts]
        meta = replace(self.meta, tensors=tensors, ranks=own)
        files.write_text(path / _orbax.META / _orbax.META_FILE, meta.to_json())
        _orbax.write_word(path / _orbax.INFERENCE, meta)
