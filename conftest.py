"""For every test: --fast, JAX that compiles quickly and once, and skips where there is no C compiler."""

from __future__ import annotations

import os
import re
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

# Their subject is the native kernel; the names of the others say "fused".
_NATIVE = ("test_native.py", "test_fused.py")

# What JAX compiles is kept for other tests, their processes, the other worker and the next session: for a
# week, or until --cache-clear. Set here, because JAX reads it when a package's conftest.py imports it.
_COMPILED = Path(__file__).parent / ".pytest_cache" / "d" / "jax-compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
for _file in _COMPILED.glob("*"):
    if _file.stat().st_mtime < time.time() - 7 * 24 * 3600:
        _file.unlink(missing_ok=True)
# The tensors are tiny, and threads that wait for each other cost four times the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# XLA's default options, and those that compile the same arithmetic in a third of the time: it runs
# slower, which the few tiny steps of a test do not feel.
_USUAL = {
    "xla_backend_optimization_level": 3,
    "xla_cpu_parallel_codegen_split_count": 32,
    "xla_cpu_use_fusion_emitters": True,
}
_QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_use_fusion_emitters=false"
)


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--fast", action="store_true", help="leave out the files that pyproject.toml calls long")
    parser.addini("long", "patterns of the files that --fast leaves out", type="linelist")


def pytest_ignore_collect(collection_path: Path, config: Any) -> bool | None:
    if not config.getoption("--fast"):
        return None
    path = collection_path.relative_to(config.rootpath).as_posix()
    return any(fnmatch(path, pattern) for pattern in config.getini("long")) or None


def pytest_configure(config: Any) -> None:
    gone = [pattern for pattern in config.getini("long") if not any(config.rootpath.glob(pattern))]
    if gone:
        raise pytest.UsageError(f"long in pyproject.toml must name files that there are, got {gone}")
    # Slow tests compile as users do, and so do modules that are marked `optimized`.
    if "not slow" in config.option.markexpr:
        os.environ.setdefault("XLA_FLAGS", _QUICK)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: Any) -> None:
    optimized = item.get_closest_marker("optimized") is not None
    if optimized is not _Compiler.optimized:
        _Compiler.switch(optimized)
    about_it = item.path.name in _NATIVE and "compiler" not in item.name
    # Not "refused": that is what most tests of bad input say.
    if about_it or re.search(r"(?<![a-z])fused", item.name):
        from sfcore.native import build

        kernel = build.find()
        if isinstance(kernel, str):
            pytest.skip(kernel)


class _Compiler:
    """How JAX compiles here: quickly, or as it does for users while tests run that are marked `optimized`."""

    optimized = False
    patch = pytest.MonkeyPatch()

    @classmethod
    def switch(cls, optimized: bool) -> None:
        cls.optimized = optimized
        cls.patch.undo()
        if os.environ.get("XLA_FLAGS") != _QUICK:
            return  # all compile as users do
        import jax
        from jax._src import compiler

        quick = compiler.get_compile_options

        def usual(*args: Any, env_options_overrides: Any = None, **kwargs: Any) -> Any:
            return quick(*args, env_options_overrides=_USUAL | (env_options_overrides or {}), **kwargs)

        if optimized:
            cls.patch.setattr(compiler, "get_compile_options", usual)
            cls.patch.delenv("XLA_FLAGS")  # for the processes that they start
        jax.clear_caches()  # what the others compiled
