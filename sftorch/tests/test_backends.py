"""Who runs a step: the first backend that takes it. A direction needs no kernel, and a rule no branch."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch

import sftorch
from sfcore import averaging
from sfcore.laws import LAWS
from sfcore.native import build
from sftorch.closure import XAtRest
from sftorch.sgd import SGDDirection
from sftorch.step import backends
from sftorch.step.backends import Direction
from sftorch.step.plan import YAtRest
from sftorch.tests.fused_runs import Calls, everything, same
from sftorch.tests.plain import STEP_SIZE, feed, same_bits, some_grads, some_params, take_step

PATHS = [{}, {"fused": False}, {"foreach": False}]
RULES = [
    {"beta_rule": "anneal", "beta_max": 0.99, "beta_anneal_steps": 3000},
    {"beta_rule": "amuse", "beta_hold_steps": 100},
]


def test_the_list_is_in_order_and_the_last_takes_all():
    assert [one.name for one in backends.BACKENDS] == ["native", "triton", "lean", "foreach", "single"]
    assert [one.name for one in backends.BACKENDS if one.device] == ["native", "triton"]


def sign_single(grad, buffers):
    return grad.sign()  # S6


def sign_foreach(grads, buffers):
    return list(torch._foreach_sign(grads))


class OfSigns(SGDDirection):
    """A direction of which no kernel knows."""

    def _direction(self, values, t):
        return SIGNS, ()


SIGNS = Direction(sign_single, sign_foreach)


class Signs(OfSigns, YAtRest):
    pass


class SignsClosure(OfSigns, XAtRest):
    pass


@pytest.mark.parametrize("options", PATHS, ids=str)
@pytest.mark.parametrize("make", [Signs, SignsClosure])
def test_a_direction_without_a_kernel_goes_on_to_the_next(make, options, monkeypatch):
    params = some_params(torch.float32)
    plain = copy.deepcopy(params)
    calls = Calls(monkeypatch.setattr)
    optimizer = make(params, lr=STEP_SIZE, weight_decay=0.1, **options)
    other = (sftorch.SGDScheduleFree if make is Signs else sftorch.SGDScheduleFreeClosure)(
        plain, lr=STEP_SIZE, weight_decay=0.1, fused=False, foreach=options.get("foreach", True)
    )
    for of_step in some_grads(5, params):
        for p, q, g in zip(params, plain, of_step, strict=True):
            p.grad, q.grad = g, g.sign()
        take_step(optimizer)
        take_step(other)
    assert calls.kernel == 0
    assert same_bits(params, plain)


def test_fused_true_names_the_direction_that_has_no_kernel_before_anything_changes():
    params = some_params(torch.float32)
    optimizer = Signs(params, lr=STEP_SIZE, fused=True)
    held = [p.detach().clone() for p in params]
    why = "got True: the direction must have a kernel, got sign_single, which has none"
    if isinstance(build.find(), str):
        why = "got True: "
    for _ in range(2):
        with pytest.raises(RuntimeError, match=why):
            feed(optimizer, params, some_grads(1, params))
    assert same_bits(params, held)
    assert not optimizer.state
    assert optimizer.metrics()[0]["step"] == 0
    optimizer.param_groups[0]["fused"] = None
    feed(optimizer, params, some_grads(1, params))


AtZ = functools.partial(sftorch.AdamWScheduleFree, decay_at="z")
AtZClosure = functools.partial(sftorch.AdamWScheduleFreeClosure, decay_at="z")


def at_z(params, grads, steps, beta=0.9, b2=0.9, decay=0.3, eps=1e-8):
    """Takes the steps by S1-S9 with the decay at z, in NumPy: x, y, z as three sequences."""
    y = [p.detach().double().numpy().copy() for p in params]
    x, z, v, weight_sum = copy.deepcopy(y), copy.deepcopy(y), [0 * one for one in y], 0.0
    for t in range(1, steps + 1):
        weight_sum += STEP_SIZE**2
        c = STEP_SIZE**2 / weight_sum
        for i, g in enumerate(grads[t - 1]):
            g = g.double().numpy()
            v[i] = b2 * v[i] + (1 - b2) * g * g
            direction = g / (np.sqrt(v[i] / (1 - b2**t)) + eps)
            z[i] = z[i] - STEP_SIZE * (direction + decay * z[i])
            x[i] = (1 - c) * x[i] + c * z[i]
            y[i] = beta * x[i] + (1 - beta) * z[i]
    return x, y, z


@pytest.mark.parametrize("options", PATHS, ids=str)
@pytest.mark.parametrize("make", [AtZ, AtZClosure], ids=["y", "closure"])
def test_decay_at_z_needs_no_new_kernel(make, options):
    params = some_params(torch.float64)
    grads = some_grads(9, params)
    x, y, z = at_z(params, grads, 9)
    optimizer = make(params, lr=STEP_SIZE, betas=(0.9, 0.9), weight_decay=0.3, **options)
    feed(optimizer, params, grads)
    for i, p in enumerate(params):
        assert np.allclose(p.detach().numpy(), y[i] if make is AtZ else x[i], rtol=1e-12, atol=1e-12)
        assert np.allclose(optimizer.state[p]["z"].numpy(), z[i], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize("make", [AtZ, AtZClosure], ids=["y", "closure"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_decay_at_z_has_the_same_bits_fused(dtype, make):
    if dtype is torch.bfloat16 and make is AtZClosure:
        pytest.skip("no kernel takes them")
    if isinstance(build.find(), str):
        pytest.skip(build.find())
    runs = []
    for path in ({"fused": True}, {"fused": False, "foreach": False}):
        params = some_params(dtype, [(1003,), (3, 5), ()])
        optimizer = make(params, lr=STEP_SIZE, weight_decay=0.3, **path)
        feed(optimizer, params, some_grads(6, params))
        runs.append(everything(optimizer, params))
    assert all(same(a, b) for a, b in zip(*runs, strict=True))


def test_decay_at_z_in_the_lean_form_is_near_the_exact_one():
    runs = []
    for precision in ("lean", "exact"):
        params = some_params(torch.float32, [(50, 40)])
        optimizer = AtZ(params, lr=0.01, betas=(0.9, 0.9), weight_decay=0.3, precision=precision)
        feed(optimizer, params, some_grads(30, params))
        runs.append(params[0].detach())
    moved = (runs[1] - some_params(torch.float32, [(50, 40)])[0].detach()).norm()
    # Measured: 6e-4; with the decay left out it is 0.6.
    assert (runs[0] - runs[1]).norm() < 5e-3 * moved


@pytest.mark.parametrize("options", PATHS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_that_changes_beta_needs_no_new_kernel_and_x_stays_the_mean(rule, options):
    """5,000 steps of x, y and z as three sequences."""
    (p,) = some_params(torch.float64, shapes=[(7,)])
    values = LAWS["sgd"].defaults | {"beta": 0.7} | rule
    x = y = z = p.detach().numpy().copy()
    optimizer = sftorch.SGDScheduleFree([p], lr=0.01, momentum=0.7, **rule, **options)
    draw = np.random.default_rng(0)
    for t in range(1, 5001):
        g = draw.normal(size=7) + y
        p.grad = torch.from_numpy(g)
        optimizer.step()
        z = z - 0.01 * g
        x = x + (z - x) / t
        beta = averaging.beta_after(t, values)
        y = beta * x + (1 - beta) * z
    # Measured: at most 6e-15.
    assert np.abs(p.detach().numpy() - y).max() < 1e-12
    assert np.abs(optimizer.eval_params()[p].numpy() - x).max() < 1e-12
    assert optimizer.param_groups[0]["y_beta"] == averaging.beta_after(5000, values)
