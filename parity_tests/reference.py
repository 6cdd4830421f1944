"""Schedule-Free SGD, AdamW, RAdam and Muon by equations S1 to S9: the truth that both twins are held to.

NumPy float64 arrays and Python floats; x, y and z are all stored; nothing is folded, fused or
imported from the twins. `test_harness.py` breaks this file one line at a time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


def one_minus_power(decay: float, t: int) -> float:
    """Returns 1 - decay^t without the cancellation near decay = 1."""
    return 1.0 if decay == 0 else -math.expm1(t * math.log(decay))


def rectification(b2: float, t: int) -> float:
    """Returns RAdam's rect at time t, 0 while the variance estimate is not usable."""
    rho_inf = 2 / (1 - b2) - 1
    rho_t = rho_inf - 2 * t * (1 - one_minus_power(b2, t)) / one_minus_power(b2, t)
    if rho_t <= 4:
        return 0.0
    return math.sqrt((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t))


class Reference:
    """One run. `params`: leaf -> initial value; `options`: every canonical name of `cases.DEFAULTS`.

    Attributes:
        x, y, z: leaf -> array.
        buffers: role in a checkpoint -> leaf -> array, zeros before a rule writes to it.
    """

    def __init__(self, optimizer: str, params: Arrays, options: dict[str, Any]):
        self.rule = RULES[optimizer]
        self.options = options = {**self.rule.fixed, **options}
        self.x, self.y, self.z = ({k: np.array(p, np.float64) for k, p in params.items()} for _ in "xyz")
        zeros = {k: np.zeros_like(p) for k, p in self.z.items()}
        self.buffers: defaultdict[str, Arrays] = defaultdict(zeros.copy)
        self.step, self.lr_max, self.c, self.l1 = 0, 0.0, 0.0, 0.0
        lr, r, power = options["lr"], options["r"], options["weight_lr_power"]
        self.weight_sum = math.fsum(i**r * lr**power for i in range(1, options["prior_steps"] + 1))

    def update(self, grads: Arrays, lr: float, loss: float | None = None, clip: float = 1.0) -> None:
        """Takes one step.

        Args:
            grads: at y, after they were multiplied by `clip`.
            lr: the schedule's value at this step, before warm-up.
            loss: at y, of a law that takes Polyak steps.
        """
        o = self.options
        t = self.step + 1  # S1
        factor, usable = self.rule.factor(self, t)
        factor *= self.polyak(grads, t, loss, clip) if loss is not None else 1.0
        lr_t = lr * factor  # S2
        self.lr_max = max(self.lr_max, lr_t)  # S3
        ref = lr_t if o["weight_lr"] == "current" else self.lr_max  # F3
        weight = (t + o["prior_steps"]) ** o["r"] * ref ** o["weight_lr_power"]  # S4
        total = self.weight_sum + weight
        c = weight / total if total > 0 else 0.0  # S5
        beta = BETAS[o["beta_rule"]](o, t)  # F9
        if o["refined_c"] > 0:
            c = min(1.0, c * (1 - beta) * o["refined_c"])  # F5
        if o["window"] > 0:
            c = 1 / o["window"] if o["window_rule"] == "constant" else max(c, 1 / o["window"])  # F5
        if t <= o["c_warmup"]:
            c, total = 1.0, self.weight_sum  # F5
        full_lr = lr_t
        for k, g in grads.items():
            lr_t = full_lr * self.rule.share(self, k)
            wd = o["weight_decay"] * (lr_t if o.get("decay_power") == 2 else 1.0)  # F6
            if o.get("decay_power") == "normalized":
                wd = o["weight_decay"] * (full_lr / self.lr_max if full_lr > 0 else 0.0)  # F6
            direction = self.rule.direction(self, k, g, t, usable)
            decaying = self.z[k] if o.get("decay_at") == "z" else self.y[k]  # F6
            delta = -lr_t * (direction + wd * decaying)  # S6
            z = self.z[k] + delta  # S7
            x = (1 - c) * self.x[k] + c * z  # S8
            y = beta * x + (1 - beta) * z  # S9
            self.x[k], self.y[k], self.z[k] = np.asarray(x), np.asarray(y), np.asarray(z)
        self.step, self.weight_sum, self.c = t, total, c

    def polyak(self, grads: Arrays, t: int, loss: float, clip: float) -> float:
        """Returns what multiplies the lr in a step of ScheduleFree+: 0 where there is no gradient."""
        o = self.options
        norm = math.sqrt(math.pi / 2) * math.fsum(float(np.abs(g).sum()) / clip for g in grads.values())
        share = one_minus_power(o["polyak_beta"], t)  # of the steps so far in the mean
        before = (
            self.l1 if self.l1 > 0 else norm * one_minus_power(o["polyak_beta"], t - 1)
        )  # the first counts
        self.l1 = o["polyak_beta"] * before + (1 - o["polyak_beta"]) * norm
        inner = math.fsum(float((g * (self.z[k] - self.x[k])).sum()) / clip for k, g in grads.items())
        beta = BETAS[o["beta_rule"]](o, t)
        rise = max(0.0, loss - o["f_star"] + beta * inner)
        return rise / (self.l1 / share) if self.l1 > 0 else 0.0

    def iterates(self) -> tuple[Arrays, Arrays, Arrays]:
        """Returns x, y and z as they are now; an update replaces arrays and writes to none."""
        return self.x.copy(), self.y.copy(), self.z.copy()


def annealed(o: dict[str, Any], t: int) -> float:
    """Returns the beta that builds y at time t, by a line of the logarithm of 1 - beta."""
    u = min((t - 1) / o["beta_anneal_steps"], 1.0)
    return 1 - math.exp((1 - u) * math.log(1 - o["beta"]) + u * math.log(1 - o["beta_max"]))


def amuse(o: dict[str, Any], t: int) -> float:
    """The same by a power of time, which begins after the steps that hold beta."""
    if t <= o["beta_hold_steps"]:
        return float(o["beta"])
    return 1 - (1 - o["beta"]) * ((o["beta_hold_steps"] - 1) / (t - 1)) ** o["rho"]


BETAS: dict[str, Callable[[dict[str, Any], int], float]] = {
    "constant": lambda o, t: float(o["beta"]),
    "anneal": annealed,
    "amuse": amuse,
    "anneal, if it has steps": lambda o, t: annealed(o, t) if o["beta_anneal_steps"] else float(o["beta"]),
}


def ramp(run: Reference, t: int) -> tuple[float, bool]:
    """Returns what multiplies the lr at time t, with warm-up, and whether the second moment is usable."""
    o = run.options
    return (min(1.0, t / o["warmup_steps"]) if o["warmup_steps"] else 1.0), True


def rectified(run: Reference, t: int) -> tuple[float, bool]:
    """The same of RAdam, which rectifies in place of a warm-up."""
    o = run.options
    rect = rectification(o["b2"], t)
    usable = rect > 0
    return (rect if usable else float(not o["silent_sgd_phase"])), usable


def constant(run: Reference, t: int) -> tuple[float, bool]:
    """The same of a law that has neither."""
    return 1.0, True


def gradient(run: Reference, k: str, g: np.ndarray, t: int, usable: bool) -> np.ndarray:
    """Returns what leaf k moves against (S6) in SGD: the gradient."""
    return g


def rms(run: Reference, k: str, g: np.ndarray, t: int, usable: bool) -> np.ndarray:
    """The same in AdamW and RAdam: the gradient over its root mean square, where that is usable."""
    v, m = run.buffers["v"], run.buffers["m"]
    b2, m1 = run.options["b2"], run.options.get("inner_momentum", 0.0)
    v[k] = np.asarray(b2 * v[k] + (1 - b2) * g * g)
    if not usable:
        return g
    if m1 > 0:
        m[k] = np.asarray(m1 * m[k] + (1 - m1) * g)
        g = m[k] / one_minus_power(m1, t)
    return g / (np.sqrt(v[k] / one_minus_power(b2, t)) + run.options["eps"])


def is_matrix(run: Reference, k: str) -> bool:
    """Tells whether Muon takes leaf k: it has two axes or more and some elements."""
    return run.z[k].ndim >= 2 and run.z[k].size > 0


def share(run: Reference, k: str) -> float:
    """Returns the lr of leaf k over that of its matrices."""
    return 1.0 if is_matrix(run, k) else float(run.options["adam_lr_ratio"])


def polar(n: np.ndarray, steps: int) -> np.ndarray:
    """Returns about the polar factor of a matrix, by quintic Newton-Schulz iterations."""
    x = n / (np.linalg.norm(n) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T if len(x) <= len(x.T) else x.T @ x
        even = -4.7750 * gram + 2.0315 * gram @ gram
        x = 3.4445 * x + (even @ x if len(x) <= len(x.T) else x @ even)
    return np.asarray(x)


def muon(run: Reference, k: str, g: np.ndarray, t: int, usable: bool) -> np.ndarray:
    """The direction of Muon and NorMuon: a polar factor of the momentum of a matrix, AdamW's for the rest."""
    if not is_matrix(run, k):
        return rms(run, k, g, t, usable)
    o, m, u = run.options, run.buffers["momentum"], run.buffers["u"]
    axis = 0 if o["output_axis"] == "first" else -1
    m[k] = np.asarray(o["mu"] * m[k] + (1 - o["mu"]) * g)
    n = (1 - o["mu"]) * g + o["mu"] * m[k] if o["nesterov"] else m[k]
    n = np.moveaxis(n, axis, 0)
    p = polar(n.reshape(len(n), -1), o["ns_steps"])
    rows, cols = p.shape
    match = o["adjust_lr"] == "match_rms_adamw"
    length = 0.2 * math.sqrt(max(rows, cols)) if match else math.sqrt(max(1, rows / cols))
    if o["normalize"] == "rows":
        before = np.moveaxis(u[k], axis, 0).reshape(rows, -1)[:, :1]
        after = o["b2_rows"] * before + (1 - o["b2_rows"]) * np.mean(p * p, axis=1, keepdims=True)
        q = p / (np.sqrt(after) + o["eps"])
        size = 0.2 * math.sqrt(rows * cols) if match else length * np.linalg.norm(p)
        p, length = q, size / (np.linalg.norm(q) or 1.0)
        u[k] = np.moveaxis(after.reshape(rows, *[1] * (n.ndim - 1)), 0, axis)
    return np.moveaxis((length * p).reshape(n.shape), 0, axis)


class Rule(NamedTuple):
    """What one law does.

    Attributes:
        direction, factor: as `gradient` and as `ramp`.
        share: of a leaf, of the lr.
        fixed: options that its users cannot choose.
    """

    direction: Callable[[Reference, str, np.ndarray, int, bool], np.ndarray]
    factor: Callable[[Reference, int], tuple[float, bool]] = ramp
    share: Callable[[Reference, str], float] = lambda run, k: 1.0
    fixed: Mapping[str, Any] = MappingProxyType({})


# ScheduleFree+ is AdamW with the decay of AdamC, whose steps are Polyak's where `update` is told the loss.
PLUS = {"prior_steps": 0, "refined_c": 0.0, "window": 0, "weight_lr": "max", "warmup_steps": 0}
PLUS |= {"decay_at": "y", "decay_power": 2, "beta_rule": "anneal, if it has steps"}

# A law that joins adds its own.
RULES = {
    "sgd": Rule(gradient),
    "adamw": Rule(rms),
    "radam": Rule(rms, rectified),
    "muon": Rule(muon, share=share),
    "plus": Rule(rms, fixed=PLUS),
}
