"""x through Flax: nnx.Optimizer, whose state holds variables, and linen's TrainState."""

from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import sfjax
from sfjax.state.find import _pure as pure
from sfjax.tests import runs

INPUTS = jnp.arange(6.0).reshape(2, 3) / 6
# Measured: at most 2e-7.
TOLERANCE = 1e-6


class Model(nnx.Module):
    """A linear layer, with a statistic that is no parameter."""

    def __init__(self) -> None:
        self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.seen = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x: Any) -> Any:
        return self.layer(x)


def loss(model: Model) -> Any:
    return jnp.mean((model(INPUTS) - 1.0) ** 2)


def plain_nnx_run(tx: Any, steps: int) -> tuple[Any, Any]:
    """Returns (params, state) of a pure run of the model, without nnx.Optimizer."""
    graph, params, rest = nnx.split(Model(), nnx.Param, ...)
    params = pure(params)
    grad = jax.jit(jax.grad(lambda p: loss(nnx.merge(graph, p, rest))))
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grad(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def train_nnx(tx: Any, steps: int) -> tuple[Model, nnx.Optimizer, int]:
    """Returns the model, its optimizer and the number of compilations after some steps."""
    model, traces = Model(), []
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer) -> None:
        traces.append(1)
        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer, len(traces)


WRAPPERS: dict[str, Callable[[], Any]] = {
    "bare": lambda: sfjax.schedule_free_adamw(0.1),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(0.1)),
    "flatten": lambda: optax.flatten(sfjax.schedule_free_sgd(0.1)),
    "masked": lambda: optax.masked(
        sfjax.schedule_free_sgd(0.1), lambda p: jax.tree.map(lambda v: v.ndim > 1, p)
    ),
}


# sfjax.nnx needs the optimizer of 0.11; 0.11's own cannot take the state of optax.masked.
FLAX = tuple(map(int, flax.__version__.split(".")[:2]))
needs_nnx = pytest.mark.skipif(FLAX < (0, 11), reason="flax < 0.11")


@needs_nnx
@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "masked" or FLAX >= (0, 12)])
def test_nnx_optimizer_gives_the_x_of_a_pure_run(wrapper):
    tx = WRAPPERS[wrapper]()
    model, optimizer, traces = train_nnx(tx, 4)
    params = nnx.state(model, nnx.Param)
    want_y, state = plain_nnx_run(tx, 4)
    want = sfjax.schedule_free_eval_params(state, want_y)
    x = sfjax.schedule_free_eval_params(optimizer.opt_state, params)
    runs.assert_close(pure(params), want_y, TOLERANCE)
    runs.assert_close(pure(x), want, TOLERANCE)
    assert jax.tree.structure(x) == jax.tree.structure(params)  # variables, to nnx.update a model with
    assert traces == 1
    assert int(sfjax.metrics(optimizer.opt_state)["step"]) == 4


@needs_nnx
def test_a_cloned_nnx_model_is_evaluated_at_x_while_the_first_keeps_y():
    model, optimizer, _ = train_nnx(WRAPPERS["bare"](), 4)
    before = pure(nnx.state(model, nnx.Param))
    x = sfjax.schedule_free_eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    shipped = nnx.clone(model)
    nnx.update(shipped, x)
    layer = pure(x)["layer"]
    want = INPUTS @ layer["kernel"] + layer["bias"]
    runs.assert_close(shipped(INPUTS), want, TOLERANCE)
    runs.assert_same(pure(nnx.state(model, nnx.Param)), before)
    assert not jnp.array_equal(shipped(INPUTS), model(INPUTS))


@needs_nnx
def test_an_nnx_model_in_place_of_its_parameters_is_refused():
    model, optimizer, _ = train_nnx(WRAPPERS["bare"](), 1)
    with pytest.raises(ValueError, match=r"params must have the tree .* nnx.state\(model, nnx.Param\)"):
        sfjax.schedule_free_eval_params(optimizer.opt_state, model)


def test_linen_train_state_gives_the_x_of_a_pure_run():
    model = nn.Dense(2)
    params = model.init(jax.random.key(0), INPUTS)["params"]
    tx = optax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(0.1))

    def linen_loss(p: Any) -> Any:
        return jnp.mean((model.apply({"params": p}, INPUTS) - 1.0) ** 2)

    grad = jax.jit(jax.grad(linen_loss))
    train = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    y, state = params, tx.init(params)
    for _ in range(4):
        train = train.apply_gradients(grads=grad(train.params))
        updates, state = tx.update(grad(y), state, y)
        y = optax.apply_updates(y, updates)
    x = sfjax.schedule_free_eval_params(train.opt_state, train.params)
    runs.assert_close(x, sfjax.schedule_free_eval_params(state, y), TOLERANCE)
    assert jax.tree.structure(x) == jax.tree.structure(params)
    # Not the y that the TrainState holds.
    assert not jnp.array_equal(x["kernel"], train.params["kernel"])
