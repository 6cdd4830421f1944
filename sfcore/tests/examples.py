"""One small checkpoint with every dtype, for the tests."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from sfcore.lock import LOCK, OWNER
from sfcore.meta import Meta

DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
DTYPES += ["float16", "float32", "float64", "complex64", "complex128"]
DTYPES += [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
DTYPES += [ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz]


def every_dtype():
    """Returns leaf -> array of random bits, of every dtype and several shapes."""
    rng = np.random.default_rng(0)
    leaves = {}
    for dtype in map(np.dtype, DTYPES):
        for shape in [(3, 2), (), (0, 4)]:
            count = int(np.prod(shape)) * dtype.itemsize
            raw = rng.integers(0, 2 if dtype.name == "bool" else 256, count).astype(np.uint8)
            leaves[f"extra/{dtype.name}/{len(shape)}/{count}"] = raw.view(dtype).reshape(shape)
    return leaves


def state(step=1):
    """Returns the leaves of a two-parameter state."""
    rng = np.random.default_rng(step)
    shapes = {"w": (3, 2), "b": (2,)}
    return {
        f"{role}/{name}": rng.standard_normal(shape).astype(np.float32)
        for role in ("y", "z", "v")
        for name, shape in shapes.items()
    }


def inference(step=1):
    """Returns plain names -> x."""
    return {leaf[2:]: array for leaf, array in state(step).items() if leaf.startswith("y/")}


def meta(step=1, **options):
    """Returns a record; the store fills in the leaves."""
    return Meta(framework="torch", optimizer="adamw", step=step, **options)


def same(a, b):
    """Tells whether two mappings hold the same arrays, bit for bit."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def listed(folder):
    """Returns the names in a folder of checkpoints, sorted, but for those of its lock."""
    return sorted({path.name for path in folder.iterdir()} - {LOCK, OWNER})
