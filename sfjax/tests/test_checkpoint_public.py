"""What the package promises about itself: examples, light imports, one word for one idea."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import sfjax.checkpoint


def test_every_public_name_is_documented_with_an_example() -> None:
    for name in sfjax.checkpoint.__all__:
        if name == "CheckpointError":  # sfcore's
            continue
        assert ">>> " in (getattr(sfjax.checkpoint, name).__doc__ or ""), name


def test_importing_brings_in_no_other_framework() -> None:
    heavy = {"torch", "sftorch", "flax"}
    program = f"import sfjax.checkpoint, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(sfjax.__file__).parents[1],
    )
    assert done.stdout.strip() == "[]"
