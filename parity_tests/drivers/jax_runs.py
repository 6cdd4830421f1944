"""Runs in JAX: sfjax, alone and around a plain optax chain, and optax.contrib."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from parity_tests.cases import Case
from parity_tests.drivers import names
from parity_tests.reference import Arrays, Reference

Transformation = Any
Tree = Any
Make = Callable[[Case], tuple[Transformation, Callable[[Tree, Tree], tuple[Tree, Tree, Tree]]]]
FACTORIES = {"sgd": "schedule_free_sgd", "adamw": "schedule_free_adamw", "radam": "schedule_free_radam"}


def precision(dtype: str) -> Any:
    """Returns a context in which JAX computes in "float64" or "float32"."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(dtype == "float64")
    from jax.experimental import enable_x64  # jax < 0.8

    return enable_x64(dtype == "float64")


class JaxRun:
    """A gradient transformation, its update compiled once, fed with recorded gradients.

    Attributes:
        params: what the user holds, y.
        state: the optimizer state.
    """

    def __init__(self, make: Make, case: Case, params: Arrays, dtype: str):
        self.dtype = dtype
        with precision(dtype):
            tx, iterates = make(case)

            @jax.jit
            def update(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree, Tree]:
                updates, state = tx.update(grads, state, params)
                params = optax.apply_updates(params, updates)
                return params, state, iterates(state, params)

            self._update = update
            self.params = {k: jnp.asarray(p, dtype) for k, p in params.items()}
            self.state = tx.init(self.params)
            self._seen = iterates(self.state, self.params)

    def update(self, grads: Arrays, lr: float) -> None:
        """Takes one step; lr is the schedule's, which the transformation has read itself."""
        with precision(self.dtype):
            typed = {k: jnp.asarray(g, self.dtype) for k, g in grads.items()}
            self.params, self.state, self._seen = self._update(self.params, self.state, typed)

    def put(self, truth: Reference) -> None:
        """Overwrites params and the whole state with the reference's."""
        with precision(self.dtype):
            x, y, z, m, v = (
                {k: jnp.asarray(a, self.dtype) for k, a in s.items()}
                for s in (truth.x, truth.y, truth.z, truth.m, truth.v)
            )
            base = self.state.base_optimizer_state
            moments = {"nu": v, "mu": m}
            given = {k: a for k, a in moments.items() if getattr(base, k, None) is not None}
            scalars = {
                k: jnp.asarray(value, getattr(self.state, k).dtype)
                for k, value in {
                    "step": truth.step,
                    "lr_max": truth.lr_max,
                    "weight_sum": truth.weight_sum,
                    "weight_sum_low": 0.0,
                }.items()
            }
            self.params = y
            self.state = self.state._replace(
                z=x if truth.options["beta"] == 0 else z,
                base_optimizer_state=base._replace(**given) if given else base,
                **scalars,
            )

    def iterates(self) -> tuple[Arrays, Arrays, Arrays]:
        """Returns x, y and z."""
        x, y, z = ({k: np.asarray(a) for k, a in s.items()} for s in self._seen)
        return x, y, z


def learning_rate(case: Case) -> Any:
    """Returns a number, or a schedule for a case that has one."""
    if case.schedule == "constant":
        return case.options["lr"]
    table = np.asarray(case.lrs)
    return lambda step: jnp.asarray(table)[step]


def ours(case: Case) -> Any:
    """Returns sfjax's transformation for a case."""
    import sfjax

    arguments = names.for_jax(case.options) | {"learning_rate": learning_rate(case)}
    tx = getattr(sfjax, FACTORIES[case.optimizer])(**arguments)
    return tx, lambda state, params: sfjax.iterates(sfjax.find_state(state), params)


def wrapped(case: Case) -> Any:
    """Returns the same transformation, made of optax's own parts and sfjax.schedule_free."""
    import sfjax

    o = case.options
    lr = learning_rate(case)
    if o["warmup_steps"]:
        table = np.asarray(case.lrs) * np.minimum(1, np.arange(1, case.steps + 1) / o["warmup_steps"])
        lr = lambda step: jnp.asarray(table)[step]  # noqa: E731  (optax's own warm-ups start at 0)
    if case.optimizer == "sgd":
        direction = optax.identity()
    else:
        direction = optax.scale_by_adam(o["inner_momentum"], o["b2"], o["eps"])
    base = optax.chain(
        direction, optax.add_decayed_weights(o["weight_decay"]), optax.scale_by_learning_rate(lr)
    )
    averaging = {k: o[k] for k in ("r", "weight_lr_power", "prior_steps")}
    tx = sfjax.schedule_free(base, lr, b1=o["beta"], **averaging)
    return tx, lambda state, params: sfjax.iterates(sfjax.find_state(state), params)


def optax_contrib(case: Case) -> Any:
    """Returns optax.contrib's transformation for a case."""
    import optax.contrib

    arguments = names.for_optax(case.options) | {"learning_rate": learning_rate(case)}
    tx = getattr(optax.contrib, FACTORIES[case.optimizer])(**arguments)
    return tx, lambda state, params: (optax.contrib.schedule_free_eval_params(state, params), params, state.z)
