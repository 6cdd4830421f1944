"""Lightning: validation and checkpoints at x, training and exact resumes from y.

A checkpoint is written in hooks of many callbacks, some before and some after ours, and a weights-only one
calls no callback at all. All of them pass through `Trainer.save_checkpoint`, so that is where x is put in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError(
        f"sftorch.trainers.lightning needs lightning, got {error}: pip install 'schedulefree-twin[trainers]'"
    ) from error

from sftorch.state.modes import TrainEvalOptimizer
from sftorch.trainers import flat_metrics, unwrap

__all__ = ["ScheduleFreeCallback"]


class ScheduleFreeCallback(Callback):
    """Validates and saves x, and trains at y. Add it to `Trainer(callbacks=[...])`; its place is free.

    `state_dict` of every checkpoint is x, also mid-epoch, at an exception and with `weights_only`.
    `fit(ckpt_path=...)` goes on from y, bit for bit: the optimizer's state has it. `fit` leaves x in the
    model. Give `configure_optimizers` no decaying scheduler and leave warm-up to the optimizer. Do not
    combine it with Lightning's weight averaging. FSDP and DeepSpeed are not tested.

    Raises:
        TypeError: when a fit starts with no optimizer of sftorch's.

    Example:
        >>> import sftorch, torch
        >>> from lightning.pytorch import Trainer
        >>> from sftorch.trainers.lightning import ScheduleFreeCallback
        >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[ScheduleFreeCallback()])
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Puts every save of this trainer at x, from here to `teardown`."""
        if not isinstance(trainer.save_checkpoint, _SaveAtX):  # it is one after a fit that was interrupted
            trainer.save_checkpoint = _SaveAtX(trainer, trainer.save_checkpoint)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Gives the trainer its own method back."""
        if isinstance(trainer.save_checkpoint, _SaveAtX):
            trainer.save_checkpoint = trainer.save_checkpoint.save

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks that there is something to do."""
        if not _ours(trainer):
            unwrap(next(iter(trainer.optimizers), None))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Puts x into the weights, within a fit; after it they hold x, or what the user has loaded."""
        if trainer.state.fn == "fit":
            _each_eval(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Puts y back, within a fit."""
        if trainer.state.fn == "fit":
            for optimizer in _ours(trainer):
                optimizer.train()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Gives the loggers `flat_metrics` of each optimizer, every `log_every_n_steps` optimizer steps."""
        if not trainer.loggers or trainer.global_step % trainer.log_every_n_steps:
            return
        ours = _ours(trainer)
        for number, optimizer in enumerate(ours):
            found = flat_metrics(optimizer)
            if len(ours) > 1:
                found = {f"optimizer_{number}/{name}": value for name, value in found.items()}
            for logger in trainer.loggers:
                logger.log_metrics(found, step=trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leaves x in the model."""
        _each_eval(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leaves x in the model here too: a notebook goes on with it after Ctrl-C."""
        _each_eval(trainer)


@dataclass(frozen=True)
class _SaveAtX:
    """A trainer's `save_checkpoint`, with x in the weights and y in the optimizers' states."""

    trainer: Any
    save: Callable[..., None]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as stack:
            for optimizer in _ours(self.trainer):
                stack.enter_context(optimizer.evaluation())
            self.save(*args, **kwargs)


def _each_eval(trainer: Any) -> None:
    for optimizer in _ours(trainer):
        optimizer.eval()


def _ours(trainer: Any) -> list[TrainEvalOptimizer]:
    optimizers: list[Optimizer] = trainer.optimizers
    return [optimizer for optimizer in optimizers if isinstance(optimizer, TrainEvalOptimizer)]
