"""Mistakes with the trainers: each line that says so, and no other. Read, never run."""

import torch
from lightning.pytorch import Trainer

import sftorch
from sftorch.trainers.hf import ScheduleFreeMixin, ScheduleFreeTrainer
from sftorch.trainers.lightning import ScheduleFreeCallback


def hugging_face(model: torch.nn.Module) -> None:
    ScheduleFreeTrainer(model, optimizer_cls=sftorch.AdamWScheduleFree)  # error
    ScheduleFreeTrainer(5)  # error
    trainer = ScheduleFreeTrainer(model)
    trainer.train(resume=True)  # error
    trainer.save(5)  # error
    ScheduleFreeMixin().train()  # error


def lightning() -> None:
    ScheduleFreeCallback(warmup_steps=5)  # error
    Trainer(callbacks=[ScheduleFreeCallback().setup])  # error
