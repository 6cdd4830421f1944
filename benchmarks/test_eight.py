"""The steps in every precision over their floors: what is measured and what is shown."""

import json

import pytest

from benchmarks import eight

# What torch's compiler says of itself when torchao's step is compiled.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def test_it_writes_a_row_a_contender_and_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eight, "SHAPES", [(64, 32), (32,)])
    page, out = tmp_path / "page.md", tmp_path / "eight.jsonl"
    page.write_text("before\n<!-- eight -->\n<!-- /eight -->\nafter\n")
    assert eight.main(["--rounds", "2", "--out", str(out), "--markdown", str(page)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["name"] for row in rows] == [one.name for one in eight.contenders()]
    assert all(row["n"] == 2 and row["parameters"] == 64 * 32 + 32 for row in rows)
    exact = next(row for row in rows if row["name"] == "sftorch float32, exact")
    assert exact["over_exact"]["median"] == 1
    assert page.read_text().count("**sftorch") == 5
    assert capsys.readouterr().out.count("**sftorch") == 5


@pytest.mark.parametrize(
    ("name", "moved"), [("bfloat16, 8bit", 12), ("float32, 8bit", 18), ("bfloat16, lean", 18)]
)
def test_the_bytes_are_those_of_the_tensors(name, moved, monkeypatch):
    monkeypatch.setattr(eight, "SHAPES", [(64, 32_768)])
    one = next(one for one in eight.contenders() if one.name == f"sftorch {name}")
    optimizer = eight._started(one)
    optimizer.step()
    (p,) = optimizer.param_groups[0]["params"]
    kept = [value for value in optimizer.state[p].values() if hasattr(value, "nbytes") and value.ndim]
    written = p.nbytes + sum(value.nbytes for value in kept)
    assert (2 * written + p.grad.nbytes) / p.numel() == pytest.approx(moved, rel=1e-3)
