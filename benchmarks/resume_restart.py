"""(b) A restart from weights alone: what happens to the validation loss at x, for each method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import sftorch
from benchmarks.resume_methods import Method, Run, Saved, TorchRun
from benchmarks.resume_problems import Batch, Problem

WATCHED = 100  # optimizer steps in which the worst loss is looked for
LAST = 300
LEAD = 100  # steps before the restart that the figure shows


@dataclass(frozen=True)
class Setting:
    """One column of the table.

    Attributes:
        problem: made for the seeds.
        accumulate: micro-batches an optimizer step, before the restart and after.
        trained: optimizer steps before the restart.
    """

    problem: Problem
    accumulate: int
    trained: int

    @property
    def batch_size(self) -> int:
        return self.accumulate * self.problem.micro_batch


@dataclass(frozen=True)
class Curve:
    """Validation loss at x: steps (n,) since the restart, losses (n, seeds)."""

    steps: np.ndarray
    losses: np.ndarray

    def worst(self) -> np.ndarray:
        """Returns the largest loss of each seed in the first steps after the restart."""
        return self.losses[(self.steps >= 1) & (self.steps <= WATCHED)].max(axis=0)

    def at(self, step: int) -> np.ndarray:
        """Returns the loss of each seed at one step."""
        return self.losses[list(self.steps).index(step)]


def evaluated_after(step: int) -> bool:
    """Tells whether the loss is taken: after each of the watched steps, then after every tenth."""
    return step <= WATCHED or step % 10 == 0


def train(setting: Setting, advance: Callable[[int], object]) -> tuple[Saved, Curve]:
    """Returns what a first run leaves behind, and its last losses, at steps <= 0."""
    problem = setting.problem
    lr, warmup_steps = problem.lr, setting.trained // 20
    run = TorchRun(
        problem.initial(),
        lambda weights: sftorch.AdamWScheduleFree(weights, lr=lr, warmup_steps=warmup_steps),
    )
    points: list[tuple[int, np.ndarray]] = []
    for step in range(setting.trained):
        take_step(problem, run, problem.batch(step, setting.batch_size))
        left = setting.trained - 1 - step
        if left <= LEAD and left % 10 == 0:
            points.append((-left, validation_loss(problem, run)))
        advance(1)
    y = [w.detach().clone() for w in run.weights()]
    state = copy.deepcopy(run.optimizer.state_dict())
    return Saved(lr, warmup_steps, run.x(), y, state), curve(points)


def go_on(
    setting: Setting,
    saved: Saved,
    methods: Sequence[Method],
    advance: Callable[[int], object],
    last: int = LAST,
) -> dict[Method, Curve]:
    """Returns the losses after a restart, on the batches that the first run would have seen next.

    The methods go side by side, so that each batch is made once.
    """
    runs = [method.start(saved) for method in methods]
    points: list[list[tuple[int, np.ndarray]]] = [[] for _ in runs]
    for step in range(1, last + 1):
        batch = setting.problem.batch(setting.trained + step - 1, setting.batch_size)
        for run, found in zip(runs, points, strict=True):
            take_step(setting.problem, run, batch)
            if evaluated_after(step):
                found.append((step, validation_loss(setting.problem, run)))
            advance(1)
    return dict(zip(methods, map(curve, points), strict=True))


def take_step(problem: Problem, run: Run, batch: Batch) -> None:
    """Takes one optimizer step.

    The mean gradient of the micro-batches is taken in one pass: it is what accumulation adds up to,
    and all that an optimizer sees of it.
    """
    weights = run.weights()
    run.step(torch.autograd.grad(problem.losses(weights, batch).sum(), weights))


@torch.no_grad()
def validation_loss(problem: Problem, run: Run) -> np.ndarray:
    """Returns the loss at x of each seed."""
    return problem.losses(run.x(), problem.validation()).numpy().astype(np.float64)


def curve(points: Sequence[tuple[int, np.ndarray]]) -> Curve:
    """Returns the curve through some points."""
    return Curve(np.array([step for step, _ in points]), np.array([losses for _, losses in points]))


def compare(
    setting: Setting, methods: Sequence[Method], advance: Callable[[int], object]
) -> tuple[Curve, dict[Method, Curve]]:
    """Returns the curve before the restart, and each method's."""
    saved, before = train(setting, advance)
    return before, go_on(setting, saved, methods, advance)


def steps_of(setting: Setting, methods: Sequence[Method]) -> int:
    """Returns the optimizer steps that `compare` takes."""
    return setting.trained + LAST * len(methods)
