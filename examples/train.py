"""Trains one small network on handwritten digits, Schedule-Free, in JAX and in PyTorch, and compares.

    python examples/train.py
    python examples/train.py --framework jax --optimizer sgd --accumulate 4 --out out/sgd
    python examples/train.py --save-every 50 --resume auto    # stop it at any time, and start it again

Both frameworks get the same first weights and the same batches. train_jax.py and train_torch.py show
how each is used; this file holds the command line. Writes OUT/result.json and OUT/curves.png.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sfcore.checks import find_problems, nearest
from sfcore.exchange import CheckpointError
from sfcore.hyperparameters import SGD, AdamW, RAdam

KINDS = {"sgd": SGD, "adamw": AdamW, "radam": RAdam}
LEARNING_RATES = {"sgd": 1.0, "adamw": 0.01, "radam": 0.01}
FRAMEWORKS = ("jax", "torch")
NAMES = {name: f"--{name.replace('_', '-')}" for name in ("lr", "beta", "weight_decay", "warmup_steps")}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command line and returns what it wrote to result.json."""
    parser = make_parser()
    arguments = parse(parser, argv)
    frameworks = FRAMEWORKS if arguments.framework == "both" else (arguments.framework,)
    backends = {framework: load_backend(parser, framework) for framework in frameworks}

    # After the backends, so that --help is quick and a missing package is named with what to install.
    import _digits
    import _report
    import _resume

    digits = _digits.load()
    settings = _digits.Settings(
        **{field.name: getattr(arguments, field.name) for field in fields(_digits.Settings)}
    )
    plan = _resume.Plan(
        arguments.out / "checkpoints", arguments.save_every, arguments.resume, arguments.kill_at
    )
    runs: dict[str, _report.Run] = {}
    for framework, backend in backends.items():
        start = time.perf_counter()
        try:
            points = list(backend.train(settings, digits, plan))
        except CheckpointError as error:
            parser.exit(1, f"error: {error}\n")
        seconds = time.perf_counter() - start
        runs[framework] = _report.Run(points, seconds, plan.resumed[framework], plan.digests[framework])

    result = _report.summarize(settings, runs)
    _report.show(result)
    _report.write(result, arguments.out)
    return result


def whole(text: str) -> int:
    """Reads a whole number; argparse shows the message."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def number(text: str) -> float:
    """Reads a number; argparse shows the message."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def resume(text: str) -> str:
    """Reads --resume; argparse shows the message."""
    if text in ("none", "auto", "latest-good") or text.removeprefix("weights:") not in (text, ""):
        return text
    raise argparse.ArgumentTypeError(f"must be none, auto, latest-good or weights:PATH, got {text!r}")


OPTIONS: tuple[tuple[str, Callable[[str], float], float | None, str], ...] = (
    ("--lr", number, None, "step size; default: 1 for sgd, 0.01 for adamw and radam"),
    ("--beta", number, 0.9, "interpolation of y between z and x; default: 0.9"),
    ("--weight-decay", number, 0.0, "decoupled decay, taken at y; default: 0"),
    ("--warmup-steps", number, None, "default: a twentieth of the steps; radam has none"),
    ("--clip", number, 1.0, "largest global norm of the gradient; default: 1"),
    ("--steps", whole, 1500, "optimizer steps; default: 1500"),
    ("--batch-size", whole, 64, "images an optimizer step; default: 64"),
    ("--accumulate", whole, 1, "cut each batch into N micro-batches; default: 1"),
    ("--seed", whole, 0, "of the first weights and the batches; default: 0"),
    ("--every", whole, None, "steps between evaluations; default: a thirtieth of the steps"),
    ("--save-every", whole, None, "steps between checkpoints; default: none are saved"),
    ("--kill-at", whole, None, "the run kills itself after this step, to show that it resumes"),
)


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line; a default of None depends on other arguments and is set in `parse`."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=(__doc__ or "").split("\n")[0],
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=100),
    )
    add = parser.add_argument
    add("--framework", choices=(*FRAMEWORKS, "both"), default="both", help="default: both")
    add("--optimizer", choices=tuple(KINDS), default="adamw", help="default: adamw")
    add("--out", type=Path, default=Path("out/digits"), metavar="DIR", help="default: out/digits")
    text = "none (default), auto, latest-good, or weights:PATH for weights without optimizer state"
    add("--resume", type=resume, default="none", metavar="HOW", help=text)
    for option, kind, default, text in OPTIONS:
        add(option, type=kind, default=default, metavar="N" if kind is whole else "X", help=text)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments with every default filled in, or exits with every problem at once."""
    arguments, unknown = parser.parse_known_args(argv)
    for word in unknown:
        close = nearest(word.split("=")[0], parser._option_string_actions)
        parser.error(f"unknown argument {word}: " + (f"did you mean {close}?" if close else "see --help"))
    if arguments.lr is None:
        arguments.lr = LEARNING_RATES[arguments.optimizer]
    if arguments.warmup_steps is None:
        arguments.warmup_steps = 0 if arguments.optimizer == "radam" else max(arguments.steps, 0) // 20
    if arguments.every is None:
        arguments.every = max(1, arguments.steps // 30)
    problems = find_argument_problems(arguments)
    if not problems:
        arguments.warmup_steps = int(arguments.warmup_steps)
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problems.append(f"--out must be a folder that can be made, got {arguments.out}: {error.strerror}")
    if problems:
        parser.error("\n  ".join(problems))
    return arguments


def find_argument_problems(arguments: argparse.Namespace) -> list[str]:
    """Returns one sentence for each value that breaks a rule."""
    problems = find_problems(KINDS[arguments.optimizer], vars(arguments), NAMES)
    if arguments.optimizer == "radam" and arguments.warmup_steps != 0:
        problems.append(
            f"--warmup-steps must be 0 with radam, got {arguments.warmup_steps:g}: "
            "its rectification takes the place of a warm-up"
        )
    if not 0 < arguments.clip < float("inf"):
        problems.append(f"--clip must be a finite number > 0, got {arguments.clip}: 1 is the usual value")
    for name in ("steps", "batch_size", "accumulate", "every", "save_every", "kill_at"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            option = f"--{name.replace('_', '-')}"
            problems.append(f"{option} must be a whole number >= 1, got {value}: pass 1 or more")
    if arguments.seed < 0:
        problems.append(f"--seed must be a whole number >= 0, got {arguments.seed}: NumPy takes no other")
    if (
        arguments.batch_size >= 1
        and arguments.accumulate >= 1
        and arguments.batch_size % arguments.accumulate
    ):
        problems.append(
            f"--accumulate must divide --batch-size {arguments.batch_size}, got {arguments.accumulate}: "
            "each batch is cut into that many equal parts"
        )
    return problems


def load_backend(parser: argparse.ArgumentParser, framework: str) -> Any:
    """Returns train_jax or train_torch, or exits with what to install."""
    try:
        return importlib.import_module(f"train_{framework}")
    except ModuleNotFoundError as error:
        parser.error(
            f"--framework {framework} needs {error.name}, which is not installed: pip install -e '.[all]'"
        )


if __name__ == "__main__":
    main()
