"""The notebooks run, measure what their text says, and are committed as they run."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import nbformat
import numpy as np
import pytest

from notebooks.execute import PATHS, execute

ROOT = Path(__file__).parent.parent
# What a test needs to know, read from the names that the cells leave behind.
PROBES = {
    "from_cosine_jax": """
at_x, at_y = jax.jit(sfjax.schedule_free_eval_params)(resumed[1], resumed[0]), resumed[0]
x_and_y = {f"{a}/{b}": (at_x[a][b], at_y[a][b]) for a in at_x for b in at_x[a]}
served, rates, accuracy = shipped, {m.__name__: best[m] for m in METHODS}, shipped_accuracy
curves = {m.__name__: curves[m] for m in METHODS}
""",
    "from_cosine_torch": """
x_and_y = {name: (x, model.state_dict()[name]) for name, x in optimizer.eval_state_dict(model).items()}
served, rates, accuracy = served.state_dict() if equal else {}, best, served_accuracy
""",
}
REPORT = """
import json
report = {
    "best": rates,
    "rates": RATES,
    "curves": {method: np.asarray(each).tolist() for method, each in curves.items()},
    "restarted": [bool(one) for one in same],
    "shipped": {k: [np.array_equal(served[k], v) for v in values] for k, values in x_and_y.items()},
    "shipped accuracy": float(accuracy),
}
print(json.dumps(report))
"""
CASES = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def test_every_notebook_has_a_probe():
    assert {path.stem for path in PATHS} == PROBES.keys()


@pytest.fixture(scope="module")
def executed():
    """Returns (notebook, what the probe found) of a path; each is run once."""
    done: dict[Path, tuple[Any, dict[str, Any]]] = {}

    def of(path: Path) -> tuple[Any, dict[str, Any]]:
        if path not in done:
            notebook = execute(path, PROBES[path.stem] + REPORT)
            found = json.loads(notebook.cells.pop().outputs[0].text)
            done[path] = notebook, found
        return done[path]

    return of


@pytest.mark.slow
@CASES
def test_what_it_measures_is_what_its_text_says(path, executed):
    _, found = executed(path)
    curves = {method: np.array(each) for method, each in found["curves"].items()}
    assert {each.shape for each in curves.values()} == {(2, 5, 30)}  # loss and accuracy, seeds, evaluations
    for method, rate in found["best"].items():
        assert min(found["rates"]) < rate < max(found["rates"]), method
        assert curves[method][1, :, -1].mean() >= 0.96, method
    assert found["best"]["schedule_free"] > found["best"]["cosine"]
    ahead = (curves["cosine"] - curves["schedule_free"])[0].mean(0)
    deviation = max(each[0, :, -1].std(ddof=1) for each in curves.values())
    assert ahead[14] > 0.02  # half time
    if path.stem == "from_cosine_jax":
        assert ahead[-1] > deviation
    else:
        assert abs(ahead[-1]) < deviation


@pytest.mark.slow
@CASES
def test_a_restart_goes_on_in_the_same_bits_and_what_is_shipped_is_x_and_not_y(path, executed):
    _, found = executed(path)
    assert len(found["restarted"]) > 15
    assert all(found["restarted"])
    assert list(found["shipped"].values()) == 4 * [[True, False]]
    assert found["shipped accuracy"] >= 0.96


def streams(notebook: Any) -> list[str]:
    """Returns what each cell printed; fails if a cell wrote to stderr."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        assert output.get("name") != "stderr", output.text
        assert output.output_type != "error"
    return [
        "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def pictures(notebook: Any) -> list[np.ndarray]:
    return [
        matplotlib.image.imread(io.BytesIO(base64.b64decode(output.data["image/png"])))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


def assert_same_text(committed: str, fresh: str) -> None:
    """Words and whole numbers must be equal; decimals may differ by 3 in their last place on another CPU."""
    decimal = r"\d+\.(\d+)"
    assert re.sub(decimal, "#", committed) == re.sub(decimal, "#", fresh)
    for old, new in zip(re.finditer(decimal, committed), re.finditer(decimal, fresh), strict=True):
        assert float(old[0]) == pytest.approx(float(new[0]), rel=0, abs=3.01 * 10 ** -len(old[1]))


@pytest.mark.slow
@CASES
def test_committed_outputs_are_those_of_the_committed_cells(path, executed):
    committed, (fresh, _) = nbformat.read(path, as_version=4), executed(path)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for old, new in zip(streams(committed), streams(fresh), strict=True):
        assert_same_text(old, new)
    for old, new in zip(pictures(committed), pictures(fresh), strict=True):
        assert old.shape == new.shape
        assert np.abs(old - new).mean() < 0.01
    assert len(pictures(committed)) == 1


def test_the_comparison_of_texts_can_fail():
    assert_same_text("step 300: 0.123", "step 300: 0.125")
    for other in ("step 301: 0.123", "step 300: 0.127", "steps 300: 0.123"):
        with pytest.raises(AssertionError):
            assert_same_text("step 300: 0.123", other)


@CASES
def test_github_can_render_it_and_its_links_lead_somewhere(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) >= 3
    assert [link for link in links if not (path.parent / link).exists()] == []
    assert path.stat().st_size < 200_000
