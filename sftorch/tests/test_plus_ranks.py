"""Polyak steps on two processes: replicas stay equal, and shards take the steps of replicas."""

from __future__ import annotations

import numpy as np
import pytest

from sftorch.tests.launcher import Launcher


@pytest.fixture(scope="module")
def launcher():
    with Launcher("sftorch.tests.rank_runs") as found:
        yield found


def test_replicas_are_bit_equal_after_100_polyak_steps(launcher, tmp_path):
    first, second = launcher.run(2, "polyak", tmp_path, "ddp")
    assert first == second
    # As upstream's, which takes the loss of its own rank, are not.
    first, second = launcher.run(2, "polyak", tmp_path, "ddp", False)
    assert first != second


@pytest.mark.slow
def test_shards_take_the_steps_of_replicas(launcher, tmp_path):
    replicas, _ = launcher.run(2, "polyak", tmp_path, "ddp")
    shards, others = launcher.run(2, "polyak", tmp_path, "fsdp")
    assert shards == others
    for mine, theirs in zip(shards, replicas, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)
