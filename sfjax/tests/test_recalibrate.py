"""Running statistics are averaged anew at x, in nnx and in linen, and nothing else is touched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core, linen, nnx
from sklearn.datasets import load_digits

import sfjax
from sfjax.recalibrate import recalibrate, recalibrate_linen
from sfjax.tests.flax_runs import drawn


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.relu(
            linen.BatchNorm(use_running_average=not train)(linen.Conv(8, (3, 3), kernel_init=drawn)(x))
        )
        x = linen.relu(
            linen.BatchNorm(use_running_average=not train)(linen.Conv(16, (3, 3), 2, kernel_init=drawn)(x))
        )
        return linen.Dense(10, kernel_init=drawn)(x.reshape(len(x), -1))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.last = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dense(self.dropout(self.norm(x))))


@pytest.fixture
def batches():
    return list(np.random.default_rng(0).normal(2, 3, (5, 32, 4)).astype(np.float32))


@functools.cache
def trained():
    """A CNN on digits with heavy averaging: gradients at z, and x far behind it."""
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images / 16, jnp.float32).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:400], order[400:]
    model = Linen()
    variables = model.init(jax.random.key(0), images[:2], train=True)
    tx = sfjax.schedule_free_sgd(1.0, b1=0.0, prior_steps=30)
    params, stats, state = variables["params"], variables["batch_stats"], tx.init(variables["params"])

    def loss(params, stats, x, y, train):
        given = {"params": params, "batch_stats": stats}
        logits, updates = model.apply(given, x, train=train, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates["batch_stats"]

    @jax.jit
    def step(params, stats, state, x, y):
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, x, y, True)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state

    rng = np.random.default_rng(0)
    for _ in range(60):
        chosen = rng.choice(train, 64)
        params, stats, state = step(params, stats, state, images[chosen], labels[chosen])
    x = sfjax.schedule_free_eval_params(state, params)
    training = [images[train[i * 64 : (i + 1) * 64]] for i in range(20)]
    at_test = functools.partial(jax.jit(loss, static_argnames="train"), x=images[test], y=labels[test])
    return model, {"params": x, "batch_stats": stats}, training, at_test


@pytest.mark.slow
def test_stale_statistics_cost_at_x_and_new_ones_do_not():
    model, variables, training, loss = trained()
    x, stats = variables["params"], variables["batch_stats"]
    new_variables = recalibrate_linen(functools.partial(model.apply, train=True), variables, training)
    stale = float(loss(x, stats, train=False)[0])
    new = float(loss(x, new_variables["batch_stats"], train=False)[0])
    of_the_batch = float(loss(x, stats, train=True)[0])  # with the statistics of the test images themselves
    assert stale > 1.5 * new
    assert abs(new - of_the_batch) < 0.1 * (stale - new)


def test_linen_statistics_are_plain_averages_whatever_the_momentum(batches):
    for momentum in (0.0, 0.9, 0.999):
        model = linen.BatchNorm(use_running_average=False, momentum=momentum)
        variables = model.init(jax.random.key(0), batches[0])
        bad = jax.tree.map(lambda leaf: leaf * jnp.nan, variables["batch_stats"])
        new = recalibrate_linen(model.apply, {**variables, "batch_stats": bad}, batches)["batch_stats"]
        # float32, from E[x^2] - E[x]^2 with variance 9 and mean 2.
        np.testing.assert_allclose(new["mean"], np.mean([b.mean(0) for b in batches], 0), rtol=1e-5)
        np.testing.assert_allclose(new["var"], np.mean([b.var(0) for b in batches], 0), rtol=1e-4)
        assert model.momentum == momentum


def test_linen_takes_a_frozen_dict_and_returns_one(batches):
    model = linen.BatchNorm(use_running_average=False)
    variables = model.init(jax.random.key(0), batches[0])
    frozen = core.freeze(variables)
    new = recalibrate_linen(model.apply, frozen, batches)
    assert jax.tree.structure(new["batch_stats"]) == jax.tree.structure(frozen["batch_stats"])
    plain = recalibrate_linen(model.apply, variables, batches)
    np.testing.assert_array_equal(new["batch_stats"]["mean"], plain["batch_stats"]["mean"])


def test_linen_works_under_jit_and_changes_nothing_that_it_is_given(batches):
    model = linen.BatchNorm(use_running_average=False)
    variables = model.init(jax.random.key(0), batches[0])
    before = jax.tree.map(np.array, variables)
    jitted = jax.jit(model.apply, static_argnames="mutable")
    fast = recalibrate_linen(
        lambda variables, x, mutable: jitted(variables, x, mutable=tuple(mutable)), variables, batches
    )
    slow = recalibrate_linen(model.apply, variables, batches)
    # Compiled, the sums are taken in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), fast, slow)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_without_statistics_no_batch_is_drawn():
    def forbidden():
        raise AssertionError
        yield

    assert recalibrate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), forbidden()) == 0
    variables = {"params": {"w": jnp.ones(2)}}
    assert recalibrate_linen(None, variables, forbidden()) == variables


def test_nnx_statistics_are_plain_averages(batches):
    model = Nnx(nnx.Rngs(0))
    model.norm.mean[...] = jnp.full(4, jnp.nan)
    assert recalibrate(model, batches) == 5
    np.testing.assert_allclose(model.norm.mean[...], np.mean([b.mean(0) for b in batches], 0), rtol=1e-5)
    np.testing.assert_allclose(model.norm.var[...], np.mean([b.var(0) for b in batches], 0), rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_nnx_flags_momentum_weights_and_randomness_are_as_they_were(batches, training):
    model = Nnx(nnx.Rngs(0))
    model.train() if training else model.eval()
    model.dropout.deterministic = not model.dropout.deterministic
    flags = (model.dropout.deterministic, model.norm.use_running_average, model.last.use_running_average)
    others = nnx.state(model, nnx.Not(nnx.BatchStat))
    before = jax.tree.map(lambda leaf: np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf), others)

    def noisy(model, batch):
        model.dropout.rngs()
        return model(batch[0])

    recalibrate(model, [(batch, 0) for batch in batches], noisy)
    assert (
        model.dropout.deterministic,
        model.norm.use_running_average,
        model.last.use_running_average,
    ) == flags
    assert (model.norm.momentum, model.last.momentum) == (0.9, 0.99)
    others = nnx.state(model, nnx.Not(nnx.BatchStat))
    after = jax.tree.map(lambda leaf: np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf), others)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize("bad", [[], [np.ones((4, 4), np.float32), np.ones((4, 5), np.float32)]])
def test_an_error_leaves_everything_as_it_was(bad):
    model = Nnx(nnx.Rngs(0))
    with pytest.raises((ValueError, TypeError)):
        recalibrate(model, bad)
    assert model.norm.mean[...].tolist() == [0.0] * 4
    assert model.norm.var[...].tolist() == [1.0] * 4
    assert (model.norm.momentum, model.dropout.deterministic) == (0.9, False)


def test_linen_needs_batches():
    model = linen.BatchNorm(use_running_average=False)
    variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        recalibrate_linen(model.apply, variables, [])


def test_a_function_that_was_compiled_with_its_momentum_is_refused(batches):
    model = linen.BatchNorm(use_running_average=False, momentum=0.9)
    variables = model.init(jax.random.key(0), batches[0])
    compiled = jax.jit(lambda variables, x: model.apply(variables, x, mutable=["batch_stats"]))
    compiled(variables, batches[0])
    with pytest.raises(ValueError, match=r"apply must run linen\.BatchNorm anew, got no such layer"):
        recalibrate_linen(lambda variables, x, mutable: compiled(variables, x), variables, batches)
