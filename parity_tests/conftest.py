"""Where a framework or a peer is not installed, its drivers are skipped, with the reason."""

from __future__ import annotations

from collections.abc import Generator

import pytest

_PACKAGES = ("jax", "pytorch_optimizer", "schedulefree", "torch")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    """Skips a test that looks for the kernel of a twin that is not there."""
    yield from _skipped_without()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Skips a test whose driver could not be imported."""
    yield from _skipped_without()


def _skipped_without() -> Generator[None, None, None]:
    try:
        yield
    except ImportError as error:
        cause: BaseException | None = error  # the twins say in their own words what they need
        while cause:
            if isinstance(cause, ModuleNotFoundError) and cause.name in _PACKAGES:
                pytest.skip(f"needs {cause.name}, which is not installed")
            cause = cause.__cause__
        raise
