"""The neutral configuration: every field that a rule reads, and how its text becomes a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sfcore import checks, laws

Value = TypeVar("Value")


@dataclass(frozen=True)
class Field:
    """One neutral field: what it may hold ("number", "text", "flag", "list") and what it means."""

    kind: str
    doc: str


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


def _options() -> dict[str, Field]:
    """Returns the options of all laws."""
    return {
        name: Field("flag" if one.metadata["rule"] is checks.FLAG else "number", one.metadata["doc"])
        for name, one in laws.options().items()
    }


@laws.derived
def inner() -> tuple[str, ...]:
    """Returns the arguments of an optimizer that its trainer keeps apart: all but lr."""
    return tuple(name for name in laws.options() if name != "lr")


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
    "resume": Field("text", "the state, with the optimizer's, that the run goes on from"),
    "param_dtype": Field("text", "dtype of the parameters themselves, not of autocast"),
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
        **_options(),
        **_OF_RUN,
    }
)
_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "none": False}
EXPECTED = {"number": "a number", "text": "text", "flag": "true or false", "list": "a list"}


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
    if kind == "flag":
        if isinstance(value, str):
            return _FLAGS[value.lower()] if value.lower() in _FLAGS else _refuse()
        return bool(value)
    if kind == "list":
        return list(value) if isinstance(value, list | tuple) else str(value).replace(",", " ").split()
    return str(value)


def _refuse() -> Any:
    raise ValueError


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError
    if not isinstance(value, int | float | str):
        return _number(value.item()) if hasattr(value, "item") else _refuse()  # a NumPy or torch scalar
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
