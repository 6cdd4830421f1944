"""A host copy of live tensors that blocks as briefly as a copy can, in memory that is used again.

Fresh memory costs more than the copy (its pages are made on first touch: 22 times the time, measured on
100 MB), so the buffers stay from save to save. From CUDA the copies are queued on the current stream,
into pinned memory: the host goes on at once and the next step's kernels wait for them in order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Snapshot:
    """Host buffers by leaf; `take` fills them, `wait` returns when they are filled."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._events: list[torch.cuda.Event] = []

    # The copies are written to again in the next save, which tensors of inference mode allow only there.
    @torch.inference_mode(False)
    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns leaf -> copy on the host; the caller has finished with the copies taken before.

        Args:
            tensors: leaf -> dense tensor of any dtype and device.
        """
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
