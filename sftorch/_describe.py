"""The effective plan of a torch optimizer, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfcore import hyperparameters

if TYPE_CHECKING:
    from sftorch._core import ScheduleFreeOptimizer


def describe(optimizer: ScheduleFreeOptimizer, **facts: Any) -> str:
    """Returns what a run will do, and what is wrong with it, as a table a group to print at its start.

    A method of every optimizer; it changes nothing.

    Args:
        facts: what the optimizer cannot know, such as `total_steps=10_000`, `accumulation=8`,
            `batchnorm=True`; `sfcore.plan.check` has them all.

    Example:
        >>> import sftorch, torch
        >>> optimizer = sftorch.AdamWScheduleFree([torch.nn.Parameter(torch.ones(2))], warmup_steps=50)
        >>> optimizer.describe(total_steps=1000).splitlines()[5]
        'warm-up       50 optimizer steps, by optimizer'
    """
    from sfcore.plan import check, text  # a third of what importing sftorch would take

    wrapper = optimizer.hyperparameters is hyperparameters.Wrapper
    name = "ScheduleFreeWrapper" if wrapper else f"{optimizer.hyperparameters.__name__}ScheduleFree"
    parts = []
    for number, group in enumerate(optimizer.param_groups):
        values, _ = optimizer._values(group)
        dtypes = {str(p.dtype).removeprefix("torch.") for p in group["params"]}
        narrow = dtypes & {"float16", "bfloat16"}
        known = {"optimizer": f"sftorch.{name}", "param_dtype": min(narrow) if narrow else "float32"}
        plan = check(**(known | values | facts))
        holds = "y, to train" if optimizer._books(group)["train_mode"] else "x, to evaluate"
        head = f"group {number}: {len(group['params'])} parameters ({', '.join(sorted(dtypes))}) hold {holds}"
        shown = ", ".join(f"{key} {value:g}" for key, value in values.items())
        parts.append(f"{head}\nvalues        {shown}\n{text(plan)}")
    return "\n".join(parts)
