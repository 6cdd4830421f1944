"""Mistakes that people make, each one line of the reference changed; every one must be caught.

The first nine are from the literature and from other programs, the rest from writing this one.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from pathlib import Path

from parity_tests import reference
from parity_tests.drivers import Driver
from parity_tests.reference import Reference


@dataclass(frozen=True)
class Mistake:
    """A wrong line.

    Attributes:
        id: what is wrong.
        right, wrong: text of the reference, which occurs once, and what replaces it.
    """

    id: str
    right: str
    wrong: str


_DENOMINATOR = '(np.sqrt(v[k] / one_minus_power(b2, t)) + run.options["eps"])'
_RAMP = 'min(1.0, t / o["warmup_steps"])'
_DECAYING = 'self.z[k] if o.get("decay_at") == "z" else self.y[k]'
_REFINED = 'min(1.0, c * (1 - beta) * o["refined_c"])'
_WINDOW = 'max(c, 1 / o["window"])'
_S9 = "beta * x + (1 - beta) * z"
_KEPT = "self.x[k], self.y[k], self.z[k] = np.asarray(x), np.asarray(y), np.asarray(z)"
_DECODED = "x = (y - (1 - beta) * z) / beta if beta else x"
_ANNEALED = '1 - math.exp((1 - u) * math.log(1 - o["beta"]) + u * math.log(1 - o["beta_max"]))'
_POLYAK = "return rise / (self.l1 / share) if self.l1 > 0 else 0.0"
_RISE = 'max(0.0, loss - o["f_star"] + beta * inner)'
_SUM = "math.fsum(i**r * lr**power for i in range(1, options["

MISTAKES = (
    Mistake("warm-up from 0", _RAMP, 'min(1.0, run.step / o["warmup_steps"])'),
    Mistake("plain 1/t", "c = weight / total if total > 0 else 0.0", "c = 1 / t"),
    Mistake("lr^1 in the weight", 'ref ** o["weight_lr_power"]', "ref"),
    Mistake("decay at z", _DECAYING, "self.z[k]"),
    Mistake("decay at x", _DECAYING, _DECAYING.replace("self.y", "self.x")),
    Mistake(
        "eps inside the root",
        _DENOMINATOR,
        'np.sqrt(v[k] / one_minus_power(b2, t) + run.options["eps"])',
    ),
    Mistake("old z in the average", "(1 - c) * self.x[k] + c * z", "(1 - c) * self.x[k] + c * self.z[k]"),
    Mistake("beta swapped", _S9, "(1 - beta) * x + beta * z"),
    Mistake("no bias correction", _DENOMINATOR, '(np.sqrt(v[k]) + run.options["eps"])'),
    Mistake("warm-up one step short", _RAMP, 'min(1.0, (t + 1) / o["warmup_steps"])'),
    Mistake("weight of the current lr", "max(self.lr_max, lr_t)", "lr_t"),
    Mistake(
        "weight of the largest lr", 'lr_t if o["weight_lr"] == "current"', 'self.lr_max if o["weight_lr"]'
    ),
    Mistake("c_warmup counted", "c, total = 1.0, self.weight_sum", "c = 1.0"),
    Mistake("c_warmup one step short", 't <= o["c_warmup"]', 't < o["c_warmup"]'),
    Mistake("refined C of beta", '(1 - beta) * o["refined_c"]', 'beta * o["refined_c"]'),
    Mistake("refined C of the first beta", '(1 - beta) * o["refined_c"]', '(1 - o["beta"]) * o["refined_c"]'),
    Mistake("refined C without its bound", _REFINED, _REFINED.replace("min", "max")),
    Mistake("window that is the most, not the least", _WINDOW, _WINDOW.replace("max", "min")),
    Mistake("constant window that begins as an average", '1 / o["window"] if', 'max(c, 1 / o["window"]) if'),
    Mistake("decay by lr, not by its square", "(lr_t if o.get(", "(1.0 if o.get("),
    Mistake("normalized by the lr of the options", "(full_lr / self.lr_max if", '(full_lr / o["lr"] if'),
    Mistake("normalized by the lr of now", "(full_lr / self.lr_max if", "(full_lr / full_lr if"),
    Mistake("normalized twice by the lr of matrices", "(full_lr / self.lr_max if", "(lr_t / self.lr_max if"),
    Mistake(
        "weight of the unramped lr, rect missing in S4", "max(self.lr_max, lr_t)", "max(self.lr_max, lr)"
    ),
    Mistake("r counted from 0", '(t + o["prior_steps"]) ** o["r"]', '(t - 1 + o["prior_steps"]) ** o["r"]'),
    Mistake("r ignored", '(t + o["prior_steps"]) ** o["r"]', "1"),
    Mistake("prior forgotten in t", '(t + o["prior_steps"])', "t"),
    Mistake("prior off by one", _SUM, "math.fsum(i**r * lr**power for i in range(options["),
    Mistake("prior one step long", '"prior_steps"] + 1)', '"prior_steps"] + 2)'),
    Mistake(
        "sum without the new weight", "total = self.weight_sum + weight", "total = self.weight_sum or weight"
    ),
    Mistake(
        "sum in float32",
        "total = self.weight_sum + weight",
        "total = float(np.float32(self.weight_sum + weight))",
    ),
    Mistake("old x in y", _S9, "beta * self.x[k] + (1 - beta) * z"),
    Mistake("old z in y", _S9, "beta * x + (1 - beta) * self.z[k]"),
    # As in the official step of AMUSE: x of y and z by the beta that is new, not by the one that built y.
    Mistake(
        "y decoded with the beta of the step",
        "(1 - c) * self.x[k] + c * z",
        "(1 - c) * ((self.y[k] - (1 - beta) * self.z[k]) / beta if beta else self.x[k]) + c * z",
    ),
    # As in a program of GPA: y does not see the decay of z, and x, which is told by both, grows.
    Mistake(
        "decay of z alone",
        _KEPT,
        f"y = y + (1 - beta * (1 - c)) * lr_t * wd * decaying; {_DECODED}; {_KEPT}",
    ),
    Mistake("decay of y alone", _KEPT, f"z = z + lr_t * wd * decaying; {_DECODED}; {_KEPT}"),  # as in Keras
    Mistake("annealed on a line of beta", _ANNEALED, '(1 - u) * o["beta"] + u * o["beta_max"]'),
    Mistake("annealed one step early", "u = min((t - 1) / o", "u = min(t / o"),
    Mistake("beta held one step long", 't <= o["beta_hold_steps"]', 't <= o["beta_hold_steps"] + 1'),
    Mistake(
        "amuse from the hold, not before it",
        '((o["beta_hold_steps"] - 1) / (t - 1))',
        '(o["beta_hold_steps"] / t)',
    ),
    Mistake(
        "decay without the lr",
        "delta = -lr_t * (direction + wd * decaying)",
        "delta = -lr_t * direction - wd * decaying",
    ),
    Mistake(
        "bias correction in float32",
        "-math.expm1(t * math.log(decay))",
        "float(1 - np.float32(decay) ** np.float32(t))",
    ),
    Mistake("bias correction one step late", _DENOMINATOR, _DENOMINATOR.replace("t)", "max(t - 1, 1))")),
    Mistake("first moment without bias correction", "m[k] / one_minus_power(m1, t)", "m[k]"),
    Mistake(
        "v asleep in the silent phase",
        "v[k] = np.asarray(b2",
        "v[k] = v[k] if not usable else np.asarray(b2",
    ),
    Mistake("silent phase not silent", 'float(not o["silent_sgd_phase"])', "1.0"),
    Mistake("rectified one step late", "if rho_t <= 4:", "if rho_t <= 5:"),
    Mistake("Newton-Schulz without its last term", "+ 2.0315 * gram @ gram", "+ 0 * gram"),
    Mistake("Newton-Schulz that converges", "3.4445 * x", "3.0 * x"),
    Mistake("spectral norm for Frobenius", "(np.linalg.norm(n) + 1e-7)", "(np.linalg.norm(n, 2) + 1e-7)"),
    Mistake("momentum without its share", '(1 - o["mu"]) * g)\n', "g)\n"),
    Mistake(
        "Nesterov without its share",
        '(1 - o["mu"]) * g + o["mu"] * m[k] if',
        '(1 - o["mu"]) * g + m[k] if',
    ),
    Mistake("columns for rows", 'axis = 0 if o["output_axis"] == "first"', 'axis = 0 if o["adjust_lr"]'),
    Mistake(
        "length of the shorter side", "0.2 * math.sqrt(max(rows, cols))", "0.2 * math.sqrt(min(rows, cols))"
    ),
    Mistake("rows over columns upside down", "max(1, rows / cols)", "max(1, cols / rows)"),
    Mistake(
        "rows by their sum", "np.mean(p * p, axis=1, keepdims=True)", "np.sum(p * p, axis=1, keepdims=True)"
    ),
    Mistake("rows by b2 of the others", 'o["b2_rows"] * before', 'o["b2"] * before'),
    Mistake("rows that change the length of a step", "size / (np.linalg.norm(q) or 1.0)", "size"),
    Mistake("AdamW's lr also in matrices", "1.0 if is_matrix(run, k) else float", "float"),
    Mistake("AdamW's decay by the lr of matrices", '(lr_t if o.get("decay', '(full_lr if o.get("decay'),
    # As in upstream's ScheduleFree+: what is stored has been corrected, and is corrected again.
    Mistake(
        "norm corrected twice", _POLYAK, "self.l1 /= share; return rise / self.l1 if self.l1 > 0 else 0.0"
    ),
    Mistake("norm never corrected", "(self.l1 / share)", "self.l1"),
    Mistake("clipped norm", "float(np.abs(g).sum()) / clip", "float(np.abs(g).sum())"),  # upstream's too
    Mistake(
        "clipped inner product", "(self.z[k] - self.x[k])).sum()) / clip", "(self.z[k] - self.x[k])).sum())"
    ),
    Mistake("division by a norm of 0", _POLYAK, _POLYAK.replace("0.0", "math.nan")),  # upstream's too
    Mistake("Polyak step from y, not from x", "(self.z[k] - self.x[k])", "(self.z[k] - self.y[k])"),
    Mistake("inner product by the first beta", _RISE, _RISE.replace("beta * inner", 'o["beta"] * inner')),
    Mistake("f_star left out", _RISE, "max(0.0, loss + beta * inner)"),
    Mistake("Polyak step uphill", _RISE, _RISE.replace("max(0.0, loss", "(loss")),
    Mistake(
        "norm that waits for its first gradient", 'norm * one_minus_power(o["polyak_beta"], t - 1)', "0.0"
    ),
    Mistake("norm without its root", "math.sqrt(math.pi / 2) * math.fsum", "math.fsum"),
    Mistake("rect without rho_inf", " * rho_inf / (", " / ("),
)


def planted(mistake: Mistake) -> Driver:
    """Returns the reference with one mistake in it, as a driver."""
    source = Path(reference.__file__).read_text()
    if source.count(mistake.right) != 1:
        raise ValueError(
            f"{mistake.id}: the reference must have {mistake.right!r} once, got {source.count(mistake.right)}"
        )
    module = types.ModuleType(f"reference with {mistake.id}")
    exec(compile(source.replace(mistake.right, mistake.wrong), module.__name__, "exec"), module.__dict__)
    return reference_driver(mistake.id, module.Reference)


def reference_driver(name: str, make: type[Reference] = Reference) -> Driver:
    """Returns the reference, right or wrong, as a driver."""
    return Driver(
        name, lambda case, params, dtype: make(case.optimizer, params, case.options), lambda: reference.RULES
    )
