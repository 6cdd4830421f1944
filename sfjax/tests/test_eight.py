"""The 8-bit form: 5 bytes a parameter, right on average, the same bits from the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfcore import HyperparameterError, codes
from sfjax.checkpoint import Checkpoints, export_exchange, import_exchange, read
from sfjax.state import eight, forms
from sfjax.step import lean
from sfjax.tests import runs
from sfjax.tests.test_sixteen_bits import scanned

# Of 16 bits, of 32, and what is no matrix.
SLOW = pytest.mark.slow
PARAMS = {
    "w": jax.random.normal(jax.random.key(0), (20, 32)).astype(jnp.bfloat16),
    "wide": jax.random.normal(jax.random.key(1), (6, 4, 8)),
    "b": jnp.zeros(7, jnp.bfloat16),
}


def grads(steps: int, seed: int = 2) -> Any:
    keys = dict(zip(PARAMS, jax.random.split(jax.random.key(seed), len(PARAMS)), strict=True))
    return {
        name: (jax.random.normal(keys[name], (steps, *p.shape)) + 0.5).astype(p.dtype)
        for name, p in PARAMS.items()
    }


def drawn(shape: tuple[int, ...], number: int) -> jax.Array:
    return lean.drawn(shape, lean.Draw(0, number, jnp.int32(1)), number)


@SLOW
@pytest.mark.optimized
@pytest.mark.parametrize("bits", [8, codes.GAP_BITS, 16])
def test_linear_is_right_on_average_and_exact_where_it_can_be(bits: int) -> None:
    value = jnp.tile(jnp.linspace(-3, 3, 64), (4000, 1))
    exponent = eight.exponents(value)
    found = eight.decoded(
        eight.linear(value, exponent, bits, drawn(value.shape, 1)).astype(jnp.int16), exponent
    )
    quantum = 4 * 2.0 ** (1 - bits)
    assert float(jnp.abs(found - value).max()) < quantum
    # The mean of 4000 deviates by quantum / 2 / 63 at most.
    off = np.asarray(found, np.float64).mean(0) - np.asarray(value[0], np.float64)
    assert (np.abs(off) < 6 * quantum / 2 / 4000**0.5).all()
    again = eight.linear(found, exponent, bits, drawn(value.shape, 2)).astype(jnp.int16)
    np.testing.assert_array_equal(eight.decoded(again, exponent), found)


@pytest.mark.optimized
def test_log_is_right_on_average_exact_where_it_can_be_and_never_0_above_0() -> None:
    value = jnp.tile(jnp.logspace(-4.5, 0, 64), (4000, 1)).at[:, 0].set(0.0)
    exponent = eight.exponents(value)
    found = eight.decoded(eight.log(value, exponent, drawn(value.shape, 1)), exponent)
    assert bool((jnp.abs(found - value) < value / 16 + 1e-30).all())
    off = np.asarray(found, np.float64).mean(0) - np.asarray(value[0], np.float64)
    assert (np.abs(off) <= 6 * np.asarray(value[0]) / 16 / 2 / 4000**0.5).all()
    again = eight.log(found, exponent, drawn(value.shape, 2))
    np.testing.assert_array_equal(eight.decoded(again, exponent), found)
    tiny = jnp.asarray([[1.0, 1e-30, 0.0]])
    assert eight.log(tiny, eight.exponents(tiny))[0, 1:].tolist() == [1, 0]


@pytest.mark.parametrize("strange", [jnp.nan, jnp.inf, -jnp.inf, 3.4e38])
def test_a_row_with_a_number_that_is_not_finite_is_nan_and_no_other_is(strange: float) -> None:
    value = jnp.asarray([[1.0, strange], [1.0, 0.5]])
    exponent = eight.exponents(value)
    found = eight.decoded(eight.linear(value, exponent, 16).astype(jnp.int16), exponent)
    assert bool(jnp.isnan(found[0]).all())
    assert found[1].tolist() == [1.0, 0.5]


@SLOW
@pytest.mark.optimized
def test_numpy_reads_the_same_numbers() -> None:
    value = jax.random.normal(jax.random.key(0), (50, 40)) * jnp.logspace(-9, 9, 50)[:, None]
    exponent = eight.exponents(value)
    for code in (
        eight.linear(value, exponent, 16).astype(jnp.int16),
        eight.encoded(jnp.int8, value, exponent),
        eight.encoded(jnp.uint8, jnp.abs(value), exponent),
    ):
        found = codes.decoded(np.asarray(code), np.asarray(exponent))
        np.testing.assert_array_equal(found, eight.decoded(code, exponent))


@pytest.mark.optimized
@pytest.mark.parametrize("sign", [1, -1])
def test_a_y_beside_bfloat16_is_right_on_average(sign: int) -> None:
    # Between two places, across a power of two, and where a rest would be a half.
    for start, y in ((1.0, 1 + 2.0**-15), (1.0, 1 - 2.0**-16), (1.0, 1 + 2.0**-8 + 2.0**-15), (1.5, 1.7)):
        p = jnp.full((400, 500), sign * start, jnp.bfloat16)
        update, rest = eight.split(jnp.full(p.shape, sign * y, jnp.float32), p, drawn(p.shape, 3) & 0x3FF)
        new = (p + update).astype(jnp.bfloat16)
        found = np.asarray(new.astype(jnp.float32) + rest.astype(jnp.float32) * eight.unit(new), np.float64)
        # 200,000 roundings of at most half of 2^-13: four deviations of their mean.
        assert abs(found.mean() - sign * y) < 4 * 2.0**-14 / 200_000**0.5 + 2.0**-24
        assert np.abs(found - sign * y).max() <= 2.0**-13


@pytest.mark.parametrize(
    ("name", "b1"),
    [("adamw", 0.9), pytest.param("sgd", 0.5, marks=SLOW), pytest.param("radam", 1.0, marks=SLOW)],
)
def test_x_stays_near_the_float32_run(name: str, b1: float) -> None:
    options = {"b1": b1, "weight_decay": 0.1, **runs.OPTIONS[name]}
    gs = grads(300)
    y, state = scanned(runs.FACTORIES[name](1e-3, precision="8bit", **options), PARAMS, gs)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), PARAMS)
    want, want_state = scanned(runs.FACTORIES[name](1e-3, **options), wide, gs)
    x = sfjax.schedule_free_eval_params(state, y, jnp.float32)
    want_x = sfjax.schedule_free_eval_params(want_state, want)
    for leaf, start in wide.items():
        moved = jnp.linalg.norm(want_x[leaf] - start)
        # v is off by a tenth; y beside bfloat16 by some roundings of 2^-13 of itself. Measured a half of it.
        rounding = 0.0 if leaf == "wide" else 6 * jnp.linalg.norm(start) * 2.0**-13
        assert float(jnp.linalg.norm(x[leaf] - want_x[leaf])) < 0.06 * float(moved) + rounding


def test_bytes_of_a_parameter() -> None:
    params = {"w": jnp.ones((10, 1000), jnp.bfloat16), "wide": jnp.ones((10, 1000)), "b": jnp.ones(9)}
    state = sfjax.schedule_free_adamw(0.1, precision="8bit").init(params)
    trees = (params, state.z, state.y_rest, state.base_optimizer_state.nu, state.scale)
    for name, total in (("w", 5), ("wide", 7)):
        kept = [leaf for tree in trees if (leaf := tree[name]) is not None]
        assert sum(leaf.nbytes for leaf in kept) == (total + 2 / 1000) * 10_000
    assert state.z["b"].dtype == "float32"
    assert state.scale["b"] is None


def test_the_same_seed_gives_the_same_bits_and_another_gives_others() -> None:
    gs = grads(20)
    found = [
        scanned(sfjax.schedule_free_adamw(1e-2, precision="8bit", inner_momentum=0.5, seed=seed), PARAMS, gs)
        for seed in (5, 5, 6)
    ]
    runs.assert_same(found[0], found[1])
    assert bool((found[0][1].z["w"] != found[2][1].z["w"]).any())


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_it_runs_inside_the_wrappers_of_optax() -> None:
    for tx in (
        optax.inject_hyperparams(sfjax.schedule_free_adamw, hyperparam_dtype=jnp.float32)(
            1e-3, precision="8bit"
        ),
        optax.MultiSteps(sfjax.schedule_free_adamw(1e-3, precision="8bit"), 2).gradient_transformation(),
        optax.masked(
            sfjax.schedule_free_adamw(1e-3, precision="8bit"), {"w": True, "wide": False, "b": True}
        ),
        sfjax.accumulate(sfjax.schedule_free_radam(1e-3, b2=0.9, precision="8bit", seed=3), 2),
    ):
        y, state = scanned(tx, PARAMS, grads(12))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((y, state)))
        assert int(sfjax.find_state(state).step) in (6, 12)


@pytest.mark.slow
def test_another_b1_moves_y_and_not_x() -> None:
    y, state = scanned(sfjax.schedule_free_sgd(1e-2, precision="8bit"), PARAMS, grads(50))
    before = sfjax.schedule_free_eval_params(state, y, jnp.float32)
    still = sfjax.schedule_free_sgd(0.0, b1=0.5, precision="8bit")
    updates, state = still.update(
        jax.tree.map(jnp.zeros_like, y), state._replace(weight_sum=state.weight_sum * 1e9), y
    )
    after = sfjax.schedule_free_eval_params(state, optax.apply_updates(y, updates), jnp.float32)
    for name in PARAMS:
        # A rounding of the gap, of 10 bits, and of y.
        gap = jnp.abs(sfjax.iterates(state, optax.apply_updates(y, updates))[2][name] - before[name]).max()
        assert float(jnp.abs(after[name] - before[name]).max()) <= float(gap) * 2.0**-7 + 2.0**-11


@SLOW
@pytest.mark.parametrize("precision", ["exact", pytest.param("lean", marks=SLOW)])
def test_a_resumed_run_ends_in_the_same_bits_and_other_precisions_are_converted(
    tmp_path: Path, precision: Any
) -> None:
    narrow, other = (
        sfjax.schedule_free_adamw(1e-2, precision=kind, inner_momentum=0.5) for kind in ("8bit", precision)
    )
    y, state = scanned(narrow, PARAMS, grads(20))
    x = sfjax.schedule_free_eval_params(state, y, jnp.float32)
    with Checkpoints(tmp_path / "orbax") as checkpoints:
        path = checkpoints.save(20, y, state)
        same = checkpoints.restore(PARAMS, jax.eval_shape(narrow.init, PARAMS), strict=True)
        moved = checkpoints.restore(PARAMS, jax.eval_shape(other.init, PARAMS))
    assert same is not None
    assert moved is not None
    runs.assert_same((same.params, same.opt_state), (y, state))
    z = sfjax.iterates(state, y)[2]
    gap = max(float(jnp.abs(z[name] - x[name]).max()) for name in PARAMS)
    off = 1e-6 if precision == "exact" else gap * 2.0**-8
    found = sfjax.schedule_free_eval_params(moved.opt_state, moved.params, jnp.float32)
    for name in PARAMS:
        assert float(jnp.abs(found[name] - x[name]).max()) <= off
    nu = eight.decoded(state.base_optimizer_state.nu["w"], state.scale["w"][:, 1])
    kept = sfjax.find_state(moved.opt_state).base_optimizer_state.nu["w"]
    np.testing.assert_array_equal(kept.astype(jnp.float32), nu)  # bfloat16 has every code
    assert any("precision: z and the moments are converted" in notice for notice in moved.notices)
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(20, moved.params, moved.opt_state)
        back = checkpoints.restore(PARAMS, jax.eval_shape(narrow.init, PARAMS))
    assert back is not None
    found = sfjax.schedule_free_eval_params(back.opt_state, back.params, jnp.float32)
    for name in PARAMS:
        assert float(jnp.abs(found[name] - x[name]).max()) <= gap * 2.0**-7
    portable = read(path)[1]
    np.testing.assert_allclose(portable["z/w"], z["w"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(portable["v/w"], nu)
    g = jax.tree.map(lambda leaf: leaf[0], grads(1))
    with pytest.raises(ValueError, match=f"state must be of precision='{precision}', got another"):
        other.update(g, state, y)


def test_the_store_of_both_twins_takes_it_and_gives_it_back(tmp_path: Path) -> None:
    tx = sfjax.schedule_free_adamw(1e-2, precision="8bit")
    y, state = scanned(tx, PARAMS, grads(20))
    x, z = sfjax.schedule_free_eval_params(state, y, jnp.float32), sfjax.iterates(state, y)[2]
    path = export_exchange(tmp_path, y, state, step=20)
    back = import_exchange(path, PARAMS, jax.eval_shape(tx.init, PARAMS))
    runs.assert_same(back.params, y)
    found = sfjax.schedule_free_eval_params(back.opt_state, back.params, jnp.float32)
    for name in PARAMS:
        gap = float(jnp.abs(z[name] - x[name]).max())
        assert float(jnp.abs(found[name] - x[name]).max()) <= gap * 2.0**-9 + 1e-6
    old, new = (
        eight.decoded(s.base_optimizer_state.nu["w"], s.scale["w"][:, 1]) for s in (state, back.opt_state)
    )
    np.testing.assert_array_equal(old, new)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_shows() -> None:
    tx = sfjax.schedule_free_adamw(1e-2, precision="8bit")
    gs = grads(3)
    gs["w"] = gs["w"].at[1, 2, 3].set(jnp.nan)
    y, state = scanned(tx, PARAMS, gs)
    assert bool(jnp.isnan(y["w"][2]).any())
    assert bool(
        jnp.isnan(forms.opened(y["w"], state.z["w"], state.y_rest["w"], state.scale["w"])[1][2]).all()
    )


def test_what_does_not_go_with_it_is_refused_all_at_once() -> None:
    with pytest.raises(
        HyperparameterError, match=r"seed must be a whole number(.|\n)*b1 = 0(.|\n)*state_dtype must be None"
    ):
        sfjax.schedule_free_sgd(0.1, b1=0.0, state_dtype=jnp.float32, precision="8bit", seed=-1)
    with pytest.raises(HyperparameterError, match="momentum, row_nu has no 8-bit form"):
        sfjax.schedule_free_muon(0.1, precision="8bit")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="precision must be 'exact' or 'lean' for float16, got '8bit'"):
        sfjax.schedule_free_sgd(0.1, precision="8bit").init({"w": jnp.ones((4, 20), jnp.float16)})


@pytest.mark.slow
def test_shards_give_the_bits_of_one_device() -> None:
    count = min(4, jax.device_count())
    mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx, gs = sfjax.schedule_free_adamw(1e-2, precision="8bit"), grads(5)
    want = scanned(tx, PARAMS, gs)
    for spec in (("data",), (None, "data")):
        params = dict(PARAMS)
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        params["w"] = jax.device_put(PARAMS["w"], place)
        runs.assert_same(scanned(tx, params, gs), want)


def test_it_runs_inside_of_shard_map_where_arrays_vary_over_axes() -> None:
    tx = sfjax.schedule_free_adamw(0.01, precision="8bit")
    state, of_step = tx.init(PARAMS), jax.tree.map(lambda g: g[0], grads(1))
    auto, cut = jax.sharding.AxisType.Auto, jax.sharding.PartitionSpec
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(auto,), devices=jax.devices()[:1])

    def spec(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: cut("rows") if leaf.ndim else cut(), tree)

    specs = spec(of_step), spec(state), spec(PARAMS)
    update = jax.shard_map(tx.update, mesh=mesh, in_specs=specs, out_specs=specs[:2], check_vma=True)
    found, wanted = (jax.jit(f)(of_step, state, PARAMS) for f in (update, tx.update))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
