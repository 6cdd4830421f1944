"""Bad input: one table against both packages, and what only one framework can get wrong.

Every refusal is of the framework's usual type, says `name must be RULE, got VALUE` and what to do, and
comes before anything has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import sfjax
import sftorch
from parity_tests.drivers import names
from parity_tests.invalid import BAD_OPTIONS, MISSPELT, BadOption
from sfcore import HyperparameterError, laws

DIRECTED = list(laws.directed())
TABLE = [
    pytest.param(optimizer, bad, id=f"{optimizer}-{bad.id}")
    for bad in BAD_OPTIONS
    for optimizer in bad.optimizers
]


def _torch(optimizer: str, options: dict[str, Any], form: str = "") -> Any:
    p = torch.nn.Parameter(torch.ones(2, 2))
    return getattr(sftorch, laws.LAWS[optimizer].torch + form)([p], **names.for_torch(optimizer, options))


def _jax(optimizer: str, options: dict[str, Any]) -> Any:
    return getattr(sfjax, laws.LAWS[optimizer].jax)(**names.for_jax(options))


def _assert_says(error: HyperparameterError, framework: str, optimizer: str, bad: BadOption) -> None:
    shown = names.shown(framework, optimizer, bad.name)
    value = bad.options[bad.name]
    assert error.problems[0].startswith(f"{shown} must be {bad.rule}, got {value!r}: ")
    assert bad.fix in str(error)


@pytest.mark.parametrize("form", ["", "Closure"])
@pytest.mark.parametrize(("optimizer", "bad"), TABLE)
def test_sftorch_refuses(optimizer: str, bad: BadOption, form: str):
    with pytest.raises(HyperparameterError) as caught:
        _torch(optimizer, bad.options, form)
    _assert_says(caught.value, "torch", optimizer, bad)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("optimizer", "bad"), TABLE)
def test_sfjax_refuses(optimizer: str, bad: BadOption):
    with pytest.raises(HyperparameterError) as caught:
        _jax(optimizer, bad.options)
    _assert_says(caught.value, "jax", optimizer, bad)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("optimizer", "bad"), TABLE)
def test_a_bad_torch_group_is_refused_and_leaves_the_optimizer_as_it_was(optimizer: str, bad: BadOption):
    made = _torch(optimizer, {})
    before = repr(made.state_dict())
    group = {"params": [torch.nn.Parameter(torch.ones(1))], **names.for_torch(optimizer, bad.options)}
    with pytest.raises(HyperparameterError) as caught:
        made.add_param_group(group)
    _assert_says(caught.value, "torch", optimizer, bad)
    assert repr(made.state_dict()) == before
    assert len(made.param_groups) == 1


SHARED = [
    bad for bad in BAD_OPTIONS if bad.name in ("beta", "r", "weight_lr_power", "prior_steps", *names.BETAS)
]


@pytest.mark.parametrize("bad", SHARED, ids=lambda bad: bad.id)
def test_the_wrappers_refuse_too(bad: BadOption):
    name = {"beta": "momentum"}.get(bad.name, bad.name)
    with pytest.raises(HyperparameterError, match=f"^{name} must be"):
        sftorch.ScheduleFreeWrapper(
            torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1),
            **names.for_torch("wrapper", bad.options),
        )
    with pytest.raises(HyperparameterError, match=f"^{names.shown('jax', 'sgd', bad.name)} must be"):
        sfjax.schedule_free(optax.sgd(0.1), 0.1, **names.for_jax(bad.options))


@pytest.mark.parametrize("optimizer", DIRECTED)
def test_all_problems_are_told_at_once(optimizer: str):
    options = {"lr": -1.0, "beta": 2.0, "weight_decay": -0.1}
    for make in (_torch, _jax):
        with pytest.raises(HyperparameterError) as caught:
            make(optimizer, options)
        assert len(caught.value.problems) == len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("name", MISSPELT)
@pytest.mark.parametrize("make", [_torch, _jax])
def test_an_unknown_keyword_is_a_type_error(make: Callable[..., Any], name: str):
    with pytest.raises(TypeError, match=name):
        make("adamw", {name: MISSPELT[name]})


TENSOR_INPUTS = {
    "nothing": ([], ValueError, "params must be non-empty"),
    "a bare tensor": (torch.ones(2, requires_grad=True), TypeError, "params must be an iterable"),
    "a non-leaf": ([torch.ones(2, requires_grad=True) * 2], ValueError, r"params\[0\] must be a leaf tensor"),
    "an array": ([np.ones(2)], TypeError, r"params\[0\] must be a Tensor"),
    "integers": (
        [torch.ones(2, dtype=torch.int64)],
        ValueError,
        r"params\[0\] must be floating point or complex",
    ),
}


@pytest.mark.parametrize("what", TENSOR_INPUTS)
@pytest.mark.parametrize(
    "name", [laws.LAWS[one].torch + form for one in DIRECTED for form in ("", "Closure")]
)
def test_sftorch_refuses_what_it_cannot_train(name: str, what: str):
    params, error, message = TENSOR_INPUTS[what]
    with pytest.raises(error, match=f"{message}.*, got .*: "):
        getattr(sftorch, name)(params)


TREE_INPUTS: dict[str, tuple[Callable[..., Any], str]] = {
    "missing params": (
        lambda tx, g, s, p: tx.update(g, s),
        r"params must be passed to update\(\), got None: ",
    ),
    "gradients of another tree": (
        lambda tx, g, s, p: tx.update({"b": g["a"]}, s, p),
        "updates must have the tree",
    ),
    "params of another tree": (lambda tx, g, s, p: tx.update(g, s, [p["a"]]), "must have the tree of params"),
    "gradients of another shape": (
        lambda tx, g, s, p: tx.update({"a": jnp.ones((3, 2))}, s, p),
        "updates must have the shapes",
    ),
    "state of other params": (
        lambda tx, g, s, p: tx.update(g, tx.init({"a": jnp.ones((3, 2))}), p),
        "state.z must have the shapes",
    ),
}


@pytest.mark.parametrize("what", TREE_INPUTS)
@pytest.mark.parametrize("optimizer", DIRECTED)
def test_sfjax_refuses_trees_that_do_not_fit(optimizer: str, what: str):
    tx = _jax(optimizer, {})
    params = {"a": jnp.ones((2, 2))}
    state = tx.init(params)
    before = jax.tree.map(np.array, state)
    call, message = TREE_INPUTS[what]
    with pytest.raises(ValueError, match=message):
        call(tx, params, state, params)
    jax.tree.map(np.testing.assert_array_equal, before, state)


LEAVES = {
    "integers": (jnp.arange(3), "int32"),
    "a key": (jax.random.key(0), "key<fry>"),
    "text": ("weights", "str"),
}


@pytest.mark.parametrize("what", LEAVES)
@pytest.mark.parametrize("optimizer", DIRECTED)
def test_sfjax_refuses_leaves_it_cannot_train(optimizer: str, what: str):
    leaf, kind = LEAVES[what]
    with pytest.raises(TypeError, match=rf"params must be .*, got {kind} at params\['a'\]: "):
        _jax(optimizer, {}).init({"a": leaf})


@pytest.mark.parametrize("form", ["", "Closure"])
@pytest.mark.parametrize("optimizer", DIRECTED)
def test_a_scheduler_that_writes_nonsense_is_refused_before_anything_moves(optimizer: str, form: str):
    made = _torch(optimizer, {}, form)
    (p,) = made.param_groups[0]["params"]
    for lr, moves in ((0.1, True), (-0.1, False), (float("nan"), False)):
        p.grad = torch.ones_like(p)
        made.param_groups[0]["lr"] = lr
        before = repr((p, made.state_dict()["state"]))
        if moves:
            made.step(lambda: 0.0)
        else:
            with pytest.raises(
                HyperparameterError, match=r"^lr must be a finite number >= 0, got (-0.1|nan): "
            ):
                made.step(lambda: 0.0)
        assert (repr((p, made.state_dict()["state"])) != before) is moves


@pytest.mark.parametrize("optimizer", DIRECTED)
def test_a_step_in_eval_mode_is_refused_before_anything_moves(optimizer: str):
    made = _torch(optimizer, {})
    (p,) = made.param_groups[0]["params"]
    p.grad = torch.ones_like(p)
    made.step()
    made.eval()
    before = repr((p, made.state_dict()))
    with pytest.raises(RuntimeError, match=r"must be in train mode.*call optimizer\.train\(\)"):
        made.step()
    assert repr((p, made.state_dict())) == before
