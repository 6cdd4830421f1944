"""The programs of storm_programs.py in torch: they restore if they can, and go on to the end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

import sftorch
from benchmarks import exact_torch
from benchmarks.fuzz_torch import digest
from benchmarks.storm_programs import ROUNDED, Program, until_done
from sftorch.checkpoint import Checkpoints

MAKERS = exact_torch.MAKERS | {
    "wrapper": lambda p: sftorch.ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.1, momentum=0.5)),
    "muon": lambda p: sftorch.MuonScheduleFree(p, lr=0.01, weight_decay=0.01),
    "normuon": lambda p: sftorch.MuonScheduleFree(p, lr=0.01, normalize="rows", decay_at="z"),
    "plus": lambda p: sftorch.AdamCScheduleFreePlusPaper(p, lr=0.1, polyak_beta=0.9, sf_beta1_anneal_steps=9),
    "gpa": lambda p: sftorch.GPAAdamW(p, lr=0.01, weight_decay=0.01),
    "anneal": lambda p: sftorch.AdamWScheduleFree(p, 0.01, beta_rule="anneal", beta_anneal_steps=9),
    "amuse": lambda p: sftorch.MuonScheduleFree(p, 0.01, beta_rule="amuse", beta_hold_steps=3),
    "lean": lambda p: sftorch.AdamWScheduleFree(p, lr=0.01, precision="lean"),
    "8bit": lambda p: sftorch.AdamWScheduleFree(p, lr=0.01, precision="8bit"),
}


def build(one: Program, seed: int) -> tuple[Any, Any, Any]:
    """Returns a network with dropout, so that the random state matters, its optimizer, and a scheduler."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(16, 4)
    )
    rounded = one.precision in ROUNDED
    model.to(getattr(torch, "bfloat16" if rounded else one.precision))
    optimizer = MAKERS[one.precision if rounded else one.optimizer](model.parameters())
    if not one.scheduler:
        return model, optimizer, None
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 + 0.1 * math.cos(step))
    return model, optimizer, scheduler


def run(one: Program, folder: Path, again: bool) -> str:
    """Runs a program in a folder; returns a digest of its end."""
    torch.set_num_threads(1)
    held: list[Any] = []
    with Checkpoints(folder, background=one.background, keep_newest=one.keep_newest) as checkpoints:
        return until_done(lambda: _run(one, checkpoints, held), again)


def _run(one: Program, checkpoints: Checkpoints, held: list[Any]) -> str:
    if not held:  # else it was interrupted, and goes on with what is there
        held[:] = build(one, seed=1)
    restored = checkpoints.restore(held[0], held[1], accumulation=one.accumulate)
    position = 0
    if restored is None:
        held[:] = build(one, seed=0)
    else:
        assert restored.meta is not None
        position = restored.meta.position
        if one.scheduler:
            held[2].load_state_dict(restored.extra["scheduler"])
    model, optimizer, scheduler = held
    optimizer.train()
    for taken in range(position, one.micro_batches):
        _before(one, taken, checkpoints, model, optimizer, scheduler)
        images = torch.rand(6, 8, dtype=torch.float64).to(next(model.parameters()).dtype)
        loss = model(images).float().square().mean()
        (loss / one.accumulate).backward()
        if (taken + 1) % one.accumulate == 0:
            optimizer.step(**({"loss": loss.detach()} if one.optimizer == "plus" else {}))
            optimizer.zero_grad()
            if scheduler:
                scheduler.step()
    return digest(model, optimizer)


def _before(
    one: Program, taken: int, checkpoints: Checkpoints, model: Any, optimizer: Any, scheduler: Any
) -> None:
    """Evaluates and saves where the program does, in eval mode if both are due."""
    if taken in one.evaluates:
        optimizer.eval()
    if taken in one.saves:
        place = (one.accumulate, taken % one.accumulate)
        extra = {"scheduler": scheduler.state_dict()} if scheduler else {}
        checkpoints.save(model, optimizer, position=taken, accumulation=place, extra=extra)
        if taken in one.waits:
            checkpoints.wait()
    optimizer.train()
