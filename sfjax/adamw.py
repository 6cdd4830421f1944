"""Schedule-Free AdamW: the direction is the gradient over its root mean square (S6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from sfcore.averaging import bias_correction
from sfjax.state.arguments import Scalar, ScalarOrSchedule, Whole
from sfjax.step.plan import Direction, directed, known_options


class MomentsState(NamedTuple):
    """Buffers of AdamW and RAdam.

    Attributes:
        nu: second moment v; tree of the parameters, at least float32.
        mu: first moment, the same; None without inner momentum.
    """

    nu: Any
    mu: Any


def adamw_single(g: jax.Array, buffers: dict[str, jax.Array], *numbers: jax.Array) -> Any:
    """Returns AdamW's direction, and the moments of which the first is there or not."""
    share2, eps, share1, correction2, correction1 = numbers
    v, m = buffers["nu"], buffers.get("mu")
    # By 1 - decay alone: 0.9999 rounded to float32 beside 1 - 0.9999 would bias the average by 1.6e-4.
    after = {"nu": (v - share2 * v) + share2 * (g * g)}
    if m is not None:
        after["mu"] = (m - share1 * m) + share1 * g
    numerator = g if m is None else after["mu"] / correction1
    v = after["nu"] / correction2
    positive = v > 0
    # With the gradient 0, not NaN, where a parameter has had no gradient.
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, v, 1.0)), v)
    return numerator / (root + eps), after  # S6


def adamw_numbers(values: Mapping[str, Any], t: jax.Array) -> tuple[Any, ...]:
    """Returns what `adamw_single` is called with at time t."""
    b2, m1 = values["b2"], values.get("inner_momentum", 0.0)
    corrections = (bias_correction(decay, t, jnp) for decay in (b2, m1))
    return (1.0 - b2, values["eps"], 1.0 - m1, *corrections)


KERNEL = ("share2", "eps", "share1", "correction2", "correction1")
ADAMW = Direction("adamw", adamw_single, adamw_numbers, MomentsState, kernel=KERNEL)


@known_options("adamw")
def schedule_free_adamw(
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
    inner_momentum: Scalar = 0.0,
    precision: Literal["exact", "lean", "8bit"] = "exact",
    seed: Whole = 0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Schedule-Free AdamW (arXiv 2405.15682). The parameters hold y; `schedule_free_eval_params` gives x.

    Args:
        learning_rate: >= 0, default 0.0025: number, array of one element, traced value, or schedule of
            the step from 0. 1 to 10 times that of scheduled AdamW is a usual start.
        warmup_steps: updates of linear warm-up, default 0 (None is 0); about 5% of a run helps.
        b1: interpolation beta of y = beta x + (1 - beta) z, in [0, 1], default 0.9.
        b2: decay of the second moment, in [0, 1), default 0.999. inject_hyperparams rounds it to the
            parameters' dtype, and bfloat16 makes 1 of it: then pass hyperparam_dtype=jnp.float32.
        eps: added to the denominator outside the root, > 0, default 1e-8.
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
        decay_at: the point that decays, "y" (default) or "z".
        decay_power: weight_decay is multiplied by lr to this power, 1 (default) or 2 (AdamC); "normalized" is
            AdamC's too, lr^2 over the largest lr so far, whose weight_decay is like AdamW's.
        inner_momentum: decay of a first moment in the numerator, in [0, 1); the number 0 (default) keeps
            no buffer, so name it in static_args of inject_hyperparams.
        precision: "exact" (default) keeps parameters of 16 bits as a float32 run would have them; "lean"
            keeps z - y and v in bfloat16, rounded at random, and the rest of y in int16: 8 bytes a parameter
            in all where "exact" takes 14. Wider parameters are not concerned. "8bit"
            keeps z - y and v in codes of 8 to 16 bits: about 5 bytes a bfloat16 parameter and 7 a float32
            one in all; vectors are lean.
        seed: of the rounding, default 0; whole, >= 0.
        mask: tree of bools, or function of params giving one: the leaves that decay; None is all.

    Returns:
        A transformation whose `update` needs params. Its state is a `ScheduleFreeState`.

    Raises:
        HyperparameterError: with every value that is out of range (a ValueError).

    Example:
        >>> import jax.numpy as jnp, optax, sfjax
        >>> tx = sfjax.schedule_free_adamw(0.01, warmup_steps=10, weight_decay=0.1)
        >>> params = {"w": jnp.ones(3)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> x = sfjax.schedule_free_eval_params(state, params)
    """
    return directed(ADAMW, locals())
