"""Names, renames and removals in a folder of checkpoints: a kill leaves nothing half done in sight."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sfcore.exchange import CheckpointError, reading

PARTIAL = ".partial-"
SET_ASIDE = "set-aside"
_LEFT = (f"{PARTIAL}*", "*.orbax-checkpoint-tmp*", ".removed")  # the last two by earlier versions, in JAX
_STEP = re.compile(r"^step_(\d{9,})(?:\.(\d+))?$")
_in_work: set[str] = set()  # names of what this process is writing, which are no leftovers


@contextmanager
def cannot(what: str) -> Iterator[None]:
    """Turns what the system refuses into a CheckpointError: what cannot be done, why, and what helps."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot {what}: {why(error)}") from error


def why(error: OSError) -> str:
    """Returns what to do about an operation that the system refused."""
    untouched = "The live state and the older checkpoints are untouched"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk or the quota is full; free space or choose another folder. {untouched}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission; choose a folder that this user may write to. {untouched}"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{error.filename} is a file; choose a folder. {untouched}"
    return f"{error.strerror or error}. {untouched}"


@contextmanager
def partial(folder: Path) -> Iterator[Path]:
    """Yields a new name in a folder that no reader looks at: fill it, `rename` it, or it goes again."""
    made = _aside(folder)
    _in_work.add(made.name)
    try:
        make(folder)
        yield made
    finally:
        _in_work.discard(made.name)
        discard(made)


def leftovers(folder: Path) -> list[Path]:
    """Returns what saves and removals that were interrupted left in a folder."""
    found = [path for pattern in _LEFT for path in sorted(folder.glob(pattern))] if folder.is_dir() else []
    return [path for path in found if path.name not in _in_work]


def _aside(folder: Path) -> Path:
    # A random name, because process ids come again.
    return folder / f"{PARTIAL}{uuid.uuid4().hex}"


def rename(path: Path, final: Path) -> None:
    """Gives something whole its name, which lasts."""
    os.rename(path, final)
    sync(final.parent)


def make(folder: Path) -> None:
    """Makes a folder and those above it, and their names last, if they are not there."""
    if not folder.is_dir():
        make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a file and syncs it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Makes the names in a folder last; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def next_name(step: int, older: Path | None) -> str:
    """Returns a free name: a step saved again gets a suffix, so that no moment is without a checkpoint."""
    name = f"step_{step:09d}"
    match = _STEP.match(older.name) if older else None
    return f"{name}.{int(match[2] or 0) + 1}" if match else name


def discard(path: Path) -> None:
    """Removes a file or a folder, as far as the system lets us; of a link to one, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def remove(path: Path) -> bool:
    """Removes a checkpoint, if the system lets us; it stops being one before the first file goes."""
    going = _aside(path.parent)
    try:
        os.rename(path, going)
    except OSError:
        return False
    discard(going)
    return True


def move(path: Path, into: Path) -> Path:
    """Moves a checkpoint into another folder, under a free name; returns where it is now."""
    make(into)
    target, count = into / path.name, 1
    while target.exists():
        target, count = into / f"{path.name}.{count}", count + 1
    os.rename(path, target)
    return target


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Returns (step, path) of every checkpoint, oldest first; a step saved again comes twice until cleaned.

    Raises:
        CheckpointError: if it is no folder or cannot be read.
    """
    found = sorted((int(m[1]), int(m[2] or 0), name) for name in names(folder) if (m := _STEP.match(name)))
    return [(step, folder / name) for step, _, name in found]


def names(folder: Path) -> list[str]:
    """Returns the names in a folder, none if it is not there; raises as `checkpoints`."""
    with reading(folder):
        try:
            return os.listdir(folder)
        except FileNotFoundError:
            return []
