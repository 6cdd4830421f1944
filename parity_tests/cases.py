"""The cases: data with an id and a reason. Options carry the names of the equations S1 to S9."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

AVERAGING: dict[str, Any] = {"lr": 0.0025, "beta": 0.9, "r": 0.0, "weight_lr_power": 2.0, "prior_steps": 0}
AVERAGING |= {"c_warmup": 0, "refined_c": 0.0, "window": 0, "window_rule": "floor", "weight_lr": "max"}
AVERAGING |= {
    "beta_rule": "constant",
    "beta_max": 0.965,
    "beta_anneal_steps": 0,
    "beta_hold_steps": 0,
    "rho": 0.8,
}
DECAY: dict[str, Any] = {"weight_decay": 0.0, "decay_at": "y", "decay_power": 1}
MOMENTS = {"b2": 0.999, "eps": 1e-8}
# Written out, not imported: test_mirror.py holds both twins and sfcore.hyperparameters to them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": AVERAGING | DECAY | {"lr": 1.0, "warmup_steps": 0},
    "adamw": AVERAGING | MOMENTS | DECAY | {"warmup_steps": 0, "inner_momentum": 0.0},
    "radam": AVERAGING | MOMENTS | DECAY | {"silent_sgd_phase": True},
    "muon": AVERAGING
    | MOMENTS
    | DECAY
    | {"warmup_steps": 0, "mu": 0.95, "ns_steps": 5, "nesterov": True, "normalize": "none", "b2_rows": 0.95}
    | {"adjust_lr": "match_rms_adamw", "output_axis": "first", "adam_lr_ratio": 1.0},
}
# ScheduleFree+ has the options of its authors' class.
PLUS = {
    name: AVERAGING[name]
    for name in ("beta", "r", "weight_lr_power", "c_warmup", "beta_max", "beta_anneal_steps")
}
DEFAULTS["plus"] = PLUS | {"lr": 1.0, "inner_momentum": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
DEFAULTS["plus"] |= {"polyak_beta": 0.0, "f_star": 0.0}
# A learning rate that moves the problems' leaves by about their size.
LRS = {"sgd": 0.05, "adamw": 0.01, "radam": 0.05, "muon": 0.02, "plus": 0.05}
# The multiple of lr that a schedule gives at step 0, 1, 2, ...
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 1.0,
    "falling": lambda step: max(0.0, 1 - step / 50),
    "from zero": lambda step: min(1.0, step / 8),
    "zero every third": lambda step: float(step % 3 > 0),
    "sawtooth": lambda step: 0.25 + 0.25 * (step % 4),
    "steps down": lambda step: 1 / (1 + step // 20),
}
# The loss at step 0, 1, 2, ...
LOSSES: dict[str, Callable[[int], float]] = {
    "falling": lambda step: 0.5 + 8 * 0.95**step,
    "noisy": lambda step: 2 + 3 * ((7 * step) % 5) / (1 + step),
    "below 0": lambda step: 3 - 0.5 * step,
}


@dataclass(frozen=True)
class Case:
    """One run to agree on.

    Attributes:
        id, why: name and the reason it is here.
        family: the column of the conformance matrix.
        optimizer: a law.
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

    def told(self, grads: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the gradients of a step as the optimizer gets them, and what else it is told."""
        return grads, {}

    @property
    def lrs(self) -> list[float]:
        """The schedule's learning rate at each step, before warm-up."""
        return [self.options["lr"] * SCHEDULES[self.schedule](step) for step in range(self.steps)]


@dataclass(frozen=True)
class PolyakCase(Case):
    """A run whose steps are told the loss.

    Attributes:
        loss: a name in LOSSES.
        clip: what the gradients are multiplied by before every third step.
    """

    loss: str = "falling"
    clip: float = 1.0

    def told(self, grads: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        clip = self.clip if step % 3 == 1 else 1.0
        return {k: clip * g for k, g in grads.items()}, {"loss": LOSSES[self.loss](step), "clip": clip}


def _case(optimizer: str, family: str, name: str, why: str, **given: Any) -> Case:
    """Returns a case; what is not an option of the optimizer is a field of the case."""
    fields = ("schedule", "problem", "steps", "loss", "clip")
    run = {key: given.pop(key) for key in fields if key in given}
    changed = {"lr": LRS[optimizer]} | given if name != "defaults" else {}
    kind = PolyakCase if optimizer == "plus" else Case
    return kind(f"{optimizer}-{name}", why, family, optimizer, changed, **run)


def _shared(o: str) -> list[Case]:
    """Returns the cases that make sense for every law."""
    lr = LRS[o]
    return [
        _case(o, "defaults", "defaults", "what a user gets who sets nothing"),
        _case(o, "defaults", "long", "rounding and sums over a longer run", steps=300),
        _case(o, "decay", "decay", "decay is taken at y", weight_decay=0.1),
        _case(
            o, "decay", "decay-strong", "lr * wd near 1: decay outweighs the gradient", weight_decay=0.9 / lr
        ),
        _case(o, "weights", "r-1", "the average weighs step t by t", r=1.0),
        _case(o, "weights", "r-half", "a fractional power of t", r=0.5, schedule="sawtooth"),
        _case(o, "weights", "power-0", "steps weigh the same", weight_lr_power=0.0, schedule="from zero"),
        _case(o, "weights", "power-1", "weights are lr_max", weight_lr_power=1.0, schedule="from zero"),
        _case(o, "beta", "beta-0", "Polyak: y is z, and x cannot be had from them", beta=0.0),
        _case(o, "beta", "beta-0-decay", "with all that reads y", beta=0.0, r=1.0, weight_decay=0.1),
        _case(o, "beta", "beta-half", "x and z weigh the same in y", beta=0.5),
        _case(o, "beta", "beta-0.98", "for very long runs", beta=0.98),
        _case(o, "beta", "beta-1", "primal averaging: y is x", beta=1.0),
        _case(o, "beta", "beta-1-decay", "the same with decay at y = x", beta=1.0, weight_decay=0.1),
        _case(o, "rules", "c-warmup", "x is z for eleven steps, then the average begins", c_warmup=11),
        _case(o, "rules", "c-warmup-r", "t goes on in t^r", c_warmup=5, r=1.0, schedule="falling"),
        _case(o, "rules", "refined-c", "2 / t, at most 1", refined_c=20.0),
        _case(o, "rules", "refined-c-beta", "C is measured in 1 - beta", refined_c=5.0, beta=0.5, r=1.0),
        _case(o, "rules", "window", "c falls to 1/8 and stays", window=8),
        _case(o, "rules", "window-constant", "x0 keeps weight", window=20, window_rule="constant"),
        _case(
            o, "rules", "lr-current", "a falling lr weighs less", weight_lr="current", schedule="steps down"
        ),
        _case(
            o,
            "rules",
            "lr-current-power-1",
            "c = lr / sum of lr",
            weight_lr="current",
            weight_lr_power=1.0,
            schedule="zero every third",
        ),
        *_betas(o),
        _case(o, "prior", "prior-10", "the initial weights count as ten steps", prior_steps=10),
        _case(o, "prior", "prior-400", "weights grow with t + K, K beyond the run", prior_steps=400, r=1.0),
        _case(o, "prior", "prior-1-falling", "the prior has the full lr", prior_steps=1, schedule="falling"),
        _case(o, "schedule", "falling", "weights keep the largest lr; ends at lr = 0", schedule="falling"),
        _case(
            o, "schedule", "from-zero", "a first step of weight 0: c is 0, not 0 / 0", schedule="from zero"
        ),
        _case(o, "schedule", "zero-every-third", "steps that only average", schedule="zero every third"),
        _case(o, "schedule", "sawtooth", "lr falls and rises again", schedule="sawtooth"),
        _case(o, "schedule", "steps-down", "update and weight read one lr", schedule="steps down"),
        _case(o, "extremes", "lr-0", "nothing moves and nothing divides by zero", lr=0.0),
        _case(o, "extremes", "lr-huge", "leaves far from their start", lr=100 * lr),
        _case(o, "extremes", "lr-small", "movement near the resolution of float32", lr=1e-5 * lr),
        _case(o, "extremes", "zeros", "gradients that are exactly zero", problem="zeros"),
        _case(o, "extremes", "scales", "leaves of very different sizes, and spikes", problem="scales"),
    ]


def _betas(o: str) -> list[Case]:
    """Returns the cases of a beta that rises."""

    def case(name: str, why: str, **given: Any) -> Case:
        return _case(o, "rules", f"beta-{name}", why, **given)

    anneal, amuse = ({"beta_rule": name} for name in ("anneal", "amuse"))
    return [
        case("anneal", "beta arrives on the way", beta=0.6, beta_max=0.99, beta_anneal_steps=30, **anneal),
        case(
            "anneal-unfinished",
            "C is measured in the 1 - beta of the step",
            beta_anneal_steps=500,
            refined_c=8.0,
            weight_decay=0.1,
            **anneal,
        ),
        case("amuse", "beta is held, then rises", beta=0.6, beta_hold_steps=8, **amuse),
        case(
            "amuse-window",
            "beside a short average",
            beta=0.4,
            rho=0.3,
            beta_hold_steps=2,
            window=5,
            schedule="zero every third",
            **amuse,
        ),
    ]


def _decay(o: str) -> list[Case]:
    """Returns the cases of a law that may be told where and how it decays."""

    def case(name: str, why: str, **given: Any) -> Case:
        return _case(o, "rules", f"decay-{name}", why, **given)

    return [
        case("z", "decay at the base iterate", weight_decay=0.1, decay_at="z"),
        case("z-beta-0", "y is z, and x is stored", weight_decay=0.1, decay_at="z", beta=0.0),
        case("squared", "lr^2 in the decay", weight_decay=0.9 / LRS[o], decay_power=2, schedule="sawtooth"),
        case(
            "z-squared",
            "both of these at once",
            weight_decay=5.0,
            decay_at="z",
            decay_power=2,
            schedule="from zero",
        ),
        case(
            "normalized",
            "lr over its largest in the decay, which is lr alone while it rises",
            weight_decay=0.1,
            decay_power="normalized",
            schedule="sawtooth",
        ),
        case(
            "normalized-z",
            "the largest stays, also beside a weight of the current lr",
            weight_decay=0.1,
            decay_at="z",
            decay_power="normalized",
            weight_lr="current",
            schedule="zero every third",
        ),
    ]


def _warmup(o: str) -> list[Case]:
    """Returns the cases of a law that has a warm-up."""

    def case(name: str, why: str, **given: Any) -> Case:
        return _case(o, "warm-up", f"warmup-{name}", why, **given)

    return [
        case("1", "the last warm-up step has the full lr: one step changes nothing", warmup_steps=1),
        case("5", "the ramp starts at 1/5, not at 0", warmup_steps=5),
        case("unfinished", "a ramp longer than the run", warmup_steps=500),
        case("decay", "decay is scaled by the ramp too", warmup_steps=10, weight_decay=0.1),
        case("schedule", "the ramp multiplies a schedule", warmup_steps=10, schedule="steps down"),
        case("power-1-r-2", "ramp, power and r in one weight", warmup_steps=5, weight_lr_power=1.0, r=2.0),
        case("prior", "prior weights use the unramped lr", warmup_steps=5, prior_steps=10),
        case("beta-0", "the ramp without interpolation", warmup_steps=5, beta=0.0),
        case(
            "amuse",
            "beta rises from the end of the ramp, as its authors have it",
            warmup_steps=8,
            weight_lr_power=0.0,
            beta=0.6,
            beta_rule="amuse",
            beta_hold_steps=8,
        ),
    ]


def _moments() -> list[Case]:
    """Returns the cases of b2, eps and inner momentum."""

    def case(o: str, name: str, why: str, **given: Any) -> Case:
        return _case(o, "moments", name, why, **given)

    return [
        case("adamw", "b2-0", "v is the last squared gradient, and log(b2) does not exist", b2=0.0),
        case("adamw", "b2-0.9", "a short memory", b2=0.9),
        case("adamw", "b2-0.9-zeros", "v decays to nothing between gradients", b2=0.9, problem="zeros"),
        case("adamw", "eps-large", "eps as large as the gradients shows where it is added", eps=1.0),
        case("adamw", "eps-scales", "eps between the sizes of two leaves", eps=1e-3, problem="scales"),
        case("adamw", "inner", "a first moment with its own bias correction", inner_momentum=0.9),
        case("adamw", "inner-zeros", "it moves on without gradients", inner_momentum=0.5, problem="zeros"),
        case("adamw", "inner-b2-0", "the longer memory above", inner_momentum=0.9, b2=0.0, eps=0.1),
        case(
            "adamw", "inner-decay", "decay is not in it", inner_momentum=0.9, weight_decay=0.1, warmup_steps=5
        ),
        case("radam", "b2-0.9", "rectification from another memory", b2=0.9),
        case("radam", "eps-large", "no eps in the SGD phase, one after it", eps=1.0, silent_sgd_phase=False),
    ]


def _polar() -> list[Case]:
    """Returns the cases of Muon's matrices."""

    def case(name: str, why: str, **given: Any) -> Case:
        return _case("muon", "matrices", name, why, **given)

    rows, last = {"normalize": "rows"}, {"output_axis": "last"}
    return [
        case("mu-0", "the polar factor is of the gradient", mu=0.0),
        case("mu-0.5", "a short memory", mu=0.5, problem="scales"),
        case("heavy-ball", "the polar factor is of the momentum alone", nesterov=False),
        case("heavy-ball-zeros", "nothing to take it of, for four steps", nesterov=False, problem="zeros"),
        case("ns-1", "one iteration leaves small singular values small", ns_steps=1),
        case("ns-9", "more iterations than usual", ns_steps=9),
        case("original", "tall matrices take longer steps", adjust_lr="original"),
        case("original-last", "rows are columns here: the other ones do", adjust_lr="original", **last),
        case("last", "the same matrices on their sides", **last, problem="scales"),
        case("ratio", "what is no matrix is slower, its decay too", adam_lr_ratio=0.25, weight_decay=0.1),
        case(
            "ratio-squared", "by the square of its own lr", adam_lr_ratio=3.0, weight_decay=5.0, decay_power=2
        ),
        case(
            "ratio-normalized",
            "as much in what is no matrix",
            adam_lr_ratio=3.0,
            weight_decay=0.1,
            decay_power="normalized",
            schedule="falling",
        ),
        case("ratio-0", "only matrices move", adam_lr_ratio=0.0),
        case("adam", "b2 and eps are of what is no matrix", b2=0.9, eps=0.5),
        case("rows", "rows of one size, as NorMuon has them", **rows),
        case("rows-zeros", "rows without a size", **rows, problem="zeros"),
        case("rows-b2-0", "rows of one size exactly", **rows, b2_rows=0.0),
        case("rows-slow", "a second moment that is still small", **rows, b2_rows=0.999),
        case("rows-eps", "eps is outside of the root", **rows, eps=0.5),
        case("rows-original", "as long as the polar factor was", **rows, adjust_lr="original"),
        case("rows-last", "the size of columns", **rows, **last, decay_at="z", weight_decay=0.1),
    ]


def _polyak() -> list[Case]:
    """Returns the cases of ScheduleFree+."""

    def case(name: str, why: str, **given: Any) -> Case:
        return _case("plus", "Polyak", name, why, **given)

    anneal = {"beta_anneal_steps": 30, "beta": 0.6}
    return [
        case("defaults", "what a user gets who sets nothing"),
        case("long", "a norm over a longer run", steps=300, polyak_beta=0.99, loss="noisy"),
        case("smoothed", "the norm is corrected for its start, once", polyak_beta=0.9),
        case("unsmoothed", "the norm is that of the step", loss="noisy", problem="scales"),
        case("floor", "steps stop where the loss is below its floor", f_star=1.5, loss="below 0"),
        case("floor-below-0", "a floor may lie anywhere", f_star=-4.0, polyak_beta=0.5, loss="below 0"),
        case("zeros", "without a gradient nothing moves", problem="zeros"),
        case(
            "zeros-smoothed",
            "the first norm comes late, and stays while there is none",
            problem="zeros",
            polyak_beta=0.8,
        ),
        case("clipped", "what clipping does to the norm is undone", clip=0.125, loss="noisy"),
        case("clipped-smoothed", "in its mean too", clip=0.25, polyak_beta=0.9, problem="scales"),
        case("anneal", "the loss is linear between x and the y to come", beta_max=0.99, **anneal),
        case("anneal-smoothed", "with a smoothed norm", polyak_beta=0.7, **anneal),
        case("decay", "AdamC's decay follows the Polyak step", weight_decay=2.0, loss="noisy"),
        case("c-warmup", "x is z for eleven steps", c_warmup=11, r=2.0, polyak_beta=0.5),
        case(
            "power-1",
            "steps weigh as long as they are",
            weight_lr_power=1.0,
            schedule="steps down",
            loss="noisy",
        ),
        case("moments", "without the momentum that it has", inner_momentum=0.0, b2=0.9, eps=1e-3),
        case("beta-0", "y is z, and x is stored", beta=0.0, polyak_beta=0.9, weight_decay=1.0),
        case("lr-falling", "a schedule multiplies the step", schedule="falling", polyak_beta=0.9),
    ]


def _everything_of_polyak() -> Case:
    """Returns the case with all options of ScheduleFree+ at once."""
    return _case(
        "plus",
        "Polyak",
        "everything",
        "all options at once",
        problem="scales",
        steps=200,
        clip=0.5,
        loss="noisy",
        beta=0.8,
        beta_max=0.95,
        beta_anneal_steps=50,
        r=1.0,
        weight_lr_power=1.5,
        c_warmup=7,
        weight_decay=3.0,
        inner_momentum=0.8,
        b2=0.9,
        eps=1e-6,
        polyak_beta=0.9,
        f_star=0.25,
        schedule="sawtooth",
    )


def _sgd_phase() -> list[Case]:
    """Returns the cases of RAdam's first steps."""

    def case(name: str, why: str, **given: Any) -> Case:
        return _case("radam", "SGD phase", name, why, **given)

    loud = {"silent_sgd_phase": False}
    return [
        case("silent-decay", "decay is silent too", weight_decay=0.1),
        case("silent-power-0", "silent steps weigh 0^0 = 1", weight_lr_power=0.0),
        case("not-silent", "the first steps are SGD steps with the full lr", **loud),
        case("not-silent-decay", "decay in SGD and rectified steps", weight_decay=0.1, **loud),
        case("not-silent-falling", "lr_max stays that of the SGD phase", schedule="falling", **loud),
        case("not-silent-prior", "the prior meets a phase of larger lr", prior_steps=10, **loud),
        case("not-silent-zeros", "no gradient in the whole SGD phase", problem="zeros", **loud),
        case("never-rectified", "rho never passes 4: SGD for ever", b2=0.5, **loud),
    ]


def _everything() -> list[Case]:
    """Returns the cases with all options at once."""

    def case(o: str, name: str, **given: Any) -> Case:
        shared = {"beta": 0.95, "weight_decay": 0.05, "r": 1.0, "weight_lr_power": 1.0, "prior_steps": 7}
        run = {"schedule": "steps down", "problem": "scales", "steps": 200}
        return _case(o, "all", name, "all options at once", **shared, **run, **given)

    moments = {"b2": 0.99, "eps": 1e-3}
    return [
        case("sgd", "everything", warmup_steps=20),
        case("adamw", "everything", warmup_steps=20, inner_momentum=0.8, **moments),
        case("muon", "everything", warmup_steps=20, mu=0.8, nesterov=False, normalize="rows", **moments),
        case("radam", "everything", **moments),
        case("radam", "everything-not-silent", silent_sgd_phase=False, **moments),
    ]


def of_law(optimizer: str) -> list[Case]:
    """Returns the cases that every law has, and those of the options that it has."""
    found, options = _shared(optimizer), DEFAULTS[optimizer]
    found += _warmup(optimizer) if "warmup_steps" in options else []
    return found + (_decay(optimizer) if "decay_at" in options else [])


_ALL = (
    *(case for optimizer in DEFAULTS if optimizer != "plus" for case in of_law(optimizer)),
    *_moments(),
    *_polar(),
    *_sgd_phase(),
    *_everything(),
    *_polyak(),
    _everything_of_polyak(),
)
CASES: dict[str, Case] = {case.id: case for case in _ALL}
if len(CASES) < len(_ALL):
    raise ValueError("case ids must be unique")
FAMILIES = list(dict.fromkeys(case.family for case in _ALL))
