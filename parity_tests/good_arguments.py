"""Good arguments of every public function, to stand beside a bad one, and what a refused call must leave."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

import sfjax
import sfjax.checkpoint
import sfjax.linen
import sfjax.nnx
import sftorch
import sftorch.checkpoint
from sfcore import exchange, laws, names, preemption, watch
from sfcore.meta import Meta


class World:
    """Good arguments of every function in the table, and all that a refused call must leave as it was.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files()
        self._torch()
        self._jax()
        self._flax()

    def _files(self) -> None:
        self.weights = self.folder / "x.safetensors"
        self.arrays = {"fc.weight": np.ones((3, 2), np.float32)}
        self.record = exchange.write_tensors(self.weights, self.arrays, {"weights_hold": "x"})
        self.names = names.to_torch({"fc/kernel": (2, 3)})
        self.recorder, self.watch = watch.Recorder(), watch.Watch({"steps": 20, "c": 0.1})
        self.preemption = preemption.Preemption(lambda: "nowhere")

    def _torch(self) -> None:
        self.module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        self.optimizer = sftorch.AdamWScheduleFree(self.module.parameters(), lr=0.1)
        other = torch.nn.Parameter(torch.ones(2))
        self.at_rest = sftorch.SGDScheduleFreeClosure([other], lr=0.1)
        self.wrapper = sftorch.ScheduleFreeWrapper(
            torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        )
        self.of_matrices = sftorch.MuonScheduleFree([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
        self.plain = torch.optim.AdamW(self.module.parameters())
        self.module(torch.ones(4, 2)).square().sum().backward()
        self.plain.step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.of_torch = sftorch.checkpoint.Checkpoints(self.folder / "torch", background=False)
        self.of_torch.save(self.module, self.optimizer)

    def _jax(self) -> None:
        self.tx = sfjax.schedule_free_sgd(0.1)
        self.params = {"w": jnp.ones(3)}
        self.state = self.tx.init(self.params)
        self.adam = optax.adam(0.1).init(self.params)
        self.of_jax = sfjax.checkpoint.Checkpoints(self.folder / "jax", background=False)
        self.saved = self.of_jax.save(0, self.params, self.state)
        self.exchanged = sfjax.checkpoint.export_exchange(
            self.folder / "exchange", self.params, self.state, step=0
        )

    def _flax(self) -> None:
        self.model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.nnx = nnx.Optimizer(self.model, sfjax.schedule_free_sgd(0.1), wrt=nnx.Param)
        self.of_flax = nnx.state((self.model, self.nnx))  # shares their variables
        self.of_nnx = sfjax.checkpoint.Checkpoints(self.folder / "nnx", background=False)
        sfjax.nnx.save(self.of_nnx, self.model, self.nnx)
        norm = flax.linen.BatchNorm(use_running_average=False)
        self.apply, self.variables = norm.apply, norm.init(jax.random.key(0), jnp.ones((4, 3)))
        self.train_state = sfjax.linen.TrainState.create(apply_fn=None, params=self.params, tx=self.tx)
        self.of_linen = sfjax.checkpoint.Checkpoints(self.folder / "linen", background=False)
        sfjax.linen.save(self.of_linen, self.train_state)

    def call(self, name: str, **bad: Any) -> Any:
        """Calls a public function with good arguments but for these."""
        owner, _, method = name.rpartition(".")
        function = getattr(self.owners[owner], method) if owner in self.owners else found(name)
        return function(**self.good(name) | bad)

    @property
    def owners(self) -> dict[str, Any]:
        """Class -> the object whose methods are called."""
        return {
            "sfcore.watch.Recorder": self.recorder,
            "sfcore.watch.Watch": self.watch,
            "sfcore.names.NameMap": self.names,
            "sfcore.preemption.Preemption": self.preemption,
            "sfjax.checkpoint.Checkpoints": self.of_jax,
            "sftorch.checkpoint.Checkpoints": self.of_torch,
            "sftorch.AdamWScheduleFree": self.optimizer,
            "sftorch.ScheduleFreeWrapper": self.wrapper,
            "sftorch.AdamWScheduleFreeClosure": self.at_rest,
            "sftorch.MuonScheduleFree": self.of_matrices,
        }

    def good(self, name: str) -> dict[str, Any]:
        """Returns the arguments that a function needs."""
        trees = {"params": self.params, "opt_state": self.state}
        live = {"model": self.module, "optimizer": self.optimizer}
        of_nnx = {"checkpoints": self.of_nnx, "model": self.model, "optimizer": self.nnx}
        of_linen = {"checkpoints": self.of_linen, "state": self.train_state}
        new = self.folder / f"of {name}"
        each: dict[str, dict[str, Any]] = {
            "sfcore.preemption.Preemption": {"save": lambda: "nowhere"},
            "sfcore.watch.step_of_x": {"c": 0.5, "gap": 1.0},
            "sfcore.watch.Watch": {"recent": None},
            "sfcore.watch.Watch.observe": {"c": 0.1},
            "sfcore.watch.Recorder.add": {"c": 0.1},
            "sfcore.restart.weights_only_policy": {"explicit": {}},
            "sfcore.names.NameMap": {"pairs": self.names.pairs},
            "sfcore.names.NameMap.torch_name": {"jax": "fc/kernel"},
            "sfcore.names.NameMap.jax_names": {"torch": "fc.weight"},
            "sfcore.names.NameMap.to_torch": {"arrays": {"fc/kernel": np.ones((2, 3))}},
            "sfcore.names.NameMap.to_jax": {"arrays": self.arrays},
            "sfcore.names.between": {"jax": {"fc/kernel": (2, 3)}, "torch": {"fc.weight": (3, 2)}},
            "sfcore.names.to_torch": {"jax": {"fc/kernel": (2, 3)}},
            "sfcore.names.to_jax": {"torch": {"fc.weight": (3, 2), "fc.bias": (3,)}},
            "sfcore.exchange.read_tensors": {"path": self.weights},
            "sfcore.exchange.write_tensors": {"path": new, "tensors": self.arrays},
            "sfcore.exchange.fingerprint": {"tensors": self.arrays},
            "sfcore.exchange.of_role": {"tensors": {"y/w": np.ones(2)}, "role": "y"},
            "sfcore.exchange.split": {"leaf": "y/w"},
            "sfcore.meta.Meta.from_json": {"text": Meta("jax", "sgd", 0).to_json()},
            "sfcore.inspection.inspect": {"path": self.weights},
            "sfcore.convert.convert": {"src": self.weights, "dst": new, "to": "inference"},
            "sfjax.schedule_free.schedule_free": {"base_optimizer": optax.sgd(0.1), "learning_rate": 0.1},
            "sfjax.schedule_free_eval_params": {"state": self.state, "params": self.params},
            "sfjax.iterates": {"state": self.state, "params": self.params},
            "sfjax.find_state": {"opt_state": self.state},
            "sfjax.find_states": {"opt_state": self.state},
            "sfjax.metrics": {"opt_state": self.state},
            "sfjax.describe": {"optimizer": sfjax.schedule_free_sgd},
            "sfjax.accumulate.accumulate": {"optimizer": self.tx, "every": 2},
            "sfjax.checkpoint.Checkpoints": {"folder": new},
            "sfjax.checkpoint.Checkpoints.save": {"step": 1, **trees},
            "sfjax.checkpoint.Checkpoints.restore": trees,
            "sfjax.checkpoint.Checkpoints.observe": trees,
            "sfjax.checkpoint.start_from_weights": {
                "weights": self.params,
                **trees,
                "hyperparameters": {"lr": 0.1},
            },
            "sfjax.checkpoint.import_optax": {
                "source_state": self.adam,
                "source_params": self.params,
                **trees,
                "hyperparameters": {"lr": 0.1},
            },
            "sfjax.checkpoint.export_exchange": {"folder": new, **trees, "step": 1},
            "sfjax.checkpoint.import_exchange": {"path": self.exchanged, **trees},
            "sfjax.checkpoint.read": {"path": self.saved},
            "sfjax.nnx.eval_model": {"model": self.model, "optimizer": self.nnx},
            "sfjax.nnx.save": of_nnx,
            "sfjax.nnx.step": {"model": self.model, "optimizer": self.nnx, "grads": nnx.state(self.model)},
            "sfjax.nnx.restore": of_nnx,
            "sfjax.linen.save": of_linen,
            "sfjax.linen.restore": of_linen,
            "sfjax.recalibrate.recalibrate": {"model": self.model, "batches": [jnp.ones((4, 3))]},
            "sfjax.recalibrate.recalibrate_linen": {
                "apply": self.apply,
                "variables": self.variables,
                "batches": [jnp.ones((4, 3))],
            },
            "sftorch.checkpoint.Checkpoints": {"folder": new},
            "sftorch.checkpoint.Checkpoints.save": live,
            "sftorch.checkpoint.Checkpoints.restore": live,
            "sftorch.checkpoint.Checkpoints.observe": {"optimizer": self.optimizer, "loss": 0.5},
            "sftorch.checkpoint.import_state_dict": {
                "optimizer": self.optimizer,
                "state_dict": self.plain.state_dict(),
            },
            "sftorch.AdamWScheduleFree.load_state_dict": {"state_dict": self.optimizer.state_dict()},
            "sftorch.AdamWScheduleFree.add_param_group": {"param_group": {"params": [torch.zeros(1)]}},
            "sftorch.ScheduleFreeWrapper.load_state_dict": {"state_dict": self.wrapper.state_dict()},
            "sftorch.ScheduleFreeWrapper.add_param_group": {"param_group": {"params": [torch.zeros(1)]}},
            "sftorch.AdamWScheduleFreeClosure.add_param_group": {"param_group": {"params": [torch.zeros(1)]}},
            "sftorch.MuonScheduleFree.add_param_group": {"param_group": {"params": [torch.zeros(1)]}},
            "sftorch.AdamWScheduleFreeClosure.step": {"closure": lambda: 0.0},
            "sftorch.ship_x": live,
            "sftorch.trainers.flat_metrics": {"optimizer": self.optimizer},
            "sftorch.step_in_backward": {"optimizer": self.optimizer},
            "sftorch.trainers.unwrap": {"optimizer": self.optimizer},
            "sftorch.AdamWScheduleFree.eval_state_dict": {"model": self.module},
            "sftorch.ScheduleFreeWrapper": {"base": torch.optim.SGD(self.module.parameters(), lr=0.1)},
            "sftorch.recalibrate.recalibrate": {"model": self.module, "batches": [torch.ones(4, 2)]},
        }
        if name not in each and name.removeprefix("sftorch.").removesuffix("Closure") in {
            law.torch for law in laws.directed().values()
        }:
            return {"params": self.module.parameters()}
        return each.get(name, {})


def found(name: str) -> Any:
    """Returns what a public dotted name leads to."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            thing = getattr(thing, part)
        return thing
    raise ImportError(name)
