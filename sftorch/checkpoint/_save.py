"""Copies what was captured to the host, and writes it: fast while the run waits, thorough afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfcore import exchange, store, together
from sfcore.ranks import Ranks
from sfcore.shards import Place
from sftorch.checkpoint import _arrays
from sftorch.checkpoint._record import REST, Average, Capture
from sftorch.state import eight, forms

PIECE = 1 << 17  # elements of x that are made at once


class Snapshot:
    """Host buffers by leaf; `take` fills them, `wait` returns when they are filled."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._events: list[torch.cuda.Event] = []

    # The copies are written to again in the next save, which tensors of inference mode allow only there.
    @torch.inference_mode(False)
    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor], to_keep: bool) -> dict[str, Tensor]:
        """Returns leaf -> copy on the host; the caller has finished with the copies taken before.

        Args:
            tensors: leaf -> dense tensor of any dtype and device.
            to_keep: False if the tensors do not change meanwhile; those on the host are then not copied.
        """
        if not to_keep:
            return {leaf: tensor.detach().cpu() for leaf, tensor in tensors.items()}
        self._buffers = {leaf: self._buffer(leaf, tensor) for leaf, tensor in tensors.items()}
        for leaf, tensor in tensors.items():
            self._buffers[leaf].copy_(tensor, non_blocking=True)
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        self._events = [torch.cuda.current_stream(device).record_event() for device in devices]
        return dict(self._buffers)

    def wait(self) -> None:
        """Waits until the copies from CUDA have arrived; from any thread."""
        for event in self._events:
            event.synchronize()

    def _buffer(self, leaf: str, tensor: Tensor) -> Tensor:
        old = self._buffers.get(leaf)
        if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            return old
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


class Share(NamedTuple):
    """What this rank writes of a checkpoint.

    Attributes:
        leaves: leaf -> tensor, on the host once a `Snapshot` has taken it: its part of a DTensor.
        places: leaf -> where the part lies, of those that are less than the whole.
        in_pieces: whether any rank has such.
    """

    leaves: dict[str, Tensor]
    places: dict[str, Place]
    in_pieces: bool


@torch.no_grad()
def write(ranks: Ranks, folder: Path, captured: Capture, share: Share) -> Path:
    """Writes a checkpoint into the folder of its run, with all other ranks; returns its path.

    Args:
        ranks: that call this.
        folder: where checkpoints lie.
        captured: the checkpoint.
        share: what is written here; its tensors do not change meanwhile.
    """
    leaves = _joined(share.leaves)
    arrays = captured.arrays | {leaf: _arrays.to_numpy(tensor, leaf) for leaf, tensor in leaves.items()}

    x = {
        f"x/{average.name}": exchange.Made(
            _arrays.dtype_of(average.dtype),
            tuple(leaves[f"y/{average.name}"].shape),
            partial(_pieces_of_x, average, leaves),
        )
        for average in captured.averages
        if f"y/{average.name}" in leaves
    }
    # A stored x, of a run with beta 0, is not what is shipped.
    held: dict[str, exchange.Leaf] = {**arrays, **x}
    inference = {entry: held[leaf] for entry, leaf in captured.inference.items() if leaf in held}
    meta = replace(captured.meta, recent=captured.recent())
    if ranks.count == 1:
        return store.write(folder, meta, arrays, inference)
    places = share.places | {
        f"x/{leaf.removeprefix('y/')}": where for leaf, where in share.places.items() if leaf.startswith("y/")
    }
    part = together.Part(
        arrays,
        inference,
        {leaf: where for leaf, where in share.places.items() if leaf in arrays},
        {
            entry: places[leaf]._replace(leaf=entry)
            for entry, leaf in captured.inference.items()
            if entry in inference and leaf in places
        },
    )
    return together.write(ranks, folder, meta, part, share.in_pieces)


def _pieces_of_x(average: Average, leaves: Mapping[str, Tensor]) -> Iterator[np.ndarray]:
    """Yields x as it is shipped, in pieces that stay in a processor's cache if that can be."""
    own = {leaf: leaves[leaf] for leaf in average.needs() if leaf in leaves}
    first = own[f"y/{average.name}"]
    cuts: Iterable[Mapping[str, Tensor]] = [own]
    if all(t.shape == first.shape and t.is_contiguous() for t in own.values()):
        flat = {leaf: tensor.view(-1) for leaf, tensor in own.items()}
        starts = range(0, first.numel(), PIECE)
        cuts = ({leaf: tensor[i : i + PIECE] for leaf, tensor in flat.items()} for i in starts)
    for cut in cuts:
        with torch.no_grad():  # a thread has its own grad mode
            found = _arrays.to_numpy(average.ship(average.compute(cut)))
        yield found


def _joined(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the leaves with y (or x, where the parameters hold that) in full in place of its halves."""
    found = {leaf: tensor for leaf, tensor in leaves.items() if not leaf.startswith(f"{REST}/")}
    for leaf in leaves.keys() - found.keys():
        held = f"y/{leaf.removeprefix(f'{REST}/')}"
        found[held] = forms.join(found[held], leaves[leaf])
        if leaves[leaf].dtype is torch.int8:  # it has the end of the gap as well
            name = leaf.removeprefix(f"{REST}/")
            parts = {"gap": leaves[f"gap/{name}"], "y_rest": leaves[leaf]}
            found[f"gap/{name}"] = eight.gap_code(parts)
    return found
