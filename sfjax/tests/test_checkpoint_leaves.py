"""What a run may carry beside parameters: keys, numbers, text, generators, iterators, awkward names."""

from __future__ import annotations

import array
import collections
import signal
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import sfjax
from sfjax.checkpoint import (
    CheckpointError,
    Checkpoints,
    _orbax,
    export_exchange,
    import_exchange,
    read,
    start_from_weights,
)
from sfjax.checkpoint._leaves import named
from sfjax.tests.checkpoint_runs import begin, go, saved, snapshot, transformation
from sfjax.tests.runs import assert_same


class Pair(NamedTuple):
    first: Any
    second: Any


class Batches:
    """An iterator that knows its place, as grain's do; `form` makes its state a dict or bytes."""

    def __init__(self, form: Any) -> None:
        self.place, self.form = 0, form

    def __next__(self) -> int:
        self.place += 1
        return self.place

    def get_state(self) -> Any:
        return self.form(self.place)

    def set_state(self, state: Any) -> None:
        self.place = state["place"] if isinstance(state, dict) else int(state)


def test_extra_state_of_every_kind_comes_back(tmp_path: Path) -> None:
    extra = {
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(3, impl="rbg"), 4),
        "old_key": jax.random.PRNGKey(1),
        "stats": {"mean": jnp.arange(3.0), "empty": jnp.zeros((0, 2))},
        "host": np.arange(4, dtype=np.int16),
        "numbers": [3, 0.5, True, 1j, np.float64(2.5)],
        "text": "epoch 3",
        "nothing": None,
    }
    with saved(tmp_path, extra_state=extra) as (checkpoints, params, opt_state):
        restored = checkpoints.restore(params, opt_state, extra_state=extra)
    assert restored is not None
    back = restored.extra_state
    for name in ("key", "keys"):
        assert back[name].dtype == extra[name].dtype
        np.testing.assert_array_equal(jax.random.key_data(back[name]), jax.random.key_data(extra[name]))
    assert_same(
        {k: back[k] for k in ("old_key", "stats", "host")},
        {k: extra[k] for k in ("old_key", "stats", "host")},
    )
    assert back["numbers"] == extra["numbers"]
    assert [type(n) for n in back["numbers"]] == [int, float, bool, complex, np.float64]
    assert (back["text"], back["nothing"]) == ("epoch 3", None)


@pytest.mark.parametrize(("seed", "other"), [(2**63 + 5, 0), (5, 2**64 - 1)])
def test_a_seed_of_64_bits_comes_back_into_any_other(seed: int, other: int, tmp_path: Path) -> None:
    with saved(tmp_path, extra_state=seed) as (checkpoints, params, opt_state):
        restored = checkpoints.restore(params, opt_state, extra_state=other)
        with pytest.raises(CheckpointError, match=r"extra_state must have the shape \(1,\)"):
            checkpoints.restore(params, opt_state, extra_state=np.zeros(1, np.int64))
        with pytest.raises(CheckpointError, match="extra_state must have the dtype bool"):
            checkpoints.restore(params, opt_state, extra_state=True)
    assert restored is not None
    assert restored.extra_state == seed


def test_abstract_keys_are_targets_too(tmp_path: Path) -> None:
    extra = {"key": jax.random.key(3, impl="rbg")}
    with saved(tmp_path, extra_state=extra) as (checkpoints, params, opt_state):
        restored = checkpoints.restore(params, opt_state, extra_state=jax.eval_shape(lambda: extra))
    assert restored is not None
    assert restored.extra_state["key"].dtype == extra["key"].dtype


@pytest.mark.parametrize("form", [lambda n: {"place": n}, lambda n: str(n).encode()], ids=["dict", "bytes"])
def test_iterators_and_generators_go_on_where_they_were(form: Any, tmp_path: Path) -> None:
    batches, random = Batches(form), np.random.default_rng(5)
    next(batches), random.random(3)
    with saved(tmp_path, extra_state=(batches, random)) as (checkpoints, params, opt_state):
        expected = (next(batches), random.random())
        fresh = (Batches(form), np.random.default_rng(99))
        restored = checkpoints.restore(params, opt_state, extra_state=fresh)
    assert restored is not None
    assert restored.extra_state[0] is fresh[0]
    assert (next(fresh[0]), fresh[1].random()) == expected


def test_a_failing_restore_moves_no_iterator(tmp_path: Path) -> None:
    batches = Batches(lambda n: {"place": n})
    next(batches)
    with saved(tmp_path, extra_state={"data": batches}) as (checkpoints, params, opt_state):
        other = Batches(lambda n: {"place": n})
        with pytest.raises(CheckpointError, match="extra_state/more must be in the checkpoint"):
            checkpoints.restore(params, opt_state, extra_state={"data": other, "more": jnp.ones(2)})
    assert other.place == 0


def test_objects_are_moved_all_or_none(tmp_path: Path) -> None:
    batches = Batches(lambda n: {"place": n})
    next(batches)
    with saved(tmp_path, extra_state=[batches, np.random.default_rng(0)]) as (checkpoints, params, opt_state):
        other = Batches(lambda n: {"place": n})
        random = np.random.Generator(np.random.MT19937(0))
        with pytest.raises(
            CheckpointError, match="extra_state/1 must take the state that was saved, got Value"
        ):
            checkpoints.restore(params, opt_state, extra_state=[other, random])
    assert other.place == 0


@pytest.mark.parametrize(
    "leaf",
    [
        object(),
        Batches(lambda n: {n, 2}),
        Batches(lambda n: {"shards": [{0: n}]}),
        Batches(lambda n: array.array("b", [n])),
        np.array(["text"]),
        np.array([object()]),
    ],
    ids=["object", "no JSON", "keys of no JSON", "what takes no list", "array of text", "array of objects"],
)
def test_a_leaf_that_cannot_be_stored_is_named(leaf: Any, tmp_path: Path) -> None:
    params = begin()
    with pytest.raises(CheckpointError, match=r"extra_state/mine must (be an array|have a state of JSON)"):
        Checkpoints(tmp_path).save(1, params, transformation("sgd").init(params), extra_state={"mine": leaf})


def test_an_extra_state_that_is_not_asked_for_is_mentioned(tmp_path: Path) -> None:
    with saved(tmp_path, extra_state={"n": 1}) as (checkpoints, params, opt_state):
        restored = checkpoints.restore(params, opt_state)
    assert restored is not None
    assert restored.extra_state is None
    assert "the checkpoint has an extra_state that was not asked for" in restored.notices


def test_parameters_of_every_shape_and_dtype_resume(tmp_path: Path) -> None:
    params = {
        "mlp/~/linear.0": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3, jnp.float16)},
        "empty": jnp.zeros((0, 4)),
        "number": jnp.float32(2.0),
        "complex": jnp.ones(2, jnp.complex64),
        "list": [jnp.ones(1), (jnp.ones(2, jnp.bfloat16), None)],
    }
    tx = sfjax.schedule_free_adamw(0.1)
    opt_state = tx.init(params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params, opt_state)
        restored = checkpoints.restore(params, jax.eval_shape(tx.init, params), strict=True)
    assert restored is not None
    assert_same((restored.params, restored.opt_state), (params, opt_state))


def _resumed_after_a_step(tx: Any, params: Any, tmp_path: Path) -> Any:
    """Returns the state after a step, having checked that a checkpoint of it comes back."""
    _, opt_state = tx.update(params, tx.init(params), params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params, opt_state)
        restored = checkpoints.restore(params, tx.init(params), strict=True)
    assert restored is not None
    assert_same((restored.params, restored.opt_state), (params, opt_state))
    return opt_state


@pytest.mark.parametrize("params", [{}, {"w": jnp.zeros((0, 3))}], ids=["no leaf", "no element"])
def test_parameters_without_a_number_resume(params: Any, tmp_path: Path) -> None:
    _resumed_after_a_step(sfjax.schedule_free_adamw(0.1), params, tmp_path)


def test_parameters_that_are_one_array_resume(tmp_path: Path) -> None:
    tx, params = sfjax.schedule_free_adamw(0.1), jnp.arange(3.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params, tx.init(params))
        restored = checkpoints.restore(params, tx.init(params), strict=True)
    assert restored is not None
    assert_same((restored.params, restored.opt_state), (params, tx.init(params)))
    assert list(restored.meta.parameters) == ["value"]


@pytest.mark.parametrize("name", ["value", ""])
def test_a_parameter_may_have_any_name(name: str, tmp_path: Path) -> None:
    tx, params = sfjax.schedule_free_adamw(0.1), {name: jnp.arange(3.0)}
    opt_state = _resumed_after_a_step(tx, params, tmp_path)
    start = start_from_weights(params, params, tx.init(params), hyperparameters={"lr": 0.1})
    assert_same(start.params, params)
    path = export_exchange(tmp_path / "store", params, opt_state, step=1)
    assert_same(import_exchange(path, params, tx.init(params)).opt_state, opt_state)


@pytest.mark.parametrize("key", ["a/b", "a.b"], ids=["here", "in Orbax"])
def test_two_leaves_of_one_name_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=r"leaves must have different names, got two called 'a[/.]b'"):
        named({"a": {"b": 1}, key: 2})


def test_trees_of_every_kind_of_node_resume(tmp_path: Path) -> None:
    extra = {
        "int keys": {0: jnp.ones(1), 1: {2: jnp.zeros(2)}},
        "ordered": collections.OrderedDict(b=jnp.ones(1), a=jnp.zeros(2)),
        "own node": Pair(jnp.ones(2), [jnp.zeros(1)]),
        "frozen": FrozenDict({"mean": jnp.ones(2)}),
        "empty": [{}, (), None],
        "rare dtypes": [jnp.ones(3, jnp.int4), jnp.ones(3, jnp.float8_e4m3fn), np.ones(2, ">f4")],
    }
    with saved(tmp_path, extra_state=extra) as (checkpoints, params, opt_state):
        restored = checkpoints.restore(params, opt_state, extra_state=extra)
    assert restored is not None
    assert_same(restored.extra_state, extra)


def test_later_steps_do_not_reach_a_save_in_flight(tmp_path: Path) -> None:
    tx = transformation("adamw")
    params = begin()
    opt_state = tx.init(params)
    step = jax.jit(lambda p, s: _step(tx, p, s), donate_argnums=(0, 1))
    with Checkpoints(tmp_path, keep_newest=9) as checkpoints:
        expected = {}
        for number in range(6):
            params, opt_state = step(params, opt_state)
            expected[number] = snapshot(params, opt_state)
            checkpoints.save(number, params, opt_state)
        for number, content in expected.items():
            restored = checkpoints.restore(params, opt_state, resume=number)
            assert restored is not None
            assert snapshot(restored.params, restored.opt_state) == content


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs a signal to one thread")
def test_a_save_after_an_interrupted_wait_does_not_reach_the_one_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A test run that was started in the background ignores SIGINT.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    going_on, write = threading.Event(), _orbax.write
    monkeypatch.setattr(_orbax, "write", lambda *arguments: going_on.wait(60) and write(*arguments))
    tx, params = transformation("sgd"), begin()
    later = jax.tree.map(lambda p: p + 1, params)
    with Checkpoints(tmp_path) as checkpoints:
        first = checkpoints.save(0, params, tx.init(params))
        interrupt = (threading.get_ident(), signal.SIGINT)
        threading.Timer(0.5, signal.pthread_kill, interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait()
        signal.signal(signal.SIGINT, handler)
        threading.Timer(0.5, going_on.set).start()
        checkpoints.save(1, later, tx.init(later))
    np.testing.assert_array_equal(read(first)[1]["y/a"], params["a"])


def test_extra_is_saved_as_it_was_when_save_was_called(tmp_path: Path) -> None:
    params, opt_state = begin(), transformation("sgd").init(begin())
    extra = {"losses": [1.0], "loader": {"place": 3}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params, opt_state, extra=extra)
        extra["losses"].append(2.0)  # the run goes on while the background writes
        extra["loader"]["place"] = 4
        restored = checkpoints.restore(params, opt_state)
    assert restored is not None
    assert restored.meta.extra == {"losses": [1.0], "loader": {"place": 3}}


def _step(tx: Any, params: Any, opt_state: Any) -> tuple[Any, Any]:
    updates, opt_state = tx.update(params, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def test_a_run_with_its_data_order_and_keys_resumes_exactly(tmp_path: Path) -> None:
    tx = transformation("sgd")

    @jax.jit
    def step(params: Any, opt_state: Any, key: Any, number: Any) -> tuple[Any, Any]:
        scale = jax.random.uniform(key) * number.astype(jnp.float32)
        updates, opt_state = tx.update(jax.tree.map(lambda p: p * scale, params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def epoch(params: Any, opt_state: Any, extra: Any, steps: int) -> tuple[Any, Any, Any]:
        for _ in range(steps):
            extra["key"], key = jax.random.split(extra["key"])
            params, opt_state = step(params, opt_state, key, extra["order"].integers(1, 5))
        return params, opt_state, extra

    def fresh(seed: int) -> dict[str, Any]:
        return {"key": jax.random.key(seed), "order": np.random.default_rng(seed)}

    params = begin()
    whole = epoch(params, tx.init(params), fresh(0), 4)
    half = epoch(params, tx.init(params), fresh(0), 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, *half[:2], extra_state=half[2])
        restored = checkpoints.restore(params, tx.init(params), extra_state=fresh(9))
    assert restored is not None
    again = epoch(restored.params, restored.opt_state, restored.extra_state, 2)
    assert_same(again[:2], whole[:2])
    assert np.any(whole[0]["a"] != half[0]["a"])


def test_grain_iterators_resume_on_the_same_batch(tmp_path: Path) -> None:
    grain = pytest.importorskip("grain")
    data = iter(grain.MapDataset.range(20).shuffle(seed=1).to_iter_dataset())
    seen = [next(data) for _ in range(3)]
    with saved(tmp_path, extra_state={"data": data}) as (checkpoints, params, opt_state):
        expected = [next(data) for _ in range(3)]
        other = iter(grain.MapDataset.range(20).shuffle(seed=1).to_iter_dataset())
        checkpoints.restore(params, opt_state, extra_state={"data": other})
    assert [next(other) for _ in range(3)] == expected != seen


def test_go_takes_the_micro_batches_that_it_is_asked_for() -> None:
    tx, params = transformation("sgd"), begin()
    whole = go(tx, params, tx.init(params), 0, 4)
    assert_same(go(tx, *go(tx, params, tx.init(params), 0, 2), 2, 4), whole)
