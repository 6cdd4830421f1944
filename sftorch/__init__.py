"""Schedule-Free optimizers for PyTorch, a drop-in for the `schedulefree` package.

The parameters hold y while training; `optimizer.eval()` puts the average x into them, which is what
to evaluate, save and ship; `optimizer.train()` puts y back, bit for bit. `ship_x(model, optimizer)` makes
`model.state_dict()` give x whatever mode the optimizer is in. `sftorch.checkpoint`,
`sftorch.recalibrate` and `sftorch.trainers` are imported when they are first used.
"""

from __future__ import annotations

import sys as _sys
from typing import TYPE_CHECKING

from sfcore import __version__ as __version__
from sfcore.lazy import on_demand as _on_demand

try:
    from torch import __version__ as _torch_version

    # The first whose optimizers take named parameters; what we call of torch is there since 2.5. A vendor's
    # build of it calls itself 2.6.0a0. torch compares versions, not letters.
    if _torch_version < "2.6.0a0":
        raise ImportError(f"torch {_torch_version}")
except ImportError as error:
    raise ImportError(
        f"sftorch needs torch >= 2.6, got {error}: pip install 'schedulefree-twin[torch]'"
    ) from error

from sftorch import adamw, closure, radam, schedule_free, sgd
from sftorch.adamw import AdamWScheduleFree
from sftorch.closure import (
    AdamWScheduleFreeClosure,
    MuonScheduleFreeClosure,
    RAdamScheduleFreeClosure,
    SGDScheduleFreeClosure,
)
from sftorch.gpa import GPAAdamW
from sftorch.in_backward import step_in_backward
from sftorch.muon import MuonScheduleFree
from sftorch.plus import AdamCScheduleFreePlusPaper
from sftorch.radam import RAdamScheduleFree
from sftorch.schedule_free import ScheduleFreeWrapper
from sftorch.sgd import SGDScheduleFree
from sftorch.shipping import ship_x

__all__ = [
    "AdamCScheduleFreePlusPaper",
    "AdamWScheduleFree",
    "AdamWScheduleFreeClosure",
    "GPAAdamW",
    "MuonScheduleFree",
    "MuonScheduleFreeClosure",
    "RAdamScheduleFree",
    "RAdamScheduleFreeClosure",
    "SGDScheduleFree",
    "SGDScheduleFreeClosure",
    "ScheduleFreeWrapper",
    "ship_x",
    "step_in_backward",
]

# The paths of schedulefree: `from sftorch.adamw_schedulefree import AdamWScheduleFree`.
for _module, *_paths in (
    (adamw, "adamw_schedulefree"),
    (radam, "radam_schedulefree"),
    (sgd, "sgd_schedulefree"),
    (schedule_free, "wrap_schedulefree"),
    (closure, "adamw_schedulefree_closure", "radam_schedulefree_closure", "sgd_schedulefree_closure"),
):
    for _path in _paths:
        _sys.modules[f"{__name__}.{_path}"] = globals()[_path] = _module

if TYPE_CHECKING:
    from sftorch import checkpoint as checkpoint
    from sftorch import recalibrate as recalibrate
    from sftorch import trainers as trainers
else:  # a type checker would take it for leave to use any name
    __getattr__, __dir__ = _on_demand(globals(), ("checkpoint", "recalibrate", "trainers"))
