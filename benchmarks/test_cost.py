"""What a save costs: every kind of save is timed, and the table holds what was measured."""

from __future__ import annotations

import json

import pytest

from benchmarks import cost


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "SIZES", (1,))
    monkeypatch.setattr(cost, "RESULTS", tmp_path / "cost.jsonl")
    return tmp_path


def test_every_kind_of_save_is_timed_and_the_page_holds_the_table(small):
    page = small / "page.md"
    page.write_text("before\n<!-- cost -->\n<!-- /cost -->\nafter\n")
    assert cost.main(["--repeats", "2", "--markdown", str(page)]) == 0
    rows = [json.loads(line) for line in (small / "cost.jsonl").read_text().splitlines()]
    assert [(row["framework"], row["megabytes"], row["n"]) for row in rows] == [
        ("torch", 1, 2),
        ("jax", 1, 2),
    ]
    for row in rows:
        assert all(of["q3"] >= of["median"] >= of["q1"] > 0 for of in row["seconds"].values())
    lines = page.read_text().splitlines()
    assert lines[:2] + lines[-2:] == ["before", "<!-- cost -->", "<!-- /cost -->", "after"]
    assert [line.split(" | ")[0] for line in lines[4:6]] == ["| torch", "| jax"]
    assert f"{rows[0]['seconds']['blocks_over_waits']['median']:.1%} (" in lines[4]
