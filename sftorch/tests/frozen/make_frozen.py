"""Writes the frozen runs of this folder: python -m sftorch.tests.frozen.make_frozen NAME...

A frozen run is what a user has on disk from an earlier version, and what became of it: weights and
optimizer state saved after 6 steps, the gradients of 5 more, and the x and y after those. Files of a
released version are never made again; a new version adds its own, under its own name. Without names
the program lists what it can make and writes nothing.
"""

import copy
import sys
from pathlib import Path

import torch

import sftorch

HERE = Path(__file__).parent
BEFORE, AFTER = 6, 5
SHAPES = {"weight": (3, 2), "bias": (2,)}


def start():
    """Returns parameters and the gradients of every step; the draws are this file's, so stable."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES.values()]
    gradients = [
        [torch.randn(s, generator=generator) for s in SHAPES.values()] for _ in range(BEFORE + AFTER)
    ]
    return parameters, gradients


def feed(optimizer, parameters, gradients):
    for of_step in gradients:
        for p, g in zip(parameters, of_step, strict=True):
            p.grad = g.clone()
        optimizer.step()


def values(parameters):
    return [p.detach().clone() for p in parameters]


def record(make, mode):
    """Returns one frozen run: saved in `mode`, "train" or "eval"; None for an optimizer without modes."""
    parameters, gradients = start()
    optimizer = make(parameters)
    if mode:
        optimizer.train()
    feed(optimizer, parameters, gradients[:BEFORE])
    if mode:
        getattr(optimizer, mode)()
    found = {"weights": values(parameters), "state": copy.deepcopy(optimizer.state_dict()), "mode": mode}
    if mode:
        optimizer.train()
    feed(optimizer, parameters, gradients[BEFORE:])
    found |= {"gradients": gradients[BEFORE:], "y": values(parameters)}
    if mode:
        optimizer.eval()
        found["x"] = values(parameters)
    return found


def makers():
    """Returns file name -> (how the optimizer was made, mode)."""
    import pytorch_optimizer
    import schedulefree

    decay = {"lr": 0.01, "weight_decay": 0.1}
    slow = {"lr": 0.1, "warmup_steps": 9}

    def inner(p):
        return torch.optim.SGD(p, lr=0.1, momentum=0.5)

    return {
        "sftorch-0.1-adamw-train": (
            lambda p: sftorch.AdamWScheduleFree(p, inner_momentum=0.5, **decay),
            "train",
        ),
        "sftorch-0.1-adamw-eval": (lambda p: sftorch.AdamWScheduleFree(p, **decay), "eval"),
        "sftorch-0.1-sgd-eval": (lambda p: sftorch.SGDScheduleFree(p, **slow), "eval"),
        "sftorch-0.1-radam-train": (lambda p: sftorch.RAdamScheduleFree(p, **decay), "train"),
        "sftorch-0.1-wrapper-eval": (lambda p: sftorch.ScheduleFreeWrapper(inner(p)), "eval"),
        "schedulefree-1.4.1-adamw-train": (lambda p: schedulefree.AdamWScheduleFree(p, **decay), "train"),
        "schedulefree-1.4.1-adamw-eval": (lambda p: schedulefree.AdamWScheduleFree(p, **decay), "eval"),
        "schedulefree-1.4.1-sgd-train": (lambda p: schedulefree.SGDScheduleFree(p, **slow), "train"),
        "schedulefree-1.4.1-radam-eval": (lambda p: schedulefree.RAdamScheduleFree(p, **decay), "eval"),
        "schedulefree-1.4.1-wrapper-eval": (lambda p: schedulefree.ScheduleFreeWrapper(inner(p)), "eval"),
        "pytorch_optimizer-4.1.0-adamw-train": (
            lambda p: pytorch_optimizer.ScheduleFreeAdamW(p, **decay),
            "train",
        ),
        "pytorch_optimizer-4.1.0-adamw-eval": (
            lambda p: pytorch_optimizer.ScheduleFreeAdamW(p, **decay),
            "eval",
        ),
        "pytorch_optimizer-4.1.0-sgd-eval": (lambda p: pytorch_optimizer.ScheduleFreeSGD(p, **slow), "eval"),
        "pytorch_optimizer-4.1.0-radam-train": (
            lambda p: pytorch_optimizer.ScheduleFreeRAdam(p, **decay),
            "train",
        ),
        "pytorch_optimizer-4.1.0-wrapper-train": (
            lambda p: pytorch_optimizer.ScheduleFreeWrapper(inner(p)),
            "train",
        ),
        "torch-2.13-adamw": (lambda p: torch.optim.AdamW(p, **decay), None),
    }


def write_checkpoint(folder):
    """Writes a checkpoint of today's format, and the digest of what it restores beside it."""
    from sftorch.tests.checkpoint_runs import Case, build, digest, save, train

    case = Case("adamw", "bfloat16", 4, 14, "eval")
    model, optimizer = build(case)
    train(model, optimizer, case, 0, case.saved_at)
    save(folder / str(case), model, optimizer, case, metrics={"loss": 0.5}, extra={"note": (1, 2)})
    # Of the state itself: what a matrix product makes of it differs between processors.
    (folder / "digest.txt").write_text(digest(model, optimizer) + "\n")


def main():
    known = makers()
    for name in sys.argv[1:]:
        if name == "sftorch-0.1-checkpoint":
            write_checkpoint(HERE / name)
        else:
            torch.save(record(*known[name]), HERE / f"{name}.pt")
    if not sys.argv[1:]:
        sys.stdout.write("\n".join([*known, "sftorch-0.1-checkpoint"]) + "\n")


if __name__ == "__main__":
    main()
