"""Importing sfjax brings in neither torch nor flax."""

import subprocess
import sys
from pathlib import Path

import sfjax


def test_importing_sfjax_imports_no_other_framework():
    program = "import sfjax, sys; print(sorted({'torch', 'sftorch', 'flax'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(sfjax.__file__).parents[1],
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_documented_with_an_example():
    for name in sfjax.__all__:
        text = getattr(sfjax, name).__doc__
        assert text, name
        assert ">>> " in text, name
