"""Someone else writes to the weights in eval mode: noticed at train(), with two ways out."""

from __future__ import annotations

import copy
import pickle

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


def resting(dtype=torch.float64, **options):
    """Returns an optimizer in eval mode after a few steps, and its parameters."""
    params = some_params(dtype, shapes=[(3, 2), (4,), ()])
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, **options)
    feed(optimizer, params, some_grads(6, params))
    optimizer.eval()
    return optimizer, params


def load_other_weights(params):
    model = torch.nn.ParameterList(params)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def copy_ema(params):
    with torch.no_grad():
        for p in params:
            p.lerp_(torch.zeros_like(p), 0.01)


def write_data(params):
    params[1].data.copy_(torch.zeros(4))


def merge_low_rank(params):
    down, up = torch.full((1, 2), 0.1, dtype=params[0].dtype), torch.full((3, 1), 0.1, dtype=params[0].dtype)
    params[0].data += up @ down


def replace_data(params):
    params[0].data = params[0].data * 1.01


WRITERS = [load_other_weights, copy_ema, write_data, merge_low_rank, replace_data]


@pytest.mark.parametrize("beta", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("write", WRITERS)
def test_train_raises_with_the_two_ways_out_and_changes_nothing(write, dtype, beta):
    optimizer, params = resting(dtype, betas=(beta, 0.99))
    write(params)
    held, state = copies(params), repr(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"rebase\(\).*put the old ones back"):
        optimizer.train()
    assert same_bits(params, held)
    assert repr(optimizer.state_dict()) == state
    with pytest.raises(RuntimeError, match="must be in train mode"):
        optimizer.step()


def test_the_message_names_where_and_how_many():
    optimizer, params = resting()
    write_data(params)
    with pytest.raises(RuntimeError, match=r"in 1 parameter\(s\), the first at index 1 .* shape \(4,\)"):
        optimizer.train()


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("evaluating", [True, False])
def test_rebase_goes_on_from_the_new_weights_as_x_y_and_z(write, evaluating):
    optimizer, params = resting(betas=(0.9, 0.99))
    if not evaluating:
        optimizer.train()
    write(params)
    new, grads = copies(params), some_grads(5, params, seed=7)
    optimizer.rebase()
    assert optimizer.param_groups[0]["train_mode"] is not evaluating
    optimizer.train()
    assert same_bits(params, new)
    run = truth("adamw", params, b2=0.99)  # x = y = z, but with the clock and the second moments so far
    state = [optimizer.state[p] for p in params]
    run.buffers["v"] = {str(i): s["exp_avg_sq"].numpy().copy() for i, s in enumerate(state)}
    run.step, run.lr_max, run.weight_sum = 6, STEP_SIZE, state[0]["weight_sum"]
    feed(optimizer, params, grads)
    feed_truth(run, grads)
    assert_is(params, run.y)
    assert_is(optimizer.eval_params().values(), run.x)


def test_putting_the_old_weights_back_works():
    optimizer, params = resting()
    x, y = copies(params), [optimizer.state[p]["y"].clone() for p in params]
    load_other_weights(params)
    with pytest.raises(RuntimeError):
        optimizer.train()
    for p, value in zip(params, x, strict=True):
        p.data.copy_(value)
    optimizer.train()
    assert same_bits(params, y)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_overflowed_are_not_foreign(kind, bad):
    params = some_params(torch.float32, shapes=[(4,)])
    optimizer = CLASSES[kind](params, lr=1.0)
    feed(optimizer, params, some_grads(8, params))
    feed(optimizer, params, [[torch.tensor([bad, 1.0, -bad, 0.0])]])
    y = copies(params)
    assert not y[0].isfinite().all()
    optimizer.eval()
    optimizer.train()
    assert same_bits(params, y)


def test_an_infinity_in_y_alone_is_not_foreign():
    (p,) = some_params(torch.float16, shapes=[(3,)])
    optimizer = sftorch.SGDScheduleFree([p], lr=STEP_SIZE)
    feed(optimizer, [p], some_grads(3, [p]))
    with torch.no_grad():
        p[0], p[1] = float("inf"), float("nan")  # z stays finite: x is inf where y is
    y = copies([p])
    optimizer.eval()
    optimizer.train()
    assert same_bits([p], y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_state_dict_round_trip_of_both_is_not_foreign(dtype):
    optimizer, params = resting(dtype)
    model = torch.nn.ParameterList(params)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    y = [optimizer.state[p]["y"].clone() for p in params]
    others = some_params(dtype, shapes=[(3, 2), (4,), ()], seed=11)
    other = sftorch.AdamWScheduleFree(others, lr=STEP_SIZE)
    other.load_state_dict(state)
    torch.nn.ParameterList(others).load_state_dict(weights)
    model.load_state_dict(weights)
    for run, of_run in ((other, others), (optimizer, params)):
        run.train()
        assert same_bits(of_run, y)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_are_not_foreign(copied):
    optimizer, params = resting(torch.bfloat16)
    y = [optimizer.state[p]["y"].clone() for p in params]
    other = copied(optimizer)
    other.train()
    assert same_bits(other.param_groups[0]["params"], y)


def test_state_computed_elsewhere_may_differ_by_rounding():
    optimizer, params = resting(torch.float32)
    y = [optimizer.state[p]["y"].clone() for p in params]
    with torch.no_grad():
        params[0].copy_(torch.nextafter(params[0], torch.full_like(params[0], 9.0)))  # one ulp, as on a GPU
    optimizer.train()
    assert same_bits(params, y)
