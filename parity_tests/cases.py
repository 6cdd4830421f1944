"""The cases: data with an id and a reason. Options carry the names of the equations S1 to S9."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

AVERAGING = {"lr": 0.0025, "beta": 0.9, "r": 0.0, "weight_lr_power": 2.0, "prior_steps": 0}
MOMENTS = {"b2": 0.999, "eps": 1e-8}
# Written out, not imported: test_mirror.py holds both twins and sfcore.hyperparameters to them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": AVERAGING | {"lr": 1.0, "weight_decay": 0.0, "warmup_steps": 0},
    "adamw": AVERAGING | MOMENTS | {"weight_decay": 0.0, "warmup_steps": 0, "inner_momentum": 0.0},
    "radam": AVERAGING | MOMENTS | {"weight_decay": 0.0, "silent_sgd_phase": True},
}
# The multiple of lr that a schedule gives at step 0, 1, 2, ...
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 1.0,
    "falling": lambda step: max(0.0, 1 - step / 50),
    "from zero": lambda step: min(1.0, step / 8),
    "zero every third": lambda step: float(step % 3 > 0),
    "sawtooth": lambda step: 0.25 + 0.25 * (step % 4),
    "steps down": lambda step: 1 / (1 + step // 20),
}


@dataclass(frozen=True)
class Case:
    """One run to agree on.

    Attributes:
        id, why: name and the reason it is here.
        family: the column of the conformance matrix.
        optimizer: "sgd", "adamw" or "radam".
        changed: options that differ from DEFAULTS.
        schedule: a name in SCHEDULES.
        problem: a name in problems.PROBLEMS.
        steps: updates.
    """

    id: str
    why: str
    family: str
    optimizer: str
    changed: dict[str, Any] = field(default_factory=dict)
    schedule: str = "constant"
    problem: str = "smooth"
    steps: int = 60

    @property
    def options(self) -> dict[str, Any]:
        """Every option of the optimizer, by canonical name."""
        return DEFAULTS[self.optimizer] | self.changed

    @property
    def lrs(self) -> list[float]:
        """The schedule's learning rate at each step, before warm-up."""
        return [self.options["lr"] * SCHEDULES[self.schedule](step) for step in range(self.steps)]


def _shared(optimizer: str, lr: float) -> list[Case]:
    """Returns the cases that make sense for every optimizer, at a learning rate that moves its problem."""

    def case(name: str, why: str, family: str, changed: dict[str, Any] | None = None, **more: Any) -> Case:
        return Case(f"{optimizer}-{name}", why, family, optimizer, {"lr": lr} | (changed or {}), **more)

    decay = {"weight_decay": 0.1}
    return [
        Case(f"{optimizer}-defaults", "what a user gets who sets nothing", "defaults", optimizer),
        case("long", "rounding and sums over a longer run", "defaults", steps=300),
        case("decay", "decay is taken at y", "decay", decay),
        case("decay-strong", "lr * wd near 1, where decay outweighs the gradient", "decay", {"weight_decay": 0.9 / lr}),
        case("r-1", "the average weighs step t by t", "averaging", {"r": 1.0}),
        case("r-half", "a fractional power of t", "averaging", {"r": 0.5}, schedule="sawtooth"),
        case("power-0", "every step weighs the same, whatever its lr", "averaging", {"weight_lr_power": 0.0}, schedule="from zero"),
        case("power-1", "weights are lr_max itself", "averaging", {"weight_lr_power": 1.0}, schedule="from zero"),
        case("beta-0", "Polyak averaging: y is z, x cannot be had from them", "interpolation", {"beta": 0.0}),
        case("beta-0-decay", "the same with everything that reads y", "interpolation", {"beta": 0.0, "r": 1.0} | decay, schedule="from zero"),
        case("beta-half", "x and z weigh the same in y", "interpolation", {"beta": 0.5}),
        case("beta-0.98", "for very long runs; x is dearest to recover at small 1 - beta", "interpolation", {"beta": 0.98}),
        case("beta-1", "primal averaging: y is x", "interpolation", {"beta": 1.0}),
        case("beta-1-decay", "the same with decay at y = x", "interpolation", {"beta": 1.0} | decay),
        case("prior-10", "the initial weights count as ten steps", "prior", {"prior_steps": 10}),
        case("prior-400", "longer than the run, and weights that grow with t + K", "prior", {"prior_steps": 400, "r": 1.0}),
        case("prior-1-falling", "prior weights use the full lr, not a later one", "prior", {"prior_steps": 1}, schedule="falling"),
        case("falling", "weights keep the largest lr so far; ends at lr = 0", "schedule", schedule="falling"),
        case("from-zero", "the first step has weight 0: c is 0, not 0 / 0", "schedule", schedule="from zero"),
        case("zero-every-third", "steps that average but do not move", "schedule", schedule="zero every third"),
        case("sawtooth", "lr falls and rises again", "schedule", schedule="sawtooth"),
        case("steps-down", "lr is read at the same step by update and weight", "schedule", schedule="steps down"),
        case("lr-0", "nothing moves and nothing divides by zero", "extremes", {"lr": 0.0}),
        case("lr-huge", "leaves far from their start", "extremes", {"lr": 100 * lr}),
        case("lr-small", "movement near the resolution of float32", "extremes", {"lr": 1e-5 * lr}),
        case("zeros", "gradients that are exactly zero", "extremes", problem="zeros"),
        case("scales", "leaves of very different sizes, and spikes", "extremes", problem="scales"),
    ]


def _warmup(optimizer: str, lr: float) -> list[Case]:
    """Returns the warm-up cases of SGD and AdamW."""

    def case(name: str, why: str, changed: dict[str, Any], **more: Any) -> Case:
        return Case(f"{optimizer}-{name}", why, "warm-up", optimizer, {"lr": lr} | changed, **more)

    return [
        case("warmup-1", "the last warm-up step has the full lr, so one step of warm-up changes nothing", {"warmup_steps": 1}),
        case("warmup-5", "the ramp starts at 1/5, not at 0", {"warmup_steps": 5}),
        case("warmup-unfinished", "a ramp longer than the run", {"warmup_steps": 500}),
        case("warmup-decay", "decay is scaled by the ramp too", {"warmup_steps": 10, "weight_decay": 0.1}),
        case("warmup-schedule", "the ramp multiplies a schedule", {"warmup_steps": 10}, schedule="steps down"),
        case("warmup-power-1-r-2", "ramp, power and r in one weight", {"warmup_steps": 5, "weight_lr_power": 1.0, "r": 2.0}),
        case("warmup-prior", "prior weights use the unramped lr", {"warmup_steps": 5, "prior_steps": 10}),
        case("warmup-beta-0", "the ramp without interpolation", {"warmup_steps": 5, "beta": 0.0}),
    ]


def _own() -> list[Case]:
    """Returns the cases of options that only one or two optimizers have."""

    def case(id: str, why: str, family: str, changed: dict[str, Any], **more: Any) -> Case:
        optimizer = id.split("-")[0]
        return Case(id, why, family, optimizer, {"lr": 0.01 if optimizer == "adamw" else 0.05} | changed, **more)

    everything = {"beta": 0.95, "weight_decay": 0.05, "r": 1.0, "weight_lr_power": 1.0, "prior_steps": 7}
    moments = {"b2": 0.99, "eps": 1e-3}
    not_silent = {"silent_sgd_phase": False}
    return [
        case("sgd-everything", "all options at once", "everything", everything | {"warmup_steps": 20}, schedule="steps down", problem="scales", steps=200),
        case("adamw-everything", "all options at once", "everything", everything | moments | {"warmup_steps": 20, "inner_momentum": 0.8}, schedule="steps down", problem="scales", steps=200),
        case("radam-everything", "all options at once", "everything", everything | moments, schedule="steps down", problem="scales", steps=200),
        case("radam-everything-not-silent", "all options at once", "everything", everything | moments | not_silent, schedule="steps down", steps=200),
        case("adamw-b2-0", "v is the last squared gradient, and log(b2) does not exist", "moments", {"b2": 0.0}),
        case("adamw-b2-0.9", "a short memory", "moments", {"b2": 0.9}),
        case("adamw-b2-0.9-zeros", "v decays to nothing between gradients", "moments", {"b2": 0.9}, problem="zeros"),
        case("adamw-eps-large", "eps as large as the gradients shows where it is added", "moments", {"eps": 1.0}),
        case("adamw-eps-scales", "eps between the sizes of two leaves", "moments", {"eps": 1e-3}, problem="scales"),
        case("adamw-inner", "a first moment in the numerator, with its own bias correction", "moments", {"inner_momentum": 0.9}),
        case("adamw-inner-zeros", "the first moment keeps moving where gradients are zero", "moments", {"inner_momentum": 0.5, "b2": 0.99}, problem="zeros"),
        case("adamw-inner-b2-0", "the two moments with memories the wrong way round", "moments", {"inner_momentum": 0.9, "b2": 0.0, "eps": 0.1}),
        case("adamw-inner-decay-warmup", "decay is not in the first moment", "moments", {"inner_momentum": 0.9, "weight_decay": 0.1, "warmup_steps": 5}),
        case("radam-b2-0.9", "rectification from another memory", "moments", {"b2": 0.9}),
        case("radam-eps-large", "no eps in the SGD phase, one after it", "moments", {"eps": 1.0} | not_silent),
        case("radam-silent-decay", "decay is silent too", "silent phase", {"weight_decay": 0.1}),
        case("radam-not-silent", "the first steps are SGD steps with the full lr", "silent phase", not_silent),
        case("radam-not-silent-decay", "decay in SGD and rectified steps", "silent phase", not_silent | {"weight_decay": 0.1}),
        case("radam-not-silent-falling", "lr_max stays at the lr of the SGD phase", "silent phase", not_silent, schedule="falling"),
        case("radam-not-silent-prior", "the prior meets a phase of larger lr", "silent phase", not_silent | {"prior_steps": 10}),
        case("radam-silent-power-0", "silent steps weigh 0^0 = 1", "silent phase", {"weight_lr_power": 0.0}),
        case("radam-never-rectified", "rho never passes 4: SGD for ever", "silent phase", not_silent | {"b2": 0.5}),
        case("radam-zeros-not-silent", "no gradient in the whole SGD phase", "silent phase", not_silent, problem="zeros"),
    ]


CASES: dict[str, Case] = {
    case.id: case
    for case in (
        *_shared("sgd", 0.05),
        *_warmup("sgd", 0.05),
        *_shared("adamw", 0.01),
        *_warmup("adamw", 0.01),
        *_shared("radam", 0.05),
        *_own(),
    )
}
FAMILIES = list(dict.fromkeys(case.family for case in CASES.values()))
