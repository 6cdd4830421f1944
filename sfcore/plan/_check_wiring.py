"""Rules about what surrounds the optimizer: SF401, SF501 to SF507."""

from __future__ import annotations

from collections.abc import Iterator

from sfcore.plan._check_values import full_name, package_fix
from sfcore.plan._model import Problem
from sfcore.plan._rules import problem
from sfcore.plan._run import Run
from sfcore.restart import weights_only_policy


def find(run: Run) -> Iterator[Problem]:
    """Yields the problems of the wiring; none without a Schedule-Free optimizer."""
    if not run.kind.schedule_free:
        return
    yield from weights_alone(run)
    yield from narrow_parameters(run)
    yield from batchnorm(run)
    yield from order(run)
    yield from averages_twice(run)
    yield from ships_y(run)
    yield from unrecognised(run)


def weights_alone(run: Run) -> Iterator[Problem]:
    """SF401: a start from weights without a state, as if they were nothing."""
    get = run.config.get
    if not get("weights") or get("resume") or get("prior_steps") or not run.kind.uses:
        return
    prior = weights_only_policy({})["prior_steps"]
    how, changes = package_fix(run)
    inner = run.config.source.inner
    where = f" in {run.config.source.prefix}{inner}" if inner else ""
    fix = f"set prior_steps={prior}{where}, or as many as the weights were trained for"
    fix += f", and {how}" if how else ""
    changes = {} if how and not changes else changes | {"prior_steps": prior}
    detail = f"Accumulation is {run.accumulation}."
    yield problem(run, "SF401", "weights", get("weights"), fix, changes, detail)


def narrow_parameters(run: Run) -> Iterator[Problem]:
    """SF501 and SF502: 16-bit parameters, not autocast."""
    dtype = str(run.config.get("param_dtype", "")).lower().removeprefix("torch.").removeprefix("jnp.")
    code = {"float16": "SF501", "fp16": "SF501", "half": "SF501", "bfloat16": "SF502", "bf16": "SF502"}.get(
        dtype
    )
    if code:
        place = run.config.places["param_dtype"].key
        trainer = place.startswith("full_")
        fix = f"switch {place} off and keep mixed_precision" if trainer else "keep parameters in float32"
        yield problem(run, code, "param_dtype", dtype, fix, {"param_dtype": None if trainer else "float32"})


def batchnorm(run: Run) -> Iterator[Problem]:
    """SF503: running statistics of y beside weights x."""
    if run.config.get("batchnorm") and not run.config.get("recalibrate"):
        fix = "call recalibrate(model, batches) at x before every evaluation and before you ship"
        yield problem(
            run, "SF503", "recalibrate", bool(run.config.get("recalibrate")), fix, {"recalibrate": True}
        )


def order(run: Run) -> Iterator[Problem]:
    """SF504: something after the optimizer in a chain."""
    chain = [str(link) for link in run.config.get("chain", ())]
    ours = [i for i, link in enumerate(chain) if "schedulefree" in link.lower().replace("_", "")]
    if ours and ours[-1] < len(chain) - 1:
        moved = [*chain[: ours[-1]], *chain[ours[-1] + 1 :], chain[ours[-1]]]
        yield problem(run, "SF504", "chain", chain, f"put it before: {', '.join(moved)}", {"chain": moved})


def averages_twice(run: Run) -> Iterator[Problem]:
    """SF505: an average of the average."""
    if run.config.get("ema"):
        yield problem(run, "SF505", "ema", True, "switch it off and ship x", {"ema": False})


def ships_y(run: Run) -> Iterator[Problem]:
    """SF506: a save hook that writes what trains."""
    get = run.config.get
    if get("saves") == "y":
        fix = "save optimizer.eval_state_dict(model), or inside of optimizer.evaluation()"
        yield problem(run, "SF506", "saves", "y", fix, {"saves": "x"})
    strategy = get("save_strategy", "no")
    if strategy == "no" or get("adapter"):
        return
    evaluated = get("eval_strategy") == strategy
    evaluated = evaluated and (strategy == "epoch" or get("eval_steps") == get("save_steps"))
    if not evaluated:
        steps = {"eval_steps": get("save_steps")} if strategy == "steps" else {}
        fix = "evaluate just before every save, or use an adapter that puts x there and say adapter=True"
        detail = "HF Trainer saves x only where an evaluation came just before."
        changes = {"eval_strategy": strategy if strategy in ("steps", "epoch") else "epoch"} | steps
        if strategy == "best":
            changes = {"adapter": True}
        yield problem(run, "SF506", "save_strategy", strategy, fix, changes, detail)


def unrecognised(run: Run) -> Iterator[Problem]:
    """SF507: a Schedule-Free optimizer that sd-scripts takes for another."""
    if run.config.source.dummy_scheduler and not run.ignored:
        fix = f"choose {run.config.name('optimizer')} = {full_name(run)}"
        known = run.kind.law is not None and run.kind.law.direction != "base"
        changes = {"optimizer": full_name(run)} if known else None
        yield problem(
            run, "SF507", "optimizer", run.optimizer, fix if known else "take a class of such a name", changes
        )
