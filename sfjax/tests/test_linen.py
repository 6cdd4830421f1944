"""A CNN with BatchNorm and Dropout in Flax linen: x is what is shipped, and a resumed run is the run."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from flax.training import train_state
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

import sfjax.linen
from sfjax.checkpoint import CheckpointError, Checkpoints
from sfjax.kernels import call
from sfjax.recalibrate import recalibrate_linen
from sfjax.tests.flax_runs import batch, drawn, host, transformation
from sfjax.tests.runs import assert_close, assert_same

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.MultiSteps cannot do without


class Network(linen.Module):
    """(n, 8, 8, 1) -> (n, 10)."""

    dtype: Any

    @linen.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        options = {"dtype": self.dtype, "param_dtype": self.dtype}
        images = linen.Conv(8, (3, 3), 2, kernel_init=drawn, **options)(images)
        images = linen.relu(linen.BatchNorm(use_running_average=not train, **options)(images))
        images = images.reshape(len(images), -1)
        return linen.Dense(10, kernel_init=drawn, **options)(
            linen.Dropout(0.2, deterministic=not train)(images)
        )


class State(sfjax.linen.TrainState):
    """As users have it who draw dropout from a key in the state."""

    key: jax.Array


def fresh(dtype: Any = jnp.float32, tx: Any = None, seed: int = 0) -> State:
    model = Network(dtype)
    variables = model.init(jax.random.key(seed), batch(0, dtype)[0], train=False)
    return State.create(
        apply_fn=apply_of(dtype), tx=tx or transformation("MultiSteps"), key=jax.random.key(seed), **variables
    )


_APPLY = {dtype: Network(dtype).apply for dtype in (jnp.float32, jnp.bfloat16)}


def apply_of(dtype: Any) -> Any:
    return _APPLY[dtype]  # the same object again, so that a step compiles once for all tests


@jax.jit
def step(state: State, images: jax.Array, labels: jax.Array) -> State:
    key, dropout = jax.random.split(state.key)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout},
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

    grads, updates = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, key=key, **updates)


def go(state: State, first: int, last: int) -> State:
    for number in range(first, last):
        state = step(state, *batch(number, state.params["Dense_0"]["kernel"].dtype))
    return state


@pytest.mark.parametrize(
    ("dtype", "accumulation"),
    [pytest.param(jnp.float32, "accumulate", marks=pytest.mark.slow), (jnp.bfloat16, "MultiSteps")],
)
def test_a_run_that_is_cut_within_an_update_resumes_in_the_same_bits(dtype, accumulation, tmp_path):
    tx = transformation(accumulation)
    whole = go(fresh(dtype, tx), 0, 12)
    half = go(fresh(dtype, tx), 0, 7)
    other = fresh(dtype, tx, seed=1)
    with Checkpoints(tmp_path) as checkpoints:
        path = sfjax.linen.save(checkpoints, half, position=7)
    assert path.name == "3"  # finished updates; half.step counts micro-batches
    with Checkpoints(tmp_path) as checkpoints:
        state, restored = sfjax.linen.restore(checkpoints, other, strict=True)
    assert restored is not None
    assert restored.meta.accumulation["position"] == 1
    assert int(state.step) == 7
    assert np.any(half.batch_stats["BatchNorm_0"]["mean"] != 0)
    assert_same(host(state), host(half))
    assert_same(host(go(state, restored.meta.position, 12)), host(whole))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_shipped_is_x_bit_for_bit_with_the_statistics_of_x(dtype, tmp_path):
    state = go(fresh(dtype), 0, 8)
    apply = partial(state.apply_fn, train=True, rngs={"dropout": jax.random.key(0)})
    variables = recalibrate_linen(apply, state.eval_variables, [batch(n, dtype) for n in range(4)])
    with Checkpoints(tmp_path) as checkpoints:
        path = sfjax.linen.save(checkpoints, state, buffers=variables["batch_stats"])
    shipped = load_file(path / "inference" / "inference.safetensors")
    x, stats = state.eval_params, variables["batch_stats"]
    assert_same(shipped, dict(sorted((host(x) | host(stats)).items())))
    y = host(state.params) | host(state.batch_stats)
    same = {name for name in shipped if np.array_equal(shipped[name], y[name])}
    # A few numbers near 1, whose x and y bfloat16 cannot always tell apart.
    assert same <= ({"BatchNorm_0/scale"} if dtype == jnp.bfloat16 else set())
    weights = {name: leaf for name, leaf in shipped.items() if name in host(x)}
    assert_same(unflatten_dict(weights, sep="/"), jax.tree.map(np.asarray, x))


def test_x_is_that_of_the_equations_and_the_state_still_holds_y():
    state = go(fresh(), 0, 8)
    z = sfjax.find_state(state.opt_state).z["Dense_0"]["kernel"]
    y = state.params["Dense_0"]["kernel"]
    # float32: 1e-7 of the weights, over beta = 0.9.
    np.testing.assert_allclose(state.eval_params["Dense_0"]["kernel"], (y - 0.1 * z) / 0.9, atol=1e-6)
    assert state.eval_variables["batch_stats"] is state.batch_stats
    # Measured: 0. In a larger program XLA may fuse, and round, otherwise.
    assert_close(jax.jit(lambda state: state.eval_params)(state), state.eval_params, 1e-6)
    assert_same(host(state), host(go(fresh(), 0, 8)))


def test_there_is_one_warm_up_and_it_counts_updates():
    for micro_batches, lr in ((2, 0.005), (6, 0.015), (8, 0.02), (10, 0.02)):
        state = go(fresh(), 0, micro_batches)
        assert float(sfjax.metrics(state.opt_state)["lr"]) == pytest.approx(lr, rel=1e-6)


def simple(shape: int, kind: Any = sfjax.linen.TrainState) -> Any:
    tx = sfjax.schedule_free_sgd(0.1)
    return kind.create(apply_fn=None, params={"w": jnp.ones(shape)}, tx=tx)


def test_a_model_without_statistics_has_none_among_its_variables():
    assert set(simple(3).eval_variables) == {"params"}


@pytest.mark.parametrize("kind", [sfjax.linen.TrainState, train_state.TrainState])
def test_any_train_state_resumes_before_and_after_its_first_step(kind, tmp_path):
    state = simple(3, kind)
    with Checkpoints(tmp_path) as checkpoints:
        for _ in range(2):
            sfjax.linen.save(checkpoints, state)
            back, restored = sfjax.linen.restore(checkpoints, simple(3, kind), strict=True)
            assert restored is not None
            assert (int(back.step), restored.meta.step) == (int(state.step), int(state.step))
            np.testing.assert_array_equal(back.params["w"], state.params["w"])
            state = jax.jit(lambda state: state.apply_gradients(grads=state.params))(state)


def test_a_restored_state_is_not_compiled_anew(tmp_path):
    traces = []

    @jax.jit
    def step(state):
        traces.append(1)
        return state.apply_gradients(grads=state.params)

    start = simple(3)
    with Checkpoints(tmp_path) as checkpoints:
        sfjax.linen.save(checkpoints, step(step(start)))
        state, _ = sfjax.linen.restore(checkpoints, start)
        assert int(step(step(state)).step) == 4
    assert len(traces) == 1


def test_a_target_may_be_abstract(tmp_path):
    state = go(fresh(), 0, 3)
    with Checkpoints(tmp_path) as checkpoints:
        sfjax.linen.save(checkpoints, state)
        back, _ = sfjax.linen.restore(checkpoints, jax.eval_shape(lambda state: state, state), strict=True)
    assert_same(host(back), host(state))


def test_a_start_from_weights_alone_takes_them_and_leaves_the_rest(tmp_path):
    state, other = go(fresh(), 0, 4), fresh(seed=1)
    with Checkpoints(tmp_path) as checkpoints:
        path = sfjax.linen.save(checkpoints, state)
        start, restored = sfjax.linen.restore(
            checkpoints, other, resume=f"weights:{path}", hyperparameters={"lr": 0.02}
        )
    assert restored is not None
    assert_same(host(start.params), host(state.eval_params))
    assert_same(host(start.batch_stats), host(other.batch_stats))
    assert float(sfjax.find_state(start.opt_state).weight_sum) > 0


def test_an_empty_folder_gives_the_target_back(tmp_path):
    state = simple(3)
    back, restored = sfjax.linen.restore(Checkpoints(tmp_path), state)
    assert back is state
    assert restored is None


def test_what_does_not_fit_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        sfjax.linen.save(checkpoints, simple(3))
        with pytest.raises(CheckpointError, match="does not fit the program"):
            sfjax.linen.restore(checkpoints, simple(4))


def test_a_state_of_another_optimizer_has_no_x():
    state = sfjax.linen.TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match="opt_state must hold a ScheduleFreeState of sfjax, got"):
        _ = state.eval_params


def test_gradients_are_applied_by_the_step_of_the_transformation() -> None:
    tx = sfjax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(0.02, weight_decay=0.01))
    params = {"w": jnp.linspace(-1.0, 1.0, 6)}
    plain, ours = (
        kind.create(apply_fn=None, params=params, tx=tx)
        for kind in (train_state.TrainState, sfjax.linen.TrainState)
    )
    apply = jax.jit(lambda state: state.apply_gradients(grads=state.params))
    for _ in range(3):
        plain, ours = apply(plain), apply(ours)
    assert_close((ours.params, ours.opt_state), (plain.params, plain.opt_state), 1e-6)
    assert int(ours.step) == 3
    if call.find() is None:
        assert call.TARGET in apply.lower(ours).as_text()
    assert call.TARGET not in apply.lower(plain).as_text()
