"""A folder of checkpoints: written whole or not at all, found by step, verified, kept or dropped.

FOLDER/step_000000100/meta.json              the record (sfcore.meta)
                      state.safetensors      everything a resume needs
                      inference.safetensors  x and the buffers, plain names: what to ship
FOLDER/set-aside/...                          newer than a save that came after: another timeline
FOLDER/.partial-...                          a save or removal that was interrupted; `clean` removes it
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sfcore import exchange, files
from sfcore.checks import HyperparameterError
from sfcore.exchange import OLDER, CheckpointError
from sfcore.meta import Meta

STATE, INFERENCE, META = "state.safetensors", "inference.safetensors", "meta.json"
_in_work: set[str] = set()  # names of what this process is writing, which are no leftovers


def check_keep(keep_newest: int, keep_best: int) -> None:
    """Raises HyperparameterError with each of the two that is out of range."""
    problems = [
        f"{name} must be a whole number >= {least}, got {value!r}: 2 and 1 are usual"
        for name, value, least in (("keep_newest", keep_newest, 1), ("keep_best", keep_best, 0))
        if isinstance(value, bool) or not isinstance(value, int) or value < least
    ]
    if problems:
        raise HyperparameterError(problems)


class Skipped(NamedTuple):
    """A checkpoint that does not verify, and why."""

    path: Path
    why: str


def write(
    folder: Path, meta: Meta, state: Mapping[str, np.ndarray], inference: Mapping[str, np.ndarray]
) -> Path:
    """Writes one checkpoint beside the others and renames it into place; returns its path.

    Everything is on disk (fsync) before the rename, so a kill at any moment leaves the older
    checkpoints and at most a `.partial-` folder. A checkpoint of the same step is replaced, and is
    there until the new one is.

    Args:
        folder: where the checkpoints lie; made if it is not there.
        meta: the record; its `tensors` are filled in here, in the file and not in this object.
        state: "ROLE/PARAMETER" -> array.
        inference: name -> array, x and the buffers.

    Raises:
        CheckpointError: no permission, disk full, no folder, a metric that is no finite number, a leaf
            without a role; nothing of the attempt stays.
    """
    for leaf in state:
        exchange.split(leaf)
    partial = files.aside(folder)
    _in_work.add(partial.name)
    try:
        files.make(folder)
        partial.mkdir()
        _fill(partial, meta, state, inference)
        older = steps(folder).get(meta.step)
        final = folder / files.next_name(meta.step, older)
        os.rename(partial, final)
        files.sync(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write a checkpoint into {folder}: {files.why(error)}") from error
    finally:
        _in_work.discard(partial.name)
        shutil.rmtree(partial, ignore_errors=True)
    if older is not None:
        files.remove(older)
    return final


def _fill(
    folder: Path, meta: Meta, state: Mapping[str, np.ndarray], inference: Mapping[str, np.ndarray]
) -> None:
    record = {
        STATE: exchange.write_tensors(folder / STATE, state),
        INFERENCE: exchange.write_tensors(folder / INFERENCE, inference, about_inference(meta)),
    }
    files.write_text(folder / META, replace(meta, tensors=record).to_json())
    files.sync(folder)


def about_inference(meta: Meta) -> dict[str, str]:
    """Returns the header text of an inference file; transformers wants the "format" in it."""
    form = "pt" if meta.framework == "torch" else "flax"
    return {"format": form, "weights_hold": "x", "step": str(meta.step)}


def steps(folder: Path) -> dict[int, Path]:
    """Returns step -> path of the checkpoints in a folder, oldest first; {} if there is no folder.

    Raises:
        CheckpointError: if it is no folder or cannot be read.
    """
    return dict(files.checkpoints(folder))


def read_meta(path: Path) -> Meta:
    """Reads a checkpoint's record.

    Raises:
        CheckpointError: if the folder is empty, or the record missing, unreadable, damaged or too new.
    """
    try:
        text = (path / META).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} must be a folder with {META}, got {_found(path)}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path / META} is damaged: it must be JSON ({error}); {OLDER}") from error
    except OSError as error:
        raise CheckpointError(exchange.cannot_read(path / META, error)) from error
    return Meta.from_json(text, path / META)


def _found(path: Path) -> str:
    if not path.exists():
        return "nothing of that name: check the path"
    if not path.is_dir():
        return "a file: pass the folder it lies in"
    if not any(path.iterdir()):
        return f"an empty folder: {OLDER}"
    if steps(path):
        return "a folder of checkpoints: pass one of them, or use sfcore.store.newest"
    return f"other files: it is no checkpoint of ours, or {OLDER}"


def read(path: Path, file: str = STATE) -> tuple[Meta, dict[str, np.ndarray]]:
    """Reads and verifies one file of a checkpoint.

    Raises:
        CheckpointError: naming file and leaf of the first difference from the record.
    """
    meta = read_meta(path)
    if file not in meta.tensors:
        raise CheckpointError(f"{path / META} must record {file}, got {sorted(meta.tensors)}; {OLDER}")
    tensors = exchange.read_tensors(path / file, meta.tensors[file])
    if file == INFERENCE:
        exchange.check_metadata(path / file, about_inference(meta))
    return meta, tensors


def newest(folder: Path) -> Path:
    """Returns the newest checkpoint of a folder.

    Raises:
        CheckpointError: if there is none.
    """
    found = steps(folder)
    if not found:
        raise CheckpointError(
            f"{folder} must hold a checkpoint (step_...), got none: check the path, or start anew"
        )
    return found[max(found)]


def unknown_resume(resume: object) -> CheckpointError:
    """Returns the error for a `resume` that is no word, no step, and no path that is there."""
    return CheckpointError(
        "resume must be 'auto', 'none', 'latest-good', 'weights:PATH', a step or a path that is there, "
        f"got {resume!r}: check the spelling"
    )


def latest_good(folder: Path) -> tuple[Path, list[Skipped]]:
    """Returns the newest checkpoint that verifies in full, and the newer ones that do not.

    Raises:
        CheckpointError: if none verifies, with the reason for each.
    """
    skipped = []
    for _, path in reversed(files.checkpoints(folder)):
        try:
            for file in (STATE, INFERENCE):
                read(path, file)
        except CheckpointError as error:
            skipped.append(Skipped(path, str(error)))
        else:
            return path, skipped
    why = "\n".join(f"  {s.path.name}: {s.why}" for s in skipped) or "  it holds none"
    raise CheckpointError(f"{folder} must hold a checkpoint that verifies, got none:\n{why}")


def set_aside(folder: Path, newer_than: int) -> list[Path]:
    """Moves checkpoints newer than a step to FOLDER/set-aside; returns where they are now.

    They are of a run that this one has turned back from. They are kept, but a resume must not take them
    for the newest of this run.

    Raises:
        CheckpointError: if the folder cannot be read or written to.
    """
    newer = [path for step, path in files.checkpoints(folder) if step > newer_than]
    try:
        return [files.move(path, folder / files.SET_ASIDE) for path in newer]
    except OSError as error:
        raise CheckpointError(f"cannot move checkpoints in {folder}: {files.why(error)}") from error


def clean(folder: Path) -> list[Path]:
    """Removes what interrupted saves left behind and returns it; call it when no other process saves.

    That is every `.partial-` folder, and the older of two checkpoints of the same step.
    """
    everything, kept = files.checkpoints(folder), set(steps(folder).values())
    partial = sorted(folder.glob(f"{files.PARTIAL}*")) if folder.is_dir() else []
    left = [path for path in partial if path.name not in _in_work]
    for path in left:
        files.discard(path)
    replaced = [path for _, path in everything if path not in kept]
    return left + [path for path in replaced if files.remove(path)]


def prune(folder: Path, keep_newest: int, keep_best: int, metric: str = "loss") -> list[Path]:
    """Removes all but the newest checkpoints and those of the smallest metric; returns what went.

    Args:
        folder: where they lie.
        keep_newest: how many of the newest to keep, >= 1.
        keep_best: how many of the smallest metric to keep, >= 0; of equal ones the older.
        metric: a key of `Meta.metrics`; checkpoints without it rank nowhere.

    Raises:
        CheckpointError: if the numbers are out of range, or the folder cannot be read.
    """
    if keep_newest < 1 or keep_best < 0:
        raise CheckpointError(
            f"keep_newest must be >= 1 and keep_best >= 0, got {keep_newest} and {keep_best}: "
            "without the newest there is nothing to resume from"
        )
    found = steps(folder)
    keep = set(list(found)[-keep_newest:])
    scored = []
    for step, path in found.items():
        try:
            scored.append((read_meta(path).metrics[metric], step))
        except (CheckpointError, KeyError):
            continue
    keep |= {step for _, step in sorted(scored)[:keep_best]}
    return [path for step, path in found.items() if step not in keep and files.remove(path)]
