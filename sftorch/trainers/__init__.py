"""sftorch inside the trainers that people use: `hf` for transformers, `lightning` for Lightning.

Each framework is imported by its own module only, when that is first used. accelerate needs nothing but
`unwrap`; sd-scripts (Kohya_SS) needs nothing, see docs/kohya.md.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from sftorch.trainers._unwrap import unwrap

__all__ = ["unwrap"]

_ON_DEMAND = ("hf", "lightning")

if TYPE_CHECKING:
    from sftorch.trainers import hf as hf
    from sftorch.trainers import lightning as lightning
else:  # a type checker would take it for leave to use any name

    def __getattr__(name):
        if name in _ON_DEMAND:
            return _import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *_ON_DEMAND})
