"""Stopping and resuming in JAX: checkpoints that know what they hold, on Orbax.

`Checkpoints` saves and restores; `start_from_weights` begins with weights alone; `import_optax` takes over
the state of other optimizers; `export_exchange` and `import_exchange` speak with the torch twin.
"""

import re

# Before anything is compiled, not in the first save: it adds to what JAX compiles every function by.
try:
    import ml_dtypes  # noqa: F401
    import orbax.checkpoint

    if tuple(map(int, re.findall(r"\d+", orbax.checkpoint.__version__)[:3])) < (0, 11, 36):
        raise ImportError(f"orbax-checkpoint {orbax.checkpoint.__version__}")
except ImportError as error:
    raise ImportError(
        f"sfjax.checkpoint needs orbax-checkpoint >= 0.11.36 and ml_dtypes, got {error}: "
        "pip install -U 'schedulefree-twin[jax]'"
    ) from error

from sfcore.changes import Change
from sfcore.exchange import CheckpointError
from sfjax.checkpoint._checkpoints import Checkpoints
from sfjax.checkpoint._exchange import export_exchange, import_exchange, read
from sfjax.checkpoint._importers import import_optax
from sfjax.checkpoint._restore import Restored
from sfjax.checkpoint._weights import start_from_weights

__all__ = [
    "Change",
    "CheckpointError",
    "Checkpoints",
    "Restored",
    "export_exchange",
    "import_exchange",
    "import_optax",
    "read",
    "start_from_weights",
]
