"""The Hugging Face Trainer: it trains at y, evaluates, saves and ships x, and resumes exactly.

What transformers does by itself: `training_step` puts the optimizer into train mode and the evaluation
loop into eval mode. What it does not do, and what is here: x whenever something is saved, x when training
ends, and one owner of warm-up and of the learning rate. A callback alone cannot do that, because none is
called before a save.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        f"sftorch.trainers.hf needs transformers, got {error}: pip install 'schedulefree-twin[trainers]'"
    ) from error

from sfcore.checks import HyperparameterError
from sftorch.trainers import flat_metrics, unwrap

__all__ = ["ScheduleFreeMixin", "ScheduleFreeTrainer"]


class _XAtEpochEnd(TrainerCallback):
    """Puts x into the weights where an epoch ends, and so before the best model is loaded over them.

    Every way out of training passes here; `training_step` goes back to y.
    """

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        unwrap(kwargs["optimizer"]).eval()


class ScheduleFreeMixin:
    """Makes a Trainer class right for sftorch: put it before the Trainer, as in `ScheduleFreeTrainer`.

    `model.safetensors` of every checkpoint and of `save_model` is x, and so is the model that `train`
    leaves behind. `train(resume_from_checkpoint=...)` goes on from y, bit for bit: each checkpoint has y
    in its optimizer.pt.

    Give the optimizer by `optimizer_cls_and_kwargs=(sftorch.AdamWScheduleFree, {"lr": ...,
    "warmup_steps": ...})`, or ready made by `optimizers=(optimizer, None)`. Not by `optim=`: its
    "schedule_free_adamw" is the `schedulefree` package in transformers' own wiring. In TrainingArguments:
    `lr_scheduler_type="constant"`, no `warmup_steps`; `weight_decay` belongs there, because the Trainer
    sets it for each group. `learning_rate` in the logs is the lr before warm-up; `schedule_free/lr` beside it
    is the one in use, and `sftorch.trainers.flat_metrics` says what else is logged. FSDP and
    DeepSpeed are not tested.

    Args:
        args, kwargs: those of the Trainer.

    Raises:
        HyperparameterError: for a scheduler that decays, two owners of warm-up, and options that the
            Trainer would pass over, all at once.
        TypeError: when training begins with an optimizer that is not one of sftorch's.
    """

    if not TYPE_CHECKING:  # where the Trainer's own signatures hold

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            _check(self)
            self.add_callback(_XAtEpochEnd())

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            """As the Trainer's, and refuses what is not of sftorch."""
            optimizer = super().create_optimizer(*args, **kwargs)
            unwrap(optimizer)
            return optimizer

        def save_model(self, *args: Any, **kwargs: Any) -> None:
            """As the Trainer's, at x."""
            with self._at_x():
                super().save_model(*args, **kwargs)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            """As the Trainer's, with `flat_metrics` of the optimizer beside each training loss."""
            if "loss" in logs and self.optimizer is not None:
                logs.update(flat_metrics(self.optimizer))
            super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # The optimizer's state too is saved in eval mode: only then does it have y, to the bit.
        with self._at_x():
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _at_x(self) -> AbstractContextManager[None]:
        optimizer = getattr(self, "optimizer", None)
        return nullcontext() if optimizer is None else unwrap(optimizer).evaluation()


class ScheduleFreeTrainer(ScheduleFreeMixin, Trainer):
    """`transformers.Trainer` for sftorch; see `ScheduleFreeMixin`.

    Example:
        >>> import sftorch, tempfile
        >>> from transformers import BertConfig, BertForMaskedLM, TrainingArguments
        >>> from sftorch.trainers.hf import ScheduleFreeTrainer
        >>> shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> model = BertForMaskedLM(BertConfig(vocab_size=16, **shape))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = ScheduleFreeTrainer(
        ...         model,
        ...         TrainingArguments(folder, lr_scheduler_type="constant", use_cpu=True, report_to="none"),
        ...         optimizer_cls_and_kwargs=(sftorch.AdamWScheduleFree, {"lr": 0.01, "warmup_steps": 10}),
        ...     )
        >>> type(trainer.create_optimizer()).__name__
        'AdamWScheduleFree'
    """


def _check(trainer: Any) -> None:
    """Raises unless the lr, its warm-up and the decay have one owner each."""
    found = []
    name = str(getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type))
    if trainer.lr_scheduler is None and name != "constant":
        found.append(
            f"lr_scheduler_type must be 'constant', got {name!r}: Schedule-Free does without decay, and "
            "warm-up belongs to the optimizer"
        )
    if trainer.args.warmup_steps:
        found.append(
            f"warmup_steps must be 0 in TrainingArguments, got {trainer.args.warmup_steps}: a constant "
            "scheduler passes over it; give the optimizer its warmup_steps, in optimizer steps"
        )
    kwargs = (trainer.optimizer_cls_and_kwargs or (None, None))[1]
    if kwargs is not None and "lr" not in kwargs:
        found.append(
            f"optimizer_cls_and_kwargs must have 'lr', got the keys {sorted(kwargs)}: the Trainer does not "
            "pass its learning_rate on"
        )
    decay = trainer.args.weight_decay
    if kwargs is not None and kwargs.get("weight_decay", decay) != decay:
        found.append(
            f"weight_decay must be given in TrainingArguments, got {kwargs['weight_decay']} for the "
            f"optimizer and {decay} there: the Trainer sets it for each group"
        )
    if found:
        raise HyperparameterError(found)
