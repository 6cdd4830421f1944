"""The wrapper's whole state, its base's included, is saved, loaded and copied."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import sftorch
from sftorch.tests.bases import BASES
from sftorch.tests.plain import STEP_SIZE, copies, feed, same_bits, some_grads, some_params


def matrices(dtype=torch.float32):
    return some_params(dtype, shapes=[(3, 2), (4, 4)])


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("base", BASES)
def test_a_round_trip_in_the_middle_is_bit_identical(base, beta, evaluating):
    params, grads = matrices(), some_grads(10, matrices())
    optimizer = sftorch.ScheduleFreeWrapper(BASES[base](params), momentum=beta, prior_steps=2)
    feed(optimizer, params, grads[:5])
    if evaluating:
        optimizer.eval()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = sftorch.ScheduleFreeWrapper(BASES[base](others))
    other.param_groups[0]["lr"] = 9.0  # what is loaded replaces every option
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.param_groups is other.base.param_groups
    for o in (optimizer, other):
        o.train()
    feed(optimizer, params, grads[5:])
    feed(other, others, grads[5:])
    assert same_bits(others, params)
    assert other.metrics() == optimizer.metrics()


def test_the_state_dict_keeps_the_bases_entries_apart():
    params = matrices()
    optimizer = sftorch.ScheduleFreeWrapper(torch.optim.AdamW(params, lr=STEP_SIZE))
    feed(optimizer, params, some_grads(3, params))
    state = optimizer.state_dict()["state"][0]
    assert set(state) == {"z", "step", "lr_max", "weight_sum", "base", "x_print", "y_print"}
    assert set(state["base"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert (state["step"], int(state["base"]["step"])) == (3, 3)
    assert set(optimizer.base.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_z_of_16_bit_parameters_is_loaded_in_float32():
    params, others = matrices(torch.bfloat16), matrices(torch.bfloat16)
    optimizer, other = (
        sftorch.ScheduleFreeWrapper(torch.optim.SGD(ps, lr=STEP_SIZE)) for ps in (params, others)
    )
    feed(optimizer, params, some_grads(3, params))
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):
        assert same_bits([other.state[q]["z"]], [optimizer.state[p]["z"]])
        assert other.state[q]["z"].dtype == torch.float32


@pytest.mark.parametrize("base", [torch.optim.NAdam, torch.optim.ASGD])
def test_float32_state_beside_float64_parameters_stays_float32(base):
    params, others = matrices(torch.float64), matrices(torch.float64)
    grads = some_grads(8, params)
    optimizer, other = (sftorch.ScheduleFreeWrapper(base(ps, lr=STEP_SIZE)) for ps in (params, others))
    feed(optimizer, params, grads[:4])
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    other.load_state_dict(optimizer.state_dict())
    feed(optimizer, params, grads[4:])
    feed(other, others, grads[4:])
    assert same_bits(others, params)


def test_state_of_a_float32_model_goes_on_in_float64():
    params, others = matrices(), matrices(torch.float64)
    optimizer, other = (sftorch.ScheduleFreeWrapper(BASES["AdamW"](ps)) for ps in (params, others))
    feed(optimizer, params, some_grads(4, params))
    state = optimizer.state_dict()
    for values in state["state"].values():
        del values["x_print"], values["y_print"]  # those of the float32 weights
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    other.load_state_dict(state)
    feed(other, others, some_grads(4, others))
    assert other.base.state[others[0]]["exp_avg"].dtype is torch.float64


def test_a_state_dict_from_before_the_first_step_loads():
    for base in BASES:  # Adagrad has state by then
        params, others = matrices(), matrices()
        other = sftorch.ScheduleFreeWrapper(BASES[base](others))
        other.load_state_dict(sftorch.ScheduleFreeWrapper(BASES[base](params)).state_dict())
        feed(other, others, some_grads(2, others))


def test_a_copied_wrapper_sees_its_own_bases_state():
    params = matrices()
    optimizer = sftorch.ScheduleFreeWrapper(torch.optim.AdamW(params, lr=STEP_SIZE))
    feed(optimizer, params, some_grads(3, params))
    other = copy.deepcopy(optimizer)
    (q, _), p = other.param_groups[0]["params"], params[0]
    assert other.state[q]["base"] is other.base.state[q]
    assert other.base.state[q]["exp_avg"] is not optimizer.base.state[p]["exp_avg"]


def test_a_loaded_state_is_apart_from_the_one_it_came_from():
    params, others = matrices(), matrices()
    optimizer, other = (
        sftorch.ScheduleFreeWrapper(torch.optim.AdamW(ps, lr=STEP_SIZE)) for ps in (params, others)
    )
    feed(optimizer, params, some_grads(3, params))
    other.load_state_dict(optimizer.state_dict())
    held = copies(other.base.state[q]["exp_avg"] for q in others)
    feed(optimizer, params, some_grads(3, params))
    assert same_bits([other.base.state[q]["exp_avg"] for q in others], held)


def test_a_state_dict_has_what_the_base_holds_now():
    params = matrices()
    optimizer = sftorch.ScheduleFreeWrapper(torch.optim.AdamW(params, lr=STEP_SIZE))
    feed(optimizer, params, some_grads(3, params))
    optimizer.base.state[params[0]] = {"put there": 7}
    assert optimizer.state_dict()["state"][0]["base"] == {"put there": 7}


@pytest.mark.parametrize("value", [None, [1], {}, {"state": {}, "param_groups": None}])
def test_what_is_no_state_dict_is_refused(value):
    optimizer = sftorch.ScheduleFreeWrapper(torch.optim.SGD(matrices(), lr=STEP_SIZE))
    with pytest.raises(ValueError, match="state_dict must have the keys 'state' and 'param_groups', got "):
        optimizer.load_state_dict(value)


@pytest.mark.parametrize("of_what", ["its base", "another class"])
def test_the_state_of_another_optimizer_is_refused_and_changes_nothing(of_what):
    params = matrices()
    optimizer = sftorch.ScheduleFreeWrapper(torch.optim.AdamW(params, lr=STEP_SIZE))
    feed(optimizer, params, some_grads(3, params))
    other = torch.optim.AdamW(matrices()) if of_what == "its base" else sftorch.AdamWScheduleFree(matrices())
    held, state = copies(params), repr(optimizer.state_dict())
    with pytest.raises(ValueError, match="state_dict must be a ScheduleFreeWrapper's, got groups without"):
        optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert same_bits(params, held)
    assert repr(optimizer.state_dict()) == state
