"""Runs of several processes of jax.distributed: `python -m sfjax.tests.process_runs REQUEST`, a JSON file.

`run` starts them. Each does the cases of the request in turn and writes what it found as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAVED, LAST = 3, 6


def start(scratch, world, cases, devices=1):
    """Starts the processes; returns them, and where their answers will be."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    processes, answers = [], []
    for rank in range(world):
        request = {"rank": rank, "world": world, "port": port, "devices": devices, "cases": cases}
        file = scratch / f"{port}-{rank}.json"
        file.write_text(json.dumps(request))
        answers.append(file.with_suffix(".answer"))
        log = open(file.with_suffix(".log"), "wb")  # noqa: SIM115 - the child's
        command = [sys.executable, "-m", "sfjax.tests.process_runs", str(file)]
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        log.close()
    return processes, answers


def run(scratch, world, cases, devices=1, timeout=100):
    """Returns for each process what each case returned; fails if one has failed."""
    processes, answers = start(scratch, world, cases, devices)
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join(answer.with_suffix(".log").read_text()[-3000:] for answer in answers)
    assert codes == [0] * world, logs
    return [json.loads(answer.read_text()) for answer in answers]


def join(request):
    import jax

    jax.config.update("jax_num_cpu_devices", request["devices"])
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    if request["world"] > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{request['port']}", request["world"], request["rank"], initialization_timeout=60
        )


def program(seed=0):
    """Returns (transformation, params on all devices, state, a step)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    import sfjax

    mesh = jax.make_mesh((jax.device_count(),), ("d",))
    rng = np.random.default_rng(seed)
    forms = {
        "w": ((512, 8), np.float32, PartitionSpec("d")),
        "v": ((4, 8), jnp.bfloat16, PartitionSpec(None, "d")),
        "b": ((5,), np.float32, PartitionSpec()),
        "scale": ((), np.float32, PartitionSpec()),
    }

    def put(name):
        shape, dtype, spec = forms[name]
        value = rng.standard_normal(shape).astype(dtype)
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), lambda i: value[i])

    params = {name: put(name) for name in forms}
    tx = sfjax.schedule_free_adamw(0.1, inner_momentum=0.5, weight_decay=0.1)

    @jax.jit
    def step(params, state, number):
        def loss(params):
            # Elementwise, so that the gradients have the same bits in any layout.
            parts = [
                (jnp.sin(p.astype(jnp.float32) * (number + 1.0)) * (i + 1.0)).sum()
                for i, p in enumerate(jax.tree.leaves(params))
            ]
            return sum(parts, jnp.float32(0))

        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def train(params, state, first, last):
        for number in range(first, last):
            params, state = step(params, state, np.float32(number))
        return params, state

    return tx, params, jax.jit(tx.init)(params), train


def digest(*trees):
    """Returns a fingerprint of everything in some trees, whatever devices it lies on."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from sfcore.exchange import fingerprint

    leaves = jax.tree_util.tree_leaves_with_path(trees)
    found = {}
    for path, leaf in leaves:
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        whole = multihost_utils.process_allgather(leaf, tiled=True) if spread else leaf
        found[jax.tree_util.keystr(path)] = np.asarray(whole)
    return fingerprint(found)


def save(request, folder, keys=True):
    import jax
    import numpy as np

    from sfjax.checkpoint import Checkpoints

    _, params, state, train = program()
    params, state = train(params, state, 0, SAVED)
    generator = np.random.default_rng(request["rank"])
    generator.random()
    extra = {"generator": generator, "key": jax.random.key(request["rank"]), "seen": 7}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(
            SAVED,
            params,
            state,
            extra_state=extra,
            position=10 + request["rank"],
            hyperparameters={"optimizer": "adamw", "lr": 0.1},
        )
        params, state = train(params, state, SAVED, LAST)  # while it is written
    drawn = [generator.random(), float(jax.random.uniform(extra["key"]))]
    return {"end": digest(params, state), "drawn": drawn}


def restore(request, folder, again=None):
    import jax
    import numpy as np

    from sfcore.shards import Spread
    from sfjax.checkpoint import Checkpoints

    tx, params, state, train = program(seed=1)
    generator = np.random.default_rng(77)
    extra = {"generator": generator, "key": jax.random.key(0), "seen": 0}
    joined, join = [], Spread.__array__

    def noted(self, *arguments, **options):
        joined.append(self.name)
        return join(self, *arguments, **options)

    Spread.__array__ = noted
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(
            params, jax.eval_shape(tx.init, params) if again else state, extra_state=extra
        )
    if again:
        with Checkpoints(again) as checkpoints:
            checkpoints.save(
                SAVED,
                found.params,
                found.opt_state,
                extra_state=found.extra_state,
                hyperparameters={"optimizer": "adamw", "lr": 0.1},
            )
    then = digest(found.params, found.opt_state)
    key = jax.random.uniform(found.extra_state["key"])
    drawn = [generator.random(), float(np.asarray(key))]
    params, state = train(found.params, found.opt_state, SAVED, LAST)
    return {
        "then": then,
        "end": digest(params, state),
        "drawn": drawn,
        "notices": found.notices,
        "position": found.meta.position,
        "joined": [name for name in joined if name.endswith(("/w", "/v"))],
    }


def take_over(request, source, folder):
    """Goes on from a run of the torch twin on a mesh, and saves; returns what it says."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    import sfjax
    from sfcore.hyperparameters import AdamW
    from sfjax.checkpoint import Checkpoints

    mesh = jax.make_mesh((jax.device_count(),), ("d",))
    layers = {"a": ((6, 8), (None, "d")), "b": ((8, 4), ("d",)), "c": ((4, 1), ("d",))}

    @jax.jit
    def zeros():
        return {
            name: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}
            for name, (shape, _) in layers.items()
        }

    places = {
        name: {
            "kernel": NamedSharding(mesh, PartitionSpec(*axes)),
            "bias": NamedSharding(mesh, PartitionSpec()),
        }
        for name, (_, axes) in layers.items()
    }
    params = jax.jit(zeros, out_shardings=places)()
    tx = sfjax.schedule_free_adamw(0.01)
    state = jax.jit(tx.init)(params)
    configured = AdamW(lr=0.01)
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(params, state, resume=source, hyperparameters=configured)
        laid = found.params["a"]["kernel"].sharding == places["a"]["kernel"]
        checkpoints.save(found.meta.step, found.params, found.opt_state, hyperparameters=configured)
    return {"step": found.meta.step, "laid": laid, "notices": found.notices[1:]}


def bad_calls(request, folder):
    """Returns what is said where the processes do not call the same."""
    import jax.numpy as jnp

    from sfjax.checkpoint import CheckpointError, Checkpoints

    _, params, state, _ = program()
    rank, found = request["rank"], {}
    with Checkpoints(folder, background=False, wait_for_ranks=0.5) as checkpoints:

        def refused(case, params=params, step=7, position=0):
            try:
                checkpoints.save(step, params, state, position=position)
            except CheckpointError as error:
                found[case] = str(error)

        refused("step", step=7 + rank)
        refused("model", params | {"b": jnp.zeros(5 + rank)})
        refused("own weights", params | {"b": jnp.full(5, float(rank))})
        refused("argument", position=-rank)
        found["never"] = None
        if rank == 0:
            refused("never")
    return found


def main():
    file = Path(sys.argv[1])
    request = json.loads(file.read_text())
    join(request)
    found = []
    for name, arguments in request["cases"]:
        try:
            found.append(globals()[name](request, **arguments))
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # the others would be waited for
    file.with_suffix(".answer").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
