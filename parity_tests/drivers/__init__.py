"""One driver an implementation: a case and its recorded gradients in, a trajectory out.

Frameworks and peers are imported when a driver first runs, so that one package can be tested alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from parity_tests import golden, recorded
from parity_tests.cases import CASES, DEFAULTS, Case
from parity_tests.drivers import names
from parity_tests.problems import Record
from parity_tests.reference import Arrays, Reference
from parity_tests.trajectory import Iterates, Trajectory, stack
from sfcore import laws


class Run(Protocol):
    """An optimizer in the middle of a run."""

    def update(self, grads: Arrays, lr: float, *, loss: float | None = None, clip: float = 1.0) -> None:
        """Takes one step; lr is the schedule's value, before warm-up, and the others as of `Case.told`."""

    def iterates(self) -> Iterates:
        """Returns x, y and z, without touching the run."""


class ForcedRun(Run, Protocol):
    """One whose state can be overwritten."""

    def put(self, truth: Reference) -> None:
        """Overwrites weights and state with the reference's."""


Start = Callable[[Case, Arrays, str], Run]


@dataclass(frozen=True)
class Driver:
    """An implementation under test.

    Attributes:
        name: as in the conformance matrix.
        start: (case, initial values, "float64" or "float32") -> a run.
        optimizers: the laws that it runs, or a function that says which these are now.
        lacks: canonical options it does not have, or a function of the law that says which these are.
        apart: options that it has, but not together.
    """

    name: str
    start: Start
    optimizers: Iterable[str] | Callable[[], Iterable[str]]
    lacks: tuple[str, ...] | Callable[[str], tuple[str, ...]] = ()
    apart: tuple[str, ...] = ()

    def supports(self, case: Case) -> bool:
        """Tells whether a case can be put to this implementation at all."""
        has = case.options.get
        together = bool(self.apart) and all(has(name) for name in self.apart)
        runs = case.optimizer in self.runs()
        lacks = self.lacks(case.optimizer) if callable(self.lacks) else self.lacks
        return (
            runs
            and not together
            and not any(has(name) != DEFAULTS[case.optimizer].get(name) for name in lacks)
        )

    def runs(self) -> list[str]:
        """Returns the laws that it runs."""
        return list(self.optimizers() if callable(self.optimizers) else self.optimizers)

    def run(
        self, case: Case, record: Record, dtype: str = "float64", noted: Iterable[int] | None = None
    ) -> Trajectory:
        """Returns the trajectory of a case on recorded gradients at the noted steps, by default all."""
        steps = range(case.steps + 1) if noted is None else set(noted)
        run = self.start(case, record.params, dtype)
        rows = {0: run.iterates()}
        for step, lr in enumerate(case.lrs):
            grads, told = case.told(record.step(step), step)
            run.update(grads, lr, **told)
            if step + 1 in steps:
                rows[step + 1] = run.iterates()
        return stack(rows)


@functools.cache
def on_golden(driver: str, case: str, dtype: str = "float64") -> Trajectory:
    """Returns a driver's run of a case on its golden gradients, once a session."""
    recorded = golden.load_record(CASES[case].problem)
    return DRIVERS[driver].run(CASES[case], recorded, dtype, golden.load(case).steps.tolist())


def first_of_their_family(driver: Driver) -> list[str]:
    """Returns the first case of every optimizer and family that a driver supports."""
    return _first(driver, lambda case: (case.optimizer, case.family))


def first_of_their_optimizer(driver: Driver) -> list[str]:
    """Returns the first case of every optimizer that a driver supports."""
    return _first(driver, lambda case: case.optimizer)


def _first(driver: Driver, kind: Callable[[Case], Any]) -> list[str]:
    supported = [case for case in CASES.values() if driver.supports(case)]
    return list({kind(case): case.id for case in reversed(supported)}.values())


@dataclass(frozen=True)
class Recorded(Driver):
    """A program that no package index has: runs that were recorded by `parity_tests.recorded`."""

    def supports(self, case: Case) -> bool:
        return super().supports(case) and case.id in recorded.load(self.name)

    def run(
        self, case: Case, record: Record, dtype: str = "float64", noted: Iterable[int] | None = None
    ) -> Trajectory:
        """Returns what was recorded, in float64, or raises what the program raised."""
        found = recorded.load(self.name)[case.id]
        if isinstance(found, Exception):
            raise found
        return found if noted is None else found.at(np.array(sorted(set(noted))))


def _never(case: Case, params: Arrays, dtype: str) -> Run:
    raise NotImplementedError("it was recorded")


def _torch(run: str, make: str, **options: Any) -> Start:
    def start(case: Case, params: Arrays, dtype: str) -> Run:
        from parity_tests.drivers import torch_runs as runs

        return getattr(runs, run)(functools.partial(getattr(runs, make), **options), case, params, dtype)

    return start


def _jax(make: str, observe: str = "our_iterates", **options: bool) -> Start:
    def start(case: Case, params: Arrays, dtype: str) -> Run:
        from parity_tests.drivers import jax_runs as runs

        made, seen = getattr(runs, make), getattr(runs, observe)()
        return runs.JaxRun(made, seen, case, params, dtype, **options)

    return start


def _known_to(program: str) -> Callable[[], list[str]]:
    return lambda: [name for name, law in laws.directed().items() if program in law.elsewhere]


def _with_plus() -> list[str]:
    return [*laws.directed(), "plus"]


_PAIR = ("sgd", "adamw")  # what the wrappers' drivers can make of other programs' parts
_KERNELS = ("sgd", "adamw", "radam")  # fused=True raises for a law whose direction is in no kernel
_UPSTREAM = Driver(
    "schedulefree 1.4.1",
    _torch("TorchRun", "upstream"),
    _known_to("schedulefree"),
    lacks=names.UPSTREAM_LACKS,
)
_JAX_WRAPPER = Driver(
    "sfjax wrapper",
    _jax("wrapped", ramped=True),
    _PAIR,
    names.WRAPPERS_LACK,
    # The prior's full lr is what a schedule shows of it.
    apart=("warmup_steps", "prior_steps"),
)
TWINS = [
    Driver("sfjax", _jax("ours"), _with_plus),
    Driver("sfjax traced", _jax("ours", traced=True), laws.directed),
    Driver("sfjax native", _jax("ours", traced=True, native=True), _KERNELS),
    _JAX_WRAPPER,
    replace(_JAX_WRAPPER, name="sfjax wrapper traced", start=_jax("wrapped", ramped=True, traced=True)),
    Driver("sftorch fused", _torch("OurRun", "ours", fused=True), (*_KERNELS, "plus")),
    Driver("sftorch foreach", _torch("OurRun", "ours"), _with_plus),
    Driver("sftorch single", _torch("OurRun", "ours", foreach=False), _with_plus),
    Driver("sftorch closure", _torch("OurClosureRun", "ours", suffix="Closure"), laws.directed),
    Driver("sftorch fused closure", _torch("OurClosureRun", "ours", suffix="Closure", fused=True), _KERNELS),
    Driver("sftorch wrapper", _torch("WrapperRun", "wrapped"), _PAIR, names.WRAPPERS_LACK[:1]),
]
PEERS = [
    _UPSTREAM,
    replace(
        _UPSTREAM, name="schedulefree 1.4.1 closure", start=_torch("ClosureRun", "upstream", suffix="Closure")
    ),
    Driver(
        "optax.contrib 0.2.8",
        _jax("optax_contrib", "optax_iterates"),
        _known_to("optax.contrib"),
        names.OPTAX_LACKS,
    ),
    replace(
        _UPSTREAM,
        name="pytorch_optimizer 4.1.0",
        start=_torch("TorchRun", "pytorch_optimizer"),
        optimizers=_known_to("pytorch_optimizer"),
        lacks=lambda optimizer: tuple(
            name for name in names.UPSTREAM_LACKS if (optimizer, name) != ("adamw", "refined_c")
        ),
    ),
    Recorded(recorded.PLUS, _never, ("plus",), lacks=("f_star",)),
    Recorded(recorded.AMUSE, _never, ("adamw",)),
]
DRIVERS = {driver.name: driver for driver in TWINS + PEERS}
