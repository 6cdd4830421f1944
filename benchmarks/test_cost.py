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
    page = small / "page.md"
    page.write_text("<!-- raw -->\n<!-- /raw -->\n")
    assert cost.main(["--repeats", "2", "--raw", "2", "--raw", "1", "--markdown", str(page)]) == 0
    rows = [json.loads(line) for line in (small / "raw.jsonl").read_text().splitlines()]
    assert [row["megabytes"] for row in rows] == [2, 1]
    for row in rows:
        assert all(of["median"] > 0 for of in (row["ratios"] | row["megabytes_per_second"]).values())
        bytes_of = row["bytes"]
        assert bytes_of["write"] == bytes_of["write_over"] == row["megabytes"] * 1_000_000 // 240 * 240
        assert 4 / 3 < bytes_of["save"] / bytes_of["write"] < 1.4  # x beside y, z and v
    assert not (small / "cost.jsonl").exists()
    lines = page.read_text().splitlines()
    assert lines[1] == "| torch, on a CPU | 1 MB, n = 2 | 2 MB, n = 2 |"
    restores = [rows[i]["ratios"]["restore/read"] for i in (1, 0)]
    shown = ["{median:.2f} ({q1:.2f} to {q3:.2f})".format(**one) for one in restores]
    assert lines[-2] == f"| a restore, of a plain read | {' | '.join(shown)} |"


def test_a_new_file_takes_the_place_of_the_one_before(tmp_path):
    file = tmp_path / "raw"
    for content in (b"long before", b"new"):
        before = file.stat().st_ino if file.exists() else None
        cost.write_new(file, lambda out, content=content: out.write(content))
        assert file.read_bytes() == content
        assert file.stat().st_ino != before
    assert list(tmp_path.iterdir()) == [file]
    cost.write_over(file, lambda out: out.write(b"over"))
    assert file.read_bytes() == b"over"
