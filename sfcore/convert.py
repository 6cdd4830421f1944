"""From any file to resume from to an exchange folder, to the other framework, or to weights to ship."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sfcore import checks, exchange, files, sources, store
from sfcore.exchange import CheckpointError, of_role
from sfcore.iterates import says_beta, x_of
from sfcore.meta import Meta, precision_of
from sfcore.names import USER_MAP, UserMap, translate
from sfcore.sources import Source

TARGETS = ("jax", "torch", "exchange", "inference")


def convert(src: str | Path, dst: str | Path, to: str, user: UserMap = None) -> tuple[Path, list[str]]:
    """Reads one thing and writes another.

    Args:
        src: whatever `sfcore.inspection.inspect` takes.
        dst: for "inference" a new safetensors file; else a folder, in which the checkpoint is written as
            step_... of the framework-free store.
        to: "exchange" keeps names and layouts, "jax" and "torch" write those of that framework,
            "inference" writes x and the buffers alone, under the source's names.
        user: the map between names, as for `sfcore.names.between`: a JSON file or its content.

    Returns:
        What was written, and notices of what could not be kept.

    Raises:
        CheckpointError: if the source is damaged or not enough for the target, or the target is there.
        NamesError: with every leaf whose counterpart cannot be told (a CheckpointError).

    Example:
        >>> import tempfile, numpy as np
        >>> from pathlib import Path
        >>> from sfcore import exchange
        >>> from sfcore.convert import convert
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     weights = Path(folder) / "x.safetensors"
        ...     header = {"weights_hold": "x"}
        ...     record = exchange.write_tensors(weights, {"w": np.ones(2)}, header)
        ...     path, notices = convert(weights, Path(folder) / "ship.safetensors", "inference")
        ...     np.array_equal(exchange.read_tensors(path)["w"], np.ones(2))
        True
    """
    checks.require(TypeError, src=(checks.PATH, src), dst=(checks.PATH, dst), user=(USER_MAP, user))
    if to not in TARGETS:
        raise CheckpointError(
            f"to must be one of {', '.join(TARGETS)}, got {to!r}: inference is what to ship"
        )
    source = sources.load(Path(src))
    if to == "inference":
        if user is not None:
            raise CheckpointError("a map has no use here, got one: inference weights keep the source's names")
        return _write_inference(source, Path(dst)), list(source.notes)
    return _write_checkpoint(source, Path(dst), to, user)


def _write_checkpoint(source: Source, folder: Path, to: str, user: UserMap) -> tuple[Path, list[str]]:
    meta = _whole(source)
    state, x = dict(source.state), _inference(source)
    notices = list(source.notes)
    if to in ("jax", "torch") and meta.framework != to:
        names = translate.name_map(meta, state, to, user)
        meta, state, x, more = translate.translate(meta, state, x, to, names)
        notices += more
    elif user is not None:
        raise CheckpointError(
            f"a map has no use here, got one: {source.path} has the names of {meta.framework}"
        )
    if meta.step in store.steps(folder):
        raise CheckpointError(f"{folder} must not hold step {meta.step} yet: choose another folder")
    return store.write(folder, meta, state, x), notices


def _whole(source: Source) -> Meta:
    """Returns the record of a source that a run could go on from."""
    meta = source.meta
    if meta is None:
        raise CheckpointError(
            f"{source.path} must have optimizer state, got {source.what}: only 'inference' can be made of it"
        )
    if meta.optimizer == "plain":
        raise CheckpointError(
            f"{source.path} must be of a Schedule-Free optimizer, got {source.what}: start with "
            "sftorch.checkpoint.import_state_dict, which keeps v, and save from there"
        )
    if meta.parameters and not any(group["parameters"] for group in meta.groups):
        raise CheckpointError(
            f"{source.path} must hold z of every parameter, got the one vector of optax.flatten: only "
            "'inference' can be made of it"
        )
    if not source.named or any(f"y/{name}" not in source.state for name in meta.parameters):
        raise CheckpointError(
            f"{source.path} must hold the weights and their names beside the state, got {source.what} "
            "without: save {'model': model.state_dict(), 'optimizer': optimizer.state_dict()} in one file, "
            "both of the same step, of an optimizer built over model.named_parameters()"
        )
    if not source.verified and not all(map(says_beta, meta.groups)):
        raise CheckpointError(
            f"{source.path} must say the beta that built y, got {source.what} without: load it with "
            "sftorch.checkpoint.import_state_dict into an optimizer built with it, and save from there"
        )
    if not source.verified:  # it came without a record
        meta.precision = precision_of(meta.parameters)
    return meta


def _inference(source: Source) -> dict[str, np.ndarray]:
    if source.inference is not None:
        return dict(source.inference)
    assert source.meta is not None
    return x_of(source.meta, source.state) | of_role(source.state, "buffer")


def _write_inference(source: Source, path: Path) -> Path:
    """Writes x beside the target and renames it into place."""
    if source.meta is None and source.inference is None:
        raise CheckpointError(
            f"{source.path} must say whether it holds x or y, got {source.what}: convert the checkpoint "
            "with the optimizer state, from which x can be computed"
        )
    if source.meta is not None and source.inference is None:
        _whole(source)
    if path.exists():
        raise CheckpointError(f"{path} must not be there yet: choose another name, or remove it")
    x = _inference(source)
    about = (
        {"format": "pt", "weights_hold": "x"} if source.meta is None else store.about_inference(source.meta)
    )
    with files.cannot(f"write {path}"), files.partial(path.parent) as partial:
        exchange.write_tensors(partial, x, about, sealed=True)
        files.rename(partial, path)
    return path
