"""Where a framework or a peer is not installed, its drivers are skipped, with the reason."""

from __future__ import annotations

from collections.abc import Generator

import pytest

_PACKAGES = ("jax", "pytorch_optimizer", "schedulefree", "torch")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Skips a test whose driver could not be imported."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name in _PACKAGES:
            pytest.skip(f"needs {error.name}, which is not installed")
        raise
