"""The folder of a JAX run: what lies where, and how one checkpoint is written and read with Orbax.

FOLDER/100/meta/metadata                        the record (sfcore.meta), JSON
           state/...                            everything a resume needs (Orbax, tensorstore)
           inference/inference.safetensors      x, plain names: what to ship; of several processes in
                                                parts, as inference-00001-of-00004.safetensors

What comes and goes beside them, and when, is `sfcore.store`'s.

State goes in as host arrays, so that the number of devices leaves no trace in the checkpoint. Record and
inference weights are written by functions, so that hashing goes on while tensorstore writes.

Orbax reads all leaves at once, in tasks: one bad leaf makes it fail without saying which, and leaves the
other tasks to print their errors. So the layout that it writes today is read with tensorstore alone, leaf by
leaf; Orbax itself reads any other.
"""

from __future__ import annotations

import contextlib
import errno
import json
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath  # type: ignore[import-untyped]

from sfcore import exchange, files, store
from sfcore.exchange import OLDER, CheckpointError
from sfcore.meta import Meta
from sfcore.shards import Piece, Spread
from sfjax.checkpoint._leaves import named

STATE, META, INFERENCE = "state", "meta", "inference"
META_FILE, INFERENCE_FILE = "metadata", "inference.safetensors"
_ARRAYS = ("np.ndarray", "jax.Array", "scalar")
Write = Callable[[Path], None]


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        path: where it was read.
        meta: its record.
        arrays: name -> host array; `sfcore.shards.Spread` of those that several processes wrote.
        roles: name -> role (see `_leaves`), of the leaves that have one.
    """

    path: Path
    meta: Meta
    arrays: dict[str, Any]
    roles: dict[str, str]

    @property
    def names(self) -> dict[str, str]:
        """Role -> name."""
        return {role: name for name, role in self.roles.items()}

    @property
    def leaves(self) -> dict[str, np.ndarray]:
        """Role -> host array."""
        return {role: self.arrays[name] for name, role in self.roles.items()}


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Returns (step, path) of every one; one whose replacement was never finished counts, where it lies."""
    return sorted((_numbered(folder / store.REPLACED) | _numbered(folder)).items())


def _numbered(folder: Path) -> dict[int, Path]:
    own = [name for name in files.names(folder) if name.isdecimal() and str(int(name)) == name]
    return {int(name): folder / name for name in own if (folder / name).is_dir()}


def is_ours(path: Path) -> bool:
    """Tells whether a path is one Orbax checkpoint of this package."""
    return (path / META / META_FILE).is_file()


def read_meta(path: Path) -> Meta:
    """Reads the record of a checkpoint.

    Raises:
        CheckpointError: if the folder is missing or empty, or the record missing, damaged or too new.
    """
    file = path / META / META_FILE
    return store.read_record(file, lambda: f"{file} is missing: {_found(path)}")


def _found(path: Path) -> str:
    if not path.exists():
        return f"there is no {path.name} in {path.parent}, so check the path"
    if path.is_dir() and not any(path.iterdir()):
        return f"the folder is empty, so {OLDER}"
    return f"the folder holds other files, so it is no checkpoint of ours, or it is damaged: {OLDER}"


def read(path: Path) -> Saved:
    """Reads and verifies the state of a checkpoint.

    Raises:
        CheckpointError: naming file and leaf of the first difference from the record.
    """
    meta = read_meta(path)
    record = _recorded(path, meta, STATE)
    arrays = _verified(path / STATE, record, _pieces_of(meta))
    roles = {name: about["role"] for name, about in record.items() if "role" in about}
    return Saved(path, meta, arrays, roles)


def read_inference(path: Path, meta: Meta) -> dict[str, np.ndarray]:
    """Reads and verifies the weights x of a checkpoint.

    Raises:
        CheckpointError: as `read`.
    """
    names = store.files_of(meta, INFERENCE_FILE)
    if names and names != [INFERENCE_FILE]:
        found = store.open_parts(path / INFERENCE, meta, INFERENCE_FILE)
        return {name: np.asarray(array) for name, array in found.items()}
    record = _recorded(path, meta, INFERENCE_FILE)
    file = path / INFERENCE / INFERENCE_FILE
    tensors = exchange.read_tensors(file, record)
    exchange.check_metadata(file, store.about_inference(meta))
    return tensors


def _verify(path: Path) -> Saved:
    saved = read(path)
    read_inference(path, saved.meta)
    for array in saved.arrays.values():
        if isinstance(array, Spread):
            np.asarray(array)  # which reads and verifies it
    return saved


LAYOUT = store.Layout(_checkpoints, lambda step, older: str(step), read_meta, _verify)


def _recorded(path: Path, meta: Meta, item: str) -> Mapping[str, Any]:
    if item not in meta.tensors:
        raise CheckpointError(f"{path} must have a record of {item}, got {sorted(meta.tensors)}; {OLDER}")
    record: Mapping[str, Any] = meta.tensors[item]
    return record


def part_of_state(rank: int, count: int) -> str:
    """Returns the key under which the record has a rank's shards."""
    return f"{STATE}-{rank + 1:05d}-of-{count:05d}"


def _pieces_of(meta: Meta) -> dict[str, list[Mapping[str, Any]]]:
    """Returns name -> what is recorded of its shards."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for rank in range(len(meta.ranks)):
        for about in meta.tensors.get(part_of_state(rank, len(meta.ranks)), {}).values():
            found.setdefault(about["leaf"], []).append(about)
    return found


def _spread(
    path: Path, name: str, about: Mapping[str, Any], shards: list[Mapping[str, Any]], of: Any
) -> Spread:
    """Returns an array that several processes wrote; its shards are read on demand, and verified."""

    def read(one: Mapping[str, Any]) -> np.ndarray:
        place = tuple(slice(a, a + n) for a, n in zip(one["start"], one["shape"], strict=True))
        found = np.asarray(_done(path, name.split("/"), of[place].read()))
        exchange.check_leaf(path, name, found, one, "the files were changed after they were written")
        return found

    shape = tuple(about["shape"])
    if tuple(of.shape) != shape:
        raise CheckpointError(f"{path} is damaged: {name!r} must have shape {shape}, got {of.shape}; {OLDER}")
    dtype = np.dtype(getattr(ml_dtypes, about["dtype"], about["dtype"]))
    parts = [Piece(tuple(one["start"]), tuple(one["shape"]), partial(read, one)) for one in shards]
    return Spread(name, dtype, shape, parts)


def _verified(
    path: Path, record: Mapping[str, Any], pieces: Mapping[str, list[Mapping[str, Any]]]
) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"{path} is missing: check the path, or {OLDER}")
    found: dict[str, Any] = read_arrays(path, later=pieces)
    arrays: dict[str, Any] = {}
    for name, about in record.items():
        if name in found and "crc32" not in about:
            arrays[name] = _spread(path, name, about, pieces.get(name, []), found.pop(name))
            continue
        if 0 in about["shape"]:  # of which nothing is stored
            dtype = np.dtype(getattr(ml_dtypes, about["dtype"], about["dtype"]))
            found.setdefault(name, np.zeros(about["shape"], dtype))
        if name not in found:
            raise CheckpointError(f"{path} is damaged: it must hold the leaf {name!r}, got none; {OLDER}")
        arrays[name] = found.pop(name)
        exchange.check_leaf(path, name, arrays[name], about, "the files were changed after they were written")
    if found:
        raise CheckpointError(
            f"{path} is damaged: it must hold the leaves of its record only, got {min(found)!r}; {OLDER}"
        )
    return arrays


def read_arrays(path: Path, later: Collection[str] = ()) -> dict[str, Any]:
    """Returns name -> host array of an Orbax item; names are paths in its tree, joined by "/".

    Args:
        path: of the item.
        later: names of those that are only opened: they come as tensorstore's.

    Raises:
        CheckpointError: naming the file or the leaf that cannot be read.
    """
    with exchange.reading(path):
        others = [below for below in path.rglob("*") if not below.is_file() and not below.is_dir()]
    if others:  # which tensorstore could wait for without end
        raise CheckpointError(f"{others[0]} is damaged: it must be a file, got a link or a pipe; {OLDER}")
    layout = _layout(path)
    keys = [[str(part["key"]) for part in leaf["key_metadata"]] for leaf in layout["tree_metadata"].values()]
    if not layout.get("use_ocdbt") or not isinstance(layout.get("use_zarr3"), bool):
        return _read_by_orbax(path)
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 100_000_000}})
    driver = "zarr3" if layout["use_zarr3"] else "zarr"
    opened = [
        tensorstore.open(_spec(path, driver, parts), open=True, read=True, context=context) for parts in keys
    ]
    stores = [_done(path, parts, future) for parts, future in zip(keys, opened, strict=True)]
    names = ["/".join(parts) for parts in keys]
    reading = [None if name in later else one.read() for name, one in zip(names, stores, strict=True)]
    return {
        name: one if future is None else _done(path, name.split("/"), future)
        for name, one, future in zip(names, stores, reading, strict=True)
    }


def _layout(path: Path) -> dict[str, Any]:
    file = path / "_METADATA"
    try:
        with exchange.reading(file):
            layout = json.loads(exchange.read_text(file))
        leaves = {}
        for name, leaf in layout["tree_metadata"].items():
            leaf["key_metadata"][0], [part["key"] for part in leaf["key_metadata"]]
            # Empty nodes are described too, as "None", "Dict" and so on; there is nothing to read of them.
            if leaf["value_metadata"]["value_type"] in _ARRAYS:
                leaves[name] = leaf
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: it must describe Orbax's tree; {OLDER}") from error
    return {**layout, "tree_metadata": leaves}


def _spec(path: Path, driver: str, parts: list[str]) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{path}/"}
    return {
        "driver": driver,
        "kvstore": {"driver": "ocdbt", "base": base, "path": ".".join(parts) + "/"},
        "fill_missing_data_reads": False,  # a missing chunk is damage, not zeros
    }


def _done(path: Path, parts: list[str], future: Any) -> Any:
    try:
        return future.result()
    except Exception as error:  # tensorstore raises ValueError and others
        why = str(error).split(" [", 1)[0].splitlines()[0][:300]
        name = "/".join(parts)
        raise CheckpointError(f"{path} is damaged: leaf {name!r} cannot be read ({why}); {OLDER}") from error


def _read_by_orbax(path: Path) -> dict[str, np.ndarray]:
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            found = named(reader.restore(path))
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error}; {OLDER}") from error
    return dict(zip(found.names, map(np.asarray, found.leaves), strict=True))


class _Held(np.ndarray):
    """An array that nobody else changes while it is saved, so that Orbax need not copy it."""

    def __deepcopy__(self, memo: Any) -> _Held:
        return self


class _Late(ocp.JsonCheckpointHandler):
    """Writes an item by calling a function in a thread; on disk it is a JSON item like any other."""

    @classmethod
    def typestr(cls) -> str:
        return str(ocp.JsonCheckpointHandler.typestr())

    async def async_save(self, directory: Any, item: Any = None, args: Any = None) -> Any:
        async def write() -> None:
            args.item(Path(directory))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="sfjax_late_save")]

    def save(self, directory: Any, item: Any = None, args: Any = None) -> None:
        args.item(Path(directory))


def write(folder: Path, step: int, state: Any, meta: Write, inference: Write) -> Path:
    """Writes one checkpoint, whole or not at all; returns its path.

    Args:
        folder: an absolute path; made if it is not there.
        step: its number; one that is there already is replaced.
        state: tree of host arrays that do not change meanwhile.
        meta, inference: write their item's files into the folder that they get.

    Raises:
        CheckpointError: if it failed; what it left is removed.
    """
    # Orbax stores no empty arrays.
    held = jax.tree.map(lambda leaf: leaf.view(_Held) if leaf.size else None, state)
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(held),
        meta=ocp.args.JsonSave(meta),
        inference=ocp.args.JsonSave(inference),
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in (META, INFERENCE):
        registry.add(item, ocp.args.JsonSave, _Late())

    def fill(path: Path) -> None:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(handler_registry=registry)) as saver:
            try:
                saver.save(path, args=items)
            except BaseException:
                _join_threads()
                raise

    with refused(folder, step):
        return store.put(folder, step, fill, LAYOUT)


@contextlib.contextmanager
def refused(folder: Path, step: int) -> Iterator[None]:
    """Turns what the system refuses Orbax into a CheckpointError with the way out."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        cause: BaseException = error
        while not isinstance(cause, OSError) and (cause.__cause__ or cause.__context__):
            cause = cause.__cause__ or cause.__context__ or cause
        why = files.why(cause if isinstance(cause, OSError) else _of_the_system(str(error)))
        raise CheckpointError(f"cannot write the checkpoint of step {step} into {folder}: {why}") from error


def write_shards(path: Path, state: Any) -> None:
    """Writes what this process has of a tree of arrays into a folder that is there; waits for nobody.

    Args:
        path: of the item, the same on all processes.
        state: tree of arrays over several processes, whose shards are written where they are; of host arrays,
            the same on all; and of None.
    """
    held = jax.tree.map(lambda leaf: leaf.view(_Held) if isinstance(leaf, np.ndarray) else leaf, state)
    held = jax.tree.map(lambda leaf: leaf if leaf.size else None, held)
    handler = ocp.StandardCheckpointHandler()
    try:
        handler.save(epath.Path(path), args=ocp.args.StandardSave(held))
    finally:
        _join_threads()
        handler.close()


def end_shards(path: Path) -> None:
    """Makes one item of what all processes wrote."""
    handler = ocp.StandardCheckpointHandler()
    handler.finalize(epath.Path(path))
    handler.close()


def write_word(folder: Path, meta: Meta) -> None:
    """Writes a word about the inference weights as JSON, for Orbax's sake."""
    word = {"weights_hold": "x", "step": meta.step, "file": INFERENCE_FILE}
    files.write_text(folder / META_FILE, json.dumps(word))


def _join_threads() -> None:
    """Waits for Orbax's threads: when one fails, the others go on writing into the folder for a while."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax.") and thread is not threading.current_thread():
            # A thread keeps its own error, which is that of the save or a consequence of it.
            with contextlib.suppress(Exception):
                thread.join()


def _of_the_system(message: str) -> OSError:
    """Returns the system's reason in an error of tensorstore, which has no types for it."""
    if "No space left" in message or "Disk quota" in message:
        return OSError(errno.ENOSPC, message)
    if "Permission denied" in message or "Read-only file system" in message:
        return OSError(errno.EACCES, message)
    return OSError(message)
