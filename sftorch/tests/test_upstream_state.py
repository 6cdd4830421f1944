"""A state dict of schedulefree 1.4.1 loads, and upstream's trajectory goes on."""

from __future__ import annotations

import copy

import pytest
import schedulefree
import torch

import sftorch
from sftorch.tests.plain import CLASSES, STEP_SIZE, assert_is, feed, some_grads, some_params

OPTIONS = {
    "sgd": {"momentum": 0.8, "weight_decay": 0.1, "warmup_steps": 9, "r": 1.0},
    "adamw": {"betas": (0.8, 0.99), "weight_decay": 0.1, "warmup_steps": 9},
    "radam": {"betas": (0.8, 0.99), "weight_decay": 0.1, "weight_lr_power": 1.0},
}
# Over 20 steps in float64, relative to max(1, |value|); measured 5e-16. Upstream's eval() and train()
# go through a division by beta, which is where most of it comes from.
TOLERANCE = 1e-12


def theirs(kind, params):
    return getattr(schedulefree, CLASSES[kind].__name__)(params, lr=STEP_SIZE, **OPTIONS[kind])


def arrays(params):
    return {str(i): p.detach().numpy().copy() for i, p in enumerate(params)}


@pytest.mark.parametrize("saved_in", ["train", "eval"])
@pytest.mark.parametrize("kind", CLASSES)
def test_upstreams_trajectory_goes_on(kind, saved_in):
    params, grads = some_params(), some_grads(20, some_params())
    upstream = theirs(kind, params)
    upstream.train()
    feed(upstream, params, grads[:8])
    getattr(upstream, saved_in)()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = CLASSES[kind](others)
    ours.load_state_dict(copy.deepcopy(upstream.state_dict()))
    assert ours.param_groups[0]["train_mode"] is True  # the live mode stays; x is put right at once
    upstream.train()
    ours.train()
    assert_is(others, arrays(params), TOLERANCE)
    feed(upstream, params, grads[8:])
    feed(ours, others, grads[8:])
    assert_is(others, arrays(params), TOLERANCE)
    assert ours.param_groups[0]["k"] == upstream.param_groups[0]["k"] == 20
    for key in ("weight_sum", "lr_max", "scheduled_lr"):
        assert ours.param_groups[0][key] == pytest.approx(upstream.param_groups[0][key], rel=1e-13)
    upstream.eval()
    ours.eval()
    assert_is(others, arrays(params), TOLERANCE)


@pytest.mark.parametrize("kind", CLASSES)
def test_upstreams_closure_trajectory_goes_on(kind):
    params, grads = some_params(), some_grads(20, some_params())
    name = CLASSES[kind].__name__ + "Closure"
    upstream = getattr(schedulefree, name)(params, lr=STEP_SIZE, **OPTIONS[kind])
    others = some_params()
    ours = getattr(sftorch, name)(others)

    def steps(optimizer, of, some):
        for of_step in some:
            for p, g in zip(of, of_step, strict=True):
                p.grad = g.clone()
            optimizer.step(lambda: 0.0)

    steps(upstream, params, grads[:8])
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    ours.load_state_dict(copy.deepcopy(upstream.state_dict()))
    steps(upstream, params, grads[8:])
    steps(ours, others, grads[8:])
    assert_is(others, arrays(params), TOLERANCE)


def test_a_state_saved_before_upstreams_first_step_loads():
    params = some_params()
    ours, upstream = sftorch.AdamWScheduleFree(some_params()), theirs("adamw", params)
    ours.load_state_dict(upstream.state_dict())  # its lr_max starts at -1, its mode at eval
    ours.train()
    upstream.train()
    others, grads = ours.param_groups[0]["params"], some_grads(6, params)
    feed(upstream, params, grads)
    feed(ours, others, grads)
    assert_is(others, arrays(params), TOLERANCE)


def test_narrow_upstream_state_is_widened():
    params = some_params(torch.bfloat16)
    upstream = theirs("adamw", params)
    upstream.train()
    feed(upstream, params, some_grads(3, params))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = sftorch.AdamWScheduleFree(others)
    ours.load_state_dict(upstream.state_dict())
    assert {ours.state[q]["z"].dtype for q in others} == {torch.float32}
    assert all(
        torch.equal(ours.state[q]["z"].bfloat16(), upstream.state[p]["z"])
        for p, q in zip(params, others, strict=True)
    )
