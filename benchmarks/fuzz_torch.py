"""The torch half of fuzz.py: files of torch.save, state that is imported, checkpoints that are restored."""

from __future__ import annotations

import copy
import logging
import random
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_optimizer
import schedulefree
import torch
from torch import nn

import sftorch
from benchmarks import fuzz
from benchmarks.fuzz import Case, Reading, damage
from sfcore import inspection, sources, store
from sfcore.exchange import CheckpointError, fingerprint
from sftorch.checkpoint import Checkpoints, import_state_dict

PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "sftorch sgd": lambda p: sftorch.SGDScheduleFree(p, lr=0.1),
    "sftorch adamw": lambda p: sftorch.AdamWScheduleFree(p, lr=0.1, inner_momentum=0.5),
    "sftorch radam": lambda p: sftorch.RAdamScheduleFree(p, lr=0.1),
    "sftorch lean": lambda p: sftorch.AdamWScheduleFree(p, lr=0.1, precision="lean"),
    "sftorch wrapper": lambda p: sftorch.ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.1, momentum=0.5)),
    "schedulefree sgd": lambda p: schedulefree.SGDScheduleFree(p, lr=0.1),
    "schedulefree adamw": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.1),
    "schedulefree radam": lambda p: schedulefree.RAdamScheduleFree(p, lr=0.1),
    "schedulefree wrapper": lambda p: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.1)),
    "pytorch_optimizer sgd": lambda p: pytorch_optimizer.ScheduleFreeSGD(p, lr=0.1),
    "pytorch_optimizer adamw": lambda p: pytorch_optimizer.ScheduleFreeAdamW(p, lr=0.1),
    "pytorch_optimizer radam": lambda p: pytorch_optimizer.ScheduleFreeRAdam(p, lr=0.1),
    "pytorch_optimizer wrapper": lambda p: pytorch_optimizer.ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.1)),
    "torch adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "torch adam": lambda p: torch.optim.Adam(p, lr=0.1),
}
OURS = tuple(name for name in PROGRAMS if name.startswith("sftorch"))
STEPS = 3  # of the run whose checkpoints are restored


def trained(name: str, seed: int, steps: int = 2) -> tuple[nn.Module, Any]:
    """Returns a small network and its optimizer after some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    if name == "sftorch lean":
        model.bfloat16()
    optimizer = PROGRAMS[name](list(model.parameters()))
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: Any) -> None:
    """Takes a step on random data."""
    optimizer.zero_grad()
    like = next(model.parameters())
    model(torch.rand(4, 3, dtype=torch.float32).to(like.dtype)).float().square().mean().backward()
    optimizer.step()


def digest(model: nn.Module, optimizer: Any) -> str:
    """Returns a SHA-256 of everything that the next step depends on."""
    arrays = {"rng": torch.get_rng_state().numpy()}
    arrays |= {f"model/{name}": bits(value) for name, value in model.state_dict(keep_vars=True).items()}
    for name, value in leaves(optimizer.state_dict()):
        arrays[f"optimizer/{name}"] = (
            bits(value) if isinstance(value, torch.Tensor) else np.array(repr(value))
        )
    return fingerprint(
        {name: array if array.dtype.kind in "biuf" else _text(array) for name, array in arrays.items()}
    )


def bits(tensor: torch.Tensor) -> np.ndarray:
    """Returns a tensor as an array of the same bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _text(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(str(array).encode(), np.uint8)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields what is in nested dicts and lists."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}/{index}")
    else:
        yield path, value


def make(folder: Path) -> None:
    """Writes the state of every program, and a run of checkpoints."""
    for name in PROGRAMS:
        model, optimizer = trained(name, 0)
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(content, folder / f"{name}.pt")
    for name in OURS:
        run = folder / f"run {name}"
        with Checkpoints(run, keep_newest=STEPS, background=False) as checkpoints:
            model, optimizer = trained(name, 0, steps=0)
            for done in range(1, STEPS + 1):
                step(model, optimizer)
                place = (2, 1) if done == STEPS else (1, 0)
                checkpoints.save(model, optimizer, accumulation=place, extra={"mine": torch.ones(2)})


def quiet() -> None:
    """Takes one core, and says nothing."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()


_made: list[Path] = []


def warm(folder: Path) -> None:
    """Notes where `make` has written, and does what a first step and a first restore do once."""
    quiet()
    _made[:] = [folder]
    for name in OURS:
        expected(name)
    for name in PROGRAMS:
        written(name)


@cache
def written(name: str) -> dict[str, Any]:
    """Returns what a program's state was."""
    content: dict[str, Any] = torch.load(_made[0] / f"{name}.pt", weights_only=False)
    return content


@cache
def expected(name: str) -> dict[int, str]:
    """Returns step -> digest after an undisturbed restore."""
    found = {}
    for number in range(1, STEPS + 1):
        model, optimizer = trained(name, 1)
        Checkpoints(_made[0] / f"run {name}").restore(model, optimizer, resume=number)
        found[number] = digest(model, optimizer)
    return found


def _saved(draw: random.Random, content: dict[str, Any], path: Path) -> bool:
    """Saves all or a part of a state in one of torch's formats; returns whether it is the zip."""
    what = draw.choice(["both", "both", "optimizer", "model"])
    is_zip = draw.random() < 0.7
    torch.save(content if what == "both" else content[what], path, _use_new_zipfile_serialization=is_zip)
    return is_zip


def a_file(draw: random.Random, folder: Path) -> Reading:
    """Damages bytes of a file of torch.save. The numbers of a zip have a checksum."""
    path = folder / "state.pt"
    is_zip = _saved(draw, written(draw.choice(tuple(PROGRAMS))), path)
    whole = sources.load(path)
    path.write_bytes(damage(draw, path.read_bytes()))

    def read() -> bool | None:
        inspection.inspect(path)
        found = sources.load(path)
        if not is_zip:
            return None
        same = (found.meta, found.what, found.holds) == (whole.meta, whole.what, whole.holds)
        return same and all(
            fuzz.same(getattr(found, of) or {}, getattr(whole, of) or {}) for of in ("state", "weights")
        )

    return read


ODD: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: float("nan"), lambda: float("inf"), lambda: -1, lambda: 2**70, lambda: 0,
    lambda: "x", lambda: "", list, dict, lambda: (1, 2), lambda: [[0]], lambda: {"a": 1},
    lambda: True, lambda: b"bytes", lambda: 1j, lambda: torch.zeros(0), lambda: torch.zeros(7),
    lambda: torch.full((), float("nan")), lambda: torch.zeros(2, 3, dtype=torch.int32),
    lambda: torch.zeros(2, 3, dtype=torch.complex64), lambda: torch.zeros(2, 3, device="meta"),
    lambda: torch.zeros(2, 3).to_sparse(), lambda: torch.zeros(2, dtype=torch.bool),
    lambda: torch.quantize_per_tensor(torch.zeros(2, 3), 1.0, 0, torch.qint8),
    lambda: torch.zeros(1).expand(2, 3), lambda: torch.tensor(3), lambda: torch.full((2, 3), float("nan")),
)  # fmt: skip


def disorder(draw: random.Random, content: Any) -> Any:
    """Returns nested state with something missing, more, or odd."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = [place for place in _containers(content) if place]
        if not places:
            break
        place = draw.choice(places)
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key, how = draw.choice(keys), draw.randrange(5)
        if how == 0:
            del place[key]
        elif how == 1 and isinstance(place, dict):
            place[draw.choice([7, "z", "y", "x", "gap", "step", "odd", (0, 1)])] = place.pop(key)
        elif how == 2:
            other = draw.choice(places)
            place[key] = draw.choice(list(other.values()) if isinstance(other, dict) else other)
        elif how == 3 and isinstance(place, list):
            place.append(place[key])
        else:
            place[key] = draw.choice(ODD)()
    return content


def _containers(value: Any, depth: int = 0) -> Iterator[Any]:
    if depth > 8 or not isinstance(value, dict | list):
        return
    yield value
    for item in list(value.values()) if isinstance(value, dict) else value:
        yield from _containers(item, depth + 1)


def an_import(draw: random.Random, folder: Path) -> Reading:
    """Saves state in disorder, which is inspected, and imported into an optimizer that may be another."""
    name = draw.choice(tuple(PROGRAMS))
    content = disorder(draw, written(name))
    live = draw.choice([one for one in OURS if one.split()[1] == name.split()[1]] * 3 + list(OURS))
    model, optimizer = trained(live, 1, draw.choice([0, 2]))
    before = digest(model, optimizer)
    path = folder / "state.pt"
    torch.save(content, path)
    holds = draw.choice([None, None, "x", "y"])
    state = content.get("optimizer")
    refusal = ValueError if isinstance(state, Mapping) else TypeError  # as is promised

    def read() -> bool:
        with suppress(CheckpointError):
            inspection.inspect(path)
        try:
            import_state_dict(optimizer, state, weights_hold=holds)
        except refusal as error:
            if digest(model, optimizer) != before:
                return False
            raise refused(error) from error
        clocks = [
            {k: s[k] for k in ("step", "lr_max", "weight_sum")} for s in optimizer.state.values() if "z" in s
        ]
        if not all(np.isfinite(float(value)) and value >= 0 for clock in clocks for value in clock.values()):
            raise AssertionError(f"the import took the clocks {clocks}")
        optimizer.rebase()
        if live != "sftorch wrapper":  # whose base alone knows its state
            step(model, optimizer)
        return True

    return read


def refused(error: Exception) -> CheckpointError:
    """Returns a refusal for an error that our code has raised, and raises any other again."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    if "sftorch" not in last and "sfcore" not in last:
        raise error
    return CheckpointError(str(error))


def a_restore(draw: random.Random, folder: Path) -> Reading:
    """Restores from a folder of checkpoints with damage in it."""
    name = draw.choice(OURS)
    run = folder / "run"
    shutil.copytree(_made[0] / f"run {name}", run)
    newest = store.newest(run)
    weights = [f"weights:{newest / store.INFERENCE}", f"weights:{newest}"]
    resume: Any = draw.choice(["auto", "auto", "latest-good", 1, newest, *weights])
    right: dict[Any, set[str]] = {step: {found} for step, found in expected(name).items()}
    if resume in weights:
        # A file that is read alone may become, whole, that of another step: then it is what it says.
        sources = store.steps(run).values() if resume == weights[0] else [newest]
        right = {None: {_started(run, name, path / store.INFERENCE) for path in sources}}
    fuzz.rummage(draw, run)
    model, optimizer = trained(name, 1)
    before = digest(model, optimizer)

    def read() -> bool:
        try:
            found = Checkpoints(run).restore(model, optimizer, resume=resume)
        except CheckpointError:
            if digest(model, optimizer) != before:
                return False
            raise
        if found is None:
            return digest(model, optimizer) == before
        return digest(model, optimizer) in right[found.meta.step if found.meta else None]

    return read


def _started(run: Path, name: str, weights: Path) -> str:
    """Returns the digest after a start from weights."""
    model, optimizer = trained(name, 1)
    Checkpoints(run).restore(model, optimizer, resume=f"weights:{weights}")
    return digest(model, optimizer)


CASES: dict[str, Case] = {"torch": a_file, "import": an_import, "restore torch": a_restore}
