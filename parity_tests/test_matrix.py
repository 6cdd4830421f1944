"""The conformance matrix, on implementations made up for the purpose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parity_tests import __main__ as program
from parity_tests import matrix
from parity_tests.cases import CASES, FAMILIES
from parity_tests.drivers import Driver
from parity_tests.mistakes import MISTAKES, planted, reference_driver
from parity_tests.reference import Reference


def _refusing(case: Any, params: Any, dtype: str) -> Any:
    if case.options["beta"] == 0:
        raise ZeroDivisionError
    return Reference(case.optimizer, params, case.options)


DRIVERS = [
    replace(reference_driver("right"), optimizers=("sgd",)),
    Driver("schedulefree, made up", _refusing, ("adamw",), ("inner_momentum", "prior_steps")),
    replace(planted(MISTAKES[0]), name="wrong", optimizers=("sgd",)),
]


@pytest.fixture(scope="module")
def made() -> matrix.Matrix:
    return matrix.build(DRIVERS)


def test_cells_hold_the_largest_error_of_their_family(made: matrix.Matrix):
    assert {tuple(row) for row in made.values()} == {tuple(FAMILIES)}
    right = made["right"]
    assert [right[f].error for f in FAMILIES if right[f].cases] == [0.0] * 10
    assert str(right["moments"]) == "·"
    counted = [c for c in CASES.values() if c.optimizer == "sgd" and c.family == "warm-up"]
    assert right["warm-up"].cases == len(counted) == 9
    assert made["wrong"]["warm-up"].error > 1e-3
    assert not made["wrong"]["warm-up"].conforms
    assert made["wrong"]["decay"].conforms


def test_refusals_and_known_differences_are_shown(made: matrix.Matrix):
    cell = made["schedulefree, made up"]["beta"]
    assert (cell.refused, cell.conforms, cell.differences) == (2, False, ("beta-0-divides",))
    assert str(cell) == "0†"
    assert matrix.notes(made) == {"beta-0-divides": "a"}
    assert str(matrix.Cell(cases=1, refused=1)) == "refused"
    assert str(matrix.Cell(cases=1, error=float("inf"))) == "NaN"


def test_markdown_replaces_what_lies_between_the_markers(made: matrix.Matrix, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{matrix.BEGIN}\nyesterday\n{matrix.END}\nafter\n")
    for _ in range(2):
        matrix.write_between_markers(page, matrix.markdown(made))
    text = page.read_text()
    assert text.startswith(f"before\n{matrix.BEGIN}\n| implementation | defaults |")
    assert text.endswith(f"\n{matrix.END}\nafter\n")
    assert "yesterday" not in text
    assert text.count("| right |") == 1
    assert "**0†** <sup>a</sup>" in text
    (tmp_path / "bare.md").write_text("nothing\n")
    with pytest.raises(ValueError, match="must hold the lines"):
        matrix.write_between_markers(tmp_path / "bare.md", "text")


def test_the_program_writes_json_and_fails_when_a_twin_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(program, "DRIVERS", {driver.name: driver for driver in DRIVERS})
    monkeypatch.setattr(program, "TWINS", DRIVERS[:1])
    path = tmp_path / "matrix.json"
    assert program.main(["--only", "right", "--json", str(path)]) == 0
    assert "right" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"]["right"]["decay"]["error"] == 0.0
    monkeypatch.setattr(program, "TWINS", DRIVERS[2:])
    assert program.main(["--only", "wrong"]) == 1
