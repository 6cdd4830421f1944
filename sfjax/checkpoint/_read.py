"""Reads one Orbax checkpoint of ours and holds every leaf against its record, before anything is used."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sfcore import exchange, store
from sfcore.exchange import OLDER, CheckpointError, describe
from sfcore.meta import Meta
from sfcore.store import Skipped
from sfjax.checkpoint import _arrays, _folder


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        path: where it was read.
        meta: its record.
        arrays: name -> host array.
        roles: name -> role (see `_leaves`), of the leaves that have one.
    """

    path: Path
    meta: Meta
    arrays: dict[str, np.ndarray]
    roles: dict[str, str]


def is_ours(path: Path) -> bool:
    """Tells whether a path is one Orbax checkpoint of this package."""
    return (path / _folder.META / _folder.META_FILE).is_file()


def read_meta(path: Path) -> Meta:
    """Reads the record of a checkpoint.

    Raises:
        CheckpointError: if the folder is missing or empty, or the record missing, damaged or too new.
    """
    file = path / _folder.META / _folder.META_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{file} is missing: {_found(path)}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is damaged: it must be JSON ({error}); {OLDER}") from error
    except OSError as error:
        raise CheckpointError(exchange.cannot_read(file, error)) from error
    return Meta.from_json(text, file)


def _found(path: Path) -> str:
    if not path.exists():
        return f"there is no {path.name} in {path.parent}, so check the path"
    if path.is_dir() and not any(path.iterdir()):
        return f"the folder is empty, so {OLDER}"
    return f"the folder holds other files, so it is no checkpoint of ours, or it is damaged: {OLDER}"


def read(path: Path) -> Saved:
    """Reads and verifies the state of a checkpoint.

    Raises:
        CheckpointError: naming file and leaf of the first difference from the record.
    """
    meta = read_meta(path)
    record = _recorded(path, meta, _folder.STATE)
    arrays = _arrays_of(path / _folder.STATE, record)
    roles = {name: about["role"] for name, about in record.items() if "role" in about}
    return Saved(path, meta, arrays, roles)


def read_inference(path: Path, meta: Meta) -> dict[str, np.ndarray]:
    """Reads and verifies the weights x of a checkpoint.

    Raises:
        CheckpointError: as `read`.
    """
    record = _recorded(path, meta, _folder.INFERENCE_FILE)
    return exchange.read_tensors(path / _folder.INFERENCE / _folder.INFERENCE_FILE, record)


def newest(folder: Path) -> Path | None:
    """Returns the newest checkpoint of a folder, or None if it holds none."""
    found = _folder.steps(folder)
    return found[max(found)] if found else None


def choose(folder: Path, resume: Any) -> Path | None:
    """Returns the checkpoint that a user asks for; None if that is the newest and there is none.

    Args:
        folder: where "auto" and steps are looked for.
        resume: "auto" (and "latest-good" where there is none), a step, or the path of a checkpoint or of
            a folder of them.

    Raises:
        CheckpointError: if it is none of these.
    """
    if resume in ("auto", "latest-good"):
        return newest(folder)
    if isinstance(resume, numbers.Integral) and not isinstance(resume, bool):
        found = _folder.steps(folder)
        if resume not in found:
            raise CheckpointError(f"{folder} must hold step {resume}, got the steps {list(found)}")
        return found[int(resume)]
    if isinstance(resume, Path) or (isinstance(resume, str) and Path(resume).exists()):
        path = Path(resume).absolute()
        if is_ours(path) or (path / store.META).is_file():
            return path
        return newest(path) or (store.newest(path) if store.steps(path) else path)
    raise store.unknown_resume(resume)


def scores(folder: Path, metric: str) -> dict[int, float]:
    """Returns step -> metric of the checkpoints that have one and can be read."""
    found = {}
    for step, path in _folder.steps(folder).items():
        try:
            found[step] = read_meta(path).metrics[metric]
        except (CheckpointError, KeyError):
            continue
    return found


def latest_good(folder: Path) -> tuple[Saved, list[Skipped]]:
    """Returns the newest checkpoint that verifies in full, and the newer ones that do not.

    Raises:
        CheckpointError: if none verifies, with the reason for each.
    """
    skipped = []
    for path in reversed(_folder.steps(folder).values()):
        try:
            saved = read(path)
            read_inference(path, saved.meta)
        except CheckpointError as error:
            skipped.append(Skipped(path, str(error)))
        else:
            return saved, skipped
    why = "\n".join(f"  {one.path.name}: {one.why}" for one in skipped) or "  it holds none"
    raise CheckpointError(f"{folder} must hold a checkpoint that verifies, got none:\n{why}")


def _recorded(path: Path, meta: Meta, item: str) -> Mapping[str, Any]:
    if item not in meta.tensors:
        raise CheckpointError(f"{path} must have a record of {item}, got {sorted(meta.tensors)}; {OLDER}")
    record: Mapping[str, Any] = meta.tensors[item]
    return record


def _arrays_of(path: Path, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not path.is_dir():
        raise CheckpointError(f"{path} is missing: check the path, or {OLDER}")
    found = _arrays.read(path)
    arrays = {}
    for name, about in record.items():
        if 0 in about["shape"]:  # Orbax stores no empty arrays
            found.setdefault(name, np.zeros(about["shape"], _dtype(about["dtype"])))
        arrays[name] = _checked(path, name, found.pop(name, None), about)
    if found:
        raise CheckpointError(
            f"{path} is damaged: it must hold the leaves of its record only, got {min(found)!r}; {OLDER}"
        )
    return arrays


def _checked(path: Path, name: str, array: np.ndarray | None, about: Mapping[str, Any]) -> np.ndarray:
    if array is None:
        raise CheckpointError(f"{path} is damaged: it must hold the leaf {name!r}, got none; {OLDER}")
    for what, found in describe(array).items():
        if found != about[what]:
            raise CheckpointError(
                f"{path} is damaged: leaf {name!r} must have {what} {about[what]}, got {found}: "
                f"the files were changed after they were written; {OLDER}"
            )
    return array


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))
