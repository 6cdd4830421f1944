"""Every parameter has its own clock: late, frozen and rare gradients."""

from __future__ import annotations

import pytest
import torch

import sftorch
from sftorch.tests.plain import (
    CLASSES,
    CLOSURES,
    EXACT,
    STEP_SIZE,
    assert_is,
    copies,
    feed,
    feed_truth,
    same_bits,
    some_grads,
    some_params,
    truth,
)

BOTH = [*CLASSES.values(), *CLOSURES.values()]
OPTIONS = {"weight_decay": 0.1, "r": 1.5}


def only(of_step, *present):
    """Returns a step's gradients with None for all but some."""
    return [g if i in present else None for i, g in enumerate(of_step)]


def test_the_first_step_of_a_late_parameter_is_1x_lr():
    late, early = (torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    optimizer = sftorch.AdamWScheduleFree([early, late], lr=0.01)
    grads = some_grads(1001, [early, late])
    feed(optimizer, [early, late], [only(g, 0) for g in grads[:1000]])
    assert torch.equal(late, torch.zeros(3))
    feed(optimizer, [early, late], grads[1000:])
    # |g / (|g| + 1e-8)| is 1 to 1e-7 here; upstream, by the group's clock, takes 25 times that.
    torch.testing.assert_close(late.detach().abs(), torch.full_like(late, 0.01), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("start", [1, 7])
@pytest.mark.parametrize("table", [CLASSES, CLOSURES], ids=["open", "closure"])
def test_a_late_parameter_runs_like_a_fresh_optimizer_started_then(kind, start, table):
    params = some_params(shapes=[(3,), (4,)])
    optimizer = table[kind](params, lr=STEP_SIZE, **OPTIONS)
    runs = [truth(kind, [p], **OPTIONS) for p in params]
    grads = some_grads(20, params)
    feed(optimizer, params, [only(g, 0) for g in grads[:start]])
    feed(optimizer, params, grads[start:])
    feed_truth(runs[0], [g[:1] for g in grads])
    feed_truth(runs[1], [g[1:] for g in grads[start:]])
    held = "y" if table is CLASSES else "x"
    for p, run in zip(params, runs, strict=True):
        assert_is([p], getattr(run, held))
        assert_is([optimizer.state[p]["z"]], run.z)
        assert optimizer.state[p]["step"] == run.step
        assert optimizer.state[p]["weight_sum"] == pytest.approx(run.weight_sum, rel=EXACT)
    assert optimizer.metrics()[0]["step"] == 20


def test_lr_and_warmup_of_a_late_parameter_are_the_groups():
    params, start, warmup = some_params(shapes=[(3,), (4,)]), 4, 10
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, warmup_steps=warmup)
    grads, run = some_grads(16, params), truth("adamw", params[1:])
    for step, of_step in enumerate(grads):
        lr = STEP_SIZE * (1 + 0.1 * step)
        optimizer.param_groups[0]["lr"] = lr
        feed(optimizer, params, [only(of_step, 0) if step < start else of_step])
        if step >= start:
            feed_truth(run, [of_step[1:]], lr=lr * min(1.0, (step + 1) / warmup))
    assert_is(params[1:], run.y)


@pytest.mark.parametrize("kind", CLASSES)
def test_frozen_unfrozen_and_refrozen(kind):
    params = some_params(shapes=[(3,), (4,)])
    optimizer = CLASSES[kind](params, lr=STEP_SIZE, **OPTIONS)
    runs = [truth(kind, [p], **OPTIONS) for p in params]
    grads = some_grads(24, params)
    for step, of_step in enumerate(grads):
        frozen = 5 <= step < 10 or 15 <= step < 20
        params[1].requires_grad_(not frozen)
        before = copies(params[1:])
        feed(optimizer, params, [only(of_step, 0) if frozen else of_step])
        feed_truth(runs[0], [of_step[:1]])
        if frozen:
            assert same_bits(params[1:], before)
        else:
            feed_truth(runs[1], [of_step[1:]])
    for p, run in zip(params, runs, strict=True):
        assert_is([p], run.y)
        assert_is([optimizer.eval_params()[p]], run.x)


@pytest.mark.parametrize("kind", CLASSES)
def test_gradients_that_come_rarely(kind):
    params = some_params(shapes=[(2,)] * 5)
    optimizer = CLASSES[kind](params, lr=STEP_SIZE)
    runs = [truth(kind, [p]) for p in params]
    for step, of_step in enumerate(some_grads(30, params)):
        present = [i for i in range(5) if step % (i + 1) == 0]
        feed(optimizer, params, [only(of_step, *present)])
        for i in present:
            feed_truth(runs[i], [[of_step[i]]])
    for p, run in zip(params, runs, strict=True):
        assert_is([p], run.y)
    assert [optimizer.state[p]["step"] for p in params] == [30, 15, 10, 8, 6]


def test_prior_steps_count_for_a_late_parameter_too():
    params = some_params(shapes=[(3,), (4,)])
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE, prior_steps=9, r=1.0)
    run, grads = truth("sgd", params[1:], prior_steps=9, r=1.0), some_grads(12, params)
    feed(optimizer, params, [only(g, 0) for g in grads[:5]])
    feed(optimizer, params, grads[5:])
    feed_truth(run, [g[1:] for g in grads[5:]])
    assert_is(params[1:], run.y)


@pytest.mark.parametrize("make", BOTH)
def test_a_step_without_any_gradient_moves_nothing_and_counts(make):
    params = some_params()
    optimizer = make(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(3, params))
    held = copies(params)
    feed(optimizer, params, [[None] * len(params)])
    assert same_bits(params, held)
    assert [optimizer.state[p]["step"] for p in params] == [3] * len(params)
    assert optimizer.metrics()[0]["step"] == 4
