"""The transformation: S1-S9 over a tree, along a direction of our own (S6) or whatever a base does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from sfcore import averaging, checks, laws, matrices
from sfcore.laws import JAX_NAMES, Buffer, Law
from sfjax.law import iterates
from sfjax.law.iterates import wide_dtype
from sfjax.law.scalars import Clock, Next, as_scalar, first_clock, next_step
from sfjax.state import arguments, forms
from sfjax.state.arguments import is_zero
from sfjax.state.eight import column as column_of
from sfjax.state.eight import dtype_of, gap_of, in_order
from sfjax.state.forms import ScheduleFreeState
from sfjax.step import eight, lean, native
from sfjax.step.native import Kernel, Scalars
from sfjax.step.transformation import Transformation, by_name

# Types of state that hold the buffers of a direction, by which a checkpoint knows one.
STATES: set[type] = {optax.EmptyState}
Factory = TypeVar("Factory", bound=Callable[..., Any])
Values = Mapping[str, Any]  # options by canonical name: Python numbers, scalars, and for lr also a schedule
_NONE_IS_0 = ("weight_decay", "warmup_steps")


class Direction(NamedTuple):
    """What an optimizer does with a gradient.

    Attributes:
        law: the name of its row in `sfcore.laws`.
        single: (gradient, buffers by name, *numbers) -> (direction, new buffers by name), of one leaf. All
            are real and of one dtype, at least float32; a complex leaf comes as its two parts.
        numbers: (options, t) -> the numbers to call it with; t is the one-based time.
        state: the NamedTuple of its buffers, which has their names in JAX; optax.EmptyState without any.
        many: the same as `single` for lists of gradients and of buffers, for leaves that are better taken
            together; None takes them one by one. It is given the numbers as they are.
        others: the direction of leaves that are no matrices, for a law that has two; None where it has one.
        kernel: the names of its numbers in `kernels.call.NUMBERS`; None where no kernel knows it.
    """

    law: str
    single: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    numbers: Callable[[Values, jax.Array], tuple[Any, ...]] = lambda values, t: ()
    state: type = optax.EmptyState
    many: Callable[..., list[tuple[jax.Array, dict[str, jax.Array]]]] | None = None
    others: Direction | None = None
    kernel: tuple[str, ...] | None = None


def known_options(law: str) -> Callable[[Factory], Factory]:
    """Makes the factory of a row name a misspelt keyword together with all else that is wrong."""

    def find(given: Mapping[str, Any]) -> list[str]:
        numbers = {
            name: value
            for name, value in given.items()
            if not isinstance(value, jax.core.Tracer) and not callable(value) and value is not None
        }
        return laws.law_of(law).problems("jax", numbers)

    return checks.with_known_options(find, lambda: laws.law_of(law).words("jax"))


def directed(direction: Direction, given: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """Returns the Schedule-Free transformation along a direction.

    Args:
        direction: its row must be in `sfcore.laws.LAWS`.
        given: to the factory, by name: the row's options by their names in JAX, and mask, state_dtype,
            precision and seed.

    Raises:
        HyperparameterError: with every value that is out of range.
    """
    STATES.add(direction.state)
    law, mask = laws.law_of(direction.law), given["mask"]
    arguments.check_mask(mask)
    options = {name: given[JAX_NAMES.get(name, name)] for name in law.defaults}
    options |= {name: 0 for name in _NONE_IS_0 if name in options and options[name] is None}
    values = arguments.read(law.options, **options)
    precision = arguments.read_precision(given, values["beta"], law)
    decays = zip("yz", averaging.DECAYS[values.get("decay_at", "y")](values["weight_decay"]), strict=True)
    pulls = [(at, wd) for at, wd in decays if not is_zero(wd)]
    # The raw arguments: an injected 0 keeps a buffer, in tx.init and under jit alike.
    held = _Buffers(direction, law, options, given, precision)

    def delta(
        grads: Any, state: Any, ys: Any, zs: Callable[[], Any], given_scalars: Scalars, extra_args: Any
    ) -> tuple[Any, Any]:
        k = given_scalars.next
        leaves, tree = jax.tree.flatten(grads)
        columns = {name: tree.flatten_up_to(one) for name, one in state._asdict().items() if one is not None}
        before = [
            {name: column[i].astype(g.dtype) for name, column in columns.items() if column[i] is not None}
            for i, g in enumerate(leaves)
        ]
        masked = [True] * len(leaves) if mask is None else jax.tree.leaves(arguments.decay_mask(mask, ys))
        points = [(wd, jax.tree.leaves(ys if at == "y" else zs())) for at, wd in given_scalars.decays.items()]
        kinds = [""] * len(leaves) if direction.others is None else held.kinds(ys)
        decay_power = values.get("decay_power", 1)
        deltas, after = list(leaves), list(before)
        for kind in dict.fromkeys(kinds):
            own = direction.others if kind == matrices.OTHERS and direction.others else direction
            ratio = values["adam_lr_ratio"] if kind == matrices.OTHERS else 1.0
            lr_t, lr_max = k.lr_t * ratio, k.clock.lr_max * ratio
            scale = averaging.decay_scale(lr_t, lr_max, decay_power, jnp) if points else 0  # F6
            rows = [i for i, other in enumerate(kinds) if other == kind]
            gs, buffers = [leaves[i] for i in rows], [before[i] for i in rows]
            numbers = given_scalars.own if own is direction else own.numbers(values, k.t)
            if own.many is not None:
                found = own.many(gs, buffers, *numbers)
            else:
                found = [
                    _of_complex(own, g, of_g, numbers)
                    if jnp.iscomplexobj(g)
                    else own.single(g, of_g, *(jnp.asarray(number, g.dtype) for number in numbers))
                    for g, of_g in zip(gs, buffers, strict=True)
                ]
            for i, (d, moved) in zip(rows, found, strict=True):
                for wd, point in points if masked[i] else ():
                    d = d + jnp.asarray(wd * scale, d.dtype) * point[i].astype(d.dtype)
                deltas[i] = -lr_t.astype(d.dtype) * d  # S6
                after[i] = moved
        for name, column in columns.items():
            for i, old in enumerate(column):
                if old is not None:
                    column[i] = after[i][name]
                    if old.dtype == forms.NARROW:  # the lean form
                        draw = lean.Draw(given["seed"], i, k.clock.step)
                        column[i] = lean.rounded(column[i], draw, column_of(name, state))
        trees = {name: tree.unflatten(column) for name, column in columns.items()}
        return tree.unflatten(deltas), state._replace(**trees)

    kernel = native.kernel_of(law, direction.kernel, values, mask) if precision != forms.EIGHT else None
    own = direction.numbers, dict(pulls)
    return build(held.init, delta, law, values, given["state_dtype"], precision, given["seed"], own, kernel)


class _Buffers:
    """The buffers of a direction: which leaves have which, in which shape and dtype."""

    def __init__(
        self,
        direction: Direction,
        law: Law,
        options: Mapping[str, Any],
        given: Mapping[str, Any],
        precision: str,
    ):
        self._state, self._options, self._precision = direction.state, options, precision
        self._has_kinds = direction.others is not None
        self._fields: tuple[str, ...] = direction.state._fields  # type: ignore[attr-defined]
        self._kept = {one.jax: one for one in law.kept(options)}
        if not set(self._kept) <= set(self._fields):
            raise TypeError(
                f"{direction.state.__name__} must have the buffers of the law {law.name!r}, got the fields "
                f"{self._fields}: name them {sorted(self._kept)}"
            )

        self._mask = given.get("muon_mask")

    def kinds(self, params: Any) -> list[str]:
        """Returns "matrices" or "others" for each leaf, of a law of two directions."""
        return arguments.kinds_of_leaves(params, self._mask, self._options["output_axis"])

    def init(self, params: Any) -> Any:
        """Returns zeros; None at leaves that have none of a buffer, and for one that no leaf has."""
        # Of what has no leaves, such as optax's placeholder for params, the tree is all there is.
        leaves, tree = jax.tree.flatten(params)
        kinds = self.kinds(params) if self._has_kinds else [""] * len(leaves)

        def zeros(buffer: Buffer, p: Any, kind: str) -> Any:
            if not buffer.is_kept(self._options, kind):
                return None
            form = forms.form_of(self._precision, p)
            dtype = {forms.LEAN: forms.NARROW, forms.EIGHT: dtype_of(buffer)}.get(form, wide_dtype(p))
            shape = buffer.shape(p.shape, self._options)
            # Of what is laid out along the rows as p is.
            axes = tuple(i for i, size in enumerate(shape) if size != p.shape[i])
            return forms.zeros_alike(p.max(axes, keepdims=True) if axes else p, dtype)

        def column(buffer: Buffer) -> Any:
            return tree.unflatten(zeros(buffer, *one) for one in zip(leaves, kinds, strict=True))

        kept = self._kept
        return self._state(*(column(kept[name]) if name in kept else None for name in self._fields))


def _of_complex(direction: Direction, g: jax.Array, buffers: dict[str, jax.Array], numbers: Any) -> Any:
    """Returns the direction of a complex leaf and its new buffers, by its two parts."""
    parts = ((f(g), {name: f(one) for name, one in buffers.items()}) for f in (jnp.real, jnp.imag))
    own = [jnp.asarray(number, jnp.real(g).dtype) for number in numbers]
    return jax.tree.map(jax.lax.complex, *(direction.single(*part, *own) for part in parts))


def _no_numbers(values: Values, t: jax.Array) -> tuple[Any, ...]:
    return ()


def build(
    init: Callable[[Any], Any],
    delta: Callable[..., tuple[Any, Any]],
    law: Law,
    values: Values,
    state_dtype: Any,
    precision: str = forms.EXACT,
    seed: Any = 0,
    own: tuple[Callable[[Values, jax.Array], tuple[Any, ...]], dict[str, Any]] = (_no_numbers, {}),
    kernel: Kernel | None = None,
) -> Transformation:
    """Returns the transformation.

    Args:
        init: params -> the state of what moves z.
        delta: (grads, that state, y, z, scalars of the step, extra_args) -> (tree of S6's delta, state).
            Gradients come in wide dtype, and for parameters of 16 bits y is all of it, in float32; z is a
            function that returns its tree.
        law: whose rules the scalars follow.
        values: as `arguments.read` returns them.
        state_dtype, seed: as in the factories.
        precision: the form of parameters and state, as in the factories.
        own: how a direction's numbers follow from the options and the time, and the decays by their point.
        kernel: what runs a step on a CPU; None if none can.
    """
    numbers, decays = own
    state_dtype = arguments.read_dtype(state_dtype)
    kept_rests = kept_scales = False

    def init_fn(params: Any) -> ScheduleFreeState:
        nonlocal kept_rests, kept_scales
        arguments.check_params(params)
        arguments.check_narrow(params, precision)
        y_rest = forms.new_rests(params, precision)
        is_abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
        base = jax.eval_shape(init, params) if is_abstract else init(params)
        scale = forms.new_scales(params, precision, len(in_order(base)))
        if is_abstract:
            wide = forms.abstract_init(lambda p: init_fn(p)._replace(y_rest=None, scale=None), params)
            return wide._replace(y_rest=y_rest, scale=scale)
        # optax.tree.map_params calls this with a placeholder, to match it with a state that was made before.
        kept_rests, kept_scales = kept_rests or y_rest is not None, kept_scales or scale is not None
        scalars = {"lr": as_scalar(0.0), "c": as_scalar(0.0), **first_clock(values)._asdict()}
        return ScheduleFreeState(
            **forms.on_every_device(scalars, params),
            base_optimizer_state=base,
            z=jax.tree.map(lambda p: forms.first_buffer(p, precision, state_dtype), params),
            y_rest=params if kept_rests and not jax.tree.leaves(params) else y_rest,
            scale=params if kept_scales and not jax.tree.leaves(params) else scale,
        )

    def updated(
        given: Scalars,
        updates: Any,
        state: ScheduleFreeState,
        params: Any,
        extra_args: Any,
        after: list[Any] | None = None,  # the exponents, once they are known
    ) -> tuple[Any, ScheduleFreeState]:
        held, rests, scales, tree = forms.leaves_of(updates, state, params, precision)
        stored, k = jax.tree.leaves(state.z), given.next
        whole = [p if rest is None else forms.whole(p, rest) for p, rest in zip(held, rests, strict=True)]
        ys = tree.unflatten(whole)

        def zs() -> Any:
            found = map(forms.opened, held, stored, rests, scales)
            return tree.unflatten(iterates.recover_z(y, buffer, state.b1) for y, buffer in found)

        grads = jax.tree.map(lambda g, y: g.astype(wide_dtype(y)), updates, ys)
        in_codes, base = any(scale is not None for scale in scales), state.base_optimizer_state
        opened = eight.open_(base, scales, tree) if in_codes else base
        deltas, base_state = delta(grads, opened, ys, zs, given, extra_args)
        columns = list(zip(held, whole, stored, jax.tree.leaves(deltas), rests, scales, strict=True))
        if in_codes and after is None:
            after = eight.scale_after(columns, base_state, tree, k, state.b1)
            if eight.is_compiled(updates):
                updates, state = eight.again((updates, state))
                return updated(given, updates, state, params, extra_args, after)
        if precision == forms.EXACT:
            moved = [_advance(p, y, buffer, d, k, rest) for p, y, buffer, d, rest, _ in columns]
        else:
            draws = (lean.Draw(seed, i, k.clock.step) for i in range(len(held)))
            rows = zip(columns, draws, after or scales, strict=True)
            moved = [_advance_in_form(leaves, k, state.b1, *row) for leaves, *row in rows]
            if after:
                scales, base_state = after, eight.close(base_state, base, after, tree, seed, k.clock.step)
        return tree.unflatten(update for update, _, _ in moved), ScheduleFreeState(
            lr=k.lr_t,
            c=k.c,
            base_optimizer_state=base_state,
            z=tree.unflatten(z for _, z, _ in moved),
            y_rest=state.y_rest if state.y_rest is None else tree.unflatten(rest for *_, rest in moved),
            scale=state.scale if state.scale is None else tree.unflatten(scales),
            **k.clock._asdict(),
        )

    def update_fn(
        updates: Any, state: ScheduleFreeState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ScheduleFreeState]:
        forms.leaves_of(updates, state, params, precision)  # before anything is made of them
        k = next_step(law, Clock(*(getattr(state, name) for name in Clock._fields)), values)
        return updated(Scalars(k, numbers(values, k.t), decays), updates, state, params, extra_args)

    def step(params: Any, state: Any, gradients: Any, extra_args: Any) -> tuple[Any, ScheduleFreeState]:
        forms.leaves_of(gradients, state, params, precision)
        k = next_step(law, Clock(*(getattr(state, name) for name in Clock._fields)), values)
        given = Scalars(k, numbers(values, k.t), decays)

        def plain(given: Scalars, params: Any, state: Any, gradients: Any) -> tuple[Any, ScheduleFreeState]:
            updates, state = updated(given, gradients, state, params, extra_args)
            return optax.apply_updates(params, updates), state

        found = None if kernel is None else native.step(kernel, plain, given, params, state, gradients)
        return plain(given, params, state, gradients) if found is None else found

    found = Transformation(init_fn, update_fn)
    found.step = by_name(step)
    return found


def _advance_in_form(
    leaves: tuple[Any, ...], k: Next, beta: jax.Array, draw: lean.Draw, after: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """Takes one step of a parameter in its form; returns what `_advance` does.

    Args:
        leaves: the parameter, y, what is stored beside it, delta, the rest and the exponents, or None.
        k, draw: of the step.
        beta: that built y.
        after: the exponents after the step.
    """
    p, y, stored, delta, rest, scale = leaves
    if scale is not None:
        return eight.advance(p, y, gap_of(stored, rest, scale), delta, k, beta, draw, after)
    if forms.is_lean(rest):
        return lean.advance(p, y, stored, delta, k, beta, draw)
    return _advance(p, y, stored, delta, k, rest)


def _advance(
    p: jax.Array, y: jax.Array, stored: jax.Array, delta: jax.Array, k: Next, rest: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """Takes one step of a parameter; returns its update, the new buffer and the new rest or None."""
    wide = wide_dtype(p, stored)
    y, buffer, delta = (leaf.astype(wide) for leaf in (y, stored, delta))
    step, new = iterates.advance(y, buffer, delta, k, stored.dtype)
    if rest is None:
        update = step.astype(p.dtype)
        y_new = (p + update).astype(wide)
    else:
        y_new = y + step
        update, rest = forms.split(y_new, p)
    if k.will_store_x is not False:
        new = jnp.where(k.will_store_x, iterates.average(y, buffer, y_new, k), new)
    return update, new.astype(stored.dtype), rest
