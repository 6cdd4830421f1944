"""Schedule-Free AdamW: the direction is the gradient over its root mean square (S6)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sfcore.averaging import bias_correction
from sfcore.laws import LAWS
from sftorch.law.iterates import Scalar
from sftorch.step.backends import Direction
from sftorch.step.plan import DirectedOptimizer, Precision, YAtRest, given

Init = TypeVar("Init", bound=Callable[..., None])


def average_single_(old: Tensor, new: Tensor, share: Scalar) -> None:
    """Moves a moment by its share of what is new, in place.

    By the one number 1 - decay: decay = 0.999 and 1 - decay, each rounded to float32, would bias the
    moment by 1.3e-5.
    """
    old.sub_(old * share).add_(new * share)


def adamw_single(grad: Tensor, buffers: dict[str, Tensor], *numbers: Scalar) -> Tensor:
    """Returns AdamW's direction; the moments are updated in place, the first one if there is one."""
    b2, eps, m1, correction2, correction1 = numbers
    v, m = buffers["exp_avg_sq"], buffers.get("exp_avg")
    average_single_(v, grad * grad, 1.0 - b2)
    denominator = (v * (1.0 / correction2)).sqrt_().add_(eps)  # one division less an element
    if m is None:
        return grad / denominator  # S6
    average_single_(m, grad, 1.0 - m1)
    return m * (1.0 / correction1) / denominator  # S6


def adamw_foreach(grads: list[Tensor], buffers: dict[str, list[Tensor]], *numbers: float) -> list[Tensor]:
    """The same for lists."""
    b2, eps, m1, correction2, correction1 = numbers
    v, m = buffers["exp_avg_sq"], buffers.get("exp_avg")
    torch._foreach_add_(v, v, alpha=-(1.0 - b2))
    torch._foreach_addcmul_(v, grads, grads, value=1.0 - b2)
    denominators = torch._foreach_mul(v, 1.0 / correction2)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, eps)
    if m is None:
        return list(torch._foreach_div(grads, denominators))  # S6
    torch._foreach_add_(m, m, alpha=-(1.0 - m1))
    torch._foreach_add_(m, grads, alpha=1.0 - m1)
    directions = list(torch._foreach_mul(m, 1.0 / correction1))
    torch._foreach_div_(directions, denominators)
    return directions  # S6


ADAMW = Direction(adamw_single, adamw_foreach, "ADAMW")


def _ninth_by_type(init: Init) -> Init:
    """Takes a number in the ninth place for inner_momentum, which schedulefree has there since 1.4.1."""

    @functools.wraps(init)
    def told_apart(self: AdamWDirection, *args: Any, **kwargs: Any) -> None:
        if len(args) > 8 and isinstance(args[8], (int, float)) and not isinstance(args[8], bool):
            init(self, *args[:8], *args[9:], inner_momentum=args[8], **kwargs)
        else:
            init(self, *args, **kwargs)

    return cast(Init, told_apart)


class AdamWDirection(DirectedOptimizer):
    """Abstract: constructor and direction of AdamW."""

    law = LAWS["adamw"]

    @_ninth_by_type
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        *,
        inner_momentum: float = 0.0,
        prior_steps: int = 0,
        c_warmup: int = 0,
        refined_c: float = 0.0,
        window: float = 0,
        window_rule: Literal["floor", "constant"] = "floor",
        weight_lr: Literal["max", "current"] = "max",
        beta_rule: Literal["constant", "anneal", "amuse"] = "constant",
        beta_max: float = 0.965,
        beta_anneal_steps: int = 0,
        beta_hold_steps: int = 0,
        rho: float = 0.8,
        decay_at: Literal["y", "z"] = "y",
        decay_power: Literal[1, 2, "normalized"] = 1,
        maximize: bool = False,
        fused: bool | None = None,
        precision: Precision = "exact",
        seed: int = 0,
        capturable: bool = False,
        differentiable: bool = False,
    ):
        super().__init__(params, given(locals()))

    def _direction(self, values: Mapping[str, Any], t: int) -> tuple[Direction, tuple[float, ...]]:
        b2, m1 = values["b2"], values["inner_momentum"]
        return ADAMW, (b2, values["eps"], m1, bias_correction(b2, t), bias_correction(m1, t))


class AdamWScheduleFree(AdamWDirection, YAtRest):
    """Schedule-Free AdamW (arXiv 2405.15682). The parameters hold y in train mode and x in eval mode.

    Args:
        params: iterable of floating-point or complex leaves, of (name, leaf), or of group dicts.
        lr: step size, >= 0, default 0.0025; 1 to 10 times that of scheduled AdamW is a usual start.
        betas: (beta, b2): interpolation y = beta x + (1 - beta) z in [0, 1], and decay of the second
            moment in [0, 1); default (0.9, 0.999).
        eps: added to the denominator outside the root, > 0, default 1e-8.
        weight_decay: decoupled decay taken at y, >= 0, default 0.
        warmup_steps: optimizer steps of linear warm-up, default 0; about 5% of a run helps.
        r: the average weighs step t by t^r, >= 0, default 0.
        weight_lr_power: and by the largest lr so far to this power, >= 0, default 2.
        foreach: one call for a list of tensors instead of a loop, default True. A number in its place is
            inner_momentum, as in schedulefree after 1.4.1, and the place after it is foreach's.
        inner_momentum: decay of a first moment in the numerator, in [0, 1); 0 (default) keeps no buffer.
        prior_steps: the initial weights count as the average of this many earlier steps, default 0.
        c_warmup: x is z in this many first steps, which do not count in the average (F5), default 0.
        refined_c: c is multiplied by (1 - beta) times this, up to 1 (F5), >= 0; 0 (default) is off.
        window: c is at least 1 / window, so that the average forgets what is older (F5); 0 (default) is off.
        window_rule: "floor" (default), or "constant" for c = 1 / window in every step.
        weight_lr: a step is weighed by "max" (default), the largest lr so far, or by "current", its own.
        beta_rule: "constant" (default); "anneal" lets 1 - beta fall to 1 - beta_max, on a line of logarithms,
            "amuse" by a power of time (F9), so that x stays the weighted mean. Not beside a scheduler that
            cycles betas.
        beta_max: where "anneal" ends, >= beta and < 1, default 0.965.
        beta_anneal_steps: the steps in which it gets there.
        beta_hold_steps: steps > 1 before "amuse" begins, mostly those of the warm-up.
        rho: of "amuse", > 0, default 0.8: 1 - beta is its first value times
            ((beta_hold_steps - 1) / (t - 1))^rho.
        decay_at: the point that decays, "y" (default) or "z".
        decay_power: weight_decay is multiplied by lr to this power, 1 (default) or 2 (AdamC); "normalized" is
            AdamC's too, lr^2 over the largest lr so far, whose weight_decay is like AdamW's.
        maximize: ascend instead of descend, default False.
        fused: one native pass over memory: None (default) on the CPU, where it can be had and foreach is not
            False; True to require it of all parameters, also on CUDA devices, in Triton and not yet run on
            one; False for never. It wins over foreach, torch.compile over both.
        precision: "exact" (default), or "lean" for about 8 bytes a 16-bit parameter in all: z - y and the
            moments in bfloat16, rounded at random without bias; "8bit" for about 5 bytes a bfloat16 parameter
            and 7 a float32 one, both in codes of 8 to 16 bits. docs/precision.md has what they cost.
        seed: of those roundings, >= 0, default 0; the same seed gives the same bits, also after a resume.
        capturable, differentiable: refused when True; the message says why.

    Raises:
        HyperparameterError: with every value that is out of range (a ValueError).

    Example:
        >>> import sftorch, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.01, warmup_steps=10)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> with optimizer.evaluation():
        ...     prediction = model(torch.ones(1, 2))
    """
