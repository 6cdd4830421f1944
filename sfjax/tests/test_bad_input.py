"""Bad input is refused before anything happens, with rule, value and way out; all problems at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfcore import HyperparameterError
from sfjax.tests import runs

SGD, ADAMW, RADAM = sfjax.schedule_free_sgd, sfjax.schedule_free_adamw, sfjax.schedule_free_radam


def wrapper(learning_rate=0.1, **options):
    return sfjax.schedule_free(optax.sgd(0.1), learning_rate, **options)


ALL = (SGD, ADAMW, RADAM, wrapper)
BAD = [
    *(
        (make, "learning_rate", value, "a finite number >= 0")
        for make in ALL
        for value in (-1.0, np.nan, np.inf)
    ),
    *((make, "b1", value, r"a number in \[0, 1\]") for make in ALL for value in (-0.1, 1.1, np.nan)),
    *((make, name, -1.0, "a finite number >= 0") for make in ALL for name in ("r", "weight_lr_power")),
    *(
        (make, "prior_steps", value, "a whole number of optimizer steps >= 0")
        for make in ALL
        for value in (-1, 0.5)
    ),
    *((make, "weight_decay", -0.1, "a finite number >= 0") for make in (SGD, ADAMW, RADAM)),
    *((make, "b2", value, r"a number in \[0, 1\)") for make in (ADAMW, RADAM) for value in (-0.1, 1.0)),
    *((make, "eps", value, "a finite number > 0") for make in (ADAMW, RADAM) for value in (0.0, -1e-8)),
    *(
        (make, "warmup_steps", v, "a whole number of optimizer steps >= 0")
        for make in (SGD, ADAMW)
        for v in (-1, 0.03)
    ),
    (ADAMW, "inner_momentum", 1.0, r"a number in \[0, 1\)"),
    (SGD, "b1", None, r"a number in \[0, 1\]"),
    (SGD, "b1", "0.9", r"a number in \[0, 1\]"),
    (SGD, "b1", True, r"a number in \[0, 1\]"),
    (SGD, "b1", lambda step: 0.9, r"a number in \[0, 1\]"),
    (SGD, "learning_rate", None, "a finite number >= 0"),
    (SGD, "learning_rate", jnp.float32(-1.0), "a finite number >= 0"),
    (SGD, "learning_rate", jnp.asarray([np.nan]), "a finite number >= 0"),
    (SGD, "learning_rate", 1j, "a finite number >= 0"),
    (RADAM, "silent_sgd_phase", 1, "True or False"),
]


@pytest.mark.parametrize(
    ("make", "name", "value", "rule"), BAD, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_value_out_of_range_is_refused_with_its_rule(make, name, value, rule):
    with pytest.raises(HyperparameterError, match=f"^{name} must be {rule}, got .*: .+") as error:
        make(**{name: value})
    assert isinstance(error.value, ValueError)
    assert len(error.value.problems) == 1
    if isinstance(value, int | float) and not isinstance(value, bool):
        assert f"got {value!r}:" in str(error.value)


def test_a_fraction_of_warmup_steps_is_told_to_become_steps():
    with pytest.raises(HyperparameterError, match=r"got 0.03: pass steps, not a fraction"):
        ADAMW(warmup_steps=0.03)


def test_all_problems_come_at_once():
    with pytest.raises(HyperparameterError) as error:
        ADAMW(-1.0, 0.03, 2.0, -1.0, 0.0, weight_decay=-0.1, r=-1.0, prior_steps=0.5, inner_momentum=2.0)
    names = {problem.split(" ")[0] for problem in error.value.problems}
    assert names == {
        "learning_rate",
        "warmup_steps",
        "b1",
        "b2",
        "eps",
        "weight_decay",
        "r",
        "prior_steps",
        "inner_momentum",
    }
    assert str(error.value) == "\n".join(error.value.problems)


@pytest.mark.parametrize("make", ALL)
def test_prior_steps_need_a_learning_rate(make):
    with pytest.raises(
        HyperparameterError, match=r"learning_rate must be > 0 when prior_steps > 0, got 0.0: "
    ):
        make(learning_rate=0.0, prior_steps=5)


@pytest.mark.parametrize("b2", [0.0, 0.6])
def test_silent_radam_that_would_never_move_is_refused(b2):
    with pytest.raises(
        HyperparameterError, match=f"b2 must be > 0.6 when silent_sgd_phase is True, got {b2}: "
    ):
        RADAM(b2=b2)
    RADAM(b2=b2, silent_sgd_phase=False)


@pytest.mark.parametrize("make", ALL)
def test_a_misspelt_keyword_is_refused(make):
    with pytest.raises(TypeError, match="weigth_lr_power"):
        make(weigth_lr_power=1.0)


@pytest.mark.parametrize("state_dtype", [jnp.int32, bool, jnp.complex64])
@pytest.mark.parametrize("make", ALL)
def test_a_state_dtype_that_cannot_hold_z_is_refused(make, state_dtype):
    with pytest.raises(
        TypeError, match=r"state_dtype must be a real floating-point dtype or None, got .*: None keeps"
    ):
        make(state_dtype=state_dtype)


def test_a_base_that_is_no_optimizer_is_refused():
    with pytest.raises(
        TypeError, match=r"base_optimizer must be an optax transformation, got 0.1: pass one like optax.sgd"
    ):
        sfjax.schedule_free(0.1, 0.1)


@pytest.mark.parametrize("make", ALL)
def test_missing_params_are_asked_for(make):
    params = {"w": jnp.ones(3)}
    tx = make()
    with pytest.raises(
        ValueError,
        match=r"params must be passed to update\(\), got None: call tx.update\(grads, state, params\)",
    ):
        tx.update(params, tx.init(params))


WRONG = {
    "gradients of another tree": (
        {"v": jnp.ones(3)},
        None,
        r"updates must have the tree of params, got .* for ",
    ),
    "gradients of another shape": (
        {"w": jnp.ones(1)},
        None,
        r"updates must have the shapes of params, got \(1,\) for \(3,\) at params\['w'\]",
    ),
    "params of another tree": (
        None,
        {"w": jnp.ones(3), "v": jnp.ones(3)},
        "updates must have the tree of params",
    ),
    "params and gradients of another shape": (
        {"w": jnp.ones(4)},
        {"w": jnp.ones(4)},
        r"state.z must have the shapes of params, got \(3,\)",
    ),
    "params and gradients of another tree": (
        {"v": jnp.ones(3)},
        {"v": jnp.ones(3)},
        "state.z must have the tree of params",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("make", [ADAMW, wrapper])
def test_what_does_not_belong_together_is_refused(make, case):
    grads, params, message = WRONG[case]
    own = {"w": jnp.ones(3)}
    tx = make()
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=message):
            update(grads or own, tx.init(own), params or own)


def test_a_state_of_another_kind_is_refused():
    params = {"w": jnp.ones(3)}
    tx = SGD(0.1)
    for state in (optax.contrib.schedule_free_sgd(0.1).init(params), tx.init(params)._asdict(), params):
        with pytest.raises(
            TypeError, match=r"state must be a ScheduleFreeState of sfjax, got \w+: pass what tx.init"
        ):
            tx.update(params, state, params)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", runs.FACTORIES)
def test_a_gradient_that_is_not_finite_spoils_its_number_and_no_other(name, value):
    params = runs.leaf()
    grads = runs.gradients(8, like=params)
    grads[6]["w"][2] = value
    y, state = runs.run(
        runs.FACTORIES[name](0.1, **runs.OPTIONS[name]), runs.typed(params, jnp.float32), grads
    )
    x = sfjax.schedule_free_eval_params(state, y)
    for leaf in (x["w"], y["w"], state.z["w"]):
        assert not np.isfinite(leaf[2])
        assert np.isfinite(np.delete(np.asarray(leaf), 2)).all()
    assert np.isfinite(float(state.c))
