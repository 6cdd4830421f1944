"""train() and eval(): where an optimizer starts, and that nothing is lost on the way."""

from __future__ import annotations

import copy

import pytest
import torch

import sftorch
from sftorch.tests.plain import (
    CLASSES,
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

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]


@pytest.mark.parametrize("kind", CLASSES)
def test_it_starts_in_train_mode(kind):
    params = some_params()
    optimizer, run = CLASSES[kind](params, lr=STEP_SIZE), truth(kind, params)
    assert [group["train_mode"] for group in optimizer.param_groups] == [True]
    grads = some_grads(8, params)
    feed(optimizer, params, grads)
    feed_truth(run, grads)
    assert_is(params, run.y)


@pytest.mark.parametrize("kind", CLASSES)
def test_eval_puts_x_in_and_train_puts_y_back(kind):
    params = some_params()
    optimizer, run = CLASSES[kind](params, lr=STEP_SIZE), truth(kind, params)
    grads = some_grads(8, params)
    feed(optimizer, params, grads)
    feed_truth(run, grads)
    optimizer.eval()
    assert_is(params, run.x)
    optimizer.train()
    assert_is(params, run.y)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_1000_flips_change_no_bit(kind, dtype):
    params = some_params(dtype)
    optimizer = CLASSES[kind](params, lr=1.0)  # so large that x and y differ in bfloat16 too
    feed(optimizer, params, some_grads(10, params))
    y = copies(params)
    optimizer.eval()
    x = copies(params)
    assert not same_bits(x, y)
    for _ in range(1000):
        optimizer.train()
        assert same_bits(params, y)
        optimizer.eval()
        assert same_bits(params, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_the_memory_of_y_is_kept_for_the_next_evaluation_and_not_by_a_copy(dtype):
    params = some_params(dtype)
    optimizer = CLASSES["adamw"](params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(3, params))
    places = []
    for _ in range(2):
        with optimizer.evaluation():
            places.append([optimizer.state[p]["y"].data_ptr() for p in params])
    assert places[0] == places[1]
    assert all("y" not in optimizer.state[p] for p in params)
    assert len(optimizer._kept) == len(params)
    assert copy.deepcopy(optimizer)._kept is None
    assert copy.deepcopy(optimizer)._walks is None


def test_a_run_with_flips_is_bit_for_bit_the_run_without():
    runs = []
    for flips in (0, 3):
        params = some_params(torch.bfloat16)
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE)
        for of_step in some_grads(20, params):
            feed(optimizer, params, [of_step])
            for _ in range(flips):
                optimizer.eval()
                optimizer.train()
        runs.append(params + [optimizer.state[p]["z"] for p in params])
    assert same_bits(*runs)


def test_both_modes_are_idempotent():
    params = some_params()
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(5, params))
    y = copies(params)
    optimizer.train()
    assert same_bits(params, y)
    optimizer.eval()
    x = copies(params)
    optimizer.eval()
    assert same_bits(params, x)
    optimizer.train()
    optimizer.train()
    assert same_bits(params, y)


def test_modes_are_per_group():
    first, second = some_params(shapes=[(3,)]), some_params(shapes=[(4,)], seed=5)
    optimizer = sftorch.SGDScheduleFree([{"params": first}, {"params": second}], lr=STEP_SIZE)
    run = truth("sgd", first + second)
    grads = some_grads(5, first + second)
    feed(optimizer, first + second, grads)
    feed_truth(run, grads)
    optimizer.eval()
    optimizer.param_groups[0]["train_mode"] = True  # as upstream leaves a group that was added late
    first[0].data.copy_(optimizer.state[first[0]].pop("y"))
    assert_is([first[0], second[0]], {"0": run.y["0"], "1": run.x["1"]})
    optimizer.eval()
    assert_is(first + second, run.x)
    optimizer.train()
    assert_is(first + second, run.y)


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_group_added_later_is_in_the_current_mode(evaluating):
    first, second = some_params(shapes=[(3,)]), some_params(shapes=[(4,)], seed=5)
    optimizer = sftorch.AdamWScheduleFree(first, lr=STEP_SIZE)
    feed(optimizer, first, some_grads(3, first))
    if evaluating:
        optimizer.eval()
    optimizer.add_param_group({"params": second})
    assert [group["train_mode"] for group in optimizer.param_groups] == [not evaluating] * 2
    optimizer.train()
    run, grads = truth("adamw", second), some_grads(3, first + second, seed=9)
    feed(optimizer, first + second, grads)
    feed_truth(run, [g[1:] for g in grads])
    assert_is(second, run.y)


@pytest.mark.parametrize("kind", CLASSES)
def test_step_in_eval_mode_raises_says_what_to_call_and_changes_nothing(kind):
    params = some_params()
    optimizer = CLASSES[kind](params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(3, params))
    optimizer.eval()
    x, state = copies(params), repr(optimizer.state_dict())
    calls = []
    with pytest.raises(RuntimeError, match=r"must be in train mode.*call optimizer\.train\(\)"):
        optimizer.step(lambda: calls.append(1))
    assert calls == []
    assert same_bits(params, x)
    assert repr(optimizer.state_dict()) == state


def test_a_closure_that_leaves_eval_mode_on_is_refused():
    params = some_params()
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(3, params))
    x = list(optimizer.eval_params().values())
    with pytest.raises(RuntimeError, match="must be in train mode"):
        optimizer.step(optimizer.eval)
    assert same_bits(params, x)
    assert optimizer.metrics()[0]["step"] == 3


@pytest.mark.parametrize("kind", CLASSES)
def test_lr_0_stays_put_and_what_follows_is_right(kind):
    params = some_params()
    optimizer, run = CLASSES[kind](params, lr=0.0, weight_decay=0.1), truth(kind, params, weight_decay=0.1)
    start, grads = copies(params), some_grads(12, params)
    feed(optimizer, params, grads[:4])
    assert same_bits(params, start)
    optimizer.eval()
    assert same_bits(params, start)
    optimizer.train()
    optimizer.param_groups[0]["lr"] = STEP_SIZE
    feed(optimizer, params, grads[4:])
    feed_truth(run, grads[:4], lr=0.0)
    feed_truth(run, grads[4:])
    assert_is(params, run.y)
    assert_is(optimizer.eval_params().values(), run.x)
