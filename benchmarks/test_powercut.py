"""The short form of the power cuts and of overlapping jobs, and that each sees what it looks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import powercut
from benchmarks.powercut import MKDIR, SYNC

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="recording needs Linux")


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_power_cut_after_any_operation_loses_nothing_that_was_promised(framework, tmp_path):
    root, operations = powercut.record(framework, 6, 1, tmp_path)
    found = powercut.replay(operations, 0)
    assert found["acknowledged"] in (4, 5, 6)  # some saves are not waited for
    assert found["problems"] == []
    disk = powercut.Disk()
    for one in operations:
        disk.take(one)
    assert disk.tree(powercut.NOW) == powercut.on_disk(root)  # it has seen all that was done
    # The same run, had it synced no file, or no folder.
    folders = {one.path for one in operations if one.kind == MKDIR}
    for are_folders in (True, False):
        kept = [one for one in operations if one.kind != SYNC or (one.path in folders) != are_folders]
        assert powercut.replay(kept, 0, draws=0)["problems"] != []


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_jobs_that_overlap_lose_nothing_and_one_of_two_is_refused(framework, tmp_path):
    # A process of its own, because it forks, which it must not do where JAX has run already.
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "overlap", "--framework", framework]
    done = subprocess.run(
        [*command, "--trials", "3", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "overlap.jsonl").read_text().splitlines()]
    assert [(row.get("waited"), row.get("refused"), row.get("took over")) for row in rows] == [
        (3, None, None),
        (None, 3, None),
        (None, None, 3),
    ]


@pytest.mark.slow
def test_without_the_lock_two_jobs_are_seen_to_overlap():
    program = (
        "import sys; from sfcore import lock; lock.WriterLock.take = lambda self: None\n"
        "from benchmarks import overlap\n"
        "sys.exit(overlap.main(['--framework', 'torch', '--kind', 'pair', '--trials', '2']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the jobs ended: " in done.stdout
