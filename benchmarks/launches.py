"""What a step of lists is to a CUDA device: launches, bytes and temporaries, counted on fake tensors.

No device is needed: torch's FakeTensorMode runs a step of CUDA tensors without memory, and every operation
tells what it reads and writes. Launches of list operations follow torch's multi_tensor_apply: blocks of
65,536 elements, at most 320 of them and as many tensors as its table of addresses holds.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sftorch
from benchmarks._records import digits, replace_part, versions
from benchmarks._trees import TREES, Shape, count

RESULTS = Path(__file__).parent / "results" / "launches.jsonl"
# Of ATen/native/cuda/MultiTensorApply.cuh: tensors in a table, by the lists that an operation takes.
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
BLOCK, BLOCKS = 65_536, 320
NO_KERNEL = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "narrow",
    "new_empty", "select", "slice", "split", "unbind", "view", "view_as_real", "_local_scalar_dense",
}  # fmt: skip
WRITES_ONLY = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
LR = 1e-4


class Count(TorchDispatchMode):
    """Counts inside a `with` block.

    Attributes:
        launches, read_and_written: of kernels on CUDA, in number and in bytes.
        peak: most bytes at a time of what was made in the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.read_and_written = self.peak = self._live = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        space, name = op._schema.name.split("::")
        given, made = ([t for t in tree_leaves(tree) if _is_cuda(t)] for tree in ((args, kwargs), out))
        before = {_memory(t) for t in given}
        fresh = {_memory(t): t for t in made if _memory(t) not in before}
        for t in fresh.values():
            self._watch(t)
        if space == "prim" or name in NO_KERNEL or not (given or fresh):
            return out
        written = {
            _memory(t): t
            for argument, value in zip(op._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
            for t in tree_leaves(value)
        } | fresh
        read = {_memory(t): t for t in given}
        if name in WRITES_ONLY:
            read = {key: t for key, t in read.items() if key not in written}
        self.read_and_written += sum(_bytes(t) for t in (*read.values(), *written.values()))
        self.launches += _launches(name, args, bool(fresh))
        return out

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)

        def gone() -> None:
            self._live -= size
            self._seen.discard(key)

        weakref.finalize(storage, gone)


def _is_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Returns what tells the memory of one tensor from that of another; pieces are apart."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _launches(name: str, args: Sequence[Any], makes: bool) -> int:
    if not name.startswith(("_foreach_", "_fused_")):
        return 1
    lists = [one for one in args if isinstance(one, (list, tuple)) and one and isinstance(one[0], Tensor)]
    depth = min(len(lists) - name.startswith("_fused_") + makes, 5)  # the times of a fused one lie elsewhere
    found = blocks = tensors = 0
    for tensor in lists[0]:
        left, tensors = -(-tensor.numel() // BLOCK), tensors + 1
        while left:
            taken = min(left, BLOCKS - blocks)
            blocks, left = blocks + taken, left - taken
            if blocks == BLOCKS:
                found, blocks, tensors = found + 1, 0, 1 if left else 0
        if tensors == TENSORS[max(depth, 1)]:
            found, blocks, tensors = found + 1, 0, 0
    return found + bool(blocks)


def contenders() -> dict[str, Callable[..., Any]]:
    """Returns what makes each optimizer of parameters and a decay."""
    import schedulefree

    return {
        "sftorch AdamWScheduleFree": sftorch.AdamWScheduleFree,
        "sftorch RAdamScheduleFree": sftorch.RAdamScheduleFree,
        "sftorch SGDScheduleFree": sftorch.SGDScheduleFree,
        "schedulefree AdamWScheduleFree": schedulefree.AdamWScheduleFree,
        "schedulefree RAdamScheduleFree": schedulefree.RAdamScheduleFree,
        "schedulefree SGDScheduleFree": schedulefree.SGDScheduleFree,
        "torch.optim.AdamW foreach": lambda params, **options: torch.optim.AdamW(
            params, foreach=True, **options
        ),
        "torch.optim.AdamW fused": lambda params, **options: torch.optim.AdamW(
            params, fused=True, **options
        ),
    }  # fmt: skip


def measure(
    make: Callable[..., Any], shapes: Sequence[Shape], decay: float, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Returns launches, bytes and most temporary bytes a parameter of a step that is not among the first."""
    total = count(list(shapes))
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(shape, device="cuda", dtype=dtype)) for shape in shapes]
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer = make(params, lr=LR, weight_decay=decay)
        if hasattr(optimizer, "train"):
            optimizer.train()
        for _ in range(7):  # RAdam takes others before
            optimizer.step()
        with Count() as counted:
            optimizer.step()
    return {
        "launches": counted.launches,
        "bytes": digits(counted.read_and_written / total),
        "temporary_bytes": digits(counted.peak / total),
    }


def rows(tree: str) -> Iterator[dict[str, Any]]:
    """Yields a row for each contender, with decay and without."""
    for name, make in contenders().items():
        for decay in (0.01, 0.0):
            yield {
                "part": tree,
                "name": name,
                "tensors": len(TREES[tree]),
                "parameters": count(TREES[tree]),
                "decay": decay,
                **measure(make, TREES[tree], decay),
                "versions": versions(),
            }


def show(found: Sequence[dict[str, Any]]) -> None:
    """Prints the table."""
    first = found[0]
    table = Table(title=f"{first['tensors']} tensors, {first['parameters'] / 1e6:.3g}M float32 parameters")
    for column in ("optimizer", "decay", "launches", "bytes/parameter", "temporary bytes/parameter"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for row in found:
        numbers = [f"{row[name]:.3g}" for name in ("decay", "launches", "bytes", "temporary_bytes")]
        table.add_row(row["name"], *numbers)
    Console(width=120).print(table)


def main(argv: Sequence[str]) -> int:
    """Prints the table and writes its rows to results/launches.jsonl."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks launches", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tree", choices=tuple(TREES), default="gpt", help="default: gpt")
    arguments = parser.parse_args(argv)
    found = list(rows(arguments.tree))
    replace_part(RESULTS, arguments.tree, found)
    show(found)
    return 0
