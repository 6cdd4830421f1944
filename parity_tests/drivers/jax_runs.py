"""Runs in JAX: sfjax, alone and around a plain optax chain, and optax.contrib."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from parity_tests.cases import AVERAGING, Case
from parity_tests.drivers import names
from parity_tests.problems import LONGEST
from parity_tests.reference import Arrays, Reference
from parity_tests.trajectory import Iterates
from sfcore import laws

Tree = Any
Observe = Callable[[Tree, Tree], tuple[Tree, Tree, Tree]]
Options = dict[str, Any]
_TOLD = {"loss": "value"}
Make = Callable[[str, Options], optax.GradientTransformationExtraArgs]


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

    def __init__(
        self,
        make: Make,
        observe: Observe,
        case: Case,
        params: Arrays,
        dtype: str,
        ramped: bool = False,
        traced: bool = False,
        native: bool = False,
    ):
        """Starts a run.

        Args:
            make: (optimizer, canonical options, its lr a number or a schedule) -> transformation.
            observe: (state, params) -> x, y, z.
            case, params, dtype: as in `Driver.start`.
            ramped: the ramp of S2 is part of the schedule.
            traced: numbers are arguments of the compiled update, as under optax.inject_hyperparams, and cases
                that differ in nothing else share it. Otherwise they are constants, and each case compiles.
            native: it goes on by `step` of the transformation, not by update and apply_updates.
        """
        self.dtype, self.observe = dtype, observe
        with precision(dtype):
            options = case.options | {"lr": learning_rate(case, ramped)}
            self.params = self._tree(params)
            if traced:
                fixed = tuple((k, v) for k, v in options.items() if _decides(k, v))
                numbers = {k: v for k, v in options.items() if not _decides(k, v)}
                init, update = _traced(make, case.optimizer, fixed, native)
                self.state: Any = init(numbers, self.params)
                self._update: Any = functools.partial(update, numbers)
            else:
                tx = _made(make, case.optimizer, options)
                self.state = tx.init(self.params)
                self._update = jax.jit(functools.partial(_native_step if native else _step, tx))

    def _tree(self, arrays: Arrays) -> Tree:
        return {k: np.asarray(a, self.dtype) for k, a in arrays.items()}

    def update(self, grads: Arrays, lr: float, **told: Any) -> None:
        """Takes one step; lr is the schedule's, which the transformation reads itself."""
        with precision(self.dtype):
            extra = {_TOLD.get(name, name): value for name, value in told.items()}
            self.params, self.state = self._update(self.params, self.state, self._tree(grads), extra)

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
        buffers = {one.jax: truth.buffers[role] for role, one in laws.roles().items()}
        given = {}
        for field in getattr(base, "_fields", ()):
            held = getattr(base, field)
            if held is not None:  # a leaf may have none of it
                new = self._tree(buffers[field])
                given[field] = {k: None if one is None else new[k] for k, one in held.items()}
        self.params = self._tree(truth.y)
        self.state = self.state._replace(
            # At beta = 0 the parameters are z and the state holds x.
            z=self._tree(truth.x if truth.options["beta"] == 0 else truth.z),
            base_optimizer_state=base._replace(**given) if given else base,
            **scalars,
        )


def learning_rate(case: Case, ramped: bool = False) -> float | np.ndarray:
    """Returns a number, or a table of the lr at each step for a case that has a schedule or a ramp in it.

    Every table has the same length, so that all may share a program; it ends as the run does.
    """
    ramp_steps = case.options["warmup_steps"] if ramped else 0
    if case.schedule == "constant" and not ramp_steps:
        return float(case.options["lr"])
    table = np.asarray(case.lrs)
    if ramp_steps:
        table = table * np.minimum(1, np.arange(1, case.steps + 1) / ramp_steps)
    return np.pad(table, (0, max(0, LONGEST - len(table))), mode="edge")


def _made(make: Make, optimizer: str, options: Options) -> optax.GradientTransformationExtraArgs:
    table = options["lr"]
    schedule = (lambda step: jnp.asarray(table)[step]) if np.ndim(table) else table
    return make(optimizer, options | {"lr": schedule})


def _decides(name: str, value: Any) -> bool:
    """Tells whether an option decides what is computed and kept, and so cannot be traced."""
    return isinstance(value, bool | str) or (name == "inner_momentum" and value == 0)


def _step(tx: Any, params: Tree, state: Tree, grads: Tree, told: Options) -> tuple[Tree, Tree]:
    updates, state = tx.update(grads, state, params, **told)
    return optax.apply_updates(params, updates), state


def _native_step(tx: Any, params: Tree, state: Tree, grads: Tree, told: Options) -> tuple[Tree, Tree]:
    new: tuple[Tree, Tree] = tx.step(params, state, gradients=grads, **told)
    return new


@functools.cache
def _traced(make: Make, optimizer: str, fixed: tuple[tuple[str, Any], ...], native: bool) -> tuple[Any, Any]:
    """Returns init(numbers, params) and update(numbers, params, state, grads), each compiled once a shape."""

    def made(numbers: Options) -> Any:
        return _made(make, optimizer, dict(fixed) | numbers)

    def init(numbers: Options, params: Tree) -> Tree:
        return made(numbers).init(params)

    def update(numbers: Options, *of: Tree) -> tuple[Tree, Tree]:
        return (_native_step if native else _step)(made(numbers), *of)

    return jax.jit(init), jax.jit(update)


@functools.cache
def our_iterates() -> Observe:
    """Returns what looks into a run, compiled once for all cases whose states are alike."""
    import sfjax

    return jax.jit(lambda state, params: sfjax.iterates(state, params))


def ours(optimizer: str, options: Options) -> Any:
    """Returns sfjax's transformation."""
    import sfjax

    return getattr(sfjax, names.row(optimizer).jax)(**names.for_jax(options))


def wrapped(optimizer: str, options: Options) -> Any:
    """Returns the same transformation, made of optax's own parts and sfjax.schedule_free."""
    import sfjax

    o = options
    direction = optax.identity()
    if optimizer == "adamw":
        direction = optax.scale_by_adam(o["inner_momentum"], o["b2"], o["eps"])
    decay = optax.add_decayed_weights(o["weight_decay"])
    base = optax.chain(direction, decay, optax.scale_by_learning_rate(o["lr"]))
    averaging = names.for_jax({k: o[k] for k in AVERAGING if k != "lr"})
    return sfjax.schedule_free(base, o["lr"], **averaging)


@functools.cache
def optax_iterates() -> Observe:
    """Returns what looks into a run of optax.contrib."""
    from optax import contrib

    return jax.jit(lambda state, params: (contrib.schedule_free_eval_params(state, params), params, state.z))


def optax_contrib(optimizer: str, options: Options) -> Any:
    """Returns optax.contrib's transformation."""
    from optax import contrib

    return getattr(contrib, laws.LAWS[optimizer].elsewhere["optax.contrib"])(**names.for_optax(options))
