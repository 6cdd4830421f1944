"""What the flips cost: everybody is measured, and ratios are to the peer."""

import json

from benchmarks import flips


def test_every_optimizer_flips_in_every_round(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(flips, "RESULTS", tmp_path / "flips.jsonl")
    assert flips.main(["--size", "1", "--rounds", "2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "flips.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == list(flips.makers())
    assert all(row["n"] == 2 and row["ms"]["median"] > 0 for row in rows)
    assert next(row["over_peer"]["median"] for row in rows if row["name"] == flips.PEER) == 1
    assert "page faults" in capsys.readouterr().out
