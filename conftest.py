"""For every test: --fast, JAX that compiles a program once, and skips where there is no C compiler."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

# Their subject is the native kernel; the names of the others say "fused".
_NATIVE = ("test_native.py", "test_fused.py")
_COMPILED = "JAX_COMPILATION_CACHE_DIR"


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--fast", action="store_true", help="leave out the files that pyproject.toml calls long")
    parser.addini("long", "patterns of the files that --fast leaves out", type="linelist")


def pytest_ignore_collect(collection_path: Path, config: Any) -> bool | None:
    if not config.getoption("--fast"):
        return None
    path = collection_path.relative_to(config.rootpath).as_posix()
    return any(fnmatch(path, pattern) for pattern in config.getini("long")) or None


def pytest_configure(config: Any) -> None:
    """Lets tests that compile the same program, here or in a process of their own, share what was compiled.

    For this session, unless the user names a folder; one for each worker, because JAX does not lock it.
    """
    gone = [pattern for pattern in config.getini("long") if not any(config.rootpath.glob(pattern))]
    if gone:
        raise pytest.UsageError(f"long in pyproject.toml must name files that there are, got {gone}")
    if _COMPILED not in os.environ:
        os.environ[_COMPILED] = folder = tempfile.mkdtemp(prefix="jax-compiled-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ[_COMPILED] = str(Path(os.environ[_COMPILED], os.environ["PYTEST_XDIST_WORKER"]))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # The tensors are tiny, and threads that wait for each other cost four times the time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item: Any) -> None:
    about_it = item.path.name in _NATIVE and "compiler" not in item.name
    # Not "refused": that is what most tests of bad input say.
    if about_it or re.search(r"(?<![a-z])fused", item.name):
        from sftorch.kernels import build

        kernel = build.find()
        if isinstance(kernel, str):
            pytest.skip(kernel)
