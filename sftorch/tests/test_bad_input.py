"""Bad input: the error's type, "name must be RULE, got VALUE: fix", all at once, before anything changes."""

from __future__ import annotations

import pytest
import torch

import sftorch
from sfcore import HyperparameterError
from sftorch.recalibrate import recalibrate
from sftorch.tests.plain import CLASSES, CLOSURES, STEP_SIZE, copies, feed, same_bits, some_grads, some_params
from sftorch.trainers import unwrap

EVERY = [*CLASSES.values(), *CLOSURES.values()]
ADAPTIVE = [c for c in EVERY if "SGD" not in c.__name__]
RAMPED = [c for c in EVERY if "RAdam" not in c.__name__]
NAN = float("nan")

ANY_OPTION = [
    ({"lr": -1.0}, r"lr must be a finite number >= 0, got -1\.0: "),
    ({"lr": 10**400}, r"lr must be a finite number >= 0, got 10{400}: "),
    ({"lr": NAN}, r"lr must be a finite number >= 0, got nan: "),
    ({"lr": "0.1"}, r"lr must be a finite number >= 0, got '0\.1': "),
    ({"lr": torch.ones(2)}, r"lr must be a finite number >= 0, got tensor"),
    ({"lr": torch.tensor(NAN)}, r"lr must be a finite number >= 0, got nan: "),
    ({"weight_decay": -0.1}, r"weight_decay must be a finite number >= 0, got -0\.1: "),
    ({"r": NAN}, r"r must be a finite number >= 0, got nan: "),
    ({"weight_lr_power": -2}, r"weight_lr_power must be a finite number >= 0, got -2: "),
    ({"prior_steps": 0.5}, r"prior_steps must be a whole number of optimizer steps >= 0, got 0\.5: "),
    ({"prior_steps": 3, "lr": 0.0}, r"lr must be > 0 when prior_steps > 0, got 0\.0: "),
    ({"maximize": "yes"}, r"maximize must be True or False, got 'yes': "),
    ({"foreach": "x"}, r"foreach must be None, True or False, got 'x': "),
    ({"foreach": 0.9}, r"foreach must be None, True or False, got 0\.9: .*inner_momentum.* by name"),
    ({"foreach": 0}, r"foreach must be None, True or False, got 0: "),
    ({"fused": "x"}, r"fused must be None, True or False, got 'x': "),
    ({"capturable": True}, r"capturable must be False, got True: "),
    ({"differentiable": "x"}, r"differentiable must be False, got 'x': "),
]
ADAPTIVE_OPTION = [
    ({"betas": (2.0, 0.9)}, r"betas\[0\] must be a number in \[0, 1\], got 2\.0: "),
    ({"betas": (0.9, 1.0)}, r"betas\[1\] must be a number in \[0, 1\), got 1\.0: "),
    ({"betas": 0.9}, r"betas must be a pair \(beta, b2\), got 0\.9: "),
    ({"betas": (0.9, 0.99, 0.999)}, r"betas must be a pair \(beta, b2\), got \(0\.9, 0\.99, 0\.999\): "),
    ({"eps": 0}, r"eps must be a finite number > 0, got 0: "),
]
RAMPED_OPTION = [
    ({"warmup_steps": 0.03}, r"warmup_steps must be .*, got 0\.03: pass steps, not a fraction"),
    ({"warmup_steps": -1}, r"warmup_steps must be .*, got -1: "),
]
TABLE = [
    (make, options, message)
    for makes, rows in ((EVERY, ANY_OPTION), (ADAPTIVE, ADAPTIVE_OPTION), (RAMPED, RAMPED_OPTION))
    for make in makes
    for options, message in rows
]


@pytest.mark.parametrize(("make", "options", "message"), TABLE)
def test_options_out_of_range_are_refused(make, options, message):
    with pytest.raises(HyperparameterError, match=message):
        make(some_params(), **options)
    optimizer = make(some_params())
    before = repr(optimizer.param_groups)
    with pytest.raises(HyperparameterError, match=message):
        optimizer.add_param_group({"params": some_params(seed=3), **options})
    assert repr(optimizer.param_groups) == before


def test_a_number_for_foreach_is_told_where_it_belongs():
    shared = (1e-3, (0.9, 0.999), 1e-8, 0, 0, 0.0, 2.0)  # lr to weight_lr_power
    for make in (sftorch.AdamWScheduleFree, sftorch.AdamWScheduleFreeClosure):
        for foreach in (True, False, None):
            assert make(some_params(), *shared, foreach).param_groups[0]["foreach"] is foreach
        with pytest.raises(HyperparameterError, match=r"foreach must be .*, got 0\.9: .*inner_momentum"):
            make(some_params(), foreach=0.9)


def test_all_problems_are_told_at_once():
    with pytest.raises(HyperparameterError) as caught:
        sftorch.AdamWScheduleFree(
            some_params(), lr=-1, betas=0.9, eps=-1.0, warmup_steps=0.03, capturable=True
        )
    assert [p.split()[0] for p in caught.value.problems] == [
        "lr",
        "eps",
        "warmup_steps",
        "capturable",
        "betas",
    ]


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("name", ["weigth_decay", "beta1", "nesterov"])
def test_an_unknown_keyword_is_a_type_error(make, name):
    with pytest.raises(TypeError, match=name):
        make(some_params(), **{name: 0.1})


def exhausted():
    params = iter(some_params())
    list(params)
    return params


BAD_PARAMS = {
    "a tensor": (
        lambda: torch.ones(2),
        TypeError,
        r"params must be an iterable .*, got a Tensor: pass \[tensor\]",
    ),
    "a set": (lambda: set(some_params()), TypeError, "params must be ordered, got a set: pass a list"),
    "a set in a group": (
        lambda: [{"params": set(some_params())}],
        TypeError,
        "params must be ordered, got a set",
    ),
    "a number": (lambda: 5, TypeError, "params must be an iterable, got int: "),
    "an empty list": (list, ValueError, "params must be non-empty, got an empty iterable: "),
    "an exhausted iterator": (exhausted, ValueError, "params must be non-empty, got .*make a new iterator"),
    "a non-leaf": (
        lambda: [*some_params(), some_params()[0] * 2],
        ValueError,
        r"params\[4\] must be a leaf tensor, got the result of an operation of shape \(3, 2\): ",
    ),
    "integers": (
        lambda: [torch.arange(3)],
        ValueError,
        r"params\[0\] must be floating point or complex, got torch\.int64: ",
    ),
    "a conjugate view": (
        lambda: [torch.ones(3, dtype=torch.complex64).conj()],
        ValueError,
        r"params\[0\] must hold its own values, got a conjugate view of shape \(3,\)",
    ),
    "a list of lists": (lambda: [some_params()], TypeError, r"params\[0\] must be a Tensor, got list: "),
    "a model": (
        lambda: torch.nn.Linear(2, 1),
        TypeError,
        "params must be an iterable, got Linear: pass model.parameters",
    ),
    "duplicates": (
        lambda: some_params() + some_params()[:1] * 2,
        ValueError,
        r"params\[5\] must be in one group, once, got a tensor of shape \(3, 2\) a second time: ",
    ),
    "a group without params": (
        lambda: [{"lr": 0.1}],
        ValueError,
        r"must have the key 'params', got the keys \['lr'\]: ",
    ),
    "a group that is a list": (
        lambda: [{"params": some_params()}, [1]],
        TypeError,
        "must be a dict, got list: ",
    ),
}


@pytest.mark.parametrize("what", BAD_PARAMS)
@pytest.mark.parametrize("make", EVERY)
def test_params_that_cannot_be_optimized_are_refused(make, what):
    params, error, message = BAD_PARAMS[what]
    with pytest.raises(error, match=message):
        make(params())


@pytest.mark.parametrize(
    "make", [*EVERY, lambda ps: sftorch.ScheduleFreeWrapper(torch.optim.SGD(ps, lr=STEP_SIZE))]
)
def test_a_parameter_cannot_be_in_two_groups(make):
    params = some_params()
    optimizer = make(params)
    feed(optimizer, params, some_grads(2, params))
    before = repr(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"params\[1\] must be in one group, once"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2)), params[2]]})
    assert repr(optimizer.state_dict()) == before


@pytest.mark.parametrize("make", EVERY)
def test_later_nonsense_in_any_option_is_refused_before_anything_changes(make):
    params = some_params()
    optimizer = make(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(2, params))
    optimizer.param_groups[0].update(weight_decay=-1.0, weight_lr_power=NAN, maximize=3)
    held, state = copies(params), repr(optimizer.state_dict())
    with pytest.raises(HyperparameterError) as caught:
        optimizer.step(lambda: 0.0)
    assert [p.split()[0] for p in caught.value.problems] == ["weight_lr_power", "weight_decay", "maximize"]
    assert same_bits(params, held)
    assert repr(optimizer.state_dict()) == state


def test_options_of_the_wrapper_are_keyword_only_and_checked():
    base = torch.optim.SGD(some_params(), lr=STEP_SIZE)
    with pytest.raises(TypeError, match="positional"):
        sftorch.ScheduleFreeWrapper(base, 0.9)
    with pytest.raises(TypeError, match="momentun"):
        sftorch.ScheduleFreeWrapper(base, momentun=0.9)
    with pytest.raises(HyperparameterError) as caught:
        sftorch.ScheduleFreeWrapper(base, momentum=2.0, weight_decay_at_y=-1.0, prior_steps=0.1)
    assert [p.split()[0] for p in caught.value.problems] == ["momentum", "prior_steps", "weight_decay_at_y"]
    assert "schedule_free" not in base.param_groups[0]


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        ("adam", TypeError, r"base must be a torch\.optim\.Optimizer, got str: "),
        (
            sftorch.SGDScheduleFree(some_params()),
            TypeError,
            "base must not be Schedule-Free itself, got SGDScheduleFree: ",
        ),
        (
            torch.optim.LBFGS(some_params()),
            TypeError,
            "base must be an optimizer that steps without a closure, got LBFGS: ",
        ),
    ],
)
def test_bases_that_cannot_be_wrapped_are_refused(base, error, message):
    with pytest.raises(error, match=message):
        sftorch.ScheduleFreeWrapper(base)


def test_a_base_without_lr_is_refused_and_left_as_it_was():
    base = torch.optim.Optimizer(some_params(), {"eta": 0.1})
    with pytest.raises(ValueError, match="base must have an lr in its groups, got the options"):
        sftorch.ScheduleFreeWrapper(base)
    assert set(base.param_groups[0]) == {"params", "eta"}


def test_a_nan_lr_of_the_base_is_refused():
    base = torch.optim.Optimizer(some_params(), {"lr": NAN})
    with pytest.raises(ValueError, match="lr must be a finite number >= 0, got nan"):
        sftorch.ScheduleFreeWrapper(base)
    assert "schedule_free" not in base.param_groups[0]


def adamw():
    return sftorch.AdamWScheduleFree(NORMED.parameters(), lr=STEP_SIZE)


def wrapped():
    return sftorch.ScheduleFreeWrapper(torch.optim.SGD(NORMED.parameters(), lr=STEP_SIZE))


def with_state(**entries):
    return adamw().state_dict() | {"state": {0: entries}}


NORMED = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
KEYS = "state_dict must have the keys 'state' and 'param_groups', got {} without: "
GROUPS = {"state": {}, "param_groups": 3}
CALLS = [
    (lambda: adamw().step(3), TypeError, "closure must be None or a function, got 3: "),
    (lambda: wrapped().step("x"), TypeError, "closure must be None or a function, got 'x': "),
    (
        lambda: sftorch.SGDScheduleFreeClosure(some_params()).step(3),
        TypeError,
        "closure must be a function, got 3: ",
    ),
    (lambda: adamw().eval_state_dict(3), TypeError, r"model must be a torch\.nn\.Module, got 3: "),
    (lambda: adamw().eval_state_dict(None), TypeError, r"model must be a torch\.nn\.Module, got None: "),
    (
        lambda: adamw().eval_state_dict(torch.nn.ReLU()),
        ValueError,
        "model must be the one whose parameters this optimizer holds, got one with 0 of them among its 0 ",
    ),
    (lambda: adamw().add_param_group(3), TypeError, "param_group must be a dict, got int: "),
    (lambda: adamw().add_param_group({"params": 3}), TypeError, "params must be an iterable, got int: "),
    (lambda: wrapped().add_param_group(None), TypeError, "param_group must be a dict, got NoneType: "),
    (lambda: adamw().load_state_dict(None), ValueError, KEYS.format("NoneType")),
    (lambda: adamw().load_state_dict({}), ValueError, KEYS.format("dict")),
    (lambda: adamw().load_state_dict(GROUPS), ValueError, KEYS.format("dict")),
    (lambda: adamw().load_state_dict(GROUPS | {"param_groups": [3]}), ValueError, KEYS.format("dict")),
    (
        lambda: adamw().load_state_dict(GROUPS | {"param_groups": [{}]}),
        ValueError,
        "group 0 must be of AdamW",
    ),
    (
        lambda: adamw().load_state_dict(adamw().state_dict() | {"state": {0: 3}}),
        ValueError,
        KEYS.format("dict"),
    ),
    (
        lambda: adamw().load_state_dict(with_state(z=3)),
        ValueError,
        r"parameter 0 of group 0 must have the state 'z', got \['z'\]: ",
    ),
    (lambda: wrapped().load_state_dict(3), ValueError, KEYS.format("int")),
    (lambda: wrapped().load_state_dict(GROUPS), ValueError, KEYS.format("dict")),
    (
        lambda: wrapped().load_state_dict(adamw().state_dict()),
        ValueError,
        "state_dict must be a ScheduleFreeWrapper's, got groups without 'schedule_free': ",
    ),
    (lambda: sftorch.step_in_backward(3), TypeError, "optimizer must be SGDScheduleFree, .*, got int: "),
    (lambda: unwrap(None), TypeError, "optimizer must be one of sftorch's .*, got builtins.NoneType: "),
    (lambda: recalibrate(3, []), TypeError, r"model must be a torch\.nn\.Module, got 3: "),
    (lambda: recalibrate(NORMED, 3), TypeError, "batches must be an iterable, got 3: "),
    (lambda: recalibrate(NORMED, []), ValueError, "batches must hold at least one batch, got none: "),
    (
        lambda: recalibrate(NORMED, [torch.ones(2, 3)], 3),
        TypeError,
        "call must be None or a function, got 3: ",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_arguments_of_another_kind_are_refused_before_anything_changes(call, error, message):
    before = repr(NORMED.state_dict())
    with pytest.raises(error, match=f"^(.*\n  )?{message}"):
        call()
    assert repr(NORMED.state_dict()) == before
