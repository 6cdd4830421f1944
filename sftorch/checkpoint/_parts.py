"""Tensors in parts: what of a DTensor this rank holds, who writes it, and the way back from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn

from sfcore import shards
from sfcore.exchange import CheckpointError
from sfcore.ranks import Ranks
from sftorch.law.parts import is_divided, part

Place = tuple[list[int], list[int]]  # where this rank's part begins, and its shape


class _Store:
    """The store that the process group was set up with; never waits, so that others can use it meanwhile."""

    def __init__(self) -> None:
        self._store = dist.PrefixStore("sftorch", dist.distributed_c10d._get_default_store())

    def put(self, key: str, value: bytes) -> None:
        self._store.set(key, value)  # type: ignore[arg-type]

    def get(self, key: str) -> bytes | None:
        return self._store.get(key) if self._store.check([key]) else None

    def drop(self, key: str) -> None:
        self._store.delete_key(key)


def ranks_of(name: str, limit: float) -> Ranks:
    """Returns the ranks of the default process group; of none, this process alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), _Store(), name, limit)


def gather_up(model: nn.Module) -> None:
    """Lets FSDP put its parameters in parts, as the optimizer knows them; a forward may leave them whole."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def place_of(name: str, tensor: Tensor) -> Place:
    """Returns where this rank's part of a DTensor lies in the whole.

    Raises:
        CheckpointError: if the parts are a sum that is still to be taken.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise CheckpointError(
            f"{name} must lie in parts or whole, got the terms of a sum ({placements}): redistribute it"
        )
    if mesh.get_coordinate() is None:  # of a mesh that this rank is not in
        return [0] * tensor.dim(), [0] * max(tensor.dim(), 1)
    shape, start = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if tuple(shape) != tuple(part(tensor).shape):
        raise CheckpointError(
            f"{name} must lie in one block on each rank, got {placements} of the shape "
            f"{tuple(tensor.shape)}: redistribute it"
        )
    return list(start), list(shape)


def places_of(tensors: Mapping[str, Tensor]) -> dict[str, Place]:
    """Returns leaf -> place, of those that are DTensors."""
    return {leaf: place_of(leaf, tensor) for leaf, tensor in tensors.items() if is_divided(tensor)}


def written_by(
    rank: int, tensors: Mapping[str, Tensor], places: Sequence[Mapping[str, Place]]
) -> tuple[dict[str, Tensor], dict[str, shards.Place], bool]:
    """Returns what a rank writes: each part is written by the first rank that has it.

    Args:
        rank: this one.
        tensors: leaf -> live tensor.
        places: what `places_of` returned on every rank.

    Returns:
        Leaf -> its part; leaf -> where it lies, of those that are less than the whole; and whether there are
        any such on any rank.
    """
    found: dict[str, Tensor] = {}
    starts: dict[str, shards.Place] = {}
    in_pieces = False
    for leaf, tensor in tensors.items():
        everywhere = [one.get(leaf) for one in places]
        mine = everywhere[rank]
        if mine is None:
            if rank == 0:
                found[leaf] = tensor
            continue
        holders = [one for one in everywhere if one is not None and _has_elements(one, tensor)]
        is_whole = all(one is not None and tuple(one[1]) == tuple(tensor.shape) for one in holders)
        in_pieces |= not is_whole
        if mine not in holders or everywhere.index(mine) != rank:
            continue
        found[leaf] = part(tensor)
        if not is_whole:
            starts[leaf] = shards.Place(leaf, mine[0], tensor.shape)
    return found, starts, in_pieces


def _has_elements(place: Place, tensor: Tensor) -> bool:
    return not tensor.numel() or all(place[1])


def rows_taken(array: Any, like: Tensor) -> np.ndarray:
    """Returns what belongs to this rank's part of a tensor, of an array that says something of each row."""
    if not is_divided(like):
        return np.asarray(array)
    start, shape = place_of("parameter", like)
    others = array.shape[1:]
    return _region(array, [start[0], *[0] * len(others)], [shape[0], *others])


def taken(array: Any, like: Tensor) -> np.ndarray:
    """Returns what of a file's array belongs to this rank's part of a tensor; of a plain one all."""
    if not is_divided(like) or tuple(array.shape) != tuple(like.shape):
        return np.asarray(array)
    start, shape = place_of("parameter", like)
    if len(shape) != like.dim():
        return np.zeros(shape, np.asarray(array).dtype)
    return _region(array, start, shape)


def _region(array: Any, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    if hasattr(array, "region"):
        found: np.ndarray = array.region(start, shape)
        return found
    return np.asarray(array)[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
