"""Real trainers on two processes: interrupted runs end in the same bits and ship x."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "accelerate", "accelerate_fsdp2", "lightning"])
def test_on_two_processes_a_run_is_resumed_in_the_same_bits(kind, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "sftorch.tests.trainer_runs", str(tmp_path), kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    for rank in (0, 1):
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert facts.pop("processes") == 2
        assert facts == dict.fromkeys(facts, True)
        assert len(facts) == 3
