"""Mistakes that a checker must find: each line that says so, and no other. Read, never run."""

# ruff: noqa: B018

from pathlib import Path

import jax
import jax.numpy as jnp
import torch
from flax import nnx

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


def torch_arguments(model: torch.nn.Module) -> None:
    params = list(model.parameters())
    sftorch.AdamWScheduleFree(params, lr="0.05")  # error
    sftorch.AdamWScheduleFree(params, "0.05")  # error
    sftorch.AdamWScheduleFree(params, warmup_steps="5")  # error
    sftorch.AdamWScheduleFree(params, warmup=5)  # error
    sftorch.AdamWScheduleFree(params, betas=(0.9, 0.99, 0.999))  # error
    sftorch.AdamWScheduleFree(params, betas=0.9)  # error
    sftorch.AdamWScheduleFree(params, weight_decay=None)  # error
    sftorch.AdamWScheduleFree(params, precision="loose")  # error
    sftorch.AdamWScheduleFree(params, fused="yes")  # error
    sftorch.AdamWScheduleFree(model)  # error
    sftorch.AdamWScheduleFree()  # error
    sftorch.SGDScheduleFree(params, momentum="0.9")  # error
    sftorch.SGDScheduleFree(params, betas=(0.9, 0.999))  # error
    sftorch.RAdamScheduleFree(params, warmup_steps=5)  # error
    sftorch.RAdamScheduleFree(params, silent_sgd_phase="no")  # error
    sftorch.ScheduleFreeWrapper(params)  # error
    sftorch.AdamWScheduleFre(params)  # error
    sftorch.checkpiont  # error
    sftorch.trainers.keras  # error


def torch_use(model: torch.nn.Module, optimizer: sftorch.AdamWScheduleFree) -> None:
    optimizer.eval_state_dict(optimizer)  # error
    optimizer.evaluate()  # error
    optimizer.step(0.5)  # error
    print(optimizer.step() + 1)  # error
    print(optimizer.step(lambda: torch.ones(1)).recall())  # error
    weights: list[torch.Tensor] = optimizer.eval_state_dict(model)  # error
    print(optimizer.eval().training, weights)  # error
    print(optimizer.metrics()["lr"])  # error
    sftorch.step_in_backward(model)  # error
    recalibrate(optimizer, [])  # error
    recalibrate(model, [5], lambda model, batch: model(batch.images))  # error
    unwrap(optimizer).evaluate()  # error


def torch_resume(model: torch.nn.Module, optimizer: sftorch.SGDScheduleFree) -> None:
    Checkpoints(5)  # error
    Checkpoints("run", keep_newest="2")  # error
    Checkpoints("run", keep_last=2)  # error
    checkpoints = Checkpoints("run")
    checkpoints.save(optimizer, model)  # error
    checkpoints.observe(optimizer, "0.5")  # error
    checkpoints.save(model, torch.optim.SGD(model.parameters()))  # error
    checkpoints.save(model, optimizer, metrics={"loss": "small"})  # error
    checkpoints.restore(model, optimizer, strict="yes")  # error
    checkpoints.restore(model, optimizer).meta  # error
    restored = checkpoints.restore(model, optimizer)
    if restored is not None:
        print(restored.meta.step)  # error
        print(restored.params)  # error


def jax_arguments() -> None:
    sfjax.schedule_free_adamw("0.05")  # error
    sfjax.schedule_free_adamw(lr=0.05)  # error
    sfjax.schedule_free_adamw(0.05, warmup_steps="5")  # error
    sfjax.schedule_free_adamw(0.05, b1=(0.9, 0.99))  # error
    sfjax.schedule_free_adamw(0.05, precision="loose")  # error
    sfjax.schedule_free_adamw(0.05, weight_decay="0.1")  # error
    sfjax.schedule_free_sgd([0.05])  # error
    sfjax.schedule_free_sgd(0.05, b2=0.999)  # error
    sfjax.schedule_free_radam(0.05, warmup_steps=5)  # error
    sfjax.schedule_free_radam(0.05, silent_sgd_phase="no")  # error
    sfjax.schedule_free_adamw_(0.05)  # error


def jax_use(params: dict[str, jax.Array]) -> None:
    state = sfjax.schedule_free_sgd(0.1).init(params)
    sfjax.schedule_free_eval_params(params)  # error
    sfjax.find_state(state).learning_rate  # error
    print(sfjax.metrics(state) + 1)  # error
    JaxCheckpoints(5)  # error
    checkpoints = JaxCheckpoints("run")
    checkpoints.save("10", params, state)  # error
    checkpoints.save(10, params)  # error
    checkpoints.save(10, params, state, metric={"loss": 0.5})  # error
    checkpoints.restore(params, state).params  # error
    restored = checkpoints.restore(params, state, strict=True)
    if restored is not None:
        print(restored.step)  # error
    path: str = checkpoints.save(10, params, state)  # error
    print(path)


def flax(checkpoints: JaxCheckpoints, model: nnx.Linear, optimizer: nnx.Optimizer[nnx.Linear]) -> None:
    sfjax.nnx.eval_model(optimizer, model)  # error
    sfjax.nnx.eval_model(model, optimizer).weight  # error
    sfjax.nnx.save("run", model, optimizer)  # error
    sfjax.nnx.restore(checkpoints, model, optimizer).meta  # error
    sfjax.linen.save(checkpoints, model)  # error
    sfjax.linen.restore(checkpoints, {"w": jnp.ones(3)})  # error


def shared(folder: Path) -> None:
    hyperparameters.AdamW(lr="0.1")  # error
    hyperparameters.AdamW(learning_rate=0.1)  # error
    check(folder / "config.toml", fix="yes")  # error
    check(5)  # error
    check(ignore=5)  # error
    check(source="kohia")  # error
    plan = check(optimizer="AdamW")
    plan.raise_for_error()  # error
    print(plan.total_steps + 1)  # error
    print(plan.errors.code)  # error
    plan.lr = jnp.ones(3)  # error
    Plan()  # error
    Preemption(folder)  # error
    sfcore.HyperparameterErrors  # error
