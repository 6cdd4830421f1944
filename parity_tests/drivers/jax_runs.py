"""Runs in JAX: sfjax, alone and around a plain optax chain, and optax.contrib."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from parity_tests.cases import Case
from parity_tests.drivers import names
from parity_tests.reference import Arrays, Reference
from parity_tests.trajectory import Iterates

Tree = Any
Observe = Callable[[Tree, Tree], tuple[Tree, Tree, Tree]]
Make = Callable[[Case], tuple[optax.GradientTransformationExtraArgs, Observe]]
FACTORIES = {"sgd": "schedule_free_sgd", "adamw": "schedule_free_adamw", "radam": "schedule_free_radam"}


def precision(dtype: str) -> Any:
    """Returns a context in which JAX computes in "float64" or "float32"."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(dtype == "float64")
    from jax import experimental  # jax < 0.8

    return experimental.enable_x64(dtype == "float64")  # type: ignore[attr-defined,unused-ignore]


class JaxRun:
    """A gradient transformation, its update compiled once, fed with recorded gradients.

    Attributes:
        params: what the user holds, y.
        state: the optimizer state.
    """

    def __init__(self, make: Make, case: Case, params: Arrays, dtype: str):
        self.dtype = dtype
        with precision(dtype):
            tx, self.observe = make(case)

            @jax.jit
            def update(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state

            self._update = update
            self.params = self._tree(params)
            self.state: Any = tx.init(self.params)

    def _tree(self, arrays: Arrays) -> Tree:
        return {k: np.asarray(a, self.dtype) for k, a in arrays.items()}

    def update(self, grads: Arrays, lr: float) -> None:
        """Takes one step; lr is the schedule's, which the transformation reads itself."""
        with precision(self.dtype):
            self.params, self.state = self._update(self.params, self.state, self._tree(grads))

    def iterates(self) -> Iterates:
        """Returns x, y and z."""
        with precision(self.dtype):
            seen = self.observe(self.state, self.params)
        x, y, z = ({k: np.asarray(a) for k, a in s.items()} for s in seen)
        return x, y, z

    def put(self, truth: Reference) -> None:
        """Overwrites params and the whole state with the reference's."""
        clock = {
            "step": truth.step,
            "lr_max": truth.lr_max,
            "weight_sum": truth.weight_sum,
            "weight_sum_low": 0.0,
        }
        scalars = {k: np.asarray(value, getattr(self.state, k).dtype) for k, value in clock.items()}
        base = self.state.base_optimizer_state
        moments = {"nu": truth.v, "mu": truth.m}
        given = {k: self._tree(a) for k, a in moments.items() if getattr(base, k, None) is not None}
        self.params = self._tree(truth.y)
        self.state = self.state._replace(
            # At beta = 0 the parameters are z and the state holds x.
            z=self._tree(truth.x if truth.options["beta"] == 0 else truth.z),
            base_optimizer_state=base._replace(**given) if given else base,
            **scalars,
        )


def learning_rate(case: Case, ramp_steps: int = 0) -> Any:
    """Returns a number, or a schedule for a case that has one or a ramp that belongs in it."""
    if case.schedule == "constant" and not ramp_steps:
        return case.options["lr"]
    table = np.asarray(case.lrs)
    if ramp_steps:
        table = table * np.minimum(1, np.arange(1, case.steps + 1) / ramp_steps)
    return lambda step: jnp.asarray(table)[step]


@functools.cache
def our_iterates() -> Observe:
    """Returns what looks into a run, compiled once for all cases whose states are alike."""
    import sfjax

    return jax.jit(lambda state, params: sfjax.iterates(state, params))


def ours(case: Case) -> Any:
    """Returns sfjax's transformation for a case."""
    import sfjax

    arguments = names.for_jax(case.options) | {"learning_rate": learning_rate(case)}
    return getattr(sfjax, FACTORIES[case.optimizer])(**arguments), our_iterates()


def wrapped(case: Case) -> Any:
    """Returns the same transformation, made of optax's own parts and sfjax.schedule_free."""
    import sfjax

    o = case.options
    lr = learning_rate(case, o["warmup_steps"])
    direction = optax.identity()
    if case.optimizer == "adamw":
        direction = optax.scale_by_adam(o["inner_momentum"], o["b2"], o["eps"])
    decay = optax.add_decayed_weights(o["weight_decay"])
    base = optax.chain(direction, decay, optax.scale_by_learning_rate(lr))
    averaging = {k: o[k] for k in ("r", "weight_lr_power", "prior_steps")}
    return sfjax.schedule_free(base, lr, b1=o["beta"], **averaging), our_iterates()


@functools.cache
def optax_iterates() -> Observe:
    """Returns what looks into a run of optax.contrib."""
    from optax import contrib

    return jax.jit(lambda state, params: (contrib.schedule_free_eval_params(state, params), params, state.z))


def optax_contrib(case: Case) -> Any:
    """Returns optax.contrib's transformation for a case."""
    from optax import contrib

    arguments = names.for_optax(case.options) | {"learning_rate": learning_rate(case)}
    return getattr(contrib, FACTORIES[case.optimizer])(**arguments), optax_iterates()
