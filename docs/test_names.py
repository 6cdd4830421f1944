"""Every dotted name that README and docs write is there after the plain import of its package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sfjax
import sfjax.checkpoint
import sftorch
import sftorch.checkpoint

DOCS = Path(__file__).parent
TEXTS = (DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
NAME = re.compile(r"(?<![\w/.])(?:sfcore|sfjax|sftorch)(?:\.[A-Za-z]\w*)+")
# Addresses; and what mkdocstrings is told, which knows modules whose name a function has taken.
NO_NAMES = re.compile(r"\]\([^)]*\)|^::: .*$|^  *members: .*$", re.MULTILINE)
METHOD = re.compile(r"(?<![\w.])(optimizer|checkpoints)\.(\w+)\(")
OWNERS = {
    "optimizer": (sftorch.AdamWScheduleFree, sfjax.Accumulation),
    "checkpoints": (sftorch.checkpoint.Checkpoints, sfjax.checkpoint.Checkpoints),
}

# Each line of the input has names for a process of their own, which knows the plain import and nothing else.
PROGRAM = """
import functools, importlib, os, sys, warnings
package = sys.argv[1]
root = importlib.import_module(package)
warnings.simplefilter("ignore")  # JAX's about forks: the child computes nothing
for line in sys.stdin.read().splitlines():
    if os.fork():
        os.wait()
        continue
    for name in line.split():
        try:
            functools.reduce(getattr, name.split(".")[1:], root)
        except Exception as error:
            print(f"{name}: {error}", flush=True)
    os._exit(0)
"""


def written(pattern: re.Pattern[str]) -> set:
    return {found for path in TEXTS for found in pattern.findall(NO_NAMES.sub("", path.read_text()))}


@pytest.mark.slow
@pytest.mark.parametrize("package", ["sfcore", "sfjax", "sftorch"])
def test_every_name_is_there_after_the_plain_import(package):
    names = sorted(name for name in written(NAME) if name.startswith(f"{package}."))
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(".".join(name.split(".")[:2]), []).append(name)
    assert len(names) > 10
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, package],
        input="\n".join(map(" ".join, together.values())),
        cwd=DOCS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    # The one trainer that the tests do not install.
    assert [line for line in done.stdout.splitlines() if "needs fastai" not in line] == []


def test_every_method_that_the_text_calls_is_there():
    calls = written(METHOD)
    assert len(calls) > 5
    assert [call for call in calls if not any(hasattr(owner, call[1]) for owner in OWNERS[call[0]])] == []
