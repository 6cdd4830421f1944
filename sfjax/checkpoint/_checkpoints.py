"""Checkpoints of a JAX run: one call saves x for inference and the state for resume, one restores."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from sfcore import checks, files, store, together
from sfcore.meta import Meta, as_place
from sfcore.ranks import Ranks
from sfcore.saving import Saving
from sfjax.checkpoint import _orbax, _processes, _record
from sfjax.checkpoint._arrays import OBJECTS, OWN, is_spread
from sfjax.checkpoint._exchange import import_exchange
from sfjax.checkpoint._leaves import Named, beside, check_trees, named, parameters, whole
from sfjax.checkpoint._restore import Restored, restore_into
from sfjax.checkpoint._save import Host, Job, Snapshot, evaluated, on_host
from sfjax.checkpoint._steps import Steps
from sfjax.checkpoint._weights import start_from_weights
from sfjax.state.arguments import Configurations, MicroBatches
from sfjax.state.find import _pure

_log = logging.getLogger("sfjax.checkpoint")


class Checkpoints(Saving):
    """A folder of checkpoints of one run: the newest stay, and those with the smallest metric.

    A save returns as soon as the state is copied to the host; the rest happens in the background.

    Args:
        folder: where they lie, as FOLDER/STEP; made by the first save.
        keep_newest: how many of the newest to keep, >= 1, default 2.
        keep_best: how many of the smallest metric to keep as well, >= 0, default 1.
        metric: the key of `metrics` that ranks them, default "loss".
        background: False makes every save wait until it is on disk. Default True.
        wait_for_writer: seconds that a save, and a restore, wait for another process that writes into the
            folder, >= 0, default 0: a save is refused at once, and a restore says so and goes on. For a job
            that is requeued while the old one still has time to save, as in wait_for_writer=120.
        wait_for_ranks: seconds that a rank of a run of several processes waits for another in a save or a
            restore, > 0, default 600; then every rank raises, after at most twice that.

    Raises:
        HyperparameterError: for numbers out of range.

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
        wait_for_writer: float = 0.0,
        wait_for_ranks: float = 600.0,
    ) -> None:
        super().__init__(
            folder,
            keep_newest,
            keep_best,
            metric,
            background,
            wait_for_writer,
            wait_for_ranks,
            _orbax.LAYOUT,
            _log,
        )
        self._snapshot = Snapshot()
        self._steps = Steps()

    def save(
        self,
        step: int,
        params: Any,
        opt_state: Any,
        *,
        hyperparameters: Configurations | None = None,
        extra_state: Any = None,
        buffers: Any = None,
        epoch: int = 0,
        position: int = 0,
        accumulation: MicroBatches | None = None,
        batch_size: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Saves x for inference and the whole state for resume, or nothing at all; returns the path.

        An error of the background is logged, and comes with the next `save`, `wait` or `close`. A checkpoint
        of the same step is replaced; newer ones, of a run that was turned back from, go to FOLDER/set-aside.

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
            accumulation: micro-batches an update, or (that, how many are in the gradient), which is read off
                the state of optax.MultiSteps if it is not given.
            batch_size: of a micro-batch, to be compared on resume; default not recorded.
            metrics: name -> finite number or array of one.
            extra: JSON of your own, as it is at the call.

        Raises:
            HyperparameterError: for hyperparameters out of range or of no known name (a ValueError).
            CheckpointError: for a metric that is not finite, a leaf that cannot be stored or a buffer of a
                parameter's name, before anything is written; if the save before this one failed; if there
                is no space or no permission.
        """
        with self._lock:
            ranks = self.ranks

            def asked() -> tuple[dict[str, Any], Named, dict[str, Any]]:
                values = as_place(step, epoch, position, metrics, extra)
                _record.check_configured(hyperparameters, accumulation, batch_size)
                flat = named(whole(_pure(params), _pure(opt_state), extra_state))
                given = beside(buffers, params)
                self._background.wait()
                if ranks.is_first:
                    with files.cannot(f"write into {self.folder}"):
                        files.make(self.folder)
                return values, flat, given

            def gathered() -> tuple[Meta, Host, dict[str, jax.Array], dict[str, Any]]:
                self._steps.add(params, opt_state)
                spread: dict[str, jax.Array] = {}
                if ranks.count == 1:
                    host = on_host(flat, self._snapshot)
                else:
                    host, spread = _processes.on_devices(flat)
                x = evaluated(_pure(opt_state), _pure(params))  # goes on while this thread does
                values["extra"] |= {OBJECTS: host.objects} if host.objects else {}
                values["recent"] = self._steps.recent()
                batches = _record.accumulated(host.tree["opt_state"], accumulation, batch_size)
                meta = _record.make(host.tree, hyperparameters, batches, **values)
                meta.to_json()  # what JSON has no form for must not fail later, in the background
                meta.extra = copy.deepcopy(meta.extra)  # the run goes on writing to its lists
                # Copied, because the next step may write to them, or delete them if they are donated to it.
                over_all = {name: leaf for name, leaf in given.items() if is_spread(leaf)}
                held = {name: np.array(leaf) for name, leaf in given.items() if name not in over_all}
                shipped = {**parameters(x), **held, **_processes.copied(over_all)}
                return meta, host, spread, shipped

            # All of the same program, before any of them begins what needs the others' devices.
            (values, flat, given), said = ranks.agree(
                "save", asked, tell=lambda found: _processes.program_of(found[0]["step"], found[1])
            )
            _processes.check_alike(ranks, said)
            (meta, host, spread, x), said = ranks.agree(
                "save a copy", gathered, tell=lambda found: _processes.crcs_of(found[1])
            )
            if ranks.count == 1:
                write = Job(meta, host, x).write
            else:
                own = _processes.own_arrays(ranks, host, said)
                meta.extra |= {OWN: own} if own else {}
                write = _processes.Job(ranks, meta, host, spread, x, flat).write
            self._start(meta.step, partial(write, self.folder))
        return self.folder / str(meta.step)

    def restore(
        self,
        params: Any,
        opt_state: Any,
        *,
        extra_state: Any = None,
        hyperparameters: Configurations | None = None,
        accumulation: MicroBatches | None = None,
        batch_size: int | None = None,
        resume: str | int | Path = "auto",
        strict: bool = False,
    ) -> Restored | None:
        """Restores a checkpoint into the shapes, dtypes and shardings of a target; the target is not changed.

        Everything is read and held against its record first. Schedule-Free scalars that only the
        configuration knows (lr, weight decay, beta) follow the transformation that you go on with.

        Args:
            params, opt_state, extra_state: targets, concrete or of `jax.ShapeDtypeStruct` (as from
                `jax.eval_shape`), on any devices. Iterators and generators in extra_state are moved.
            hyperparameters, accumulation, batch_size: the configured ones, as for `save`; what is given is
                compared with the saved.
            resume: "auto" (the newest, or None if there is none), "none", "latest-good" (the newest that
                verifies), "weights:PATH" (x alone, see `start_from_weights`), a step, or the path of a
                checkpoint, also of the framework-free store (see `import_exchange`; extra_state is then
                the target for its buffers).
            strict: refuse any difference from what was saved, as far as it is known: a state does not tell
                AdamW from RAdam, nor lr. For that give dataclasses as hyperparameters, here and to `save`.

        Returns:
            What was restored, or None if there is nothing to resume from.

        Raises:
            CheckpointError: naming file and leaf if it is damaged, or every leaf that does not fit.
            HyperparameterError: for hyperparameters out of range or of no known name (a ValueError).
            TypeError: for params that are no arrays.
        """
        ranks = self.ranks

        def asked() -> None:
            checks.require(TypeError, strict=(checks.FLAG, strict))
            check_trees(params, opt_state)
            _record.check_configured(hyperparameters, accumulation, batch_size)
            self.wait()
            self._heed_writer()

        _, told = ranks.agree("restore", asked, tell=lambda _: str(resume))
        ranks.require_same("resume", told, "pass the same on all processes")
        configured: dict[str, Any] = {"hyperparameters": hyperparameters, "accumulation": accumulation}
        if isinstance(resume, str) and resume.startswith("weights:"):
            weights = resume.removeprefix("weights:")
            start, _ = ranks.agree(
                "read the weights", lambda: start_from_weights(weights, params, opt_state, **configured)
            )
            return self._watched(start, None)
        configured |= {"batch_size": batch_size, "strict": strict}
        path, skipped, saved = together.choose(ranks, self.folder, resume, _orbax.LAYOUT)
        if path is None:
            _log.info(
                "starting anew: resume is %r, and %s was not looked at or is empty", resume, self.folder
            )
            return None
        path = path.absolute()
        if (path / store.META).is_file():
            restored, _ = ranks.agree(
                "restore", lambda: import_exchange(path, params, opt_state, buffers=extra_state, **configured)
            )
        else:
            restored = restore_into(
                lambda: saved or _orbax.read(path),
                params,
                opt_state,
                extra_state,
                skipped=skipped,
                ranks=ranks,
                **configured,
            )
        return self._watched(restored, restored.meta.recent)

    def observe(self, params: Any, opt_state: Any, loss: ArrayLike | None = None) -> None:
        """Notes what an update left: for the record of the next save, and for the watch after a restart.

        The first `sfcore.watch.WATCHED_STEPS` updates after `restore` are compared with the last ones before
        it; a jump is logged once, with its likely cause and what to do. Only those updates are waited for.

        Args:
            params, opt_state: as for `save`, after every update; with accumulation after every micro-batch
                or every update, as you like.
            loss: of the update, array of one or number; default not compared.

        Example:
            >>> import jax.numpy as jnp, sfjax
            >>> from sfjax.checkpoint import Checkpoints
            >>> tx, params = sfjax.schedule_free_sgd(0.1), {"w": jnp.ones(3)}
            >>> Checkpoints("run").observe(params, tx.init(params), loss=0.5)
        """
        with self._lock:
            self._steps.observe(params, opt_state, loss)

    def metrics(self) -> dict[str, float]:
        """Returns what the watch says, to be logged beside `sfjax.metrics(opt_state)`; {} before a restore.

        Returns:
            `restart_steps` (updates watched), `restart_moved` (norm of x minus the loaded x) and
            `restart_jump` (0 or 1), the keys of the torch twin.
        """
        return self._steps.metrics()

    def _make_ranks(self, name: str, limit: float) -> Ranks:
        return _processes.ranks_of(name, limit)

    def _free(self) -> None:
        self._snapshot = Snapshot()

    def _watched(self, restored: Restored, recent: Mapping[str, Any] | None) -> Restored:
        changed = {change.name for change in restored.changes}
        fresh = {"clock", "v"} if recent is None else restored.fresh
        self._steps.watch(restored.params, restored.opt_state, recent, changed, fresh)
        return restored
