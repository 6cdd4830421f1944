"""What `import sfjax` brings, what it leaves for later, and what it says where something is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sfcore
import sfjax

MODULES = ("checkpoint", "linen", "nnx", "recalibrate")


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(sfjax.__file__).parents[1],
    )


def test_importing_sfjax_imports_no_other_framework() -> None:
    heavy = {"torch", "sftorch", "flax", "orbax", "sfjax.checkpoint"}
    done = run(f"import sfjax, sys; print(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_modules_are_attributes_after_the_plain_import() -> None:
    used = "sfjax.checkpoint.Checkpoints, sfjax.nnx.save, sfjax.linen.save, sfjax.recalibrate.recalibrate"
    done = run(f"import sfjax; print({set(MODULES)} <= set(dir(sfjax))); {used}")
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sfjax' has no attribute 'checkpoints'"):
        sfjax.checkpoints  # type: ignore[attr-defined]  # noqa: B018


def test_the_version_is_that_of_sfcore() -> None:
    assert sfjax.__version__ == sfcore.__version__


JAX = "jax >= 0.6 and optax >= 0.2.5"
EXTRA = "pip install -U 'schedulefree-twin[jax]'"
ORBAX = ("orbax-checkpoint >= 0.11.31 and ml_dtypes", EXTRA)
WITHOUT = """
import importlib, sys
sys.modules[sys.argv[1]] = None
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("missing", "needs"),
    [
        ("jax", {"sfjax": (JAX, EXTRA)}),
        ("optax", {"sfjax": (JAX, EXTRA)}),
        ("orbax.checkpoint", {"sfjax.checkpoint": ORBAX}),
        ("flax", {f"sfjax.{name}": ("flax", "pip install flax") for name in ("linen", "recalibrate")}),
        ("flax.nnx", {"sfjax.nnx": ("flax >= 0.11 (Python 3.11)", "pip install -U flax")}),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_brings_it(
    missing: str, needs: dict[str, tuple[str, str]]
) -> None:
    said = run(WITHOUT, missing, *needs).stdout.splitlines()
    for message, (module, (what, line)) in zip(said, needs.items(), strict=True):
        assert message.startswith(f"{module} needs {what}, got ")
        assert missing.split(".")[0] in message
        assert message.endswith(f": {line}")


@pytest.mark.parametrize(
    ("module", "old", "needs", "got"),
    [
        ("sfjax", "jax.__version__, jax.__version_info__ = '0.5.3', (0, 5, 3)", JAX, "jax 0.5.3 and optax "),
        ("sfjax", "import optax; optax.__version__ = '0.2.4'; del optax.tree", JAX, "optax 0.2.4"),
        (
            "sfjax.checkpoint",
            "import orbax.checkpoint as o; o.__version__ = '0.11.13'; "
            "del o.CheckpointManagerOptions.lightweight_initialize",
            ORBAX[0],
            "orbax-checkpoint 0.11.13",
        ),
    ],
)
def test_a_version_that_is_too_old_is_named(module: str, old: str, needs: str, got: str) -> None:
    said = run(f"import jax; {old}; import {module}").stderr.splitlines()[-1]
    assert said.startswith(f"ImportError: {module} needs {needs}, got ")
    assert got in said
    assert said.endswith(f": {EXTRA}")


def test_every_public_name_is_documented_with_an_example() -> None:
    for name in sfjax.__all__:
        text = getattr(sfjax, name).__doc__
        assert text, name
        assert ">>> " in text, name
