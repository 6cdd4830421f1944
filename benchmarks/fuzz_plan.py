"""The plans of fuzz.py: command lines, presets, scripts and arguments, of known words and of garbage."""

from __future__ import annotations

import io
import json
import random
import shlex
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.fuzz import Case, Reading, damage
from sfcore import __main__ as program
from sfcore.exchange import CheckpointError
from sfcore.plan import ConfigError, check, field_states, text

SOURCES: tuple[Any, ...] = ("own", "sd-scripts", "kohya", "hf", None)
ODD: tuple[Callable[[random.Random], Any], ...] = (
    lambda draw: draw.choice([None, True, False, float("nan"), float("inf"), -0.0, 1e308, 1e-320]),
    lambda draw: draw.choice([10**400, -(10**30), 2**63, 10**4000]),
    lambda draw: draw.choice(["", " ", "0x10", "1_000", "١٢", "1e999", "nan", "10%", "--", "=", "\0"]),
    lambda draw: draw.choice(["\ud800", "'", '"', "\\", "$(ls)", "a" * 10_000, "9" * 10_000, "(" * 2000]),
    lambda draw: draw.choice([[], {}, (), [None], {"a": {"b": []}}, {"1": 2}, {"": 1}, [[[]]], b"x", 1j]),
    lambda draw: draw.choice([object(), set(), range(3), lambda: 1, int, NotImplemented, ...]),
    lambda draw: "".join(map(chr, draw.choices(range(1, 0x300), k=draw.randrange(12)))),
    lambda draw: damage(draw, b"warmup_steps=0.1 betas=0.9,0.99").decode("latin-1"),
)
VALUES = [0, 1, 10, 1000, 0.1, 1e-4, "0.01", "100", "1e-4", "constant", "0.9,0.99", "warmup_steps=10", 0.5]


OPTIMIZERS = (
    "AdamW", "AdamWScheduleFree", "sftorch.SGDScheduleFree", "schedulefree.RAdamScheduleFree", "Prodigy",
    "schedule_free_adamw", "Adafactor", "pytorch_optimizer.ScheduleFreeAdamW", "ScheduleFreeWrapper",
)  # fmt: skip
NAMES = (
    *OPTIMIZERS, "constant", "constant_with_warmup", "cosine", "linear", "cosine_with_restarts", "polynomial",
    "inverse_sqrt", "warmup_stable_decay", "adafactor", "piecewise_constant", "CosineAnnealingLR", "cosin",
)  # fmt: skip
WORDS = sorted(
    {name for source in SOURCES for name in field_states({}, source=source)}
    | {"betas", "momentum", "optimizer_args", "optim_args", "additional_parameters", "lr_scheduler_args"}
    | {"lr_scheduler_kwargs", "network_args", "config_file", "full_bf16", "unet_lr", "samples", "devices"}
    | {"prior_steps", "warmup_steps", "r", "weight_lr_power", "batchnorm", "param_dtype", "weights", "lr"}
)


def value(draw: random.Random) -> Any:
    """Returns a value that a field may have, or that nothing should."""
    how = draw.randrange(4)
    return draw.choice(ODD)(draw) if how == 0 else draw.choice(NAMES if how == 1 else VALUES)


def fields(draw: random.Random) -> dict[Any, Any]:
    """Returns a configuration."""
    found: dict[Any, Any] = {draw.choice(WORDS): value(draw) for _ in range(draw.randrange(1, 9))}
    found[draw.choice(["optimizer", "optimizer_type", "optim"])] = draw.choice(NAMES)
    if draw.random() < 0.1:
        found[draw.choice(["1", "", "a.b", "ä", "optimizer ", "--lr", "\n"])] = value(draw)
    if draw.random() < 0.2:
        found = {"section": found, draw.choice(WORDS): value(draw)}
    return found


def a_dict(draw: random.Random, folder: Path) -> Any:
    """Returns arguments as a mapping, whose keys need not be text."""
    found = fields(draw)
    if draw.random() < 0.05:
        inner = found.get("section") if draw.random() < 0.5 else None
        (inner if isinstance(inner, dict) else found)[draw.choice([1, 1.5, None, (), b"lr", True])] = value(
            draw
        )
    return found


def a_command(draw: random.Random, folder: Path) -> Any:
    """Returns a command line, as text or as words."""
    words = ["accelerate", "launch", draw.choice(["train_network.py", "sdxl_train.py", "x", ""])]
    for _ in range(draw.randrange(8)):
        flag, given = f"--{draw.choice(WORDS)}", str(value(draw))
        form = draw.randrange(4)
        words += [flag] if form == 0 else [f"{flag}={given}"] if form == 1 else [flag, given]
    if draw.random() < 0.3:
        return words
    line = draw.choice([shlex.join, " ".join])(words)
    return line if draw.random() < 0.5 else damage(draw, line.encode("utf-8", "replace")).decode("latin-1")


def a_script(draw: random.Random, folder: Path) -> Any:
    """Returns the path of a shell script with a command in it."""
    path = folder / draw.choice(["train.sh", "train.bat", "train.ps1", "train"])
    command = str(a_command(draw, folder)).replace(
        " --", draw.choice([" --", " \\\n  --", " ^\r\n --", "\n--"])
    )
    return _write(draw, path, f"#!/bin/bash\n# a run\nexport A=1\n{command}\n")


def a_preset(draw: random.Random, folder: Path) -> Any:
    """Returns the path of a TOML or JSON file."""
    found = fields(draw)
    as_json = draw.random() < 0.5
    if as_json:
        content = json.dumps(found, default=str)
    else:
        rows = [f"{key} = {json.dumps(given, default=str)}" for key, given in found.items()]
        content = "\n".join(["[training]", *rows] if draw.random() < 0.5 else rows)
    return _write(draw, folder / ("preset.json" if as_json else "preset.toml"), content)


def _write(draw: random.Random, path: Path, text: str) -> Any:
    content = text.encode("utf-8", "replace")
    if draw.random() < 0.5:
        content = damage(draw, content)
    path.write_bytes(content)
    return draw.choice([path, str(path)])


def a_plan(draw: random.Random, folder: Path) -> Reading:
    """Makes one configuration, which is checked, shown, repaired, and asked for its fields' states."""
    config = draw.choice([a_dict, a_dict, a_command, a_script, a_preset])(draw, folder)
    source: Any = draw.choice(SOURCES)
    facts: dict[str, Any] = {}
    if draw.random() < 0.3:
        facts = {draw.choice(WORDS): value(draw)}

    def read() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plan = check(config, source=source, **facts)
                text(plan)
                fixed = check(config, source=source, fix=True, **facts)
                text(fixed)
                field_states(config, source=source)
            if isinstance(config, str | Path):
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    program.main(["plan", "--json", "--", str(config)])
        except ConfigError as error:
            raise CheckpointError(str(error)) from error

    return read


CASES: dict[str, Case] = {"plan": a_plan}
