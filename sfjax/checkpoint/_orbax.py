"""Writes and reads one checkpoint with Orbax: state, record and inference weights, all or nothing.

State goes in as host arrays, so that the number of devices leaves no trace in the checkpoint. Record and
inference weights are written by functions, so that hashing goes on while tensorstore writes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sfcore import files
from sfcore.exchange import OLDER, CheckpointError
from sfjax.checkpoint import _folder
from sfjax.checkpoint._leaves import named

_log = logging.getLogger("sfjax.checkpoint")
Write = Callable[[Path], None]


class _Held(np.ndarray):
    """An array that nobody else changes while it is saved, so that Orbax need not copy it."""

    def __deepcopy__(self, memo: Any) -> _Held:
        return self


class _Late(ocp.JsonCheckpointHandler):
    """Writes an item by calling a function in a thread; on disk it is a JSON item like any other."""

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
    """

    def __init__(self, folder: Path, keep_newest: int, keep_best: int, scores: Mapping[int, float]):
        self.folder = folder
        self._keep = (keep_newest, _KeepBest(keep_best, scores))
        files.make(folder)
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
            # The whole save runs in a thread of ours, which holds the run up for less time.
            enable_async_checkpointing=False,
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
        """Saves one checkpoint; when it returns, everything is on disk and what is superfluous is gone.

        Args:
            step: its number; one that is there already is replaced, newer ones are set aside.
            state: tree of host arrays that do not change meanwhile.
            meta, inference: write their item's files into the folder that they get.

        Raises:
            CheckpointError: if it failed; what it left is removed.
        """
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
            raise self._failed(step, error) from error
        for path in aside:
            _log.warning("%s is newer than step %d, where this run is: it was set aside", path, step)
        files.sync(self.folder)
        for name in (_folder.REPLACED, _folder.REMOVED):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        _log.error("the save of step %d failed: %s", step, error)
        _join_threads()
        _folder.clean(self.folder)
        self._reopen()
        if isinstance(error, CheckpointError):
            return error
        cause: BaseException = error
        while not isinstance(cause, OSError) and (cause.__cause__ or cause.__context__):
            cause = cause.__cause__ or cause.__context__ or cause
        why = files.why(cause if isinstance(cause, OSError) else _of_the_system(str(error)))
        return CheckpointError(f"cannot write the checkpoint of step {step} into {self.folder}: {why}")


def _join_threads() -> None:
    """Waits for Orbax's threads: when one fails, the others go on writing into the folder for a while."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax.") and thread is not threading.current_thread():
            # A thread keeps its own error, which is that of the save or a consequence of it.
            with contextlib.suppress(Exception):
                thread.join()


def _of_the_system(message: str) -> OSError:
    """Returns the system's reason in an error of tensorstore, which has no types for it."""
    if "No space left" in message or "Disk quota" in message:
        return OSError(errno.ENOSPC, message)
    if "Permission denied" in message or "Read-only file system" in message:
        return OSError(errno.EACCES, message)
    return OSError(message)


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
