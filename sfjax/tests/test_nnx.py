"""A CNN with BatchNorm and Dropout in Flax NNX: x is what is shipped, and a resumed run is the run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

import sfjax
from sfjax.checkpoint import CheckpointError, Checkpoints
from sfjax.recalibrate import recalibrate
from sfjax.state.find import _pure
from sfjax.tests.flax_runs import batch, drawn, host, transformation
from sfjax.tests.runs import assert_close, assert_same

pytest.importorskip("sfjax.nnx", exc_type=ImportError)  # older flax, as it says itself
pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.MultiSteps cannot do without


# Flax 0.11 has no restore_int_paths, and its optimizer takes no masked state.
needs_flax_12 = pytest.mark.skipif(not hasattr(nnx, "restore_int_paths"), reason="flax < 0.12")


class Network(nnx.Module):
    """(n, 8, 8, 1) -> (n, 10)."""

    def __init__(self, dtype: Any, seed: int) -> None:
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": nnx.Rngs(seed)}
        conv = nnx.Conv(1, 8, (3, 3), strides=2, kernel_init=drawn, **options)
        self.layers = getattr(nnx, "List", list)([conv, nnx.BatchNorm(8, **options)])
        self.dropout = nnx.Dropout(0.2, rngs=nnx.Rngs(dropout=seed))
        self.out = nnx.Linear(128, 10, kernel_init=drawn, **options)

    def __call__(self, images: jax.Array) -> jax.Array:
        for layer in self.layers:
            images = layer(images)
        return self.out(self.dropout(nnx.relu(images).reshape(len(images), -1)))


def fresh(dtype: Any = jnp.float32, tx: Any = None, seed: int = 0) -> tuple[Network, nnx.Optimizer]:
    model = Network(dtype, seed)
    return model, nnx.Optimizer(model, tx or transformation("MultiSteps"), wrt=nnx.Param)


def _step(model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> None:
    def loss(model: Network) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


step = nnx.jit(_step)


def go(run: tuple[Network, nnx.Optimizer], first: int, last: int) -> tuple[Network, nnx.Optimizer]:
    for number in range(first, last):
        step(*run, *batch(number, run[0].out.kernel.dtype))
    return run


def everything(run: tuple[Network, nnx.Optimizer]) -> Any:
    return host(_pure([nnx.state(one) for one in run]))


@nnx.jit
def logits(model: Network, some: Any) -> jax.Array:
    return model(some[0])


@pytest.mark.parametrize(
    ("dtype", "accumulation"),
    [pytest.param(jnp.float32, "MultiSteps", marks=pytest.mark.slow), (jnp.bfloat16, "accumulate")],
)
def test_a_run_that_is_cut_within_an_update_resumes_in_the_same_bits(dtype, accumulation, tmp_path):
    tx = transformation(accumulation)
    whole = go(fresh(dtype, tx), 0, 12)
    half = go(fresh(dtype, tx), 0, 7)
    with Checkpoints(tmp_path) as checkpoints:
        path = sfjax.nnx.save(checkpoints, *half, position=7)
    assert path.name == "3"  # finished updates, not micro-batches
    other = fresh(dtype, tx, seed=1)
    with Checkpoints(tmp_path) as checkpoints:
        restored = sfjax.nnx.restore(checkpoints, *other, strict=True)
    assert restored is not None
    assert restored.meta.accumulation["position"] == 1
    want = everything(half)
    assert not np.array_equal(want["0/layers/1/mean"], np.zeros(8))
    assert want["0/dropout/rngs/count"] == 7
    assert_same(everything(other), want)
    assert_same(everything(go(other, restored.meta.position, 12)), everything(whole))


@needs_flax_12
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_shipped_is_x_bit_for_bit_with_the_statistics_of_x(dtype, tmp_path):
    run = go(fresh(dtype), 0, 8)
    copy = sfjax.nnx.eval_model(*run)
    recalibrate(copy, [batch(number, dtype) for number in range(4)], logits)
    with Checkpoints(tmp_path) as checkpoints:
        path = sfjax.nnx.save(checkpoints, *run, buffers=nnx.state(copy, nnx.BatchStat))
    shipped = load_file(path / "inference" / "inference.safetensors")
    kept = nnx.Any(nnx.Param, nnx.BatchStat)
    assert_same(shipped, host(_pure(nnx.state(copy, kept))))
    y = host(_pure(nnx.state(run[0], kept)))
    assert [name for name in shipped if np.array_equal(shipped[name], y[name])] == []
    served, _ = fresh(dtype, seed=1)
    nnx.update(served, nnx.restore_int_paths(unflatten_dict(shipped, sep="/")))
    served.eval()
    np.testing.assert_array_equal(logits(served, batch(0, dtype)), logits(copy, batch(0, dtype)))


def test_without_buffers_the_statistics_of_the_model_are_shipped(tmp_path):
    model, optimizer = go(fresh(), 0, 2)
    with Checkpoints(tmp_path) as checkpoints:
        path = sfjax.nnx.save(checkpoints, model, optimizer)
    shipped = load_file(path / "inference" / "inference.safetensors")
    np.testing.assert_array_equal(shipped["layers/1/var"], model.layers[1].var[...])


def test_the_copy_holds_x_of_the_equations_and_the_model_is_as_it_was():
    model, optimizer = go(fresh(), 0, 8)
    before = everything((model, optimizer))
    copy = sfjax.nnx.eval_model(model, optimizer)
    state = sfjax.find_state(optimizer.opt_state)
    for name in ("kernel", "bias"):
        y, z = (np.asarray(part.out[name]) for part in (_pure(nnx.state(model, nnx.Param)), state.z))
        # float32: 1e-7 of the weights, over beta = 0.9.
        np.testing.assert_allclose(copy.out.__dict__[name][...], (y - 0.1 * z) / 0.9, atol=1e-6)
    assert (copy.dropout.deterministic, copy.layers[1].use_running_average) == (True, True)
    assert (model.dropout.deterministic, model.layers[1].use_running_average) == (False, False)
    assert_same(everything((model, optimizer)), before)


def test_there_is_one_warm_up_and_it_counts_updates():
    for micro_batches, lr in ((2, 0.005), (6, 0.015), (8, 0.02), (10, 0.02)):
        _, optimizer = go(fresh(), 0, micro_batches)
        assert float(sfjax.metrics(optimizer.opt_state)["lr"]) == pytest.approx(lr, rel=1e-6)


@needs_flax_12
def test_the_copy_outlives_a_step_to_which_the_model_is_donated():
    run = fresh(tx=optax.partition({"a": sfjax.schedule_free_sgd(0.1), "b": optax.set_to_zero()}, _labels))
    donating = nnx.jit(_step, donate_argnums=(0, 1))
    for number in range(2):
        donating(*run, *batch(number, jnp.float32))
    copy = sfjax.nnx.eval_model(*run)
    before, frozen = host(_pure(nnx.state(copy))), np.array(run[0].out.kernel[...])
    for number in range(2):
        donating(*run, *batch(number, jnp.float32))
    assert_same(host(_pure(nnx.state(copy))), before)
    np.testing.assert_array_equal(copy.out.kernel[...], frozen)


def _labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "b" if "out" in str(path[0]) else "a", params)


def test_a_restored_model_is_not_compiled_anew_and_can_be_donated(tmp_path):
    traces, tx = [], sfjax.schedule_free_sgd(0.1)

    @nnx.jit(donate_argnums=(0, 1))
    def train(model: nnx.Linear, optimizer: nnx.Optimizer) -> None:
        traces.append(1)
        optimizer.update(model, nnx.grad(lambda model: (model(jnp.ones((1, 3))) ** 2).sum())(model))

    def build() -> tuple[nnx.Linear, nnx.Optimizer]:
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    run, other = build(), build()
    with Checkpoints(tmp_path) as checkpoints:
        train(*run)
        sfjax.nnx.save(checkpoints, *run)
        sfjax.nnx.restore(checkpoints, *other)
    kernel = other[0].kernel[...]
    train(*other)
    assert len(traces) == 1
    assert kernel.is_deleted()


def test_the_copy_is_made_in_a_compiled_function_too():
    run = go(fresh(), 0, 4)
    compiled, copy = nnx.jit(sfjax.nnx.eval_model)(*run), sfjax.nnx.eval_model(*run)
    assert compiled.dropout.deterministic
    # Measured: 0. In a larger program XLA may fuse, and round, otherwise.
    assert_close(*(host(_pure(nnx.state(one))) for one in (compiled, copy)), 1e-6)


def test_only_what_the_optimizer_moves_is_x_and_the_rest_resumes_too(tmp_path):
    class Kernel(nnx.Param):
        pass

    def build(seed: int) -> tuple[Any, nnx.Optimizer]:
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
        model.kernel = Kernel(model.kernel[...])
        return model, nnx.Optimizer(model, sfjax.schedule_free_sgd(0.1), wrt=Kernel)

    model, optimizer = build(0)
    model.bias[...] += 3.0
    loss = nnx.grad(lambda model: (model(jnp.ones((1, 3))) ** 2).sum(), argnums=nnx.DiffState(0, Kernel))
    for _ in range(2):
        optimizer.update(model, loss(model))
    copy = sfjax.nnx.eval_model(model, optimizer)
    np.testing.assert_array_equal(copy.bias[...], model.bias[...])
    assert not np.array_equal(copy.kernel[...], model.kernel[...])
    other = build(1)
    with Checkpoints(tmp_path) as checkpoints:
        sfjax.nnx.save(checkpoints, model, optimizer)
        sfjax.nnx.restore(checkpoints, *other, strict=True)
    assert_same(everything(other), everything((model, optimizer)))


def test_random_streams_and_generators_outside_of_the_model_come_back(tmp_path):
    run, rngs, order = fresh(), nnx.Rngs(noise=5), np.random.default_rng(0)
    rngs.noise()
    extra = {"rngs": nnx.state(rngs), "order": order}
    other = {"rngs": nnx.state(nnx.Rngs(noise=6)), "order": np.random.default_rng(1)}
    with Checkpoints(tmp_path) as checkpoints:
        sfjax.nnx.save(checkpoints, *run, extra_state=extra)
        expected = order.integers(1000)
        restored = sfjax.nnx.restore(checkpoints, *run, extra_state=other)
    assert restored is not None
    assert_same(host(_pure(restored.extra_state["rngs"])), host(_pure(nnx.state(rngs))))
    assert other["order"].integers(1000) == expected


def test_a_start_from_weights_alone_takes_them_and_leaves_the_statistics(tmp_path):
    run = go(fresh(), 0, 4)
    with Checkpoints(tmp_path) as checkpoints:
        path = sfjax.nnx.save(checkpoints, *run)
        other = fresh(seed=1)
        start = sfjax.nnx.restore(checkpoints, *other, resume=f"weights:{path}", hyperparameters={"lr": 0.02})
    assert start is not None
    copy = sfjax.nnx.eval_model(*run)
    np.testing.assert_array_equal(other[0].out.kernel[...], copy.out.kernel[...])
    np.testing.assert_array_equal(other[0].layers[1].mean[...], np.zeros(8))
    assert float(sfjax.find_state(other[1].opt_state).weight_sum) > 0


def test_an_empty_folder_restores_nothing(tmp_path):
    run = fresh()
    before = everything(run)
    assert sfjax.nnx.restore(Checkpoints(tmp_path), *run) is None
    assert_same(everything(run), before)


def test_what_does_not_fit_is_refused_and_nothing_is_changed(tmp_path):
    smaller, model = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    runs = [
        (one, nnx.Optimizer(one, sfjax.schedule_free_sgd(0.1), wrt=nnx.Param)) for one in (smaller, model)
    ]
    before = everything(runs[1])
    with Checkpoints(tmp_path) as checkpoints:
        sfjax.nnx.save(checkpoints, *runs[0])
        with pytest.raises(CheckpointError, match=r"does not fit the program(.|\n)*mean"):
            sfjax.nnx.restore(checkpoints, *runs[1])
    assert_same(everything(runs[1]), before)


def test_an_optimizer_that_is_not_schedule_free_is_refused(tmp_path):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    for refused in (
        lambda: sfjax.nnx.eval_model(model, optimizer),
        lambda: sfjax.nnx.save(Checkpoints(tmp_path), model, optimizer),
    ):
        with pytest.raises(ValueError, match="opt_state must hold a ScheduleFreeState of sfjax, got"):
            refused()


def test_muon_finds_the_matrices_of_a_model_and_resumes_in_the_same_bits(tmp_path):
    def make(seed: int) -> tuple[nnx.Module, nnx.Optimizer]:
        model = nnx.Sequential(
            nnx.Embed(7, 4, rngs=nnx.Rngs(seed)),
            nnx.Conv(4, 6, (3,), rngs=nnx.Rngs(seed)),
            nnx.Linear(6, 3, rngs=nnx.Rngs(seed)),
        )
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(lambda model: (model(jnp.arange(5)) ** 2).mean())(model))

    tx = sfjax.schedule_free_muon(0.01)
    with pytest.raises(ValueError, match="output_axis must be 'last' for a convolution of Flax"):
        make(0)
    tx = sfjax.schedule_free_muon(0.01, normalize="rows", output_axis="last")
    run, other = make(0), make(1)
    step(*run)
    rows = sfjax.find_state(run[1].opt_state).base_optimizer_state.row_nu
    assert [leaf.shape for leaf in jax.tree.leaves(rows)] == [(1, 1, 6), (1, 3)]
    with Checkpoints(tmp_path) as checkpoints:
        sfjax.nnx.save(checkpoints, *run)
        checkpoints.wait()
        sfjax.nnx.restore(checkpoints, *other, strict=True)
    for one in (run, other):
        step(*one)
    assert_same(everything(run), everything(other))


def test_a_step_goes_where_the_update_of_flax_goes() -> None:
    tx = sfjax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(0.02, weight_decay=0.01))
    ours, theirs = (
        (model, nnx.Optimizer(model, tx, wrt=nnx.Param))
        for model in (nnx.Linear(3, 2, rngs=nnx.Rngs(0)) for _ in "ab")
    )

    def loss(model: nnx.Linear) -> jax.Array:
        return (model(jnp.ones((4, 3))) ** 2).mean()

    for _ in range(3):
        nnx.jit(lambda model, optimizer: sfjax.nnx.step(model, optimizer, nnx.grad(loss)(model)))(*ours)
        nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.grad(loss)(model)))(*theirs)
    got, want = everything(ours), everything(theirs)
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-6, err_msg=name)
    assert int(ours[1].step[...]) == 3
