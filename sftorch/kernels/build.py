"""Builds the kernel with the machine's C compiler at first use, and keeps it in the user's cache folder.

So one wheel of plain Python serves every version of Python and torch, and installing compiles nothing.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = (HERE / "step.c", HERE / "arithmetic.h")
# The last two change no value: they allow roots and comparisons in vectors.
FLAGS = ["-std=c11", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
SECONDS = 60


class Unavailable(Exception):
    """There is no kernel; the message says why and what to do."""


@functools.cache
def find() -> ctypes.CDLL | str:
    """Returns the kernel, or why there is none; built at most once a machine and user.

    Example:
        >>> from sftorch.kernels import build
        >>> build.find() is build.find()
        True
    """
    name = f"step-{_key()}.so"
    folder = cache_folder()
    try:
        return ctypes.CDLL(str(folder / name))
    except OSError:
        pass  # not there yet
    try:
        return _build(name, folder)
    except Unavailable as why:
        return str(why)


@functools.cache
def give_notice(why: str) -> None:
    """Logs, once a process, that steps take the slower path."""
    logging.getLogger("sftorch").warning(
        "the fused CPU step is not available, and steps take the foreach path: %s", why
    )


def cache_folder() -> Path:
    """Returns where kernels are kept: schedulefree-twin under XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "schedulefree-twin"


def _key() -> str:
    """Returns a hash of all that the object depends on, but for the compiler."""
    parts = [path.read_bytes() for path in SOURCES]
    system = (*FLAGS, sys.platform, platform.machine(), *platform.libc_ver())
    return hashlib.sha256(b"\0".join([*parts, *(part.encode() for part in system)])).hexdigest()[:24]


def _build(name: str, folder: Path) -> ctypes.CDLL:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except OSError:  # a home that cannot be written to: build for this process only
        scratch = tempfile.TemporaryDirectory()
    with scratch:
        made = Path(scratch.name) / name
        _compile(made)
        try:
            library = ctypes.CDLL(str(made))
        except OSError as error:
            raise Unavailable(f"the compiled kernel must load, got {error}: report it, please") from error
        if made.parent.parent == folder:
            os.replace(made, folder / name)  # at once, so that other processes see all of it or nothing
    return library


def _compile(made: Path) -> None:
    named = shlex.split(os.environ.get("CC", ""))
    found = [shutil.which(one) for one in ("cc", "gcc", "clang")]
    compiler = named or [one for one in found if one][:1]
    if not compiler:
        raise Unavailable("a C compiler must be in PATH or in CC, got none: install gcc or clang")
    command = [*compiler, *FLAGS, str(SOURCES[0]), "-o", str(made), "-lm"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise Unavailable(
            f"{' '.join(compiler)} must compile {SOURCES[0]}, got {said[:500]!r}: set CC to another compiler"
        ) from error
