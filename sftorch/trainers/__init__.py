"""sftorch inside the trainers that people use: `hf` for transformers, `lightning` for Lightning.

Each framework is imported by its own module only, when that is first used. accelerate needs nothing but
`unwrap`; sd-scripts (Kohya_SS) needs nothing, see docs/kohya.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfcore.lazy import on_demand as _on_demand
from sftorch.trainers._unwrap import unwrap

__all__ = ["unwrap"]

if TYPE_CHECKING:
    from sftorch.trainers import hf as hf
    from sftorch.trainers import lightning as lightning
else:  # a type checker would take it for leave to use any name
    __getattr__, __dir__ = _on_demand(globals(), ("hf", "lightning"))
