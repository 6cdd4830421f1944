"""For every test: what a machine without a C compiler cannot run is skipped, with the reason."""

from __future__ import annotations

import re
from typing import Any

import pytest

# Their subject is the native kernel; the names of the others say "fused".
_FILES = ("test_native.py", "test_fused.py")


def pytest_runtest_setup(item: Any) -> None:
    about_it = item.path.name in _FILES and "compiler" not in item.name
    # Not "refused": that is what most tests of bad input say.
    if about_it or re.search(r"(?<![a-z])fused", item.name):
        from sftorch.kernels import build

        kernel = build.find()
        if isinstance(kernel, str):
            pytest.skip(kernel)
