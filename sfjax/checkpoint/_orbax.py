"""Writes and reads one checkpoint with Orbax: state, record and inference weights, all or nothing.

State goes in as host arrays, so that the number of devices leaves no trace in the checkpoint. Record and
inference weights are written by functions that run in Orbax's background thread, because hashing
everything would hold up the next step.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sfcore import _folder as _names
from sfcore.exchange import OLDER, CheckpointError
from sfjax.checkpoint import _folder
from sfjax.checkpoint._leaves import named

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise CheckpointError(
        f"sfjax.checkpoint.Checkpoints needs the package {error.name}: pip install orbax-checkpoint"
    ) from error

_log = logging.getLogger("sfjax.checkpoint")
Write = Callable[[Path], None]
_TIMEOUT = 24 * 3600  # seconds that a background save may take; Orbax gives up after 10 minutes


class _Held(np.ndarray):
    """An array that nobody else changes while it is saved, so that Orbax need not copy it."""

    def __deepcopy__(self, memo: Any) -> _Held:
        return self


class _Late(ocp.JsonCheckpointHandler):
    """Writes an item by calling a function in the background; on disk it is a JSON item like any other."""

    @classmethod
    def typestr(cls) -> str:
        return str(ocp.JsonCheckpointHandler.typestr())

    async def async_save(self, directory: Any, item: Any = None, args: Any = None) -> Any:
        async def write() -> None:
            args.item(Path(directory))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="sfjax_late_save")]

    def save(self, directory: Any, item: Any = None, args: Any = None) -> None:
        args.item(Path(directory))


class _KeepBest:
    """Orbax preservation policy: the checkpoints of the smallest scores; those without rank nowhere."""

    def __init__(self, count: int, scores: Mapping[int, float]):
        self.count, self.scores = count, scores

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        scored = sorted((self.scores[c.step], c.step) for c in checkpoints if c.step in self.scores)
        best = {step for _, step in scored[: self.count]}
        return [c.step in best for c in checkpoints]


class Writer:
    """Saves into one folder.

    Args:
        folder: an absolute path; made if it is not there.
        keep_newest, keep_best: how many checkpoints stay.
        scores: step -> metric, filled in by the owner before each save; the smallest are best.
        background: whether `save` returns before everything is on disk.
    """

    def __init__(
        self, folder: Path, keep_newest: int, keep_best: int, scores: Mapping[int, float], background: bool
    ):
        self.folder, self.background = folder, background
        self._keep = (keep_newest, _KeepBest(keep_best, scores))
        self._step: int | None = None
        _names.make(folder)
        _folder.clean(folder)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in (_folder.META, _folder.INFERENCE):
            registry.add(item, ocp.args.JsonSave, _Late())
        keep_newest, best = self._keep
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_newest), best]),
            enable_async_checkpointing=self.background,
            async_options=ocp.AsyncOptions(timeout_secs=_TIMEOUT),
            # A rename, so that a kill never leaves half a checkpoint among the whole ones.
            todelete_subdir=_folder.REMOVED,
            # Orbax's own files may be damaged, which must not keep a run from saving.
            lightweight_initialize=True,
            save_root_metadata=False,
        )
        return ocp.CheckpointManager(self.folder, options=options, handler_registry=registry)

    def _reopen(self) -> None:
        """Makes Orbax look at the folder again; its reload() would trip over damaged checkpoints."""
        self._manager.close()
        self._manager = self._open()

    def save(self, step: int, state: Any, meta: Write, inference: Write) -> None:
        """Saves one checkpoint; an error of the background comes with the next `save` or `wait`.

        Args:
            step: its number; one that is there already is replaced, newer ones are set aside.
            state: tree of host arrays that do not change until `wait` returns.
            meta, inference: write their item's files into the folder that they get.
        """
        self.wait()
        self._step = step
        try:
            replaced, aside = _folder.make_way(self.folder, step)
            if replaced or aside:
                self._reopen()
            self._manager.save(
                step,
                force=True,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(jax.tree.map(lambda leaf: leaf.view(_Held), state)),
                    meta=ocp.args.JsonSave(meta),
                    inference=ocp.args.JsonSave(inference),
                ),
            )
        except Exception as error:
            raise self._failed(error) from error
        for path in aside:
            _log.warning("%s is newer than step %d, where this run is: it was set aside", path, step)
        if not self.background:
            self._finish()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
            CheckpointError: if it failed; what it left is removed.
        """
        if self._step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._finish()

    def close(self) -> None:
        """Waits, and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _finish(self) -> None:
        self._step = None
        _names.sync(self.folder)
        for name in (_folder.REMOVED, _folder.REPLACED):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _failed(self, error: Exception) -> CheckpointError:
        step, self._step = self._step, None
        _log.error("the save of step %s failed: %s", step, error)
        _join_threads()
        _folder.clean(self.folder)
        self._reopen()
        if isinstance(error, CheckpointError):
            return error
        cause: BaseException = error
        while not isinstance(cause, OSError) and (cause.__cause__ or cause.__context__):
            cause = cause.__cause__ or cause.__context__ or cause
        why = _names.why(cause) if isinstance(cause, OSError) else _explain(str(error))
        return CheckpointError(f"cannot write the checkpoint of step {step} into {self.folder}: {why}")


def _join_threads() -> None:
    """Waits for Orbax's threads: when one fails, the others go on writing into the folder for a while."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax.") and thread is not threading.current_thread():
            # A thread keeps its own error, which is that of the save or a consequence of it.
            with contextlib.suppress(Exception):
                thread.join()


def _explain(message: str) -> str:
    """Returns what to do about an error of tensorstore, which has no types for the system's reasons."""
    untouched = "The live state and the older checkpoints are untouched"
    if "No space left" in message or "Disk quota" in message:
        return f"the disk or the quota is full; free space or choose another folder. {untouched}"
    if "Permission denied" in message or "Read-only file system" in message:
        return f"no permission; choose a folder that this user may write to. {untouched}"
    return f"{message}. {untouched}"


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns name -> host array of an Orbax item of any layout; names are paths in its tree.

    Raises:
        CheckpointError: if Orbax cannot read it.
    """
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            found = named(reader.restore(path))
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error}; {OLDER}") from error
    return dict(zip(found.names, map(np.asarray, found.leaves), strict=True))
