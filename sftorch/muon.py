"""Schedule-Free Muon: a matrix moves along the polar factor of its momentum (S6), the rest by AdamW."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sfcore import matrices
from sfcore.averaging import bias_correction
from sfcore.checks import HyperparameterError
from sfcore.laws import LAWS
from sftorch.adamw import ADAMW, average_single_
from sftorch.law.iterates import Scalar
from sftorch.law.parts import laid_out_like, part, whole
from sftorch.state import arguments
from sftorch.state.compiler import uncompiled
from sftorch.step.backends import Direction
from sftorch.step.plan import DirectedOptimizer, Precision, YAtRest, given

Tensors = list[Tensor]


@functools.cache
def muon(ns_steps: int, nesterov: bool, adjust_lr: str, output_axis: str) -> Direction:
    """Returns the direction of matrices, with what decides more than numbers."""

    def lengthened(
        wanted: Tensors, us: Tensors, b2_rows: Scalar, eps: Scalar, of: Sequence[Tensor]
    ) -> Tensors:
        """Returns directions of what a polar factor is taken of; the second moments of rows are updated."""
        axis = matrices.axis_of_rows(output_axis)
        if of:
            wanted = [whole(p, n) for p, n in zip(of, wanted, strict=True)]
        flat = [n.movedim(axis, 0).flatten(1) for n in wanted]
        found = []
        for i, (n, p) in enumerate(zip(wanted, polar_factors(flat, ns_steps), strict=True)):
            rows, cols = p.shape
            if us:
                u = us[i].view(rows, 1)
                average_single_(u, (p * p).mean(1, keepdim=True), 1.0 - b2_rows)
                q = p / (u.sqrt() + eps)
                size = torch.linalg.vector_norm(q)
                longer = matrices.size(rows, cols, adjust_lr, torch.linalg.vector_norm(p))
                d = q * (longer / torch.where(size > 0, size, 1.0))
            else:
                d = p * matrices.length(rows, cols, adjust_lr)
            found.append(d.view(n.movedim(axis, 0).shape).movedim(0, axis))  # S6
        return [part(laid_out_like(p, d)) for p, d in zip(of, found, strict=True)] if of else found

    def muon_single(
        grad: Tensor, buffers: dict[str, Tensor], *numbers: Scalar, of: Sequence[Tensor] = ()
    ) -> Tensor:
        """Returns Muon's direction of a matrix; the buffers are updated in place, that of rows if there."""
        mu, b2_rows, eps = numbers
        m = buffers["momentum_buffer"]
        average_single_(m, grad, 1.0 - mu)
        n = (m - m * (1.0 - mu)) + grad * (1.0 - mu) if nesterov else m
        us = [buffers["row_exp_avg_sq"]] if "row_exp_avg_sq" in buffers else []
        return lengthened([n], us, b2_rows, eps, of)[0]

    def muon_foreach(
        grads: Tensors, buffers: dict[str, Tensors], *numbers: float, of: Sequence[Tensor] = ()
    ) -> Tensors:
        """The same for lists; Newton-Schulz takes the matrices of one shape, or of its transpose, at once."""
        mu, b2_rows, eps = numbers
        m = buffers["momentum_buffer"]
        torch._foreach_add_(m, m, alpha=-(1.0 - mu))
        torch._foreach_add_(m, grads, alpha=1.0 - mu)
        wanted = m
        if nesterov:
            wanted = list(torch._foreach_add(m, m, alpha=-(1.0 - mu)))
            torch._foreach_add_(wanted, grads, alpha=1.0 - mu)
        return lengthened(wanted, buffers.get("row_exp_avg_sq", []), b2_rows, eps, of)

    return Direction(muon_single, muon_foreach, gathers=True)


def polar_factors(wanted: Sequence[Tensor], steps: int) -> Tensors:
    """Returns about the polar factor of each matrix [rows, cols], by Newton-Schulz.

    Its singular values come to lie between 0.7 and 1.2 or so; small ones of a matrix that is nearly of lower
    rank stay smaller.
    """
    wide = [n.mT if n.shape[0] > n.shape[1] else n for n in wanted]
    alike: dict[Any, list[int]] = {}
    for i, n in enumerate(wide):
        alike.setdefault((n.shape, n.dtype, n.device), []).append(i)
    found = list(wide)
    for places in alike.values():
        for i, factor in zip(
            places, _iterated(torch.stack([wide[i] for i in places]), steps).unbind(), strict=True
        ):
            found[i] = factor
    return [p.mT if n.shape[0] > n.shape[1] else p for n, p in zip(wanted, found, strict=True)]


def _iterated(n: Tensor, steps: int) -> Tensor:
    """Returns the polar factors of [matrices, rows, cols] with rows <= cols.

    In bfloat16 on CUDA devices that have it, where that is many times as fast; in the dtype of n elsewhere.
    """
    a, b, c = matrices.NEWTON_SCHULZ
    norm = torch.linalg.vector_norm(n, dim=(-2, -1), keepdim=True)
    x = n / (norm + matrices.TINY)
    if n.is_cuda and n.dtype is torch.float32 and torch.cuda.is_bf16_supported(including_emulation=False):
        x = x.to(torch.bfloat16)
    for _ in range(steps):
        gram = x @ x.mT
        even = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, even, x, beta=a)
    return x.to(n.dtype)


class MuonDirection(DirectedOptimizer):
    """Abstract: constructor, groups and directions of Muon."""

    law = LAWS["muon"]

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
        mu: float = 0.95,
        ns_steps: int = 5,
        nesterov: bool = True,
        normalize: Literal["none", "rows"] = "none",
        b2_rows: float = 0.95,
        adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        output_axis: Literal["first", "last"] = "first",
        adam_lr_ratio: float = 1.0,
        use_muon: bool | None = None,
        maximize: bool = False,
        fused: bool | None = None,
        precision: Precision = "exact",
        seed: int = 0,
        capturable: bool = False,
        differentiable: bool = False,
    ):
        super().__init__(params, given(locals()))
        if not any(group["use_muon"] for group in self.param_groups):
            count = len(self._params())
            raise HyperparameterError([matrices.no_matrix(count, "give a group use_muon=True")])

    @uncompiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, or two: its matrices and what is left, unless it says with use_muon which it has.

        Args:
            param_group: `{"params": ..., option: value, ...}`; missing options take the defaults.

        Raises:
            HyperparameterError: with every option that is out of range or misspelt, and every parameter of
                a group with use_muon=True that can be no matrix; nothing has changed then.
        """
        group = arguments.as_group(param_group, self.defaults, self._params())
        self._opening_books(self.defaults | group)
        for one in self._by_kind(group):
            super().add_param_group(one)

    def _by_kind(self, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields a group as groups of matrices and of others, without the empty one."""
        chosen = group.get("use_muon", self.defaults["use_muon"])
        if chosen is not None or not group["params"]:
            yield group | {"use_muon": bool(chosen)}
            return
        for use_muon in (True, False):
            if params := [item for item in group["params"] if _is_matrix(item) == use_muon]:
                yield group | {"params": params, "use_muon": use_muon}

    def _leaves(self, group: Mapping[str, Any]) -> str:
        return matrices.MATRICES if group.get("use_muon") else matrices.OTHERS

    def _called(self, group: dict[str, Any]) -> str:
        if not group["use_muon"]:
            return "parameters for AdamW"
        # Which groups said use_muon=True themselves is not kept; those of the constructor's did.
        known = "param_names" in group or self.defaults["use_muon"]
        return "matrices" if known else "matrices by shape, for want of names also embeddings and heads,"

    def _problems(self, group: dict[str, Any], values: dict[str, Any]) -> list[str]:
        found = super()._problems(group, values)
        for index, item in enumerate(group["params"] if group.get("use_muon") is True else ()):
            name, p = item if isinstance(item, tuple) else ("", item)
            where = f"params[{index}] {name} of a group with use_muon=True".replace("  ", " ")
            wrong = matrices.wrong_matrix(where, p.shape, p.is_complex())
            if wrong:
                found.append(f"{wrong}, in a group with use_muon=False")
        return found

    def _direction(self, values: Mapping[str, Any], t: int) -> tuple[Direction, tuple[float, ...]]:
        if values["leaves"] == matrices.OTHERS:
            b2 = values["b2"]
            return ADAMW, (b2, values["eps"], 0.0, bias_correction(b2, t), 1.0)
        steps, *decides = (values[name] for name in ("ns_steps", "nesterov", "adjust_lr", "output_axis"))
        return muon(int(steps), *decides), (values["mu"], values["b2_rows"], values["eps"])


def _is_matrix(item: Any) -> bool:
    """Tells whether Muon takes a parameter by default, which comes with a name or without."""
    name, p = item if isinstance(item, tuple) else ("", item)
    return not p.is_complex() and matrices.is_matrix(p.shape, name)


class MuonScheduleFree(MuonDirection, YAtRest):
    """Schedule-Free Muon: matrices step along a polar factor, all else by AdamW. The parameters hold y in
    train mode and x in eval mode.

    The momentum m of a matrix and its gradient give h = (1 - mu) g + mu m; Newton-Schulz iterations bring the
    singular values of h near 1. With normalize="rows" (NorMuon) rows are then brought to one size. A group
    becomes two, of its matrices and of all else. Of DTensors whole matrices are gathered in every step.

    Args:
        params: iterable of floating-point or complex leaves, of (name, leaf), or of group dicts. Pass
            `model.named_parameters()`: embeddings and heads, which suit AdamW, are known by their names.
        lr: step size, >= 0, default 0.0025; with adjust_lr="match_rms_adamw" one that suits AdamW.
        betas: (beta, b2): interpolation y = beta x + (1 - beta) z in [0, 1], and decay of the second
            moment of what is no matrix in [0, 1); default (0.9, 0.999).
        eps: added to denominators outside the root, > 0, default 1e-8.
        weight_decay: decoupled decay taken at y, >= 0, default 0.
        warmup_steps: optimizer steps of linear warm-up, default 0; about 5% of a run helps.
        r: the average weighs step t by t^r, >= 0, default 0.
        weight_lr_power: and by the largest lr so far to this power, >= 0, default 2.
        foreach: one call for a list of tensors instead of a loop, default True; matrices of one shape then
            share their Newton-Schulz iterations.
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
        decay_at: the point that decays, "y" (default, as in the other optimizers here) or "z", as published
            for Schedule-Free NorMuon and AMUSE.
        decay_power: weight_decay is multiplied by lr to this power, 1 (default) or 2 (AdamC); "normalized" is
            AdamC's too, lr^2 over the largest lr so far, whose weight_decay is like AdamW's.
        mu: decay of the momentum, in [0, 1), default 0.95.
        ns_steps: Newton-Schulz iterations, 1 to 99, default 5.
        nesterov: whether h is (1 - mu) g + mu m (default), or m.
        normalize: "none" (default), or "rows" for NorMuon, which keeps one number more a row.
        b2_rows: decay of the second moment of rows, in [0, 1), default 0.95.
        adjust_lr: a polar factor is multiplied by 0.2 sqrt(max(rows, cols)) with "match_rms_adamw" (default),
            by sqrt(max(1, rows / cols)) with "original".
        output_axis: the axis that rows are counted along, "first" (default) or "last".
        adam_lr_ratio: what is no matrix has lr times this, >= 0, default 1.
        use_muon: of a group: True, all of it are matrices, of two axes or more and real; False, none is. None
            (default): all such parameters but those whose names are of embeddings, heads, biases and scales.
        maximize: ascend instead of descend, default False.
        fused: one native pass over memory for what is no matrix: None (default) on the CPU, where it can be
            had and foreach is not False; False for never. True is refused: Muon has no kernel.
        precision: "exact" (default), or "lean": z - y and the buffers in bfloat16, rounded at random without
            bias. docs/precision.md has what it costs.
        seed: of those roundings, >= 0, default 0; the same seed gives the same bits, also after a resume.
        capturable, differentiable: refused when True; the message says why.

    Raises:
        HyperparameterError: with every value that is out of range (a ValueError); if no parameter is a
            matrix, or one in a group with use_muon=True can be none.

    Example:
        >>> import sftorch, torch
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = sftorch.MuonScheduleFree(model.named_parameters(), lr=0.01, warmup_steps=10)
        >>> [(group["use_muon"], group["param_names"]) for group in optimizer.param_groups]
        [(True, ['weight']), (False, ['bias'])]
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> with optimizer.evaluation():
        ...     prediction = model(torch.ones(1, 2))
    """
