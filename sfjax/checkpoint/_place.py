"""Puts host arrays where the target's leaves lie, so that the next step neither copies nor compiles anew.

Arrays that come straight from the host are not given away in a donating step, which then holds the state
twice, and have other placement than those a step returns, which compiles it twice. A jitted copy cures both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sfcore.exchange import CheckpointError
from sfjax.checkpoint._storable import Number, is_key


def place(targets: Sequence[Any], arrays: Sequence[np.ndarray], weak: Sequence[bool]) -> list[Any]:
    """Returns the arrays as the targets' types, on their devices.

    Args:
        targets: jax.Arrays, `jax.ShapeDtypeStruct`s (without sharding: the default device), PRNG keys,
            NumPy arrays or Python numbers.
        arrays: a host array for each, of the right shape and dtype.
        weak: for each whether it gets a weak type.
    """
    placed: list[Any] = [None] * len(targets)
    shardings = _concrete([sharding_of(target) for target in targets])
    together: dict[Any, list[int]] = {}
    for i, (target, array) in enumerate(zip(targets, arrays, strict=True)):
        if isinstance(target, Number):
            placed[i] = type(target)(array.item())
        elif isinstance(target, np.ndarray | np.generic):
            copied = np.array(array, target.dtype)
            placed[i] = copied if isinstance(target, np.ndarray) else copied[()]
        else:
            sharding = shardings[i]
            together.setdefault(None if sharding is None else frozenset(sharding.device_set), []).append(i)
    for indices in together.values():
        on_device = _owned(
            [_put(arrays[i], weak[i], shardings[i]) for i in indices], [shardings[i] for i in indices]
        )
        for i, leaf in zip(indices, on_device, strict=True):
            placed[i] = leaf
    return [_as_key(target, leaf) for target, leaf in zip(targets, placed, strict=True)]


def sharding_of(target: Any) -> Any:
    """Returns the sharding that a target asks for, or None if its placement is JAX's to choose."""
    if isinstance(target, jax.Array) and not getattr(target, "committed", True):
        return None
    sharding = getattr(target, "sharding", None)
    # A key's data has one axis more; keys are small, so every device of the mesh gets all of them.
    if sharding is not None and is_key(target) and hasattr(sharding, "spec"):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def _concrete(shardings: list[Any]) -> list[Any]:
    """Returns shardings with devices for those of an abstract mesh, as jax.eval_shape gives to explicit axes.

    Raises:
        CheckpointError: if neither the other shardings nor jax.set_mesh say which devices.
    """
    meshes = [one.mesh for one in shardings if isinstance(one, NamedSharding)]
    if all(isinstance(mesh, Mesh) for mesh in meshes):
        return shardings
    concrete = [mesh for mesh in [jax.sharding.get_mesh(), *meshes] if isinstance(mesh, Mesh)]
    devices = {mesh.abstract_mesh: mesh for mesh in concrete}

    def on_devices(sharding: Any) -> Any:
        if not isinstance(sharding, NamedSharding) or isinstance(sharding.mesh, Mesh):
            return sharding
        if sharding.mesh not in devices:
            raise CheckpointError(
                f"params must lie on devices, got {sharding.mesh}: pass the arrays themselves as the "
                "target, or restore within jax.set_mesh(mesh)"
            )
        return NamedSharding(devices[sharding.mesh], sharding.spec, memory_kind=sharding.memory_kind)

    return [on_devices(sharding) for sharding in shardings]


def _put(array: Any, weak: bool, sharding: Any) -> Any:
    if weak:  # which only comes from a Python number
        array = jnp.full(array.shape, array.dtype.type(0).item()).at[...].set(array)
    return jax.device_put(array, sharding)


def _owned(leaves: list[Any], shardings: list[Any]) -> list[Any]:
    """Returns them in buffers that XLA owns, placed as a jitted step's results are."""
    copy = jax.jit(lambda tree: [jnp.copy(leaf) for leaf in tree], out_shardings=shardings, donate_argnums=0)
    copied: list[Any] = copy(leaves)
    return copied


def _as_key(target: Any, leaf: Any) -> Any:
    if not is_key(target):
        return leaf
    spec = jax.random.key_impl(target) if isinstance(target, jax.Array) else _implementation(target.dtype)
    return jax.random.wrap_key_data(leaf, impl=spec)


def _implementation(dtype: Any) -> str:
    """Returns the name of the implementation of an abstract key's dtype."""
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.random.key(0, impl=name).dtype == dtype:
            return name
    raise TypeError(f"extra_state must hold PRNG keys of JAX's own kinds, got {dtype}: pass a concrete key")
