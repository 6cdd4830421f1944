"""Builds a library with the machine's C compiler at first use, and keeps it in a private folder of the user.

So one wheel of plain Python serves every version of Python and of the frameworks, and installing compiles
nothing. What is kept is code that runs: it is loaded from folders that nobody else can write to, and only if
its bytes are those that were tried when it was built (their hash is in the file's name). Whatever fails,
there is a reason, and steps go another way.
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
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sfcore import files

HERE = Path(__file__).parent
# The last two change no value: they allow roots and comparisons in vectors.
FLAGS = ["-std=c11", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
SECONDS = 60
# In a process of its own: a library that is not whole can end the one that loads it.
TRIAL = "import ctypes, sys; getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])"
_log = logging.getLogger("sfcore.native")


class Library(NamedTuple):
    """What is built.

    Attributes:
        name: with which the file's begins.
        entry: the function that it must have.
        sources: the first is compiled; what it includes comes after it, because a change of it counts too.
        folders: where else what it includes lies.
        options: of the compiler, beside FLAGS.
    """

    name: str
    entry: str
    sources: tuple[Path, ...]
    folders: tuple[Path, ...] = ()
    options: tuple[str, ...] = ()


STEP = Library("step", "sf_run", (HERE / "step.c", HERE / "job.h", HERE / "arithmetic.h"))
# Apart, because it takes twice as long to build, and most runs need none of it.
DRAWN = Library("drawn", "sf_run", (*STEP.sources, HERE / "eight.h"), options=("-DROUNDS_AT_RANDOM",))


class Unavailable(Exception):
    """There is no kernel; the message says why and what to do."""


@functools.cache
def find(library: Library = STEP) -> ctypes.CDLL | str:
    """Returns a library, or why there is none; built at most once a machine and user.

    Example:
        >>> from sfcore.native import build
        >>> build.find() is build.find()
        True
    """
    try:
        key = _key(library)
        return _kept(library, key) or _new(library, key)
    except (Unavailable, OSError) as why:
        return str(why)


def cache_folders() -> Iterator[Path]:
    """Yields where a kernel may be kept, the best first.

    schedulefree-twin under XDG_CACHE_HOME if that is absolute (else it is ignored, as the XDG Base Directory
    Specification says), the same under ~/.cache, and a folder of the user among the temporary files.
    """
    homes = [os.environ.get("XDG_CACHE_HOME", "")]
    with suppress(RuntimeError):  # a user without a home
        homes.append(str(Path.home() / ".cache"))
    yield from (Path(home, "schedulefree-twin") for home in homes if os.path.isabs(home))
    yield Path(tempfile.gettempdir(), f"schedulefree-twin-{_user()}")


def _user() -> int | str:
    return os.geteuid() if hasattr(os, "geteuid") else "user"


def _key(library: Library) -> str:
    """Returns its name and a hash of all that the object depends on, but for the compiler."""
    parts = [path.read_bytes() for path in library.sources]
    system = (*FLAGS, *library.options, sys.platform, platform.machine(), *platform.libc_ver())
    found = hashlib.sha256(b"\0".join([*parts, *(part.encode() for part in system)])).hexdigest()[:24]
    return f"{library.name}-{found}"


def _name(key: str, made: bytes) -> str:
    return f"{key}.{hashlib.sha256(made).hexdigest()[:32]}.so"


def _kept(library: Library, key: str) -> ctypes.CDLL | None:
    """Returns a kernel that was kept, if there is one; of those that cannot be used, says why and removes."""
    for folder in cache_folders():
        if not folder.is_dir() or _not_private(folder.lstat()):
            continue
        for path in sorted(folder.glob(f"{key}.*.so")):
            try:
                found = path.lstat()
                why = _not_private(found) or _not_whole(path, key)
                if not why:
                    return _loaded(library, path)
            except OSError as error:
                why = str(error)
            _log.warning("the kernel %s cannot be used and is built anew: %s", path, why)
            with suppress(OSError):  # what cannot be removed is refused the next time as well
                path.unlink()
    return None


def _not_private(found: os.stat_result) -> str | None:
    """Returns why others may have written a folder or file."""
    if not hasattr(os, "geteuid"):
        return None  # Windows keeps each user's folders from the others
    if found.st_uid != os.geteuid():
        return f"it must belong to the user {os.geteuid()}, got {found.st_uid}"
    if stat.S_ISLNK(found.st_mode):
        return "it must be there itself, got a symbolic link"
    if found.st_mode & 0o022:
        return f"nobody else may be able to write to it, got {stat.filemode(found.st_mode)}"
    return None


def _not_whole(path: Path, key: str) -> str | None:
    """Returns what is wrong with a file's bytes."""
    if path.name != _name(key, path.read_bytes()):
        return "its bytes are not those that were built"
    return None


def _loaded(library: Library, path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    if not hasattr(found, library.entry):
        raise OSError(f"it must have {library.entry}, which it has not")
    return found


def _new(library: Library, key: str) -> ctypes.CDLL:
    """Builds, tries and keeps a kernel in the first folder that takes it."""
    made, refused = b"", []
    for folder in cache_folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.lstat().st_uid == _user() and not folder.is_symlink():
                folder.chmod(0o700)  # of an older version, or made by a user with another umask
            if why := _not_private(folder.lstat()):
                raise PermissionError(why)
            _remove_leftovers(folder)
            with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
                made = made or _compiled(library, Path(scratch))
                found = _put(library, made, Path(scratch), folder / _name(key, made))
        except OSError as error:
            refused.append(f"{folder}: {error}")
            continue
        if refused:
            _log.warning("the kernel is kept in %s, because others cannot: %s", folder, "; ".join(refused))
        return found
    reasons = "; ".join(refused)
    raise Unavailable(f"a folder must keep the kernel, got {reasons}: set XDG_CACHE_HOME to one of your own")


def _remove_leftovers(folder: Path) -> None:
    """Removes what a build that was killed has left."""
    for scratch in folder.glob("build-*"):
        if scratch.lstat().st_mtime < time.time() - 10 * SECONDS:
            shutil.rmtree(scratch, ignore_errors=True)


def _put(library: Library, made: bytes, scratch: Path, path: Path) -> ctypes.CDLL:
    """Tries it, then gives it its name: whole, on the disk, and at once."""
    part = scratch / "kept.so"
    with part.open("wb") as file:
        file.write(made)
        file.flush()
        os.fsync(file.fileno())
    part.chmod(0o700)
    if sys.executable and not getattr(sys, "frozen", False):  # else it may be another program
        trial = [sys.executable, "-I", "-S", "-c", TRIAL, str(part), library.entry]
        try:
            done = subprocess.run(trial, capture_output=True, timeout=SECONDS, check=False)
        except subprocess.SubprocessError as error:
            raise OSError(f"the compiled kernel must load, got {error}") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise OSError(f"the compiled kernel must load, got {said or f'signal {-done.returncode}'}")
    os.replace(part, path)
    files.sync(path.parent)
    return _loaded(library, path)


def _compiled(library: Library, folder: Path) -> bytes:
    """Returns what the compiler makes of the sources."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise Unavailable(f"CC must be a command, got {os.environ['CC']!r}: {error}") from error
    found = [shutil.which(one) for one in ("cc", "gcc", "clang")]
    compiler = named or [one for one in found if one][:1]
    if not compiler:
        raise Unavailable("a C compiler must be in PATH or in CC, got none: install gcc or clang")
    made = folder / "made.so"
    include = [f"-I{one}" for one in library.folders]
    command = [*compiler, *FLAGS, *library.options, *include, str(library.sources[0]), "-o", str(made), "-lm"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        return made.read_bytes()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error).encode()
        text = said.decode(errors="replace").strip()[:500]
        source = library.sources[0]
        raise Unavailable(
            f"{' '.join(compiler)} must compile {source}, got {text!r}: set CC to another compiler"
        ) from error
