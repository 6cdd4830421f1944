"""What is known of every field, scheduler and optimizer: data, of which rules, forms and a page are made.

Schedule-Free optimizers are the rows of `sfcore.laws`, asked at every call.

Sources: `get_scheduler_fix` in sd-scripts' library/train_util.py (github.com/kohya-ss/sd-scripts),
transformers 5.23 `optimization.py` and `trainer_optimizer.py`, diffusers' piecewise_constant.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sfcore import hyperparameters, laws
from sfcore.checks import nearest
from sfcore.laws import Law

Value = TypeVar("Value")


class Live(Mapping[str, Value]):
    """A mapping that follows the laws, of which some may join later."""

    def __init__(self, make: Callable[[], Mapping[str, Value]]):
        self._made = laws.derived(make)

    def __getitem__(self, name: str) -> Value:
        return self._made()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())


@dataclass(frozen=True)
class Field:
    """One neutral field: what it may hold ("number", "text", "either", "flag", "list"), and its meaning."""

    kind: str
    doc: str


@laws.derived
def inner() -> tuple[str, ...]:
    """Returns the arguments of an optimizer that its trainer keeps apart: all but lr."""
    return tuple(name for name in laws.options() if name != "lr")


_KINDS = {"bool": "flag", "str": "text", "int | str": "either"}  # of an option's annotation
_OF_RUN: dict[str, Field] = {
    "scheduler": Field("text", "name of the learning-rate schedule"),
    "scheduler_class": Field("text", "a scheduler class by its import path, in place of a name"),
    "scheduler_args": Field("list", "arguments of the scheduler beyond those below"),
    "scheduler_warmup_steps": Field("number", "the scheduler's warm-up, in steps"),
    "scheduler_warmup_fraction": Field("number", "the same as a fraction of the run"),
    "scheduler_warmup_percent": Field("number", "the same in percent of the run"),
    "scheduler_cycles": Field("number", "number of cosine cycles"),
    "scheduler_power": Field("number", "power of the polynomial"),
    "scheduler_min_lr_ratio": Field("number", "smallest lr over the largest"),
    "scheduler_timescale": Field("number", "time scale of inverse_sqrt"),
    "scheduler_decay_steps": Field("number", "steps of the decay, or a fraction of the run"),
    "scheduler_warmup_lr_ratio": Field(
        "number", "lr of the first warm-up step over the largest, of cosine_warmup_with_min_lr"
    ),
    "total_steps": Field("number", "optimizer steps of the run"),
    "epochs": Field("number", "passes through the data"),
    "samples": Field("number", "samples of one epoch"),
    "batch_size": Field("number", "samples of one micro-batch on one device"),
    "accumulation": Field("number", "micro-batches of one optimizer step"),
    "devices": Field("number", "processes that train together"),
    "weights": Field("text", "the file of weights that the run starts from"),
    "trained_steps": Field("number", "optimizer steps that these weights were trained for"),
    "resume": Field("text", "the state, with the optimizer's, that the run goes on from"),
    "initial_step": Field(
        "number", "optimizer steps that the state has done, where it does not say so itself"
    ),
    "initial_epoch": Field("number", "sd-scripts: the epoch that a resumed run begins with, from 1"),
    "skip_done": Field("flag", "sd-scripts: a resumed run skips the data of the steps that are done"),
    "script": Field("text", "sd-scripts, musubi-tuner: the training script"),
    "launched": Field("flag", "sd-scripts: `schedulefree launch sd-scripts` runs it, which resumes exactly"),
    "norm_limit": Field("number", "sd-scripts: weights are scaled down to this norm after every step"),
    "blockwise": Field("flag", "sd-scripts: each block has an optimizer, which steps in the backward pass"),
    "fused_backward": Field("flag", "sd-scripts: the optimizer steps in the backward pass"),
    "param_dtype": Field("text", "dtype of the parameters themselves, not of autocast"),
    "matrices": Field("number", "parameters that Muon takes, of those that the optimizer gets"),
    "polyak_beta": Field("number", "ScheduleFree+: decay of the smoothed norm of the gradient"),
    "f_star": Field("number", "ScheduleFree+: what the loss can fall to"),
    "batchnorm": Field("flag", "the model has BatchNorm or other running statistics"),
    "recalibrate": Field("flag", "running statistics are averaged anew at x before every evaluation"),
    "chain": Field("list", "what edits the gradients, in order, the optimizer among it"),
    "ema": Field("flag", "an average of the weights is kept on top"),
    "saves": Field("text", "what the save hook writes: x or y"),
    "save_strategy": Field("text", "HF: when a checkpoint is written"),
    "save_steps": Field("number", "HF: steps between checkpoints"),
    "eval_strategy": Field("text", "HF: when an evaluation runs"),
    "eval_steps": Field("number", "HF: steps between evaluations"),
    "adapter": Field("flag", "an adapter puts x into the weights whenever they are saved"),
}
FIELDS: Mapping[str, Field] = Live(
    lambda: {
        "optimizer": Field("text", "name of the optimizer, with its module or without"),
        **{
            name: Field(_KINDS.get(str(one.type), "number"), one.metadata["doc"])
            for name, one in laws.options().items()
        },
        **_OF_RUN,
    }
)
EXPECTED = {
    "number": "a number",
    "text": "text",
    "either": "a number or text",
    "flag": "true or false",
    "list": "a list",
}
_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "none": False}


def is_set(value: Any) -> bool:
    """Returns whether a user has given a value: not None, and not the empty text of a form."""
    return value is not None and value != ""


def parse(name: str, value: Any) -> Any:
    """Returns the value of a neutral field from what a file or a command line holds.

    Raises:
        ValueError: if it is not of the field's kind.
        OverflowError: if it is a whole number beyond every float.
    """
    kind = FIELDS[name].kind
    value = getattr(value, "value", value)  # an enum's
    if kind == "number":
        return _number(value)
    if kind == "either":
        with contextlib.suppress(ValueError):
            return _number(value)
    if kind == "flag":
        if not isinstance(value, str):
            return bool(value)
        if value.lower() not in _FLAGS:
            raise ValueError
        return _FLAGS[value.lower()]
    if kind == "list":
        return list(value) if isinstance(value, list | tuple) else str(value).replace(",", " ").split()
    return str(value)


def _number(value: Any) -> Any:
    if not isinstance(value, int | float | str) and hasattr(value, "item"):
        value = value.item()  # a NumPy or torch scalar
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            return float(value)
    float(value)
    return value


def whole(value: Any) -> int | None:
    """Returns a number of things as an int; None if it is none, or not above 0."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 1:
        return int(value)
    return None


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
    def shuns_schedules(self) -> bool:
        """Whether a schedule that decays does it no good; the paper of GPA has one beside the average."""
        return self.schedule_free and self.law is not laws.MEMBERS["gpa"]

    @property
    def rectified(self) -> bool:
        """Whether its lr is rectified in place of a warm-up."""
        return self.law is not None and self.law.step_size == "rectified"


# Such as ProdigyPlusScheduleFree: what it takes and which lr suits it is not known here.
OTHER = OptimizerKind("another Schedule-Free optimizer", hyperparameters.ScheduleFree)
_SCHEDULED = "optimizer with a schedule (AdamW, Lion, SGD, ...)"
_ADAFACTOR = "Adafactor"
_SELF_TUNING = "optimizer that finds its own lr (Prodigy, DAdaptation)"
# Options that optimizers with a schedule have too.
_COMMON = ("lr", "beta", "b2", "eps", "weight_decay", "warmup_steps")
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


@laws.derived
def _of_laws() -> Mapping[str, OptimizerKind]:
    """Returns the laws by all that they are called, here and in other programs, without modules."""
    found: dict[str, OptimizerKind] = {}
    for law in laws.LAWS.values():
        has = tuple(law.defaults)
        lacks = tuple(name for name in laws.options() if name not in has)
        kind = OptimizerKind(f"Schedule-Free {law.title}", law.options, has, lacks, law)
        found |= {_last(name): kind for name in (law.torch, law.jax, *law.elsewhere.values())}
    # An Optax base is told the point at which it decays.
    of_jax = _last(laws.LAWS["wrapper"].jax)
    based, own = found[of_jax], "decay_at"
    others = tuple(name for name in based.forbids if name != own)
    found[of_jax] = replace(based, rules=hyperparameters.Based, uses=(*based.uses, own), forbids=others)
    for law in laws.MEMBERS.values():
        # Those of their options that have a rule here; the others are as in the papers' classes.
        found[_last(law.torch)] = OptimizerKind(law.title, law.options, law=law)
        uses = ("warmup_steps",) if law is laws.MEMBERS["plus"] else ()
        found[_last(law.jax)] = OptimizerKind(law.title, law.options, uses, law=law)
    return found


@laws.derived
def _scheduled() -> Mapping[str, OptimizerKind]:
    forbids = tuple(name for name in laws.options() if name not in _COMMON)
    return {name: OptimizerKind(name, forbids=forbids) for name in (_SCHEDULED, _ADAFACTOR, _SELF_TUNING)}


def optimizers() -> list[OptimizerKind]:
    """Returns every family."""
    free: dict[str, OptimizerKind] = {}
    for kind in _of_laws().values():
        free.setdefault(kind.name, kind)
    return [*free.values(), OTHER, *_scheduled().values()]


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
    if last in _of_laws():
        return _of_laws()[last]
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
    known = [*_NAMES.split(), *_of_laws()]
    return None if "." in name or _last(name) in known else nearest(_last(name), known)


def is_ours(name: str, bare_is_ours: bool) -> bool:
    """Returns whether a name means this project's class, which has options that others lack."""
    return name.split(".")[0] in ("sftorch", "sfjax") if "." in name else bare_is_ours
