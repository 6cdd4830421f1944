"""S2-S5, the bias corrections and the coefficients of a step, once: both twins and every report ask here.

Functions of scalars. `xp` says who computes them: `floats` for Python floats, `numpy` or `jax.numpy`, where
they also take arrays. Every form is right in float32 too. Options are Python numbers or scalars of `xp`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

Options = Mapping[str, Any]

# The functions of a namespace that are needed here, on Python floats.
floats = SimpleNamespace(
    where=lambda condition, yes, no: yes if condition else no,
    maximum=max,
    minimum=min,
    expm1=math.expm1,
    log=math.log,
    log1p=math.log1p,
    sqrt=math.sqrt,
    tanh=math.tanh,
)


def ramp(t: Any, warmup_steps: Any, xp: Any = floats) -> Any:
    """Returns warmup(t) of S2; the last warm-up step has the full lr."""
    if isinstance(warmup_steps, int | float) and warmup_steps <= 0:
        return 1.0
    full = xp.where(warmup_steps > 0, warmup_steps, 1.0)
    return xp.where(t - 1 < warmup_steps, t / full, 1.0)  # S2


def weighed(t: Any, lr_t: Any, lr_max: Any, options: Options, xp: Any = floats) -> tuple[Any, Any]:
    """Returns lr_max after a step of size lr_t, and what the step adds to the sum of weights.

    Args:
        t: one-based time.
        lr_t: its step size.
        lr_max: before the step.
        options: r, weight_lr_power, prior_steps, weight_lr and c_warmup are read.
    """
    lr_max = xp.maximum(lr_max, lr_t)  # S3
    ref = lr_t if options["weight_lr"] == "current" else lr_max  # F3
    weight = step_weight(t, ref, options["r"], options["weight_lr_power"], options["prior_steps"], xp)
    first = options["c_warmup"]
    if not isinstance(first, int | float) or first:  # one that is traced may be 0, and is not left out
        weight = xp.where(t <= first, 0.0, weight)  # F5
    return lr_max, weight


def step_weight(t: Any, lr_max: Any, r: Any, weight_lr_power: Any, prior_steps: Any, xp: Any = floats) -> Any:
    """Returns the weight of step t in the average."""
    return power(t + prior_steps, r, xp) * power(lr_max, weight_lr_power, xp)  # S4


def averaging_weight(
    weight: Any, weight_sum: Any, xp: Any = floats, t: Any = 0, options: Options | None = None
) -> Any:
    """Returns c.

    Args:
        weight, weight_sum: of a step, and the sum with it.
        t: its one-based time.
        options: c_warmup, refined_c, window and window_rule are read, and q, the 1 - beta of the step; None
            is the plain average.
    """
    counts = weight_sum > 0
    c = xp.where(counts, weight / xp.where(counts, weight_sum, 1.0), 0.0)  # S5
    if options is None:
        return c
    first, refined, window = options["c_warmup"], options["refined_c"], options["window"]
    if not isinstance(refined, int | float) or refined:
        c = xp.where(refined > 0, xp.minimum(1.0, c * options["q"] * refined), c)  # F5
    if not isinstance(window, int | float) or window:
        least = 1.0 / xp.where(window > 0, window, 1.0)
        floor = least if options["window_rule"] == "constant" else xp.maximum(c, least)
        c = xp.where(window > 0, floor, c)  # F5
    if not isinstance(first, int | float) or first:
        c = xp.where(t <= first, 1.0, c)  # F5
    return c


def power(base: Any, exponent: Any, xp: Any = floats) -> Any:
    """Returns base ** exponent for base >= 0, with a finite gradient at base = 0 for every exponent."""
    if isinstance(exponent, int | float) and exponent == 0:
        return 1.0
    positive = base > 0
    return xp.where(positive, xp.where(positive, base, 1.0) ** exponent, xp.where(exponent == 0, 1.0, 0.0))


def sum_of_powers(prior_steps: float, r: float) -> float:
    """Returns 1^r + 2^r + ... + prior_steps^r, of Python numbers."""
    return float(prior_steps) if r == 0 else math.fsum(i**r for i in range(1, int(prior_steps) + 1))


def prior_weight(counted: Any, lr: Any, weight_lr_power: Any, xp: Any = floats) -> Any:
    """Returns the weight_sum that earlier steps at the full lr would have left; `counted` sums their t^r."""
    return xp.where(counted > 0, counted * power(lr, weight_lr_power, xp), 0.0)


def log_decay(decay: Any, xp: Any = floats) -> Any:
    """Returns log(decay), in Python doubles where the value is known: float32 would round 0.999 first."""
    if isinstance(decay, int | float):
        return math.log(decay) if decay > 0 else -math.inf
    return xp.log(decay)


def bias_correction(decay: Any, t: Any, xp: Any = floats) -> Any:
    """Returns 1 - decay^t without cancellation, also for decay = 0."""
    # The common case without a further call; of 0 the logarithm only has to be small enough.
    log = math.log(max(decay, 5e-324)) if isinstance(decay, float) else log_decay(decay, xp)
    return -xp.expm1(t * log)


# coth(u) - 1/u = u/3 - u^3/45 + ...: Bernoulli numbers, to 2e-14 for u < 0.5.
_LANGEVIN = (
    1 / 3,
    -1 / 45,
    2 / 945,
    -1 / 4725,
    2 / 93555,
    -1382 / 638512875,
    4 / 18243225,
    -3617 / 162820783125,
)


def _rest(u: Any, xp: Any) -> Any:
    """Returns 1 + 1/u - coth(u) for u > 0."""
    small = xp.minimum(u, 0.5)
    square, series = small * small, _LANGEVIN[-1]
    for coefficient in _LANGEVIN[-2::-1]:
        series = series * square + coefficient
    large = xp.maximum(u, 0.5)
    # From 40 on, coth(u) - 1 is 0 in any case; the bound keeps expm1, and so the gradient, finite.
    beyond = 1.0 / large - 2.0 / xp.expm1(2.0 * xp.minimum(large, 40.0))
    return xp.where(u < 0.5, 1.0 - small * series, beyond)


def rectification(b2: Any, t: Any, xp: Any = floats) -> tuple[Any, Any]:
    """Returns RAdam's rect at time t, and whether rho_t > 4 so that it may be used.

    The published rho_t is the difference of two numbers near rho_inf, which loses 2e-4 in float32.
    With u = -log(b2) / 2 it is rho_inf = coth(u), rho_t = 1 + t rest(t u) - rest(u).
    """
    u = xp.minimum(-0.5 * log_decay(b2, xp), 40.0)  # coth is 1 from there on, also for b2 = 0
    rho_inf = 1.0 / xp.tanh(u)
    rho_t = 1.0 + t * _rest(t * u, xp) - _rest(u, xp)
    usable = rho_t > 4.0
    rho, inf = xp.where(usable, rho_t, 5.0), xp.where(usable, rho_inf, 5.0)
    return xp.sqrt((rho - 4) * (rho - 2) * inf / ((inf - 4) * (inf - 2) * rho)), usable


def coefficients(c: Any, beta: Any, change: Any = 0.0, old_beta: Any = 1.0) -> tuple[Any, Any]:
    """Returns (k1, k2) of y' = y + k1 (z - y) + k2 delta, S8 and S9 in one line.

    Args:
        c: averaging weight of the step.
        beta: the one that builds y'.
        change: beta - old_beta, from its rule's closed form: near 0.99 a difference of two rounded betas
            keeps a digit in float32. 0 while beta stays.
        old_beta: the one that built y, > 0; it matters where beta changes.
    """
    return c - change / old_beta * (1.0 - c), 1.0 - beta * (1.0 - c)  # S9*


def smoothed_norm(norm: Any, l1: Any, polyak_beta: Any, t: Any, xp: Any = floats) -> Any:
    """Returns the bias-corrected mean of sqrt(pi / 2) |g|_1 over steps.

    Args:
        norm: after the step before; 0 before there was a gradient.
        l1: sum of all |g|; sqrt(pi / 2) of it is what the Euclidean norm of normal numbers is, per element.
        polyak_beta: share of what was, in [0, 1).
        t: one-based time.
    """
    new, share = math.sqrt(math.pi / 2) * l1, (1.0 - polyak_beta) / bias_correction(polyak_beta, t, xp)
    return xp.where(norm > 0, norm + share * (new - norm), new)


def polyak(loss: Any, inner: Any, norm: Any, xp: Any = floats) -> Any:
    """Returns what multiplies the lr in a Polyak step (arXiv 2605.19095); 0 where there is no gradient.

    Args:
        loss: at y, above what it can fall to.
        inner: beta <g, z - x>, of the beta that builds the next y: what is linear between x and y.
        norm: as `smoothed_norm` returns it.
    """
    return xp.where(norm > 0, xp.maximum(loss + inner, 0.0) / xp.where(norm > 0, norm, 1.0), 0.0)


def effective_lr(lr_t: Any, c: Any, beta: Any) -> Any:
    """Returns the multiple of the newest direction by which y moves in this step (S9*)."""
    return lr_t * coefficients(c, beta)[1]


class StepSize(NamedTuple):
    """One rule for the step size.

    Attributes:
        factor: (t, options, xp) -> what multiplies lr(step) in S2.
        of_group: whether t is the time of a group, as for a warm-up, where each parameter has its own clock.
        needs: options that it reads.
    """

    factor: Callable[[Any, Options, Any], Any]
    of_group: bool
    needs: tuple[str, ...] = ()


def _rectified(t: Any, options: Options, xp: Any) -> Any:
    rect, usable = rectification(options["b2"], t, xp)
    return xp.where(usable, rect, 0.0 if options["silent_sgd_phase"] else 1.0)


# The rules that a row of `laws` may name. A new one is a function here, and a rule of the reference.
STEP_SIZES: Mapping[str, StepSize] = {
    "ramp": StepSize(lambda t, options, xp: ramp(t, options["warmup_steps"], xp), True, ("warmup_steps",)),
    "rectified": StepSize(_rectified, False, ("b2", "silent_sgd_phase")),
    "base": StepSize(lambda t, options, xp: 1.0, True),
}
# (weight, weight_sum with it, xp, t, options) -> c
AVERAGES: Mapping[str, Callable[[Any, Any, Any, Any, Options], Any]] = {"weights": averaging_weight}
# weight_decay -> (wd_y, wd_z) of delta = -lr_t (direction + wd_y y + wd_z z)
DECAYS: Mapping[str, Callable[[Any], tuple[Any, Any]]] = {
    "y": lambda wd: (wd, 0.0),
    "z": lambda wd: (0.0, wd),
}


def decay_scale(lr_t: Any, lr_max: Any, decay_power: Any, xp: Any = floats) -> Any:
    """Returns what multiplies lr_t weight_decay: 1, lr_t, or lr_t over the largest so far.

    Args:
        lr_t: step size of what decays, with all factors.
        lr_max: the largest so far, this step included.
        decay_power: the option.
    """
    if isinstance(decay_power, str):  # "normalized"
        return lr_t / xp.where(lr_max > 0, lr_max, 1.0)  # F6
    return power(lr_t, decay_power - 1, xp)  # F6


class Beta(NamedTuple):
    """The interpolation that builds the y of a step.

    Attributes:
        beta: itself.
        q: 1 - beta, to all digits.
        change: by how much it is larger than the one before, to all digits: near 0.99 a difference of two
            rounded betas keeps one in float32.
    """

    beta: Any
    q: Any
    change: Any


def _annealed(t: Any, options: Options, xp: Any) -> Beta:
    """log q goes on a line from its first value to that of beta_max."""
    first, steps = 1.0 - options["beta"], xp.maximum(options["beta_anneal_steps"], 1)
    last = 1.0 - options["beta_max"]
    way, u = log_decay(last, xp) - log_decay(first, xp), xp.minimum(xp.maximum(t - 1, 0), steps) / steps
    q = first * power(last / first, u, xp)  # F9
    change = xp.where((t > 1) & (t - 1 <= steps), q * xp.expm1(-way / steps), 0.0)
    return Beta(options["beta"] - first * xp.expm1(u * way), q, change)


def _amuse(t: Any, options: Options, xp: Any) -> Beta:
    """q falls by a power of time, from the end of the steps that hold beta."""
    first, hold, rho = 1.0 - options["beta"], options["beta_hold_steps"], options["rho"]
    before = xp.maximum(hold - 1, 1)
    share = before / xp.maximum(t - 1, before)
    q = first * power(share, rho, xp)  # F9
    change = xp.where(t > hold, q * xp.expm1(-rho * xp.log1p(-1.0 / xp.maximum(t - 1, 2))), 0.0)
    return Beta(options["beta"] - first * xp.expm1(rho * xp.log(share)), q, change)


# (t, options, xp) -> the beta that builds the y of step t
BETAS: Mapping[str, Callable[[Any, Options, Any], Beta]] = {
    "constant": lambda t, options, xp: Beta(options["beta"], 1.0 - options["beta"], 0.0),
    "anneal": _annealed,
    "amuse": _amuse,
}


def beta_after(step: int, options: Options) -> float:
    """Returns the beta that has built y after some steps, of Python numbers.

    Example:
        >>> from sfcore.averaging import beta_after
        >>> options = {"beta": 0.9, "beta_rule": "anneal", "beta_max": 0.99, "beta_anneal_steps": 2}
        >>> [round(beta_after(step, options), 4) for step in (0, 1, 2, 3, 4)]
        [0.9, 0.9, 0.9684, 0.99, 0.99]
    """
    return float(BETAS[options["beta_rule"]](step, options, floats).beta)
