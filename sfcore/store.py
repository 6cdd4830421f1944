"""A folder of checkpoints: written whole or not at all, found by step, verified, kept or dropped.

    FOLDER/step_000000100/meta.json            the record (sfcore.meta)
                          state.safetensors    everything a resume needs
                          inference.safetensors  x and the buffers, plain names: what to ship
    FOLDER/.partial-...                        a save that was interrupted; removed by `clean`
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sfcore import exchange
from sfcore.exchange import CheckpointError
from sfcore.meta import Meta

STATE, INFERENCE, META = "state.safetensors", "inference.safetensors", "meta.json"
_STEP = re.compile(r"^step_(\d{9,})(?:\.(\d+))?$")
_PARTIAL = ".partial-"


class Skipped(NamedTuple):
    """A checkpoint that does not verify, and why."""

    path: Path
    why: str


def write(folder: Path, meta: Meta, state: Mapping[str, np.ndarray], inference: Mapping[str, np.ndarray]) -> Path:
    """Writes one checkpoint beside the others and renames it into place; returns its path.

    Everything is on disk (fsync) before the rename, so a kill at any moment leaves the older
    checkpoints and at most a `.partial-` folder. A checkpoint of the same step is replaced.

    Raises:
        CheckpointError: no permission, disk full, no folder; nothing of the attempt stays.
    """
    partial = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder))
        meta.tensors = {
            STATE: exchange.write_tensors(partial / STATE, state),
            INFERENCE: exchange.write_tensors(partial / INFERENCE, inference),
        }
        (partial / META).write_text(meta.to_json())
        for name in (STATE, INFERENCE, META):
            _sync(partial / name)
        _sync(partial)
        older = steps(folder).get(meta.step)
        final = folder / _next_name(meta.step, older)
        os.rename(partial, final)
        _sync(folder)
        if older is not None:
            _remove(older)
        return final
    except OSError as error:
        raise CheckpointError(f"cannot write a checkpoint into {folder}: {_explain(error)}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _explain(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the disk is full; free space or choose another folder. The live state is untouched"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "no permission; choose a folder that this user may write to. The live state is untouched"
    return f"{error.strerror or error}. The live state is untouched"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _next_name(step: int, older: Path | None) -> str:
    """Returns a free name: a step saved again gets a suffix, so that no moment is without a checkpoint."""
    name = f"step_{step:09d}"
    if older is None:
        return name
    match = _STEP.match(older.name)
    return f"{name}.{int(match[2] or 0) + 1 if match else 1}"


def _remove(path: Path) -> None:
    """Removes a checkpoint; it stops being one before the first file goes."""
    aside = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=path.parent))
    os.rename(path, aside / "old")
    shutil.rmtree(aside, ignore_errors=True)


def steps(folder: Path) -> dict[int, Path]:
    """Returns step -> path of the checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return {}
    found = sorted((int(m[1]), int(m[2] or 0), path) for path in folder.iterdir() if (m := _STEP.match(path.name)))
    return {step: path for step, _, path in found}


def read_meta(path: Path) -> Meta:
    """Reads a checkpoint's record.

    Raises:
        CheckpointError: if the folder is empty, or the record missing or damaged.
    """
    try:
        text = (path / META).read_text()
    except FileNotFoundError as error:
        what = "an empty folder" if path.is_dir() and not any(path.iterdir()) else "none"
        raise CheckpointError(f"{path} must hold {META}, got {what}: it is no checkpoint of ours") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path / META} must be JSON, got a damaged file ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path / META} cannot be read ({error.strerror})") from error
    return Meta.from_json(text, path / META)


def read(path: Path, file: str = STATE) -> tuple[Meta, dict[str, np.ndarray]]:
    """Reads and verifies one file of a checkpoint.

    Raises:
        CheckpointError: naming file and leaf of the first difference from the record.
    """
    meta = read_meta(path)
    return meta, exchange.read_tensors(path / file, meta.tensors[file])


def newest(folder: Path) -> Path:
    """Returns the newest checkpoint of a folder.

    Raises:
        CheckpointError: if there is none.
    """
    found = steps(folder)
    if not found:
        raise CheckpointError(f"{folder} must hold a checkpoint (step_...), got none: check the path, or start anew")
    return found[max(found)]


def latest_good(folder: Path) -> tuple[Path, list[Skipped]]:
    """Returns the newest checkpoint that verifies in full, and the newer ones that do not.

    Raises:
        CheckpointError: if none verifies, with the reason for each.
    """
    skipped = []
    for path in reversed(steps(folder).values()):
        try:
            for file in (STATE, INFERENCE):
                read(path, file)
        except CheckpointError as error:
            skipped.append(Skipped(path, str(error)))
        else:
            return path, skipped
    why = "\n".join(f"  {s.path.name}: {s.why}" for s in skipped) or "  it holds none"
    raise CheckpointError(f"{folder} must hold a checkpoint that verifies, got none:\n{why}")


def clean(folder: Path) -> list[Path]:
    """Removes what interrupted saves left behind and returns it; call it when no save is running."""
    left = [path for path in folder.glob(f"{_PARTIAL}*")] if folder.is_dir() else []
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return left


def prune(folder: Path, keep_newest: int, keep_best: int, metric: str = "loss") -> None:
    """Removes all but the newest checkpoints and those of the smallest metric."""
    found = steps(folder)
    keep = set(list(found)[-keep_newest:]) if keep_newest else set()
    scored = []
    for step, path in found.items():
        try:
            scored.append((read_meta(path).metrics[metric], step))
        except (CheckpointError, KeyError):
            continue
    keep |= {step for _, step in sorted(scored)[:keep_best]}
    for step, path in found.items():
        if step not in keep:
            _remove(path)
