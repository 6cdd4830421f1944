"""What a job of `benchmarks quality` measures: a row's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks._records import digits

if TYPE_CHECKING:
    from benchmarks.quality import Job, Row

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

    Close is: within CLOSE of each other after the short run, and within a standard error at the end.
    """
    import torch

    from benchmarks import quality_jax, quality_torch

    assert swept is not None
    torch.set_num_threads(1)
    (rate,) = job.rates
    short = min(SHORT, job.problem.steps)

    def replayed(seed: int, steps: int) -> float:
        return quality_torch.replay(job.problem, job.method, rate, seed, steps)

    jax = float(quality_jax.sweep(job.problem, job.method, [rate], [0], [short]).test[0, 0, 0])
    first = replayed(0, short)
    apart = abs(first - jax) / abs(jax)
    ends = np.array([replayed(seed, job.problem.steps) for seed in range(job.seeds)])
    mean, se = swept["chosen"]["mean"][-1], swept["chosen"]["se"][-1]
    torch_mean = float(ends.mean())
    return {
        "short": {"steps": short, "jax": digits(jax), "torch": digits(first), "apart": digits(apart)},
        "full": {"jax": mean, "se": se, "torch": digits(torch_mean), "seeds": [digits(one) for one in ends]},
        "close": bool(apart <= CLOSE and abs(torch_mean - mean) <= se),
    }


MEASURES: dict[str, Callable[[Any, Any], Any]] = {
    "sweep": sweep,
    "sensitivity": sweep,
    "batch": sweep,
    "curve": curve,
    "twin": twin,
}
