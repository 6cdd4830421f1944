"""Processes that train under Preemption, to send signals to."""

import json
import subprocess
import sys
import textwrap
import time

# Counts in two halves; a save that sees one half only is torn.
PROGRAM = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
from sfcore.preemption import Preemption

state = {"a": 0, "b": 0, "where": "start"}
target = Path(sys.argv[1])

def save():
    text = json.dumps(state)
    time.sleep(SAVE_SECONDS)
    with open(target, "a") as file:
        file.write(text + "\\n")
    return target

def update():
    state["a"] += 1
    time.sleep(0.002)
    state["b"] += 1

def ready():
    print("ready", flush=True)

try:
    with Preemption(save, grace=GRACE, patience=PATIENCE) as preemption:
BODY
finally:
    print("unwound", flush=True)
print("went on", flush=True)
"""


def start(tmp_path, body, save_seconds=0.0, grace=5.0, patience=25.0, first=""):
    source = first + PROGRAM.replace("BODY", textwrap.indent(textwrap.dedent(body), " " * 8))
    source = source.replace("SAVE_SECONDS", str(save_seconds)).replace("GRACE", str(grace))
    return subprocess.Popen(
        [sys.executable, "-c", source.replace("PATIENCE", str(patience)), str(tmp_path / "saved")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(child, *numbers, pause=0.0, ready=True):
    """Sends signals once the child is ready; returns its exit code, what it printed and its errors."""
    if ready:
        assert child.stdout.readline() == "ready\n"
    for number in numbers:
        time.sleep(pause)
        child.send_signal(number)
    try:
        printed, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    return child.returncode, printed.split(), errors


def saves(tmp_path):
    return [json.loads(line) for line in (tmp_path / "saved").read_text().splitlines()]
