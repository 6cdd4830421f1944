"""What a checkpoint says about itself: one JSON schema for both frameworks, versioned."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sfcore.checks import nearest
from sfcore.exchange import CheckpointError

FORMAT = "schedulefree-twin"
FORMAT_VERSION = 1


@dataclass
class Meta:
    """The JSON beside the tensors.

    Attributes:
        framework: "jax" or "torch", where the names and layouts come from.
        optimizer: "sgd", "adamw", "radam", "wrapper", or the name of an importer's source.
        groups: one dict a parameter group: "hyperparameters" (canonical names of
            `sfcore.hyperparameters`), "clock" (step, lr_max, weight_sum), "parameters" (names).
        parameters: name -> {"shape", "dtype", "clock"}; clock is None before a first gradient.
        step: finished optimizer updates.
        epoch, position: place in the data; position counts the micro-batches taken in this epoch.
        accumulation: {"steps": micro-batches an update, "position": of them already in the gradient}.
        precision: dtype of the parameters, "mixed" if they differ.
        weights_hold: "y" or "x": what the arrays under "y/" or a plain weights file are.
        fingerprints: {"x": sha256, "y": sha256} of the parameters, by `sfcore.exchange.fingerprint`.
        tensors: file -> leaf -> {"dtype", "shape", "crc32"}; written by the store.
        metrics: finite floats that rank checkpoints, such as {"loss": 0.1}.
        recent: what the last steps did, for the watch after a restart; see `sfcore.watch`.
        versions: package -> version.
        extra: JSON of the user's own.
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
    fingerprints: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    recent: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Returns the JSON text; it carries a CRC-32 of itself, so that a changed byte is noticed."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(body | {"crc32": _crc(body)}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, source: Path | str = "meta.json") -> Meta:
        """Reads and checks the JSON text.

        Raises:
            CheckpointError: if it is no JSON, of another program, newer than this one, or changed.
        """
        try:
            body = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{source} must be JSON, got a damaged file ({error})") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise CheckpointError(f"{source} must be a {FORMAT} checkpoint's, got another program's JSON")
        if body.get("format_version", 0) > FORMAT_VERSION:
            raise CheckpointError(
                f"{source} must have format version <= {FORMAT_VERSION}, got {body['format_version']}: "
                "it was written by a newer schedulefree-twin, so upgrade with pip install -U schedulefree-twin"
            )
        recorded = body.pop("crc32", None)
        if recorded != _crc(body):
            raise CheckpointError(f"{source} must have the CRC-32 {recorded}, got {_crc(body)}: it was changed or damaged")
        known = {f.name for f in fields(cls)}
        unknown = set(body) - known - {"format", "format_version"}
        if unknown:
            name = min(unknown)
            raise CheckpointError(f"{source} must have known keys, got {name!r}; the nearest is {nearest(name, known)!r}")
        return cls(**{name: value for name, value in body.items() if name in known})


def _crc(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
