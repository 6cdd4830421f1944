"""An inspection as tables for a person; rich is imported only here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfcore.exchange import CheckpointError


def show(found: Mapping[str, Any]) -> None:
    """Prints what `sfcore.inspection.inspect` returned.

    Raises:
        CheckpointError: without the package rich.
    """
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise CheckpointError("tables need the package rich: pip install rich, or pass --json") from error
    console = Console()
    what = found["what"] + (", every leaf verified" if found["verified"] else "")
    console.print(f"{found['path']}\n{what}", markup=False, highlight=False, soft_wrap=True)
    for title, rows in _tables(found):
        table = Table(title=title, title_justify="left", show_header=False, min_width=40)
        for name, value in rows.items():
            table.add_row(Text(str(name)), Text(_text(value)))
        console.print(table)
    for heading in ("notes", "resume"):
        for sentence in found[heading]:
            console.print(f"{heading}: {sentence}", markup=False, highlight=False, soft_wrap=True)


def _tables(found: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    place = (
        "framework",
        "optimizer",
        "step",
        "epoch",
        "position",
        "accumulation",
        "precision",
        "weights_hold",
    )
    size = {
        name: found[name]
        for name in (*place, "parameters", "elements", "leaves", "metrics")
        if found.get(name) not in (None, {})
    }
    tables = [("state" if "step" in found else "weights", size)]
    for number, group in enumerate(found.get("groups", [])):
        first, last = group["steps"]
        rows = {**group["hyperparameters"], "beta that built y": group["beta_of_y"]}
        rows |= {
            "c, last step": group["c"],
            "c, next step": group["next_c"],
            "weight_sum": group["clock"]["weight_sum"],
        }
        rows |= {
            "lr_max": group["clock"]["lr_max"],
            "clock of parameters": first if first == last else f"{first} to {last}",
        }
        rows |= {"parameters": group["parameters"]} | (
            {"not started": group["not_started"]} if group["not_started"] else {}
        )
        tables.append((f"group {number}", rows))
    norms = {
        f"|{name}|": "not in the file" if value is None else value for name, value in found["norms"].items()
    }
    return [*tables, ("norms", norms)] + ([("versions", found["versions"])] if found.get("versions") else [])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    return "unknown" if value is None else str(value)
