"""beta at its ends, and beta changed on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sftorch
from sftorch.tests.plain import (
    CLASSES,
    CLOSURES,
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


def with_beta(kind, beta):
    return {"momentum": beta} if kind == "sgd" else {"betas": (beta, 0.999)}


def set_beta(kind, optimizer, beta):
    optimizer.param_groups[0].update(with_beta(kind, beta))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0, 1])
@pytest.mark.parametrize("kind", CLASSES)
def test_both_ends_are_s1_to_s9(kind, beta, foreach):
    params, run = some_params(), truth(kind, some_params(), beta=beta, weight_decay=0.1)
    optimizer = CLASSES[kind](
        params, lr=STEP_SIZE, weight_decay=0.1, foreach=foreach, **with_beta(kind, beta)
    )
    grads = some_grads(20, params)
    feed(optimizer, params, grads)
    feed_truth(run, grads)
    assert_is(params, run.y)
    assert_is([optimizer.state[p]["z"] for p in params], run.z)
    assert_is(optimizer.eval_params().values(), run.x)
    y = copies(params)
    optimizer.eval()
    assert_is(params, run.x)
    optimizer.train()
    assert same_bits(params, y)


def test_beta_0_is_polyak_averaging():
    (p,), (q,) = some_params(shapes=[(4,)]), some_params(shapes=[(4,)])
    ours, plain = sftorch.SGDScheduleFree([p], lr=STEP_SIZE, momentum=0.0), torch.optim.SGD([q], lr=STEP_SIZE)
    path = []
    for (g,) in some_grads(15, [p]):
        feed(ours, [p], [[g]])
        q.grad = g
        plain.step()
        path.append(q.detach().numpy().copy())
        assert_is([p], {"0": path[-1]})  # y is z is what SGD does
    assert_is(ours.eval_params().values(), {"0": np.mean(path, axis=0)})


def test_beta_1_takes_gradients_at_the_average():
    (p,) = some_params(shapes=[(4,)])
    optimizer = sftorch.SGDScheduleFree([p], lr=STEP_SIZE, momentum=1.0)
    feed(optimizer, [p], some_grads(15, [p]))
    assert same_bits(optimizer.eval_params().values(), [p])


@pytest.mark.parametrize("beta", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("kind", CLOSURES)
def test_the_closure_forms_hold_x_at_rest_and_y_inside(kind, beta):
    params, run = some_params(), truth(kind, some_params(), beta=beta)
    optimizer = CLOSURES[kind](params, lr=STEP_SIZE, **with_beta(kind, beta))
    for of_step in some_grads(12, params):
        seen = []

        def closure(of_step=of_step, seen=seen):
            seen.extend(copies(params))
            for p, g in zip(params, of_step, strict=True):
                p.grad = g.clone()
            return 0.0

        optimizer.step(closure)
        assert_is(seen, run.y)
        feed_truth(run, [of_step])
        assert_is(params, run.x)
    names = {name for p in params for name in optimizer.state[p]}
    assert names == {"z", "step", "lr_max", "weight_sum"} | (set() if kind == "sgd" else {"exp_avg_sq"})


CHANGES = [(0.9, 0.98), (0.9, 0.0), (0.0, 0.9), (0.9, 1.0), (1.0, 0.5), (0.0, 1.0), (1.0, 0.0)]


@pytest.mark.parametrize(("old", "new"), CHANGES)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_change_on_the_way_moves_y_and_keeps_x(kind, old, new):
    params, run = some_params(), truth(kind, some_params(), beta=old)
    optimizer, grads = (
        CLASSES[kind](params, lr=STEP_SIZE, **with_beta(kind, old)),
        some_grads(16, some_params()),
    )
    feed(optimizer, params, grads[:8])
    feed_truth(run, grads[:8])
    set_beta(kind, optimizer, new)
    assert_is(optimizer.eval_params().values(), run.x)  # x is decoded with the beta that built y
    optimizer.eval()
    assert_is(params, run.x)
    optimizer.train()
    assert_is(params, run.y)
    run.options["beta"] = new
    run.y = {k: new * run.x[k] + (1 - new) * run.z[k] for k in run.x}
    feed(optimizer, params, grads[8:])
    feed_truth(run, grads[8:])
    assert_is(params, run.y)
    assert_is(optimizer.eval_params().values(), run.x)
    assert all(("x" in optimizer.state[p]) == (new == 0) for p in params)


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_the_wrapper_too(old, new):
    params, run = some_params(), truth("sgd", some_params(), beta=old)
    optimizer = sftorch.ScheduleFreeWrapper(torch.optim.SGD(params, lr=STEP_SIZE), momentum=old)
    grads = some_grads(16, params)
    feed(optimizer, params, grads[:8])
    feed_truth(run, grads[:8])
    optimizer.param_groups[0]["schedule_free"]["momentum"] = new
    assert_is(optimizer.eval_params().values(), run.x)
    run.options["beta"] = new
    run.y = {k: new * run.x[k] + (1 - new) * run.z[k] for k in run.x}
    feed(optimizer, params, grads[8:])
    feed_truth(run, grads[8:])
    assert_is(params, run.y)


def test_a_late_parameter_may_arrive_with_the_change():
    params = some_params(shapes=[(3,), (4,)])
    optimizer, grads = sftorch.SGDScheduleFree(params, lr=STEP_SIZE), some_grads(12, params)
    runs = [truth("sgd", [p], beta=beta) for p, beta in zip(params, (0.9, 0.0), strict=True)]
    feed(optimizer, params, [[g[0], None] for g in grads[:6]])
    set_beta("sgd", optimizer, 0.0)
    feed(optimizer, params, grads[6:])
    feed_truth(runs[0], [g[:1] for g in grads[:6]])
    runs[0].options["beta"], runs[0].y = 0.0, dict(runs[0].z)
    feed_truth(runs[0], [g[:1] for g in grads[6:]])
    feed_truth(runs[1], [g[1:] for g in grads[6:]])
    for p, run in zip(params, runs, strict=True):
        assert_is([p], run.y)
        assert_is([optimizer.eval_params()[p]], run.x)


@pytest.mark.parametrize("bad", [1.1, -0.1, float("nan")])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_change_to_nonsense_is_refused_before_anything_changes(kind, bad):
    params = some_params()
    optimizer = CLASSES[kind](params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(3, params))
    set_beta(kind, optimizer, bad)
    held = copies(params)
    with pytest.raises(ValueError, match=r"must be a number in \[0, 1\], got"):
        optimizer.step()
    assert same_bits(params, held)
    assert optimizer.metrics()[0]["step"] == 3
