"""Parameter groups: checked options of a law, and a clock for each parameter and each group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sfcore import checks, codes
from sfcore.averaging import beta_after, effective_lr
from sfcore.laws import Law
from sftorch.law.parts import part, parts_of
from sftorch.law.scalars import Clock, Next, prior_weight
from sftorch.state import arguments, eight, forms, meshes
from sftorch.state.compiler import uncompiled, without_compiler


class Batch(NamedTuple):
    """Parameters of one group that share clock, device and dtype.

    Attributes:
        params: those that have a gradient.
        states: their state.
        clock: theirs, before the step.
    """

    params: list[Tensor]
    states: list[dict[str, Any]]
    clock: Clock


def new_books() -> dict[str, Any]:
    """Returns the bookkeeping of a new group; the first five names are upstream's."""
    return {
        "k": 0,
        "train_mode": True,
        "weight_sum": 0.0,
        "lr_max": 0.0,
        "scheduled_lr": 0.0,
        "c": 0.0,
        "y_beta": None,
        "prior_weight": 0.0,
    }


class GroupedOptimizer(torch.optim.Optimizer, ABC):
    """Abstract base: groups and their checks, clocks, metrics. No state dict, no step.

    A parameter's clock starts at its first gradient, so its bias correction and its average are its
    own; lr and warm-up belong to the group. `group["k"]`, `["lr_max"]`, `["weight_sum"]` are the
    clock of a parameter that had a gradient in every step, as in schedulefree 1.4.1.

    What a parameter holds, and what its state has beside it, tells `forms`.
    """

    law: ClassVar[Law]
    _rest: ClassVar[str] = forms.Y_REST  # of what the parameters hold between steps
    _may_be_lean: ClassVar[bool] = False
    _built_lrs: tuple[float, ...] = ()
    _built_sizes: tuple[int, ...] = ()  # in elements
    _carried: tuple[str, ...] = ()  # numbers of a group, beside the books, that a resume goes on with
    _watch: Any = None
    _agrees = (
        False  # whether the step that is first after a start or a load has been checked on all processes
    )

    def __init__(self, params: ParamsT, defaults: dict[str, Any]):
        arguments.refuse_partitioner()
        super().__init__(arguments.as_list(params, or_empty=False), defaults | new_books())

    def _values(self, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Returns a group's hyperparameters by canonical name, and the names its user knows."""
        values = self.law.missing(group) | self.law.of_torch_group(group)
        return values | {"lr": arguments.as_number(values["lr"])}, dict(self.law.torch_names)

    @abstractmethod
    def _books(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the dict that holds a group's bookkeeping, and the options that are ours."""

    def _beta(self, group: dict[str, Any]) -> float:
        """Returns the interpolation beta of which the configuration takes the coming gradient."""
        return beta_after(self._books(group)["k"], self._values(group)[0])

    def _buffers(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Returns the names of the state tensors beside z that a parameter of this group needs."""
        return tuple(one.torch for one in self.law.kept(self.law.of_torch_group(group), self._leaves(group)))

    def _leaves(self, group: Mapping[str, Any]) -> str:
        """Returns which parameters a group holds: "" is any, others as `sfcore.laws.Buffer.leaves`."""
        return ""

    def _new_buffer(self, name: str, iterate: Tensor, group: dict[str, Any]) -> Tensor:
        """Returns zeros for a buffer of the direction, beside z or what is kept in its place."""
        (buffer,) = (one for one in self.law.buffers if one.torch == name)
        if buffer.of_rows:  # whole on every process
            shape = buffer.shape(iterate.shape, self._values(group)[0])
            return torch.zeros(shape, dtype=iterate.dtype, device=iterate.device)
        return torch.zeros_like(iterate, memory_format=torch.preserve_format)

    @uncompiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, in the mode the optimizer is in; everything is checked before.

        Args:
            param_group: `{"params": ..., option: value, ...}`; missing options take the defaults.

        Raises:
            HyperparameterError: with every option that is out of range or misspelt.
        """
        group = arguments.as_group(param_group, self.defaults, self._params())
        group |= self._opening_books(self.defaults | group)
        without_compiler(torch.optim.Optimizer.add_param_group)(self, group)
        self._note_built(self.param_groups[-1])

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets all gradients to None, or to zeros in place, as torch's optimizers do."""
        without_compiler(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    def _note_built(self, group: dict[str, Any]) -> None:
        """Notes what a new group was built with: its lr, which a resume compares, and its size."""
        self._built_lrs = (*self._built_lrs, float(group["lr"]))
        self._built_sizes = (*self._built_sizes, sum(p.numel() for p in group["params"]))

    def _built_lr(self, group: dict[str, Any]) -> float | None:
        """Returns the lr that a group of this optimizer was built with, None if it is not known."""
        index = next(i for i, one in enumerate(self.param_groups) if one is group)
        return self._built_lrs[index] if index < len(self._built_lrs) else None

    def _opening_books(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the books of a group that joins now, after checking its options."""
        values, _ = self._values(group)
        if found := self._problems(group, values):
            raise checks.HyperparameterError(found)
        prior = prior_weight(values["prior_steps"], values["r"], values["lr"], values["weight_lr_power"])
        in_train_mode = self._books(self.param_groups[0])["train_mode"] if self.param_groups else True
        return new_books() | {"train_mode": in_train_mode, "prior_weight": prior, "weight_sum": prior}

    def _problems(self, group: dict[str, Any], values: dict[str, Any]) -> list[str]:
        """Returns everything that is wrong with a group's options."""
        may_be = ["lean"] if self._may_be_lean and all(one.lean for one in self.law.buffers) else []
        may_be += ["8bit"] if may_be and all(one.code for one in self.law.buffers) else []
        found = checks.find_problems(self.law.options, values, self.law.torch_names)
        if self._books(group) is group and "base_momentum" in group and values["beta_rule"] != "constant":
            name = self.law.torch_names["beta"]
            found.append(
                f"beta_rule must be 'constant' beside a scheduler that cycles {name}, got "
                f"{values['beta_rule']!r}: give OneCycleLR or CyclicLR cycle_momentum=False"
            )
        return found + arguments.find_problems(self._books(group), values.get("beta"), may_be)

    def _check_settings(self) -> None:
        """Raises if a scheduler or a user has since put nonsense into a group."""
        found = []
        for group in self.param_groups:
            # Prior steps were weighed at the start; a scheduler may set lr to 0 now.
            found += self._problems(group, self._values(group)[0] | {"prior_steps": 0})
        if found:
            raise checks.HyperparameterError(found)
        for size, group in zip(self._built_sizes, self.param_groups, strict=False):
            arguments.refuse_flat_partitions(size, group["params"])

    def metrics(self, distance: bool = False) -> list[dict[str, float]]:
        """Returns what the last step of each group used, for logging.

        Args:
            distance: whether to measure `x_z_distance` too, a pass over the weights and one wait for each
                group; default False. With DTensors all processes must ask for it.

        Returns:
            One dict a group: `lr` (with warm-up and rectification), `lr_max`, `c` (averaging weight),
            `weight_sum`, `step` (finished updates), `effective_lr` (the multiple of the newest
            direction by which y moved), and where it is asked for `x_z_distance` (Euclidean norm of x - z
            over the group's parameters). The keys of `sfjax.metrics`. After `Checkpoints.restore` also
            `restart_steps`, `restart_moved` and `restart_jump`.

        Example:
            >>> import sftorch, torch
            >>> optimizer = sftorch.SGDScheduleFree([torch.nn.Parameter(torch.ones(2))])
            >>> optimizer.metrics()[0]["step"]
            0
        """
        checks.require(TypeError, distance=(checks.FLAG, distance))
        found = []
        restart = self._watch.metrics() if self._watch else {}
        for group in self.param_groups:
            books = self._books(group)
            lr_t, c = books["scheduled_lr"], books["c"]
            of_step = {"lr": lr_t, "lr_max": books["lr_max"], "c": c, "weight_sum": books["weight_sum"]}
            effective = effective_lr(lr_t, c, self._beta(group))
            of_step |= {"step": books["k"], "effective_lr": effective}
            if distance:
                of_step["x_z_distance"] = self._distance(group)
            found.append(of_step | restart)
        return found

    @torch.no_grad()
    def _distance(self, group: dict[str, Any]) -> float:
        """Returns the norm of x - z over a group, of DTensors over all processes of their mesh."""
        started, beta = self._started(group), self._y_beta(group)
        squares = [torch.zeros((), dtype=torch.float64)]
        for p in started:
            state, own = parts_of(self.state[p]), part(p)
            if self._wanted(group) == "y" or "y" in state:
                y = forms.joined(state.get("y", own), state)
                x = forms.x_from_y(y, state, beta)
            else:
                x = forms.joined(own, state, forms.X_REST)
                y = forms.y_from_x(x, state, beta)
            gap = x - forms.z_of(y, state)
            squares.append(torch.linalg.vector_norm(gap.abs().double()).square().cpu())
        sums = torch.stack(squares)
        meshes.add_up_(sums, [None, *map(meshes.layout, started)])
        return float(sums.sum().sqrt())

    def describe(self, **facts: Any) -> str:
        """Returns what a run will do, and what is wrong with it, as a table a group to print at its start.

        It changes nothing.

        Args:
            facts: what the optimizer cannot know, such as `total_steps=10_000`, `accumulation=8`,
                `batchnorm=True`; `sfcore.plan.check` has them all.

        Example:
            >>> import sftorch, torch
            >>> optimizer = sftorch.AdamWScheduleFree([torch.nn.Parameter(torch.ones(2))], warmup_steps=50)
            >>> optimizer.describe(total_steps=1000).splitlines()[5]
            'warm-up       50 optimizer steps, by optimizer'
        """
        from sfcore.plan import check, text  # a third of what importing sftorch would take

        parts = []
        for number, group in enumerate(self.param_groups):
            values, _ = self._values(group)
            dtypes = {str(p.dtype).removeprefix("torch.") for p in group["params"]}
            narrow = dtypes & {"float16", "bfloat16"}
            known = {"optimizer": f"sftorch.{self.law.torch}"}
            known["param_dtype"] = min(narrow) if narrow else "float32"
            plan = check(**(known | values | facts))
            holds = "y, to train" if self._books(group)["train_mode"] else "x, to evaluate"
            kinds = ", ".join(sorted(dtypes))
            head = f"group {number}: {len(group['params'])} {self._called(group)} ({kinds}) hold {holds}"
            texts = {key: value if isinstance(value, str) else f"{value:g}" for key, value in values.items()}
            shown = ", ".join(f"{key} {value}" for key, value in texts.items())
            parts.append(f"{head}\nvalues        {shown}\n{text(plan)}")
        return "\n".join(parts)

    def _called(self, group: dict[str, Any]) -> str:
        """Returns what `describe` calls the parameters of a group."""
        return "parameters"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.update(self.defaults | group)

    def _wanted(self, group: dict[str, Any]) -> str:
        """Returns what a group's parameters hold in its mode, "x" or "y"."""
        return "x"

    def _is_rounded(self, group: dict[str, Any]) -> bool:
        """Tells whether a group's state is rounded at random, in the lean or the 8-bit form of `forms`."""
        return self._may_be_lean and group["precision"] != forms.EXACT

    def _form(self, p: Tensor, group: dict[str, Any]) -> str:
        """Returns the form of `forms` in which a parameter's state is kept."""
        if not self._is_rounded(group):
            return forms.EXACT
        in_codes = group["precision"] == forms.EIGHT and codes.has_rows(p.shape)
        return forms.EIGHT if in_codes else forms.LEAN

    def _to_agree(self) -> list[Tensor]:
        """Returns the parameters whose processes are to raise together: all in the first step, then none.

        What is wrong with gradients or options mostly is so from the first step after a start or a load on;
        in every step it would cost a wait for the slowest.
        """
        return [] if self._agrees else self._params()

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _started(self, group: dict[str, Any]) -> list[Tensor]:
        return [p for p in group["params"] if forms.has_started(self.state.get(p, {}))]

    def _ready(self, p: Tensor, group: dict[str, Any], buffers: tuple[str, ...] = ()) -> dict[str, Any]:
        """Returns the state that a parameter needs for a step: its own if it will do, else a new dict.

        At the first gradient x = y = z, and the clock is at 0.
        """
        form = self._form(p, group)
        state: dict[str, Any] = self.state.get(p, {})
        wanted = ["z" if form == forms.EXACT else "gap", "step", *buffers]
        in_form = forms.is_in_codes(state, buffers) if form == forms.EIGHT else eight.SCALE not in state
        if in_form and all(name in state for name in wanted) and forms.has_rest(p, state, self._rest):
            return state
        state = dict(state)
        if not forms.has_started(state):
            state |= forms.first_iterate(p, form)
            state |= Clock(0, 0.0, self._books(group)["prior_weight"])._asdict()
        elif "step" not in state:  # upstream's state has the group's clock only
            state |= self._group_clock(group)._asdict()
        forms.fit_rest(p, state, self._rest)
        y = forms.joined(p, state, self._rest)
        forms.convert_(p, state, y, forms.EXACT if form == forms.EIGHT else form)
        for name in buffers:
            if name not in state:
                state[name] = self._new_buffer(name, state["z" if "z" in state else "gap"], group)
        forms.convert_(p, state, y, form)
        return state

    def _y_beta(self, group: dict[str, Any]) -> float:
        """Returns the beta that built y, which a changed configuration does not change."""
        y_beta: float | None = self._books(group)["y_beta"]
        return self._beta(group) if y_beta is None else y_beta

    def _settle_beta(
        self, group: dict[str, Any], beta: float | None = None, moved: Collection[Tensor] = ()
    ) -> None:
        """Makes a group's parameters hold what a beta makes of x and z.

        Args:
            group: one of ours.
            beta: None is the configured one.
            moved: parameters that hold it already.
        """

    def _group_clock(self, group: dict[str, Any]) -> Clock:
        books = self._books(group)
        return Clock(books["k"], books["lr_max"], books["weight_sum"])

    def _batches(self, states: Mapping[Tensor, dict[str, Any]]) -> list[Batch]:
        """Returns parameters and their states by clock, device and dtype."""
        # Neighbours mostly share their key: with thousands of small tensors, this loop is much of a step.
        table: dict[tuple[Any, ...], tuple[list[Tensor], list[dict[str, Any]]]] = {}
        last = None
        for p, state in states.items():
            key = (
                state["step"], state["lr_max"], state["weight_sum"], p.dtype, p.device, eight.SCALE in state
            )  # fmt: skip
            if key != last:
                params, of_params = table.setdefault(key, ([], []))
                last = key
            params.append(p)
            of_params.append(state)
        return [Batch(params, of_params, Clock(*key[:3])) for key, (params, of_params) in table.items()]

    def _finish_batch(self, batch: Batch, after: Next) -> None:
        """Writes the clock of parameters that have moved, and S8 for those that keep x beside y."""
        clock = after.clock
        entries = {"step": clock.step, "lr_max": clock.lr_max, "weight_sum": clock.weight_sum}
        for p, state in zip(batch.params, batch.states, strict=True):
            state.update(entries)
            if "x" in state:
                z = forms.z_of(forms.joined(p, state), state)
                state["x"].add_(after.c * (z - state["x"]))  # S8

    def _finish(self, group: dict[str, Any], after: Next, moved: Collection[Tensor]) -> None:
        """Advances the group's own clock by one step.

        Args:
            group: one of ours.
            after: its clock after the step.
            moved: parameters that the step has moved; the others' y follows the group's beta.
        """
        if after.change:
            self._settle_beta(group, after.beta, moved)
        books, clock = self._books(group), after.clock
        books["k"], books["lr_max"], books["weight_sum"] = clock
        books["scheduled_lr"], books["c"] = after.lr_t, after.c
