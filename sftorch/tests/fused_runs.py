"""What the tests of the fused steps share: cases, and the comparison with the specification."""

from __future__ import annotations

import copy

import numpy as np
import torch

from sftorch.kernels import call
from sftorch.law import iterates
from sftorch.law.iterates import as_real
from sftorch.tests.plain import STEP_SIZE, feed, same_bits, some_grads, some_params

BUFFERS = ("z", "x", "exp_avg_sq", "exp_avg", "y_rest", "x_rest")
VARIANTS = {
    "sgd": [{}],
    "adamw": [{}, {"inner_momentum": 0.8}],
    "radam": [{}, {"silent_sgd_phase": False}],
}
CASES = [(kind, options) for kind, listed in VARIANTS.items() for options in listed]
SHAPES = [(1003,), (3, 5), (0,), (), (40_000,)]
SPECIAL = [np.inf, -np.inf, np.nan, 1e-39, -1e-45, 0.0, -0.0, 1e30, 5e-324]


class Calls:
    """Counts the tensors that the native kernel steps or flips, and those that other paths step.

    Args:
        replace: (owner, name, function) -> None, as of pytest's monkeypatch.
    """

    def __init__(self, replace=setattr):
        self.kernel = self.single = self.foreach = 0
        run = call.Job.run

        def counting(job, tables, *rest, **options):
            found = run(job, tables, *rest, **options)
            self.kernel += job.count
            return found

        replace(call.Job, "run", counting)
        for name in ("advance", "average"):
            for path, count in (("single", lambda y: 1), ("foreach", len)):
                full = f"{name}_{path}_"
                replace(iterates, full, self._counting(getattr(iterates, full), path, count))

    def _counting(self, function, path, count):
        def counting(ys, *rest):
            setattr(self, path, getattr(self, path) + count(ys))
            return function(ys, *rest)

        return counting

    def taken(self):
        """Returns the tensors of the kernel and of the other paths since the last call."""
        found = (self.kernel, self.single + self.foreach)
        self.kernel = self.single = self.foreach = 0
        return found


def same(a, b):
    """Tells whether tensors are equal bit for bit, but for what a NaN carries."""
    a, b = (as_real(t.detach()) for t in (a, b))
    if a.is_floating_point():
        a, b = (torch.where(t.isnan(), torch.full_like(t, torch.nan), t) for t in (a, b))
    return same_bits([a], [b])


def special_run(dtype, shapes):
    """Returns parameters and the gradients of seven steps, with numbers of every kind in the first ones."""
    params = some_params(dtype, shapes)
    grads = some_grads(7, params)
    special = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    for of_step in grads[1::2]:
        of_step[0][: len(SPECIAL)] = special
    with torch.no_grad():
        params[0][20 : 20 + len(SPECIAL)] = special
    return params, grads


def everything(optimizer, params):
    states = [optimizer.state[p] for p in params]
    return [*params, *(state[name] for state in states for name in BUFFERS if name in state)]


def assert_fused_is_single(make, params, grads, **options):
    """Runs both paths from the same start on the same gradients, and compares all tensors bit for bit."""
    runs = []
    for path in ({"fused": True}, {"fused": False, "foreach": False}):
        own = copy.deepcopy(params)
        optimizer = make(own, lr=STEP_SIZE, **options, **path)
        feed(optimizer, own, grads)
        runs.append(everything(optimizer, own))
    assert len(runs[0]) == len(runs[1]) > len(params)
    for i, (a, b) in enumerate(zip(*runs, strict=True)):
        assert same(a, b), f"tensor {i} of {len(runs[0])}"
