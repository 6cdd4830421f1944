"""What `import sftorch` brings: submodules on demand, and a sentence where a package is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sfcore
import sftorch

ROOT = Path(__file__).parents[2]

LINE = r"pip install 'schedulefree-twin\[{}\]'"
MISSING = "import sys\nfor name in {!r}: sys.modules[name] = None\n"


def ran(code):
    """Returns what a fresh interpreter printed, as JSON; what it raised becomes an AssertionError."""
    quiet = os.environ | {"PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=quiet
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def raised(code):
    """Returns the type and the message of what it raises."""
    caught = "\n".join(f"    {line}" for line in code.splitlines())
    shown = "import json\n    print(json.dumps([type(error).__name__, str(error)]))"
    return ran(f"try:\n{caught}\nexcept BaseException as error:\n    {shown}")


def test_submodules_are_attributes_and_cost_nothing_before():
    names = ["checkpoint", "recalibrate", "trainers"]
    before, seen, after = ran(
        "import sys, json, sftorch\n"
        "loaded = lambda: sorted(name for name in sys.modules if name.split('.')[-1] in "
        "{'checkpoint', 'recalibrate', 'trainers', 'hf', 'transformers', 'lightning'} "
        "and name.split('.')[0] in {'sftorch', 'transformers', 'lightning'})\n"
        "before, seen = loaded(), dir(sftorch)\n"
        "sftorch.checkpoint.Checkpoints, sftorch.recalibrate.recalibrate, sftorch.trainers.unwrap\n"
        "print(json.dumps([before, seen, loaded()]))"
    )
    assert before == []
    assert set(names) <= set(seen)
    assert set(sftorch.__all__) <= set(seen)
    assert after == [f"sftorch.{name}" for name in names]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sftorch' has no attribute 'checkpiont'"):
        sftorch.checkpiont  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'sftorch\.trainers' has no attribute 'keras'"):
        sftorch.trainers.keras  # noqa: B018
    assert {"hf", "lightning", "unwrap"} <= set(dir(sftorch.trainers))
    assert sftorch.__version__ == sfcore.__version__


@pytest.mark.parametrize(
    ("missing", "code", "needs", "extra"),
    [
        ("torch", "import sftorch", r"sftorch needs torch >= 2\.\d+", "torch"),
        (
            "transformers",
            "import sftorch; sftorch.trainers.hf",
            "sftorch.trainers.hf needs transformers",
            "trainers",
        ),
        (
            "lightning",
            "from sftorch.trainers import lightning",
            "sftorch.trainers.lightning needs lightning",
            "trainers",
        ),
    ],
)
def test_a_missing_package_is_told_with_the_line_that_brings_it(missing, code, needs, extra):
    kind, said = raised(MISSING.format([missing]) + code)
    assert kind == "ImportError"
    assert re.fullmatch(rf"{needs}, got .*{missing}.*: {LINE.format(extra)}", said)


PRETENDED = "import torch\ntorch.__version__ = type(torch.__version__)({!r})\nimport sftorch\n"


@pytest.mark.slow
def test_a_torch_that_is_too_old_is_told_so_and_the_oldest_is_the_one_that_is_asked_for():
    kind, said = raised(PRETENDED.format("2.5.1+cpu"))
    assert kind == "ImportError"
    oldest, got = re.fullmatch(
        r"sftorch needs torch >= ([\d.]+), got torch (.*): pip install '.*\[torch\]'", said
    ).groups()
    assert got == "2.5.1+cpu"
    assert f'torch = ["torch>={oldest}", ' in (ROOT / "pyproject.toml").read_text()
    vendors = "2.6.0a0+df5bbc09d1.nv24.12"
    assert (
        ran(PRETENDED.format(vendors) + "import json; print(json.dumps(str(torch.__version__)))") == vendors
    )


SAVE = """
import tempfile, torch, sftorch, json
model = torch.nn.Linear(2, 1, dtype={dtype})
optimizer = sftorch.SGDScheduleFree(model.parameters())
model(torch.ones(1, 2, dtype={dtype})).sum().backward()
optimizer.step()
with tempfile.TemporaryDirectory() as folder, sftorch.checkpoint.Checkpoints(folder) as checkpoints:
    checkpoints.save(model, optimizer)
    step = checkpoints.restore(model, optimizer).meta.step
print(json.dumps(step))
"""


@pytest.mark.slow
def test_checkpoints_need_ml_dtypes_for_what_numpy_lacks_and_say_so_before_they_write():
    missing = MISSING.format(["ml_dtypes"])
    assert ran(missing + SAVE.format(dtype="torch.float32")) == 1
    kind, said = raised(missing + SAVE.format(dtype="torch.bfloat16"))
    assert kind == "CheckpointError"
    assert said.startswith("bfloat16 tensors need ml_dtypes, got ")
    assert said.endswith("pip install 'schedulefree-twin[torch]'")


LIFE = """
import json, sys, torch, sftorch
seen = ['torch._dynamo' not in sys.modules]
model = torch.nn.Linear(2, 1)
optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.01)
def train():
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
train()
optimizer.eval()
optimizer.train()
optimizer.load_state_dict(optimizer.state_dict())
optimizer.eval_state_dict(model)
seen.append('torch._dynamo' not in sys.modules)
"""


def test_the_compiler_is_not_imported_before_somebody_compiles():
    assert ran(LIFE + "print(json.dumps(seen))") == [True, True]


@pytest.mark.slow
def test_a_step_that_is_compiled_later_is_passed_over_as_one_that_was_before():
    later = """
step = torch.compile(optimizer.step, backend="eager")
from sftorch import closure
from sftorch.state import compiler, groups, modes, state_dict
from sftorch.step import plan
marked = [state_dict.settle, state_dict.before_step, modes.TrainEvalOptimizer._take_step]
marked += [plan.DirectedOptimizer._prepare, closure.XAtRest._restore, groups.GroupedOptimizer.zero_grad]
seen += [all(function._torchdynamo_disable for function in marked), compiler._noted == []]
import torch._dynamo.utils
for lr in (0.01, 0.02, 0.03):
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    step()
seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
print(json.dumps(seen))
"""
    # torch says of its own profiler, once a process, that it is left out of the graph.
    quiet = "import warnings; warnings.filterwarnings('ignore', '.*record function.*')\n"
    assert ran(quiet + LIFE + later) == [True, True, True, True, 1]
