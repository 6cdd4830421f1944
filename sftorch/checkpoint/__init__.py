"""Stopping and resuming in torch: one call saves x for inference and the state for an exact resume.

`Checkpoints` saves and restores; `import_state_dict` takes over the state of other optimizers.
"""

from sfcore.exchange import CheckpointError
from sfcore.store import Skipped
from sftorch.checkpoint._checkpoints import Checkpoints, Restored
from sftorch.checkpoint._importers import import_state_dict

__all__ = ["CheckpointError", "Checkpoints", "Restored", "Skipped", "import_state_dict"]
