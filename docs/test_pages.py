"""The pages tell the truth: tables are the measured ones, and names and paths exist."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from benchmarks import cost, devices, eight, hlo, precision, quality_report, resume_rows, step_report
from parity_tests.matrix import BEGIN, END

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = (DOCS / "names.md").read_text()
PACKAGES = ("sfjax", "sfjax.nnx", "sfjax.linen", "sftorch", "sfcore")


def rows(name):
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def restart():
    return resume_rows.markdown([row for row in rows("resume") if row["part"] == resume_rows.PART])


TABLES = {
    ("precision.md", "precision"): lambda: precision.markdown(rows("precision")),
    ("precision.md", "eight"): lambda: eight.markdown(rows("eight")),
    ("precision.md", "step"): lambda: step_report.markdown(rows("step"), rows("memory")),
    ("precision.md", "hlo"): lambda: hlo.markdown(rows("hlo")),
    ("resuming.md", "restart"): restart,
    ("resuming.md", "cost"): lambda: cost.markdown(rows("cost")),
    ("resuming.md", "raw"): lambda: cost.raw_markdown(rows("raw")),
    ("many-devices.md", "devices"): lambda: devices.markdown(rows("devices")),
}
TABLES |= {
    (page, name): lambda make=make: make(rows("quality"))
    for name, make in quality_report.TABLES.items()
    for page in ("quality.md", "tuning.md")
    if f"<!-- {name} -->" in (DOCS / page).read_text()
}


@pytest.mark.parametrize(("page", "name"), TABLES)
def test_a_table_is_what_its_program_makes_of_the_results(page, name):
    text = (DOCS / page).read_text()
    shown = text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
    assert shown.strip() == TABLES[page, name]().strip()
    assert f"--markdown docs/{page}" in text


def test_the_matrix_has_its_place():
    before, between = (DOCS / "conformance.md").read_text().split(BEGIN)
    assert "python -m parity_tests --markdown docs/conformance.md" in before
    assert between.count(END) == 1


@pytest.mark.parametrize(
    "name", [f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__]
)
def test_every_public_name_has_its_line(name):
    assert re.search(rf"^- `{re.escape(name)}`: \S", NAMES, re.MULTILINE), name


def test_no_line_is_left_over_for_a_name_that_is_gone():
    lines = re.findall(r"^- `(sfjax|sfjax\.nnx|sfjax\.linen|sftorch|sfcore)\.(\w+)`: ", NAMES, re.MULTILINE)
    assert [line for line in lines if line[1] not in importlib.import_module(line[0]).__all__] == []


def test_every_path_of_the_map_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"^\| `([^`*]+)`", text.split("\n## The map\n")[1].split("\n## ")[0], re.MULTILINE)
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_link_into_the_repository_finds_its_file():
    pages = [ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]  # those of README.md: examples/test_readme.py
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^):]+)\)", page.read_text())]
    missing = [link for page, link in links if not (page.parent / (link.partition("#")[0] or page)).exists()]
    assert len(links) > 50
    assert missing == []


def test_the_plan_of_the_page_finds_the_two_errors_and_repairs_them(capsys):
    code = re.search(r"^```python\n(.*?)^```", (DOCS / "plan.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    names: dict = {}
    exec(compile(code, "plan.md", "exec"), names)
    assert [problem.code for problem in names["plan"].problems] == ["SF103", "SF401"]
    assert names["repaired"].problems == ()
    assert capsys.readouterr().out.endswith(f"{names['repaired'].config}\n")


def test_every_test_that_the_page_on_migration_names_is_there():
    text = (DOCS / "migration.md").read_text()
    named = set(re.findall(r"`([\w/]*test_\w+\.py)`", text))
    assert len(named) > 10
    folders = ("", "sftorch/tests/", "sfjax/tests/")
    assert [name for name in sorted(named) if not any((ROOT / (f + name)).exists() for f in folders)] == []
