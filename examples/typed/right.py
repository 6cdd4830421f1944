"""Everyday use, as a checker sees it: no error in mypy, none in pyright. Read, never run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import linen, nnx

import sfcore
import sfjax
import sfjax.linen
import sfjax.nnx
import sftorch
from sfcore import hyperparameters
from sfcore.plan import Plan, check
from sfcore.preemption import Preemption
from sfjax.checkpoint import Checkpoints as JaxCheckpoints
from sftorch.checkpoint import Checkpoints
from sftorch.recalibrate import recalibrate
from sftorch.trainers import unwrap


def torch_loop(model: torch.nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    groups = [{"params": model.parameters(), "lr": 0.1}]
    sftorch.SGDScheduleFree(groups, lr=torch.tensor(1.0), momentum=0.9)
    sftorch.RAdamScheduleFree(model.named_parameters(), 0.01, silent_sgd_phase=False)
    sftorch.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=1), momentum=0.9)
    optimizer = sftorch.AdamWScheduleFree(
        model.parameters(), lr=0.05, betas=(0.9, 0.99), warmup_steps=5, precision="lean", fused=None
    )
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    with unwrap(optimizer).evaluation():
        recalibrate(model, batches)
    optimizer.eval()
    optimizer.train()
    print(optimizer.metrics()[0]["lr"] + 1)
    return optimizer.eval_state_dict(model)


def torch_closures(model: torch.nn.Module) -> float:
    optimizer = sftorch.SGDScheduleFreeClosure(model.parameters(), weight_decay=0.1)
    other = sftorch.SGDScheduleFree(list(model.named_parameters()))

    def loss() -> torch.Tensor:
        value: torch.Tensor = model(torch.ones(1)).square().sum()
        value.backward()
        return value

    print(other.step(loss).item(), other.step(lambda: 0.5) + 1)
    sftorch.recalibrate.recalibrate(
        model, [{"size": 5}], lambda model, batch: model(torch.ones(batch["size"]))
    )
    sftorch.checkpoint.Checkpoints("run").observe(optimizer, optimizer.step(loss))
    return optimizer.step(lambda: 0.5)


def torch_resume(model: torch.nn.Module, folder: Path) -> int:
    optimizer = sftorch.AdamWScheduleFree(model.parameters())
    with Checkpoints(folder, keep_newest=3) as checkpoints:
        restored = checkpoints.restore(model, optimizer, resume="latest-good", strict=True)
        checkpoints.observe(optimizer, torch.tensor(0.5))
        checkpoints.save(model, optimizer, metrics={"loss": 0.5}, extra={"note": "mine"})
        path = checkpoints.wait()
    print(path.name if path else "nothing saved")
    if restored is None or restored.meta is None:
        return 0
    return restored.meta.step


def jax_loop(steps: int) -> float:
    params = {"w": jnp.zeros(3)}
    schedule = optax.linear_schedule(0.1, 0.0, steps)
    sfjax.schedule_free_sgd(schedule, warmup_steps=np.int32(5), mask={"w": True})
    sfjax.schedule_free_radam(jnp.float32(0.1), state_dtype=jnp.float32)
    sfjax.schedule_free(optax.sgd(0.1), 0.1, b1=0.5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(0.05, warmup_steps=5))
    state = optimizer.init(params)

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum((params["w"] - 1) ** 2)

    for _ in range(steps):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    print(float(sfjax.metrics(state)["c"]), sfjax.find_state(state).step)
    x = sfjax.schedule_free_eval_params(state, params)
    return float(x["w"].sum())


def jax_resume(params: dict[str, jax.Array], folder: Path) -> int:
    optimizer = sfjax.schedule_free_adamw(0.05)
    state = optimizer.init(params)
    with JaxCheckpoints(folder) as checkpoints:
        restored = checkpoints.restore(params, state, hyperparameters=hyperparameters.AdamW(lr=0.05))
        if restored is not None:
            params, state = restored.params, restored.opt_state
        checkpoints.observe(params, state, 0.5)
        path = checkpoints.save(10, params, state, metrics={"loss": jnp.float32(0.5)})
    print(path.name)
    return restored.meta.step if restored else 0


def flax_nnx(checkpoints: JaxCheckpoints) -> jax.Array:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sfjax.schedule_free_sgd(0.1), wrt=nnx.Param)
    restored = sfjax.nnx.restore(checkpoints, model, optimizer)
    sfjax.nnx.save(checkpoints, model, optimizer, epoch=restored.meta.epoch if restored else 0)
    return sfjax.nnx.eval_model(model, optimizer)(jnp.ones((1, 3)))


def flax_linen(checkpoints: JaxCheckpoints) -> None:
    model = linen.Dense(2)
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    tx = sfjax.schedule_free_sgd(0.1)
    state = sfjax.linen.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    state, restored = sfjax.linen.restore(checkpoints, state, strict=True)
    path = sfjax.linen.save(checkpoints, state)
    print(path.name, state.eval_params, state.eval_variables["params"], restored and restored.meta.step)


def a_plan() -> Plan:
    plan = check({"optimizer": "AdamW"}, fix=True, ignore=["SF102"], total_steps=1000)
    plan.raise_for_errors()
    print(plan.lr[:5].mean(), [problem.code for problem in plan.errors], plan.total_steps or 0)
    check(["train.py", "--optimizer_type", "AdamW"])
    return check(Path("config.toml"))


def preempted(checkpoints: Checkpoints, model: torch.nn.Module, optimizer: sftorch.SGDScheduleFree) -> None:
    def save_now() -> Path | None:
        checkpoints.save(model, optimizer)
        return checkpoints.wait()

    with Preemption(save_now) as preemption, preemption.updating():
        optimizer.step()


def refused(model: torch.nn.Module) -> str:
    try:
        sftorch.AdamWScheduleFree(model.parameters(), lr=-1.0)
    except sfcore.HyperparameterError as error:
        return str(error)
    return sfcore.__version__
