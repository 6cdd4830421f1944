"""Schedule-Free SGD: the direction is the gradient (S6)."""

from __future__ import annotations

from typing import Any, Literal

import optax
from jax.typing import DTypeLike

from sfjax.state.arguments import Scalar, ScalarOrSchedule, Whole
from sfjax.step.plan import Direction, directed, known_options

SGD = Direction("sgd", lambda g, buffers: (g, buffers), kernel=())  # S6


@known_options("sgd")
def schedule_free_sgd(
    learning_rate: ScalarOrSchedule = 1.0,
    warmup_steps: Whole | None = 0,
    b1: Scalar = 0.9,
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
    precision: Literal["exact", "lean", "8bit"] = "exact",
    seed: Whole = 0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Schedule-Free SGD (arXiv 2405.15682). The parameters hold y; `schedule_free_eval_params` gives x.

    Args:
        learning_rate: >= 0, default 1.0: number, array of one element, traced value, or schedule of the
            step from 0. 10 to 50 times that of scheduled SGD is a usual start.
        warmup_steps: updates of linear warm-up, default 0 (None is 0); about 5% of a run helps.
        b1: interpolation beta of y = beta x + (1 - beta) z, in [0, 1], default 0.9.
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
        precision: "exact" (default) keeps parameters of 16 bits as a float32 run would have them; "lean"
            keeps z - y in bfloat16, rounded at random, and the rest of y in int16: 6 bytes a parameter in
            all where "exact" takes 10. Wider parameters are not concerned. "8bit"
            keeps z - y in a code of 8 to 16 bits: about 4 bytes a bfloat16 parameter and 6 a float32
            one in all; vectors are lean.
        seed: of the rounding, default 0; whole, >= 0.
        mask: tree of bools, or function of params giving one: the leaves that decay; None is all.

    Returns:
        A transformation whose `update` needs params. Its state is a `ScheduleFreeState`.

    Raises:
        HyperparameterError: with every value that is out of range (a ValueError).

    Example:
        >>> import jax.numpy as jnp, optax, sfjax
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_sgd(0.5, warmup_steps=5))
        >>> params = {"w": jnp.ones(3)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> x = sfjax.schedule_free_eval_params(state, params)
    """
    return directed(SGD, locals())
