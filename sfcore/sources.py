"""What lies at a path: our checkpoints, Orbax folders, safetensors and torch files, read into one form.

Files that need a framework are read by the package that has it, which registers its reader in its metadata:
an entry point of the group `READERS`, called by the kind of file, that leads to `read(path) -> Source`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np

from sfcore import exchange, store
from sfcore.exchange import CheckpointError, roles
from sfcore.iterates import widened
from sfcore.meta import Meta

KNOWN = (
    "known are checkpoint folders of sftorch and sfjax, Orbax folders with a Schedule-Free state, "
    "safetensors files, and torch files with state dicts of sftorch, schedulefree, pytorch_optimizer or torch"
)

READERS = "schedulefree_twin.readers"
_ORBAX, _TORCH = ("orbax", "an Orbax folder", "jax"), ("torch", "a torch file", "torch")


@dataclass
class Source:
    """What was found.

    Attributes:
        path: where it was read, which may be a checkpoint below the path that was asked for.
        what: what it is, in words.
        meta: the record, built from what the file says where it has none; None for weights alone.
        state: "ROLE/NAME" -> array.
        inference: name -> x and buffers, if the file has them.
        weights: name -> array of a file of weights without a record.
        named: False if parameters are numbered because their names are not known.
        verified: whether every leaf was held against a record.
        notes: sentences about what was found on the way.
        holds: "x" or "y", what the weights in or beside the file are, where `meta` says it of `state` only.
    """

    path: Path
    what: str
    meta: Meta | None = None
    state: dict[str, np.ndarray] = field(default_factory=dict)
    inference: dict[str, np.ndarray] | None = None
    weights: dict[str, np.ndarray] | None = None
    named: bool = True
    verified: bool = False
    notes: list[str] = field(default_factory=list)
    holds: str | None = None


def load(path: Path) -> Source:
    """Reads what lies at a path.

    Raises:
        CheckpointError: if there is nothing, if it is damaged, or of no known kind.
    """
    try:
        if path.is_dir():
            return _folder(path)
        if path.exists() and not path.is_file():  # it can be read once only, or never ends
            raise unknown(path, "a pipe or a device, which must be written to a file first")
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise CheckpointError(exchange.cannot_read(path, error)) from error
    return _file(path, start)


def unknown(path: Path, what: str) -> CheckpointError:
    """Returns the error for something that is not known."""
    return CheckpointError(f"{path} must be something to resume from, got {what}: {KNOWN}")


def is_ours(path: Path) -> bool:
    """Tells whether a folder is one Orbax checkpoint of ours."""
    return (path / "meta" / "metadata").is_file()


def is_item(path: Path) -> bool:
    """Tells whether a folder holds the arrays of one Orbax item."""
    return (path / "_METADATA").is_file()


def _registered(kind: str, what: str, extra: str, path: Path) -> Source:
    """Returns what the reader that is registered for a kind of file makes of it."""
    needs = f"pip install 'schedulefree-twin[{extra}]'"
    for reader in entry_points(group=READERS, name=kind):
        try:
            read = reader.load()
        except ImportError as error:
            raise CheckpointError(
                f"{path} is {what}, which cannot be read here ({error}): {needs}"
            ) from error
        found: Source = read(path)
        return found
    raise CheckpointError(f"{path} is {what}, for which no reader is installed: {needs}")


def _folder(path: Path) -> Source:
    if (path / store.META).exists():
        return _checkpoint(path)
    if steps := store.steps(path):
        return _newest(path, sorted(steps), _checkpoint(store.newest(path)))
    if is_item(path) or is_ours(path):
        return _registered(*_ORBAX, path)
    numbered = {
        int(below.name): below for below in path.iterdir() if below.is_dir() and below.name.isdecimal()
    }
    if numbered:  # a run of Orbax's CheckpointManager
        return _newest(path, sorted(numbered), _registered(*_ORBAX, numbered[max(numbered)]))
    if (path / "_CHECKPOINT_METADATA").exists():
        return _registered(*_ORBAX, path)
    raise unknown(path, "an empty folder" if not any(path.iterdir()) else "a folder of other files")


def _newest(path: Path, steps: list[int], source: Source) -> Source:
    others = ", ".join(map(str, steps[:-1])) or "no others"
    source.notes.insert(
        0, f"{path} holds {len(steps)} checkpoint(s); this is the newest, step {steps[-1]} ({others})"
    )
    return source


def _checkpoint(path: Path) -> Source:
    meta, stored = store.read(path)
    state = widened(stored)
    inference = store.read(path, store.INFERENCE)[1]
    what = f"checkpoint of schedulefree-twin, names and layouts of {meta.framework}"
    return Source(path, what, meta, state, inference, verified=True)


def _file(path: Path, start: bytes) -> Source:
    if path.name in (store.STATE, store.INFERENCE, store.META) and (path.parent / store.META).exists():
        source = _checkpoint(path.parent)
        source.notes.insert(0, f"{path.name} is a part of the checkpoint {path.parent}, which is shown")
        return source
    if path.suffix == ".safetensors" or (len(start) > 8 and start[8:9] == b"{"):
        return _safetensors_file(path)
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        return _registered(*_TORCH, path)
    raise unknown(path, "an empty file" if not start else f"a file that begins with {start[:8]!r}")


def _safetensors_file(path: Path) -> Source:
    tensors = exchange.read_tensors(path)
    about, record = exchange.read_header(path)
    if tensors and all(name.partition("/")[0] in roles() for name in tensors):
        raise unknown(path, f"the state of a checkpoint without its {store.META}, which must lie beside it")
    source = Source(path, "weights without optimizer state (safetensors)", weights=tensors)
    source.verified = record is not None
    if about.get("weights_hold") == "x":
        source.what = f"inference weights of schedulefree-twin, x at step {about.get('step', 'unknown')}"
        source.inference = tensors
    return source
