"""Bases for the wrapper, and the plain run of S1-S9 around any of them."""

from __future__ import annotations

import torch

from sftorch.tests.plain import STEP_SIZE, copies, some_params


class Prodigal(torch.optim.Optimizer):
    """A base with books of its own under names that Schedule-Free uses too, and lr * d as its step size."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "k": 0, "d": 1e-3, "weight_sum": 5.0, "train_mode": "mine"})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["d"] *= 1.5
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] * group["d"])


BASES = {
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=STEP_SIZE, weight_decay=0.1),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=STEP_SIZE, weight_decay=0.1),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=STEP_SIZE),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=STEP_SIZE),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=STEP_SIZE),
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, lr=STEP_SIZE, momentum=0.9, nesterov=True),
    "Prodigal": lambda ps: Prodigal(ps, lr=STEP_SIZE),
}
if hasattr(torch.optim, "Muon"):
    BASES["Muon"] = lambda ps: torch.optim.Muon(ps, lr=STEP_SIZE)


def matrices():
    return some_params(shapes=[(3, 2), (4, 4)])


def plain_run(make, params, grads, beta=0.9, decay=0.0, r=0.0, power=2.0, prior=0):
    """Runs S1-S9 with x, y and z stored, and a base that steps z itself; returns x, y, z at the end."""
    x, y = copies(params), copies(params)
    zs = [torch.nn.Parameter(p.detach().clone()) for p in params]
    base, lr_max, total = make(zs), 0.0, 0.0
    for i in range(1, prior + 1):
        total += i**r * (STEP_SIZE * base.param_groups[0].get("d", 1.0)) ** power
    for t, of_step in enumerate(grads, start=1):
        before = copies(zs)
        for z, g in zip(zs, of_step, strict=True):
            z.grad = g.clone()
        base.step()
        lr = base.param_groups[0]["lr"] * base.param_groups[0].get("d", 1.0)
        lr_max = max(lr_max, lr)
        weight = (t + prior) ** r * lr_max**power
        total += weight
        c = weight / total
        for i, z in enumerate(zs):
            with torch.no_grad():
                z.copy_(before[i] + (z - before[i]) - lr * decay * y[i])
            x[i] = (1 - c) * x[i] + c * z.detach()
            y[i] = beta * x[i] + (1 - beta) * z.detach()
    return x, y, copies(zs)
