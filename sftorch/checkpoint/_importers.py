"""State of other programs, carried over into an optimizer of ours that is configured as you want it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfcore import averaging, checks, laws
from sfcore.changes import comparable, of_optimizer
from sfcore.checks import HyperparameterError, Rule
from sfcore.hyperparameters import weighed
from sfcore.meta import number_in
from sftorch.checkpoint import _changes, _weights
from sftorch.law.scalars import Clock
from sftorch.schedule_free import ScheduleFreeWrapper
from sftorch.state import eight, forms, prints, state_dict
from sftorch.state.state_dict import HOLD, ScheduleFreeOptimizer, check_optimizer

_STATE_DICT = Rule(
    "a state dict", checks.MAPPING.holds, "pass the entry of the file that holds the optimizer"
)

# What comes of entries that are missing, or of other types than a program saves.
STRANGE = (KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RuntimeError)


@dataclass
class Source:
    """What a foreign state dict says, by the names of the equations.

    Attributes:
        program: whose it is, for the notices.
        kind: the name of a law, or "plain" for an optimizer that is not Schedule-Free.
        groups: one dict a group: "params" (indices), "options" (as saved), "clock".
        states: index -> name -> value.
        holds: "x" or "y", what the weights saved beside it are; None if it does not say.
    """

    program: str
    kind: str
    groups: list[dict[str, Any]]
    states: Mapping[Any, Mapping[str, Any]]
    holds: str | None
    base: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict)


def recognise(state_dict: Mapping[str, Any]) -> Source:
    """Returns what a state dict is.

    Raises:
        ValueError: if it is of no known program.
    """
    if "schedulefree_state" in state_dict:
        return _pytorch_optimizer_wrapper(state_dict)
    groups: Any = state_dict.get("param_groups")
    states: Any = state_dict.get("state")
    are_there = isinstance(groups, list) and groups and isinstance(states, Mapping)
    if not are_there or not all(isinstance(one, Mapping) and "params" in one for one in groups):
        raise ValueError(
            f"state_dict must be what optimizer.state_dict() returned, got the keys {sorted(state_dict)}: "
            "pass the entry of the file that holds the optimizer"
        )
    groups = [_renamed(group) for group in groups]
    first = groups[0]
    if "y_beta" in _books(first):
        return _ours(groups, states)
    if "train_interp_coeff" in first:
        return _gpa(groups, states)
    if "sf_beta1" in first:
        return _schedule_free("schedulefree", "adamw", groups, _without_iterates(states), "k")
    if "weight_sum" in first and "k" in first:
        wrapper = "betas" not in first and "scheduled_lr" not in first
        return _schedule_free(
            "schedulefree", "wrapper" if wrapper else _kind(first, states), groups, states, "k"
        )
    if "weight_sum" in first and "step" in first:
        return _schedule_free("pytorch_optimizer", _kind(first, states), groups, states, "step")
    if "betas" in first and "weight_sum" not in first and any("exp_avg_sq" in s for s in states.values()):
        plain = [_group(group, Clock(0, 0.0, 0.0)) for group in groups]
        return Source("torch.optim.AdamW", "plain", plain, states, "y")
    raise ValueError(
        "state_dict must be of schedulefree, pytorch_optimizer's ScheduleFree* or torch.optim.AdamW, got the "
        f"options {sorted(first)}: start from the weights with Checkpoints.restore(resume='weights:PATH')"
    )


def _renamed(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a group of another program's options under AdamW's names too; any other as it is."""
    if "sf_beta1" in group:
        steps = group["sf_beta1_anneal_steps"]
        rule = {"beta_rule": "anneal" if steps else "constant", "beta_anneal_steps": steps}
        found = {"beta_max": group["sf_beta1_max"], "decay_power": 2, **rule}
        beta, (momentum, b2) = group["sf_beta1"], group["betas"]
    elif "train_interp_coeff" in group:
        beta, momentum, b2 = (group[name] for name in ("train_interp_coeff", "beta1", "beta2"))
        found = {"r": group["weight_pow_coeff"]}
        kind = group["iterate_averaging_type"]
        if getattr(kind, "name", kind).lower() == "gpa":
            found |= {"window": 1.0 / (1.0 - group["eval_interp_coeff"]), "window_rule": "constant"}
    elif "decoupling_c" in group:
        return {**group, "refined_c": float(group["decoupling_c"])}
    else:
        return group
    return {**group, **found, "betas": (beta, b2), "inner_momentum": momentum}


def _without_iterates(states: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Returns states with z and moments alone: x and y are in the weights, and z tells the other."""
    kept = ("z", "exp_avg", "exp_avg_sq")
    return {i: {name: values[name] for name in kept if name in values} for i, values in states.items()}


def _gpa(groups: Any, states: Any) -> Source:
    """Returns a state of Meta's GPAAdamW, whose clock lies in the state of a group's first parameter."""
    shared = [states.get(group["params"][0], {}) for group in groups]
    clocks = [
        Clock(
            int(one.get("step", 0)),
            max(float(one.get("lr_max", 0.0)), 0.0),
            float(one.get("weight_sum", 0.0)),
        )
        for one in shared
    ]
    found = [_group(group, clock) for group, clock in zip(groups, clocks, strict=True)]
    holds = "y" if shared[0].get("train_mode", False) else "x"
    return Source("GPAAdamW", "adamw", found, _without_iterates(states), holds)


def _group(options: Mapping[str, Any], clock: Clock) -> dict[str, Any]:
    return {"params": options["params"], "options": options, "clock": clock}


def _books(group: Mapping[str, Any]) -> Mapping[str, Any]:
    books: Mapping[str, Any] = group.get("schedule_free", group)
    return books


def _ours(groups: Any, states: Any) -> Source:
    """Returns the state dict of another of our classes."""
    kind = "wrapper" if "schedule_free" in groups[0] else _kind(groups[0], states)
    merged = [group | _books(group) for group in groups]
    found = [_group(g, Clock(g["k"], g["lr_max"], g["weight_sum"])) for g in merged]
    base = {index: values["base"] for index, values in states.items() if "base" in values}
    return Source("sftorch", kind, found, states, groups[0][HOLD], base)


def _kind(options: Mapping[str, Any], states: Mapping[Any, Mapping[str, Any]]) -> str:
    """Returns the law that keeps such buffers and has such options.

    Raises:
        ValueError: for a tensor that no law keeps: that of a law which is not registered here.
    """
    started = [values for values in states.values() if forms.has_started(values)]
    tensors = {name for values in started for name, value in values.items() if isinstance(value, Tensor)}
    strange = laws.unnamed(sorted(tensors - _THEIRS))
    if strange:
        raise ValueError(
            f"state_dict must be of a known law ({', '.join(laws.directed())}), got the state "
            f"{', '.join(strange)}, which none of them keeps: register its law with sfcore.laws.register"
        )
    held = [role for role, one in laws.roles().items() if one.torch in tensors]
    return laws.recognise(held if started else None, options)


def _schedule_free(program: str, kind: str, groups: Any, states: Any, counter: str) -> Source:
    # lr_max is -1 before the first step in both programs.
    found = [_group(g, Clock(g[counter], max(g["lr_max"], 0.0), g["weight_sum"])) for g in groups]
    base = {}
    if kind == "wrapper":
        base = {i: {k: v for k, v in values.items() if k != "z"} for i, values in states.items()}
        states = {i: {"z": values["z"]} for i, values in states.items() if "z" in values}
    holds = None if kind == "wrapper" else "y" if groups[0].get("train_mode") else "x"
    return Source(program, kind, found, states, holds, base)


def _pytorch_optimizer_wrapper(state_dict: Mapping[str, Any]) -> Source:
    inner = state_dict["base_optimizer"]
    indices = {
        (g, i): index
        for g, group in enumerate(inner["param_groups"])
        for i, index in enumerate(group["params"])
    }
    states = {indices[place]: values for place, values in state_dict["schedulefree_state"].items()}
    groups = [{"step": 0, "lr_max": 0.0, "weight_sum": 0.0} | g for g in inner["param_groups"]]
    source = _schedule_free("pytorch_optimizer", "wrapper", groups, states, "step")
    source.base = inner["state"]
    source.holds = "y" if state_dict["train_mode"] else "x"
    return source


# What pytorch_optimizer keeps with ams_bound, and is dropped with a notice.
_THEIRS = {"max_exp_avg_sq"}
_IGNORED = {
    "ams_bound": "the running maximum of the second moment is dropped",
    "amsgrad": "the running maximum of the second moment is dropped",
    "use_palm": "the second moment decays at the constant b2",
}


def import_state_dict(
    optimizer: ScheduleFreeOptimizer, state_dict: Mapping[str, Any], *, weights_hold: str | None = None
) -> list[str]:
    """Carries over the state of another program's optimizer; the configuration of yours holds.

    Known are schedulefree 1.4.1 (all of it) and its AdamCScheduleFreePlusPaper, pytorch_optimizer 4.1.0
    (ScheduleFreeSGD, AdamW, RAdam, Wrapper), Meta's GPAAdamW, and torch.optim.AdamW and Adam, whose second
    moment is kept while x, y and z start from the weights: load those first. For schedulefree's own
    optimizers `load_state_dict` does as well, and then their saved hyperparameters hold.

    Args:
        optimizer: of any class of ours; what the two do not share starts anew.
        state_dict: what their `state_dict()` returned.
        weights_hold: "x" or "y", what the weights saved beside it are; default what it says itself.
            schedulefree's wrapper does not say.

    Returns:
        Sentences: what differs, what starts anew, what has no counterpart.

    Raises:
        ValueError: if it is of no known program or does not fit; nothing has changed then.
        TypeError: for an optimizer that is none of ours, or a state dict that is no mapping.

    Example:
        >>> import sftorch, torch
        >>> from sftorch.checkpoint import import_state_dict
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> before = torch.optim.AdamW([w])
        >>> w.square().sum().backward()
        >>> before.step()
        >>> optimizer = sftorch.AdamWScheduleFree([w], lr=0.01)
        >>> notices = import_state_dict(optimizer, before.state_dict())
    """
    check_optimizer(optimizer)
    checks.require(TypeError, state_dict=(_STATE_DICT, state_dict))
    if weights_hold not in (None, "x", "y"):
        raise HyperparameterError(
            [
                f"weights_hold must be 'x' or 'y', got {weights_hold!r}: 'x' if eval() was called "
                "before the model was saved"
            ]
        )
    try:
        source = recognise(state_dict)
        if weights_hold is not None:
            source.holds = weights_hold
        if source.holds not in ("x", "y"):
            raise HyperparameterError(
                [
                    f"weights_hold must be 'x' or 'y', got {source.holds!r}: {source.program}'s "
                    f"{source.kind} does not say; 'x' if eval() was called before the model was saved"
                ]
            )
        translated, notices = _translated(optimizer, source)
    except STRANGE as error:
        raise ValueError(
            f"state_dict must have the entries that its program saves, got others ({error!r}); nothing has "
            "changed: pass what optimizer.state_dict() returned"
        ) from error
    optimizer.load_state_dict(translated)
    if source.kind == "plain":
        _watch(optimizer)
    return notices


def _translated(optimizer: ScheduleFreeOptimizer, source: Source) -> tuple[dict[str, Any], list[str]]:
    """Returns a state dict of the live optimizer's own form, and the notices."""
    packed = optimizer.state_dict()
    theirs, ours = ([len(g["params"]) for g in groups] for groups in (source.groups, packed["param_groups"]))
    if theirs != ours:
        raise ValueError(
            f"state_dict must have the optimizer's groups of {ours} parameters, got {theirs}: "
            "build them as they were saved"
        )
    state: dict[Any, dict[str, Any]] = {}
    problems: list[str] = []
    notices = [f"{source.program}'s state is carried over"]
    rows = zip(packed["param_groups"], source.groups, optimizer.param_groups, strict=True)
    for number, (group, saved, live) in enumerate(rows):
        carried = _Carried(optimizer, source, number, saved, live)
        notices += carried.notices()
        notices += carried.fill(group)
        books = optimizer._books(group)
        problems += _odd_clock(
            f"group {number}", Clock(*(books[key] for key in ("k", "lr_max", "weight_sum")))
        )
        if books.get("y_beta") is not None and not 0 <= books["y_beta"] <= 1:
            problems.append(f"group {number} must have a beta from 0 to 1, got {books['y_beta']}")
        places = zip(group["params"], saved["params"], live["params"], strict=True)
        for place, (index, old, p) in enumerate(places):
            values = carried.state(source.states.get(old, {}), source.base.get(old, {}), group, p)
            if values:
                problems += _odd_values(f"parameter {place} of group {number}", values, p)
                state[index] = values
    if problems:
        raise ValueError(
            "state_dict does not fit the optimizer; nothing has changed:\n  " + "\n  ".join(problems)
        )
    return packed | {"state": state}, notices


def _odd_clock(where: str, clock: Clock) -> list[str]:
    """Returns what is wrong with a clock, in sentences."""
    values = {name: number_in(value) for name, value in clock._asdict().items()}
    return [
        f"{where} must have a finite {name} >= 0, got {value!r}"
        for name, value in values.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf")
    ]


def _odd_values(where: str, values: Mapping[str, Any], p: Tensor) -> list[str]:
    """Returns what is wrong with a parameter's state, in sentences; a base knows its own."""
    found = _odd_clock(where, Clock(*(values[name] for name in Clock._fields)))
    for name, value in values.get("base", {}).items():
        if isinstance(value, Tensor) and not _is_dense(value):
            found.append(f"{where} must have a dense tensor as {name} of its base")
    for name, value in values.items():
        if name in state_dict.PRINTS:
            if type(value) is not int:
                found.append(f"{where} must have a whole number as {name}, got {type(value).__name__}")
        elif name not in Clock._fields and name != "base":
            if not _is_dense(value):
                found.append(f"{where} must have a dense tensor as {name}, got {type(value).__name__}")
            elif name == eight.SCALE:
                rows = (len(p), 1 + len(eight.columns(values))) if p.dim() else ()
                if value.shape != rows or value.dtype is not torch.int8:
                    found.append(
                        f"{where} must have int8 of shape {rows} in {name}, got {value.dtype} of shape "
                        f"{tuple(value.shape)}"
                    )
            elif value.shape != p.shape:
                kept = "" if name in ("z", "gap") else f" in {name}"
                found.append(f"{where} must have shape {tuple(p.shape)}{kept}, got {tuple(value.shape)}")
            elif (
                name not in forms.RESTS
                and eight.SCALE not in values
                and _kind_of_numbers(value) != _kind_of_numbers(p)
            ):
                found.append(f"{where} must have numbers like the parameter's in {name}, got {value.dtype}")
    return found


def _is_dense(value: Any) -> bool:
    is_strided = isinstance(value, Tensor) and value.layout == torch.strided
    return is_strided and not value.is_meta and not value.is_quantized


def _kind_of_numbers(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


@dataclass
class _Carried:
    optimizer: ScheduleFreeOptimizer
    source: Source
    number: int
    saved: Mapping[str, Any]
    live: dict[str, Any]

    def notices(self) -> list[str]:
        """Returns what differs between the saved options and the live ones."""
        options, name = self.saved["options"], f"group {self.number}"
        found = [f"{key} ({name}): {effect}" for key, effect in _IGNORED.items() if options.get(key)]
        if self.source.kind == "plain":
            first = f"{name}: x, y and z start from the weights as they are; v is kept, the first moment is "
            kept = "kept" if self.live.get("inner_momentum") else "dropped (inner_momentum is 0)"
            return [*found, first + kept]
        like = {"hyperparameters": self._hyperparameters()}
        rows = _changes.of_group(self.optimizer, self.number, self.live, like, self.source.kind)
        if self.source.kind != self.optimizer.law.name:
            rows.insert(0, of_optimizer(None, self.source.kind, self.optimizer.law.name))
        return found + [str(row) for row in rows]

    def _hyperparameters(self) -> dict[str, Any]:
        options = self.saved["options"]
        # Called as in the equations, or the second half of betas.
        same = [name for name in laws.options() if name not in ("lr", "prior_steps")]
        found = {name: options[name] for name in same if name in options and self.source.kind != "wrapper"}
        beta = options["betas"][0] if self._follows_a_rule() else self._saved_beta()
        found |= {"b2": options["betas"][1]} if "betas" in options and self.source.kind != "wrapper" else {}
        return found | {"lr": float(options["lr"]), "beta": beta}

    def _follows_a_rule(self) -> bool:
        options = self.saved["options"]
        return "betas" in options and options.get("beta_rule", "constant") != "constant"

    def _saved_beta(self) -> float:
        options = self.saved["options"]
        known: float | None = options.get("y_beta")  # ours says which one built y
        if known is not None:
            return known
        if self.source.kind in ("wrapper", "plain") and "y_beta" not in options:
            return self.optimizer._beta(self.live)  # neither program's wrapper saves it
        if self._follows_a_rule():
            return averaging.beta_after(self.saved["clock"].step, {**options, "beta": options["betas"][0]})
        return float(options["betas"][0] if "betas" in options else options["momentum"])

    def fill(self, group: dict[str, Any]) -> list[str]:
        """Writes the clock and what the weights hold into the packed group; returns notices."""
        group[state_dict.HOLD] = self.source.holds
        if self.source.kind == "plain":
            return _weights.open_books(self.optimizer, self.number, group)
        after = self._carry(self.saved["clock"]._asdict(), False)
        clock = {"k": after.step, "lr_max": after.lr_max, "weight_sum": after.weight_sum}
        self.optimizer._books(group).update(clock, y_beta=self._saved_beta())
        return []

    def state(
        self, theirs: Mapping[str, Any], base: Mapping[str, Any], group: Mapping[str, Any], p: Tensor
    ) -> dict[str, Any]:
        """Returns a parameter's packed state, {} if it had not started."""
        if self.source.kind == "plain":
            return self._from_plain(theirs, group, p) if "exp_avg_sq" in theirs else {}
        if not forms.has_started(theirs):
            return {}
        kept = ("z", "gap", eight.SCALE, "x", "y", *forms.RESTS, *state_dict.PRINTS)
        found: dict[str, Any] = {name: theirs[name] for name in kept if name in theirs}
        needed = self.optimizer._buffers(self.live)
        found |= self._buffers(theirs, needed, p)
        # Ours has a clock for each parameter.
        clock = theirs if "step" in theirs else self.saved["clock"]._asdict()
        found |= self._carry(clock, "exp_avg_sq" in needed and "exp_avg_sq" not in theirs)._asdict()
        if isinstance(self.optimizer, ScheduleFreeWrapper) and self.source.kind == "wrapper":
            found["base"] = dict(base)
        return found

    def _from_plain(self, theirs: Mapping[str, Any], group: Mapping[str, Any], p: Tensor) -> dict[str, Any]:
        """Returns x = y = z = the weights, with v, its time and a sum of weights that protects them."""
        z = p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
        values, _ = self.optimizer._values(dict(group))
        t, prior = int(theirs["step"]), values["prior_steps"]
        # As many weights as prior_steps, each like the one that comes next (S4), which is t^r heavy already.
        lr = _weights.full_lr(group, values)
        weight_sum = prior * averaging.step_weight(t + 1, lr, **weighed(values))
        found = {"z": z, **self._buffers(theirs, self.optimizer._buffers(self.live), p)}
        if self.optimizer._beta(self.live) == 0:
            found["x"] = z.clone()
        return found | Clock(t, 0.0, weight_sum)._asdict()

    @staticmethod
    def _buffers(theirs: Mapping[str, Any], needed: tuple[str, ...], p: Tensor) -> dict[str, Tensor]:
        wide = torch.promote_types(p.dtype, torch.float32)
        return {name: theirs[name] if name in theirs else torch.zeros_like(p, dtype=wide) for name in needed}

    def _carry(self, clock: Mapping[str, Any], new_v: bool) -> Clock:
        values, _ = self.optimizer._values(self.live)
        same = comparable(self.source.kind, self.optimizer.law.name)
        return _changes.carry(clock, self._hyperparameters(), values, same, new_v)


def _watch(optimizer: ScheduleFreeOptimizer) -> None:
    """Makes weights that are loaded after the import an error: x, y and z came from those before."""
    loaded = optimizer._loaded
    if loaded is not None:
        found = prints.take(loaded.saved)
        loaded.prints = {p: (print_, print_) for p, print_ in zip(loaded.saved, found, strict=True)}
