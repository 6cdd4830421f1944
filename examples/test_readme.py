"""The README tells the truth on one screen: its code runs, its numbers are measured, its links lead on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from readme_renderer import markdown

from benchmarks.resume_rows import pick

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SECTIONS = (
    *("In numbers", "Install", "Ten lines of JAX", "Ten lines of torch", "In your trainer"),
    *("Run it here", "Read on"),
)
REPOSITORY = "https://github.com/schedulefree-twin/schedulefree-twin/blob/main/"
PICTURES = "https://raw.githubusercontent.com/schedulefree-twin/schedulefree-twin/main/"


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def run_block(title: str) -> dict:
    (code,) = re.findall(r"^```python\n(.*?)^```", section(title), re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(code, f"README: {title}", "exec"), names)
    return names


def results(name: str) -> list[dict]:
    lines = (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def numbers(command: str) -> tuple[str, str]:
    """Returns the cells 'here' and 'elsewhere' of the line that ends with a command."""
    (line,) = re.findall(rf"^\|.*\| (.*?) \| (.*?) \| `{command}` \|$", section("In numbers"), re.MULTILINE)
    return line


def test_it_fits_on_one_screen_in_the_order_of_a_reader():
    assert len(README.splitlines()) <= 150
    assert re.findall(r"^## (.*)$", README, re.MULTILINE) == list(SECTIONS)


def test_the_jax_lines_run_and_x_is_near_the_minimum():
    names = run_block("Ten lines of JAX")
    # The minimum is at 1, the start at 0.
    np.testing.assert_allclose(names["x"]["w"], 1.0, atol=0.2)
    assert not np.array_equal(names["x"]["w"], names["params"]["w"])


def test_the_torch_lines_run_and_x_is_not_y():
    torch.manual_seed(0)
    names = run_block("Ten lines of torch")
    model, weights = names["model"], names["weights"]
    assert weights.keys() == model.state_dict().keys()
    assert not torch.equal(weights["weight"], model.weight)
    model.load_state_dict(weights)
    assert float((model(names["inputs"]) - names["targets"]).square().mean().detach()) < 0.1


def test_the_numbers_of_a_restart_are_the_measured_ones():
    found = [row for row in results("resume") if row["part"] == "restart"]
    ours, jax, adamw, radam, optax = (
        f"{pick(found, 'digits', 32, name)['worst_over_before']['median']:#.3g}"
        for name in ("ours", "ours-jax", "upstream-0", "radam", "optax")
    )
    assert numbers("python -m benchmarks resume") == (
        ours,
        f"`schedulefree` AdamW {adamw}, RAdam {radam}; `optax.contrib` {optax}",
    )
    assert jax == ours


def test_the_numbers_of_one_run_and_of_three_cosines_are_the_measured_ones():
    swept = {(row["problem"], row["method"]): row for row in results("quality") if row["part"] == "sweep"}
    free, cosines = (
        swept["fashion", "sf-adamw"],
        [swept[name, "adamw-cosine"] for name in ("fashion-quarter", "fashion-half", "fashion")],
    )
    at = [free["points"].index(cosine["steps"]) for cosine in cosines]
    assert numbers("python -m benchmarks quality") == (
        ", ".join(f"{free['chosen']['mean'][point]:.3f}" for point in at),
        "AdamW, a cosine tuned for each: "
        + ", ".join(f"{cosine['chosen']['mean'][-1]:.3f}" for cosine in cosines),
    )


def test_the_numbers_of_bfloat16_are_the_measured_ones():
    ratio = {row["label"]: row["ratio"]["median"] for row in results("precision") if (row["lr"] == 3e-3)}
    ours = f"{ratio['bfloat16, exact']:.2f}"
    assert numbers("python -m benchmarks precision") == (
        ours,
        f"`schedulefree` {ratio['schedulefree, bfloat16']:.0f}; "
        f"`optax.contrib` {ratio['optax.contrib, bfloat16']:.1f}",
    )
    assert f"{ratio['bfloat16, exact (JAX)']:.2f}" == ours


def test_the_numbers_of_the_suite_are_those_of_the_matrix():
    page = (ROOT / "docs" / "conformance.md").read_text()
    cells = dict(re.findall(r"^\| ([\w. ]+?) \|(.*)\|$", page, re.MULTILINE))

    def largest(program: str) -> float:
        rows = [row for name, row in cells.items() if name.startswith(program)]
        return max(float(error) for row in rows for error in re.findall(r"\d+e[-+]\d+", row))

    assert "NaN" in cells["optax.contrib 0.2.8"]
    assert numbers("python -m parity_tests") == (
        f"{max(largest('sfjax'), largest('sftorch')):.0e}",
        f"`schedulefree` {largest('schedulefree'):.0e}; "
        f"`optax.contrib` {largest('optax.contrib'):g}, and NaN at b1 = 0",
    )


def test_every_kill_of_the_storm_left_the_same_bits():
    found = [row for row in results("storm") if "kills" in row]
    assert all(row["same bits"] for row in found)
    assert f"{sum(row['kills'] for row in found):,} kills" in section("In numbers")
    assert all(row["problems"] == [] for row in results("storm") if "programs" in row)


def test_every_link_is_absolute_as_on_pypi_and_its_file_is_there():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert [link for link in links if not link.startswith("https://")] == []
    ours = [
        link.removeprefix(REPOSITORY).removeprefix(PICTURES)
        for link in links
        if "/schedulefree-twin/" in link
    ]
    assert len(ours) > 15
    assert [path for path in ours if not (ROOT / path.partition("#")[0]).is_file()] == []
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert [picture.startswith(PICTURES) for picture in pictures] == [True]


def test_pypi_shows_it_as_it_is_meant():
    shown = markdown.render(README)
    assert re.search(rf'<img [^>]*src="{PICTURES}', shown)
    assert shown.count("<table>") == 2
    assert "<!--" not in README


def test_ci_reads_the_test_command_from_the_readme():
    commands = re.findall(r"^pip install .* && pytest$", README, re.MULTILINE)
    assert commands == ["pip install -c constraints.txt -e '.[test]' && pytest"]
