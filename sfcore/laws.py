"""Each law as one row: an optimizer's options, buffers, rules and names. All that lists laws asks here.

`LAWS` is asked at call time, never copied at import, so that a law that joins later is seen everywhere.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, TypeVar

from sfcore import averaging, checks, hyperparameters, matrices

# What users of JAX call an option; other names are those of the equations.
JAX_NAMES: Mapping[str, str] = {
    "lr": "learning_rate",
    "beta": "b1",
    "beta_rule": "b1_rule",
    "beta_max": "b1_max",
    "beta_anneal_steps": "b1_anneal_steps",
    "beta_hold_steps": "b1_hold_steps",
}
# Roles in a checkpoint of every law; beside them stand the buffers of its direction.
COMMON_ROLES: Mapping[str, str] = {
    "y": "gradient point, what the parameters hold while training; of a 16-bit parameter in float32",
    "x": "average, what is evaluated and shipped; in the state only where it cannot be recomputed",
    "z": "base iterate",
    "gap": "z - y where z is kept so: in bfloat16 (precision 'lean') or codes ('8bit'), as v and m are there",
    "scale": "exponents of the rows of gap, v and m where they are codes, see sfcore.codes",
    "base": "state of a wrapped optimizer, as base/PARAMETER/KEY",
    "grad": "gradient accumulated so far, in the middle of an accumulation",
    "buffer": "model state without gradient, such as BatchNorm statistics",
    "rng": "random number generator states",
    "extra": "arrays of the user's own",
}
# What a torch state holds beside the buffers.
_TORCH_STATE = {"z", "x", "y", "gap", "scale", "y_rest", "x_rest", "y_print", "x_print", "base"}
_CLOCK = {"step", "lr_max", "weight_sum"}
Made = TypeVar("Made")
OR = " or "  # between names of laws of which a state alone cannot tell which it is


@dataclass(frozen=True)
class Buffer:
    """State of a direction, beside z: a tensor like the parameter or one number a row, at least float32.

    Attributes:
        role: in a checkpoint.
        torch, jax: its name in a parameter's state, and in the base state.
        doc: what it is, in two words.
        when: the option that must be neither 0 nor "none" for it to be kept; "" is always.
        lean: its dtype with precision="lean", "bfloat16"; "" for a law that then refuses "lean".
        code: of `sfcore.codes`, with precision="8bit": "log", for what is never negative, or "linear"; "" for
            a law that then refuses "8bit".
        leaves: the parameters that have it, "matrices" or "others"; "" is all.
        of_rows: whether it is one number a row, of size 1 in all axes but the option `output_axis`.
    """

    role: str
    torch: str
    jax: str
    doc: str
    when: str = ""
    lean: str = "bfloat16"
    code: str = ""
    leaves: str = ""
    of_rows: bool = False

    def is_kept(self, values: Mapping[str, Any], leaves: str = "") -> bool:
        """Tells whether parameters need it under options of canonical names.

        Args:
            values: the options; one that has no value yet, as in JAX's tracing, is taken for on.
            leaves: which parameters, "matrices" or "others"; "" is any.
        """
        value = values[self.when] if self.when else 1
        is_off = isinstance(value, numbers.Real | str) and value in (0, "none")
        return not is_off and (not leaves or not self.leaves or self.leaves == leaves)

    def shape(self, shape: Sequence[int], values: Mapping[str, Any]) -> tuple[int, ...]:
        """Returns its shape beside a parameter of a shape."""
        return matrices.row_shape(shape, values["output_axis"]) if self.of_rows else tuple(shape)


@dataclass(frozen=True)
class Law:
    """One optimizer.

    Attributes:
        name: in checkpoints, plans and cases.
        title: for people.
        options: its dataclass of options.
        torch, jax: its class in torch, without "Closure"; its factory in JAX.
        torch_names: option -> what a torch user calls it, where that differs: "momentum", "betas[0]".
        buffers: of its direction.
        direction: what a step goes along; laws of one direction have learning rates that mean the same.
        step_size: what multiplies lr(step): a name in `averaging.STEP_SIZES`.
        averaging: how the average weighs a step: a name in `averaging.AVERAGES`.
        lr_range: useful step sizes, None where none is known; lr_source: where they come from.
        elsewhere: program -> its name there.
    """

    name: str
    title: str
    options: type[hyperparameters.ScheduleFree]
    torch: str
    jax: str
    torch_names: Mapping[str, str] = field(default_factory=dict)
    buffers: tuple[Buffer, ...] = ()
    direction: str = "gradient"
    step_size: str = "ramp"
    averaging: str = "weights"
    lr_range: tuple[float, float] | None = None
    lr_source: str = ""
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """Option -> default, in order."""
        return hyperparameters.defaults(self.options)

    def kept(self, values: Mapping[str, Any], leaves: str = "") -> tuple[Buffer, ...]:
        """Returns the buffers that parameters need under options of canonical names; see `Buffer.is_kept`."""
        return tuple(one for one in self.buffers if one.is_kept(values, leaves))

    @property
    def always(self) -> tuple[Buffer, ...]:
        """The buffers that a run has whatever its options are."""
        return tuple(one for one in self.buffers if not one.when and one.leaves != matrices.OTHERS)

    def of_torch_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Returns option -> value of a torch group or of a constructor's arguments.

        Options that it lacks are left out, and halves of what is no pair.

        Example:
            >>> from sfcore.laws import LAWS
            >>> LAWS["adamw"].of_torch_group({"lr": 0.1, "betas": (0.9, 0.99), "params": []})
            {'lr': 0.1, 'beta': 0.9, 'b2': 0.99}
        """
        found = {}
        for name, (key, half) in self._places.items():
            if key not in group:
                continue
            value = group[key]
            if half is None:
                found[name] = value
            elif isinstance(value, tuple | list) and len(value) == 2:
                found[name] = value[half]
        return found

    def missing(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Returns option -> default of those that a torch group, as of an older release, has not."""
        return {name: value for name, value in self.defaults.items() if self._places[name][0] not in group}

    def to_torch(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns options as keyword arguments of the torch class; of a pair, the other half is the default.

        Example:
            >>> from sfcore.laws import LAWS
            >>> LAWS["adamw"].to_torch({"lr": 0.1, "b2": 0.99})
            {'lr': 0.1, 'betas': (0.9, 0.99)}
        """
        given, found = self.defaults | dict(values), {}
        for name, value in values.items():
            key, half = self._places.get(name, (name, None))
            pair = (given[other] for other in self.torch_names if self._places[other][0] == key)
            found[key] = value if half is None else tuple(pair)
        return found

    def words(self, framework: str) -> dict[str, str]:
        """Returns what the equations and the other twin call an option -> its name in "torch" or "jax".

        Example:
            >>> from sfcore.laws import LAWS
            >>> LAWS["sgd"].words("torch")["b1"], LAWS["sgd"].words("jax")["momentum"]
            ('momentum', 'b1')
        """
        found: dict[str, str] = {}
        for name in self.defaults:
            torch, jax = self._places[name][0], JAX_NAMES.get(name, name)
            found |= dict.fromkeys((name, torch, jax), torch if framework == "torch" else jax)
        return found

    def problems(self, framework: str, given: Mapping[str, Any]) -> list[str]:
        """Returns what is wrong with a constructor's arguments, by the names of "torch" or "jax".

        Example:
            >>> from sfcore.laws import LAWS
            >>> LAWS["adamw"].problems("torch", {"betas": (0.9, 1.0)})
            ['betas[1] must be a number in [0, 1), got 1.0: 0.999 is the usual value, 0 switches it off']
        """
        if framework == "torch":
            return checks.find_problems(self.options, self.of_torch_group(given), self.torch_names)
        shown = {name: JAX_NAMES.get(name, name) for name in self.defaults}
        values = {name: given[there] for name, there in shown.items() if there in given}
        return checks.find_problems(self.options, values, JAX_NAMES)

    def to_jax(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns options as keyword arguments of the JAX factory."""
        return {JAX_NAMES.get(name, name): value for name, value in values.items()}

    @property
    def torch_options(self) -> tuple[str, ...]:
        """The options' names in a torch group, in order: betas for both of its halves."""
        return tuple(dict.fromkeys(key for key, _ in self._places.values()))

    @functools.cached_property
    def _places(self) -> dict[str, tuple[str, int | None]]:
        """Option -> where it is in a torch group: ("betas", 0), or ("momentum", None)."""
        found = {}
        for name in self.defaults:
            key, _, half = self.torch_names.get(name, name).rstrip("]").partition("[")
            found[name] = key, int(half) if half else None
        return found


_README = "README of facebookresearch/schedule_free"
_ADAMW_LR, _ADAMW_SOURCE = (1e-6, 1e-2), f"1 to 10 times the 1e-6 to 1e-3 of scheduled runs; {_README}"
_BETAS = {"beta": "betas[0]", "b2": "betas[1]"}
_V = Buffer("v", "exp_avg_sq", "nu", "second moment", code="log")
_M = Buffer("m", "exp_avg", "mu", "first moment", when="inner_momentum", code="linear")
_ROWS = (
    Law(
        "sgd",
        "SGD",
        hyperparameters.SGD,
        torch="SGDScheduleFree",
        jax="schedule_free_sgd",
        torch_names={"beta": "momentum"},
        lr_range=(0.1, 50.0),
        lr_source=f"10 to 50 times the 0.01 to 1 of scheduled runs; {_README}",
        elsewhere={
            "schedulefree": "SGDScheduleFree",
            "pytorch_optimizer": "ScheduleFreeSGD",
            "optax.contrib": "schedule_free_sgd",
            "transformers": "schedule_free_sgd",
        },
    ),
    Law(
        "adamw",
        "AdamW",
        hyperparameters.AdamW,
        torch="AdamWScheduleFree",
        jax="schedule_free_adamw",
        torch_names=_BETAS,
        buffers=(_V, _M),
        direction="rms",
        lr_range=_ADAMW_LR,
        lr_source=_ADAMW_SOURCE,
        elsewhere={
            "schedulefree": "AdamWScheduleFree",
            "pytorch_optimizer": "ScheduleFreeAdamW",
            "optax.contrib": "schedule_free_adamw",
            "transformers": "schedule_free_adamw",
        },
    ),
    Law(
        "radam",
        "RAdam",
        hyperparameters.RAdam,
        torch="RAdamScheduleFree",
        jax="schedule_free_radam",
        torch_names=_BETAS,
        buffers=(_V,),
        direction="rms",
        lr_range=_ADAMW_LR,
        lr_source=_ADAMW_SOURCE,
        step_size="rectified",
        elsewhere={
            "schedulefree": "RAdamScheduleFree",
            "pytorch_optimizer": "ScheduleFreeRAdam",
            "transformers": "schedule_free_radam",
        },
    ),
    Law(
        "muon",
        "Muon",
        hyperparameters.Muon,
        torch="MuonScheduleFree",
        jax="schedule_free_muon",
        torch_names=_BETAS,
        buffers=(
            Buffer("momentum", "momentum_buffer", "momentum", "momentum", leaves=matrices.MATRICES),
            replace(_V, leaves=matrices.OTHERS),
            Buffer(
                "u",
                "row_exp_avg_sq",
                "row_nu",
                "second moment of rows",
                when="normalize",
                leaves=matrices.MATRICES,
                of_rows=True,
            ),
        ),
        direction="polar",
        lr_range=_ADAMW_LR,
        lr_source=f"those of AdamW with adjust_lr='match_rms_adamw'; {_ADAMW_SOURCE}",
    ),
    # Around any base: delta (S6) and its state are the base's.
    Law(
        "wrapper",
        "wrapper",
        hyperparameters.Wrapper,
        torch="ScheduleFreeWrapper",
        jax="schedule_free",
        torch_names={"beta": "momentum", "weight_decay": "weight_decay_at_y"},
        direction="base",
        step_size="base",
        elsewhere={
            "schedulefree": "ScheduleFreeWrapper",
            "pytorch_optimizer": "ScheduleFreeWrapper",
            "optax.contrib": "schedule_free",
        },
    ),
)
LAWS: dict[str, Law] = {law.name: law for law in _ROWS}
# Members of the family that are AdamW with options set, under the words of their papers' classes.
MEMBERS: Mapping[str, Law] = {
    "plus": replace(
        LAWS["adamw"],
        title="ScheduleFree+",
        torch="AdamCScheduleFreePlusPaper",
        jax="schedule_free_plus",
        torch_names={
            "beta": "sf_beta1",
            "beta_max": "sf_beta1_max",
            "beta_anneal_steps": "sf_beta1_anneal_steps",
            "inner_momentum": "betas[0]",
            "b2": "betas[1]",
        },
        lr_range=None,  # a multiple of the Polyak step
        elsewhere={"schedulefree": "AdamCScheduleFreePlusPaper"},
    ),
    "gpa": replace(
        LAWS["adamw"],
        title="GPA",
        torch="GPAAdamW",
        jax="generalized_primal_averaging",
        torch_names={
            "beta": "train_interp_coeff",
            "inner_momentum": "beta1",
            "b2": "beta2",
            "r": "weight_pow_coeff",
        },
        elsewhere={},
    ),
}


def register(law: Law) -> ExitStack:
    """Adds a law; used as `with register(law):`, it goes again at the end.

    Raises:
        ValueError: with everything that is wrong with its row.
    """
    found = list(_problems(law))
    if found:
        raise ValueError("\n".join(found))
    LAWS[law.name] = law
    undo = ExitStack()
    undo.callback(unregister, law.name)
    return undo


def unregister(name: str) -> None:
    """Takes a law away that `register` has added."""
    del LAWS[name]


def _problems(law: Law) -> Iterator[str]:
    where, options = f"law {law.name!r}", law.defaults
    for attribute in ("name", "torch", "jax"):
        value = getattr(law, attribute)
        if any(value == getattr(one, attribute) for one in LAWS.values()):
            yield f"{where}: {attribute} must be its own, got {value!r} of another law: take a new one"
    for attribute, known in (("step_size", averaging.STEP_SIZES), ("averaging", averaging.AVERAGES)):
        value = getattr(law, attribute)
        if value not in known:
            yield f"{where}: {attribute} must be in {', '.join(known)}, got {value!r}: write its rule first"
    meant = [*law.torch_names, *(one.when for one in law.buffers if one.when)]
    for name in dict.fromkeys(name for name in meant if name not in options):
        yield f"{where}: {name!r} must be an option, got {', '.join(options)}: add it there"
    needs = getattr(averaging.STEP_SIZES.get(law.step_size), "needs", ())
    if lacking := [name for name in needs if name not in options]:
        yield f"{where}: step_size {law.step_size!r} needs the options {', '.join(lacking)}: add them"
    for one in law.buffers:
        if one.role in COMMON_ROLES or one.torch in _TORCH_STATE | _CLOCK:
            yield f"{where}: buffer {one.role!r} must have names of its own, got {one}: rename it"
        for other in roles().values():
            same = [getattr(one, name) == getattr(other, name) for name in ("role", "torch", "jax")]
            if any(same) and not all(same):
                yield (
                    f"{where}: buffer {one.role!r} must have names of its own, or all of those of "
                    f"{other.role!r} ({other.torch}, {other.jax}), got {one.torch}, {one.jax}: rename it"
                )


def law_of(name: str) -> Law:
    """Returns the law of a name.

    Raises:
        ValueError: for an unknown one, with the known.

    Example:
        >>> from sfcore.laws import law_of
        >>> law_of("radam").torch
        'RAdamScheduleFree'
    """
    if name not in LAWS:
        raise ValueError(
            f"optimizer must be one of {', '.join(LAWS)}, got {name!r}{checks.hint(name, LAWS)}: "
            "register its law, or start from the weights"
        )
    return LAWS[name]


def derived(make: Callable[[], Made]) -> Callable[[], Made]:
    """Returns a function of no arguments whose result is kept as long as the laws stay the same.

    For what is asked often; nobody may change the result.
    """
    kept: list[tuple[tuple[int, ...], Made]] = []

    @functools.wraps(make)
    def ask() -> Made:
        now = tuple(map(id, LAWS.values()))
        if not kept or kept[0][0] != now:
            kept[:] = [(now, make())]
        return kept[0][1]

    return ask


def directed() -> dict[str, Law]:
    """Returns the laws that have a direction of their own: all but wrappers."""
    return {name: law for name, law in LAWS.items() if law.direction != "base"}


@derived
def roles() -> Mapping[str, Buffer]:
    """Returns role -> buffer of every law; laws that share a role share its names.

    Example:
        >>> from sfcore.laws import roles
        >>> {role: buffer.torch for role, buffer in roles().items()}
        {'v': 'exp_avg_sq', 'm': 'exp_avg', 'momentum': 'momentum_buffer', 'u': 'row_exp_avg_sq'}
    """
    found: dict[str, Buffer] = {}
    for law in LAWS.values():
        for one in law.buffers:
            found.setdefault(one.role, one)
    return found


@derived
def options() -> Mapping[str, Field[Any]]:
    """Returns option -> its field, of every law; of the first that has it.

    Example:
        >>> from sfcore.laws import options
        >>> options()["warmup_steps"].metadata["effect"]
        'the ramp goes on at the step it had reached'
    """
    found: dict[str, Field[Any]] = {}
    for law in LAWS.values():
        for one in fields(law.options):
            found.setdefault(one.name, one)
    return found


def recognise(buffers: Iterable[str] | None, options: Iterable[str] = ()) -> str:
    """Returns the law whose state it is, "adamw or radam" where several fit.

    Args:
        buffers: roles of the buffers that the state holds; None where no parameter has started.
        options: keys of the torch group that it was saved with, foreign ones among them; () if it has none.

    Raises:
        ValueError: if no law keeps such a state.

    Example:
        >>> from sfcore.laws import recognise
        >>> recognise(["v"]), recognise(["v", "m"]), recognise([])
        ('adamw or radam', 'adamw', 'sgd')
        >>> recognise(["v"], ["lr", "betas", "silent_sgd_phase"])
        'radam'
    """
    given = set(options)
    fitting = [law for law in directed().values() if buffers is None or _keeps(law, set(buffers))]
    if given:
        # Other programs lack some options, and have more: fewest that are another law's, then fewest lacking.
        known = {key for law in directed().values() for key in law.torch_options}
        apart = {
            law.name: (len((given & known) - {*law.torch_options}), len({*law.torch_options} - given))
            for law in fitting
        }
        fitting = [law for law in fitting if apart[law.name] == min(apart.values())]
    if not fitting:
        raise ValueError(
            f"state must be of a known law ({', '.join(LAWS)}), got the buffers {sorted(buffers or ())}: "
            "register the law that keeps them"
        )
    return OR.join(law.name for law in fitting)


def _keeps(law: Law, held: set[str]) -> bool:
    always = {one.role for one in law.always}
    return always <= held <= {one.role for one in law.buffers}


def unnamed(state: Iterable[str]) -> list[str]:
    """Returns the names of a parameter's torch state that no row names, so that nobody would save them.

    Example:
        >>> from sfcore.laws import unnamed
        >>> unnamed(["z", "exp_avg_sq", "step", "sum"])
        ['sum']
    """
    named = {one.torch for one in roles().values()}
    return [name for name in state if name not in named | _TORCH_STATE | _CLOCK]


def candidates(name: str) -> list[Law]:
    """Returns the laws that a recorded name may mean, both of "adamw or radam"; none of an unknown one."""
    return [LAWS[one] for one in name.split(OR) if one in LAWS]
