"""Checkpoints of a JAX run: one call saves x for inference and the state for resume, one restores."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from sfcore import _folder as _names
from sfcore.checks import HyperparameterError
from sfcore.exchange import CheckpointError
from sfcore.store import Skipped
from sfjax._find import _pure
from sfjax.checkpoint import _folder, _read, _record
from sfjax.checkpoint._leaves import named, parameters, whole
from sfjax.checkpoint._restore import Restored, restore_into
from sfjax.checkpoint._save import Job, evaluated, on_host
from sfjax.checkpoint._storable import Snapshot

log = logging.getLogger("sfjax.checkpoint")


class Checkpoints:
    """A folder of checkpoints of one run.

    A save returns as soon as the state is copied to the host; the rest happens in the background. The
    newest checkpoints stay, and those with the smallest metric.

    Args:
        folder: where they lie, as FOLDER/STEP; made by the first save.
        keep_newest: how many of the newest to keep, >= 1, default 2.
        keep_best: how many of the smallest metric to keep as well, >= 0, default 1.
        metric: the key of `metrics` that ranks them, default "loss".
        background: False makes every save wait until it is on disk. Default True.

    Raises:
        HyperparameterError: for numbers out of range.
        CheckpointError: in a run of several processes, which is not supported.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, sfjax
        >>> from sfjax.checkpoint import Checkpoints
        >>> tx = sfjax.schedule_free_adamw(0.01)
        >>> params = {"w": jnp.ones(3)}
        >>> opt_state = tx.init(params)
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        ...     path = checkpoints.save(0, params, opt_state, metrics={"loss": 0.5})
        ...     restored = checkpoints.restore(params, jax.eval_shape(tx.init, params))
        >>> restored.params["w"].tolist(), restored.meta.metrics
        ([1.0, 1.0, 1.0], {'loss': 0.5})
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_newest: int = 2,
        keep_best: int = 1,
        metric: str = "loss",
        background: bool = True,
    ) -> None:
        problems = [
            f"{name} must be a whole number >= {least}, got {value!r}: {why}"
            for name, value, least, why in (
                ("keep_newest", keep_newest, 1, "without the newest there is nothing to resume from"),
                ("keep_best", keep_best, 0, "pass 0 to keep the newest only"),
            )
            if isinstance(value, bool) or not isinstance(value, int) or value < least
        ]
        if problems:
            raise HyperparameterError(problems)
        if jax.process_count() > 1:
            raise CheckpointError(
                f"Checkpoints must run in one process, got {jax.process_count()}: use Orbax for several"
            )
        self.folder = Path(folder).absolute()
        self.metric = metric
        self._options = (keep_newest, keep_best, background)
        self._snapshot = Snapshot()
        self._scores: dict[int, float] = {}
        self._writer: Any = None

    def save(
        self,
        step: int,
        params: Any,
        opt_state: Any,
        *,
        hyperparameters: Any = None,
        extra_state: Any = None,
        buffers: Any = None,
        epoch: int = 0,
        position: int = 0,
        accumulation: Any = None,
        metrics: Mapping[str, Any] | None = None,
        recent: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Saves x for inference and the whole state for resume, or nothing at all; returns the path.

        An error of the background comes with the next `save`, `wait` or `close`. A checkpoint of the same
        step is replaced; newer ones, of a run that was turned back from, are moved to FOLDER/set-aside.

        Args:
            step: finished optimizer updates, >= 0.
            params: what the last update left (y).
            opt_state: the state of any nesting of Optax transformations with a Schedule-Free one in it.
            hyperparameters: a dataclass of `sfcore.hyperparameters`, a dict of its fields, or one for each
                Schedule-Free state. They are recorded, so that a restore can tell what has changed.
            extra_state: any tree that a resume needs: batch statistics, PRNG keys, numbers, text, NumPy
                generators, iterators with get_state and set_state (grain's).
            buffers: tree that goes beside x into the inference weights, such as batch statistics
                re-estimated at x. Not restored.
            epoch, position: place in the data; position counts the micro-batches taken in this epoch.
            accumulation: micro-batches an update, or (that, how many are in the gradient).
            metrics: name -> finite number or array of one.
            recent: what the last steps did, as `sfcore.watch` has it.
            extra: JSON of your own.

        Raises:
            CheckpointError: for a metric that is not finite or a leaf that cannot be stored, before
                anything is written; if an earlier save of the background failed; if the disk is full or
                there is no permission.
        """
        values: dict[str, Any] = {"epoch": epoch, "position": position, "recent": dict(recent or {})}
        values |= {
            "step": _whole("step", step),
            "metrics": _record.finite(metrics or {}),
            "extra": dict(extra or {}),
        }
        flat = named(whole(_pure(params), _pure(opt_state), extra_state))
        writer = self._open()
        writer.wait()
        x = evaluated(_pure(opt_state), _pure(params))
        host = on_host(flat, self._snapshot)
        values["extra"] |= {"sfjax.objects": host.objects} if host.objects else {}
        meta = _record.make(
            host.tree["params"], host.tree["opt_state"], hyperparameters, accumulation, **values
        )
        meta.to_json()  # what JSON has no form for must not fail later, in the background
        if self.metric in meta.metrics:
            self._scores[step] = meta.metrics[self.metric]
        job = Job(meta, host, parameters(x), {} if buffers is None else parameters(buffers))
        writer.save(step, host.stored, job.write_meta, job.write_inference)
        return self.folder / str(step)

    def restore(
        self,
        params: Any,
        opt_state: Any,
        *,
        extra_state: Any = None,
        hyperparameters: Any = None,
        accumulation: Any = None,
        resume: str | int | Path = "auto",
        strict: bool = False,
    ) -> Restored | None:
        """Restores a checkpoint into the shapes, dtypes and shardings of a target; the target is not changed.

        Everything is read and held against its record first. Schedule-Free scalars that only the
        configuration knows (lr, weight decay, beta) follow the transformation that you go on with.

        Args:
            params, opt_state, extra_state: targets, concrete or of `jax.ShapeDtypeStruct` (as from
                `jax.eval_shape`), on any devices. Iterators and generators in extra_state are moved.
            hyperparameters, accumulation: the configured ones, as for `save`, to be compared with the saved.
            resume: "auto" (the newest, or None if there is none), "none", "latest-good" (the newest that
                verifies), "weights:PATH" (x alone, see `start_from_weights`), a step, or a path.
            strict: refuse any difference from what was saved.

        Returns:
            What was restored, or None if there is nothing to resume from.

        Raises:
            CheckpointError: naming file and leaf if it is damaged, or every leaf that does not fit.
        """
        self.wait()
        skipped: list[Skipped] = []
        if resume == "none":
            return None
        if isinstance(resume, str) and resume.startswith("weights:"):
            from sfjax.checkpoint._weights import start_from_weights

            return start_from_weights(
                resume.removeprefix("weights:"),
                params,
                opt_state,
                hyperparameters=hyperparameters,
                accumulation=accumulation,
            )
        if resume == "latest-good":
            saved, skipped = _read.latest_good(self.folder)
        else:
            path = self._choose(resume)
            if path is None:
                log.info("%s holds no checkpoint: starting anew", self.folder)
                return None
            saved = _read.read(path)
        return restore_into(
            saved,
            params,
            opt_state,
            extra_state,
            hyperparameters,
            accumulation,
            strict=strict,
            skipped=skipped,
        )

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
            CheckpointError: if it failed; the older checkpoints are untouched.
        """
        if self._writer is not None:
            self._writer.wait()

    def close(self) -> None:
        """Waits, and ends the background threads; a later save starts them again."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _choose(self, resume: Any) -> Path | None:
        if resume == "auto":
            return _read.newest(self.folder)
        if isinstance(resume, numbers.Integral) and not isinstance(resume, bool):
            return self.folder / str(resume)
        if isinstance(resume, Path) or (isinstance(resume, str) and Path(resume).exists()):
            path = Path(resume).absolute()
            return path if _read.is_ours(path) else _read.newest(path) or path
        raise CheckpointError(
            "resume must be 'auto', 'none', 'latest-good', 'weights:PATH', a step or a path that is there, "
            f"got {resume!r}: check the spelling"
        )

    def _open(self) -> Any:
        if self._writer is None:
            from sfjax.checkpoint._orbax import Writer

            keep_newest, keep_best, background = self._options
            try:
                self._writer = Writer(self.folder, keep_newest, keep_best, self._scores, background)
            except OSError as error:
                raise CheckpointError(f"cannot write into {self.folder}: {_names.why(error)}") from error
            self._scores.update(scores(self.folder, self.metric))
        return self._writer


def scores(folder: Path, metric: str) -> dict[int, float]:
    """Returns step -> metric of the checkpoints that have one and can be read."""
    found = {}
    for step, path in _folder.steps(folder).items():
        try:
            found[step] = _read.read_meta(path).metrics[metric]
        except (CheckpointError, KeyError):
            continue
    return found


def _whole(name: str, value: Any) -> int:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"{name} must be a whole number >= 0, got {value!r}: pass int(...)")
    return value
