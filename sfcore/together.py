"""One checkpoint of several ranks: each writes a part of it, and it counts once all of them have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sfcore import exchange, files, store
from sfcore.meta import Meta
from sfcore.ranks import Ranks
from sfcore.shards import Place
from sfcore.store import INFERENCE, PLAIN, STATE, Chosen, Layout, Skipped


def choose(ranks: Ranks, folder: Path, resume: Any, layout: Layout = PLAIN) -> Chosen:
    """Returns the checkpoint that a `resume` means, which rank 0 looks for; as `sfcore.store.choose`."""

    def chosen() -> Chosen | None:
        return store.choose(folder, resume, layout) if ranks.is_first else None

    def tell(found: Chosen | None) -> Any:
        if found is None:
            return None
        return [
            found.path and str(found.path.absolute()),
            [[str(one.path), one.why] for one in found.skipped],
        ]

    found, told = ranks.agree("find a checkpoint", chosen, tell)
    if found is not None:
        return found
    path, skipped = told[0]
    return Chosen(path and Path(path), [Skipped(Path(one), why) for one, why in skipped])


def put(
    ranks: Ranks,
    folder: Path,
    step: int,
    fill: Callable[[Path], Any],
    finish: Callable[[Path, list[Any]], None],
    layout: Layout = PLAIN,
) -> Path:
    """Lets every rank fill its part of one checkpoint, and rank 0 finish it and give it its name; as `put`.

    Args:
        ranks: all of which call this.
        folder, step, layout: as for `put`; the folder is rank 0's.
        fill: writes this rank's part into a folder that is there, synced; returns JSON about it.
        finish: on rank 0, gets that of all ranks, and writes what is left.

    Raises:
        CheckpointError: on every rank if one of them cannot; nothing of the attempt stays.
    """

    def begin() -> str | None:
        if not ranks.is_first:
            return None
        new = stack.enter_context(store.placing(folder, step, layout))
        new.path.mkdir()
        own.append(new)
        return str(new.path)

    def end() -> str | None:
        if not ranks.is_first:
            return None
        finish(path, parts)
        stack.close()
        return str(own[0].final)

    def safely(work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with files.cannot(f"write a checkpoint into {folder}"):
                return work()

        return run

    own: list[store.Placing] = []
    with ExitStack() as stack:
        _, told = ranks.agree("begin a checkpoint", safely(begin), tell=lambda new: new)
        path = Path(told[0])
        _, parts = ranks.agree("write its part", safely(lambda: fill(path)), tell=lambda about: about)
        _, told = ranks.agree("end the checkpoint", safely(end), tell=lambda final: final)
    return Path(told[0])


@dataclass
class Part:
    """What one rank writes of a checkpoint.

    Attributes:
        state: leaf -> array, or piece of one.
        inference: entry -> array, or piece of one.
        places: leaf -> where it lies, of those that are pieces.
        inference_places: the same of entries.
    """

    state: Mapping[str, np.ndarray] = field(default_factory=dict)
    inference: Mapping[str, exchange.Leaf] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)
    inference_places: Mapping[str, Place] = field(default_factory=dict)


def write(ranks: Ranks, folder: Path, meta: Meta, part: Part, in_pieces: bool) -> Path:
    """Writes one checkpoint of all ranks; as `write`.

    Args:
        ranks: all of which call this.
        folder: of rank 0.
        meta: the record; its `tensors` and `ranks` are filled in here. All else is rank 0's, but that every
            rank has a place in the data, extra and recent of its own.
        part: this rank's.
        in_pieces: whether any rank's part has pieces. If not, rank 0's files are those of one process.
    """

    def fill(path: Path) -> dict[str, Any]:
        own = {name: getattr(meta, name) for name in ("epoch", "position", "extra", "recent")}
        return {"files": fill_files(path), "own": own}

    def fill_files(path: Path) -> dict[str, Any]:
        whole = ranks.is_first and not in_pieces
        about, found = store.about_inference(meta), {}
        if part.state:
            name = STATE if whole else store.part_name(STATE, ranks.rank, ranks.count)
            found[name] = exchange.write_tensors(path / name, part.state, places=part.places)
        if part.inference:
            name = INFERENCE if whole else store.part_name(INFERENCE, ranks.rank, ranks.count)
            found[name] = exchange.write_tensors(
                path / name, part.inference, about, sealed=True, places=part.inference_places
            )
        return found

    def finish(path: Path, parts: list[Any]) -> None:
        record = {name: leaves for one in parts for name, leaves in one["files"].items()}
        first = parts[0]["own"]
        own = [{k: v for k, v in one["own"].items() if v != first[k]} for one in parts]
        files.write_text(path / store.META, replace(meta, tensors=record, ranks=own).to_json())

    return put(ranks, folder, meta.step, fill, finish)
