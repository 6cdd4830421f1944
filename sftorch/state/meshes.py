"""What processes that hold parts of one model do together: they add up, and all of them raise or none does.

All of it is for parameters that are DTensors, whose mesh says who belongs together. A replica of DDP is a
model of its own, which one process may evaluate alone: nothing waits for the others there.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sfcore.checks import HyperparameterError
from sftorch.law.parts import PLAIN, is_divided


def _meshes(tensors: Iterable[Tensor]) -> list[Any]:
    """Returns the meshes of the DTensors among some tensors, each once, in the same order everywhere."""
    found: dict[int, Any] = {}
    for tensor in tensors:
        if type(tensor) not in PLAIN and is_divided(tensor):
            mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
            found.setdefault(id(mesh), mesh)
    return list(found.values())


Layout = tuple[Any, Any] | None


def layout(tensor: Tensor) -> Layout:
    """Returns the mesh and the placements of a DTensor, None for a tensor that is whole."""
    if type(tensor) in PLAIN or not is_divided(tensor):
        return None
    divided: Any = tensor
    return divided.device_mesh, divided.placements


def row_groups(tensor: Tensor) -> tuple[Any, ...]:
    """Returns the process groups that have the other parts of the rows that lie here; none of whole rows.

    A row is all behind one index of the first axis, which FSDP2 leaves whole.

    Returns:
        Pairs of a group and the kind of device that it works on.
    """
    lies = layout(tensor)
    if lies is None:
        return ()
    mesh, placements = lies
    cut = [i for i, one in enumerate(placements) if getattr(one, "dim", 0) != 0 and mesh.size(i) > 1]
    return tuple((mesh.get_group(i), mesh.device_type) for i in cut)


def add_up_(sums: Tensor, layouts: list[Layout]) -> None:
    """Adds up, in place, what the processes have found in their parts.

    Args:
        sums: of shape (n,).
        layouts: n of them, of the tensors that the sums are of.
    """
    if not any(layouts):
        return
    import torch.distributed as dist

    for mesh in {id(one[0]): one[0] for one in layouts if one}.values():
        of_mesh = [i for i, one in enumerate(layouts) if one and one[0] is mesh]
        for dim in range(mesh.ndim):
            if mesh.size(dim) == 1:
                continue
            # Copies of a part are not to be counted twice, so only the dimensions that divide it are summed.
            cut = [i for i in of_mesh if not layouts[i][1][dim].is_replicate()]  # type: ignore[index]
            if cut:
                some = sums[cut].to(mesh.device_type)
                dist.all_reduce(some, group=mesh.get_group(dim))
                sums[cut] = some.to(sums.device)


@contextmanager
def together(params: Iterable[Tensor]) -> Iterator[None]:
    """Makes an error inside a `with` block that of all processes that have parts of the parameters.

    All of them must come here, in the same order. Without an error this takes one number from each; without
    DTensors, nothing.

    Args:
        params: of an optimizer; no collective may depend on what could raise in the block.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    found = _meshes(params)
    groups = {mesh.get_group(dim): None for mesh in found for dim in range(mesh.ndim) if mesh.size(dim) > 1}
    if not groups:
        if error is not None:
            raise error
        return
    import torch.distributed as dist

    bad = torch.tensor([int(error is not None)], device=found[0].device_type)
    for group in groups:
        dist.all_reduce(bad, dist.ReduceOp.MAX, group=group)
    if not bad.item():
        return
    said = {dist.get_rank(): _told(error)} if error is not None else {}
    for group in groups:
        others: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(others, said, group=group)
        said = {rank: told for one in others for rank, told in one.items()}
    rank, (kind, problems) = min(said.items())
    where = f"rank {rank}" if len(said) == 1 else f"rank {rank} and {len(said) - 1} more"
    *first, last = problems
    told = [*first, f"{last} (said by {where} of {dist.get_world_size()} processes, and raised by all)"]
    raise (kind(told) if kind is HyperparameterError else kind("\n".join(told))) from error


_KINDS: tuple[Any, ...] = (HyperparameterError, ValueError, TypeError, RuntimeError)


def _told(error: Exception) -> tuple[Any, tuple[str, ...]]:
    """Returns an error as other processes can raise it: its kind, and its problems."""
    kind = next((one for one in _KINDS if isinstance(error, one)), RuntimeError)
    return kind, getattr(error, "problems", (str(error),))


# What of a model may be whole on a process: its FSDP2 modules.
_MODULES: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


def _nobody() -> None:
    return None


def gather_anew(optimizer: Any, params: Iterable[Tensor]) -> None:
    """Lets FSDP2 gather weights anew; to be called after writing to parts of parameters outside of a step.

    After a forward pass without a backward pass, as an evaluation has it, the outermost module keeps its
    whole weights for the next one, and does not see that an optimizer writes to the parts meanwhile.
    """
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None or not _meshes(params):
        return
    found = [module() for module in _MODULES.get(optimizer, [_nobody])]
    if None in found:
        # No parameter knows its module. Only types are looked at: some objects do not like isinstance.
        found = [one for one in gc.get_objects() if issubclass(type(one), kind)]
        _MODULES[optimizer] = [weakref.ref(one) for one in found]
    for module in found:
        module.reshard()
