"""Between JAX and a checkpoint: leaves as host arrays or JSON, and back to where the target's leaves lie.

Arrays that come straight from the host are not given away in a donating step, which then holds the state
twice, and have other placement than those a step returns, which compiles it twice. A jitted copy cures both.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sfcore.exchange import CheckpointError
from sfcore.meta import Meta
from sfcore.shards import Spread

# Keys of Meta.extra: where objects lie, and a rank's own small arrays.
OBJECTS, OWN = "sfjax.objects", "sfjax.own"
Number = bool | int | float | complex


def is_key(leaf: Any) -> bool:
    """Tells whether a leaf, concrete or abstract, is a typed PRNG key or an array of them."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_spread(leaf: Any) -> bool:
    """Tells whether a leaf is an array over several processes."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def is_weak(leaf: Any) -> bool:
    """Tells whether a leaf, concrete or abstract, has a weak type, as jnp.full(3, 0.5) has."""
    return bool(getattr(leaf, "weak_type", False))


def is_object(leaf: Any) -> bool:
    """Tells whether a leaf is saved as JSON: text, a NumPy generator, or an iterator that knows its place."""
    if isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | Number):
        return False
    return isinstance(leaf, str | bytes | np.random.Generator) or all(
        callable(getattr(leaf, method, None)) for method in ("get_state", "set_state")
    )


def object_state(name: str, leaf: Any) -> dict[str, Any]:
    """Returns the JSON of an object leaf.

    Raises:
        CheckpointError: if its get_state() gives something that JSON has no form for.
    """
    state = _state(leaf)
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode()}
    try:
        _check_keys(state)
        return {"json": json.loads(json.dumps(state, default=_listed))}
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name} must have a state of JSON or bytes, got {type(state).__name__} ({error}): leave it out"
        ) from error


def _check_keys(state: Any) -> None:
    """Raises TypeError for a dict that JSON would give back with other keys: 0 as "0"."""
    if isinstance(state, Mapping):
        for key in state:
            if not isinstance(key, str):
                raise TypeError(f"its keys must be text, got {key!r}")
        state = list(state.values())
    if isinstance(state, list | tuple):
        for below in state:
            _check_keys(below)


def _listed(value: Any) -> Any:
    # No more than these: a torch.Generator gives a tensor, and takes no list in its place.
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def set_objects(
    names: Sequence[str], leaves: Sequence[Any], stored: Sequence[Mapping[str, Any]]
) -> list[Any]:
    """Returns object leaves in their saved states; iterators and generators are moved in place, all or none.

    Raises:
        CheckpointError: if one does not take its state.
    """
    before = [_state(leaf) for leaf in leaves]
    states = [base64.b64decode(one["bytes"]) if "bytes" in one else one["json"] for one in stored]
    found = []
    for name, leaf, state in zip(names, leaves, states, strict=True):
        try:
            found.append(_with_state(leaf, state))
        except Exception as error:  # whatever a set_state raises
            for moved, old in zip(leaves, before[: len(found)], strict=False):
                _with_state(moved, old)
            raise CheckpointError(
                f"{name} must take the state that was saved, got {type(error).__name__}: {error}: pass an "
                "object of the kind that was saved"
            ) from error
    return found


def _state(leaf: Any) -> Any:
    if isinstance(leaf, str | bytes):
        return leaf
    return leaf.bit_generator.state if isinstance(leaf, np.random.Generator) else leaf.get_state()


def _with_state(leaf: Any, state: Any) -> Any:
    if isinstance(leaf, str | bytes):
        return state
    if isinstance(leaf, np.random.Generator):
        leaf.bit_generator.state = state
    else:
        leaf.set_state(state)
    return leaf


def array_like(name: str, leaf: Any) -> Any:
    """Returns a leaf as an array with a plain dtype: keys become their data, numbers arrays of shape ().

    Raises:
        CheckpointError: for a leaf that is none of these.
    """
    if is_key(leaf):
        return jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        return leaf
    array = np.asarray(leaf) if isinstance(leaf, np.ndarray | Number | np.generic) else None
    if array is not None and (array.dtype.kind in "biufc" or hasattr(ml_dtypes, array.dtype.name)):
        return array
    found = type(leaf).__name__ if array is None else f"dtype {array.dtype}"
    raise CheckpointError(
        f"{name} must be an array of numbers, a number, text, or an object with get_state and set_state, "
        f"got {found}: leave it out of extra_state, or convert it"
    )


def hidden(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the user gave of a record's extra."""
    return {key: value for key, value in extra.items() if key not in (OBJECTS, OWN)}


def with_own(arrays: Mapping[str, Any], meta: Meta) -> dict[str, Any]:
    """Returns the arrays with a rank's own in place of rank 0's."""
    own = meta.extra.get(OWN, {})
    found = dict(arrays)
    for name, text in own.items():
        like = np.asarray(found[name])
        found[name] = np.frombuffer(bytes.fromhex(text), like.dtype).reshape(like.shape)
    return found


def stored_form(leaf: Any) -> tuple[str, tuple[int, ...]]:
    """Returns (dtype name, shape) that a target leaf has in a checkpoint."""
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    elif isinstance(leaf, Number):
        leaf = np.asarray(leaf)
    return np.dtype(leaf.dtype).name, tuple(leaf.shape)


def place(targets: Sequence[Any], arrays: Sequence[Any], weak: Sequence[bool]) -> list[Any]:
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
            placed[i] = type(target)(np.asarray(array).item())
        elif isinstance(target, np.ndarray | np.generic):
            copied = np.array(np.asarray(array), target.dtype)
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
    if sharding is not None and (isinstance(array, Spread) or not sharding.is_fully_addressable):
        placed = jax.make_array_from_callback(array.shape, sharding, partial(_region, array))
        return placed if not weak else _as_weak(placed, sharding)
    array = np.asarray(array)
    if weak:  # which only comes from a Python number
        array = jnp.full(array.shape, array.dtype.type(0).item()).at[...].set(array)
    return jax.device_put(array, sharding)


def _region(array: Any, index: tuple[slice, ...]) -> np.ndarray:
    """Returns a part of a file's array; of one in pieces no more is read than has some of it."""
    if not isinstance(array, Spread):
        return np.asarray(array[index])
    ends = [part.indices(n)[:2] for part, n in zip(index, array.shape, strict=True)]
    return array.region([a for a, _ in ends], [b - a for a, b in ends])


def _as_weak(array: jax.Array, sharding: Any) -> Any:
    zero = array.dtype.type(0).item()
    return jax.jit(lambda leaf: jnp.full(leaf.shape, zero).at[...].set(leaf), out_shardings=sharding)(array)


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
