"""One batch of parameters and where it is to go: what the plan makes, and every backend takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Direction(NamedTuple):
    """S6 without lr and decay, twice; neither writes to a gradient, both update the buffers.

    Attributes:
        single: (gradient, buffers by name, *numbers) -> direction. The numbers may be 0-d tensors.
        foreach: the same for lists, with plain numbers.
        kernel: what the kernels know it as, the name of a `kernels.call.Kind`; "" where they do not.
    """

    single: Callable[..., Tensor]
    foreach: Callable[..., list[Tensor]]
    kernel: str = ""


class Move(NamedTuple):
    """What S6-S9 need to know of one batch; lists have one entry a parameter, complex ones as reals.

    A backend's numbers are lr_t, wd_y, wd_z, k1, k2 and then the direction's own:

        delta = -lr_t (direction + wd_y y + wd_z z)     z' = z + delta     y' = y + k1 (z - y) + k2 delta

    With xs, y ends as x' = x + k1 (z' - x), and k1 is c. In the lean form k2 is beta: w = gap + k2 delta,
    y' = y + k1 w + (1 - k2) delta, gap' = (1 - k1) w.

    Attributes:
        direction: how gradients become directions.
        ys: the parameters.
        rests: what 16-bit parameters cannot hold, as in `forms`; empty where they hold all.
        xs: the averages if ys are to end as x (they are used up), else empty.
        zs: base iterates, at least float32; in the lean form the gaps z - y.
        grads: gradients, in any dtype; new ones in every step.
        buffers: the direction's, by name.
        foreach, fused, maximize: the group's options.
        keys: in the lean form the random words of `lean.keys`, else None; new ones in every step.
        kept: for a backend to keep what it makes of tensors that stay from step to step.
    """

    direction: Direction
    ys: list[Tensor]
    rests: list[Tensor]
    xs: list[Tensor]
    zs: list[Tensor]
    grads: list[Tensor]
    buffers: dict[str, list[Tensor]]
    foreach: bool | None
    fused: bool | None
    maximize: bool
    keys: Tensor | None
    kept: dict[str, Any]

    def rows(self, indices: list[int]) -> Move:
        """Returns the part of a move that concerns some of its parameters."""

        def some(tensors: list[Tensor]) -> list[Tensor]:
            return [tensors[i] for i in indices] if tensors else []

        buffers = {name: some(tensors) for name, tensors in self.buffers.items()}
        ys, rests, xs, zs, grads = map(some, (self.ys, self.rests, self.xs, self.zs, self.grads))
        keys = None if self.keys is None else self.keys[indices]
        part = self._replace(ys=ys, rests=rests, xs=xs, zs=zs, grads=grads, buffers=buffers)
        return part._replace(keys=keys, kept={})
