"""The short examples learn, and go on where they were cut as if they never had been."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXAMPLES = ("flax_nnx", "flax_linen", "equinox_loop", "optax_loop")


def records(folder: Path) -> dict:
    """Returns what the newest checkpoint says of every leaf in it: shape, dtype and CRC."""
    newest = max((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    return json.loads((newest / "meta" / "metadata").read_text())["tensors"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "flax" in name else []) for name in EXAMPLES]
)
def test_a_run_in_two_parts_ends_in_the_same_bits_and_has_learned(name, tmp_path):
    main = importlib.import_module(name).main
    right = main(tmp_path / "whole", 60)
    main(tmp_path / "cut", 31)
    assert records(tmp_path / "cut") != records(tmp_path / "whole")
    assert main(tmp_path / "cut", 60) == right >= 0.85
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flax_nnx", "flax_linen"])
def test_it_does_so_in_fresh_processes_too(name, tmp_path):
    said = {}
    for folder, steps in (("whole", 20), ("cut", 11), ("cut", 20)):
        command = [sys.executable, HERE / f"{name}.py", tmp_path / folder, str(steps)]
        said[folder] = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said["cut"] == said["whole"]
    assert said["cut"].endswith("of the test digits are right at x\n")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
