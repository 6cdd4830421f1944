"""torch.distributed.checkpoint's state dict helpers, which take a step right after construction."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.checkpoint import state_dict as helpers

import sftorch
from sftorch.tests.plain import CLASSES, STEP_SIZE, copies, feed, same_bits, some_grads


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()


def wrapped(params, lr):
    return sftorch.ScheduleFreeWrapper(torch.optim.AdamW(params, lr=lr))


EVERY = [*CLASSES.values(), wrapped]


@pytest.mark.parametrize("make", EVERY)
def test_getting_the_state_of_a_fresh_optimizer_moves_nothing(make):
    net = model()
    optimizer, start = make(net.parameters(), lr=STEP_SIZE), copies(net.parameters())
    state = helpers.get_optimizer_state_dict(net, optimizer)
    assert same_bits(net.parameters(), start)
    assert set(state["state"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert same_bits([state["state"]["0.weight"]["z"]], [net[0].weight])
    assert [group["lr"] for group in optimizer.param_groups] == [STEP_SIZE]


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("make", EVERY)
def test_setting_a_state_on_a_fresh_optimizer_goes_on(make, evaluating, flatten):
    how = helpers.StateDictOptions(flatten_optimizer_state_dict=flatten)
    net, other = model(), model()
    params, others = list(net.parameters()), list(other.parameters())
    optimizer, grads = make(params, lr=STEP_SIZE), some_grads(8, params)
    feed(optimizer, params, grads[:5])
    if evaluating:
        optimizer.eval()
    state = copy.deepcopy(helpers.get_optimizer_state_dict(net, optimizer, options=how))
    helpers.set_model_state_dict(other, helpers.get_model_state_dict(net))
    fresh = make(others, lr=9.0)
    helpers.set_optimizer_state_dict(other, fresh, state, options=how)
    for o in (optimizer, fresh):
        o.train()
    feed(optimizer, params, grads[5:])
    feed(fresh, others, grads[5:])
    # A flat state is read by the names that a fresh optimizer has, and in train mode it puts no y aside:
    # y is then computed from x and z, which costs an ulp or two.
    slack = 1e-15 if flatten and evaluating else 0
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(q, p, rtol=slack, atol=slack)
    assert fresh.metrics() == optimizer.metrics()
