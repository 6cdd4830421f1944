"""A user's type checker on a user's file, against the installed wheel: it finds mistakes, and nothing else.

pyright comes as `pyright[nodejs]`: its wheels bring its JavaScript and node, so that it runs offline.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
PACKAGES = ("sfcore", "sfjax", "sftorch")
FILES = ("right.py", "wrong.py")
# Optax ships no types; mypy says so to every user, until they write this.
MYPY = "[mypy]\n[mypy-optax.*]\nignore_missing_imports = True\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Returns a user's folder: the two files, and an environment with the wheel and all that we have."""
    folder = tmp_path_factory.mktemp("user")
    source = folder / "source"  # a copy, because a build leaves its own files behind
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "tests")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    alone = ("--no-deps", "--no-index")
    run(folder, *pip, "wheel", *alone, "--no-build-isolation", "-w", "wheel", "./source")
    (wheel,) = (folder / "wheel").glob("*.whl")
    shutil.rmtree(source)

    venv.create(folder / "venv")
    (site,) = (folder / "venv").glob("lib/python3*/site-packages")
    run(folder, *pip, "install", *alone, "--target", str(site), str(wheel))
    # Named as folders, they bring what is installed there, and not an editable install of this repository.
    (site / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    for file in FILES:
        shutil.copy(HERE / "typed" / file, folder)
    (folder / "mypy.ini").write_text(MYPY)
    where = run(folder, *in_venv(folder), "-c", "import sfcore, torch; print(sfcore.__file__)").stdout
    assert Path(where.strip()).is_relative_to(folder)
    return folder


def run(folder: Path, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a program where this repository is on no path; fails unless it ends with the code."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def in_venv(folder: Path) -> list[str]:
    return [str(next(folder.glob("venv/*/python")))]


def assert_exactly_the_mistakes(found: dict[str, dict[int, str]]) -> None:
    """Takes file -> line -> message."""
    assert found["right.py"] == {}
    lines = (HERE / "typed" / "wrong.py").read_text().splitlines()
    marked = {number: line for number, line in enumerate(lines, 1) if line.endswith("  # error")}
    assert len(marked) > 70
    assert [line for number, line in marked.items() if number not in found["wrong.py"]] == []
    assert {number: said for number, said in found["wrong.py"].items() if number not in marked} == {}


def test_pyright_finds_every_mistake_and_no_other(project):
    command = (sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", *in_venv(project))
    report = json.loads(run(project, *command, *FILES, code=1).stdout)
    found: dict[str, dict[int, str]] = {file: {} for file in FILES}
    for note in report["generalDiagnostics"]:
        if note["severity"] != "information":
            found[Path(note["file"]).name][note["range"]["start"]["line"] + 1] = note["message"]
    assert_exactly_the_mistakes(found)


@pytest.mark.slow
def test_mypy_finds_every_mistake_and_no_other(project):
    command = (sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--python-executable")
    output = run(project, *command, *in_venv(project), *FILES, code=1).stdout
    found: dict[str, dict[int, str]] = {file: {} for file in FILES}
    for file, line, said in re.findall(r"^(\S+?):(\d+): error: (.*)$", output, re.MULTILINE):
        found[file][int(line)] = said
    assert_exactly_the_mistakes(found)


def test_the_comparison_finds_what_a_checker_misses_and_what_it_invents():
    lines = (HERE / "typed" / "wrong.py").read_text().splitlines()
    exact = {number: "wrong" for number, line in enumerate(lines, 1) if line.endswith("  # error")}
    assert_exactly_the_mistakes({"right.py": {}, "wrong.py": exact})
    first = min(exact)
    missed = {number: said for number, said in exact.items() if number != first}
    invented = exact | {1: "wrong"}
    wrong = [{"right.py": {}, "wrong.py": other} for other in (missed, invented)]
    for found in ({"right.py": {1: "wrong"}, "wrong.py": exact}, *wrong):
        with pytest.raises(AssertionError):
            assert_exactly_the_mistakes(found)
