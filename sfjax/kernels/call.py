"""Calls of the kernel: which leaves it can walk, how XLA finds it, and what it is on a mesh.

A call takes columns, lists of leaves of one length: y, z and the moments that there are, then the gradients.
It gives new ones of all but the last, in their place. Leaves that are cut over devices stay where they are: a
step treats every element alike, so each device runs it on what it has.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from sfcore.native import build
from sfcore.native.kinds import Kind

# As in xla.c.
NUMBERS = (
    *("lr_t", "wd_y", "wd_z", "k1", "k2", "share2", "eps", "share1", "correction2", "correction1"),
    *("usable", "held_x", "holds_x"),
)
TARGET = "sfjax_step"
# In a call: XLA takes 1 s to compile one of 200, 4 s for 400 and a minute for 1,000, but 2 s for 16 of 64.
MOST_LEAVES = 64
_WIDE = (np.dtype(np.float32), np.dtype(np.float64))
_log = logging.getLogger("sfjax")
Leaves: TypeAlias = list[jax.Array]


@functools.cache
def find() -> str | None:
    """Makes the kernel known to XLA, once a process; returns None, or why there is none.

    Example:
        >>> from sfjax.kernels import call
        >>> call.find() == call.find()
        True
    """
    try:
        importlib.import_module("jax.experimental.custom_partitioning")
        headers = Path(jax.ffi.include_dir())
        here = (Path(__file__).with_name("xla.c"), build.HERE / "job.h")
        library = build.Library(
            "xla", "sf_xla_step", (*here, headers / "xla/ffi/api/c_api.h"), (build.HERE, headers)
        )
        step, xla = build.find(), build.find(library)
        if isinstance(step, str) or isinstance(xla, str):
            return step if isinstance(step, str) else str(xla)
        xla.sf_xla_use(ctypes.cast(step.sf_run, ctypes.c_void_p))
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(xla.sf_xla_step), platform="cpu")
    except Exception as error:  # whatever a version of JAX lacks or refuses
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def give_notice(why: str) -> None:
    """Logs, once a process, that steps take the slower path."""
    _log.warning("the native CPU step is not available, and steps take the program of XLA: %s", why)


def why_not(columns: Sequence[Leaves]) -> str | None:
    """Returns why the kernel does not take some columns, None if it does; the last are the gradients."""
    kept = [leaf for column in columns[:-1] for leaf in column]
    if not kept:
        return "there must be leaves, got none"
    dtypes = {np.dtype(leaf.dtype) for leaf in kept}
    if len(dtypes) > 1 or not dtypes <= set(_WIDE):
        return f"leaves and state must be in one of float32 and float64, got {sorted(map(str, dtypes))}"
    meshes = {mesh for leaf in (*kept, *columns[-1]) if (mesh := _mesh(leaf))}
    kinds = {kind for mesh in meshes for kind in mesh.axis_types}
    if len(kinds) > 1 or len(meshes) > 1:
        return "leaves must be on one mesh with axes of one type"
    if kinds == {AxisType.Manual} and any(map(_varies, kept)):
        return "shard_map must have check_vma=False, got True"
    if kinds == {AxisType.Explicit} and not all(map(_alike, zip(*columns, strict=True))):
        return "gradients and state must be laid out like their parameters"
    concrete = [
        leaf for leaf in kept if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    ]
    if any(len(leaf.devices()) > 1 for leaf in concrete):
        return "a step on several devices must be in jax.jit"
    if not _has_shardy() and jax.device_count() > 1:
        return "jax_use_shardy_partitioner must be True on several devices, got False"
    return None


def is_read(dtype: Any, wide: Any) -> bool:
    """Tells whether the kernel reads gradients of a dtype as they are, beside leaves of a wide one."""
    return dtype == wide or (dtype == jnp.bfloat16 and wide == np.float32)


def _has_shardy() -> bool:
    """Tells whether a call can say how it is divided, as it can since JAX 0.7."""
    return bool(getattr(jax.config, "jax_use_shardy_partitioner", True))


def _mesh(leaf: jax.Array) -> Any:
    """Returns the mesh in the type of a leaf, None if there is none."""
    mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
    return None if mesh is None or mesh.empty else mesh


def _varies(leaf: jax.Array) -> bool:
    found = jax.typeof(leaf)
    varying = getattr(getattr(found, "mat", None), "varying", None) or getattr(found, "vma", None)
    return bool(varying)


def _alike(row: tuple[jax.Array, ...]) -> bool:
    return len({jax.typeof(leaf).sharding.spec for leaf in row}) == 1


def step(kind: Kind, columns: Sequence[Leaves], numbers: jax.Array) -> list[Leaves]:
    """Returns the new columns, without gradients.

    Args:
        kind: SGD, ADAMW, ADAMW_MOMENTUM, or MEAN, whose columns are the means and the gradients.
        columns: that `why_not` takes; gradients in another dtype than bfloat16 are cast.
        numbers: those of NUMBERS, of shape (13,), in float32 or float64.
    """
    parts = [
        _stepped(kind, [column[i : i + MOST_LEAVES] for column in columns], numbers)
        for i in range(0, len(columns[0]), MOST_LEAVES)
    ]
    return [[leaf for part in column for leaf in part] for column in zip(*parts, strict=True)]


def _stepped(kind: Kind, columns: Sequence[Leaves], numbers: jax.Array) -> list[Leaves]:
    *kept, gradients = columns
    wide, count = kept[0][0].dtype, len(gradients)
    if len({g.dtype for g in gradients}) > 1 or not is_read(gradients[0].dtype, wide):
        gradients = [g.astype(wide) for g in gradients]
    operands = [leaf for column in (*kept, gradients) for leaf in column]
    new = _where_they_lie(kind, len(kept) * count, operands)(*operands, numbers)
    return [list(new[i : i + count]) for i in range(0, len(new), count)]


def _where_they_lie(kind: Kind, results: int, operands: Leaves) -> Any:
    """Returns the call as a function of operands on a mesh, or on none."""
    local = functools.partial(_local, kind, results)
    mesh = next(filter(None, map(_mesh, operands)), None)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in operands)
    if mesh is None and (not traced or not _has_shardy()):
        return local
    if mesh is not None and set(mesh.axis_types) == {AxisType.Manual}:
        return local
    if mesh is not None and set(mesh.axis_types) == {AxisType.Explicit}:
        specs = tuple(jax.typeof(leaf).sharding.spec for leaf in operands)
        inside = (*specs, PartitionSpec())
        return jax.shard_map(local, mesh=mesh, in_specs=inside, out_specs=specs[:results], check_vma=False)
    return _partitioned(local, results, [leaf.ndim for leaf in operands])


def _local(kind: Kind, results: int, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """Runs the kernel on what one device has."""
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in operands[:results]]
    called = jax.ffi.ffi_call(
        TARGET, shapes, vmap_method="sequential", input_output_aliases={i: i for i in range(results)}
    )
    return tuple(called(*operands, kind=np.int32(kind)))


def _partitioned(local: Any, results: int, ranks: Sequence[int]) -> Any:
    """Returns the call as one that XLA divides over devices: every column is cut as its first, y."""
    from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning

    leaves = len(ranks) - results  # as many as there are gradients

    def partition(mesh: Any, operands: Any, outcome: Any) -> Any:
        *shardings, of_numbers = [one.sharding for one in operands]
        cut = [shardings[i % leaves] for i in range(len(shardings))]
        return mesh, local, tuple(cut[:results]), (*cut, of_numbers)

    def rule(mesh: Any, operands: Any, outcome: Any) -> Any:
        rows = [ArrayMapping(*(f"d{i % leaves}_{axis}" for axis in range(n))) for i, n in enumerate(ranks)]
        mappings = (*rows, ArrayMapping("numbers"))
        return SdyShardingRule(mappings, tuple(rows[:results]), need_replication_factors=("numbers",))

    found = custom_partitioning(local)
    found.def_partition(partition=partition, sharding_rule=rule)
    return found
