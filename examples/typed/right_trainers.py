"""Everyday use of the trainers: no error in mypy, none in pyright. Read, never run."""

import torch
from lightning.pytorch import Trainer
from transformers import Trainer as OtherTrainer
from transformers import TrainingArguments

import sftorch
from sfcore.plan import check
from sftorch.trainers.hf import ScheduleFreeMixin, ScheduleFreeTrainer
from sftorch.trainers.lightning import ScheduleFreeCallback


class MyTrainer(ScheduleFreeMixin, OtherTrainer):
    pass


def hugging_face(model: torch.nn.Module) -> None:
    arguments = TrainingArguments("out", lr_scheduler_type="constant", max_steps=20)
    how = (sftorch.AdamWScheduleFree, {"lr": 1e-3, "warmup_steps": 4})
    trainer = ScheduleFreeTrainer(model, arguments, optimizer_cls_and_kwargs=how)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model("out/final")
    MyTrainer(model=model, args=arguments, optimizer_cls_and_kwargs=how).evaluate()
    check(arguments, source="hf").raise_for_errors()


def lightning() -> None:
    Trainer(max_epochs=1, callbacks=[ScheduleFreeCallback()])
