"""The program: `accelerate launch -m sftorch.trainers.sd_scripts SCRIPT OPTIONS`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from sftorch.trainers.sd_scripts import LaunchError, launch

UNUSABLE = 2
_MODULE = "-m sftorch.trainers.sd_scripts"


def main(words: Sequence[str]) -> int:
    """Runs a script with its options; returns the exit code."""
    words = [*words]
    at = next((place for place, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        return _cannot(
            "SCRIPT must be given, got no word that ends in .py: write train_network.py, and its options"
        )
    if before := [word for word in words[:at] if word != "--"]:
        command = f"{shlex.join(before)} {_MODULE} {shlex.join(words[at:])}"
        return _cannot(f"SCRIPT must come first, got {shlex.join(before)} before it: write\n  {command}")
    try:
        launch(words[at], words[at + 1 :], say)
    except LaunchError as error:
        return _cannot(str(error))
    return 0


def say(text: str) -> None:
    """Prints a sentence about what the launcher does."""
    print(f"schedulefree launch: {text}", file=sys.stderr, flush=True)


def _cannot(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return UNUSABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
