"""Every test of sfjax runs with strict dtype promotion, so that no scalar widens or narrows a leaf unseen."""

from collections.abc import Iterator

import jax
import pytest

from sfjax.tests.runs import float64


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    """Makes JAX refuse to mix dtypes, in this package's tests only."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """Computes in float64, where a right formula agrees to 1e-12."""
    with float64():
        yield


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """Lets dtypes mix, as optax's own MultiSteps, adam and bias correction do."""
    with jax.numpy_dtype_promotion("standard"):
        yield
