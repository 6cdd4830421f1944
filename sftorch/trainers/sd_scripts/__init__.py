"""sd-scripts' own scripts with a resume that goes on where the run stopped: `schedulefree launch sd-scripts`.

The scripts stay as they are on disk. `resume.patch`, which is also for upstream, is applied to the text of
their train_network.py as it is loaded; where it does not fit, nothing is trained.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import linecache
import os
import random
import re
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["LaunchError", "launch"]

PATCH = Path(__file__).with_name("resume.patch")
NETWORK = "train_network"
_IMPORT = re.compile(rf"^(import|from) {NETWORK}\b", re.MULTILINE)
# What is replaced in library/train_util.py, with its parameters.
_EXPECTED = {
    "verify_training_args": ["args"],
    "get_optimizer_train_eval_fn": ["optimizer", "args"],
}
_OTHER_VERSION = (
    "this sd-scripts is none of the versions that docs/kohya.md names, and is not run half changed. Take one "
    "of those, a newer schedulefree-twin, or run it without the launcher"
)


class LaunchError(ValueError):
    """A script that the launcher does not run, and what to do instead."""


# In resume.patch, too: a test compares them.
class SeededReads(torch.utils.data.Dataset):
    """Reads every batch with random numbers of its own, which follow from the seed, the epoch and its place.

    So a resumed run reads what a run without a stop reads, with any number of workers.
    """

    def __init__(self, dataset: Any, epoch: Any, seed: int):
        self.dataset, self.epoch, self.seed = dataset, epoch, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # a copy is being made of it
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> Any:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        own = random.Random(f"{self.seed} {self.epoch.value} {index}").getrandbits(32)
        try:
            self.dataset.set_current_epoch(self.epoch.value)
            random.seed(own)
            np.random.seed(own)
            torch.default_generator.manual_seed(own)
            return self.dataset[index]
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


def seed_of_state(folder: str) -> Any:
    """Returns the seed of the run that saved a state, or None if it is not known."""
    path = os.path.join(folder, "train_state.json")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file).get("seed")


class _Hunk(NamedTuple):
    """One place of a patch: lines that must be there, once, and what stands there then."""

    old: list[str]
    new: list[str]

    @property
    def name(self) -> str:
        """The first line that is taken away or stands before what is added."""
        gone = [line for line in self.old if line not in self.new]
        return next(line.strip() for line in gone or self.old if line.strip())


def _hunks(patch: str, file: str) -> list[_Hunk]:
    """Returns the hunks of a unified diff that are about one file."""
    found: list[_Hunk] = []
    inside = False
    for line in patch.splitlines():
        if line.startswith(("diff ", "--- ", "+++ ")):
            inside = line == f"+++ b/{file}"
        elif inside and line.startswith("@@"):
            found.append(_Hunk([], []))
        elif inside:
            found[-1].old.extend([line[1:]] if line[:1] != "+" else [])
            found[-1].new.extend([line[1:]] if line[:1] != "-" else [])
    return found


def patched(text: str, patch: str, file: str) -> str:
    """Returns the text of a file with a unified diff applied, wherever its hunks stand by now.

    Args:
        text: what the file holds.
        patch: a unified diff of one or several files.
        file: the file's name in it.

    Raises:
        ValueError: for each hunk whose lines are not there, or there twice; all of them in one message.

    Example:
        >>> from sftorch.trainers.sd_scripts import patched
        >>> patched("a\\nb\\n", "+++ b/f.py\\n@@ -1,2 +1,2 @@\\n a\\n-b\\n+c\\n", "f.py")
        'a\\nc\\n'
    """
    lines, wrong = text.split("\n"), []
    for hunk in _hunks(patch, file):
        size = len(hunk.old)
        places = [at for at in range(len(lines) - size + 1) if lines[at : at + size] == hunk.old]
        if len(places) == 1:
            lines[places[0] : places[0] + size] = hunk.new
        else:
            wrong.append(f"{len(places)} times {hunk.name!r}")
    if wrong:
        raise ValueError(f"{file} must have the lines of the patch once each, got " + ", ".join(wrong))
    return "\n".join(lines)


def launch(script: str | os.PathLike[str], words: Sequence[str], say: Callable[[str], object]) -> None:
    """Runs a script of sd-scripts in this process, with a resume that goes on where the run stopped.

    Args:
        script: train_network.py, or one that is built on it and lies beside it.
        words: its options.
        say: is called with each sentence about what is changed.

    Raises:
        LaunchError: before anything runs, if the script is another one, or not as `resume.patch` expects it;
            before it trains, if where its state stands is not known.
    """
    path = Path(script)
    network = path.with_name(f"{NETWORK}.py")
    built_on_it = path.is_file() and (path.name == network.name or _IMPORT.search(path.read_text("utf-8")))
    if not built_on_it or not network.is_file():
        raise LaunchError(
            f"script must be {network.name} of sd-scripts, or one that is built on it and lies beside it, "
            f"got {path}: no other counts the steps of a state, so run it as it is"
        )
    sys.path.insert(0, str(path.parent))
    text = _read(network)
    _replace(importlib.import_module("library.train_util"), say)
    module = types.ModuleType("__main__" if path.name == network.name else NETWORK)
    module.__file__ = str(network)
    code = compile(text, f"{network} with {PATCH.name}", "exec")
    linecache.cache[code.co_filename] = len(text), None, text.splitlines(keepends=True), code.co_filename
    say(f"{network} runs with {PATCH}, applied in memory")
    say("the order of the data, and what is drawn as it is read, follow from the seed and the epoch")
    say("a state keeps the seed, and a resume counts updates as updates")
    before, sys.argv = sys.modules["__main__"], [str(path), *words]
    try:
        sys.modules[module.__name__] = sys.modules[NETWORK] = module
        exec(code, vars(module))
    finally:
        sys.modules["__main__"] = before
    if module.__name__ == NETWORK:
        runpy.run_path(str(path), run_name="__main__")


def _read(network: Path) -> str:
    """Returns the text of train_network.py with the patch."""
    try:
        return patched(network.read_text("utf-8"), PATCH.read_text("utf-8"), network.name)
    except ValueError as error:
        raise LaunchError(f"{error}: {_OTHER_VERSION}") from error


def _replace(train_util: Any, say: Callable[[str], object]) -> None:
    """Gives library/train_util.py what the patch has there, and replaces two of its functions."""
    wrong = [name for name, has in _EXPECTED.items() if _parameters(getattr(train_util, name, None)) != has]
    wrong += [name for name in ("SeededReads", "seed_of_state") if hasattr(train_util, name)]
    if wrong:
        shown = ", ".join(f"{name}({', '.join(has)})" for name, has in _EXPECTED.items())
        raise LaunchError(f"library/train_util.py must have {shown}, got others: {_OTHER_VERSION}")
    verify, modes = train_util.verify_training_args, train_util.get_optimizer_train_eval_fn

    @functools.wraps(verify)
    def verify_training_args(args: argparse.Namespace) -> None:
        verify(args)
        _resume(args, say)

    @functools.wraps(modes)
    def get_optimizer_train_eval_fn(optimizer: Any, args: argparse.Namespace) -> Any:
        if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            return optimizer.train, optimizer.eval  # whatever its name ends in
        return modes(optimizer, args)

    train_util.verify_training_args = verify_training_args
    train_util.get_optimizer_train_eval_fn = get_optimizer_train_eval_fn
    train_util.SeededReads, train_util.seed_of_state = SeededReads, seed_of_state


def _parameters(function: Any) -> list[str] | None:
    return list(inspect.signature(function).parameters) if callable(function) else None


def _resume(args: argparse.Namespace, say: Callable[[str], object]) -> None:
    """Lets a resume go on where its state stands.

    Raises:
        LaunchError: if that is not known.
    """
    if not args.resume or args.initial_step is not None or args.initial_epoch is not None:
        return
    path = os.path.join(args.resume, "train_state.json")
    if os.path.isdir(args.resume) and not os.path.exists(path):
        raise LaunchError(
            f"resume must be a state with train_state.json, got {args.resume}: say --initial_step, the "
            "updates that it has done"
        )
    if not args.skip_until_initial_step:
        args.skip_until_initial_step = True
        say("--skip_until_initial_step is added, so that it goes on behind the last batch trained on")
    seed = seed_of_state(args.resume)
    if seed is None:
        say("the state was not saved by this launcher: the order of its data is another one than up to here")
    elif args.seed not in (None, seed):
        say(f"--seed is {args.seed}, and was {seed} before: the order of the data is another one")
