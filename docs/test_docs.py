"""The documentation builds without a warning, its code runs, and every public name is on a page."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Their code takes names for granted, which the tests that run it provide.
RUN_ELSEWHERE = {"trainers.md", "kohya.md", "flax.md", "form.md", "many-devices.md"}
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Returns the built documentation, and what the build said."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an announcement of mkdocs-material's, about no page
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    return folder, done.returncode, done.stdout + done.stderr


def public_names():
    """Returns the names in `__all__` of every public module, and those that names.md lists."""
    found = set()
    for package in ("sfcore", "sfjax", "sftorch"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = parts[:-1] if parts[-1] == "__init__" else parts
            if not any(part.startswith("_") or part == "tests" for part in module):
                found |= {f"{'.'.join(module)}.{name}" for name in exported(path)}
    listed = (DOCS / "names.md").read_text()
    for line in re.findall(r"^- (`.*?`): ", listed, re.MULTILINE):
        for name in re.findall(r"`([\w.]+)`", line):
            module = name.rpartition(".")[0] or module  # `a.b.c`, `d` is short for `a.b.d`
            found.add(f"{module}.{name.rpartition('.')[2]}")
    methods = listed.split("\nMethods that they add")[1].split("\n\n")[0]
    return found | {f"sftorch.AdamWScheduleFree.{name}" for name in re.findall(r"`(\w+)\(", methods)}


def exported(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def ids(page):
    return set(re.findall(r'\bid="([^"]+)"', page.read_text()))


@pytest.mark.slow
def test_it_builds_without_a_warning(site):
    _, code, said = site
    assert (code, re.findall(r"^(?:WARNING|ERROR).*", said, re.MULTILINE)) == (0, []), said


def test_every_public_name_is_on_a_page_of_the_reference(site):
    there = set().union(*(ids(page) for page in (site[0] / "api").glob("*.html")))
    # A function in a module of its own name stands there by its whole path.
    missing = {name for name in public_names() if not {name, f"{name}.{name.rpartition('.')[2]}"} & there}
    assert len(public_names()) > 60
    assert sorted(missing) == []


def test_nothing_in_a_docstring_is_taken_for_a_quotation(site):
    pages = list((site[0] / "api").glob("*.html"))
    assert "&gt;= 0, default 0.0025" in (site[0] / "api" / "sfjax.html").read_text()
    assert [page.name for page in pages if "<blockquote" in page.read_text()] == []


def test_every_link_leads_somewhere(site):
    folder, broken, count = site[0], [], 0
    anchors = {page: ids(page) for page in folder.rglob("*.html")}
    for page in anchors:
        for link in re.findall(r'\b(?:href|src)="([^":]+)"', page.read_text()):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            count += 1
            if page.name == "404.html":  # written for the root of a server
                continue
            if not target.exists() or (anchor and target in anchors and anchor not in anchors[target]):
                broken.append(f"{page.relative_to(folder)}: {link}")
    assert count > 1000
    assert broken == []


def test_the_readme_is_included_and_not_linked_out_of_the_site(site):
    start = (site[0] / "index.html").read_text()
    assert 'src="benchmarks/results/quality.png"' in start
    assert "<code>python -m benchmarks quality</code>" in start
    assert [page.name for page in site[0].rglob("*.html") if "../README.md" in page.read_text()] == []


def test_nothing_is_fetched_and_search_works_without_a_server(site):
    folder, fetched = site[0], []
    for page in folder.rglob("*.html"):
        text = page.read_text()
        fetched += re.findall(r'<(?:script|img|iframe)\b[^>]*\bsrc="?https?:[^>]*>', text)
        fetched += re.findall(r'<link\b[^>]*rel="?(?:stylesheet|preconnect)"?[^>]*https?:[^>]*>', text)
        fetched += re.findall(r'data-md-component="source"', text)  # asks GitHub for stars
    assert fetched == []
    assert (folder / "search" / "search_index.js").read_text().startswith("var __index = {")
    assert 'src="assets/iframe-worker.js"' in (folder / "index.html").read_text()


def test_mathematics_is_mathematics(site):
    text = (site[0] / "equations.html").read_text()
    source = (DOCS / "equations.md").read_text()
    assert text.count("<math ") == len(re.findall(r"\$`[^`]+`\$|^```math$", source, re.MULTILINE)) > 40
    assert "$`" not in text
    assert "$<code>" not in text
    assert "\\" not in "".join(re.findall(r"<math .*?</math>", text, re.DOTALL))


def test_a_page_leads_to_its_source(site):
    text = (site[0] / "equations.html").read_text()
    repository = "https://github.com/schedulefree-twin/schedulefree-twin"
    assert f'href="{repository}/edit/main/docs/equations.md"' in text
    assert f'href="{repository}"' in text


def test_a_link_to_a_page_or_a_figure_of_ours_stays_on_the_site(site):
    pages = [
        page
        for page in site[0].rglob("*.html")
        if re.search(r'(?:href|src)="[^"]*/blob/main/docs/', page.read_text())
    ]
    assert [page.name for page in pages] == []
    assert not [page.name for page in site[0].rglob("*.html") if "raw.githubusercontent" in page.read_text()]


@pytest.mark.parametrize(
    "page", sorted({path.name for path in DOCS.glob("*.md") if CODE.search(path.read_text())} - RUN_ELSEWHERE)
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = CODE.findall((DOCS / page).read_text())
    names: dict = {}
    for number, code in enumerate(blocks, start=1):
        exec(compile(code, f"{page}, block {number}", "exec"), names)
    assert len(names) > len(blocks)


STOPPED = """
import os, signal, time

def stopped(draw, calls=[]):
    def drawn(*args, **kwargs):
        calls.append(draw(*args, **kwargs))
        if len(calls) == 30:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # the batch is drawn, and the update is not yet taken
        return calls[-1]
    return drawn

"""
IN_TORCH = "torch.randint = stopped(torch.randint); torch.manual_seed(1); train('stopped', 100)"
IN_JAX = "jax.random.randint = stopped(jax.random.randint); train('stopped-jax', 100)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "run", "end"),
    [(0, IN_TORCH, "torch.manual_seed(1)"), (1, IN_JAX, "whole = ")],
    ids=["torch", "jax"],
)
def test_the_loops_end_in_the_same_bits_when_a_signal_comes_in_the_middle_of_a_step(
    block, run, end, tmp_path
):
    code = CODE.findall((DOCS / "resuming.md").read_text())[block]
    loop = code[: code.index(f"\n{end}")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ends = [
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=False).returncode
        for program in (loop + STOPPED + run, code)  # the page's own asserts see to the second
    ]
    assert ends == [75, 0]


@pytest.mark.parametrize("page", sorted(page for page in RUN_ELSEWHERE if (DOCS / page).exists()))
def test_the_other_pages_are_run_by_a_test_of_their_own(page):
    tests = [path for path in ROOT.glob("*/**/test_*.py") if path != Path(__file__)]
    assert any(f'"{page}"' in path.read_text() for path in tests)
