"""Runs on eight CPU devices: `python -m sfjax.tests.sharding_program` writes what it found as JSON."""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sfjax
from sfjax.kernels import call

LAYOUT = {"w": PartitionSpec("d", "m"), "b": PartitionSpec("m")}
# How jax itself writes it after a step; beside the other form, any optimizer compiles twice.
EVERYWHERE = {AxisType.Auto: PartitionSpec(), AxisType.Explicit: PartitionSpec(None)}
MAKE = {
    "adamw": lambda: sfjax.schedule_free_adamw(0.1, inner_momentum=0.5, weight_decay=0.1),
    "radam": lambda: sfjax.schedule_free_radam(0.1, b2=0.9, b1=0.0),
    "muon": lambda: sfjax.schedule_free_muon(0.1, normalize="rows"),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_sgd(0.1)),
}
EVERY = 3  # micro-steps an update
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


def params_on(mesh: jax.sharding.Mesh | None) -> Any:
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 8), "b": (8,), "everywhere": (3,)}
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    if mesh is None:
        return params
    layout = {**LAYOUT, "everywhere": EVERYWHERE[mesh.axis_types[0]]}
    return {name: jax.device_put(leaf, NamedSharding(mesh, layout[name])) for name, leaf in params.items()}


def spec(leaf: Any) -> list[Any]:
    """Returns the mesh axis of each dimension of a leaf, or the name of its sharding if it has no mesh."""
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return [repr(sharding)]
    return [*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec))]


def specs(state: Any) -> dict[str, Any]:
    state = sfjax.find_state(state)
    moments = getattr(state.base_optimizer_state, "_asdict", dict)()
    trees = {"z": state.z, **{name: tree for name, tree in moments.items() if tree is not None}}
    scalars = {
        name: leaf
        for name, leaf in state._asdict().items()
        if name not in ("z", "base_optimizer_state", "y_rest", "scale")  # float32 parameters have none
    }
    return {
        "trees": {
            name: {key: spec(leaf) for key, leaf in tree.items() if leaf is not None}
            for name, tree in trees.items()
        },
        "scalars": {name: spec(leaf) for name, leaf in scalars.items()},
    }


def train(tx: Any, params: Any, state: Any) -> tuple[Any, Any, int]:
    """Returns (params, state, compilations) after some steps on the loss sum(params^2) / 2."""

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(7):
        params, state = step(params, state)
    return params, state, step._cache_size()


@functools.cache
def alone(name: str) -> tuple[Any, Any]:
    """Returns (x, y) of the same run on one device."""
    tx, params = MAKE[name](), params_on(None)
    y, state, _ = train(tx, params, tx.init(params))
    return sfjax.schedule_free_eval_params(state, y), y


def facts(mesh: jax.sharding.Mesh, name: str, how: str) -> dict[str, Any]:
    tx, params = MAKE[name](), params_on(mesh)
    if how == "described":
        described = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
        )
        return {"before": specs(tx.init(described))}
    state = (jax.jit(tx.init) if how == "jit" else tx.init)(params)
    y, after, compilations = train(tx, params, state)
    x = sfjax.schedule_free_eval_params(after, y)
    pairs = zip((x, y), alone(name), strict=True)
    errors = [np.abs(np.asarray(a[key]) - np.asarray(b[key])).max() for a, b in pairs for key in a]
    return {
        "before": specs(state),
        "after": specs(after),
        "params": {key: spec(leaf) for key, leaf in y.items()},
        "compilations": compilations,
        "error": float(max(errors)),
    }


def collectives(compiled: Any) -> int:
    """Returns how many instructions of a program exchange something between devices."""
    lines = compiled.as_text().splitlines()
    return sum(any(f" {one}(" in line or f" {one}-start(" in line for one in COLLECTIVES) for line in lines)


def native_calls(compiled: Any) -> int:
    """Returns how many calls of the kernel a program has."""
    return compiled.as_text().count(f'custom_call_target="{call.TARGET}"')


def exchanged(mesh: jax.sharding.Mesh, name: str, like_each_other: bool = False) -> int:
    """Returns how many collectives an update and its addition have; parameters may be cut like each other."""
    tx, params = MAKE[name](), params_on(mesh)
    if like_each_other:
        rows = NamedSharding(mesh, PartitionSpec("d"))
        params = {name: jax.device_put(jnp.ones((8, 4)), rows) for name in params}
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    return collectives(step.lower(params, state).compile())


def natively(mesh: jax.sharding.Mesh, name: str, check_vma: bool | None = None) -> dict[str, Any]:
    """Returns what there is to say of steps by the kernel, under jit or, with check_vma, in shard_map."""
    tx, params = MAKE[name](), params_on(mesh)

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        return tx.step(params, state, gradients=params)

    state = tx.init(params)
    if check_vma is not None:
        layouts = jax.tree.map(lambda leaf: leaf.sharding.spec, (params, state))
        step = jax.shard_map(step, mesh=mesh, in_specs=layouts, out_specs=layouts, check_vma=check_vma)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    program = jitted.lower(params, state).compile()
    for _ in range(7):
        params, state = jitted(params, state)
    pairs = zip((sfjax.schedule_free_eval_params(state, params), params), alone(name), strict=True)
    errors = [np.abs(np.asarray(a[key]) - np.asarray(b[key])).max() for a, b in pairs for key in a]
    return {
        "calls": native_calls(program),
        "collectives": collectives(program),
        "compilations": jitted._cache_size(),
        "params": {key: spec(leaf) for key, leaf in params.items()},
        "after": specs(state),
        "error": float(max(errors)),
    }


def accumulated(mesh: jax.sharding.Mesh | None, name: str, how: str) -> dict[str, Any]:
    """Returns what there is to say of accumulated updates: by `step`, or by `update` and apply_updates."""
    tx, params = sfjax.accumulate(MAKE[name](), EVERY), params_on(mesh)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        gradients = jax.tree.map(lambda p: p * (1 + state.mini_step).astype(p.dtype), params)
        if how == "step":
            return tx.step(params, state, gradients=gradients)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    means = {key: spec(leaf) for key, leaf in state.acc_grads.items()} if mesh is not None else {}
    program = step.lower(params, state).compile()
    for _ in range(3 * EVERY + 1):
        params, state = step(params, state)
    found = {"collectives": collectives(program), "compilations": step._cache_size(), "before": means}
    found["calls"] = native_calls(program)
    if mesh is not None:
        found["params"] = {key: spec(leaf) for key, leaf in params.items()}
        found["means"] = {key: spec(leaf) for key, leaf in state.acc_grads.items()}
    return found | {"y": {key: np.asarray(leaf).tolist() for key, leaf in params.items()}}


def over_a_divided_batch(mesh: jax.sharding.Mesh | None, how: str) -> dict[str, Any]:
    """Returns y and the number of compilations of accumulated updates with parameters on every device."""
    tx, params = sfjax.accumulate(MAKE["adamw"](), EVERY), {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}
    batches = np.random.default_rng(1).standard_normal((3 * EVERY, 16, 4)).astype(np.float32)
    put = functools.partial(jax.device_put, device=None)
    if mesh is not None:
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        put = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("d")))

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((batch @ params["w"] + params["b"]) ** 2)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        gradients = jax.grad(loss)(params, batch)
        if how == "step":
            return tx.step(params, state, gradients=gradients)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in batches:
        params, state = step(params, state, put(jnp.asarray(batch)))
    y = {key: np.asarray(leaf).tolist() for key, leaf in params.items()}
    return {"compilations": step._cache_size(), "y": y}


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    found = {}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(kind, kind))
        for name in [name for name in MAKE if name != "muon"]:
            found |= {f"{kind.name}-{how}-{name}": facts(mesh, name, how) for how in ("jit", "described")}
            found[f"{kind.name}-exchanged-{name}"] = exchanged(mesh, name)
            found[f"{kind.name}-exchanged-rows-{name}"] = exchanged(mesh, name, like_each_other=True)
            for how in ("step", "update"):
                with jax.set_mesh(mesh):
                    found[f"{kind.name}-{how}-{name}"] = accumulated(mesh, name, how)
        found[f"{kind.name}-eager-adamw"] = facts(mesh, "adamw", "eager")
        found[f"{kind.name}-native"] = natively(mesh, "adamw")
        with jax.set_mesh(mesh):
            found[f"{kind.name}-native, set_mesh"] = natively(mesh, "adamw")
        found |= {
            f"{kind.name}-{how}-muon": facts(mesh, "muon", how) for how in ("jit", "described", "eager")
        }
    found |= {f"alone-{name}": accumulated(None, name, "step") for name in MAKE if name != "muon"}
    found["kernel"] = call.find()
    autos = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto, AxisType.Auto))
    found |= {f"shard_map-{vma}": natively(autos, "adamw", check_vma=vma) for vma in (True, False)}
    everyone = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    found |= {f"batch-{how}": over_a_divided_batch(everyone, how) for how in ("step", "update")}
    found["batch-alone"] = over_a_divided_batch(None, "step")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
