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
# Optax ships no types; mypy says so to every user, until they write this.
MYPY = "[mypy]\n[mypy-optax.*]\nignore_missing_imports = True\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Returns a user's folder: the files, and an environment with the wheel and all that we have."""
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
    shutil.copytree(HERE / "typed", folder, dirs_exist_ok=True)
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


Found = dict[str, dict[int, str]]  # file -> line -> message


def pyright(folder: Path, *files: str) -> Found:
    command = (sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", *in_venv(folder))
    found: Found = {file: {} for file in files}
    for note in json.loads(run(folder, *command, *files, code=1).stdout)["generalDiagnostics"]:
        if note["severity"] != "information":
            found[Path(note["file"]).name][note["range"]["start"]["line"] + 1] = note["message"]
    return found


def mypy(folder: Path, *files: str) -> Found:
    command = (sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--python-executable")
    output = run(folder, *command, *in_venv(folder), *files, code=1).stdout
    found: Found = {file: {} for file in files}
    for file, line, said in re.findall(r"^(\S+?):(\d+): error: (.*)$", output, re.MULTILINE):
        found[file][int(line)] = said
    return found


def marked(file: str) -> dict[int, str]:
    lines = (HERE / "typed" / file).read_text().splitlines()
    return {number: line for number, line in enumerate(lines, 1) if line.endswith("  # error")}


def assert_exactly_the_mistakes(found: Found) -> None:
    for file, messages in found.items():
        wanted = marked(file)
        assert [line for number, line in wanted.items() if number not in messages] == []
        assert {number: said for number, said in messages.items() if number not in wanted} == {}


def test_enough_mistakes_are_planted_and_none_in_the_right_files():
    number = {path.name: len(marked(path.name)) for path in (HERE / "typed").glob("*.py")}
    assert number.keys() == {"right.py", "wrong.py", "right_trainers.py", "wrong_trainers.py"}
    assert (number["right.py"], number["right_trainers.py"]) == (0, 0)
    assert number["wrong.py"] > 70
    assert number["wrong_trainers.py"] > 5


@pytest.mark.parametrize(
    ("checker", "topic"),
    [
        pytest.param(pyright, "", marks=pytest.mark.slow),
        # mypy reads all of torch and JAX first, and any checker all of transformers.
        pytest.param(pyright, "_trainers", marks=pytest.mark.slow),
        pytest.param(mypy, "", marks=pytest.mark.slow),
        pytest.param(mypy, "_trainers", marks=pytest.mark.slow),
    ],
)
def test_a_checker_finds_every_mistake_and_no_other(project, checker, topic):
    assert_exactly_the_mistakes(checker(project, f"right{topic}.py", f"wrong{topic}.py"))


def test_the_comparison_finds_what_a_checker_misses_and_what_it_invents():
    exact = marked("wrong.py")
    assert_exactly_the_mistakes({"right.py": {}, "wrong.py": exact})
    missed = dict(list(exact.items())[1:])
    for right, wrong in (({1: "no"}, exact), ({}, missed), ({}, exact | {1: "no"})):
        with pytest.raises(AssertionError):
            assert_exactly_the_mistakes({"right.py": right, "wrong.py": wrong})
