"""ScheduleFree+: AdamC whose step size follows the loss. Experimental."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sfcore import checks
from sfcore.averaging import BETAS, floats, polyak, smoothed_norm
from sfcore.laws import MEMBERS
from sftorch.adamw import AdamWDirection, AdamWScheduleFree
from sftorch.law.iterates import as_real
from sftorch.law.parts import gradients, part, parts_of
from sftorch.state import arguments, forms, meshes
from sftorch.state.compiler import uncompiled
from sftorch.state.meshes import together
from sftorch.step.plan import Precision, given

Loss = float | Tensor | Sequence[float | Tensor]
_NORM = "grad_l1_ema"


class AdamCScheduleFreePlusPaper(AdamWScheduleFree):
    """ScheduleFree+ (arXiv 2605.19095), with the arguments of schedulefree's class. Experimental.

    Schedule-Free AdamW with inner momentum, AdamC's decay and a Polyak step size: lr is multiplied by
    max(0, loss - f_star + beta <g, z - x>) over the smoothed norm sqrt(pi / 2) |g|_1. It needs the loss in
    every step. Where schedulefree's is wrong it differs: the norm is corrected for its start once, not in
    every step anew; the loss is averaged over the processes of the default process group, so that replicas
    stay equal; `clip` undoes what clipping does to the norm; without a gradient nothing moves.

    Args:
        params: as for `AdamWScheduleFree`.
        lr: multiple of the Polyak step, >= 0, default 1; a warm-up is a scheduler on it.
        betas: decays of the first moment in the numerator and of the second, in [0, 1); default (0.9, 0.95).
        sf_beta1: interpolation y = beta x + (1 - beta) z, in [0, 1], default 0.9.
        eps: added to the denominator outside the root, > 0, default 1e-8.
        weight_decay: decoupled decay at y, times lr squared (AdamC), >= 0, default 0; 20 to 50 is usual.
        r: the average weighs step t by t^r, >= 0, default 0.
        polyak_beta: decay of the smoothed norm, in [0, 1); 0 (default) takes that of the step.
        c_warmup: x is z in this many first steps, which do not count in the average, default 0.
        sf_beta1_anneal_steps: steps in which beta rises to sf_beta1_max; 0 (default): it stays.
        sf_beta1_max: default 0.965.
        weight_lr_power: the average weighs a step by the largest lr so far to this power, >= 0, default 2.
        f_star: what the loss can fall to, default 0; with label noise or a language model it is above 0.
        foreach, fused, precision, seed: as for `AdamWScheduleFree`.

    Raises:
        HyperparameterError: with every value that is out of range.

    Example:
        >>> import sftorch, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = sftorch.AdamCScheduleFreePlusPaper(model.parameters())
        >>> loss = model(torch.ones(1, 2)).square().sum()
        >>> loss.backward()
        >>> optimizer.step(loss=loss)
    """

    # Its groups have upstream's names; its state is AdamW's.
    law = MEMBERS["plus"]
    _carried = (_NORM,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        sf_beta1: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0,
        r: float = 0,
        polyak_beta: float = 0,
        c_warmup: int = 0,
        sf_beta1_anneal_steps: int = 0,
        sf_beta1_max: float = 0.965,
        weight_lr_power: float = 2,
        *,
        f_star: float = 0.0,
        foreach: bool | None = True,
        fused: bool | None = None,
        precision: Precision = "exact",
        seed: int = 0,
    ):
        fixed = {
            "decay_power": 2,
            "maximize": False,
            "capturable": False,
            "differentiable": False,
            _NORM: 0.0,
        }
        super(AdamWDirection, self).__init__(params, given(locals()) | fixed)

    def _values(self, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        values, names = super()._values(group)
        return values | {"beta_rule": "anneal" if values["beta_anneal_steps"] else "constant"}, names

    def _problems(self, group: dict[str, Any], values: dict[str, Any]) -> list[str]:
        found = super()._problems(group, values)
        rules = {"polyak_beta": checks.DECAY_RATE, "f_star": checks.FINITE}
        return found + [
            checks.problem(name, rule, group[name])
            for name, rule in rules.items()
            if not rule.holds(group[name])
        ]

    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, loss: Loss | None = None, clip: float = 1.0
    ) -> Any:
        """Takes one step; `p.grad` is read and never written.

        Args:
            closure: reevaluates the model at y and returns the loss; or
            loss: at y, of this process; of several micro-batches all of them, whose mean is taken. Under a
                GradScaler the one that is not scaled, as `scaler.step(optimizer, loss=loss)` after
                `scaler.unscale_(optimizer)`.
            clip: what gradients were multiplied by before the step, > 0, default 1: with
                `clip_grad_norm_` that is min(1, max_norm / norm).

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError: without a loss, or with both.
            ValueError: for a loss or gradients that are not finite numbers; nothing has moved then.
        """
        if (closure is None) == (loss is None):
            raise TypeError(
                f"loss must be passed to step() in one way, got closure {closure!r} and loss {loss!r}: "
                "call step(loss=loss) after backward(), or step(closure)"
            )
        if closure is not None and not callable(closure):
            raise TypeError(f"closure must be a function, got {closure!r}: pass a loss as step(loss=loss)")
        checks.require(ValueError, clip=(checks.FRACTION, clip))
        with torch.no_grad():
            if closure is not None:
                self._begin()
                with torch.enable_grad():
                    loss = closure()
            norm = self._measure(loss, clip)
            self._take_step(None)
            for group in self.param_groups:
                group[_NORM] = norm
        return None if closure is None else loss

    def step_func(self, function_value: Loss | None = None) -> Any:
        """Takes one step by the loss, as `step(loss=function_value)`, and returns it."""
        self.step(loss=function_value)
        return function_value

    @uncompiled
    def _measure(self, loss: Any, clip: float) -> float:
        """Takes the factor of the coming step; returns the smoothed norm after it. Nothing changes."""
        self._begin()
        with together(self._to_agree()):
            self._check_settings()
            arguments.check_gradients(self._params(), or_sparse=False)
            first, *others = [(group["polyak_beta"], group["f_star"]) for group in self.param_groups]
            if any(other != first for other in others):
                raise checks.HyperparameterError(
                    [
                        "polyak_beta and f_star must be the same in all groups, got "
                        f"{[first, *others]}: they belong to the one loss"
                    ]
                )
        (smoothing, f_star), norm = first, self.param_groups[0][_NORM]
        l1, inner = self._sums()
        mean = _mean(loss, self._params()[0].device)
        norm = smoothed_norm(norm, l1 / clip, smoothing, self.param_groups[0]["k"] + 1)
        factor = polyak(mean - f_star, inner / clip, norm)
        if not factor < float("inf"):
            raise ValueError(
                f"loss and gradients must be finite in a Polyak step, got {mean} and a norm of {norm}: leave "
                "the step out, as a GradScaler does"
            )
        self._factor = factor
        return norm

    def _sums(self) -> tuple[float, float]:
        """Returns |g|_1 and beta <g, z - x> over all parameters, of DTensors over all of their mesh."""
        sums: list[Tensor] = [torch.zeros(2, dtype=torch.float64)]
        layouts: list[meshes.Layout] = [None]
        for group in self.param_groups:
            values, _ = self._values(group)
            old, beta = self._y_beta(group), BETAS[values["beta_rule"]](group["k"] + 1, values, floats).beta
            moving = [p for p in group["params"] if p.grad is not None]
            for p, grad in zip(moving, gradients(moving) if moving else [], strict=True):
                g = as_real(grad).double()
                found, state = [torch.linalg.vector_norm(g, 1)], parts_of(self.state.get(p, {}))
                if forms.has_started(state) and old:
                    y = forms.joined(part(p), state)
                    gap = as_real(forms.gap_of(state) if "gap" in state else state["z"] - y)
                    found.append((g * gap.double()).sum() * (beta / old))
                else:
                    found.append(torch.zeros_like(found[0]))
                sums.append(torch.stack(found).cpu())
                layouts.append(meshes.layout(p))
        each = torch.stack(sums)
        for column in each.unbind(1):
            meshes.add_up_(column, layouts)
        l1, inner = each.sum(0).tolist()
        return l1, inner


def _mean(loss: Any, device: torch.device) -> float:
    """Returns the mean of a loss over micro-batches and over the processes of the default group."""
    losses = list(loss) if isinstance(loss, list | tuple) else [loss]
    found = sum(float(torch.as_tensor(one, dtype=torch.float64).mean()) for one in losses) / len(losses)
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        total = torch.tensor(found, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        found = float(total) / dist.get_world_size()
    return found
