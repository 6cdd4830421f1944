"""Schedule-Free SGD: the direction is the gradient (S6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sfcore.laws import LAWS
from sftorch.step.backends import Direction
from sftorch.step.plan import DirectedOptimizer, Precision, YAtRest, given


def sgd(grad: Any, buffers: Any) -> Any:
    """Returns SGD's direction of one gradient, or of a list of them: itself."""
    return grad  # S6


SGD = Direction(sgd, sgd, "SGD")


class SGDDirection(DirectedOptimizer):
    """Abstract: constructor and direction of SGD."""

    law = LAWS["sgd"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2,
        foreach: bool | None = True,
        *,
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
        return SGD, ()


class SGDScheduleFree(SGDDirection, YAtRest):
    """Schedule-Free SGD (arXiv 2405.15682). The parameters hold y in train mode and x in eval mode.

    Args:
        params: iterable of floating-point or complex leaves, of (name, leaf), or of group dicts.
        lr: step size, >= 0, default 1.0; 10 to 50 times that of scheduled SGD is a usual start.
        momentum: interpolation beta of y = beta x + (1 - beta) z, in [0, 1], default 0.9.
        weight_decay: decoupled decay taken at y, >= 0, default 0.
        warmup_steps: optimizer steps of linear warm-up, default 0; about 5% of a run helps.
        r: the average weighs step t by t^r, >= 0, default 0.
        weight_lr_power: and by the largest lr so far to this power, >= 0, default 2.
        foreach: one call for a list of tensors instead of a loop, default True.
        prior_steps: the initial weights count as the average of this many earlier steps, default 0.
        c_warmup: x is z in this many first steps, which do not count in the average (F5), default 0.
        refined_c: c is multiplied by (1 - beta) times this, up to 1 (F5), >= 0; 0 (default) is off.
        window: c is at least 1 / window, so that the average forgets what is older (F5); 0 (default) is off.
        window_rule: "floor" (default), or "constant" for c = 1 / window in every step.
        weight_lr: a step is weighed by "max" (default), the largest lr so far, or by "current", its own.
        beta_rule: "constant" (default); "anneal" lets 1 - beta fall to 1 - beta_max, on a line of logarithms,
            "amuse" by a power of time (F9), so that x stays the weighted mean. Not beside a scheduler that
            cycles momentum.
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
            moments in bfloat16, rounded at random without bias; "8bit" for about 4 bytes a bfloat16 parameter
            and 6 a float32 one: z - y in a code of 8 to 16 bits. docs/precision.md has what they cost.
        seed: of those roundings, >= 0, default 0; the same seed gives the same bits, also after a resume.
        capturable, differentiable: refused when True; the message says why.

    Raises:
        HyperparameterError: with every value that is out of range (a ValueError).

    Example:
        >>> import sftorch, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = sftorch.SGDScheduleFree(model.parameters(), lr=0.5)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.eval()  # the model now holds x: evaluate or save it
        >>> optimizer.train()
    """
