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


def test_saves_and_restores_are_measured_beside_raw_ones(small, monkeypatch, capsys):
    monkeypatch.setattr(cost, "RAW", small / "raw.jsonl")
    assert cost.main(["--repeats", "2", "--raw", "1", "--raw", "2"]) == 0
    rows = [json.loads(line) for line in (small / "raw.jsonl").read_text().splitlines()]
    assert [row["megabytes"] for row in rows] == [1, 2]
    for row in rows:
        assert row["save_over_write"]["median"] > 0
        assert row["restore_over_read"]["median"] > 0
    assert not (small / "cost.jsonl").exists()
    assert "save over write" in capsys.readouterr().out
