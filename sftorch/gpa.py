"""Generalized primal averaging: Schedule-Free AdamW whose average forgets."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sfcore import checks
from sfcore.laws import MEMBERS
from sftorch.adamw import AdamWDirection, AdamWScheduleFree
from sftorch.step.plan import Precision, given

_AVERAGES = checks.one_of("gpa", "schedule_free", fix="'gpa' keeps c, 'schedule_free' averages all steps")


class GPAAdamW(AdamWScheduleFree):
    """AdamW with generalized primal averaging (arXiv 2512.17131), with the arguments of Meta's class.

    `AdamWScheduleFree` with inner momentum, `window_rule="constant"` and decay at z. The decay moves x, y and
    z together, so that x stays the average of z; in a program of Meta's it moved z alone, and x grew. Their
    newer one decays at y: that is `decay_at="y"`.

    Args:
        params: as for `AdamWScheduleFree`.
        lr: step size, >= 0, default 1; the paper has a schedule for it.
        eps: added to the denominator outside the root, > 0, default 1e-8.
        beta1, beta2: decays of the first and the second moment, in [0, 1), default 0.9 and 0.999.
        weight_decay: decoupled decay, >= 0, default 0.
        iterate_averaging_type: "gpa" (default), or "schedule_free" for the weighted mean of all steps; of an
            enum the name counts.
        train_interp_coeff: mu_y, the interpolation y = mu_y x + (1 - mu_y) z, in [0, 1], default 0.7.
        eval_interp_coeff: mu_x, the share of x that stays in a step, in [0, 1), default 0.9967.
        weight_pow_coeff, weight_lr_power: r and weight_lr_power of "schedule_free", default 0 and 2.
        decay_at: the point that decays, "z" (default) or "y".
        foreach, fused, precision, seed: as for `AdamWScheduleFree`.

    Raises:
        HyperparameterError: with every value that is out of range.

    Example:
        >>> import sftorch, torch
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = sftorch.GPAAdamW([p], lr=0.01, weight_decay=0.1)
        >>> p.square().sum().backward()
        >>> optimizer.step()
    """

    # Its groups have Meta's names; its state is AdamW's.
    law = MEMBERS["gpa"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        eps: float = 1e-8,
        beta1: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 0,
        iterate_averaging_type: Any = "gpa",
        train_interp_coeff: float = 0.7,
        eval_interp_coeff: float = 0.9967,
        weight_pow_coeff: float = 0.0,
        weight_lr_power: float = 2,
        *,
        decay_at: Literal["y", "z"] = "z",
        foreach: bool | None = True,
        fused: bool | None = None,
        precision: Precision = "exact",
        seed: int = 0,
    ):
        named = getattr(iterate_averaging_type, "name", iterate_averaging_type)
        iterate_averaging_type = named.lower() if isinstance(named, str) else named
        options = {name: value for name, value in given(locals()).items() if name != "named"}
        fixed = {"maximize": False, "capturable": False, "differentiable": False}
        super(AdamWDirection, self).__init__(params, options | fixed)

    def _values(self, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        values, names = super()._values(group)
        if group["iterate_averaging_type"] == "gpa" and checks.DECAY_RATE.holds(group["eval_interp_coeff"]):
            values |= {"window": 1.0 / (1.0 - group["eval_interp_coeff"]), "window_rule": "constant"}
        return values, names

    def _problems(self, group: dict[str, Any], values: dict[str, Any]) -> list[str]:
        rules = {"iterate_averaging_type": _AVERAGES, "eval_interp_coeff": checks.DECAY_RATE}
        return super()._problems(group, values) + [
            checks.problem(name, rule, group[name])
            for name, rule in rules.items()
            if not rule.holds(group[name])
        ]
