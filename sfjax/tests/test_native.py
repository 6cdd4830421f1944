"""The native step of a CPU: the plain program's numbers in one pass, and its bits where it is not taken."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import sfjax
from sfjax.kernels import call
from sfjax.step import native
from sfjax.tests import runs

LR = 0.05
MAKE = {
    "sgd": functools.partial(sfjax.schedule_free_sgd, LR, weight_decay=0.1),
    "adamw": functools.partial(sfjax.schedule_free_adamw, LR, weight_decay=0.1, warmup_steps=3),
    "momentum": functools.partial(
        sfjax.schedule_free_adamw, LR, weight_decay=0.1, decay_at="z", inner_momentum=0.5
    ),
    "radam": functools.partial(sfjax.schedule_free_radam, LR, weight_decay=0.1, b2=0.9),
}
EVERY = pytest.mark.parametrize("name", MAKE)
# What the scalars do is the same for all.
TWO = pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[] if one in ("sgd", "adamw") else pytest.mark.slow) for one in MAKE]
)


@pytest.fixture(autouse=True)
def needs_the_kernel(request: pytest.FixtureRequest) -> None:
    why = call.find()
    if why is not None and "compiler" not in request.node.name:
        pytest.skip(why)


def plain(tx: Any) -> Any:
    """Returns what `step` is without a kernel."""

    def step(params: Any, state: Any, *, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def go(step: Any, params: Any, state: Any, first: int = 0, last: int = 12, dtype: Any = jnp.float32) -> Any:
    for g in runs.gradients(last)[first:]:
        params, state = step(params, state, gradients=runs.typed(g, dtype))
    return params, state


def assert_goes_where_the_plain_program_goes(tx: Any, params: Any, tolerance: float, **options: Any) -> None:
    got, want = (go(jax.jit(one), params, tx.init(params), **options) for one in (tx.step, plain(tx)))
    runs.assert_close(got, want, tolerance)


def compiled(tx: Any, params: Any) -> Any:
    step = jax.jit(tx.step, donate_argnums=(0, 1))
    return step.lower(params, tx.init(params), gradients=params).compile()


def calls(program: Any) -> int:
    return program.as_text().count(f'custom_call_target="{call.TARGET}"')


@EVERY
@pytest.mark.parametrize("b1", [0.9, 0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_step_is_that_of_the_plain_program(name: str, b1: float, x64: None) -> None:
    tx, params = MAKE[name](b1=b1), runs.typed(runs.start(), jnp.float64)
    assert calls(compiled(tx, params)) == 1
    assert_goes_where_the_plain_program_goes(tx, params, 1e-12, dtype=jnp.float64)


@TWO
@pytest.mark.parametrize(("old", "new"), [(0.0, 0.9), (0.9, 0.0), (0.9, 0.5)])
def test_another_beta_moves_y_so_that_x_stays(name: str, old: float, new: float) -> None:
    params = runs.typed(runs.start(), jnp.float32)

    def run(step_of: Any) -> Any:
        before, after = MAKE[name](b1=old), MAKE[name](b1=new)
        y, state = go(jax.jit(step_of(before)), params, before.init(params), 0, 5)
        return go(jax.jit(step_of(after)), y, state, 5, 9)

    runs.assert_close(run(lambda tx: tx.step), run(plain), 2e-6)  # measured: 5e-7


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_leaves_that_do_not_decay_are_a_call_of_their_own(name: str) -> None:
    params = runs.typed(runs.start(), jnp.float32)
    tx = MAKE[name](mask=lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p))
    assert calls(compiled(tx, params)) == 2
    assert_goes_where_the_plain_program_goes(tx, params, 2e-6)


@pytest.mark.optimized
@EVERY
def test_a_donated_step_copies_nothing_and_takes_no_memory(name: str) -> None:
    params = {str(i): jnp.ones((64, 64)) for i in range(9)}
    program = compiled(MAKE[name](), params)
    size = sum(leaf.nbytes for leaf in params.values())
    kept = {"sgd": 2, "momentum": 4}.get(name, 3)
    memory = program.memory_analysis()
    assert " = f32[64,64]{1,0} copy(" not in program.as_text()
    assert memory.alias_size_in_bytes >= kept * size
    assert memory.temp_size_in_bytes <= 1024  # the numbers; measured: 552 to 580


def test_a_long_list_is_a_few_calls_which_compile_sooner_than_one(monkeypatch: Any) -> None:
    monkeypatch.setattr(call, "MOST_LEAVES", 4)
    tx, params = MAKE["sgd"](), {str(i): jnp.full(2, float(i)) for i in range(9)}
    assert calls(compiled(tx, params)) == 3
    new, _ = jax.jit(tx.step)(params, tx.init(params), gradients=params)
    want, _ = jax.jit(plain(tx))(params, tx.init(params), gradients=params)
    runs.assert_close(new, want, 1e-6)


@pytest.mark.parametrize("dtypes", [("bfloat16",), ("float16",), ("bfloat16", "float32")])
def test_gradients_may_be_narrower(dtypes: tuple[str, ...]) -> None:
    tx, params = MAKE["adamw"](), {str(i): jnp.linspace(1.0, 2.0, 7) for i in range(len(dtypes))}
    gradients = {str(i): jnp.linspace(-1, 1, 7).astype(one) for i, one in enumerate(dtypes)}
    got, want = (jax.jit(one)(params, tx.init(params), gradients=gradients) for one in (tx.step, plain(tx)))
    runs.assert_close(got, want, 1e-6)


def test_many_threads_take_the_step_of_one_and_twice_the_same() -> None:
    tx = MAKE["adamw"]()
    params = {
        "w": jnp.asarray(np.random.default_rng(0).standard_normal(300_001), jnp.float32),
        "n": jnp.zeros((0, 3)),
    }
    step = jax.jit(tx.step)
    first, again = (step(params, tx.init(params), gradients=params) for _ in range(2))
    runs.assert_same(first, again)
    pieces = [{"w": params["w"][i : i + 1000], "n": params["n"]} for i in range(0, 300_001, 1000)]
    small = [step(piece, tx.init(piece), gradients=piece)[0]["w"] for piece in pieces[-2:]]
    np.testing.assert_array_equal(np.concatenate(small), first[0]["w"][-1001:])


@pytest.mark.parametrize("every", [1, 2])
def test_a_loop_and_a_step_outside_of_jit_take_the_same_path(every: int) -> None:
    tx, params = MAKE["adamw"](), runs.typed(runs.start(), jnp.float32)
    tx = tx if every == 1 else sfjax.accumulate(tx, every)
    grads = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(runs.typed(g, jnp.float32) for g in runs.gradients(6))
    )

    def body(carry: Any, g: Any) -> Any:
        return tx.step(*carry, gradients=g), None

    scanned = jax.jit(lambda: jax.lax.scan(body, (params, tx.init(params)), grads)[0])()
    runs.assert_close(scanned, go(jax.jit(tx.step), params, tx.init(params), last=6), 1e-6)
    runs.assert_close(go(tx.step, params, tx.init(params), last=6), scanned, 1e-6)


def test_leaves_may_be_arrays_of_numpy() -> None:
    tx, params = MAKE["adamw"](), jax.tree.map(np.float32, runs.start())
    state = tx.init(jax.tree.map(jnp.asarray, params))
    want = jax.jit(tx.step)(params, state, gradients=params)
    runs.assert_close(tx.step(params, state, gradients=params), want, 1e-6)


def test_an_accumulated_update_is_a_call_for_the_mean_and_one_in_a_loop() -> None:
    params = runs.typed(runs.start(), jnp.float32)
    tx = sfjax.accumulate(sfjax.chain(optax.clip_by_global_norm(1.0), MAKE["adamw"]()), 3)
    with jax.numpy_dtype_promotion("standard"):
        assert calls(compiled(tx, params)) == 2
        got, want = (go(jax.jit(one), params, tx.init(params)) for one in (tx.step, plain(tx)))
    runs.assert_close(got, want, 2e-6)


def means(params: Any, gradients: Any, step: Any = None) -> Any:
    """Returns the means of some gradients of an accumulation that has come to no update."""
    tx = sfjax.accumulate(sfjax.schedule_free_sgd(0.1), 100)
    step, state = step or jax.jit(tx.step), tx.init(params)
    for g in gradients:
        _, state = step(params, state, gradients=g)
    return state.acc_grads


def some_gradients(dtypes: dict[str, Any], size: int = 4099, powers: int = 30) -> list[Any]:
    rng = np.random.default_rng(0)
    return [
        {
            name: jnp.asarray(rng.standard_normal(size) * 10.0 ** rng.integers(-powers, powers, size), dtype)
            for name, dtype in dtypes.items()
        }
        for _ in range(5)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mean_has_the_bits_of_its_operations_one_by_one(dtype: str) -> None:
    gradients = some_gradients({"w": dtype})
    want = np.full(4099, np.nan, np.float32)
    for taken, g in enumerate(gradients, start=1):
        newest = np.asarray(g["w"].astype(jnp.float32))
        want = newest if taken == 1 else want + (newest - want) / np.float32(taken)
    got = means({"w": jnp.zeros(4099, dtype)}, gradients)
    np.testing.assert_array_equal(got["w"], want)


@pytest.mark.optimized
def test_a_micro_step_copies_nothing_and_takes_no_memory() -> None:
    tx, params = sfjax.accumulate(MAKE["adamw"](), 4), {str(i): jnp.ones((64, 64)) for i in range(9)}
    program, size = compiled(tx, params), 9 * 64 * 64 * 4
    assert " = f32[64,64]{1,0} copy(" not in program.as_text()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * size  # y, z, v and the mean
    assert memory.temp_size_in_bytes <= 2048  # the numbers of both; measured: 1,236


def test_means_that_the_kernel_would_have_to_cast_are_those_of_xla(x64: None) -> None:
    dtypes = {
        "a": "float32",
        "b": "bfloat16",
        "c": "float16",
        "d": "complex64",
        "e": "float64",
        "f": "float32",
    }
    gradients = some_gradients(dtypes, size=7, powers=2)
    tx, params = sfjax.accumulate(sfjax.schedule_free_sgd(0.1), 100), gradients[0]
    with jax.numpy_dtype_promotion("standard"):
        assert calls(compiled(tx, params)) == 3  # a and f, b, e
        got = means(params, gradients)
        want = means(params, gradients, lambda p, s, gradients: (p, tx.update(gradients, s, p)[1]))
    runs.assert_close(got, want, 1e-6)


def test_means_under_vmap_and_derivatives_are_those_of_the_plain_program(monkeypatch: Any) -> None:
    tx, params = sfjax.accumulate(MAKE["sgd"](), 100), runs.typed(runs.start(), jnp.float32)
    scales = jnp.arange(1.0, 4.0)

    def mean(scale: Any) -> Any:
        gradients = [jax.tree.map(lambda p, i=i: p * scale**i, params) for i in range(3)]
        return means(params, gradients, tx.step)

    def found() -> Any:
        return jax.jit(jax.vmap(mean))(scales), jax.jit(lambda s: jax.jvp(mean, (s,), (s,))[1])(scales[1])

    native_bits = found()
    monkeypatch.setattr(call, "find", lambda: "there is no compiler")
    runs.assert_same(native_bits, found())


def test_means_without_a_compiler_are_those_of_update(monkeypatch: Any) -> None:
    monkeypatch.setattr(call, "find", lambda: "there is no compiler")
    tx, gradients = sfjax.accumulate(sfjax.schedule_free_sgd(0.1), 100), some_gradients({"w": "float32"})
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    assert calls(compiled(tx, params)) == 0
    want = means(params, gradients, jax.jit(lambda p, s, gradients: (p, tx.update(gradients, s, p)[1])))
    runs.assert_same(means(params, gradients), want)


def test_gradients_of_another_shape_are_never_walked() -> None:
    tx, params = sfjax.accumulate(MAKE["adamw"](), 4), {"w": jnp.ones(5)}
    for wrong, match in ({"w": jnp.ones(3)}, "shape"), ({"v": jnp.ones(5)}, "key"), ({"w": None}, "None"):
        with pytest.raises((TypeError, ValueError), match=match):
            tx.step(params, tx.init(params), gradients=wrong)


def test_vmap_takes_the_plain_program() -> None:
    tx, params = MAKE["adamw"](), runs.typed(runs.start(), jnp.float32)

    def over(step: Any) -> Any:
        def one(scale: Any) -> Any:
            return step(params, tx.init(params), gradients=jax.tree.map(lambda p: p * scale, params))

        return jax.jit(jax.vmap(one))(jnp.arange(3.0))

    runs.assert_same(over(tx.step), over(plain(tx)))


def _loss(step: Any, params: Any, state: Any, gradients: Any) -> jax.Array:
    y, _ = step(params, state, gradients=gradients)
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))


def test_a_derivative_is_that_of_the_plain_program() -> None:
    tx, params = MAKE["adamw"](), runs.typed(runs.start(), jnp.float32)
    state = tx.init(params)

    def slope(step: Any) -> Any:
        return jax.jit(jax.grad(functools.partial(_loss, step), argnums=(0, 2)))(params, state, params)

    runs.assert_same(slope(tx.step), slope(plain(tx)))


def test_the_learning_rate_has_a_derivative_too() -> None:
    params = runs.typed(runs.start(), jnp.float32)

    def slope(step_of: Any) -> Any:
        def loss(lr: Any) -> jax.Array:
            tx = sfjax.schedule_free_adamw(lr, weight_decay=0.1)
            return _loss(step_of(tx), params, tx.init(params), params)

        return jax.jit(jax.vmap(jax.grad(loss)))(jnp.array([0.1, 0.2]))

    runs.assert_same(slope(lambda tx: tx.step), slope(plain))


OTHERS = {
    "16 bits": ({}, jnp.bfloat16),
    "lean": ({"precision": "lean"}, jnp.bfloat16),
    "complex": ({}, jnp.complex64),
    "state_dtype": ({"state_dtype": jnp.bfloat16}, jnp.float32),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_the_kernel_does_not_know_takes_the_plain_program(what: str) -> None:
    options, dtype = OTHERS[what]
    tx, params = MAKE["sgd"](**options), runs.typed(runs.leaf(), dtype)
    assert calls(compiled(tx, params)) == 0
    grads = jax.tree.map(jnp.ones_like, params)
    for jitted in (jax.jit, lambda step: step):
        got, want = (jitted(one)(params, tx.init(params), gradients=grads) for one in (tx.step, plain(tx)))
        runs.assert_same(got, want)


@pytest.mark.parametrize(
    "make", [functools.partial(sfjax.schedule_free, optax.sgd(LR)), sfjax.schedule_free_muon]
)
def test_a_direction_that_the_kernel_does_not_know_takes_the_plain_program(make: Any) -> None:
    tx, params = make(LR), runs.typed(runs.start(), jnp.float32)
    assert calls(compiled(tx, params)) == 0
    runs.assert_same(*(go(jax.jit(one), params, tx.init(params)) for one in (tx.step, plain(tx))))


def test_an_option_that_the_kernel_does_not_know_takes_the_plain_program(monkeypatch: Any) -> None:
    params = runs.typed(runs.leaf(), jnp.float32)
    monkeypatch.setattr(native, "KNOWN", native.KNOWN - {"refined_c"})
    assert calls(compiled(MAKE["adamw"](), params)) == 1  # it has the default
    assert calls(compiled(MAKE["adamw"](refined_c=2.0), params)) == 0


def test_without_a_compiler_a_step_is_the_plain_program_with_one_notice(
    monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(call, "find", lambda: "there is no compiler")
    call.give_notice.cache_clear()
    tx, params = MAKE["adamw"](), runs.typed(runs.start(), jnp.float32)
    with caplog.at_level(logging.WARNING, logger="sfjax"):
        assert calls(compiled(tx, params)) == 0
        got, want = (go(jax.jit(one), params, tx.init(params)) for one in (tx.step, plain(tx)))
    runs.assert_same(got, want)
    assert [record.getMessage() for record in caplog.records] == [
        "the native CPU step is not available, and steps take the program of XLA: there is no compiler"
    ]


@pytest.mark.parametrize("why", ["no compiler for the step", "no compiler for the call"])
def test_without_a_compiler_there_is_a_reason(why: str, monkeypatch: Any) -> None:
    def find(*library: Any) -> Any:
        return why if bool(library) == ("call" in why) else None

    monkeypatch.setattr(call.build, "find", find)
    assert call.find.__wrapped__() == why


def test_a_version_of_jax_without_headers_needs_no_compiler_and_says_so(monkeypatch: Any) -> None:
    monkeypatch.delattr(jax.ffi, "include_dir")
    assert "include_dir" in call.find.__wrapped__()


def test_without_shardy_a_step_on_several_devices_takes_the_plain_program(monkeypatch: Any) -> None:
    monkeypatch.setattr(call, "_has_shardy", lambda: False)
    for devices, want in ((2, 0), (1, 1)):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        assert calls(compiled(MAKE["sgd"](), runs.typed(runs.leaf(), jnp.float32))) == want


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_devices_get_the_plain_program(platform: str) -> None:
    tx, params = MAKE["adamw"](), runs.typed(runs.leaf(), jnp.float32)
    exported = export.export(jax.jit(tx.step), platforms=[platform])
    assert call.TARGET not in exported(params, tx.init(params), gradients=params).mlir_module()


@pytest.mark.parametrize("positions", [2, 3])
def test_gradients_by_position_are_refused(positions: int) -> None:
    tx, params = MAKE["sgd"](), jnp.ones(2)
    arguments = (params, tx.init(params), params)[:positions]
    with pytest.raises(TypeError, match=f"gradients must be passed to step.. by name, got {positions} argum"):
        tx.step(*arguments)


def test_what_does_not_belong_together_is_refused_as_in_update() -> None:
    tx = MAKE["sgd"]()
    state = tx.init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"updates must have the shapes of params, got \(2,\) for \(3,\)"):
        tx.step({"w": jnp.ones(3)}, state, gradients={"w": jnp.ones(2)})


def test_an_empty_tree_takes_a_step() -> None:
    tx = MAKE["adamw"]()
    params, state = tx.step({}, tx.init({}), gradients={})
    assert params == {}
    assert int(state.step) == 1


def test_a_chain_has_the_state_and_the_updates_of_optax() -> None:
    params = runs.typed(runs.start(), jnp.float32)
    parts = (optax.clip_by_global_norm(1.0), MAKE["adamw"]())
    ours, theirs = sfjax.chain(*parts), optax.chain(*parts)
    assert jax.tree.structure(ours.init(params)) == jax.tree.structure(theirs.init(params))
    assert calls(compiled(ours, params)) == 1
    got, want = (go(jax.jit(one), params, theirs.init(params)) for one in (ours.step, plain(theirs)))
    runs.assert_close(got, want, 2e-6)
    runs.assert_same(runs.run(ours, params, runs.gradients(5)), runs.run(theirs, params, runs.gradients(5)))


@pytest.mark.parametrize("last", [(), (optax.sgd(0.1),), (sfjax.schedule_free_sgd(0.1), optax.scale(0.5))])
def test_a_chain_must_end_with_a_step(last: tuple[Any, ...]) -> None:
    with pytest.raises(
        TypeError, match="the last of transformations must be a transformation with step, got"
    ):
        sfjax.chain(*last)
