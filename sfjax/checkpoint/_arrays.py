"""Reads the arrays of an Orbax item leaf by leaf, so that damage is found in the leaf where it is.

Orbax reads all leaves at once, in tasks: one bad leaf makes it fail without saying which, and leaves the
other tasks to print their errors. So the layout that it writes today is read with tensorstore alone; Orbax
itself reads any other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sfcore import exchange
from sfcore.exchange import OLDER, CheckpointError

_ARRAYS = ("np.ndarray", "jax.Array", "scalar")


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns name -> host array of an Orbax item; names are paths in its tree, joined by "/".

    Raises:
        CheckpointError: naming the file or the leaf that cannot be read.
    """
    layout = _layout(path)
    keys = [[str(part["key"]) for part in leaf["key_metadata"]] for leaf in layout["tree_metadata"].values()]
    if not layout.get("use_ocdbt") or not isinstance(layout.get("use_zarr3"), bool):
        from sfjax.checkpoint import _orbax

        return _orbax.read_arrays(path)
    import tensorstore

    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 100_000_000}})
    driver = "zarr3" if layout["use_zarr3"] else "zarr"
    opened = [
        tensorstore.open(_spec(path, driver, parts), open=True, read=True, context=context) for parts in keys
    ]
    stores = [_done(path, parts, future) for parts, future in zip(keys, opened, strict=True)]
    reading = [store.read() for store in stores]
    return {"/".join(parts): _done(path, parts, future) for parts, future in zip(keys, reading, strict=True)}


def _layout(path: Path) -> dict[str, Any]:
    file = path / "_METADATA"
    try:
        layout = json.loads(file.read_text(encoding="utf-8"))
        for leaf in layout["tree_metadata"].values():
            leaf["key_metadata"][0], [part["key"] for part in leaf["key_metadata"]]
            leaf["value_metadata"]["value_type"]
    except OSError as error:
        raise CheckpointError(exchange.cannot_read(file, error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: it must describe Orbax's tree; {OLDER}") from error
    # Empty nodes are described too, as "None", "Dict" and so on; there is nothing to read of them.
    leaves = {
        k: leaf
        for k, leaf in layout["tree_metadata"].items()
        if leaf["value_metadata"]["value_type"] in _ARRAYS
    }
    found: dict[str, Any] = layout | {"tree_metadata": leaves}
    return found


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
