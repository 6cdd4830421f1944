"""What a jump after a restart most likely comes from, and what to do about it."""

from __future__ import annotations

_WEIGHTS = frozenset({"lr", "weight_lr_power", "r"})


def explain(found: set[str], changed: frozenset[str], fresh: frozenset[str]) -> tuple[str, str]:
    """Returns (likeliest cause, fix).

    Args:
        found: what jumped, of "c", "update", "moved", "loss".
        changed: hyperparameters that the configuration changed.
        fresh: state that started anew.
    """
    if "c" in found and changed & _WEIGHTS:
        names = " and ".join(sorted(changed & _WEIGHTS))
        return (
            f"the average weighs the new steps far above the old ones, by the changed {names}",
            "go back to the saved value, or change it in smaller steps",
        )
    if "c" in found:
        return (
            "the averaging began anew and throws the loaded weights away",
            "load the optimizer state with the weights, or pass prior_steps (sfcore.restart has the default)",
        )
    if found & {"update", "moved"}:
        return _explain_update(changed, fresh)
    return (
        "the data or the model is not what it was: other normalisation, BatchNorm statistics, dropout",
        "evaluate the loaded weights once before training, and compare",
    )


def _explain_update(changed: frozenset[str], fresh: frozenset[str]) -> tuple[str, str]:
    if changed & {"lr", "warmup_steps"}:
        return "the step size is not what it was", "go back to the saved lr, or ramp it with warmup_steps"
    if changed & {"accumulation", "batch_size"}:
        return (
            "the gradients are scaled by another number of micro-batches",
            "divide the loss by the number of micro-batches, and restore the saved accumulation if you can",
        )
    if fresh:
        return (
            f"{', '.join(sorted(fresh))} started anew, so the first steps are those of a new optimizer",
            "load the full state, or pass prior_steps and a few warmup_steps",
        )
    return (
        "the gradients are not what they were: other data, loss scaling or clipping",
        "compare the gradient norm with that of the run before",
    )
