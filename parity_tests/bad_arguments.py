"""Bad arguments of every public function, one table for all three packages.

`TABLE` says of each argument what it is refused for, and with which error. Good ones are in `good_arguments`,
hyperparameters in `invalid`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from parity_tests.good_arguments import found
from parity_tests.invalid import BAD_OPTIONS
from sfcore import laws
from sfcore.checks import HyperparameterError
from sfcore.exchange import CheckpointError

NAN, INF = float("nan"), float("inf")
PAGES = Path(__file__).resolve().parents[1] / "docs" / "api"
PACKAGES = ("sfcore", "sfjax", "sftorch")


@dataclass(frozen=True)
class Refused:
    """One row: a function refuses a value of one of its arguments.

    Attributes:
        function: its public name.
        argument: the one that is bad; the message must name it.
        value: it, as the message must show it.
        error: the type of the error.
        others: further arguments, if the good ones will not do.
    """

    function: str
    argument: str
    value: Any
    error: type[Exception]
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Function, argument and value."""
        value = re.sub(r" at 0x[0-9a-f]+", "", shown(self.value)[0])  # every worker must call it the same
        return f"{self.function}-{self.argument}={value}"


def shown(value: Any) -> list[str]:
    """Returns the forms in which a message may show a value, the first a short one."""
    inside = [*value.values()] if isinstance(value, dict) else [*value] if isinstance(value, list) else []
    forms = [repr(value), type(value).__name__]
    forms = forms[::-1] if len(forms[0]) > 60 else forms
    if isinstance(value, list | tuple | dict):
        forms += [str(sorted(value)), *map(repr, value)] if isinstance(value, dict) else [str(len(value))]
        forms += [] if value else ["none", "an empty"]
    forms += [form for below in inside for form in (repr(below), type(below).__name__)]
    return [*forms, "none"] if value is None else [*forms, str(jax.tree.structure(value))]


# What is wrong for an argument of a kind. None is added where it is not the default.
OBJECT = object()
NO_COUNT: tuple[Any, ...] = ("x", -1, 0.5, NAN, INF, True, [], (1, 2), b"1")
NO_NUMBER: tuple[Any, ...] = ("x", [], {}, 1j, True)
NO_SECONDS: tuple[Any, ...] = ("x", -1, NAN, [], True)
NO_FLAG: tuple[Any, ...] = (3, "no", [], NAN)
NO_TEXT: tuple[Any, ...] = (3, NAN, [], b"x")
NO_PATH: tuple[Any, ...] = (3, -1, NAN, [], {})
NO_MAPPING: tuple[Any, ...] = (3, "x", [], NAN, [("a", 1)])
NO_FUNCTION: tuple[Any, ...] = (3, "x", [], NAN)
NO_NAMES: tuple[Any, ...] = (3, "x", NAN)
NO_ITERABLE: tuple[Any, ...] = (3, "x", NAN)
NO_OBJECT: tuple[Any, ...] = (None, 3, "x", [], NAN, OBJECT)
NO_ARRAYS: tuple[Any, ...] = ("x", {"w": "x"}, OBJECT)
NO_STATE: tuple[Any, ...] = (None, 3, "x", [], {}, NAN)
NO_LOSS: tuple[Any, ...] = ("x", [], np.ones(2), {})
NO_PAIR: tuple[Any, ...] = (4, "ab", (4, 4), (4, None), (4, -1), (4, 1, 2), (NAN, 0), (0, 0), None)
NO_BATCHES: tuple[Any, ...] = ("x", -1, 2.5, NAN, (4, 4), [1, 2, 3])
NO_CONFIGURATION: tuple[Any, ...] = (
    3,
    "x",
    NAN,
    {"lr": -1.0},
    {"lr": "x"},
    {"beta": 2.0},
    {"prior_steps": 0.5},
    {"weight_decai": 0.1},
    {"optimizer": "lion"},
    [{"lr": 0.1}, {"lr": 0.1}],
)


def rows(function: str, error: type[Exception], **values: Sequence[Any]) -> list[Refused]:
    """Returns the rows of a function: argument -> its bad values."""
    return [Refused(function, name, value, error) for name, bad in values.items() for value in bad]


OPTIMIZERS = [f"sftorch.{law.torch}{form}" for law in laws.directed().values() for form in ("", "Closure")]
FACTORIES = [f"sfjax.{law.jax}" for law in laws.directed().values()]
KEPT: dict[str, Sequence[Any]] = {
    "keep_newest": (0, *NO_COUNT, None),
    "keep_best": (*NO_COUNT, None),
    "metric": (*NO_TEXT, None),
}
FOLDER: dict[str, Sequence[Any]] = KEPT | {
    "folder": (*NO_PATH, None),
    "background": (*NO_FLAG, None),
    "wait_for_writer": (INF, *NO_SECONDS, None),
    "wait_for_ranks": (INF, 0, *NO_SECONDS, None),
}
PLACE: dict[str, Sequence[Any]] = {
    "epoch": (*NO_COUNT, None),
    "position": (*NO_COUNT, None),
    "metrics": (*NO_MAPPING, {"loss": NAN}, {"loss": "x"}, {"loss": None}),
    "extra": NO_MAPPING,
}
CONFIGURED: dict[str, Sequence[Any]] = {"hyperparameters": NO_CONFIGURATION}
TREES: dict[str, Sequence[Any]] = {"params": (None, 3, [], *NO_ARRAYS)}
STATE: dict[str, Sequence[Any]] = {"opt_state": NO_STATE}

TABLE = [
    *rows(
        "sfcore.preemption.Preemption",
        HyperparameterError,
        save=(*NO_FUNCTION, None),
        signals=(3, "x", NAN, [], [-1], [9], ["SIGTERM"], None),
        patience=(*NO_SECONDS, None),
        grace=(*NO_SECONDS, None),
        ranks=(3, "all", [0, 1]),
    ),
    *rows(
        "sfcore.watch.Recorder.add",
        TypeError,
        c=(*NO_NUMBER, None),
        lr=NO_NUMBER,
        update_norm=NO_NUMBER,
        x_step=NO_NUMBER,
        loss=NO_NUMBER,
    ),
    *rows("sfcore.watch.step_of_x", TypeError, c=(*NO_NUMBER, None), gap=(*NO_NUMBER, None)),
    *rows("sfcore.watch.Watch", TypeError, recent=NO_MAPPING, changed=NO_NAMES, fresh_state=NO_NAMES),
    *rows(
        "sfcore.watch.Watch.observe",
        TypeError,
        c=(*NO_NUMBER, None),
        lr=NO_NUMBER,
        moved=NO_NUMBER,
        update_norm=NO_NUMBER,
        loss=NO_NUMBER,
    ),
    *rows(
        "sfcore.restart.weights_only_policy",
        HyperparameterError,
        explicit=(*NO_MAPPING, None),
        kind=(3, "adamw", None, int),
        trained_steps=("x", -1, 0.5, NAN, [], True),
    ),
    *rows("sfcore.names.NameMap", TypeError, pairs=(3, "x", None, [3])),
    *rows("sfcore.names.NameMap.to_torch", TypeError, arrays=(*NO_MAPPING, None)),
    *rows("sfcore.names.NameMap.to_jax", TypeError, arrays=(*NO_MAPPING, None)),
    *rows(
        "sfcore.names.between",
        TypeError,
        jax=(*NO_MAPPING, None, {"w": 3}, {"w": ("x",)}),
        torch=(*NO_MAPPING, None, {"w": 3}),
        user=(3, [], NAN),
    ),
    *rows("sfcore.names.to_torch", TypeError, jax=(*NO_MAPPING, None, {"w": 3}), user=(3, [], NAN)),
    *rows(
        "sfcore.names.to_jax",
        TypeError,
        torch=(*NO_MAPPING, None, {"w": 3}),
        user=(3, [], NAN),
        kinds=NO_MAPPING,
    ),
    *rows("sfcore.exchange.read_tensors", TypeError, path=(*NO_PATH, None), record=NO_MAPPING),
    *rows(
        "sfcore.exchange.write_tensors",
        TypeError,
        path=(*NO_PATH, None),
        tensors=(*NO_MAPPING, None),
        metadata=NO_MAPPING,
        sealed=(*NO_FLAG, None),
        places=NO_MAPPING,
    ),
    *rows("sfcore.exchange.fingerprint", TypeError, tensors=(*NO_MAPPING, None)),
    *rows("sfcore.exchange.of_role", TypeError, tensors=(*NO_MAPPING, None), role=(*NO_TEXT, None)),
    *rows("sfcore.exchange.split", TypeError, leaf=(*NO_TEXT, None)),
    *rows("sfcore.exchange.split", CheckpointError, leaf=("w", "q/w", "")),
    *rows("sfcore.meta.Meta.from_json", TypeError, text=(*NO_TEXT, None), source=(*NO_PATH, None)),
    *rows("sfcore.inspection.inspect", TypeError, path=(*NO_PATH, None)),
    *rows(
        "sfcore.convert.convert",
        TypeError,
        src=(*NO_PATH, None),
        dst=(*NO_PATH, None),
        user=(3, [], NAN),
    ),
    *rows("sfcore.convert.convert", CheckpointError, to=(3, "onnx", None, [])),
    *rows("sfjax.checkpoint.Checkpoints", HyperparameterError, **FOLDER),
    *rows("sftorch.checkpoint.Checkpoints", HyperparameterError, **FOLDER),
    *rows(
        "sfjax.checkpoint.Checkpoints.save",
        CheckpointError,
        step=(*NO_COUNT, None),
        accumulation=NO_BATCHES,
        batch_size=NO_COUNT,
        **PLACE,
    ),
    *rows("sfjax.checkpoint.Checkpoints.save", HyperparameterError, **CONFIGURED),
    *rows("sfjax.checkpoint.Checkpoints.save", TypeError, buffers=NO_ARRAYS, **TREES),
    *rows("sfjax.checkpoint.Checkpoints.save", ValueError, **STATE),
    *rows("sfjax.checkpoint.Checkpoints.restore", HyperparameterError, **CONFIGURED),
    *rows("sfjax.checkpoint.Checkpoints.restore", TypeError, strict=(*NO_FLAG, None), **TREES),
    *rows("sfjax.checkpoint.Checkpoints.restore", ValueError, **STATE),
    *rows(
        "sfjax.checkpoint.Checkpoints.restore",
        CheckpointError,
        accumulation=NO_BATCHES,
        batch_size=NO_COUNT,
        resume=(None, NAN, [], True, "newest", {}),
    ),
    *rows("sfjax.checkpoint.Checkpoints.observe", TypeError, loss=NO_LOSS, **TREES),
    *rows("sfjax.checkpoint.Checkpoints.observe", ValueError, **STATE),
    *rows("sfjax.checkpoint.start_from_weights", TypeError, weights=(None, 3, []), **TREES),
    *rows("sfjax.checkpoint.start_from_weights", ValueError, **STATE),
    *rows("sfjax.checkpoint.start_from_weights", CheckpointError, accumulation=NO_BATCHES),
    *rows(
        "sfjax.checkpoint.start_from_weights",
        HyperparameterError,
        trained_steps=("x", -1, 0.5, NAN, [], True),
        **CONFIGURED,
    ),
    *rows("sfjax.checkpoint.import_optax", CheckpointError, source_state=NO_STATE, accumulation=NO_BATCHES),
    *rows("sfjax.checkpoint.import_optax", TypeError, source_params=(None, 3, *NO_ARRAYS), **TREES),
    *rows("sfjax.checkpoint.import_optax", ValueError, **STATE),
    *rows("sfjax.checkpoint.import_optax", HyperparameterError, **CONFIGURED),
    *rows(
        "sfjax.checkpoint.export_exchange",
        TypeError,
        folder=(*NO_PATH, None),
        names=(3, "x", {}),
        buffers=NO_ARRAYS,
        **TREES,
    ),
    *rows("sfjax.checkpoint.export_exchange", ValueError, **STATE),
    *rows("sfjax.checkpoint.export_exchange", HyperparameterError, **CONFIGURED),
    *rows(
        "sfjax.checkpoint.export_exchange",
        CheckpointError,
        step=(*NO_COUNT, None),
        accumulation=NO_BATCHES,
        **PLACE,
    ),
    *rows(
        "sfjax.checkpoint.import_exchange",
        TypeError,
        path=(*NO_PATH, None),
        names=(3, [], NAN),
        buffers=NO_ARRAYS,
        strict=(*NO_FLAG, None),
        **TREES,
    ),
    *rows("sfjax.checkpoint.import_exchange", ValueError, **STATE),
    *rows("sfjax.checkpoint.import_exchange", HyperparameterError, **CONFIGURED),
    *rows("sfjax.checkpoint.import_exchange", CheckpointError, accumulation=NO_BATCHES, batch_size=NO_COUNT),
    *rows("sfjax.checkpoint.read", TypeError, path=(*NO_PATH, None)),
    *rows("sfjax.nnx.eval_model", TypeError, model=NO_OBJECT, optimizer=NO_OBJECT),
    *rows("sfjax.nnx.step", TypeError, model=NO_OBJECT, optimizer=NO_OBJECT),
    *rows("sfjax.nnx.save", TypeError, checkpoints=NO_OBJECT, model=NO_OBJECT, optimizer=NO_OBJECT),
    *rows("sfjax.nnx.save", TypeError, buffers=NO_ARRAYS),
    *rows("sfjax.nnx.restore", TypeError, checkpoints=NO_OBJECT, model=NO_OBJECT, optimizer=NO_OBJECT),
    *rows("sfjax.linen.save", TypeError, checkpoints=NO_OBJECT, state=NO_OBJECT, buffers=NO_ARRAYS),
    *rows("sfjax.linen.restore", TypeError, checkpoints=NO_OBJECT, state=NO_OBJECT),
    *(
        row
        for name in FACTORIES
        for row in (
            *rows(name, TypeError, state_dtype=(3, "x", int, [], NAN), mask=(3, "x", {"w": "yes"}, [1])),
            *rows(name, HyperparameterError, precision=(None, 3, "half", []), seed=("x", -1, 0.5, NAN, None)),
        )
    ),
    *rows("sfjax.schedule_free_muon", TypeError, muon_mask=(3, "x", {"w": "yes"}, [1])),
    *rows(
        "sfjax.schedule_free.schedule_free",
        TypeError,
        base_optimizer=NO_OBJECT,
        state_dtype=(3, "x", int, [], NAN),
    ),
    *rows("sfjax.schedule_free.schedule_free", HyperparameterError, decay_at=(None, 3, "x", [])),
    *rows("sfjax.schedule_free_eval_params", ValueError, state=NO_STATE, params=(None, 3, "x", [], {"v": 3})),
    *rows("sfjax.schedule_free_eval_params", TypeError, dtype=(3, "x", int, [], NAN)),
    *rows("sfjax.iterates", ValueError, state=NO_STATE, params=(None, 3, "x", [], {"v": 3})),
    *rows("sfjax.find_state", ValueError, **STATE),
    *rows("sfjax.metrics", ValueError, params=(3, "x", [], {"v": 3}), **STATE),
    *rows("sfjax.describe", TypeError, optimizer=(None, 3, "adamw", [], print)),
    *rows("sfjax.accumulate.accumulate", TypeError, optimizer=NO_OBJECT),
    *rows("sfjax.accumulate.accumulate", ValueError, every=(0, -1, 2.5, "x", None, True, NAN, [])),
    *rows(
        "sfjax.recalibrate.recalibrate",
        TypeError,
        model=NO_OBJECT,
        batches=(*NO_ITERABLE, None),
        call=NO_FUNCTION,
    ),
    *rows("sfjax.recalibrate.recalibrate", ValueError, batches=([], ())),
    *rows(
        "sfjax.recalibrate.recalibrate_linen",
        TypeError,
        apply=(*NO_FUNCTION, None),
        variables=(*NO_MAPPING, None),
        batches=(*NO_ITERABLE, None),
        collection=(*NO_TEXT, None),
    ),
    *rows("sfjax.recalibrate.recalibrate_linen", ValueError, batches=([], ())),
    *rows("sftorch.checkpoint.Checkpoints.save", TypeError, model=NO_OBJECT, optimizer=NO_OBJECT),
    *rows(
        "sftorch.checkpoint.Checkpoints.save",
        CheckpointError,
        step=NO_COUNT,
        accumulation=NO_PAIR,
        batch_size=NO_COUNT,
        **PLACE,
    ),
    *rows(
        "sftorch.checkpoint.Checkpoints.restore",
        TypeError,
        model=NO_OBJECT,
        optimizer=NO_OBJECT,
        strict=(*NO_FLAG, None),
        rng=(*NO_FLAG, None),
    ),
    *rows(
        "sftorch.checkpoint.Checkpoints.restore",
        CheckpointError,
        accumulation=("x", -1, 2.5, NAN, (4, 1), []),
        batch_size=NO_COUNT,
        resume=(None, NAN, [], True, "newest", {}),
    ),
    *rows("sftorch.checkpoint.Checkpoints.restore", HyperparameterError, prior_steps=("x", -1, 0.5, NAN, [])),
    *rows("sftorch.checkpoint.Checkpoints.observe", TypeError, optimizer=NO_OBJECT, loss=(*NO_LOSS, None)),
    *rows(
        "sftorch.checkpoint.import_state_dict",
        TypeError,
        optimizer=NO_OBJECT,
        state_dict=(*NO_MAPPING, None),
    ),
    *rows(
        "sftorch.checkpoint.import_state_dict",
        ValueError,
        state_dict=({}, {"state": {}, "param_groups": 3}, {"state": {}, "param_groups": [3]}),
    ),
    *rows("sftorch.checkpoint.import_state_dict", HyperparameterError, weights_hold=(3, "z", [], NAN)),
    *(
        row
        for name in OPTIMIZERS
        for row in (
            *rows(name, TypeError, params=(None, 3, "x", NAN, [3], {})[:5]),
            *rows(name, ValueError, params=([],)),
            *rows(
                name,
                HyperparameterError,
                foreach=(3, "x", []),
                fused=(3, "x", []),
                maximize=(3, "x", None),
                capturable=(True, 3, "x"),
                differentiable=(True, 3, "x"),
            ),
        )
    ),
    *(
        row
        for name in OPTIMIZERS
        if name != "sftorch.SGDScheduleFreeClosure"
        for row in rows(name, HyperparameterError, precision=(None, 3, "half"), seed=("x", -1, 0.5, None))
    ),
    *(
        row
        for form in ("", "Closure")
        for row in rows(f"sftorch.MuonScheduleFree{form}", HyperparameterError, use_muon=(3, "yes", []))
    ),
    *rows("sftorch.AdamWScheduleFree.step", TypeError, closure=NO_FUNCTION),
    *rows("sftorch.AdamWScheduleFreeClosure.step", TypeError, closure=(*NO_FUNCTION, None)),
    *rows("sftorch.AdamWScheduleFree.add_param_group", TypeError, param_group=(None, 3, "x", [])),
    *rows("sftorch.AdamWScheduleFreeClosure.add_param_group", TypeError, param_group=(None, 3, "x", [])),
    *rows("sftorch.MuonScheduleFree.add_param_group", TypeError, param_group=(None, 3, "x", [])),
    *rows("sftorch.AdamWScheduleFree.eval_state_dict", TypeError, model=NO_OBJECT),
    *rows(
        "sftorch.AdamWScheduleFree.load_state_dict",
        ValueError,
        state_dict=(None, 3, "x", [], {}, {"state": {}, "param_groups": 3}),
    ),
    *rows("sftorch.ScheduleFreeWrapper", TypeError, base=NO_OBJECT),
    *rows("sftorch.ScheduleFreeWrapper.add_param_group", TypeError, param_group=(None, 3, "x", [])),
    *rows("sftorch.ScheduleFreeWrapper.load_state_dict", ValueError, state_dict=(None, 3, "x", [], {})),
    *rows("sftorch.AdamWScheduleFree.metrics", TypeError, distance=(*NO_FLAG, None)),
    *rows("sftorch.ship_x", TypeError, model=NO_OBJECT, optimizer=NO_OBJECT),
    *rows("sftorch.trainers.flat_metrics", TypeError, optimizer=NO_OBJECT),
    *rows("sftorch.step_in_backward", TypeError, optimizer=NO_OBJECT),
    *rows("sftorch.trainers.unwrap", TypeError, optimizer=NO_OBJECT),
    *rows(
        "sftorch.recalibrate.recalibrate",
        TypeError,
        model=NO_OBJECT,
        batches=(*NO_ITERABLE, None),
        call=NO_FUNCTION,
    ),
    *rows("sftorch.recalibrate.recalibrate", ValueError, batches=([], ())),
]

_RECORD = "a record, which holds what it is given"
_TREE = "any tree may be saved, or be a target; what does not fit is told leaf by leaf"
_TREE_OF_GRADIENTS = "what does not look like the parameters is refused by the transformation"
_OPTIONS = "further arguments of `Checkpoints`, whose rows are there"
# Public names, or arguments of them, that have no row, and why.
WITHOUT_ROWS = {
    "sfcore.plan": "its rules and its readers have tables of their own, in sfcore/tests/test_plan_*.py",
    "sfcore.hyperparameters": "checked where they are used, by the table in invalid.py",
    "sfcore.changes.Change": _RECORD,
    "sfcore.meta.Meta": _RECORD,
    "sfcore.watch.Report": _RECORD,
    "sfcore.names.Pair": _RECORD,
    "sfcore.names.NameMap.torch_name": "a look-up, with the KeyError of a dict",
    "sfcore.names.NameMap.jax_names": "a look-up, with the KeyError of a dict",
    "sfjax.ScheduleFreeState": _RECORD,
    "sfjax.ScheduleFreePlusState": _RECORD,
    "sfjax.schedule_free_plus": "AdamW's, whose rows are there; what is its own is in test_plus.py",
    "sfjax.generalized_primal_averaging": "as the wrapper's; what is its own is in test_gpa.py",
    "sftorch.AdamCScheduleFreePlusPaper": "AdamW's, whose rows are there; what is its own is in test_plus.py",
    "sftorch.GPAAdamW": "AdamW's, whose rows are there; what is its own is in test_gpa.py",
    "sfjax.Accumulation": "made by `accumulate`",
    "sfjax.Transformation": "made by the factories",
    "sfjax.chain": "any number, by position; what it refuses is in sfjax/tests/test_native.py",
    "sfjax.linen.TrainState.apply_gradients": "Flax's own",
    "sfjax.nnx.step.grads": _TREE_OF_GRADIENTS,
    "sfjax.nnx.step.extra_args": "whatever the transformation takes",
    "sfjax.checkpoint.Restored": _RECORD,
    "sfjax.linen.TrainState": "Flax's own constructor",
    "sfjax.find_states": "of any tree, also one without states",
    "sfjax.describe": "arguments of another function, and facts of a plan",
    "sftorch.checkpoint.Restored": _RECORD,
    "sftorch.checkpoint.Skipped": _RECORD,
    "sftorch.shipping.XShipped": "made by `ship_x`",
    "sftorch.in_backward.InBackward": "made by `step_in_backward`",
    "sftorch.AdamWScheduleFree.describe": "facts of a plan",
    "sftorch.AdamWScheduleFree.zero_grad": "torch's own",
    "sftorch.trainers.hf": "arguments of transformers' Trainer; what we refuse is in test_trainer_hf.py",
    "sftorch.trainers.lightning": "hooks that Lightning calls",
    "sftorch.trainers.sd_scripts": "runs a script; what it refuses is in test_trainer_sd_scripts.py",
    "sfjax.checkpoint.Checkpoints.save.extra_state": _TREE,
    "sfjax.checkpoint.Checkpoints.restore.extra_state": _TREE,
    "sfjax.nnx.save.extra_state": _TREE,
    "sfjax.nnx.restore.extra_state": _TREE,
    "sfjax.linen.save.extra_state": _TREE,
    "sfjax.linen.restore.extra_state": _TREE,
    "sfjax.nnx.save.options": _OPTIONS,
    "sfjax.nnx.restore.options": _OPTIONS,
    "sfjax.linen.save.options": _OPTIONS,
    "sfjax.linen.restore.options": _OPTIONS,
}


def public() -> dict[str, Any]:
    """Returns name -> callable of all that the pages in docs/api show, methods included, each once."""
    shown_there: dict[str, Any] = {}
    for page in sorted(PAGES.glob("*.md")):
        for name, options in re.findall(r"^::: (\S+)((?:\n    .*)*)", page.read_text(), re.MULTILINE):
            shown_there |= _members(name, found(name), options)
    first: dict[int, str] = {}
    for name, thing in shown_there.items():
        first.setdefault(id(inspect.unwrap(thing)), name)  # torch wraps the step of a class in its first use
    return {name: shown_there[name] for name in first.values()}


def _members(name: str, thing: Any, options: str) -> dict[str, Any]:
    """Returns name -> callable of a name on a page and of what is in it."""
    if inspect.ismodule(thing):
        told = re.search(r"members: \[(.*?)\]", options)
        own = [key for key, value in vars(thing).items() if getattr(value, "__module__", "") == name]
        names = (
            told[1].split(", ") if told else getattr(thing, "__all__", [key for key in own if key[0] != "_"])
        )
        return {k: v for one in names for k, v in _members(f"{name}.{one}", getattr(thing, one), "").items()}
    if not inspect.isclass(thing):
        return {name: thing} if callable(thing) else {}
    if issubclass(thing, Exception):
        return {}
    methods = {key: inspect.getattr_static(thing, key) for key in dir(thing) if key[0] != "_"}
    methods = {key: getattr(value, "__func__", value) for key, value in methods.items()}
    ours = {
        f"{name}.{key}": value
        for key, value in methods.items()
        if inspect.isfunction(value) and value.__module__.startswith(PACKAGES)
    }
    return {name: thing} | ours


def arguments(function: Any) -> list[str]:
    """Returns the names of a callable's arguments."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def hyperparameters(function: str) -> set[str]:
    """Returns the arguments of a constructor or factory whose bad values `invalid` has."""
    rules = {law.torch: law for law in laws.LAWS.values()} | {law.jax: law for law in laws.LAWS.values()}
    law = rules.get(function.rpartition(".")[2].removesuffix("Closure"))
    tested = {bad.name for bad in BAD_OPTIONS}
    if law is None:
        return set()
    options = [name for name in law.defaults if name in tested]
    of_torch = set(law.to_torch(dict.fromkeys(options, 0)))
    return of_torch | {laws.JAX_NAMES.get(name, name) for name in options}
