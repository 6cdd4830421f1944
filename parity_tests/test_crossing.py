"""A run that changes the framework half-way goes on as if it had stayed; and back again, bit for bit.

Real networks with recorded gradients: torch trains, saves, JAX goes on beside it; then JAX exports, torch
goes on, and both continue.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import sfjax
import sftorch
from sfcore import names
from sfcore.hyperparameters import AdamW, Muon
from sfcore.tests import models
from sfjax.checkpoint import export_exchange, import_exchange
from sftorch.checkpoint import Checkpoints, import_state_dict

BEFORE, AFTER = 15, 50
CONFIG = {"lr": 0.01, "weight_decay": 0.05, "warmup_steps": 20}
FLATTENED = {"head/kernel": {"torch": "head.weight", "split": [3, 2, 4, 3], "axes": [3, 2, 0, 1]}}
NETWORKS = {
    "mlp": (models.TorchMLP, models.NnxMLP, None),
    "cnn with BatchNorm": (models.TorchCNN, models.NnxCNN, FLATTENED),
    "transformer": (models.TorchTransformer, models.NnxTransformer, None),
}
# Largest difference of a weight over the largest movement. Measured: at most 1.1e-14 and 3.7e-6.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


@functools.cache
def transformation():
    """Returns the JAX side and its update, compiled once for each network and dtype."""
    tx = sfjax.schedule_free_adamw(0.01, 20, weight_decay=0.05)

    @jax.jit
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, update


class Crossing:
    """A torch run, the same network's leaves in Flax, the map between them, and gradients for both."""

    def __init__(self, network: str, dtype: str):
        torch_module, flax_module, user = NETWORKS[network]
        torch.manual_seed(0)
        self.dtype, self.model = dtype, torch_module().to(getattr(torch, dtype))
        self.optimizer = sftorch.AdamWScheduleFree(self.model.parameters(), **CONFIG)
        leaves = models.of_nnx(flax_module).leaves
        shapes = {name: leaf.shape for name, leaf in leaves.items()}
        self.map = names.between(shapes, models.torch_shapes(self.model), user)
        statistics = {name for name in leaves if {"mean", "var"} & set(name.split("/"))}
        self.params = {
            name: jnp.zeros(leaf.shape, dtype) for name, leaf in leaves.items() if name not in statistics
        }
        self.buffers = {name: jnp.zeros(leaves[name].shape, dtype) for name in statistics}
        self.tx, self.update = transformation()
        rng = np.random.default_rng(1)
        self.grads = [
            {name: rng.standard_normal(p.shape).astype(dtype) for name, p in self.model.named_parameters()}
            for _ in range(BEFORE + 2 * AFTER)
        ]

    def torch_weights(self) -> dict[str, np.ndarray]:
        return {name: value.detach().clone().numpy() for name, value in self.model.state_dict().items()}

    def torch_steps(self, first: int, last: int) -> None:
        for grads in self.grads[first:last]:
            for name, p in self.model.named_parameters():
                p.grad = torch.from_numpy(grads[name])
            self.optimizer.step()

    def jax_steps(self, params, state, first: int, last: int):
        for grads in self.grads[first:last]:
            missing = {name: value for name, value in self.torch_weights().items() if name not in grads}
            mapped = self.map.to_jax(grads | missing)
            params, state = self.update({name: jnp.asarray(mapped[name]) for name in params}, state, params)
        return params, state

    def gap(self, params, start: dict[str, np.ndarray]) -> float:
        mine, began = (self.map.to_jax(weights) for weights in (self.torch_weights(), start))
        moved = max(np.abs(mine[name] - began[name]).max() for name in params)
        return max(np.abs(mine[name] - np.asarray(params[name])).max() for name in params) / moved


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "dtype", [pytest.param(one, marks=[] if one == "float64" else pytest.mark.slow) for one in TOLERANCE]
)
def test_a_run_goes_on_in_the_other_framework_and_comes_back(network, dtype, tmp_path):
    with jax.enable_x64(dtype == "float64"):
        run = Crossing(network, dtype)
        start = run.torch_weights()
        run.torch_steps(0, BEFORE)
        with Checkpoints(tmp_path / "torch") as checkpoints:
            checkpoints.save(run.model, run.optimizer)
        there = import_exchange(
            tmp_path / "torch",
            run.params,
            run.tx.init(run.params),
            names=run.map,
            buffers=run.buffers,
            hyperparameters=AdamW(**CONFIG),
            strict=True,
        )
        run.torch_steps(BEFORE, BEFORE + AFTER)
        params, state = run.jax_steps(there.params, there.opt_state, BEFORE, BEFORE + AFTER)
        assert run.gap(params, start) <= TOLERANCE[dtype]

        export_exchange(
            tmp_path / "jax",
            params,
            state,
            step=BEFORE + AFTER,
            hyperparameters=AdamW(**CONFIG),
            names=run.map,
            buffers=there.extra_state,
        )
        with Checkpoints(tmp_path / "jax") as checkpoints:
            checkpoints.restore(run.model, run.optimizer)
        run.torch_steps(BEFORE + AFTER, BEFORE + 2 * AFTER)
        params, state = run.jax_steps(params, state, BEFORE + AFTER, BEFORE + 2 * AFTER)
        assert run.gap(params, start) <= TOLERANCE[dtype]


@pytest.mark.parametrize("network", ["mlp", pytest.param("cnn with BatchNorm", marks=pytest.mark.slow)])
def test_so_does_normuon_whose_rows_are_flaxs_columns(network, tmp_path):
    """A polar factor turns with its matrix; the row's second moment is a column's there."""
    with jax.enable_x64(True):
        run = Crossing(network, "float64")
        run.optimizer = sftorch.MuonScheduleFree(run.model.named_parameters(), normalize="rows", **CONFIG)
        config = Muon(**CONFIG, normalize="rows", output_axis="last")
        run.tx = sfjax.schedule_free_muon(0.01, 20, weight_decay=0.05, normalize="rows", output_axis="last")
        run.update = jax.jit(lambda g, s, p: _applied(run.tx, g, s, p))
        start = run.torch_weights()
        run.torch_steps(0, 15)
        with Checkpoints(tmp_path / "torch") as checkpoints:
            checkpoints.save(run.model, run.optimizer)
        params, buffers = run.params, run.buffers
        there = import_exchange(
            tmp_path / "torch",
            params,
            run.tx.init(params),
            names=run.map,
            buffers=buffers,
            hyperparameters=config,
        )
        run.torch_steps(15, 30)
        params, state = run.jax_steps(there.params, there.opt_state, 15, 30)
        # Measured: 3.4e-15.
        assert run.gap(params, start) <= TOLERANCE["float64"]
        rows = {name: u.shape for name, u in state.base_optimizer_state.row_nu.items() if u is not None}
        assert rows
        assert all(shape[:-1] == (1,) * (len(shape) - 1) for shape in rows.values())

        export_exchange(
            tmp_path / "jax",
            params,
            state,
            step=30,
            hyperparameters=config,
            names=run.map,
            buffers=there.extra_state,
        )
        with Checkpoints(tmp_path / "jax") as checkpoints:
            checkpoints.restore(run.model, run.optimizer)
        for p in run.optimizer.param_groups[0]["params"]:
            assert run.optimizer.state[p]["row_exp_avg_sq"].shape == (len(p), *[1] * (p.ndim - 1))
        run.torch_steps(30, 45)
        params, state = run.jax_steps(params, state, 30, 45)
        assert run.gap(params, start) <= TOLERANCE["float64"]


def _applied(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_from_jax_to_torch_and_back_is_the_identity(network, dtype, tmp_path):
    with jax.enable_x64(dtype == "float64"):
        run = Crossing(network, dtype)
        rng = np.random.default_rng(2)
        params = {name: jnp.asarray(rng.standard_normal(p.shape), dtype) for name, p in run.params.items()}
        buffers = {name: jnp.asarray(rng.random(b.shape) + 0.5, dtype) for name, b in run.buffers.items()}
        params, state = run.jax_steps(params, run.tx.init(params), 0, AFTER)
        config = AdamW(**CONFIG)
        export_exchange(
            tmp_path / "jax",
            params,
            state,
            step=AFTER,
            hyperparameters=config,
            names=run.map,
            buffers=buffers,
        )
        with Checkpoints(tmp_path / "jax") as checkpoints:
            checkpoints.restore(run.model, run.optimizer)
        with Checkpoints(tmp_path / "torch") as checkpoints:
            checkpoints.save(run.model, run.optimizer)
        target = jax.eval_shape(run.tx.init, params)
        back = import_exchange(
            tmp_path / "torch", run.params, target, names=run.map, buffers=run.buffers, hyperparameters=config
        )
        before, after = (
            jax.tree_util.tree_leaves_with_path(tree)
            for tree in ((params, state, buffers), (back.params, back.opt_state, back.extra_state))
        )
        unlike = [
            jax.tree_util.keystr(path)
            for (path, one), (_, other) in zip(before, after, strict=True)
            if np.asarray(one).tobytes() != np.asarray(other).tobytes()
        ]
        assert unlike == []


def test_a_warm_up_that_is_behind_the_parameters_is_said_to_jump_in_jax(tmp_path):
    run = Crossing("mlp", "float32")
    plain = torch.optim.AdamW(run.model.parameters())
    for grads in run.grads[:BEFORE]:
        for name, p in run.model.named_parameters():
            p.grad = torch.from_numpy(grads[name])
        plain.step()
    import_state_dict(run.optimizer, plain.state_dict())
    run.torch_steps(0, 3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(run.model, run.optimizer)
    there = import_exchange(tmp_path, run.params, run.tx.init(run.params), names=run.map, buffers=run.buffers)
    said = "the warm-up has come to step 3 of 20, the parameters to step 18: "
    assert sum(notice.startswith(said) for notice in there.notices) == 1
