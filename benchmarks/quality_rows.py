"""What a job of `benchmarks quality` measures: a row's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks._records import digits

if TYPE_CHECKING:
    from benchmarks.quality import Job, Row
    from benchmarks.quality_problems import Problem

SHORT = 100  # steps of a twin's short run
CLOSE = 1e-3  # how far apart the twins may be after them, as a share of the loss


def number(value: float) -> float | None:
    """Returns a loss as JSON has it: None where the run diverged."""
    return digits(value) if np.isfinite(value) else None


def standard_error(values: np.ndarray) -> float:
    """Returns that of the mean of what the seeds gave."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def sweep(job: Job, swept: Row | None) -> Row:
    """Returns the losses of every rate, and of the one with the least mean validation loss at the end.

    `points` are steps; of each, `validation`, `test` and `error` are means over seeds for each rate. `chosen`
    has the test losses seed by seed, and `edge` if its rate is the least or the largest that was tried.
    """
    from benchmarks import quality_jax

    steps = job.problem.steps
    points = sorted({min(SHORT, steps), steps // 4, steps // 2, steps})
    found = quality_jax.sweep(job.problem, job.method, job.rates, range(job.seeds), points)
    finite = np.where(np.isfinite(found.validation), found.validation, np.inf)
    best = int(np.argmin(finite[-1].mean(0)))
    test = found.test[:, :, best]
    chosen = {
        "rate": job.rates[best],
        "edge": best in (0, len(job.rates) - 1),
        "validation": number(found.validation[-1, :, best].mean()),
        "test": [[number(one) for one in of_point] for of_point in test],
        "mean": [number(of_point.mean()) for of_point in test],
        "se": [number(standard_error(of_point)) for of_point in test],
        "error": [number(of_point.mean()) for of_point in found.error[:, :, best]],
        "error_se": [number(standard_error(of_point)) for of_point in found.error[:, :, best]],
    }
    return {
        "points": points,
        "validation": [number(one) for one in found.validation[-1].mean(0)],
        "test": [number(one) for one in found.test[-1].mean(0)],
        "chosen": chosen,
    }


def curve(job: Job, swept: Row | None) -> Row:
    """Returns the mean test loss along the run, and its standard error."""
    from benchmarks import quality_jax

    points = list(range(50, job.problem.steps + 1, 50))
    test = quality_jax.sweep(job.problem, job.method, job.rates, range(job.seeds), points).test[:, :, 0]
    return {
        "points": points,
        "mean": [digits(one) for one in test.mean(1)],
        "se": [digits(standard_error(one)) for one in test],
    }


def twin(job: Job, swept: Row | None) -> Row:
    """Returns the test losses of both twins, after the first steps of one seed, and at the end of all seeds.

    Close is: within CLOSE of each other after the short run, and within a standard error at the end. Where a
    run makes much of roundings, it is that each seed's runs in float64 end within CLOSE of each other: that
    tells roundings from a difference between the twins.
    """
    import torch

    from benchmarks import quality_jax

    assert swept is not None
    torch.set_num_threads(1)
    short = min(SHORT, job.problem.steps)
    jax = float(quality_jax.sweep(job.problem, job.method, job.rates, [0], [short]).test[0, 0, 0])
    first = _replayed(job, job.problem, [0], short)[0]
    apart = abs(first - jax) / abs(jax)
    ends = _replayed(job, job.problem, range(job.seeds), job.problem.steps)
    mean, se = swept["chosen"]["mean"][-1], swept["chosen"]["se"][-1]
    torch_mean = float(ends.mean())
    row: Row = {
        "short": {"steps": short, "jax": digits(jax), "torch": digits(first), "apart": digits(apart)},
        "full": {"jax": mean, "se": se, "torch": digits(torch_mean), "seeds": [digits(one) for one in ends]},
        "close": bool(apart <= CLOSE and abs(torch_mean - mean) <= se),
    }
    if not row["close"]:
        row["float64"] = _exact(job)
        row["close"] = row["float64"]["apart"] <= CLOSE
    return row


def _replayed(job: Job, problem: Problem, seeds: Sequence[int], steps: int) -> np.ndarray:
    """Returns torch's test losses."""
    from benchmarks import quality_torch

    (rate,) = job.rates
    return np.array([quality_torch.replay(problem, job.method, rate, seed, steps) for seed in seeds])


def _exact(job: Job) -> Row:
    """Returns both twins' test losses at the end, seed by seed, of runs in float64."""
    import jax

    from benchmarks import quality_jax

    problem, seeds = job.problem._replace(dtype="float64"), range(job.seeds)
    with jax.enable_x64(True):
        ends = quality_jax.sweep(problem, job.method, job.rates, seeds, [problem.steps]).test[0, :, 0]
    again = _replayed(job, problem, seeds, problem.steps)
    apart = np.max(np.abs(again - ends) / np.abs(ends))
    return {
        "jax": [digits(one) for one in ends],
        "torch": [digits(one) for one in again],
        "apart": digits(apart),
    }


MEASURES: dict[str, Callable[[Any, Any], Any]] = {
    "sweep": sweep,
    "sensitivity": sweep,
    "batch": sweep,
    "curve": curve,
    "twin": twin,
}
