"""A folder of Orbax checkpoints: which steps are there, what interrupted saves left, what makes way.

FOLDER/100/meta/metadata                        the record (sfcore.meta), JSON
           state/...                            everything a resume needs (Orbax, tensorstore)
           inference/inference.safetensors      x, plain names: what to ship
FOLDER/100.orbax-checkpoint-tmp...              a save that was interrupted; `clean` removes it
FOLDER/.removed/100                             a checkpoint on its way out; `clean` removes it
FOLDER/.replaced/100                            one that a new save of the step replaces
FOLDER/set-aside/200                            newer than a save that came after: another timeline
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sfcore import files
from sfcore.exchange import CheckpointError, cannot_read

STATE, META, INFERENCE = "state", "meta", "inference"
META_FILE, INFERENCE_FILE = "metadata", "inference.safetensors"
REMOVED, REPLACED, SET_ASIDE = ".removed", ".replaced", files.SET_ASIDE


def steps(folder: Path) -> dict[int, Path]:
    """Returns step -> path of the checkpoints in a folder, oldest first; {} if there is no folder.

    One whose replacement was never finished counts, where it lies.

    Raises:
        CheckpointError: if it is no folder or cannot be read.
    """
    found = _numbered(folder / REPLACED) | _numbered(folder)
    return {step: found[step] for step in sorted(found)}


def _numbered(folder: Path) -> dict[int, Path]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(cannot_read(folder, error)) from error
    own = [name for name in names if name.isdecimal() and str(int(name)) == name]
    return {int(name): folder / name for name in own if (folder / name).is_dir()}


def clean(folder: Path) -> list[Path]:
    """Removes what interrupted saves and removals left and returns it; call it when no save is running.

    A replaced checkpoint comes back if its replacement was never finished.
    """
    there = _numbered(folder)
    for step, path in _numbered(folder / REPLACED).items():
        if step not in there:
            os.rename(path, folder / path.name)
    left = [*folder.glob("*.orbax-checkpoint-tmp*"), folder / REMOVED, folder / REPLACED]
    left = [path for path in left if path.exists()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return left


def make_way(folder: Path, step: int) -> tuple[list[Path], list[Path]]:
    """Moves away what a save of `step` replaces, and what is newer; returns where both are now.

    Newer checkpoints are of a run that this one has turned back from. They are kept, but a resume must
    not take them for the newest of this run.
    """
    found = _numbered(folder)
    replaced = [files.move(found[step], folder / REPLACED)] if step in found else []
    return replaced, [files.move(path, folder / SET_ASIDE) for there, path in found.items() if there > step]
