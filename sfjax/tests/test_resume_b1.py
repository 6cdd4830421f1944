"""The b1 that built y decodes it; a new one moves y and leaves x where it is."""

import jax
import jax.numpy as jnp
import pytest

import sfjax
from sfjax.tests import runs

STEPS = 4
CHANGES = pytest.mark.parametrize(
    "betas",
    [(0.9, 0.5), (0.9, 0.0, 0.9), (0.0, 0.9, 0.0), (1.0, 0.0, 1.0)],
    ids=lambda betas: "-".join(map(str, betas)),
)


@CHANGES
def test_a_run_resumed_with_another_b1_follows_the_equations(betas):
    params = runs.leaf()
    grads = runs.gradients(STEPS * len(betas), like=params)
    y, state = runs.typed(params, jnp.float32), None
    for i, b1 in enumerate(betas):
        seen = grads[: STEPS * (i + 1)]
        y, state = runs.run(sfjax.schedule_free_adamw(0.1, b1=b1), y, seen[-STEPS:], state)
        points = runs.plain_points("adamw", params, seen, b1=lambda step: betas[step // STEPS])
        # Measured: at most 2e-7.
        runs.assert_iterates(state, y, points, 1e-6)


@CHANGES
def test_a_new_b1_moves_y_and_neither_x_nor_z(betas):
    y, state = runs.run(
        sfjax.schedule_free_sgd(0.1, b1=betas[0]),
        runs.typed(runs.leaf(), jnp.float32),
        runs.gradients(5, like=runs.leaf()),
    )
    x, _, z = sfjax.iterates(state, y)
    for b1 in betas[1:]:
        # A step of no length, whose weight 0.1^100 is 0 in float32: c is 0.
        tx = sfjax.schedule_free_sgd(0.0, b1=b1, weight_lr_power=100.0)
        y, state = runs.run(tx, y, [jax.tree.map(jnp.zeros_like, y)], state)
        same_x, _, same_z = sfjax.iterates(state, y)
        # Measured: at most 2e-7.
        runs.assert_close(same_x, x, 1e-6)
        runs.assert_close(same_z, z, 1e-6)
        runs.assert_close(y, jax.tree.map(lambda a, b, beta=b1: beta * a + (1 - beta) * b, x, z), 1e-6)
        assert float(state.b1) == pytest.approx(b1, rel=1e-7)


def test_a_state_is_read_with_its_own_b1_and_not_the_configured_one():
    params = runs.typed(runs.leaf(), jnp.float32)
    y, state = runs.run(sfjax.schedule_free_sgd(0.1, b1=0.6), params, runs.gradients(5, like=runs.leaf()))
    want = runs.plain_points("sgd", runs.leaf(), runs.gradients(5, like=runs.leaf()), b1=0.6)
    runs.assert_close(sfjax.schedule_free_eval_params(state, y), runs.of(want, "x"), 1e-6)
    assert float(state.b1) == pytest.approx(0.6, rel=1e-7)
