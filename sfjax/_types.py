"""The types of public arguments. Trees and optax's own are Any to a type checker: optax ships no types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np

from sfcore.hyperparameters import ScheduleFree

Tree = TypeVar("Tree")
Scalar: TypeAlias = float | np.floating[Any] | np.integer[Any] | np.ndarray | jax.Array
Whole: TypeAlias = int | np.integer[Any] | np.ndarray | jax.Array
Schedule: TypeAlias = Callable[[Any], Any]
ScalarOrSchedule: TypeAlias = Scalar | Schedule
Configuration: TypeAlias = ScheduleFree | Mapping[str, Any]
Configurations: TypeAlias = Configuration | Sequence[Configuration]
MicroBatches: TypeAlias = int | Sequence[int]
