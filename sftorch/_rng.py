"""The global random number generators of torch, CUDA, NumPy and Python, as leaves of a checkpoint."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_CPU = {"rng/torch", "rng/numpy", "rng/python"}
_CUDA = "rng/torch_cuda/"


def capture(rank: int = 0) -> dict[str, np.ndarray]:
    """Returns leaf -> state, as bytes. Generators of your own go through `extra`.

    Args:
        rank: of this process; what is not rank 0's has names of its own, rng/rank1/...
    """
    of_numpy: Any = np.random.get_state(legacy=True)
    name, keys, *rest = of_numpy
    found = {
        "rng/torch": torch.get_rng_state().numpy().copy(),
        "rng/numpy": _as_bytes([name, keys.tolist(), *rest]),
        "rng/python": _as_bytes(random.getstate()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        found |= {f"{_CUDA}{i}": state.cpu().numpy().copy() for i, state in enumerate(states)}
    return {_of_rank(leaf, rank): state for leaf, state in found.items()}


def _of_rank(leaf: str, rank: int) -> str:
    return leaf.replace("rng/", f"rng/rank{rank}/", 1) if rank else leaf


def own(arrays: Mapping[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """Returns a rank's states under the names that one process gives them, {} if there are none."""
    first = {leaf: array for leaf, array in arrays.items() if leaf.startswith("rng/")}
    if not rank:
        return {leaf: array for leaf, array in first.items() if not leaf.startswith("rng/rank")}
    start = f"rng/rank{rank}/"
    return {f"rng/{leaf.removeprefix(start)}": a for leaf, a in first.items() if leaf.startswith(start)}


def restore(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Sets the generators to the saved states, of `own`; returns what could not be set, in sentences."""
    if not arrays.keys() >= _CPU:
        return [
            "random numbers: the checkpoint has no states of torch's, NumPy's and Python's generators, so "
            "they stay as they are"
        ]
    name, keys, position, has_gauss, gauss = json.loads(arrays["rng/numpy"].tobytes())
    version, words, gauss_of_python = json.loads(arrays["rng/python"].tobytes())
    torch.set_rng_state(torch.from_numpy(arrays["rng/torch"].copy()))
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    random.setstate((version, tuple(words), gauss_of_python))
    saved = [leaf for leaf in arrays if leaf.startswith(_CUDA)]
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(min(len(saved), here)):
        torch.cuda.set_rng_state(torch.from_numpy(arrays[f"{_CUDA}{i}"].copy()), i)
    if len(saved) > here:
        return [
            f"random numbers: the checkpoint has the states of {len(saved)} CUDA device(s), this machine has "
            f"{here}: dropout on the others continues from another state"
        ]
    return []


def _as_bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
