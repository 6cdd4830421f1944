"""What the tests share: parameters, gradients, and the plain float64 run that values are held to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sftorch
from parity_tests.cases import DEFAULTS
from parity_tests.reference import Reference
from sftorch.closure import XAtRest

# The laws of schedulefree: tests ask these for betas, a kernel and a lean form. Others: checkpoint_runs.
CLASSES = {
    "sgd": sftorch.SGDScheduleFree,
    "adamw": sftorch.AdamWScheduleFree,
    "radam": sftorch.RAdamScheduleFree,
}
CLOSURES = {
    "sgd": sftorch.SGDScheduleFreeClosure,
    "adamw": sftorch.AdamWScheduleFreeClosure,
    "radam": sftorch.RAdamScheduleFreeClosure,
}
SHAPES = ((3, 2), (), (5,), (0,))
STEP_SIZE = 0.05
# float64 runs differ from the reference by rounding only; the worst of all tests is 8e-16.
EXACT = 1e-13


def some_params(
    dtype: torch.dtype = torch.float64, shapes: Sequence[Any] = SHAPES, seed: int = 0
) -> list[Tensor]:
    """Returns leaves of normal numbers: a matrix, a 0-d, a vector and an empty one."""
    rng = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [torch.nn.Parameter(torch.randn(s, generator=rng, dtype=wide).to(dtype)) for s in shapes]


def some_grads(steps: int, params: Iterable[Tensor], seed: int = 1) -> list[list[Tensor]]:
    """Returns one list of gradients a step, each of its parameter's dtype."""
    like = list(params)
    dtype = torch.complex128 if like and like[0].is_complex() else torch.float64
    rng = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=rng, dtype=dtype).to(p.dtype) for p in like] for _ in range(steps)
    ]


def feed(optimizer: Any, params: Sequence[Tensor], grads: Iterable[Sequence[Tensor | None]]) -> None:
    """Takes a step a list of gradients; None leaves a parameter without one."""
    for of_step in grads:
        for p, g in zip(params, of_step, strict=True):
            p.grad = None if g is None else g.clone()
        take_step(optimizer)


def take_step(optimizer: Any) -> None:
    """Takes a step with the gradients that are there."""
    if isinstance(optimizer, XAtRest):
        optimizer.step(lambda: 0.0)
    else:
        optimizer.step()


def truth(kind: str, params: Sequence[Tensor], **options: Any) -> Reference:
    """Returns the NumPy run of S1-S9 from these parameters; options by canonical name."""
    start = {str(i): _array(p) for i, p in enumerate(params)}
    return Reference(kind, start, DEFAULTS[kind] | {"lr": STEP_SIZE} | options)


def feed_truth(run: Reference, grads: Iterable[Sequence[Tensor]], lr: float = STEP_SIZE) -> None:
    """Takes the same steps there."""
    for of_step in grads:
        run.update({str(i): _array(g) for i, g in enumerate(of_step)}, lr)


def assert_is(found: Iterable[Tensor], wanted: dict[str, np.ndarray], tolerance: float = EXACT) -> None:
    """Raises unless tensors equal the reference's arrays, to a tolerance relative to max(1, |wanted|)."""
    listed = list(found)
    assert len(listed) == len(wanted)
    for i, tensor in enumerate(listed):
        error = np.abs(_array(tensor) - wanted[str(i)]) / np.maximum(1.0, np.abs(wanted[str(i)]))
        assert error.size == 0 or error.max() <= tolerance, f"parameter {i} is off by {error.max():.2e}"


def same_bits(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    """Tells whether tensors are equal bit for bit, NaNs and signs of zeros included."""
    return all(
        p.dtype == q.dtype and p.shape == q.shape and _bytes(p) == _bytes(q)
        for p, q in zip(a, b, strict=True)
    )


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns detached copies."""
    return [t.detach().clone() for t in tensors]


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy().copy()
