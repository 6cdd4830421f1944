"""What `import sfcore` brings: its modules on demand."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sfcore


def test_modules_are_attributes_and_cost_nothing_before():
    code = (
        "import sys, sfcore\n"
        "loaded = lambda: sorted(name for name in sys.modules if name.startswith('sfcore.'))\n"
        "assert loaded() == ['sfcore.checks', 'sfcore.lazy'], loaded()\n"
        "assert {'plan', 'watch', 'HyperparameterError'} <= set(dir(sfcore))\n"
        "sfcore.plan.check, sfcore.watch.Watch\n"
        "assert {'sfcore.plan', 'sfcore.watch'} <= set(loaded())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sfcore' has no attribute 'plans'"):
        sfcore.plans  # noqa: B018
