"""The folder of a JAX run: what lies where, and how one checkpoint is written and read with Orbax.

FOLDER/100/meta/metadata                        the record (sfcore.meta), JSON
           state/...                            everything a resume needs (Orbax, tensorstore)
           inference/inference.safetensors      x, plain names: what to ship

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from sfcore import exchange, files, store
from sfcore.exchange import OLDER, CheckpointError
from sfcore.meta import Meta
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
        arrays: name -> host array.
        roles: name -> role (see `_leaves`), of the leaves that have one.
    """

    path: Path
    meta: Meta
    arrays: dict[str, np.ndarray]
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
    arrays = _verified(path / STATE, record)
    roles = {name: about["role"] for name, about in record.items() if "role" in about}
    return Saved(path, meta, arrays, roles)


def read_inference(path: Path, meta: Meta) -> dict[str, np.ndarray]:
    """Reads and verifies the weights x of a checkpoint.

    Raises:
        CheckpointError: as `read`.
    """
    record = _recorded(path, meta, INFERENCE_FILE)
    file = path / INFERENCE / INFERENCE_FILE
    tensors = exchange.read_tensors(file, record)
    exchange.check_metadata(file, store.about_inference(meta))
    return tensors


def _verify(path: Path) -> Saved:
    saved = read(path)
    read_inference(path, saved.meta)
    return saved


LAYOUT = store.Layout(_checkpoints, lambda step, older: str(step), read_meta, _verify)


def _recorded(path: Path, meta: Meta, item: str) -> Mapping[str, Any]:
    if item not in meta.tensors:
        raise CheckpointError(f"{path} must have a record of {item}, got {sorted(meta.tensors)}; {OLDER}")
    record: Mapping[str, Any] = meta.tensors[item]
    return record


def _verified(path: Path, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not path.is_dir():
        raise CheckpointError(f"{path} is missing: check the path, or {OLDER}")
    found, arrays = read_arrays(path), {}
    for name, about in record.items():
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


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns name -> host array of an Orbax item; names are paths in its tree, joined by "/".

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
    reading = [one.read() for one in stores]
    return {"/".join(parts): _done(path, parts, future) for parts, future in zip(keys, reading, strict=True)}


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

    try:
        return store.put(folder, step, fill, LAYOUT)
    except CheckpointError:
        raise
    except Exception as error:
        cause: BaseException = error
        while not isinstance(cause, OSError) and (cause.__cause__ or cause.__context__):
            cause = cause.__cause__ or cause.__context__ or cause
        why = files.why(cause if isinstance(cause, OSError) else _of_the_system(str(error)))
        raise CheckpointError(f"cannot write the checkpoint of step {step} into {folder}: {why}") from error


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
