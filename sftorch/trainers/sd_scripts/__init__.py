"""sd-scripts' own scripts with resumes and files that are right: `schedulefree launch sd-scripts`.

The scripts stay as they are on disk. Those built on train_network.py get a resume that goes on where the run
stopped: `resume.patch`, which is also for upstream, is applied to its text as it is loaded, and where it does
not fit, nothing is trained. Those that never call `optimizer.eval()` get files and samples of x.
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
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sftorch.shipping import ship_x
from sftorch.state.modes import TrainEvalOptimizer

__all__ = ["LaunchError", "launch"]

PATCH = Path(__file__).with_name("resume.patch")
NETWORK = "train_network"
# Scripts that save what state_dict() gives in the middle of training; textual inversion reads parameters.
SHIPPING = (
    "fine_tune",
    "sdxl_train",
    "sdxl_train_control_net",
    "train_control_net",
    "train_controlnet",
    "train_db",
)
_IMPORT = re.compile(rf"^(?:import|from) ({'|'.join((NETWORK, *SHIPPING))})\b", re.MULTILINE)
# What is replaced in library/train_util.py, with its parameters.
_EXPECTED = {
    "verify_training_args": ["args"],
    "get_optimizer": ["args", "trainable_params"],
    "get_optimizer_train_eval_fn": ["optimizer", "args"],
    "sample_image_inference": [
        *("accelerator", "args", "pipeline", "save_dir", "prompt_dict"),
        *("epoch", "steps", "prompt_replacement", "controlnet"),
    ],
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
    """Runs a script of sd-scripts in this process, with resumes and files that are right.

    Args:
        script: train_network.py, one that is built on it and lies beside it, or one of `SHIPPING`.
        words: its options.
        say: is called with each sentence about what is changed.

    Raises:
        LaunchError: before anything runs, if the script is another one, or not as it is expected here; before
            it trains, if where its state stands is not known, or the optimizer cannot do it.
    """
    path = Path(script)
    base = _base(path)
    sys.path.insert(0, str(path.parent.absolute()))
    text = _read(path.with_name(f"{NETWORK}.py")) if base == NETWORK else ""
    train_util = importlib.import_module("library.train_util")
    _check(train_util)
    sys.argv = [str(path), *words]
    with ExitStack() as replaced:
        if base == NETWORK:
            _resume_right(train_util, replaced, say)
            _run_network(path, text, say)
        else:
            say(f"{path} never calls optimizer.eval(): what it saves and draws is x now")
            _ship_x(train_util, replaced, say)
        if path.stem != NETWORK:
            runpy.run_path(str(path), run_name="__main__")


def _base(path: Path) -> str:
    """Returns the name of the script of sd-scripts that a script is, or is built on."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    names = [path.stem, *_IMPORT.findall(text)]
    base = next((name for name in names if name in (NETWORK, *SHIPPING)), "")
    if not text or not path.with_name(f"{base}.py").is_file():
        shown = ".py, ".join((NETWORK, *SHIPPING))
        raise LaunchError(
            f"script must be one of sd-scripts' {shown}.py, or built on one that lies beside it, got {path}: "
            "run it as it is"
        )
    return base


def _read(network: Path) -> str:
    """Returns the text of train_network.py with the patch."""
    try:
        return patched(network.read_text("utf-8"), PATCH.read_text("utf-8"), network.name)
    except ValueError as error:
        raise LaunchError(f"{error}: {_OTHER_VERSION}") from error


def _check(train_util: Any) -> None:
    """Raises unless library/train_util.py has what is replaced, and not what is added."""
    wrong = [name for name, has in _EXPECTED.items() if _parameters(getattr(train_util, name, None)) != has]
    wrong += [name for name in ("SeededReads", "seed_of_state") if hasattr(train_util, name)]
    if wrong:
        raise LaunchError(
            f"library/train_util.py must be as it is known here, got other {', '.join(wrong)}: "
            f"{_OTHER_VERSION}"
        )


def _replace(replaced: ExitStack, owner: Any, **new: Any) -> None:
    """Gives a module or class other attributes until the stack is closed."""
    for name, value in new.items():
        if hasattr(owner, name):
            replaced.callback(setattr, owner, name, getattr(owner, name))
        else:
            replaced.callback(delattr, owner, name)
        setattr(owner, name, value)


def _run_network(path: Path, text: str, say: Callable[[str], object]) -> None:
    """Runs the patched train_network.py, as the program or as the module that the program imports."""
    network = path.with_name(f"{NETWORK}.py")
    module = types.ModuleType("__main__" if path == network else NETWORK)
    module.__file__ = str(network)
    code = compile(text, f"{network} with {PATCH.name}", "exec")
    linecache.cache[code.co_filename] = len(text), None, text.splitlines(keepends=True), code.co_filename
    say(f"{network} runs with {PATCH}, applied in memory")
    say("the order of the data, and what is drawn as it is read, follow from the seed and the epoch")
    say("a state keeps the seed, and a resume counts updates as updates")
    before = sys.modules["__main__"]
    try:
        sys.modules[module.__name__] = sys.modules[NETWORK] = module
        exec(code, vars(module))
    finally:
        sys.modules["__main__"] = before


def _resume_right(train_util: Any, replaced: ExitStack, say: Callable[[str], object]) -> None:
    """Gives library/train_util.py what the patch has there, and a look at the options and the optimizer."""
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

    _replace(
        replaced,
        train_util,
        verify_training_args=verify_training_args,
        get_optimizer_train_eval_fn=get_optimizer_train_eval_fn,
        SeededReads=SeededReads,
        seed_of_state=seed_of_state,
    )


def _ship_x(train_util: Any, replaced: ExitStack, say: Callable[[str], object]) -> None:
    """Lets `state_dict()` of every prepared model give x, and draws samples at x."""
    from accelerate import Accelerator

    verify, build = train_util.verify_training_args, train_util.get_optimizer
    draw, prepare = train_util.sample_image_inference, Accelerator.prepare
    optimizers: list[TrainEvalOptimizer] = []

    @functools.wraps(verify)
    def verify_training_args(args: argparse.Namespace) -> None:
        verify(args)
        if args.resume:
            say("the script counts steps from 0 after a resume: set --max_train_steps to those that are left")

    @functools.wraps(build)
    def get_optimizer(args: argparse.Namespace, trainable_params: Any) -> Any:
        found = build(args, trainable_params)
        if isinstance(found[2], TrainEvalOptimizer):
            optimizers.append(found[2])
        elif callable(getattr(found[2], "eval", None)):
            raise LaunchError(
                f"optimizer_type must be one of sftorch's, got {found[0]}, whose x only its eval() gives: "
                "write sftorch.AdamWScheduleFree, or take a script that calls it"
            )
        return found

    @functools.wraps(prepare)
    def prepare_and_ship(self: Any, *args: Any, **kwargs: Any) -> Any:
        for model in (one for one in args if isinstance(one, torch.nn.Module)):
            for optimizer in optimizers:
                held = {p for group in optimizer.param_groups for p in group["params"]}
                if not held.isdisjoint(model.parameters()):
                    replaced.callback(ship_x(model, optimizer).remove)
        return prepare(self, *args, **kwargs)

    @functools.wraps(draw)
    def sample_image_inference(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as at_x:
            for optimizer in optimizers:
                at_x.enter_context(optimizer.evaluation())
            return draw(*args, **kwargs)

    _replace(
        replaced,
        train_util,
        verify_training_args=verify_training_args,
        get_optimizer=get_optimizer,
        sample_image_inference=sample_image_inference,
    )
    _replace(replaced, Accelerator, prepare=prepare_and_ship)


def _parameters(function: Any) -> list[str] | None:
    return list(inspect.signature(function).parameters) if callable(function) else None


def _resume(args: argparse.Namespace, say: Callable[[str], object]) -> None:
    """Lets a resume go on where its state stands.

    Raises:
        LaunchError: if that is not known.
    """
    if not args.resume:
        return
    is_said = args.initial_step is not None or args.initial_epoch is not None
    is_here = os.path.isdir(args.resume)  # or on Hugging Face
    if is_here and not is_said and not os.path.exists(os.path.join(args.resume, "train_state.json")):
        raise LaunchError(
            f"resume must be a state with train_state.json, got {args.resume}: say --initial_step, the "
            "updates that it has done"
        )
    if not args.skip_until_initial_step:
        args.skip_until_initial_step = True
        say("--skip_until_initial_step is added, so that it goes on behind the last batch trained on")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        say("a state has the random numbers of the first process alone: the others draw other noise now")
    seed = seed_of_state(args.resume)
    if not is_here:
        say(f"--resume is no folder here: the order is the same if --seed is that of {args.resume}")
    elif seed is None:
        say("the state was not saved by this launcher: the order of its data is another one than up to here")
    elif args.seed not in (None, seed):
        say(f"--seed is {args.seed}, and was {seed} before: the order of the data is another one")
