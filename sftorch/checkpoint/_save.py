"""One save at a time: copied here, written in a thread, its error kept until someone asks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sfcore import exchange, store
from sfcore.exchange import CheckpointError
from sftorch.checkpoint import _arrays
from sftorch.checkpoint._record import REST, Capture
from sftorch.state import forms


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


_log = logging.getLogger("sftorch.checkpoint")


class Writer:
    """Writes captures into a folder and drops what is not to be kept.

    Args:
        folder: where checkpoints lie.
        keep: (keep_newest, keep_best, metric) of `sfcore.store.prune`.
        background: write in a thread.
    """

    def __init__(self, folder: Path, keep: tuple[int, int, str], background: bool):
        self._folder, self._keep, self._background = folder, keep, background
        self._snapshot = Snapshot()
        # Not join(), which in Python 3.11 takes a thread for ended once Ctrl-C has interrupted it.
        self._idle = threading.Event()
        self._idle.set()
        self._error: CheckpointError | None = None
        self._path: Path | None = None
        self._cleaned = False

    def write(self, captured: Capture) -> None:
        """Writes at once, or copies and leaves the rest to a thread; no save may be in flight."""
        # Nobody waits for a thread that is started while the program ends, in a function of atexit.
        if not self._background or not threading.main_thread().is_alive():
            self._save(captured, {leaf: tensor.detach().cpu() for leaf, tensor in captured.tensors.items()})
            self.wait()
            return
        leaves = self._snapshot.take(captured.tensors)
        claim = threading.Lock()

        def save() -> None:
            if claim.acquire(blocking=False):
                self._save(captured, leaves)

        try:
            self._idle.clear()
            # No daemon: a program that ends normally waits for its last save.
            threading.Thread(target=save, name="sftorch.checkpoint").start()
        except BaseException:  # no more threads, or Ctrl-C, which leaves open whether there is one now
            if claim.acquire(blocking=False):
                self._idle.set()
            raise

    def wait(self) -> Path | None:
        """Waits for the save in flight; returns the last path, or raises the save's error, once."""
        self._idle.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._path

    def close(self) -> None:
        """Waits, and frees the copies."""
        try:
            self.wait()
        finally:
            self._snapshot = Snapshot()

    @torch.no_grad()
    def _save(self, captured: Capture, leaves: Mapping[str, Tensor]) -> None:
        try:
            self._snapshot.wait()
            self._path = self._write(captured, leaves)
        except CheckpointError as error:
            self._fail(error)
        except Exception as error:
            failure = CheckpointError(f"the save of step {captured.meta.step} failed: {error!r}")
            failure.__cause__ = error
            self._fail(failure)
        finally:
            self._idle.set()

    def _fail(self, error: CheckpointError) -> None:
        self._error = error
        _log.error("%s", error)

    def _write(self, captured: Capture, leaves: Mapping[str, Tensor]) -> Path:
        if not self._cleaned:  # not at construction: another process may be saving while this one only reads
            store.clean(self._folder)
            self._cleaned = True
        leaves = _joined(leaves)
        arrays = captured.arrays | {leaf: _arrays.to_numpy(tensor, leaf) for leaf, tensor in leaves.items()}
        x = [average.compute(leaves) for average in captured.averages]
        averages = {
            f"x/{average.name}": _arrays.to_numpy(average.ship(value))
            for average, value in zip(captured.averages, x, strict=True)
        }
        prints = {"x": exchange.fingerprint(exchange.of_role(averages, "x"))}
        if captured.meta.weights_hold == "y":
            prints["y"] = exchange.fingerprint(exchange.of_role(arrays, "y"))
        meta = replace(captured.meta, fingerprints=prints, recent=captured.recent())
        inference = {
            entry: averages[leaf] if leaf in averages else arrays[leaf]
            for entry, leaf in captured.inference.items()
        }
        step = captured.meta.step
        for newer in store.set_aside(self._folder, newer_than=step):
            _log.warning("%s is newer than step %d, where this run is: it was set aside", newer, step)
        path = store.write(self._folder, meta, arrays, inference)
        store.prune(self._folder, *self._keep)
        return path


def _joined(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the leaves with y (or x, where the parameters hold that) in full in place of its halves."""
    found = {leaf: tensor for leaf, tensor in leaves.items() if not leaf.startswith(f"{REST}/")}
    for leaf in leaves.keys() - found.keys():
        held = f"y/{leaf.removeprefix(f'{REST}/')}"
        found[held] = forms.join(found[held], leaves[leaf])
    return found
