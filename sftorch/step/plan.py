"""From a direction of one's own (S6) to a step: who moves what, by which numbers, and the books.

A plan tells which tensors go together and which backend moves them. It is kept, and will do for the next step
while all that it was made of is the same: groups, options, parameters and which of them have gradients, the
tensors of their state, where these lie, and the clocks. All of this is looked at in every step, at a fraction
of the cost of a new plan. Numbers are always new.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from operator import attrgetter, is_, itemgetter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sfcore import checks, matrices
from sfcore.averaging import DECAYS, beta_after, coefficients, decay_scale
from sftorch.law.iterates import as_real
from sftorch.law.parts import PLAIN, gradients, is_divided, note_written, parts, place
from sftorch.law.scalars import Clock, Next, next_step
from sftorch.state import arguments, eight
from sftorch.state.compiler import uncompiled
from sftorch.state.groups import Batch, new_books
from sftorch.state.meshes import row_groups, together
from sftorch.state.modes import TrainEvalOptimizer
from sftorch.state.state_dict import ScheduleFreeOptimizer
from sftorch.step import backends
from sftorch.step.backends import Direction, Move

Precision = Literal["exact", "lean", "8bit"]
Group = dict[str, Any]
Tensors = list[Tensor]
States = dict[Tensor, dict[str, Any]]
Averages = Mapping[Tensor, Tensor]  # x, where parameters are to end as x
_CLOCK = itemgetter("step", "lr_max", "weight_sum")
_DTYPE, _IS_CPU = attrgetter("dtype"), attrgetter("is_cpu")
_NO_OPTIONS = {*new_books(), "params"}


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns what `locals()` is at the start of a constructor as the options of its groups."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "__class__")}


def viewed(tensors: Iterable[Tensor], are_complex: bool) -> list[Tensor]:
    """Returns views that share memory: the parts of DTensors, complex tensors as pairs of reals, no 0-d ones.

    torch.compile (2.13) takes a 0-d float64 tensor for a Python number and loses what is written to it.
    """
    found = [tensor if tensor.ndim else tensor.view(1) for tensor in parts(tensors)]
    return [as_real(tensor) for tensor in found] if are_complex else found


def _facts(held: list[Tensor], grads: list[Any]) -> tuple[list[Any], ...]:
    """Returns what tensors are, but for the values in them, and where those lie that stay."""
    every = [*held, *grads]
    return (
        list(map(_DTYPE, every)),
        list(map(Tensor.numel, every)),
        list(map(Tensor.stride, every)),
        list(map(Tensor.data_ptr, held)),
        list(map(_IS_CPU, grads)),
        list(map(Tensor.is_neg, grads)),
    )


class Work:
    """One batch of a plan.

    Attributes:
        parts: who runs what of it, each a backend and a move.
        numbers: of the coming step, as `Move` has them.
        scalars: the same as float64 of shape (n,), because torch.compile would compile Python numbers into
            its program, a new one in every step.
        after: the clock after the coming step, with its c and lr_t.
        is_divided: whether there are DTensors among the parameters and their state.
        may_be_kept: whether it takes little time to see that this stands.
    """

    def __init__(self, optimizer: DirectedOptimizer, plan: GroupPlan, batch: Batch, x: Averages | None):
        self.batch = batch
        self.params, self.states, self.clock = batch
        group, self.pairs = plan.group, self.params[0].is_complex()
        self.is_lean, self.to_x = optimizer._is_rounded(group), x is not None
        self._in_codes = eight.SCALE in self.states[0]
        places = {p: place for place, p in enumerate(optimizer._params())} if self.is_lean else {}
        self._ordinals = [places[p] for p in self.params if places]
        direction = self._number(optimizer, plan)
        rests = [optimizer._rest] if optimizer._rest in self.states[0] else []
        scales = [eight.SCALE] if self._in_codes else []
        over = [row_groups(p) for p in self.params] if self._in_codes else []
        names = ["gap" if self.is_lean else "z", *rests, *plan.buffers, *scales]
        views = {name: viewed((s[name] for s in self.states), self.pairs) for name in names}
        grads = gradients(self.params)
        move = Move(
            direction=direction,
            ys=viewed(self.params, self.pairs),
            rests=views[rests[0]] if rests else [],
            xs=[] if x is None else viewed(map(x.__getitem__, self.params), self.pairs),
            zs=views[names[0]],
            grads=viewed(grads, self.pairs),
            buffers={name: views[name] for name in plan.buffers},
            foreach=group["foreach"],
            fused=group["fused"],
            maximize=group["maximize"],
            keys=self._keys(plan) if self.is_lean else None,
            kept={},
            places=[place(p) for p in self.params] if self.is_lean else (),
            over=over if any(over) else (),
            of=self.params if direction.gathers and any(map(is_divided, self.params)) else (),
            scales=views.get(eight.SCALE, ()),
            columns=tuple(eight.columns(self.states[0]).items()) if self._in_codes else (),
        )
        self.parts = backends.assign(move)
        self._buffer = np.array(self.numbers, dtype=np.float64)
        self.scalars = torch.from_numpy(self._buffer)
        # What all of this was made of. A part that is not the move itself has copies of gradients.
        self._names, self._kinds = names, {type(p.grad) for p in self.params}
        self._held = [*self.params, *(state[name] for name in names for state in self.states)]
        self.is_divided = not PLAIN.issuperset(map(type, self._held))
        held = parts(self._held)
        self.may_be_kept = (
            self.parts[0][1] is move
            and PLAIN.issuperset(map(type, [*held, *grads]))
            and all(p.grad.layout is torch.strided for p in self.params)  # type: ignore[union-attr]
            # Elsewhere people move state away to free memory, which a plan would hold.
            and all(t.is_cpu for t in held)
            # Which gradients are DTensors is then known by their type.
            and (len(self._kinds) == 1 or not self.is_divided)
        )
        self._has_views = self.pairs or any(p.ndim == 0 for p in self.params)
        self._facts = _facts(held, grads) if self.may_be_kept else ()

    def stands(self, optimizer: DirectedOptimizer, plan: GroupPlan, x: Averages | None) -> bool:
        """Tells whether this does for the coming step, and takes its gradients, its x and its numbers."""
        params, states = self.params, self.states
        grads: list[Any] = [p.grad for p in params]
        if (
            not (PLAIN if not self.is_divided else self._kinds).issuperset(map(type, grads))
            or not all(map(is_, map(optimizer.state.get, params), states))
            or not all(map(is_, self._held, [*params, *(s[name] for name in self._names for s in states)]))
            or list(map(_CLOCK, states)).count(self.clock) != len(params)
        ):
            return False
        held = self._held
        if self.is_divided:
            held, grads = parts(held), gradients(params)
        if _facts(held, grads) != self._facts:
            return False
        ((backend, move),) = self.parts
        move.grads[:] = viewed(grads, self.pairs) if self._has_views else grads
        if x is not None:
            move.xs[:] = viewed(map(x.__getitem__, params), self.pairs)
        if self._number(optimizer, plan) is not move.direction:
            return False
        if self.is_lean:
            self.parts = [(backend, move._replace(keys=self._keys(plan)))]
        self._buffer[:] = self.numbers
        return True

    def _number(self, optimizer: DirectedOptimizer, plan: GroupPlan) -> Direction:
        """Takes the numbers of the coming step; returns its direction."""
        law, values = optimizer.law, plan.values
        self.after = after = next_step(law, self.clock, plan.group["k"], values, optimizer._factor)
        direction, own = optimizer._direction(values, after.clock.step)
        ratio = values.get("adam_lr_ratio", 1.0) if values["leaves"] == matrices.OTHERS else 1.0
        lr_t, lr_max = after.lr_t * ratio, after.clock.lr_max * ratio
        wd = values.get("weight_decay", 0.0) * decay_scale(lr_t, lr_max, values.get("decay_power", 1))  # F6
        wd_y, wd_z = DECAYS[values.get("decay_at", "y")](wd)
        old_beta = after.beta - after.change
        k1, k2 = coefficients(after.c, after.beta, after.change, old_beta or 1.0)  # what is 0 does not change
        if self.to_x:
            k1, k2 = after.c, 0.0
        elif self.is_lean:
            k2 = old_beta
        self.numbers = (lr_t, wd_y, wd_z, k1, k2, *own)
        return direction

    def _keys(self, plan: GroupPlan) -> Tensor:
        seed, step = plan.group["seed"], self.after.clock.step
        return backends.keys(seed, self._ordinals, step, len(plan.buffers))


class GroupPlan:
    """The works of a group, or of one of its parameters.

    Attributes:
        group: the optimizer's own.
        values: its options by canonical name, and "leaves": which parameters these are.
        buffers: names of the state tensors that its direction needs.
        works: what is to be done.
        after: the group's own clock after the coming step.
        may_be_kept: whether it takes little time to see that this stands.
    """

    def __init__(
        self, optimizer: DirectedOptimizer, group: Group, params: Tensors, states: States, x: Averages | None
    ):
        self.group, self._params = group, list(params)
        self._options = itemgetter(*(name for name in optimizer.defaults if name not in _NO_OPTIONS))
        self._given, self.values, self._chosen = self._read_options(optimizer)
        self.buffers = optimizer._buffers(group)
        self._idle = [p for p in params if p not in states]
        moving = {p: states[p] for p in params if p in states}
        self.works = [Work(optimizer, self, batch, x) for batch in optimizer._batches(moving)]
        self.after = self._of_group(optimizer, optimizer._group_clock(group))
        # At beta = 0 each step sees to it that x is there.
        self.may_be_kept = bool(self.values["beta"]) and all(work.may_be_kept for work in self.works)

    def _of_group(self, optimizer: DirectedOptimizer, clock: Clock) -> Next:
        return next_step(optimizer.law, clock, self.group["k"], self.values, optimizer._factor)

    def _read_options(self, optimizer: DirectedOptimizer) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Returns the options as given, by canonical name, and those that decide more than numbers."""
        given, (values, _) = self._options(self.group), optimizer._values(self.group)
        values = values | {"leaves": optimizer._leaves(self.group)}
        if any(isinstance(value, Tensor | list) for value in given):
            given = ()  # these may be written to, and would still be the same objects
        chosen = [self.group[name] for name in ("foreach", "fused", "maximize", "precision", "seed")]
        return given, values, (*chosen, values["beta"], optimizer._buffers(self.group))

    def stands(self, optimizer: DirectedOptimizer, group: Group, params: Tensors, x: Averages | None) -> bool:
        """Tells whether this does for the coming step, and takes all that is new in it.

        Raises:
            HyperparameterError: if options have changed, and some are wrong now.
        """
        if group is not self.group or not group["train_mode"] or len(params) != len(self._params):
            return False
        given = self._options(group)
        if not self._given or not all(map(is_, given, self._given)):
            optimizer._check_settings()
            chosen = self._chosen
            self._given, self.values, self._chosen = self._read_options(optimizer)
            if chosen != self._chosen:
                return False
        beta = self.values["beta"]
        if self.values["beta_rule"] != "constant":
            beta = beta_after(group["k"], self.values)
        if group["y_beta"] not in (None, beta) or not all(map(is_, params, self._params)):
            return False
        if any(p.grad is not None for p in self._idle):
            return False
        try:
            if not all(work.stands(optimizer, self, x) for work in self.works):
                return False
        except (KeyError, RuntimeError):  # state without an entry; gradients that cannot be asked
            return False
        clock = group["k"], group["lr_max"], group["weight_sum"]
        if self.works and self.works[0].clock == clock:
            self.after = self.works[0].after
        else:
            self.after = self._of_group(optimizer, Clock(*clock))
        return True


class DirectedOptimizer(ScheduleFreeOptimizer):
    """Abstract: optimizers that have a direction of their own; their groups hold options and books."""

    _plan: list[GroupPlan] | None = None  # of the last step, if it may do for the next
    _factor = 1.0  # on the lr of the coming step, where the loss is asked

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            known = checks.with_known_options(
                lambda given: cls.law.problems("torch", given), lambda: cls.law.words("torch")
            )
            cls.__init__ = known(cls.__init__)  # type: ignore[method-assign]

    @abstractmethod
    def _direction(self, values: Mapping[str, Any], t: int) -> tuple[Direction, tuple[float, ...]]:
        """Returns S6's direction at a parameter's time t, and the numbers to call it with.

        Args:
            values: a group's options by canonical name, and "leaves" as `_leaves` tells them.
            t: one-based.
        """

    def _books(self, group: dict[str, Any]) -> dict[str, Any]:
        return group

    @uncompiled
    def _prepare(self, x: Averages | None = None) -> list[GroupPlan]:
        """Returns the plan of the coming step; where it cannot be taken, raises before anything changes.

        Args:
            x: parameter -> x, if the parameters are to end as x.
        """
        if self._is_half_stepped:
            self._require_whole()
        groups, plan = self.param_groups, self._plan or []
        stands = self._loaded is None and len(plan) == len(groups)
        for of_group, group in zip(plan, groups, strict=False):
            stands = stands and of_group.stands(self, group, group["params"], x)
        if stands:
            return plan
        self._plan = None
        self._begin()
        with together(self._to_agree()):
            self._check_settings()
            arguments.check_gradients(self._params(), or_sparse=not self.law.buffers)
        with together(self._to_agree()):
            plan = self._new_plan([(group, group["params"]) for group in groups], x)
        self._agrees = True
        return plan

    def _new_plan(self, groups: list[tuple[Group, Tensors]], x: Averages | None = None) -> list[GroupPlan]:
        """Returns a plan for parameters of some groups, and makes their state ready."""
        ready: States = {}
        for group, params in groups:
            buffers = self._buffers(group)
            ready |= {p: self._ready(p, group, buffers) for p in params if p.grad is not None}
        plan = [GroupPlan(self, group, params, ready, x) for group, params in groups]
        self.state.update(ready)
        for group, params in groups:
            self._settle_beta(group if params is group["params"] else group | {"params": params})
        return plan

    @staticmethod
    def _run(plan: list[GroupPlan]) -> None:
        """Runs S6-S9 of every batch, in place. torch.compile compiles this, one tensor at a time."""
        compiling = torch.compiler.is_compiling()
        for of_group in plan:
            for work in of_group.works:
                for backend, move in work.parts:
                    if compiling:
                        backends.run_compiled(move, work.scalars)
                    else:
                        backend.run(move, work.numbers)

    @uncompiled
    def _close(self, plan: list[GroupPlan], is_whole: bool = True) -> None:
        """Writes the books, and lets go of the gradients.

        Args:
            plan: what has been run.
            is_whole: whether that was the step of all groups, and not of one parameter.
        """
        for of_group in plan:
            for work in of_group.works:
                self._finish_batch(work.batch, work.after)
                work.clock = work.after.clock
                if work.is_divided:
                    note_written(work.params)
                for _, move in work.parts:
                    move.grads.clear()
                    move.xs.clear()
            if is_whole:
                after = of_group.after
                moved = {p for work in of_group.works for p in work.params} if after.change else ()
                self._finish(of_group.group, after, moved)
        if is_whole:
            self._plan = None if any(not one.may_be_kept for one in plan) else plan
            if self._ahead:
                self._ahead.clear()
        self._is_half_stepped = False


class YAtRest(DirectedOptimizer, TrainEvalOptimizer):
    """Abstract: the usual form, parameters hold y between steps."""

    _may_be_lean = True
    _moves_alone = True

    @uncompiled
    def _prepare_one(self, group: dict[str, Any], p: Tensor, last: GroupPlan | None) -> GroupPlan:
        """Returns the plan of the coming step of one parameter; `last` is that of its last one."""
        if self._is_half_stepped:
            self._require_whole()
        if not self._ahead:
            self._begin()
            self._check_settings()
        if last is not None and last.stands(self, group, [p], None):
            return last
        arguments.check_gradients([p], or_sparse=not self.law.buffers)
        (plan,) = self._new_plan([(group, [p])])
        return plan
