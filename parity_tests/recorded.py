"""Runs of programs that no package index has: `python -m parity_tests.recorded CHECKOUT` records them.

recorded/PROGRAM.npz    CASE/steps, CASE/x, CASE/y, CASE/z as in a golden file; raised: case -> exception

The golden gradients of each case, in float64, with what the program is told beside them.
"""

from __future__ import annotations

import builtins
import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from parity_tests import golden
from parity_tests.cases import CASES, Case
from parity_tests.reference import Arrays
from parity_tests.trajectory import SEQUENCES, Trajectory, stack

FOLDER = Path(__file__).parent / "recorded"
# facebookresearch/schedule_free, of whose main branch only what is in version 1.4.1 has been released.
PLUS = "facebookresearch/schedule_free 70785b5"


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


def plus(make: Any, case: Case) -> Trajectory:
    """Returns a case of ScheduleFree+ as the class of a checkout runs it.

    Args:
        make: AdamCScheduleFreePlusPaper.
        case: without f_star, which it has not.
    """
    import torch

    from parity_tests.drivers import names

    record, steps = golden.load_record(case.problem), golden.load(case.id).steps.tolist()
    params = {k: torch.nn.Parameter(torch.tensor(p)) for k, p in record.params.items()}
    options = {k: v for k, v in names.for_torch("plus", case.options).items() if k != "f_star"}
    optimizer = make(list(params.values()), **options)
    optimizer.train()
    held = {k: p.detach() for k, p in params.items()}
    rows = {0: _copied(held, held, held)}
    for step, lr in enumerate(case.lrs):
        grads, told = case.told(record.step(step), step)
        for k, p in params.items():
            p.grad = torch.tensor(grads[k])
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step_func(told["loss"])
        if step + 1 in steps:
            states = {k: optimizer.state[p] for k, p in params.items()}
            rows[step + 1] = _copied(*({k: s[name] for k, s in states.items()} for name in SEQUENCES))
    return stack(rows)


def _copied(*sequences: Any) -> tuple[Arrays, Arrays, Arrays]:
    x, y, z = ({k: p.numpy().copy() for k, p in s.items()} for s in sequences)
    return x, y, z


def write(checkout: Path) -> None:
    """Records every case of ScheduleFree+ that a checkout's class has the options for."""
    path = checkout / "schedulefree" / "adamc_schedulefree_plus_paper.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arrays: dict[str, np.ndarray] = {}
    raised = {}
    for case in CASES.values():
        if case.optimizer != "plus" or case.options["f_star"]:
            continue
        try:
            found = plus(module.AdamCScheduleFreePlusPaper, case)
        except ArithmeticError as error:
            raised[case.id] = type(error).__name__
            continue
        about = {"steps": found.steps} | {
            s: golden.flatten(found.sequence(s), len(found.steps)) for s in SEQUENCES
        }
        arrays |= {f"{case.id}/{name}": array for name, array in about.items()}
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(_file(PLUS), allow_pickle=False, raised=np.array(json.dumps(raised)), **arrays)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
