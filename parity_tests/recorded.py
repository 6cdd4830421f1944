"""Runs of programs that no package index has: `python -m parity_tests.recorded CHECKOUT` records them.

recorded/PROGRAM.npz    CASE/steps, CASE/x, CASE/y, CASE/z as in a golden file; raised: case -> exception

The golden gradients of each case, in float64, with what the program is told beside them.
"""

from __future__ import annotations

import builtins
import functools
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from parity_tests import golden
from parity_tests.cases import CASES, Case
from parity_tests.trajectory import SEQUENCES, Trajectory, stack

FOLDER = Path(__file__).parent / "recorded"
# Of the first, only what is in schedulefree 1.4.1 has been released; the second is a program of a paper.
PLUS = "facebookresearch/schedule_free 70785b5"
AMUSE = "kjeiun/amuse 4c6383f"


@functools.cache
def load(program: str) -> dict[str, Trajectory | Exception]:
    """Returns case -> what a program made of it."""
    with np.load(_file(program)) as file:
        raised = {
            id: getattr(builtins, kind)(program) for id, kind in json.loads(str(file["raised"])).items()
        }
        ids = {name.split("/")[0] for name in file.files} - {"raised"}
        return raised | {
            id: golden.unpack({name: file[f"{id}/{name}"] for name in ("steps", *SEQUENCES)}) for id in ids
        }


def _file(program: str) -> Path:
    return FOLDER / f"{program.replace('/', '-').replace(' ', '-')}.npz"


def _plus(module: Any, case: Case, params: list[Any]) -> tuple[Any, Any]:
    """Returns upstream's ScheduleFree+, which has no f_star, and its step by (lr, loss)."""
    from parity_tests.drivers import names

    options = {k: v for k, v in names.for_torch("plus", case.options).items() if k != "f_star"}
    optimizer = module.AdamCScheduleFreePlusPaper(params, **options)

    def step(lr: float, loss: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step_func(loss)

    return optimizer, step


def _amuse(module: Any, case: Case, params: list[Any]) -> tuple[Any, Any]:
    """Returns the authors' AMUSE along AdamW's direction, whose warm-up holds beta, and its step."""
    o = case.options
    group = {"params": params, "lr": o["lr"], "beta2": o["b2"], "eps": o["eps"]}
    weights = {"weight_lr_power": o["weight_lr_power"], "r": o["r"], "rho": o["rho"]}
    optimizer = module.AMUSE([group], beta1=o["beta"], warmup_steps=o["warmup_steps"], **weights)
    return optimizer, lambda lr, loss: optimizer.step()


def _run(make: Any, module: Any, case: Case) -> Trajectory:
    """Returns a case as a class of a checkout runs it, at the steps of its golden file."""
    import torch

    record, steps = golden.load_record(case.problem), golden.load(case.id).steps.tolist()
    params = {k: torch.nn.Parameter(torch.tensor(p)) for k, p in record.params.items()}
    optimizer, step = make(module, case, list(params.values()))
    optimizer.train()
    rows = {0: (dict(record.params),) * 3}
    for number, lr in enumerate(case.lrs):
        grads, told = case.told(record.step(number), number)
        for k, p in params.items():
            p.grad = torch.tensor(grads[k])
        step(lr, told.get("loss", 0.0))
        if number + 1 in steps:
            y = {k: p.detach().numpy().copy() for k, p in params.items()}
            optimizer.eval()
            x = {k: p.detach().numpy().copy() for k, p in params.items()}
            optimizer.train()
            for k, p in params.items():  # to the last bit
                p.detach().copy_(torch.tensor(y[k]))
            rows[number + 1] = x, y, {k: optimizer.state[p]["z"].numpy().copy() for k, p in params.items()}
    return stack(rows)


# Program -> its file in a checkout, how a case is run, and the cases that it has the options for.
PROGRAMS: dict[str, tuple[str, Any, Callable[[Case], bool]]] = {
    PLUS: (
        "schedulefree/adamc_schedulefree_plus_paper.py",
        _plus,
        lambda case: case.optimizer == "plus" and not case.options["f_star"],
    ),
    AMUSE: ("src/optim/AMUSE.py", _amuse, lambda case: case.id == "adamw-warmup-amuse"),
}


def write(checkout: Path) -> None:
    """Records every case of the program of which this is a checkout.

    Raises:
        FileNotFoundError: if it is of none of them.
    """
    found = [name for name, (file, *_) in PROGRAMS.items() if (checkout / file).is_file()]
    if not found:
        raise FileNotFoundError(f"{checkout} must be a checkout of {' or of '.join(PROGRAMS)}")
    file, make, has = PROGRAMS[found[0]]
    module = types.ModuleType(found[0])
    exec(compile((checkout / file).read_text(), file, "exec"), module.__dict__)
    arrays: dict[str, np.ndarray] = {}
    raised = {}
    for case in filter(has, CASES.values()):
        try:
            run = _run(make, module, case)
        except ArithmeticError as error:
            raised[case.id] = type(error).__name__
            continue
        arrays[f"{case.id}/steps"] = run.steps
        arrays |= {f"{case.id}/{s}": golden.flatten(run.sequence(s), len(run.steps)) for s in SEQUENCES}
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(_file(found[0]), allow_pickle=False, raised=np.array(json.dumps(raised)), **arrays)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
