"""What is installed: three packages that do not drag each other in, and pins for all that CI runs."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sfcore
from sfcore.plan._text import tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What people install to use it, not to work on it.
RUNTIME = ("jax", "torch", "all", "trainers", "completion", "ui")
PACKAGES = ("sfcore", "sfjax", "sftorch")


@pytest.mark.parametrize(
    ("package", "strangers"),
    [
        ("sfcore", ["jax", "optax", "flax", "torch", "scipy"]),
        ("sfjax", ["torch", "sftorch"]),
        ("sftorch", ["jax", "optax", "flax", "sfjax"]),
        ("sftorch.trainers", ["accelerate", "lightning", "transformers"]),
    ],
)
def test_a_package_imports_without_the_other_framework(package, strangers):
    # None makes an import of that name raise, as if it were not installed.
    code = (
        f"import sys\nfor name in {strangers!r}: sys.modules[name] = None\n"
        f"import {package}\nprint(sorted(n for n in {strangers!r} if sys.modules.get(n)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_carries_its_type_marker(package):
    assert (ROOT / package / "py.typed").is_file()


def test_an_older_python_is_told_what_is_needed_in_words_that_it_can_read():
    ast.parse((ROOT / "sfcore/__init__.py").read_text(), feature_version=(3, 6))
    code = "import sys; sys.version_info = (3, 9, 18); sys.version = '3.9.18 (main)'; import sfcore.plan"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    needed = "ImportError: schedulefree-twin needs Python 3.10 or newer, got 3.9.18"
    assert done.stderr.strip().endswith(needed)


def test_what_people_install_has_no_upper_bound():
    asked = [*PROJECT["dependencies"], *(item for extra in RUNTIME for item in EXTRAS[extra])]
    assert [item for item in asked if "<" in item.partition(";")[0] or "==" in item or "~=" in item] == []
    assert PROJECT["requires-python"] == ">=3.10"


def test_what_the_packages_import_is_what_their_extras_bring():
    # What else they import, they import where a user has it already, or they say what to install.
    optional = {"accelerate", "fastai", "flax", "gradio", "lightning", "matplotlib", "rich", "shtab"}
    optional |= {"transformers", "triton"}
    asked = [*PROJECT["dependencies"], *EXTRAS["jax"], *EXTRAS["torch"]]
    brought = {name_of(item).replace("-", "_") for item in asked} | {
        "etils",
        "orbax",
        "tensorstore",
    }  # by orbax_checkpoint
    found = {name for package in PACKAGES for name in imported(ROOT / package)}
    assert found - brought - optional - {*PACKAGES} - sys.stdlib_module_names == set()
    assert {"jax", "torch", "orbax"} < found
    assert "safetensors" not in found  # trainers pin an old one


def imported(folder: Path) -> set[str]:
    """Returns the first words of all that the shipped files of a package import, at once or when needed."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if "tests" not in path.parts else ():
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=~!; ]", requirement)[0].lower().replace("_", "-")


def test_everything_that_the_project_asks_for_is_pinned():
    pins = {
        name_of(line): line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    assert [line for line in pins.values() if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    wanted = {name_of(item) for items in [PROJECT["dependencies"], *EXTRAS.values()] for item in items}
    assert wanted - pins.keys() == {PROJECT["name"]}


def test_floors_are_those_that_the_packages_ask_for_when_they_are_imported():
    for package, extra in (("sftorch", "torch"), ("sfjax", "jax")):
        source = (ROOT / package / "__init__.py").read_text()
        asked = [f"{name}>={floor}" for name, floor in re.findall(r"(\w+) >= ([\d.]*\d)", source)]
        assert asked
        # A later bug fix in what an extra brings may raise its floor, not what an import refuses.
        assert all(any(item.startswith(one) for item in EXTRAS[extra]) for one in asked)


def test_the_citation_and_the_pages_of_the_project_are_those_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == sfcore.__version__
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert citation["license"] == PROJECT["license"]
    for name in PROJECT["urls"].values():
        _, blob, path = name.partition("/blob/main/")
        assert not blob or (ROOT / path).is_file()


def test_the_workflows_run_ci_and_publish_what_it_has_passed():
    jobs = {
        name: yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())["jobs"]
        for name in ("ci", "release")
    }
    assert {"run": ".ci/run"} in jobs["ci"]["run"]["steps"]
    assert jobs["release"]["publish"]["needs"] == ["ci", "build"]
    assert jobs["release"]["publish"]["permissions"] == {"id-token": "write"}


def test_the_page_of_versions_is_what_the_results_make():
    results = [json.loads(line) for line in (ROOT / ".ci/matrix.jsonl").read_text().splitlines()]
    matrix = runpy.run_path(str(ROOT / ".ci/matrix"))
    assert (ROOT / "docs/compatibility.md").read_text() == matrix["page"](results)
    assert {row["cell"] for row in results} <= {cell["cell"] for cell in matrix["cells"]()}


def test_the_version_comes_from_sfcore():
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", sfcore.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## {sfcore.__version__}" in changelog
