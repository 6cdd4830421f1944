"""Mixed precision and clipping: skipped steps skip everything."""

from __future__ import annotations

import pytest
import torch

import sftorch
from sftorch.tests.plain import (
    CLASSES,
    STEP_SIZE,
    assert_is,
    copies,
    feed_truth,
    same_bits,
    some_grads,
    some_params,
    truth,
)


def wrapped(params, lr):
    return sftorch.ScheduleFreeWrapper(torch.optim.SGD(params, lr=lr))


@pytest.mark.parametrize("make", [*CLASSES.values(), wrapped])
def test_a_step_that_the_scaler_skips_changes_nothing(make):
    kind = next((k for k, c in CLASSES.items() if c is make), "sgd")
    params, run = some_params(), truth(kind, some_params())
    optimizer, scaler = make(params, lr=STEP_SIZE), torch.amp.GradScaler("cpu", init_scale=8.0)
    for n, of_step in enumerate(some_grads(12, params)):
        overflow = n in (0, 4, 5)
        for p, g in zip(params, of_step, strict=True):
            p.grad = g * scaler.get_scale()
        if overflow:
            params[0].grad[0] = float("inf")
        held, state = copies(params), repr(optimizer.state_dict())
        scaler.scale(torch.zeros(()))  # the scaler needs to have seen a loss
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert same_bits(params, held)
            assert repr(optimizer.state_dict()) == state
        else:
            feed_truth(run, [of_step])
    assert scaler.get_scale() == 1.0
    assert run.step == 9
    assert_is(params, run.y)


def test_unscaling_then_clipping_then_stepping():
    params, run = some_params(), truth("adamw", some_params())
    optimizer, scaler = (
        sftorch.AdamWScheduleFree(params, lr=STEP_SIZE),
        torch.amp.GradScaler("cpu", init_scale=4.0),
    )
    for of_step in some_grads(8, params):
        for p, g in zip(params, of_step, strict=True):
            p.grad = g * scaler.get_scale()
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        norm = torch.sqrt(sum(g.square().sum() for g in of_step))
        feed_truth(run, [[g * min(1.0, 1.0 / (norm + 1e-6)) for g in of_step]])  # 1e-6 is torch's own guard
    assert_is(params, run.y)


def test_autocast_trains_float32_weights():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=STEP_SIZE)
    start = copies(model.parameters())
    inputs = torch.randn(8, 4)
    grads = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(inputs) - inputs).square().mean()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    run = truth("adamw", start)
    feed_truth(run, grads)
    # float32 against float64: measured 5e-8
    assert_is(model.parameters(), run.y, tolerance=1e-6)
