"""jit with donation, vmap over runs, and gradients through a run give what plain runs give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfjax.tests import runs

STEPS = 5


def make_params():
    return {"w": runs.typed(runs.leaf()["w"], jnp.float32), "number": jnp.float32(0.5)}


def recorded():
    return runs.typed(runs.gradients(STEPS, like=make_params()), jnp.float32)


def donating(tx):
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


# id -> (transformation, its plain twin)
DONATED = {
    "adamw": (lambda: sfjax.schedule_free_adamw(0.1, inner_momentum=0.5), "adamw", {"inner_momentum": 0.5}),
    "radam": (lambda: sfjax.schedule_free_radam(0.1, b1=0.0, b2=0.9), "radam", {"b1": 0.0}),
    "injected": (lambda: optax.inject_hyperparams(sfjax.schedule_free_adamw)(0.1), "adamw", {}),
    "wrapped": (lambda: sfjax.schedule_free(optax.sgd(0.1), 0.1), "sgd", {}),
    "arrays": (
        lambda: sfjax.schedule_free_sgd(jnp.float32(0.1), prior_steps=jnp.int32(2)),
        "sgd",
        {"prior_steps": 2},
    ),
}


@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize("case", DONATED)
def test_params_and_state_may_both_be_donated(case, how):
    make, name, options = DONATED[case]
    tx, y = make(), make_params()
    points = runs.plain_points(name, jax.tree.map(np.asarray, y), recorded(), **options)
    state = (jax.jit(tx.init) if how == "jit" else tx.init)(y)
    step = donating(tx)
    for g in recorded():
        old = y
        y, state = step(y, state, g)
        assert old["w"].is_deleted()
    # Measured: at most 2e-7.
    runs.assert_iterates(state, y, points, 1e-6)


def test_donation_leaves_the_users_own_arrays_alone():
    lr, b1 = jnp.float32(0.1), jnp.float32(0.9)
    tx = sfjax.schedule_free_sgd(lr, b1=b1)
    donating(tx)(make_params(), tx.init(make_params()), recorded()[0])
    scheduled = sfjax.schedule_free(optax.sgd(0.1), lambda step: lr)
    _, state = scheduled.update(make_params(), scheduled.init(make_params()), make_params())  # not jitted
    donating(scheduled)(make_params(), state, recorded()[0])
    assert (float(lr), float(b1)) == (np.float32(0.1), np.float32(0.9))


@pytest.mark.parametrize("name", runs.FACTORIES)
def test_runs_may_be_vmapped_over_hyperparameters_and_starts(name):
    lrs, betas = jnp.asarray([0.1, 0.02, 0.0]), jnp.asarray([0.9, 0.0, 1.0])
    starts = [runs.typed(runs.leaf(seed), jnp.float32) for seed in range(3)]
    grads = runs.gradients(STEPS, like=runs.leaf())

    def x_of(lr, b1, params):
        tx = runs.FACTORIES[name](lr, b1=b1, **runs.OPTIONS[name])
        y, state = params, tx.init(params)
        for g in grads:
            updates, state = tx.update(runs.typed(g, jnp.float32), state, y)
            y = optax.apply_updates(y, updates)
        return sfjax.schedule_free_eval_params(state, y)

    together = jax.jit(jax.vmap(x_of))(lrs, betas, jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts))
    for i in range(3):
        options = {"lr": float(lrs[i]), "b1": float(betas[i])}
        points = runs.plain_points(name, runs.leaf(i), grads, **options)
        # Measured: at most 2e-7.
        runs.assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), runs.of(points, "x"), 1e-6)


def final_loss(name, lr, scale=lambda step: 1.0, **options):
    """Returns the loss at x after a short closed-loop run: what a meta-gradient differentiates."""
    target = jnp.asarray([1.0, -2.0, 0.0, 0.5])  # the third gradient is 0 in every step
    tx = runs.FACTORIES[name](lambda step: lr * scale(step), **options)

    def step(carry, _):
        y, state = carry
        updates, state = tx.update(y - target, state, y)
        return (optax.apply_updates(y, updates), state), None

    y = jnp.zeros(4)
    (y, state), _ = jax.lax.scan(step, (y, tx.init(y)), length=4)
    return jnp.sum((sfjax.schedule_free_eval_params(state, y) - target) ** 2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {"weight_decay": 0.1, "warmup_steps": 3}),
        pytest.param("sgd", {"b1": 0.0, "r": 1.0, "weight_lr_power": 0.5}, marks=pytest.mark.slow),
        pytest.param("adamw", {"weight_lr_power": 1.0, "prior_steps": 2}, marks=pytest.mark.slow),
        ("adamw", {"b1": 1.0, "inner_momentum": 0.5}),
        ("radam", {"b2": 0.9, "silent_sgd_phase": False}),
    ],
)
def test_the_meta_gradient_is_that_of_finite_differences(name, options):
    def scale(step):
        return jnp.where(step == 0, 0.0, 1.0)  # a first step with c = 0 and nothing moved

    loss, h = jax.jit(lambda lr: final_loss(name, lr, scale, **options)), 1e-5
    slope = float(jax.grad(loss)(0.1))
    numeric = (float(loss(0.1 + h)) - float(loss(0.1 - h))) / (2 * h)
    assert abs(slope) > 1e-3
    # Central differences are off by h^2 times the third derivative; measured: at most 2e-8.
    np.testing.assert_allclose(slope, numeric, rtol=1e-6)


@pytest.mark.parametrize("name", runs.FACTORIES)
def test_the_meta_gradient_is_finite_where_nothing_moves(name):
    # At lr = 0 the averaging weight is 0 / 0, taken as 0; and 0^0.5 is steep.
    loss = jax.jit(jax.value_and_grad(lambda lr, power: final_loss(name, lr, weight_lr_power=power)))
    for power in (2.0, 0.5, 0.0):
        value, slope = loss(0.0, power)
        assert np.isfinite(float(slope))
        assert float(value) == 1.0 + 4.0 + 0.25


def test_gradients_flow_to_the_initial_parameters():
    def end(start):
        tx = sfjax.schedule_free_sgd(0.5)
        y, state = start, tx.init(start)
        for _ in range(3):
            updates, state = tx.update(y, state, y)  # the loss y^2 / 2
            y = optax.apply_updates(y, updates)
        return y.sum()

    # The run is linear in its start, so that y = slope * start.
    slope = jax.grad(end)(jnp.ones(3))
    np.testing.assert_allclose(slope, end(jnp.ones(3)) / 3, rtol=1e-6)
