"""Runs the notebooks beside this file and writes their outputs into them, as they are committed.

`python examples/notebooks/execute.py`, after every change of one.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
PATHS = sorted(HERE.glob("*.ipynb"))


def execute(path: Path, probe: str = "") -> Any:
    """Returns a notebook as a fresh kernel leaves it; raises the error of a cell that fails.

    Args:
        path: of the notebook, which is not changed.
        probe: code for one more cell at the end, which sees the names of the others.
    """
    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    if probe:
        notebook.cells.append(nbformat.v4.new_code_cell(probe))
    with tempfile.TemporaryDirectory() as profile:
        # Pictures come inline, numbers come from the CPU, and nobody's profile has a say.
        environment = os.environ | {
            "IPYTHONDIR": profile,
            "JAX_PLATFORMS": "cpu",
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
        }
        client = NotebookClient(
            notebook,
            timeout=240,
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],  # it warns of its own connection
        )
        client.execute(env=environment)
    notebook.metadata = metadata  # without the version of the interpreter
    return notebook


if __name__ == "__main__":
    for path in PATHS:
        nbformat.write(execute(path), path)
        print(path.name)
