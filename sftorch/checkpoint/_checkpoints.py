"""What `sftorch.checkpoint` offers: saves and restores in a folder.

FOLDER/step_000000100/state.safetensors      y, z, moments, buffers, gradients, random states
                      inference.safetensors  x and the buffers, by the names of model.state_dict()
                      meta.json              what it is: sfcore.meta, the same in both frameworks
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from sfcore import checks, exchange, store, together
from sfcore.changes import Change, check_batches, check_laws, of_batches, refuse
from sfcore.exchange import CheckpointError
from sfcore.meta import Meta, as_accumulation, as_place, of_rank
from sfcore.ranks import Ranks
from sfcore.saving import Saving
from sfcore.store import Skipped
from sftorch import _rng
from sftorch.checkpoint import _arrays, _parts, _restore, _weights
from sftorch.checkpoint._record import MODEL_EXTRA, Capture, capture, parameter_names, trained_by_others
from sftorch.checkpoint._save import Share, Snapshot, write
from sftorch.checkpoint._steps import steps_of
from sftorch.law.parts import is_divided
from sftorch.state import arguments
from sftorch.state.state_dict import ScheduleFreeOptimizer, check_optimizer

_log = logging.getLogger("sftorch.checkpoint")


class Restored(NamedTuple):
    """What a restore found and did.

    Attributes:
        path: the checkpoint or weights file.
        meta: its record; None for weights alone. step, epoch and position say where to go on.
        notices: sentences for the user, also logged: what differs, what was skipped, what starts anew.
        skipped: newer checkpoints that do not verify, and why.
        extra: what `save` was given as extra; its tensors are on the CPU.
    """

    path: Path
    meta: Meta | None
    notices: list[str]
    skipped: list[Skipped]
    extra: dict[str, Any]


def _run_of(
    model: nn.Module, optimizer: ScheduleFreeOptimizer, place: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Returns what a rank tells the others before a save: what must be the same on all."""
    names = parameter_names(model, optimizer)
    params = {name: [_arrays.name_of(p.dtype), list(p.shape)] for p, name in names.items()}
    run = {"step": place["step"], "accumulation": place["accumulation"], "optimizer": optimizer.law.name}
    return {"run": run, "params": params}


def _check_alike(ranks: Ranks, told: Sequence[Any]) -> None:
    """Raises on every rank unless all are about to save the same step of the same model."""
    if ranks.count == 1:
        return
    for name in told[0]["run"]:
        ranks.require_same(name, [one["run"][name] for one in told], "let all ranks take the same steps")
    params = [one["params"] for one in told]
    for name in sorted(set().union(*params)) if any(one != params[0] for one in params) else ():
        ranks.require_same(
            f"parameter {name!r} (dtype and shape)",
            [one.get(name) for one in params],
            "build the same model and optimizer on all ranks",
        )


def _parts_of(captured: Capture, count: int) -> dict[str, Any]:
    """Returns where this rank's parts lie, and the CRCs of gradients that have none."""
    if any(map(is_divided, captured.own.values())):
        raise CheckpointError("extra must hold plain tensors, got DTensors: save full_tensor() of them")
    whole = {n: t for n, t in captured.tensors.items() if n.startswith("grad/") and not is_divided(t)}
    crcs = {n: exchange.describe(_arrays.to_numpy(t.cpu()))["crc32"] for n, t in whole.items() if count > 1}
    return {"places": _parts.places_of(captured.tensors), "gradients": crcs}


def _check_gradients(ranks: Ranks, captured: Capture, told: Sequence[Any]) -> None:
    """Raises on every rank unless what is accumulated is the same on all, or lies in parts."""
    if ranks.count == 1 or not captured.meta.accumulation["position"]:
        return
    found = [one["gradients"] for one in told]
    none = not any(leaf.startswith("grad/") for leaf in captured.tensors)
    if none or any(one != found[0] for one in found):
        kind = "none in p.grad" if none else "others on each"
        raise CheckpointError(
            f"gradients of an unfinished update must be the same on every rank, got {kind}, as no_sync() and "
            "set_requires_gradient_sync(False) leave them: save after an update, with accumulation=(N, 0)"
        )


class Checkpoints(Saving):
    """Saves and restores runs in a folder; a context manager that waits for the last save.

    Args:
        folder: where the checkpoints lie; made at the first save.
        keep_newest: how many of the newest to keep, >= 1, default 2.
        keep_best: how many of the smallest metric to keep beside those, >= 0, default 1.
        metric: the key of `save(metrics=...)` that ranks, default "loss".
        background: copy the state and write it in a thread, default True. An error of the thread is
            logged at once and raised by the next `save`, `wait` or `close`.
        wait_for_writer: seconds that a save, and a restore, wait for another process that writes into the
            folder, >= 0, default 0: a save is refused at once, and a restore says so and goes on. For a job
            that is requeued while the old one still has time to save, as in wait_for_writer=120.
        wait_for_ranks: seconds that a rank of a run of several processes waits for another in a save or a
            restore, > 0, default 600; then every rank raises, after at most twice that.

    Raises:
        HyperparameterError: with every number that is out of range (a ValueError).

    Example:
        >>> import sftorch, tempfile, torch
        >>> from sftorch.checkpoint import Checkpoints
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = sftorch.AdamWScheduleFree(model.parameters())
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        ...     checkpoints.save(model, optimizer, metrics={"loss": 0.5})
        ...     restored = checkpoints.restore(model, optimizer)
        >>> restored.meta.step
        1
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
    ):
        super().__init__(
            folder,
            keep_newest,
            keep_best,
            metric,
            background,
            wait_for_writer,
            wait_for_ranks,
            store.PLAIN,
            _log,
        )
        self._snapshot = Snapshot()
        self._warned = False

    def save(
        self,
        model: nn.Module,
        optimizer: ScheduleFreeOptimizer,
        *,
        step: int | None = None,
        epoch: int = 0,
        position: int = 0,
        accumulation: tuple[int, int] = (1, 0),
        batch_size: int | None = None,
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves everything a resume needs, and x for inference. In either mode, at any micro-batch.

        A checkpoint of the same step is replaced; newer ones, of a run that was turned back from, go to
        FOLDER/set-aside.

        Args:
            model: the module that holds the optimizer's parameters.
            optimizer: any of sftorch's.
            step: finished optimizer steps, default the optimizer's own count.
            epoch: epochs finished, default 0.
            position: micro-batches taken in this epoch, default 0.
            accumulation: (micro-batches an update, of them already in the gradients), default (1, 0);
                the gradients are saved if the second is not 0.
            batch_size: of a micro-batch, to be compared on resume; default not recorded.
            metrics: finite numbers that rank checkpoints; the smallest `metric` is kept.
            extra: your own, back from `restore` in `Restored.extra`: nested dicts, lists, numbers,
                strings and tensors, such as scheduler.state_dict() and scaler.state_dict().

        Raises:
            CheckpointError: if something cannot be saved, or the save before this one failed.
            TypeError: if the optimizer is not one of sftorch's, or the model no module.
        """
        with self._lock:
            ranks = self.ranks

            def asked() -> dict[str, Any]:
                arguments.check_module(model)
                check_optimizer(optimizer)
                own = max(optimizer._books(group)["k"] for group in optimizer.param_groups)
                place = as_place(own if step is None else step, epoch, position, metrics, extra)
                place["accumulation"] = as_accumulation(accumulation, batch_size)
                self._background.wait()
                return place

            def gathered() -> Capture:
                found = capture(model, optimizer, place, ranks.rank)
                found.arrays.update(_rng.capture(ranks.rank))
                return found

            # All of the same run, before any of them begins what needs the others.
            place, told = ranks.agree(
                "save", asked, tell=lambda place: ranks.count > 1 and _run_of(model, optimizer, place)
            )
            _check_alike(ranks, told)
            captured, told = ranks.agree(
                "save a copy", gathered, tell=lambda found: _parts_of(found, ranks.count)
            )
            _check_gradients(ranks, captured, told)
            places = [one["places"] for one in told]
            share = Share(*_parts.written_by(ranks.rank, captured.tensors, places))
            share.leaves.update(captured.own)
            leaves = self._snapshot.take(share.leaves, to_keep=self._background.is_used)

            def save() -> Path:
                self._snapshot.wait()
                return write(ranks, self.folder, captured, share._replace(leaves=leaves))

            self._start(captured.meta.step, save)
            self._warn_of(trained_by_others(model, optimizer))

    def _warn_of(self, others: Sequence[str]) -> None:
        """Says once that weights are saved as they are, which is y where another optimizer trains them."""
        if others and not self._warned:
            self._warned = True
            _log.warning(
                "%d weights that want gradients are not this optimizer's, the first %r: they are saved as "
                "they are. If another Schedule-Free optimizer holds them, call its eval() before save, or "
                "what is saved for inference is y there; its state is not saved: pass it in extra",
                len(others),
                others[0],
            )

    def restore(
        self,
        model: nn.Module,
        optimizer: ScheduleFreeOptimizer,
        *,
        resume: str | int | Path = "auto",
        strict: bool = False,
        rng: bool = True,
        accumulation: int | None = None,
        batch_size: int | None = None,
        prior_steps: int | None = None,
    ) -> Restored | None:
        """Brings model, optimizer and random states back; everything is verified before anything changes.

        The optimizer stays in the mode it is in, and the weights hold what that mode wants. Its next 20
        steps are watched (`sfcore.watch`): a jump of c or of x is logged once, and `metrics()` has
        restart_steps, restart_moved and restart_jump.

        Args:
            model: built as the saved one was.
            optimizer: built over its parameters; its configuration holds where it differs from the
                checkpoint's, and `Restored.notices` says so. Build lr schedulers before.
            resume: "auto" the newest checkpoint if there is one; "latest-good" the newest that verifies;
                "none"; a step; the path of a checkpoint; "weights:PATH" weights without state.
            strict: refuse any difference of configuration instead, default False.
            rng: set torch's, CUDA's, NumPy's and Python's random states, default True.
            accumulation: micro-batches an update in this run, to be compared; default not compared.
            batch_size: of a micro-batch in this run, to be compared; default not compared.
            prior_steps: for "weights:PATH": as how many earlier steps the weights count, 0 included;
                default the optimizer's own, or else `sfcore.restart.weights_only_policy`.

        Returns:
            What was found, or None for "none", and in a folder without checkpoints for "auto" and
            "latest-good".

        Raises:
            CheckpointError: naming file, leaf, what was found and what to do; nothing has changed then.
            HyperparameterError: for prior_steps out of range (a ValueError); nothing has changed then.
            TypeError: if the optimizer is not one of sftorch's, the model no module, or a flag no bool.
        """
        ranks = self.ranks

        def asked() -> None:
            arguments.check_module(model)
            check_optimizer(optimizer)
            checks.require(TypeError, strict=(checks.FLAG, strict), rng=(checks.FLAG, rng))
            check_batches(accumulation, batch_size)
            if prior_steps is not None:
                checks.check(optimizer.law.options, {"prior_steps": prior_steps})
            self.wait()
            self._heed_writer()

        _, told = ranks.agree("restore", asked, tell=lambda _: str(resume))
        ranks.require_same("resume", told, "pass the same on all ranks")
        if isinstance(resume, str) and resume.startswith("weights:"):
            weights = Path(resume.removeprefix("weights:"))
            put, _ = ranks.agree("read the weights", lambda: _weights.prepare(weights, model, optimizer))
            restored = Restored(weights, None, put(prior_steps), [], {})
            steps_of(optimizer).watch(optimizer, None, fresh=("clock", "v"))
            return self._report(restored)
        path, skipped, _ = together.choose(ranks, self.folder, resume)
        steps = steps_of(optimizer)  # sees the steps from here on, also of a run that starts anew
        if path is None:
            return None

        def planned() -> tuple[Meta, dict[str, Any], _restore.Plan, list[Change]]:
            meta = store.read_meta(path)
            arrays = store.open_parts(path, meta)
            check_laws(path, meta)
            plan, changes = _restore.plan(path, meta, arrays, model, optimizer)
            changes += of_batches(meta.accumulation, accumulation, batch_size)
            if strict:
                refuse(path, changes)
            return of_rank(meta, ranks.rank), arrays, plan, changes

        (meta, arrays, plan, changes), _ = ranks.agree("restore", planned)
        extra = {k: v for k, v in meta.extra.items() if k != MODEL_EXTRA}
        notices = [f"{skip.path} was skipped: {skip.why}" for skip in skipped]
        notices += [str(change) for change in changes]
        if accumulation not in (None, meta.accumulation["steps"]):
            meta, dropped = _restore.without_partial_update(plan, meta)
            notices += dropped
        _restore.commit(plan, model, optimizer)
        saved = len(meta.ranks) or 1
        if saved != ranks.count:
            others = "; the others keep the random states they have and take the rest of rank 0"
            notices.append(
                f"the checkpoint is of {saved} process(es), this run has {ranks.count}: random numbers, "
                f"place in the data and extra go on as they were on {min(saved, ranks.count)} of them"
                + others
                * (saved < ranks.count)
            )
        if rng and ranks.rank < saved:
            notices += _rng.restore(_rng.own(arrays, ranks.rank))
        changed = {change.name for change in changes}
        # What the last steps did was seen in this rank's parts only.
        recent = None if saved != ranks.count and store.is_spread(meta) else meta.recent
        steps.watch(optimizer, recent, changed, plan.fresh)
        return self._report(Restored(path, meta, notices, list(skipped), _arrays.decode(extra, arrays)))

    def observe(self, optimizer: ScheduleFreeOptimizer, loss: float | Tensor) -> None:
        """Notes the loss of a micro-batch, for the watch over the first steps after a restart.

        The steps themselves are seen without it, from the first `save` or `restore` on.

        Args:
            optimizer: any of sftorch's.
            loss: number or tensor of one; the mean of those since the last step is the loss of a step.

        Example:
            >>> import sftorch, torch
            >>> from sftorch.checkpoint import Checkpoints
            >>> optimizer = sftorch.SGDScheduleFree([torch.nn.Parameter(torch.ones(2))])
            >>> Checkpoints("run").observe(optimizer, loss=0.5)
        """
        check_optimizer(optimizer)
        checks.require(TypeError, loss=(checks.LOSS, loss))
        steps_of(optimizer).add_loss(loss)

    def _make_ranks(self, name: str, limit: float) -> Ranks:
        return _parts.ranks_of(name, limit)

    def _free(self) -> None:
        self._snapshot = Snapshot()

    def _report(self, restored: Restored) -> Restored:
        step = "" if restored.meta is None else f" at step {restored.meta.step}"
        _log.info("resumed from %s%s", restored.path, step)
        for notice in restored.notices:
            _log.warning("%s", notice)
        return restored
