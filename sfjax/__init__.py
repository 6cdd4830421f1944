"""Schedule-Free optimizers as Optax gradient transformations, a drop-in for `optax.contrib`'s.

The parameters hold y while training; `schedule_free_eval_params(opt_state, params)` is the average x,
which is what to evaluate, save and ship. `sfjax.checkpoint`, `sfjax.linen`, `sfjax.nnx` and
`sfjax.recalibrate` are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfcore import __version__ as __version__
from sfcore.lazy import on_demand as _on_demand

try:
    import jax as _jax
    import optax as _optax

    if _jax.__version_info__ < (0, 6, 1) or not hasattr(_optax, "tree"):  # which optax has since 0.2.5
        raise ImportError(f"jax {_jax.__version__} and optax {_optax.__version__}")
except ImportError as error:
    raise ImportError(
        f"sfjax needs jax >= 0.6.1 and optax >= 0.2.5, got {error}: pip install -U 'schedulefree-twin[jax]'"
    ) from error

from sfjax.accumulate import Accumulation, accumulate
from sfjax.adamw import schedule_free_adamw
from sfjax.gpa import generalized_primal_averaging
from sfjax.muon import schedule_free_muon
from sfjax.plus import ScheduleFreePlusState, schedule_free_plus
from sfjax.radam import schedule_free_radam
from sfjax.schedule_free import ScheduleFreeState, schedule_free
from sfjax.sgd import schedule_free_sgd
from sfjax.state.arguments import describe
from sfjax.state.find import find_state, find_states, iterates, metrics, schedule_free_eval_params
from sfjax.step.transformation import Transformation, chain

__all__ = [
    "Accumulation",
    "ScheduleFreePlusState",
    "ScheduleFreeState",
    "Transformation",
    "accumulate",
    "chain",
    "describe",
    "find_state",
    "find_states",
    "generalized_primal_averaging",
    "iterates",
    "metrics",
    "schedule_free",
    "schedule_free_adamw",
    "schedule_free_eval_params",
    "schedule_free_muon",
    "schedule_free_plus",
    "schedule_free_radam",
    "schedule_free_sgd",
]

if TYPE_CHECKING:
    from sfjax import checkpoint as checkpoint
    from sfjax import linen as linen
    from sfjax import nnx as nnx
    from sfjax import recalibrate as recalibrate
else:  # a type checker would take it for leave to use any name
    __getattr__, __dir__ = _on_demand(globals(), ("checkpoint", "linen", "nnx", "recalibrate"))
