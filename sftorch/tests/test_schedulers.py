"""torch's learning-rate schedulers on our optimizers and on the wrapper: lr, lr_max, scheduled_lr, x."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler

import sftorch
from sftorch.tests.plain import (
    CLASSES,
    EXACT,
    STEP_SIZE,
    assert_is,
    feed,
    feed_truth,
    some_grads,
    some_params,
    truth,
)

STEPS = 20


def sequential(optimizer):
    return lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[5],
    )


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LambdaLR to 0": lambda o: lr_scheduler.LambdaLR(o, lambda step: float(step < 10)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=STEPS, cycle_momentum=False),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "SequentialLR": sequential,
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", CLASSES)
def test_the_lr_of_every_step_is_the_schedulers(kind, scheduler):
    params, run = some_params(), truth(kind, some_params())
    optimizer = CLASSES[kind](params, lr=STEP_SIZE)
    schedule = SCHEDULERS[scheduler](optimizer)
    for of_step in some_grads(STEPS, params):
        (lr,) = schedule.get_last_lr()
        feed(optimizer, params, [of_step])
        feed_truth(run, [of_step], lr=lr)
        (group,), (metrics,) = optimizer.param_groups, optimizer.metrics()
        assert group["lr"] == lr
        assert group["lr_max"] == metrics["lr_max"] == pytest.approx(run.lr_max, rel=EXACT)
        assert group["scheduled_lr"] == metrics["lr"]
        if kind != "radam":
            assert group["scheduled_lr"] == lr
        assert metrics["c"] == pytest.approx(run.c, rel=EXACT, abs=EXACT)
        schedule.step()
    assert_is(params, run.y)
    assert_is(optimizer.eval_params().values(), run.x)


def test_scheduled_lr_has_the_warmup_and_lr_has_not():
    params = some_params()
    optimizer = sftorch.AdamWScheduleFree(params, lr=0.1, warmup_steps=10)
    feed(optimizer, params, some_grads(4, params))
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["scheduled_lr"] == optimizer.metrics()[0]["lr"] == 0.1 * (4 / 10)


def test_reduce_on_plateau_lowers_lr_and_the_average_goes_on_by_lr_max():
    params, run = some_params(), truth("sgd", some_params())
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=2)
    for n, of_step in enumerate(some_grads(STEPS, params)):
        feed_truth(run, [of_step], lr=optimizer.param_groups[0]["lr"])
        feed(optimizer, params, [of_step])
        schedule.step(max(1.0, 3.0 - n))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(STEP_SIZE * 1e-5, rel=1e-9)
    assert optimizer.param_groups[0]["lr_max"] == STEP_SIZE
    assert_is(optimizer.eval_params().values(), run.x)


@pytest.mark.parametrize("kind", CLASSES)
def test_one_cycle_may_cycle_beta_too_and_x_is_kept(kind):
    params, run = some_params(), truth(kind, some_params())
    optimizer = CLASSES[kind](params, lr=STEP_SIZE)
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=STEPS)
    seen = set()
    for of_step in some_grads(STEPS, params):
        group = optimizer.param_groups[0]
        beta = group["momentum"] if kind == "sgd" else group["betas"][0]
        seen.add(beta)
        run.options["beta"] = beta
        run.y = {k: beta * run.x[k] + (1 - beta) * run.z[k] for k in run.x}
        feed_truth(run, [of_step], lr=group["lr"])
        feed(optimizer, params, [of_step])
        schedule.step()
    assert len(seen) > 10
    assert_is(params, run.y)
    assert_is(optimizer.eval_params().values(), run.x)


@pytest.mark.parametrize("on_base", [True, False])
def test_a_scheduler_may_sit_on_the_wrapper_or_on_its_base(on_base):
    params, run = some_params(), truth("sgd", some_params())
    base = torch.optim.SGD(params, lr=STEP_SIZE)
    optimizer = sftorch.ScheduleFreeWrapper(base)
    schedule = lr_scheduler.CosineAnnealingLR(base if on_base else optimizer, STEPS)
    for of_step in some_grads(STEPS, params):
        feed_truth(run, [of_step], lr=schedule.get_last_lr()[0])
        feed(optimizer, params, [of_step])
        schedule.step()
    assert_is(params, run.y)
    assert_is(optimizer.eval_params().values(), run.x)


def test_one_cycle_on_the_wrapper_cycles_the_bases_own_momentum():
    params = some_params()
    base = torch.optim.SGD(params, lr=STEP_SIZE, momentum=0.5)
    optimizer = sftorch.ScheduleFreeWrapper(base)
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=STEPS)
    for of_step in some_grads(3, params):
        feed(optimizer, params, [of_step])
        schedule.step()
    assert 0.85 < base.param_groups[0]["momentum"] < 0.95
    assert base.param_groups[0]["schedule_free"]["momentum"] == 0.9


def test_a_scheduler_may_reach_0_with_prior_steps():
    params, run = some_params(), truth("sgd", some_params(), prior_steps=5)
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE, prior_steps=5)
    schedule = SCHEDULERS["LambdaLR to 0"](optimizer)
    for of_step in some_grads(STEPS, params):
        feed_truth(run, [of_step], lr=schedule.get_last_lr()[0])
        feed(optimizer, params, [of_step])
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert_is(params, run.y)


@pytest.mark.parametrize("bad", [float("nan"), -1.0, float("inf")])
@pytest.mark.parametrize("wrapped", [True, False])
def test_nonsense_from_a_scheduler_is_refused_before_anything_changes(bad, wrapped):
    params = some_params()
    if wrapped:
        optimizer = sftorch.ScheduleFreeWrapper(torch.optim.SGD(params, lr=STEP_SIZE))
    else:
        optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(3, params))
    optimizer.param_groups[0]["lr"] = bad
    held, state = [p.clone() for p in params], repr(optimizer.state_dict())
    with pytest.raises(ValueError, match="lr must be a finite number >= 0, got"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, held, strict=True))
    assert repr(optimizer.state_dict()) == state
