"""What both twins share without a framework: hyperparameter rules and their errors. NumPy only."""

import sys

# Before all that older interpreters cannot read, and in words that they can.
if sys.version_info < (3, 10):  # noqa: UP036
    raise ImportError("schedulefree-twin needs Python 3.10 or newer, got " + sys.version.split()[0])

from sfcore.checks import HyperparameterError

__all__ = ["HyperparameterError", "__version__"]
__version__ = "0.1.0"
