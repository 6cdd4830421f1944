"""One driver an implementation: a case and its recorded gradients in, a trajectory out.

Frameworks and peers are imported when a driver first runs, so that one package can be tested alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from parity_tests import golden
from parity_tests.cases import Case
from parity_tests.drivers import names
from parity_tests.problems import Record
from parity_tests.reference import Arrays
from parity_tests.trajectory import Trajectory, stack


class Run(Protocol):
    """An optimizer in the middle of a run."""

    def update(self, grads: Arrays, lr: float) -> None:
        """Takes one step; lr is the schedule's value, before warm-up."""

    def iterates(self) -> tuple[Arrays, Arrays, Arrays]:
        """Returns x, y and z."""


Start = Callable[[Case, Arrays, str], Run]


@dataclass(frozen=True)
class Driver:
    """An implementation under test.

    Attributes:
        name: as in the conformance matrix.
        start: (case, initial values, "float64" or "float32") -> a run.
        optimizers: those it has.
        lacks: canonical options it does not have.
    """

    name: str
    start: Start
    optimizers: tuple[str, ...] = ("sgd", "adamw", "radam")
    lacks: tuple[str, ...] = ()

    def supports(self, case: Case) -> bool:
        """Tells whether a case can be put to this implementation at all."""
        return case.optimizer in self.optimizers and not any(case.options.get(name) for name in self.lacks)

    def run(self, case: Case, recorded: Record, dtype: str = "float64") -> Trajectory:
        """Returns the trajectory of a case on recorded gradients, every step of it."""
        run = self.start(case, recorded.params, dtype)
        rows = [run.iterates()]
        for step, lr in enumerate(case.lrs):
            run.update(recorded.step(step), lr)
            rows.append(run.iterates())
        return stack(rows)


@functools.cache
def on_golden(driver: str, case: str, dtype: str = "float64") -> Trajectory:
    """Returns a driver's run of a case on its golden gradients, once a session."""
    from parity_tests.cases import CASES

    return DRIVERS[driver].run(CASES[case], golden.load_record(CASES[case].problem), dtype)


def _torch(run: str, make: str, **options: Any) -> Start:
    def start(case: Case, params: Arrays, dtype: str) -> Run:
        from parity_tests.drivers import torch_runs as runs

        return getattr(runs, run)(functools.partial(getattr(runs, make), **options), case, params, dtype)

    return start


def _jax(make: str) -> Start:
    def start(case: Case, params: Arrays, dtype: str) -> Run:
        from parity_tests.drivers import jax_runs as runs

        return runs.JaxRun(getattr(runs, make), case, params, dtype)

    return start


_PAIR = ("sgd", "adamw")
TWINS = [
    Driver("sfjax", _jax("ours")),
    Driver("sfjax wrapper", _jax("wrapped"), _PAIR),
    Driver("sftorch foreach", _torch("OurRun", "ours")),
    Driver("sftorch single", _torch("OurRun", "ours", foreach=False)),
    Driver("sftorch closure", _torch("OurClosureRun", "ours", suffix="Closure")),
    Driver("sftorch wrapper", _torch("WrapperRun", "wrapped"), _PAIR),
]
PEERS = [
    Driver("schedulefree 1.4.1", _torch("TorchRun", "upstream"), lacks=names.UPSTREAM_LACKS),
    Driver("schedulefree 1.4.1 closure", _torch("ClosureRun", "upstream", suffix="Closure"), lacks=names.UPSTREAM_LACKS),
    Driver("optax.contrib 0.2.8", _jax("optax_contrib"), _PAIR, names.OPTAX_LACKS),
    Driver("pytorch_optimizer 4.1.0", _torch("TorchRun", "pytorch_optimizer"), lacks=names.UPSTREAM_LACKS),
]
DRIVERS = {driver.name: driver for driver in TWINS + PEERS}
