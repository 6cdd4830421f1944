"""The torch twin of `benchmarks quality`: the same weights, batches and settings, and so the same loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.quality_methods import Method, setting, torch_step
from benchmarks.quality_problems import Problem, curvatures

Weights = dict[str, Tensor]


def replay(problem: Problem, method: Method, rate: float, seed: int, steps: int) -> float:
    """Trains one run for its first steps; returns the test loss at x."""
    weights: Weights = {
        name: torch.nn.Parameter(torch.from_numpy(weight)) for name, weight in problem.weights(seed).items()
    }
    run = setting(method, problem.steps, problem.matrices())
    step, optimizer = torch_step(method, run, rate, list(weights.items()))
    loss = LOSSES[problem.model]
    inputs, targets = map(torch.from_numpy, problem.data.train)
    for chosen in torch.from_numpy(problem.batches(seed, steps)):
        optimizer.zero_grad()
        value = loss(problem, weights, _batch(problem, inputs, targets, chosen))
        value.backward()
        step(value.detach())
    if method.schedule_free:
        optimizer.eval()
    with torch.no_grad():
        return float(loss(problem, weights, _held(problem)))


def _batch(problem: Problem, inputs: Tensor, targets: Tensor, chosen: Tensor) -> Any:
    if problem.model == "quadratic":
        return chosen
    if problem.model == "transformer":
        windows = inputs[chosen[:, None] + torch.arange(problem.sizes[-1] + 1)]
        return windows[:, :-1], windows[:, 1:]
    return inputs[chosen], targets[chosen]


def _held(problem: Problem) -> Any:
    if problem.model == "quadratic":
        return torch.zeros(())
    inputs, targets = map(torch.from_numpy, problem.data.test)
    return (inputs[:, :-1], inputs[:, 1:]) if problem.model == "transformer" else (inputs, targets)


def _quadratic(problem: Problem, w: Weights, noise: Tensor) -> Tensor:
    return (0.5 * torch.from_numpy(curvatures(problem.sizes[0])) * w["w"] ** 2 + noise * w["w"]).sum()


def _mlp(problem: Problem, w: Weights, batch: Any) -> Tensor:
    hidden, targets = batch
    for index in range(len(problem.sizes) - 2):
        hidden = torch.relu(hidden @ w[f"hidden{index}_w"] + w[f"hidden{index}_b"])
    return functional.cross_entropy(hidden @ w["head_w"] + w["head_b"], targets.long())


def _transformer(problem: Problem, w: Weights, batch: Any) -> Tensor:
    tokens, targets = batch[0].long(), batch[1].long()
    _, width, layers, heads, context = problem.sizes

    def normed(hidden: Tensor) -> Tensor:
        return hidden * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    past = torch.ones(context, context, dtype=torch.bool).tril()
    hidden = w["embed"][tokens] + w["position"]
    for layer in range(layers):
        at = normed(hidden)
        q, k, v = ((at @ w[f"hidden{layer}_{name}"]).unflatten(-1, (heads, width // heads)) for name in "qkv")
        scores = torch.einsum("bthd,bshd->bhts", q, k) * (width // heads) ** -0.5
        shares = scores.masked_fill(~past, -1e9).softmax(-1)
        hidden = hidden + torch.einsum("bhts,bshd->bthd", shares, v).flatten(2) @ w[f"hidden{layer}_o"]
        inner = torch.relu(normed(hidden) @ w[f"hidden{layer}_up"])
        hidden = hidden + inner @ w[f"hidden{layer}_down"]
    return functional.cross_entropy((normed(hidden) @ w["head"]).flatten(0, 1), targets.flatten())


LOSSES: dict[str, Callable[[Problem, Weights, Any], Tensor]] = {
    "quadratic": _quadratic,
    "mlp": _mlp,
    "transformer": _transformer,
}
