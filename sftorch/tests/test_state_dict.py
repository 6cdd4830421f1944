"""State dicts: a run that is saved and loaded in its middle is bit for bit the run that was not."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import sftorch
from sftorch.tests.plain import CLASSES, CLOSURES, STEP_SIZE, copies, feed, same_bits, some_grads, some_params


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def options_of(make, beta):
    if make in (sftorch.SGDScheduleFree, sftorch.SGDScheduleFreeClosure):
        return {"momentum": beta, "warmup_steps": 6, "r": 1.0}
    return {"betas": (beta, 0.99), "weight_decay": 0.1, "prior_steps": 3}


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("make", [*CLASSES.values(), *CLOSURES.values()])
def test_a_round_trip_in_the_middle_is_bit_identical(make, dtype, beta, evaluating):
    if evaluating and make in CLOSURES.values():
        evaluating = False  # they have no modes
    params = some_params(dtype)
    optimizer = make(params, lr=STEP_SIZE, **options_of(make, beta))
    grads = some_grads(10, params)
    feed(optimizer, params, grads[:5])
    if evaluating:
        optimizer.eval()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make(others, lr=9.0)  # what is loaded replaces every option
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    if evaluating:
        optimizer.train()
        other.train()
        assert same_bits(others, params)
    feed(optimizer, params, grads[5:])
    feed(other, others, grads[5:])
    assert same_bits(others, params)
    assert repr(other.state_dict()) == repr(optimizer.state_dict())


def test_state_keeps_its_dtype():
    params = some_params(torch.bfloat16)
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, inner_momentum=0.5)
    feed(optimizer, params, some_grads(4, params))
    optimizer.eval()
    others = some_params(torch.bfloat16)
    other = sftorch.AdamWScheduleFree(others)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):
        for name in ("z", "exp_avg_sq", "exp_avg"):
            assert other.state[q][name].dtype == torch.float32
            assert same_bits([other.state[q][name]], [optimizer.state[p][name]])
        assert other.state[q]["y"].dtype == torch.bfloat16


def test_narrow_state_of_another_program_is_widened_exactly():
    params = some_params(torch.bfloat16, shapes=[(4,)])
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(4, params))
    state = copy.deepcopy(optimizer.state_dict())
    narrow = {name: state["state"][0][name].bfloat16() for name in ("z", "exp_avg_sq")}
    state["state"][0].update(narrow)
    optimizer.load_state_dict(state)
    for name, value in narrow.items():
        assert same_bits([optimizer.state[params[0]][name]], [value.float()])


def test_a_loaded_state_is_apart_from_the_one_it_came_from():
    params, others = some_params(), some_params()
    optimizer, other = (sftorch.AdamWScheduleFree(ps, lr=STEP_SIZE) for ps in (params, others))
    feed(optimizer, params, some_grads(3, params))
    other.load_state_dict(optimizer.state_dict())
    held = copies(other.state[q]["z"] for q in others)
    feed(optimizer, params, some_grads(3, params))
    assert same_bits([other.state[q]["z"] for q in others], held)
    assert other.metrics()[0]["step"] == 3


def test_options_that_an_old_state_dict_lacks_keep_their_values():
    params = some_params()
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(3, params))
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["inner_momentum"], group["prior_steps"], group["y_beta"]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = sftorch.AdamWScheduleFree(others, inner_momentum=0.3)
    other.load_state_dict(state)
    group = other.param_groups[0]
    assert (group["lr"], group["inner_momentum"], group["prior_steps"]) == (STEP_SIZE, 0.3, 0)
    feed(other, group["params"], some_grads(1, group["params"]))  # its buffer is made now
    assert {"exp_avg"} <= set(other.state[group["params"][0]])


def test_the_mode_that_is_loaded_wins_in_every_order():
    params = some_params()
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(3, params))
    y, training = copies(params), copy.deepcopy(optimizer.state_dict())
    optimizer.eval()
    x, resting = copies(params), copy.deepcopy(optimizer.state_dict())
    for state, weights in ((training, y), (resting, x)):
        for before in ("train", "eval"):
            others = some_params(seed=9)
            other = sftorch.SGDScheduleFree(others)
            getattr(other, before)()
            for p, value in zip(others, weights, strict=True):
                p.data.copy_(value)
            other.load_state_dict(state)
            other.train()
            assert same_bits(others, y)
            other.eval()
            assert same_bits(others, x)


def test_another_number_of_parameters_is_refused_and_changes_nothing():
    params = some_params()
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(3, params))
    state = repr(optimizer.state_dict())
    other = sftorch.SGDScheduleFree(some_params(shapes=[(2,)]))
    with pytest.raises(ValueError, match="group 0 must have 4 parameters, got 1"):
        optimizer.load_state_dict(other.state_dict())
    assert repr(optimizer.state_dict()) == state


@pytest.mark.parametrize("word", ["module", "_orig_mod"])
def test_names_of_a_wrapped_model_are_those_of_the_model(word):
    linear = torch.nn.Linear(2, 1)
    wrapped = torch.nn.ModuleDict({word: torch.nn.ModuleDict({"fc": linear})})
    optimizers = [
        sftorch.SGDScheduleFree(model.named_parameters()) for model in (wrapped, wrapped[word], linear)
    ]
    for saved, live in ((0, 1), (1, 0)):
        optimizers[live].load_state_dict(optimizers[saved].state_dict())
    with pytest.raises(ValueError, match=f"parameter 0 of group 0 must be 'weight', got '{word}.fc.weight'"):
        optimizers[2].load_state_dict(optimizers[0].state_dict())
