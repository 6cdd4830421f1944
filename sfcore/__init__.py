"""What both twins share without a framework: hyperparameter rules and their errors. NumPy only."""

from sfcore.checks import HyperparameterError

__all__ = ["HyperparameterError", "__version__"]
__version__ = "0.1.0"
