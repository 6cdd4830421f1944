"""Which fields every scheduler and every optimizer needs, uses and forbids: data.

The rules, the states of a form's fields and docs/rules.md are all made from these tables. Schedule-Free
optimizers are the rows of `sfcore.laws`, asked at every call.

Sources: `get_scheduler_fix` in sd-scripts' library/train_util.py (github.com/kohya-ss/sd-scripts),
transformers 5.23 `optimization.py` and `trainer_optimizer.py`, diffusers' piecewise_constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sfcore import hyperparameters, laws
from sfcore.checks import nearest
from sfcore.laws import Law

WARMUP = ("scheduler_warmup_steps", "scheduler_warmup_fraction", "scheduler_warmup_percent")
SHAPE = (
    "scheduler_cycles",
    "scheduler_power",
    "scheduler_min_lr_ratio",
    "scheduler_timescale",
    "scheduler_decay_steps",
    "scheduler_warmup_lr_ratio",
)


@dataclass(frozen=True)
class SchedulerKind:
    """One scheduler: "warmup" stands for every way to say how long the warm-up is.

    Attributes:
        needs: what it cannot do without.
        uses: what changes it.
        forbids: what it must not be given; sd-scripts raises. All else is ignored.
        decays: whether it lowers the lr towards the end.
    """

    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    decays: bool = True

    def ignores(self) -> tuple[str, ...]:
        """Returns the settings without effect, "warmup" among them."""
        known = (*self.needs, *self.uses, *self.forbids)
        return tuple(name for name in ("warmup", *SHAPE) if name not in known)


SCHEDULERS: dict[str, SchedulerKind] = {
    "constant": SchedulerKind(forbids=("warmup",), decays=False),
    "constant_with_warmup": SchedulerKind(uses=("warmup",), decays=False),
    "linear": SchedulerKind(("total_steps",), ("warmup",)),
    "cosine": SchedulerKind(("total_steps",), ("warmup",)),
    "cosine_with_restarts": SchedulerKind(("total_steps",), ("warmup", "scheduler_cycles")),
    "polynomial": SchedulerKind(("total_steps",), ("warmup", "scheduler_power")),
    "inverse_sqrt": SchedulerKind((), ("warmup", "scheduler_timescale")),
    "cosine_with_min_lr": SchedulerKind(
        ("total_steps", "scheduler_min_lr_ratio"), ("warmup", "scheduler_cycles")
    ),
    "cosine_warmup_with_min_lr": SchedulerKind(
        ("total_steps", "scheduler_min_lr_ratio"),
        ("warmup", "scheduler_cycles", "scheduler_warmup_lr_ratio"),
    ),
    "warmup_stable_decay": SchedulerKind(
        ("total_steps", "scheduler_decay_steps"), ("warmup", "scheduler_cycles", "scheduler_min_lr_ratio")
    ),
    "piecewise_constant": SchedulerKind(("scheduler_args",)),
    "adafactor": SchedulerKind(forbids=("warmup",)),
}
# Known by name, but what they do depends on the losses of the run.
DATA_DRIVEN = ("reduce_lr_on_plateau", "greedy")

# Options that optimizers with a schedule have too.
_COMMON = ("lr", "beta", "b2", "eps", "weight_decay", "warmup_steps")


@dataclass(frozen=True)
class OptimizerKind:
    """One family of optimizers.

    Attributes:
        name: for people.
        rules: its hyperparameters, which is also what makes it Schedule-Free; None for others.
        uses, forbids: arguments that it has and that it refuses.
        law: its row; None where there is none.
    """

    name: str
    rules: type[hyperparameters.ScheduleFree] | None = None
    uses: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    law: Law | None = None

    @property
    def schedule_free(self) -> bool:
        """Whether it averages in place of a schedule."""
        return self.rules is not None

    @property
    def rectified(self) -> bool:
        """Whether its lr is rectified in place of a warm-up."""
        return self.law is not None and self.law.step_size == "rectified"


def _of_law(law: Law) -> OptimizerKind:
    has = tuple(law.defaults)
    lacks = tuple(name for name in laws.options() if name not in has)
    return OptimizerKind(f"Schedule-Free {law.title}", law.options, has, lacks, law)


# Such as ProdigyPlusScheduleFree: what it takes and which lr suits it is not known here.
OTHER = OptimizerKind("another Schedule-Free optimizer", hyperparameters.ScheduleFree)
_SCHEDULED = "optimizer with a schedule (AdamW, Lion, SGD, ...)"
_ADAFACTOR = "Adafactor"
_SELF_TUNING = "optimizer that finds its own lr (Prodigy, DAdaptation)"


@laws.derived
def _scheduled() -> Mapping[str, OptimizerKind]:
    forbids = tuple(name for name in laws.options() if name not in _COMMON)
    return {name: OptimizerKind(name, forbids=forbids) for name in (_SCHEDULED, _ADAFACTOR, _SELF_TUNING)}


@laws.derived
def _by_name() -> Mapping[str, OptimizerKind]:
    """Returns the laws by all that they are called, here and in other programs, without modules."""
    found: dict[str, OptimizerKind] = {}
    for law in laws.LAWS.values():
        kind = _of_law(law)
        found |= {_last(name): kind for name in (law.torch, law.jax, *law.elsewhere.values())}
    return found


def optimizers() -> list[OptimizerKind]:
    """Returns every family."""
    return [*map(_of_law, laws.LAWS.values()), OTHER, *_scheduled().values()]


# Names without a module, as trainers know them, small letters, without "_".
_NAMES = """
adamw adam adamw8bit pagedadamw pagedadamw8bit pagedadamw32bit adamwtorch adamwtorchfused adamwtorchxla
adamwtorchnpufused adamwtorch4bit adamwtorch8bit adamwbnb8bit adamwapexfused adamwanyprecision
lion lion8bit lion32bit pagedlion8bit pagedlion32bit sgd sgdnesterov sgdnesterov8bit adagrad
rmsprop rmspropbnb rmspropbnb8bit rmspropbnb32bit ademamix ademamix8bit pagedademamix32bit
pagedademamix8bit galoreadamw galoreadafactor lomo adalomo grokadamw apolloadamw stableadamw
adafactor prodigy dadaptation dadaptadagrad dadaptadam dadaptadan dadaptadanip dadaptadampreprint
dadaptlion dadaptsgd muon adan came radam nadam
"""


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1].lower().replace("_", "").removesuffix("closure")


def optimizer_kind(name: str) -> OptimizerKind:
    """Returns the family of an optimizer under any of the names that people use.

    Example:
        >>> from sfcore.plan._tables import optimizer_kind
        >>> optimizer_kind("pytorch_optimizer.ScheduleFreeAdamW").name
        'Schedule-Free AdamW'
        >>> optimizer_kind("schedule_free_radam").name
        'Schedule-Free RAdam'
    """
    last = _last(name)
    if last in _by_name():
        return _by_name()[last]
    if "schedulefree" in last:
        return OTHER
    if is_adafactor(name):
        return _scheduled()[_ADAFACTOR]
    return _scheduled()[_SELF_TUNING if last.startswith(("prodigy", "dadapt")) else _SCHEDULED]


def is_adafactor(name: str) -> bool:
    """Returns whether an optimizer is Adafactor, which has a scheduler of its own."""
    return "adafactor" in _last(name)


def misspelt(name: str) -> str | None:
    """Returns the optimizer that a name without a module almost is; None for a known or a foreign one."""
    known = [*_NAMES.split(), *_by_name()]
    return None if "." in name or _last(name) in known else nearest(_last(name), known)


def is_ours(name: str, bare_is_ours: bool) -> bool:
    """Returns whether a name means this project's class, which has options that others lack."""
    return name.split(".")[0] in ("sftorch", "sfjax") if "." in name else bare_is_ours
