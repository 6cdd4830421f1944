"""What a checkpoint says about itself: one JSON schema for both frameworks, versioned."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sfcore import checks
from sfcore.checks import hint
from sfcore.exchange import OLDER, CheckpointError, crc_of

FORMAT = "schedulefree-twin"
FORMAT_VERSION = 2  # 1 is written where there is nothing that its readers do not know
_NOT_KEPT = ("format", "format_version", "fingerprints")  # the last of earlier versions: SHA-256 of x and y


@dataclass
class Meta:
    """The JSON beside the tensors.

    Attributes:
        framework: "jax" or "torch", where the names and layouts come from.
        optimizer: "sgd", "adamw", "radam", "wrapper", or the name of an importer's source.
        groups: one dict a parameter group: "hyperparameters" (canonical names of
            `sfcore.hyperparameters`), "clock" (step, lr_max, weight_sum), "parameters" (names).
        parameters: name -> {"shape", "dtype", "clock"}; clock is None before a first gradient. "kind",
            the name of the module's class, is there where the framework knows it; see `sfcore.names`.
        step: finished optimizer updates.
        epoch, position: place in the data; position counts the micro-batches taken in this epoch.
        accumulation: {"steps": micro-batches an update, "position": of them already in the gradient}.
        precision: dtype of the parameters, "mixed" if they differ.
        weights_hold: "y" or "x": what the arrays under "y/" or a plain weights file are.
        tensors: file -> leaf -> {"dtype", "shape", "crc32"}; written by the store.
        metrics: finite floats that rank checkpoints, such as {"loss": 0.1}.
        recent: what the last steps did, for the watch after a restart; see `sfcore.watch`.
        versions: package -> version.
        extra: JSON of the user's own; keys that are no strings come back as strings, tuples as lists.
        ranks: of a run of several processes, what each had otherwise than rank 0 of "epoch", "position",
            "extra" and "recent"; [] of one process.
    """

    framework: str
    optimizer: str
    step: int
    groups: list[dict[str, Any]] = field(default_factory=list)
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    epoch: int = 0
    position: int = 0
    accumulation: dict[str, int] = field(default_factory=lambda: {"steps": 1, "position": 0})
    precision: str = "float32"
    weights_hold: str = "y"
    tensors: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    recent: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> str:
        """Returns the JSON text; it carries a CRC-32 of itself, so that a changed byte is noticed.

        Raises:
            CheckpointError: with every metric that is no finite number, or for a value JSON has no form for.
        """
        as_metrics(self.metrics)
        try:
            # There and back, because the CRC must be that of what a reader will see.
            own = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
            if not self.ranks:
                own["format_version"] = 1
                del own["ranks"]
            body = json.loads(json.dumps(own, default=_plain))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"meta must be JSON: {error}; arrays go among the tensors") from error
        return json.dumps(body | {"crc32": crc_of(body)}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, source: Path | str = "meta.json") -> Meta:
        """Reads and checks the JSON text.

        Raises:
            CheckpointError: if it is no JSON, of another program, newer than this one, or changed.
        """
        checks.require(TypeError, text=(checks.TEXT, text), source=(checks.PATH, source))
        body = _parse(text, source)
        recorded = body.pop("crc32", None)
        intact = recorded == crc_of(body)
        version = body.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{source} must have format version <= {FORMAT_VERSION}, got {version}: it was written by a "
                "newer schedulefree-twin, so upgrade with pip install -U schedulefree-twin"
                + ("" if intact else f" (or it is damaged, its CRC-32 differs: {OLDER})")
            )
        if not intact:
            raise CheckpointError(f"{source} is damaged: its CRC-32 is not the recorded {recorded}; {OLDER}")
        known = {f.name: f for f in fields(cls)}
        for name in body:
            if name not in known and name not in _NOT_KEPT:
                raise CheckpointError(f"{source} must have known keys only, got {name!r}{hint(name, known)}")
        for name, of in known.items():
            if name not in body and of.default is MISSING and of.default_factory is MISSING:
                raise CheckpointError(f"{source} must have the key {name!r}, got none")
        return cls(**{name: value for name, value in body.items() if name in known})


def of_rank(meta: Meta, rank: int) -> Meta:
    """Returns the record as one rank wrote it: with its own place in the data and its own extra.

    Example:
        >>> from sfcore.meta import Meta, of_rank
        >>> meta = Meta("torch", "sgd", 3, position=4, ranks=[{}, {"position": 5}])
        >>> of_rank(meta, 1).position, of_rank(meta, 0).position
        (5, 4)
    """
    return replace(meta, **meta.ranks[rank]) if rank < len(meta.ranks) else meta


def as_place(step: Any, epoch: Any, position: Any, metrics: Any = None, extra: Any = None) -> dict[str, Any]:
    """Returns the fields of `Meta` that a save is told, as plain Python.

    Args:
        step, epoch, position: numbers, or arrays or tensors of one element.
        metrics: as for `as_metrics`.
        extra: a mapping of the user's own, None for none; what is in it stays as it is.

    Raises:
        CheckpointError: with every count that is no whole number >= 0 (no reader would find the checkpoint of
            such a step), a metric that is no finite number, or an extra that is no mapping.

    Example:
        >>> import numpy as np
        >>> from sfcore.meta import as_place
        >>> as_place(np.int64(7), 0, 20, {"loss": 1})
        {'step': 7, 'epoch': 0, 'position': 20, 'metrics': {'loss': 1.0}, 'extra': {}}
    """
    counts = {name: number_in(v) for name, v in (("step", step), ("epoch", epoch), ("position", position))}
    given = {name: (checks.COUNT, value) for name, value in counts.items()}
    checks.require(CheckpointError, **given, extra=(checks.optional(checks.MAPPING), extra))
    counts = {name: int(value) for name, value in counts.items()}
    return counts | {"metrics": as_metrics(metrics), "extra": dict(extra or {})}


def as_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Returns metrics, numbers or arrays or tensors of one element, as Python floats; of None none.

    Raises:
        CheckpointError: with every one that is no finite number: NaN would break the ranking.

    Example:
        >>> import numpy as np
        >>> from sfcore.meta import as_metrics
        >>> as_metrics({"loss": np.float32(0.25)})
        {'loss': 0.25}
    """
    checks.require(CheckpointError, metrics=(checks.optional(checks.MAPPING), metrics))
    found = {name: number_in(value) for name, value in (metrics or {}).items()}
    bad = [f"{name} = {value!r}" for name, value in found.items() if not _finite(value)]
    if bad:
        raise CheckpointError(
            f"metrics must be finite numbers, got {', '.join(bad)}: leave them out, or pass float(value)"
        )
    return {name: float(value) for name, value in found.items()}


def as_accumulation(given: Iterable[int], batch_size: int | None) -> dict[str, int]:
    """Returns `Meta.accumulation`.

    Args:
        given: (micro-batches an update, of them already in the gradients).
        batch_size: of a micro-batch, if it is known.

    Raises:
        CheckpointError: unless the second is less than the first and no less than 0.

    Example:
        >>> from sfcore.meta import as_accumulation
        >>> as_accumulation((4, 1), batch_size=16)
        {'steps': 4, 'position': 1, 'batch_size': 16}
    """
    pair = [number_in(one) for one in given] if isinstance(given, Iterable) else []
    if len(pair) != 2 or not all(map(checks.COUNT.holds, pair)) or not pair[1] < pair[0]:
        raise CheckpointError(
            f"accumulation must be (steps, position) with 0 <= position < steps, got {given!r}: "
            "after the last micro-batch take the step, and position is 0"
        )
    steps, position = map(int, pair)
    return with_batch_size({"steps": steps, "position": position}, batch_size)


def with_batch_size(accumulation: dict[str, int], batch_size: Any) -> dict[str, int]:
    """Returns `Meta.accumulation` with the size of a micro-batch, if it is known.

    Raises:
        CheckpointError: if it is no whole number >= 0.
    """
    size = number_in(batch_size)
    checks.require(CheckpointError, batch_size=(checks.optional(checks.COUNT), size))
    return accumulation if size is None else accumulation | {"batch_size": int(size)}


def precision_of(parameters: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns `Meta.precision` of `Meta.parameters`."""
    dtypes = {about["dtype"] for about in parameters.values()}
    return dtypes.pop() if len(dtypes) == 1 else "mixed"


def number_in(value: Any) -> Any:
    """Returns the number in an array or tensor of one element, anything else as it is."""
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):
        return value


def _finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> Any:
    """Returns a path as text, and a NumPy, torch or JAX scalar as a Python number."""
    if isinstance(value, Path):
        return str(value)
    if getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"got a {type(value).__name__}")


def _parse(text: str, source: Path | str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged: it must be JSON ({error}); {OLDER}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(
            f"{source} must say it is a {FORMAT} checkpoint: it is another program's, or damaged"
        )
    return body
