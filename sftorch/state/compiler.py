"""What torch.compile passes over, without importing it.

`torch.compiler.disable` imports the compiler at once, for several seconds that only those who compile should
pay. So functions are noted here, and disabled as soon as somebody has imported it, before it can see them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch

_NAME = "torch._dynamo"
_noted: list[tuple[Callable[..., Any], bool]] = []

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F, recursive: bool = True) -> F:
    """Marks a function or a method that runs as it is under torch.compile, with all that it calls.

    It must be looked up by its name at every call: another function will stand there.
    """
    if _NAME in sys.modules:
        disabled: F = torch.compiler.disable(function, recursive)  # type: ignore[no-untyped-call]
        return disabled
    _noted.append((function, recursive))
    return function


def uncompiled_itself(function: F) -> F:
    """The same, but what it calls is compiled; this must be the only decorator."""
    return uncompiled(function, recursive=False)


def without_compiler(method: F) -> F:
    """Returns a method of torch.optim.Optimizer below the decorator that imports the compiler when called."""
    lazily = getattr(torch, "_disable_dynamo", None)
    code = getattr(method, "__code__", None)
    if lazily is not None and code is lazily(without_compiler).__code__:
        below: F = method.__wrapped__  # type: ignore[attr-defined]
        return below
    return method


def _disable_noted() -> None:
    while _noted:
        function, recursive = _noted.pop()
        *owners, name = function.__qualname__.split(".")
        owner = functools.reduce(getattr, owners, sys.modules[function.__module__])
        setattr(owner, name, torch.compiler.disable(getattr(owner, name), recursive))  # type: ignore[no-untyped-call]


class _Finder(MetaPathFinder):
    """Finds the compiler where the others do, and lets it pass over what was noted once it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _NAME:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((one for one in found if one is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _disable_noted()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _NAME not in sys.modules:
    sys.meta_path.insert(0, _Finder())
