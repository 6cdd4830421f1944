"""A folder of checkpoints: written whole or not at all, found by step, verified, kept or dropped.

FOLDER/step_000000100/meta.json              the record (sfcore.meta)
                      state.safetensors      everything a resume needs
                      inference.safetensors  x and the buffers, plain names: what to ship
                                             of several processes, what each has of an array in pieces:
                      state-00001-of-00004.safetensors, inference-00001-of-00004.safetensors
FOLDER/set-aside/...                          newer than a save that came after: another timeline
FOLDER/.partial-...                          a save or removal that was interrupted; `clean` removes it
FOLDER/.replaced/...                          one on its way out; `clean` brings it back if no new one came

Other files may lie in such a folder in other places, with the same rules: a `Layout` says what is different.
"""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sfcore import exchange, files, shards
from sfcore.beside import beside
from sfcore.exchange import OLDER, CheckpointError, Leaf
from sfcore.lock import writing
from sfcore.meta import Meta

STATE, INFERENCE, META = "state.safetensors", "inference.safetensors", "meta.json"
REPLACED = ".replaced"
_placing: set[Path] = set()  # where this process is about to put a checkpoint, whose older one has made way


class Skipped(NamedTuple):
    """A checkpoint that does not verify, and why."""

    path: Path
    why: str


class Layout(NamedTuple):
    """What is different from one kind of checkpoint folder to another.

    Attributes:
        checkpoints: folder -> (step, path) of every one, oldest first; a step saved again may come twice.
        name: (step, path of the one that is replaced or None) -> the name that a checkpoint gets.
        read_meta: path -> record.
        verify: path -> content, where every leaf has been held against the record.
    """

    checkpoints: Callable[[Path], list[tuple[int, Path]]]
    name: Callable[[int, Path | None], str]
    read_meta: Callable[[Path], Meta]
    verify: Callable[[Path], Any]


def about_inference(meta: Meta) -> dict[str, str]:
    """Returns the header text of an inference file; transformers wants the "format" in it."""
    form = "pt" if meta.framework == "torch" else "flax"
    return {"format": form, "weights_hold": "x", "step": str(meta.step)}


def read_meta(path: Path) -> Meta:
    """Reads a checkpoint's record.

    Raises:
        CheckpointError: if the folder is empty, or the record missing, unreadable, damaged or too new.
    """
    return read_record(path / META, lambda: f"{path} must be a folder with {META}, got {_found(path)}")


def read_record(file: Path, missing: Callable[[], str]) -> Meta:
    """Reads the record in a file of any layout; `missing` says what is there in its place."""
    with exchange.reading(file):
        try:
            return Meta.from_json(exchange.read_text(file), file)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(missing()) from error


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
    return meta, {leaf: np.asarray(array) for leaf, array in open_parts(path, meta, file).items()}


def is_spread(meta: Meta, file: str = STATE) -> bool:
    """Tells whether several processes wrote a file's content, each into one of its own."""
    return files_of(meta, file) != [file]


def files_of(meta: Meta, file: str) -> list[str]:
    """Returns the files of a checkpoint that hold what a file of one process would."""
    stem, _, ending = file.rpartition(".")
    own = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.{re.escape(ending)}")
    return [name for name in meta.tensors if own.fullmatch(name)]


def part_name(file: str, rank: int, count: int) -> str:
    """Returns the name of what a rank writes of a file.

    Example:
        >>> from sfcore.store import STATE, part_name
        >>> part_name(STATE, 0, 4)
        'state-00001-of-00004.safetensors'
    """
    stem, _, ending = file.rpartition(".")
    return f"{stem}-{rank + 1:05d}-of-{count:05d}.{ending}"


def open_parts(path: Path, meta: Meta, file: str = STATE) -> dict[str, Any]:
    """Returns leaf -> array of one file or of all its parts, read and verified; or `Spread`, read on demand.

    Args:
        path: the checkpoint.
        meta: its record.
        file: STATE or INFERENCE.

    Raises:
        CheckpointError: naming the file that is missing, or that differs from the record.
    """
    names = files_of(meta, file)
    if not names:
        raise CheckpointError(f"{path / META} must record {file}, got {sorted(meta.tensors)}; {OLDER}")
    readers = {name: exchange.open_tensors(path / name, meta.tensors[name]) for name in names}
    for name in names if file == INFERENCE else ():
        exchange.check_metadata(path / name, about_inference(meta))
    return shards.joined({name: meta.tensors[name] for name in names}, readers)


def _verify(path: Path) -> None:
    for file in (STATE, INFERENCE):
        read(path, file)


PLAIN = Layout(files.checkpoints, files.next_name, read_meta, _verify)


def steps(folder: Path, layout: Layout = PLAIN) -> dict[int, Path]:
    """Returns step -> path of the checkpoints in a folder, oldest first; {} if there is no folder.

    Raises:
        CheckpointError: if it is no folder or cannot be read.
    """
    return dict(layout.checkpoints(folder))


def write(
    folder: Path,
    meta: Meta,
    state: Mapping[str, np.ndarray],
    inference: Mapping[str, Leaf],
) -> Path:
    """Writes one checkpoint beside the others and renames it into place; returns its path.

    Everything is on disk (fsync) before the rename, so a kill at any moment leaves the older
    checkpoints and at most a `.partial-` folder. A checkpoint of the same step is replaced, and is
    there until the new one is.

    Args:
        folder: where the checkpoints lie; made if it is not there.
        meta: the record; its `tensors` are filled in here, in the file and not in this object.
        state: "ROLE/PARAMETER" -> array.
        inference: name -> array, x and the buffers; or what is made while it is written, beside the state.

    Raises:
        CheckpointError: no permission, disk full, no folder, a metric that is no finite number, a leaf
            without a role; nothing of the attempt stays.
    """
    for leaf in state:
        exchange.split(leaf)
    with files.cannot(f"write a checkpoint into {folder}"):
        return put(folder, meta.step, lambda path: _fill(path, meta, state, inference))


def _fill(folder: Path, meta: Meta, state: Mapping[str, np.ndarray], inference: Mapping[str, Leaf]) -> None:
    folder.mkdir()

    def ship() -> dict[str, Any]:
        return exchange.write_tensors(folder / INFERENCE, inference, about_inference(meta), sealed=True)

    with beside(ship) as shipped:
        record = {STATE: exchange.write_tensors(folder / STATE, state)}
    record[INFERENCE] = shipped()
    filled = replace(meta, tensors=record)
    (folder / META).write_text(filled.to_json(), encoding="utf-8")  # what names the folder syncs it


def put(folder: Path, step: int, fill: Callable[[Path], None], layout: Layout = PLAIN) -> Path:
    """Lets a checkpoint be filled where no reader looks, and renames it into place; returns its path.

    Args:
        folder: where the checkpoints lie; made if it is not there.
        step: its number. One of the same step counts until the new one is in its place.
        fill: makes and fills the folder that it gets; all of it is on the disk before it gets its name.
        layout: of the folder.

    Raises:
        OSError: as the system gives it; nothing of the attempt stays.
        CheckpointError: if another process writes into the folder.
    """
    with placing(folder, step, layout) as new:
        fill(new.path)
    assert new.final is not None
    return new.final


@dataclass
class Placing:
    """A checkpoint that is being filled: where, and what its name is once it has one."""

    path: Path
    final: Path | None = None


@contextmanager
def placing(folder: Path, step: int, layout: Layout = PLAIN) -> Iterator[Placing]:
    """Yields where to fill a checkpoint; when the block ends well, it gets its name. As `put`."""
    with writing(folder), files.partial(folder) as new:
        new.mkdir()
        one = Placing(new / str(step))
        yield one
        older = steps(folder, layout).get(step)
        final = folder / layout.name(step, older)
        _placing.add(final)
        try:
            if older == final:
                older = files.move(older, folder / REPLACED)
            files.rename(one.path, final)
        finally:
            _placing.discard(final)
    if older is not None:
        files.remove(older)
        _drop_if_empty(folder / REPLACED)
    one.final = final


def newest(folder: Path, layout: Layout = PLAIN) -> Path:
    """Returns the newest checkpoint of a folder.

    Raises:
        CheckpointError: if there is none.
    """
    found = steps(folder, layout)
    if not found:
        raise CheckpointError(
            f"{folder} must hold a checkpoint (step_...), got none: check the path, or start anew"
        )
    return found[max(found)]


def at(path: Path) -> Path:
    """Returns a checkpoint itself, or the newest of a folder of them; raises as `newest`."""
    return path if (path / META).exists() else newest(path)


def weights(path: Path) -> tuple[dict[str, np.ndarray], int | None, list[str]]:
    """Returns weights alone: name -> array, the optimizer steps they were trained for if known, and notices.

    Args:
        path: a checkpoint or a folder of them, or a safetensors file of anyone's.

    Raises:
        CheckpointError: if it cannot be read.
    """
    if path.is_dir():
        meta, arrays = read(at(path), INFERENCE)
        return arrays, meta.step, []
    return exchange.read_tensors(path), *exchange.said_of_weights(path)


def one_of(path: Path, *layouts: Layout) -> Path:
    """Returns the newest checkpoint below a path, in the first layout that has any, or the path itself."""
    return next((newest(path, layout) for layout in layouts if steps(path, layout)), path)


class Chosen(NamedTuple):
    """What a user asks to resume from.

    Attributes:
        path: the checkpoint; None is a start anew.
        skipped: newer ones that do not verify.
        content: what `Layout.verify` returned of it, None if it was not called.
    """

    path: Path | None
    skipped: Sequence[Skipped] = ()
    content: Any = None


def choose(folder: Path, resume: Any, layout: Layout = PLAIN) -> Chosen:
    """Returns the checkpoint that a `resume` means.

    Args:
        folder: where words and steps are looked for.
        resume: "auto" the newest, "latest-good" the newest that verifies, both of them None in a folder
            without any; "none"; a step; the path of a checkpoint, or of a folder of them, also of `PLAIN`.
        layout: of the folder.

    Raises:
        CheckpointError: if it is none of these, or none verifies.
    """
    if resume == "none":
        return Chosen(None)
    found = steps(folder, layout)
    if resume in ("auto", "latest-good") and not found:
        return Chosen(None)
    if resume == "latest-good":
        return latest_good(folder, layout)
    if resume == "auto":
        return Chosen(found[max(found)])
    if isinstance(resume, numbers.Integral) and not isinstance(resume, bool):
        if resume not in found:
            raise CheckpointError(f"{folder} must hold step {resume}, got the steps {sorted(found)}")
        return Chosen(found[int(resume)])
    if not isinstance(resume, Path) and not (isinstance(resume, str) and Path(resume).exists()):
        raise CheckpointError(
            "resume must be 'auto', 'none', 'latest-good', 'weights:PATH', a step or a path that is there, "
            f"got {resume!r}: check the spelling"
        )
    return Chosen(one_of(Path(resume), layout, PLAIN))


def latest_good(folder: Path, layout: Layout = PLAIN) -> Chosen:
    """Returns the newest checkpoint that verifies in full, and the newer ones that do not.

    Raises:
        CheckpointError: if none verifies, with the reason for each.
    """
    skipped: list[Skipped] = []
    for _, path in reversed(layout.checkpoints(folder)):
        try:
            return Chosen(path, skipped, layout.verify(path))
        except CheckpointError as error:
            skipped.append(Skipped(path, str(error)))
    why = "\n".join(f"  {s.path.name}: {s.why}" for s in skipped) or "  it holds none"
    raise CheckpointError(f"{folder} must hold a checkpoint that verifies, got none:\n{why}")


def set_aside(folder: Path, newer_than: int, layout: Layout = PLAIN) -> list[Path]:
    """Moves checkpoints newer than a step to FOLDER/set-aside; returns where they are now.

    They are of a run that this one has turned back from. They are kept, but a resume must not take them
    for the newest of this run.

    Raises:
        CheckpointError: if the folder cannot be read or written to.
    """
    newer = [path for step, path in layout.checkpoints(folder) if step > newer_than]
    with files.cannot(f"move checkpoints in {folder}"):
        return [files.move(path, folder / files.SET_ASIDE) for path in newer]


def clean(folder: Path, layout: Layout = PLAIN) -> list[Path]:
    """Removes what interrupted saves left behind and returns it.

    That is every `.partial-` folder, and the older of two checkpoints of the same step. One that had made
    way for a new one, which never came, comes back.
    """
    for path in (folder / REPLACED).glob("*"):
        final = folder / path.name
        if final not in _placing and not final.exists():
            os.rename(path, final)
        elif final not in _placing:
            files.discard(path)
    _drop_if_empty(folder / REPLACED)
    everything, kept = layout.checkpoints(folder), set(steps(folder, layout).values())
    left = files.leftovers(folder)
    for path in left:
        files.discard(path)
    replaced = [path for _, path in everything if path not in kept]
    return left + [path for path in replaced if files.remove(path)]


def _drop_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def prune(
    folder: Path, keep_newest: int, keep_best: int, metric: str = "loss", layout: Layout = PLAIN
) -> list[Path]:
    """Removes all but the newest checkpoints and those of the smallest metric; returns what went.

    Args:
        folder: where they lie.
        keep_newest: how many of the newest to keep, >= 1.
        keep_best: how many of the smallest metric to keep, >= 0; of equal ones the older.
        metric: a key of `Meta.metrics`; checkpoints without it rank nowhere.
        layout: of the folder.

    Raises:
        CheckpointError: if the numbers are out of range, or the folder cannot be read.
    """
    if keep_newest < 1 or keep_best < 0:
        raise CheckpointError(
            f"keep_newest must be >= 1 and keep_best >= 0, got {keep_newest} and {keep_best}: "
            "without the newest there is nothing to resume from"
        )
    found = steps(folder, layout)
    keep = set(list(found)[-keep_newest:])
    scored = []
    for step, path in found.items():
        try:
            scored.append((layout.read_meta(path).metrics[metric], step))
        except (CheckpointError, KeyError):
            continue
    keep |= {step for _, step in sorted(scored)[:keep_best]}
    return [path for step, path in found.items() if step not in keep and files.remove(path)]
