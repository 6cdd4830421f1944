"""deepcopy, pickle and torch.save: a copy in the middle of a run goes on bit for bit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import sftorch
from sftorch.tests.plain import CLASSES, CLOSURES, STEP_SIZE, copies, feed, same_bits, some_grads, some_params


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def wrapped(params, lr):
    return sftorch.ScheduleFreeWrapper(torch.optim.NAdam(params, lr=lr))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o)), "torch.save": saved}
EVERY = [*CLASSES.values(), *CLOSURES.values(), wrapped]


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", EVERY)
def test_a_copy_goes_on_as_the_original_and_apart_from_it(make, how, evaluating):
    params = some_params(torch.float32)
    optimizer = make(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(4, params))
    flips = evaluating and make not in CLOSURES.values()
    if flips:
        optimizer.eval()
    other = COPIES[how](optimizer)
    theirs = other.param_groups[0]["params"]
    assert same_bits(theirs, params)
    held = copies(theirs)
    if flips:
        optimizer.train()
        other.train()
        held = copies(theirs)
    later = some_grads(4, params, seed=8)
    feed(optimizer, params, later)
    assert same_bits(theirs, held)
    feed(other, theirs, later)
    assert same_bits(theirs, params)
    assert other.metrics() == optimizer.metrics()


def test_a_copied_wrapper_still_shares_groups_with_its_base():
    for how in COPIES.values():
        other = how(wrapped(some_params(), lr=STEP_SIZE))
        assert other.param_groups is other.base.param_groups


def test_a_copy_with_a_scheduler_keeps_stepping():
    params = some_params()
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    feed(optimizer, params, some_grads(2, params))
    schedule.step()
    other, theirs = copy.deepcopy((optimizer, schedule))
    mine = other.param_groups[0]["params"]
    for o, s, p in ((optimizer, schedule, params), (other, theirs, mine)):
        feed(o, p, some_grads(2, p, seed=3))
        s.step()
    assert same_bits(mine, params)
    assert other.param_groups[0]["lr"] == STEP_SIZE / 4


def test_a_pickle_of_an_older_version_gets_the_options_it_lacks():
    optimizer = sftorch.AdamWScheduleFree(some_params(), lr=STEP_SIZE)
    for group in optimizer.param_groups:
        del group["prior_steps"], group["maximize"], group["c"]
    other = pickle.loads(pickle.dumps(optimizer))
    group = other.param_groups[0]
    assert (group["prior_steps"], group["maximize"], group["c"]) == (0, False, 0.0)
    feed(other, group["params"], some_grads(2, group["params"]))
    assert other.metrics()[0]["step"] == 2
