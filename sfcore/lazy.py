"""Submodules that are imported when they are first used (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def on_demand(module: dict[str, Any], names: Sequence[str]) -> tuple[Callable[[str], Any], Callable[[], Any]]:
    """Returns `__getattr__` and `__dir__` of a package whose submodules are imported at their first use.

    Args:
        module: `globals()` of the package.
        names: the submodules.
    """
    package = module["__name__"]

    def getattribute(name: str) -> Any:
        if name in names:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return getattribute, lambda: sorted({*module, *names})
