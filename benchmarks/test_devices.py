"""The benchmark of many devices: everybody is timed beside a local run, and collectives are counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import devices
from sfcore.native import build

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(isinstance(build.find(), str), reason="fused steps need a C compiler")
def test_everybody_steps_in_parts_beside_a_local_run():
    # A process of its own, because it forks, which it must not do where JAX has run already.
    code = """
import json
from benchmarks import devices
devices.TREES["few"] = [(7, 3), (1,)]
print(json.dumps(devices.measure("few", 2, rounds=2, seed=0)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    steps = {row["name"]: row for row in rows if row["what"] == "step"}
    assert steps.keys() == devices.makers().keys()
    assert {row["collectives"] for row in steps.values()} == {0}
    assert {row["n"] for row in rows} == {2}
    assert all(row["over_local"]["median"] > 0 for row in rows)
    flips = [row for row in rows if row["what"] == "flips" and row["name"].startswith("sftorch")]
    assert [row["collectives"] for row in flips] == [1, 1]
    lines = devices.markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[2].startswith(f"| **{devices.OURS}** | 2, 2 | step | ")


def test_collectives_are_told_from_other_instructions():
    from benchmarks.devices_jax import collectives

    text = "%a = f32[2] all-reduce(%b), to_apply=%add\n%c = f32[2] fusion(%all-reduce.1)\n"
    assert collectives(text + "%d = f32[2] all-gather-start(%a)\n") == 2
