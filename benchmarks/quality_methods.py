"""The methods of `benchmarks quality`, a row each, and what a row is in JAX and in torch.

Nothing decays weights, and every second moment has b2 = 0.99. A row that has `scale` tries the grid of its
problem times that number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

B2 = 0.99


class Method(NamedTuple):
    """One row: only data.

    Attributes:
        name, label: in results, and in tables.
        law: "sgd", "adamw", "radam", "muon", "plus", Schedule-Free; or "plain adamw", "plain muon" of optax.
        options: hyperparameters by their names in JAX; those of SHARES as a share of the run.
        schedule: "constant", "cosine", "linear" or "wsd".
        warmup: share of the run.
        scale: of the grid of rates.
        adaptive: whether the law has a second moment.
    """

    name: str
    label: str
    law: str
    options: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple's default, which nobody changes)
    schedule: str = "constant"
    warmup: float = 0.05
    scale: float = 1.0

    @property
    def schedule_free(self) -> bool:
        return not self.law.startswith("plain")

    @property
    def has_twin(self) -> bool:
        return self.law != "plain muon"  # torch's own rounds to bfloat16: nothing to hold ours to


class Setting(NamedTuple):
    """What a run knows beside its rate: steps in all, those of warm-up, and the weights that are Muon's."""

    steps: int
    warmup: int
    matrices: frozenset[str]


SHARES = ("window", "b1_hold_steps", "b1_anneal_steps", "c_warmup")  # given as a share of the run
AMUSE = {"b1": 0.6, "b1_rule": "amuse", "b1_hold_steps": 0.05, "rho": 0.8}
PLUS = {"b1_anneal_steps": 0.5, "c_warmup": 0.05, "polyak_beta": 0.9}
GPA = {"b1": 0.7, "inner_momentum": 0.9, "window": 0.1, "window_rule": "constant", "decay_at": "z"}
METHODS = {
    method.name: method
    for method in (
        Method("sf-adamw", "Schedule-Free AdamW", "adamw"),
        Method("sf-adamw-95", "Schedule-Free AdamW, beta 0.95", "adamw", {"b1": 0.95}),
        Method("sf-adamw-r", "Schedule-Free AdamW, r = 2", "adamw", {"r": 2.0}),
        Method("sf-adamw-c", "Schedule-Free AdamW, refined C = 30", "adamw", {"refined_c": 30.0}),
        Method("sf-radam", "Schedule-Free RAdam", "radam"),
        Method("sf-sgd", "Schedule-Free SGD", "sgd", scale=100.0),
        Method("sf-muon", "Schedule-Free Muon", "muon", {"mu": 0.8}, scale=2.0),
        Method("sf-normuon", "Schedule-Free NorMuon", "muon", {"mu": 0.8, "normalize": "rows"}, scale=2.0),
        Method("amuse", "AMUSE: Schedule-Free Muon, beta rising from 0.6", "muon", AMUSE, scale=2.0),
        Method(
            "sf-plus", "ScheduleFree+ (a Polyak step; the rate is its multiple)", "plus", PLUS, scale=100.0
        ),
        Method("gpa", "GPA-AdamW, cosine", "adamw", GPA, "cosine"),
        Method("adamw-cosine", "AdamW, cosine", "plain adamw", schedule="cosine"),
        Method("adamw-linear", "AdamW, linear", "plain adamw", schedule="linear"),
        Method("adamw-wsd", "AdamW, WSD", "plain adamw", schedule="wsd"),
        Method("adamw-constant", "AdamW, constant", "plain adamw"),
        Method("muon-cosine", "Muon, cosine", "plain muon", schedule="cosine", scale=2.0),
    )
}


def setting(method: Method, steps: int, matrices: Iterable[str]) -> Setting:
    """Returns the setting of a run."""
    return Setting(steps, round(method.warmup * steps), frozenset(matrices))


def factor(method: Method, run: Setting, step: Any, xp: Any) -> Any:
    """Returns lr(step) over the rate, `step` from 0: what the schedule and the warm-up make of it.

    WSD decays by 1 - sqrt over the last fifth; xp is numpy or jax.numpy.
    """
    ramp = xp.minimum(1.0, (step + 1) / max(run.warmup, 1))
    done = xp.clip((step - run.warmup) / max(run.steps - run.warmup, 1), 0, 1)
    if method.schedule == "cosine":
        return ramp * 0.5 * (1 + xp.cos(math.pi * done))
    if method.schedule == "linear":
        return ramp * (1 - done)
    if method.schedule == "wsd":
        return ramp * (1 - xp.sqrt(xp.clip((step - 0.8 * run.steps) / (0.2 * run.steps), 0, 1)))
    return ramp


def _options(method: Method, run: Setting) -> dict[str, Any]:
    """Returns the row's options, shares as steps."""
    options: dict[str, Any] = {"b2": B2} if method.law != "sgd" else {}
    options |= method.options
    options |= {name: round(options[name] * run.steps) for name in SHARES if name in options}
    if method.law == "muon":
        options["output_axis"] = "last"  # inputs @ weights
    return options


def transformation(method: Method, run: Setting, rate: Any) -> Any:
    """Returns the row in JAX: an optax transformation that takes `value=loss`; the rate may be traced."""
    import jax.numpy as jnp
    import optax

    import sfjax

    def schedule(step: Any) -> Any:
        return rate * factor(method, run, step, jnp)

    if method.law == "plain adamw":
        made = optax.adamw(schedule, b1=0.9, b2=B2, weight_decay=0.0)
    elif method.law == "plain muon":

        def dimensions(weights: Any) -> Any:
            spec = optax.contrib.MuonDimensionNumbers()
            return {name: spec if name in run.matrices else None for name in weights}

        made = optax.contrib.muon(
            schedule, adam_b2=B2, muon_weight_dimension_numbers=dimensions, consistent_rms=0.2
        )
    else:
        options = _options(method, run)
        if method.schedule == "constant" and method.law != "radam":  # which has a warm-up of its own
            options["warmup_steps"] = run.warmup
        if method.law == "muon":
            options["muon_mask"] = lambda weights: {name: name in run.matrices for name in weights}
        lr = rate if method.schedule == "constant" else schedule
        made = getattr(sfjax, f"schedule_free_{method.law}")(lr, **options)
    return optax.with_extra_args_support(made)


def torch_step(
    method: Method, run: Setting, rate: float, named: list[tuple[str, Any]]
) -> tuple[Callable[[Any], None], Any]:
    """Returns a row that has a twin in torch: a function of the loss that takes a step, and the optimizer."""
    import numpy as np
    import torch

    if method.schedule_free:
        made, scheduled = _schedule_free(method, run, rate, named)
    else:
        weights = [weight for _, weight in named]
        made, scheduled = torch.optim.AdamW(weights, lr=rate, betas=(0.9, B2), weight_decay=0.0), True
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        made, lambda step: float(factor(method, run, step, np)) if scheduled else 1.0
    )

    def step(loss: Any) -> None:
        made.step(**({"loss": loss} if method.law == "plus" else {}))
        scheduler.step()

    return step, made


def _schedule_free(
    method: Method, run: Setting, rate: float, named: list[tuple[str, Any]]
) -> tuple[Any, bool]:
    """Returns one of ours in torch, and whether its rate is a scheduler's."""
    import sftorch

    options = _options(method, run)
    beta = options.pop("b1", 0.9)
    weights: list[Any] = [weight for _, weight in named]
    if method.law == "plus":
        options |= {"betas": (options.pop("inner_momentum", 0.9), options.pop("b2")), "sf_beta1": beta}
        options = {name.replace("b1_", "sf_beta1_"): value for name, value in options.items()}
        return sftorch.AdamCScheduleFreePlusPaper(weights, lr=rate, **options), True
    options |= {"momentum": beta} if method.law == "sgd" else {"betas": (beta, options.pop("b2"))}
    options = {name.replace("b1_", "beta_"): value for name, value in options.items()}
    if method.law == "muon":
        weights = [
            {"params": [w for name, w in named if (name in run.matrices) == use], "use_muon": use}
            for use in (True, False)
        ]
    kind = {"sgd": "SGD", "adamw": "AdamW", "radam": "RAdam", "muon": "Muon"}[method.law]
    if ramped := method.schedule == "constant" and method.law != "radam":
        options["warmup_steps"] = run.warmup
    made = getattr(sftorch, f"{kind}ScheduleFree")(weights, lr=rate, **options)
    return made, not ramped and method.law != "radam"
