"""What XLA makes of a jitted step with donation: kernels a leaf, bytes a parameter, copies, temporaries.

Compiled ahead of time, for devices that need not be there: `pip install -e .[hlo]` brings the compilers
for an H100 and a TPU v5e. The numbers are read from the optimized HLO; nothing is run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "hlo.jsonl"
DEVICES = ("H100", "TPU v5e", "CPU")
# Large leaves of different shapes, so that none are joined.
SHAPES = ((4096, 4096), (12, 768, 3072), (4096, 1024), (1000, 3000))


def device(name: str) -> Any:
    """Returns a device to compile for.

    Raises:
        RuntimeError: if its compiler is not installed, with what to install.
    """
    import jax
    from jax.experimental import topologies

    if name == "CPU":
        return jax.devices("cpu")[0]
    try:
        if name == "H100":
            config = (Path(__file__).parent / "h100.txtpb").read_text()
            topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
        else:
            importlib.import_module("libtpu")
            topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    except Exception as error:  # JAX raises several kinds for a compiler that is not there
        raise RuntimeError(f"no compiler for {name} ({error}): pip install -e .[hlo]") from error
    return topology.devices[0]


def programs() -> dict[str, tuple[Any, str, bool]]:
    """Returns name -> (transformation, dtype of parameters and gradients, whether an update is due)."""
    import optax

    import sfjax

    def adamw(**options: Any) -> Any:
        return updating(sfjax.schedule_free_adamw(1e-3, weight_decay=0.1, **options))

    clip, stepping = optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(1e-3, weight_decay=0.1)
    return {
        "schedule_free_sgd": (updating(sfjax.schedule_free_sgd(1.0, weight_decay=0.1)), "float32", True),
        "schedule_free_adamw": (adamw(), "float32", True),
        "schedule_free_adamw, b1=0": (adamw(b1=0.0), "float32", True),
        "schedule_free_radam": (updating(sfjax.schedule_free_radam(1e-3, weight_decay=0.1)), "float32", True),
        "schedule_free_sgd, step": (sfjax.schedule_free_sgd(1.0, weight_decay=0.1), "float32", True),
        "schedule_free_adamw, step": (stepping, "float32", True),
        "clip_by_global_norm, schedule_free_adamw": (optax.chain(clip, adamw()), "float32", True),
        "schedule_free_adamw, bfloat16": (adamw(), "bfloat16", True),
        "schedule_free_adamw, float16": (adamw(), "float16", True),
        "schedule_free_adamw, bfloat16 lean": (adamw(precision="lean"), "bfloat16", True),
        "schedule_free_adamw, bfloat16 8bit": (adamw(precision="8bit"), "bfloat16", True),
        "schedule_free_adamw, float32 8bit": (adamw(precision="8bit"), "float32", True),
        "accumulate, micro-step": (sfjax.accumulate(stepping, 4), "float32", False),
        "accumulate, update due": (sfjax.accumulate(stepping, 4), "float32", True),
        "accumulate.update, micro-step": (
            updating(sfjax.accumulate(adamw(), 4)),
            "float32",
            False,
        ),
        "optax.MultiSteps, any step": (optax.MultiSteps(adamw(), 4), "float32", False),
        "optax.contrib.schedule_free_adamw": (
            optax.contrib.schedule_free_adamw(1e-3, weight_decay=0.1),
            "float32",
            True,
        ),
        "optax.adamw": (optax.adamw(1e-3, weight_decay=0.1), "float32", True),
    }


def updating(tx: Any) -> Any:
    """Returns a transformation without its `step`, to be measured by update and optax.apply_updates."""
    import optax

    return optax.GradientTransformation(*tx)


def step_of(tx: Any) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Returns (params, state, gradients) -> (params, state), by the transformation's own if it has one."""
    import optax

    if hasattr(tx, "step"):
        return lambda params, state, grads: tx.step(params, state, gradients=grads)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compiled(tx: Any, where: Any, dtype: str, shapes: Sequence[tuple[int, ...]] = SHAPES) -> Any:
    """Returns the compiled step of a tree of leaves, parameters and state donated."""
    import jax

    at = jax.sharding.SingleDeviceSharding(where)
    params = {f"w{i}": jax.ShapeDtypeStruct(shape, dtype) for i, shape in enumerate(shapes)}
    trees = (params, jax.eval_shape(tx.init, params), params)
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), trees)
    with jax.numpy_dtype_promotion("standard"):  # optax's own programs mix dtypes
        return jax.jit(step_of(tx), donate_argnums=(0, 1)).lower(*placed).compile()


def measured(program: Any, due: bool, shapes: Sequence[tuple[int, ...]] = SHAPES) -> dict[str, float]:
    """Returns what a compiled step does, per leaf and per parameter."""
    import numpy as np

    from benchmarks.hlo_read import count

    sizes = [int(np.prod(shape)) for shape in shapes]
    found, memory = count(program.as_text(), least=min(sizes), taken=int(due)), program.memory_analysis()
    return {
        "kernels_a_leaf": round(found.kernels / len(shapes), 2),
        "copies_a_leaf": round(found.copies / len(shapes), 2),
        "bytes_a_parameter": round(found.traffic / sum(sizes), 2),
        "temporary_bytes_a_parameter": round(memory.temp_size_in_bytes / sum(sizes), 2),
        "donated_bytes_a_parameter": round(memory.alias_size_in_bytes / sum(sizes), 2),
    }


def rows(devices: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields one row a program and device; a device without compiler is told of on stderr and left out."""
    from benchmarks._records import versions

    about = {"part": "hlo", "shapes": SHAPES, "versions": versions()}
    for name in devices:
        try:
            where = device(name)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            continue
        for program, (tx, dtype, due) in programs().items():
            numbers = measured(compiled(tx, where, dtype), due)
            yield {"device": name, "program": program, "dtype": dtype} | numbers | about


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """Returns the table of docs/precision.md: bytes a parameter, and kernels a leaf in brackets."""
    cells = {
        (row["program"], row["device"]): f"{row['bytes_a_parameter']:.3g} ({row['kernels_a_leaf']:.2g})"
        for row in found
    }
    lines = ["| step | " + " | ".join(DEVICES) + " |", "| --- |" + " ---: |" * len(DEVICES)]
    for program in dict.fromkeys(row["program"] for row in found):
        of_program = (cells.get((program, name), "") for name in DEVICES)
        lines.append(f"| {program} | " + " | ".join(of_program) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Prints the table, and writes the result file anew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks hlo", description=__doc__)
    parser.add_argument("--device", action="append", choices=DEVICES, help="default: all three")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="compile nothing: the table as measured")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the table between <!-- hlo --> and its end"
    )
    options = parser.parse_args(argv)
    if not options.report:
        _measure(options)
    if options.markdown:
        from benchmarks._records import write_between_markers

        lines = options.out.read_text(encoding="utf-8").splitlines()
        write_between_markers(options.markdown, "hlo", markdown([json.loads(line) for line in lines]))
    return 0


def _measure(options: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX looks for a TPU that is not there
    print(f"{'device':8} {'program':42} {'kernels/leaf':>12} {'bytes/param':>11} {'copies/leaf':>11}   temp")
    written = []
    for row in rows(options.device or DEVICES):
        written.append(json.dumps(row))
        print(
            f"{row['device']:8} {row['program']:42} {row['kernels_a_leaf']:12} {row['bytes_a_parameter']:11} "
            f"{row['copies_a_leaf']:11} {row['temporary_bytes_a_parameter']:6}",
            flush=True,
        )
    options.out.write_text("".join(line + "\n" for line in written), encoding="utf-8")
