"""What both twins share without a framework: hyperparameter rules and their errors. NumPy only.

Its modules, such as `sfcore.plan` and `sfcore.preemption`, are imported when they are first used.
"""

import sys

# Before all that older interpreters cannot read, and in words that they can.
if sys.version_info < (3, 10):  # noqa: UP036
    raise ImportError("schedulefree-twin needs Python 3.10 or newer, got " + sys.version.split()[0])

from typing import TYPE_CHECKING

from sfcore.checks import HyperparameterError
from sfcore.lazy import on_demand as _on_demand

__all__ = ["HyperparameterError", "__version__"]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from sfcore import changes as changes
    from sfcore import convert as convert
    from sfcore import exchange as exchange
    from sfcore import hyperparameters as hyperparameters
    from sfcore import inspection as inspection
    from sfcore import meta as meta
    from sfcore import names as names
    from sfcore import plan as plan
    from sfcore import preemption as preemption
    from sfcore import restart as restart
    from sfcore import watch as watch
else:  # a type checker would take it for leave to use any name
    __getattr__, __dir__ = _on_demand(
        globals(),
        (
            *("changes", "convert", "exchange", "hyperparameters", "inspection", "meta"),
            *("names", "plan", "preemption", "restart", "watch"),
        ),
    )
