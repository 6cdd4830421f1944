"""Parameter groups: settings of their own, extra keys, names."""

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
    feed,
    feed_truth,
    some_grads,
    some_params,
    truth,
)

OWN = {
    "sgd": {
        "lr": 0.02,
        "momentum": 0.5,
        "weight_decay": 0.2,
        "warmup_steps": 3,
        "r": 1.0,
        "weight_lr_power": 1.0,
    },
    "adamw": {
        "lr": 0.02,
        "betas": (0.5, 0.9),
        "weight_decay": 0.2,
        "warmup_steps": 3,
        "eps": 1e-3,
        "inner_momentum": 0.3,
    },
    "radam": {
        "lr": 0.02,
        "betas": (0.5, 0.9),
        "weight_decay": 0.2,
        "silent_sgd_phase": False,
        "prior_steps": 4,
    },
}


def canonical(options):
    options = dict(options)
    if "betas" in options:
        options["beta"], options["b2"] = options.pop("betas")
    if "momentum" in options:
        options["beta"] = options.pop("momentum")
    return options


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("table", [CLASSES, CLOSURES], ids=["open", "closure"])
def test_each_group_follows_its_own_settings(kind, table):
    params = some_params(shapes=[(3,), (4,)])
    optimizer = table[kind]([{"params": params[0]}, {"params": [params[1]], **OWN[kind]}], lr=STEP_SIZE)
    runs = [truth(kind, params[:1]), truth(kind, params[1:], **canonical(OWN[kind]))]
    grads = some_grads(15, params)
    feed(optimizer, params, grads)
    feed_truth(runs[0], [g[:1] for g in grads])
    feed_truth(runs[1], [g[1:] for g in grads], lr=0.02)
    for p, run in zip(params, runs, strict=True):
        assert_is([p], run.y if table is CLASSES else run.x)
    assert [m["weight_sum"] for m in optimizer.metrics()] == pytest.approx(
        [r.weight_sum for r in runs], rel=1e-13
    )


def test_extra_keys_of_the_user_are_kept():
    own = {"name": "head", "lr_scale": 0.1, "weight_decay_scale": 2, "no_weight_decay": True, "layer": 3}
    optimizer = sftorch.SGDScheduleFree([{"params": some_params(), **own}])
    assert own.items() <= optimizer.param_groups[0].items()
    assert own.items() <= optimizer.state_dict()["param_groups"][0].items()


@pytest.mark.parametrize(
    ("slip", "meant"), [("weigth_decay", "weight_decay"), ("beta", "betas"), ("warmup_step", "warmup_steps")]
)
def test_misspelt_options_of_a_group_are_refused(slip, meant):
    with pytest.raises(ValueError, match=f"option '{slip}' must be a known name.*did you mean '{meant}'"):
        sftorch.AdamWScheduleFree([{"params": some_params(), slip: 0.1}])


def test_named_parameters_are_taken_and_their_names_kept():
    model = torch.nn.Linear(2, 1).double()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer, run = sftorch.AdamWScheduleFree(model.named_parameters(), lr=STEP_SIZE), truth("adamw", start)
    grads = some_grads(5, model.parameters())
    feed(optimizer, list(model.parameters()), grads)
    feed_truth(run, grads)
    assert_is(model.parameters(), run.y)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    lean = sftorch.AdamWScheduleFree(torch.nn.Linear(2, 1).named_parameters(), precision="lean")
    assert lean.param_groups[0]["param_names"] == ["weight", "bias"]


def test_a_group_given_to_the_optimizer_is_not_changed():
    group = {"params": some_params(), "lr": 0.1}
    sftorch.SGDScheduleFree([group])
    assert set(group) == {"params", "lr"}


def test_settings_changed_between_steps_count_from_the_next_one():
    params, run = some_params(), truth("adamw", some_params())
    optimizer, grads = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE), some_grads(12, some_params())
    feed(optimizer, params, grads[:6])
    feed_truth(run, grads[:6])
    changes = {"weight_decay": 0.3, "eps": 1e-2, "r": 2.0, "weight_lr_power": 1.0}
    optimizer.param_groups[0].update(changes)
    run.options |= changes
    feed(optimizer, params, grads[6:])
    feed_truth(run, grads[6:])
    assert_is(params, run.y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", [sftorch.SGDScheduleFree, sftorch.AdamWScheduleFree])
def test_lr_may_be_a_0d_tensor(make, dtype):
    kind = next(k for k, c in CLASSES.items() if c is make)
    params, lr = some_params(), torch.tensor(STEP_SIZE, dtype=dtype)
    optimizer, run = make(params, lr=lr), truth(kind, some_params())
    grads = some_grads(8, params)
    feed(optimizer, params, grads[:4])
    feed_truth(run, grads[:4], lr=float(lr))
    optimizer.param_groups[0]["lr"].fill_(0.01)  # as schedulers do
    feed(optimizer, params, grads[4:])
    feed_truth(run, grads[4:], lr=float(torch.tensor(0.01, dtype=dtype)))
    assert_is(params, run.y)


@pytest.mark.parametrize("lr", [np.float16(1), np.float32(1), torch.tensor(1.0)], ids=repr)
def test_the_average_takes_as_many_steps_as_the_run_has_whatever_kind_of_number_lr_is(lr):
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = sftorch.SGDScheduleFree([p], lr=lr)
    p.grad = torch.zeros(1)
    for _ in range(2100):  # in 16 bits 2048 + 1 is 2048
        optimizer.step()
    assert optimizer.metrics()[0]["c"] == pytest.approx(1 / 2101, rel=1e-3)
    assert type(optimizer.state_dict()["param_groups"][0]["weight_sum"]) is float
