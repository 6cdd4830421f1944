"""Schedule-Free Muon: a matrix moves along the polar factor of its momentum (S6), the rest by AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from sfcore import matrices
from sfjax.adamw import ADAMW
from sfjax.state.arguments import Scalar, ScalarOrSchedule, Whole, check_mask
from sfjax.step.plan import Direction, directed, known_options


class MuonState(NamedTuple):
    """Buffers of Muon; each a tree of the parameters with None at leaves that have none, at least float32.

    Attributes:
        momentum: of matrices.
        nu: second moment v, of all others.
        row_nu: second moment u of the rows of matrices, of size 1 in all axes but that of the outputs; None
            with normalize="none".
    """

    momentum: Any
    nu: Any
    row_nu: Any


class Numbers(NamedTuple):
    """What `polar_many` is called with; the last four decide what is computed and are no arrays."""

    share: Any
    share_rows: Any
    eps: Any
    ns_steps: Any
    nesterov: bool
    adjust_lr: str
    output_axis: str


def muon_numbers(values: Mapping[str, Any], t: jax.Array) -> Numbers:
    """Returns what `polar_many` is called with; none of it depends on time."""
    shares = (1.0 - values[name] for name in ("mu", "b2_rows"))
    return Numbers(*shares, *(values[name] for name in ("eps", *Numbers._fields[3:])))


def muon_many(gs: list[jax.Array], buffers: list[dict[str, jax.Array]], *given: Any) -> Any:
    """Returns Muon's directions, and the buffers: of which that of the rows is there or not.

    Newton-Schulz takes the matrices of one shape, or of its transpose, at once.
    """
    numbers = Numbers(*given)
    axis = matrices.axis_of_rows(numbers.output_axis)
    moved, wanted = [], []
    for g, held in zip(gs, buffers, strict=True):
        share = jnp.asarray(numbers.share, g.dtype)
        m = (held["momentum"] - share * held["momentum"]) + share * g
        n = (m - share * m) + share * g if numbers.nesterov else m
        moved.append({"momentum": m})
        wanted.append(_as_rows(_whole(n), axis))
    found = []
    for g, held, after, p in zip(gs, buffers, moved, _polar_factors(wanted, numbers.ns_steps), strict=True):
        rows, cols = p.shape
        if "row_nu" in held:
            share, eps = (jnp.asarray(one, g.dtype) for one in (numbers.share_rows, numbers.eps))
            u = _whole(held["row_nu"]).reshape(rows, 1)
            u = (u - share * u) + share * jnp.mean(p * p, axis=1, keepdims=True)
            after["row_nu"] = _laid_out(u.reshape(held["row_nu"].shape), held["row_nu"])
            q = p / (_root(u) + eps)
            size = _norm(q)
            d = q * (matrices.size(rows, cols, numbers.adjust_lr, _norm(p)) / jnp.where(size > 0, size, 1.0))
        else:
            d = p * matrices.length(rows, cols, numbers.adjust_lr)
        found.append((_laid_out(_as_leaf(d, g.shape, axis), g), after))  # S6
    return found


def _as_rows(leaf: jax.Array, axis: int) -> jax.Array:
    """Returns a leaf as [rows, rest]."""
    return jnp.moveaxis(leaf, axis, 0).reshape(leaf.shape[axis], -1)


def _as_leaf(rows: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Returns [rows, rest] in the shape of a leaf."""
    others = shape[1:] if axis == 0 else shape[:-1]
    return jnp.moveaxis(rows.reshape(shape[axis], *others), 0, axis)


def _whole(leaf: jax.Array) -> jax.Array:
    """Returns all of a leaf on every device of a mesh of Explicit axes; Auto ones are the compiler's."""
    if not _is_divided(leaf):
        return leaf
    everywhere = PartitionSpec(*[None] * leaf.ndim)
    return jax.sharding.reshard(leaf, NamedSharding(jax.typeof(leaf).sharding.mesh, everywhere))


def _laid_out(value: jax.Array, leaf: jax.Array) -> jax.Array:
    """Returns a value laid out as a leaf."""
    return jax.sharding.reshard(value, jax.typeof(leaf).sharding) if _is_divided(leaf) else value


def _is_divided(leaf: jax.Array) -> bool:
    """Tells whether the type of a leaf says so, as on a mesh of Explicit axes."""
    sharding = jax.typeof(leaf).sharding
    return any(axis is not None for axis in getattr(sharding, "spec", ()))


def _polar_factors(wanted: list[jax.Array], steps: Any) -> list[jax.Array]:
    """Returns the polar factor of each matrix."""
    wide = [n.T if n.shape[0] > n.shape[1] else n for n in wanted]
    alike: dict[Any, list[int]] = {}
    for i, n in enumerate(wide):
        alike.setdefault((n.shape, n.dtype), []).append(i)
    found = list(wide)
    for places in alike.values():
        factors = polar(jnp.stack([wide[i] for i in places]), steps)
        for i, factor in zip(places, factors, strict=True):
            found[i] = factor
    return [p.T if n.shape[0] > n.shape[1] else p for n, p in zip(wanted, found, strict=True)]


def polar(n: jax.Array, steps: Any) -> jax.Array:
    """Returns about the polar factor of matrices [..., rows, cols] with rows <= cols, by Newton-Schulz.

    Its singular values come to lie between 0.7 and 1.2 or so; small ones of a matrix that is nearly of lower
    rank stay smaller. In bfloat16 on accelerators, where that is many times as fast; elsewhere in n's dtype.
    """
    if n.dtype != jnp.float32:
        return _iterated(n, steps)
    return jax.lax.platform_dependent(
        n,
        cpu=lambda n: _iterated(n, steps),
        default=lambda n: _iterated(n, steps, jnp.bfloat16),
    )


def _iterated(n: jax.Array, steps: Any, dtype: Any = None) -> jax.Array:
    a, b, c = matrices.NEWTON_SCHULZ

    def once(_: Any, x: jax.Array) -> jax.Array:
        gram = x @ jnp.swapaxes(x, -1, -2)
        return a * x + (b * gram + c * (gram @ gram)) @ x

    x = (n / (_norm(n) + matrices.TINY)).astype(dtype or n.dtype)
    if isinstance(steps, int | float):
        for place in range(int(steps)):
            x = once(place, x)
    else:
        x = jax.lax.fori_loop(0, steps.astype(jnp.int32), once, x)
    return x.astype(n.dtype)


def _norm(n: jax.Array) -> jax.Array:
    """Returns the Frobenius norm of matrices, of shape [..., 1, 1]."""
    return _root(jnp.sum(n * n, axis=(-2, -1), keepdims=True))


def _root(v: jax.Array) -> jax.Array:
    """Returns the root, with the gradient 0 at 0."""
    positive = v > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, v, 1.0)), v)


def _alone(g: jax.Array, buffers: dict[str, jax.Array], *numbers: Any) -> Any:
    """Returns Muon's direction of one matrix, and its buffers."""
    (found,) = muon_many([g], [buffers], *numbers)
    return found


MUON = Direction("muon", _alone, muon_numbers, MuonState, muon_many, ADAMW)


@known_options("muon")
def schedule_free_muon(
    learning_rate: ScalarOrSchedule = 0.0025,
    warmup_steps: Whole | None = 0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | None = 0.0,
    weight_lr_power: Scalar = 2.0,
    state_dtype: DTypeLike | None = None,
    *,
    r: Scalar = 0.0,
    prior_steps: Whole = 0,
    c_warmup: Whole = 0,
    refined_c: Scalar = 0.0,
    window: Scalar = 0,
    window_rule: Literal["floor", "constant"] = "floor",
    weight_lr: Literal["max", "current"] = "max",
    b1_rule: Literal["constant", "anneal", "amuse"] = "constant",
    b1_max: Scalar = 0.965,
    b1_anneal_steps: Whole = 0,
    b1_hold_steps: Whole = 0,
    rho: Scalar = 0.8,
    decay_at: Literal["y", "z"] = "y",
    decay_power: Literal[1, 2, "normalized"] = 1,
    mu: Scalar = 0.95,
    ns_steps: Whole = 5,
    nesterov: bool = True,
    normalize: Literal["none", "rows"] = "none",
    b2_rows: Scalar = 0.95,
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
    output_axis: Literal["first", "last"] = "first",
    adam_lr_ratio: Scalar = 1.0,
    muon_mask: Any = None,
    precision: Literal["exact", "lean"] = "exact",
    seed: Whole = 0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Schedule-Free Muon: matrices step along a polar factor, all else by AdamW, with one average.

    The momentum m of a matrix and its gradient give h = (1 - mu) g + mu m; Newton-Schulz iterations bring the
    singular values of h near 1. With normalize="rows" (NorMuon) rows are then brought to one size.

    Args:
        learning_rate: >= 0, default 0.0025: number, array of one element, traced value, or schedule of
            the step from 0. With adjust_lr="match_rms_adamw" one that suits AdamW.
        warmup_steps: updates of linear warm-up, default 0 (None is 0); about 5% of a run helps.
        b1: interpolation beta of y = beta x + (1 - beta) z, in [0, 1], default 0.9.
        b2: decay of the second moment of what is no matrix, in [0, 1), default 0.999.
        eps: added to denominators outside the root, > 0, default 1e-8.
        weight_decay: decoupled decay taken at y, >= 0, default 0 (None is 0).
        weight_lr_power: the average weighs a step by the largest lr so far to this power, >= 0, default 2.
        state_dtype: dtype of z (at b1 = 0 of x); None (default) is the parameter's own, at least float32.
        r: the average also weighs step t by t^r, >= 0, default 0.
        prior_steps: the initial weights count as the average of this many earlier steps, default 0.
        c_warmup: x is z in this many first steps, which do not count in the average (F5), default 0.
        refined_c: c is multiplied by (1 - beta) times this, up to 1 (F5), >= 0; 0 (default) is off.
        window: c is at least 1 / window, so that the average forgets what is older (F5); 0 (default) is off.
        window_rule: "floor" (default), or "constant" for c = 1 / window in every step.
        weight_lr: a step is weighed by "max" (default), the largest lr so far, or by "current", its own.
        b1_rule: "constant" (default); "anneal" lets 1 - b1 fall to 1 - b1_max, on a line of logarithms,
            "amuse" by a power of time (F9), so that x stays the weighted mean. Not beside a schedule for b1.
        b1_max: where "anneal" ends, >= b1 and < 1, default 0.965.
        b1_anneal_steps: the steps in which it gets there.
        b1_hold_steps: steps > 1 before "amuse" begins, mostly those of the warm-up.
        rho: of "amuse", > 0, default 0.8: 1 - b1 is its first one times ((b1_hold_steps - 1) / (t - 1))^rho.
        decay_at: the point that decays, "y" (default, as in the other optimizers here) or "z", as published
            for Schedule-Free NorMuon and AMUSE.
        decay_power: weight_decay is multiplied by lr to this power, 1 (default) or 2 (AdamC); "normalized" is
            AdamC's too, lr^2 over the largest lr so far, whose weight_decay is like AdamW's.
        mu: decay of the momentum, in [0, 1), default 0.95.
        ns_steps: Newton-Schulz iterations, 1 to 99, default 5; name it in static_args of inject_hyperparams
            to differentiate through a step.
        nesterov: whether h is (1 - mu) g + mu m (default), or m.
        normalize: "none" (default), or "rows" for NorMuon, which keeps one number more a row.
        b2_rows: decay of the second moment of rows, in [0, 1), default 0.95.
        adjust_lr: a polar factor is multiplied by 0.2 sqrt(max(rows, cols)) with "match_rms_adamw" (default),
            by sqrt(max(1, rows / cols)) with "original".
        output_axis: the axis that rows are counted along, "first" (default; torch, Equinox) or "last" (Flax).
            Matrices of two axes have the same direction either way with the two defaults above.
        adam_lr_ratio: what is no matrix has lr times this, >= 0, default 1.
        muon_mask: tree of bools, or function of params giving one: the leaves that are matrices, of two axes
            or more and real. None (default): all such leaves but embeddings, heads, biases and scales, which
            are told by their names.
        precision: "exact" (default) keeps parameters of 16 bits as a float32 run would have them; "lean"
            keeps z - y and the buffers in bfloat16, rounded at random, and the rest of y in int16.
        seed: of the rounding, default 0; whole, >= 0.
        mask: tree of bools, or function of params giving one: the leaves that decay; None is all.

    Returns:
        A transformation whose `update` needs params. Its state is a `ScheduleFreeState`.

    Raises:
        HyperparameterError: with every value that is out of range (a ValueError); by `init`, if no leaf is a
            matrix or muon_mask has one that can be none.

    Example:
        >>> import jax.numpy as jnp, optax, sfjax
        >>> tx = sfjax.schedule_free_muon(0.01, warmup_steps=10, weight_decay=0.1)
        >>> params = {"up": jnp.ones((4, 3)), "bias": jnp.ones(4)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> x = sfjax.schedule_free_eval_params(state, params)
    """
    check_mask(muon_mask, "muon_mask", "True is a matrix")
    return directed(MUON, locals())
