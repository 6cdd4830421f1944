"""beta at its ends, and beta changed on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sftorch
from sfcore import averaging
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


RULES = [
    {"beta_rule": "anneal", "beta_max": 0.99, "beta_anneal_steps": 9},
    {"beta_rule": "amuse", "beta_hold_steps": 3},
]


@pytest.mark.parametrize("path", [{}, {"foreach": False}, "in backward"], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_moves_y_also_of_parameters_without_a_gradient(rule, path):
    often, seldom, late = some_params(shapes=[(3,), (4,), (2,)])
    options = {} if path == "in backward" else path
    optimizer = sftorch.SGDScheduleFree([often, seldom, late], lr=STEP_SIZE, **rule, **options)
    handle = sftorch.step_in_backward(optimizer) if path == "in backward" else None
    values = optimizer.law.defaults | rule
    sequences = {p: [p.detach().clone()] * 2 + [0] for p in (often, seldom, late)}  # x, z, steps
    for step in range(12):
        moving = [often] + [seldom] * (step % 3 == 0) + [late] * (step > 5)
        beta = averaging.beta_after(step + 1, values)
        grads = dict(zip(moving, some_grads(1, moving, seed=step)[0], strict=True))
        for p, g in grads.items():
            if handle is None:
                p.grad = g
            else:
                (p * g).sum().backward()
        for p, g in grads.items():
            x, z, t = sequences[p]
            z = z - STEP_SIZE * g
            sequences[p] = [x + (z - x) / (t + 1), z, t + 1]
        optimizer.step()
        optimizer.zero_grad()
        xs = optimizer.eval_params()
        for p, (x, z, _) in sequences.items():
            torch.testing.assert_close(p.detach(), beta * x + (1 - beta) * z, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(xs[p], x, rtol=1e-12, atol=1e-12)
    if handle is not None:
        handle.remove()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_scheduler_that_cycles_beta_is_refused_beside_a_rule(rule):
    (p,) = some_params(shapes=[(3,)])
    optimizer = sftorch.AdamWScheduleFree([p], **rule)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    p.grad = torch.ones_like(p)
    held = p.detach().clone()
    with pytest.raises(
        ValueError, match=r"beta_rule must be 'constant' beside a scheduler that cycles betas\[0\]"
    ):
        optimizer.step()
    assert same_bits([p], [held])
    free = sftorch.AdamWScheduleFree([p], **rule)
    torch.optim.lr_scheduler.OneCycleLR(free, 0.1, total_steps=10, cycle_momentum=False)
    free.step()


def test_state_of_a_program_without_rules_goes_on_under_one(tmp_path):
    (p,) = some_params(shapes=[(3,)])
    before = sftorch.SGDScheduleFree([p], lr=STEP_SIZE)
    feed(before, [p], some_grads(20, [p]))
    x = before.eval_params()[p].clone()
    saved = before.state_dict()
    for group in saved["param_groups"]:
        for name in ("y_beta", "beta_rule", "beta_max", "beta_anneal_steps", "beta_hold_steps", "rho"):
            del group[name]
    optimizer = sftorch.SGDScheduleFree([p], lr=STEP_SIZE, **RULES[0])
    optimizer.load_state_dict(saved)
    torch.testing.assert_close(optimizer.eval_params()[p], x, rtol=1e-14, atol=1e-14)
    feed(optimizer, [p], some_grads(1, [p]))
    assert optimizer.param_groups[0]["y_beta"] == pytest.approx(0.99)
