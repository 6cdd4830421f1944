"""Says before a run starts what it will do, and refuses what would go wrong.

`check` reads the configurations of the trainers that people use, `field_states` tells a form which
fields to disable, `ui` has a page and what other Gradio apps need; `python -m sfcore plan` does it on the
command line. docs/rules.md has every rule.
"""

from sfcore.plan import ui as ui
from sfcore.plan._check import check, field_states
from sfcore.plan._model import Change, ConfigError, FieldState, Plan, Problem
from sfcore.plan._report import text

__all__ = ["Change", "ConfigError", "FieldState", "Plan", "Problem", "check", "field_states", "text"]
