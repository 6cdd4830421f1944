"""Real signals to real processes: everything is saved, whatever the main thread is doing."""

import json
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from sfcore.preemption import EXIT_SAVED, EXIT_UNSAVED

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


def _start(tmp_path, body, save_seconds=0.0, grace=5.0, patience=25.0, first=""):
    source = first + PROGRAM.replace("BODY", textwrap.indent(textwrap.dedent(body), " " * 8))
    source = source.replace("SAVE_SECONDS", str(save_seconds)).replace("GRACE", str(grace))
    return subprocess.Popen(
        [sys.executable, "-c", source.replace("PATIENCE", str(patience)), str(tmp_path / "saved")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ended(child, *numbers, pause=0.0, ready=True):
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


def _saves(tmp_path):
    return [json.loads(line) for line in (tmp_path / "saved").read_text().splitlines()]


SLEEPING = """
update()
ready()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_sleep_saves_says_where_and_unwinds(tmp_path, number):
    code, printed, errors = _ended(_start(tmp_path, SLEEPING), number, pause=0.05)
    assert code == EXIT_SAVED == 75
    assert _saves(tmp_path) == [{"a": 1, "b": 1, "where": "start"}]
    assert f"saved {tmp_path / 'saved'}; start again to go on from there. Exit code 75" in errors
    assert f"{number.name}: saving" in errors
    assert printed == ["unwound"]


LONG_C_CALL = """
update()
ready()
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, deaf to signals, without the GIL
"""


def test_a_signal_during_a_long_c_call_saves_and_ends_the_process_under_it(tmp_path):
    code, printed, errors = _ended(_start(tmp_path, LONG_C_CALL, grace=0.1), signal.SIGTERM, pause=0.05)
    assert code == EXIT_SAVED
    assert _saves(tmp_path) == [{"a": 1, "b": 1, "where": "start"}]
    assert "Exit code 75" in errors
    assert printed == []


COMPILING = """
import jax, jax.numpy as jnp
def slow(x):
    for _ in range(4000):
        x = jnp.sin(x) * x
    return x
lowered = jax.jit(slow).lower(1.0)
ready()
lowered.compile()
raise SystemExit("the compilation was too short to be interrupted")
"""


@pytest.mark.parametrize("grace", [0.0, 20.0])
def test_a_signal_during_a_compilation_of_xla_saves(tmp_path, grace):
    code, printed, errors = _ended(_start(tmp_path, COMPILING, grace=grace), signal.SIGTERM, pause=0.2)
    # With grace JAX lets the main thread out while XLA compiles on, and crashes in a normal end of Python.
    assert code == EXIT_SAVED, errors
    assert printed == (["unwound"] if grace else [])
    assert len(_saves(tmp_path)) == 1


LATER = """
import atexit
atexit.register(print, "later")
update()
ready()
time.sleep(60)
"""


def test_what_was_registered_before_the_module_does_not_run_at_the_end(tmp_path):
    # It may take apart what a compilation still uses, and with a crash there the exit code would be lost.
    child = _start(tmp_path, LATER, first='import atexit; atexit.register(print, "before")')
    code, printed, _ = _ended(child, signal.SIGTERM, pause=0.05)
    assert code == EXIT_SAVED
    assert printed == ["unwound", "later"]


EVALUATING = """
with preemption.updating():
    update()
    state["where"] = "evaluation"
ready()
for _ in range(10000):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 20000)
"""


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(tmp_path):
    code, printed, _ = _ended(_start(tmp_path, EVALUATING), signal.SIGTERM, pause=0.05)
    assert code == EXIT_SAVED
    assert _saves(tmp_path) == [{"a": 1, "b": 1, "where": "evaluation"}]
    assert printed == ["unwound"]


TRAINING = """
ready()
while True:
    with preemption.updating():
        update()
"""


def test_the_next_update_ends_a_program_that_the_system_does_not_interrupt(tmp_path):
    body = "signal.pthread_kill = lambda *_: None\n" + TRAINING
    code, printed, _ = _ended(_start(tmp_path, body, save_seconds=0.1), signal.SIGTERM, pause=0.02)
    assert code == EXIT_SAVED
    assert printed == ["unwound"]
    (state,) = _saves(tmp_path)
    assert state["a"] == state["b"]


def test_an_update_is_never_saved_by_half(tmp_path):
    rng = random.Random(0)
    for _ in range(6):
        code, _, _ = _ended(_start(tmp_path, TRAINING), signal.SIGTERM, pause=rng.uniform(0, 0.05))
        assert code == EXIT_SAVED
    saves = _saves(tmp_path)
    assert len(saves) == 6
    assert all(state["a"] == state["b"] for state in saves)


@pytest.mark.parametrize("body", [TRAINING, SLEEPING, LONG_C_CALL])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_further_signals_change_nothing(tmp_path, body, second):
    child = _start(tmp_path, body, save_seconds=0.3, grace=0.2)
    code, _, errors = _ended(child, signal.SIGTERM, second, second, pause=0.02)
    assert code == EXIT_SAVED, errors
    (state,) = _saves(tmp_path)
    assert state["a"] == state["b"]
    assert errors.count("Exit code") == 1


ENDING = """
import atexit
def end():
    ready()
    time.sleep(0.3)
    print("finished", flush=True)
atexit.register(end)
"""
GOING_ON = """
try:
    with Preemption(save, grace=2.0):
        update()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
except SystemExit:
    os.kill(os.getpid(), signal.SIGTERM)  # unheard
    time.sleep(2.0)
    ready()
    time.sleep(60)
"""


def test_a_second_signal_while_the_program_ends_changes_nothing(tmp_path):
    body = ENDING + "update()\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)"
    child = _start(tmp_path, body)
    assert child.stdout.readline() == "unwound\n"
    code, printed, errors = _ended(child, signal.SIGTERM, signal.SIGINT, pause=0.05)
    assert code == EXIT_SAVED, errors
    assert printed == ["finished"]


def test_a_program_that_goes_on_after_the_save_hears_signals_again(tmp_path):
    source = (PROGRAM.split("try:")[0] + GOING_ON).replace("SAVE_SECONDS", "0")
    child = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path / "saved")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    code, _, errors = _ended(child, signal.SIGTERM)
    assert code == -signal.SIGTERM, errors
    assert len(_saves(tmp_path)) == 1


FAILING = """
def save():
    raise OSError(28, "No space left on device")
preemption._save = save
ready()
time.sleep(60)
"""


def test_a_save_that_fails_has_its_own_exit_code_and_says_why(tmp_path):
    code, printed, errors = _ended(_start(tmp_path, FAILING), signal.SIGTERM)
    assert code == EXIT_UNSAVED == 74
    assert "No space left on device" in errors
    assert "not saved; the newest checkpoint counts. Exit code 74" in errors
    assert printed == ["unwound"]


STUCK = """
with preemption.updating():
    state["a"] += 1
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_an_update_that_does_not_end_is_not_saved_by_half(tmp_path):
    code, _, errors = _ended(_start(tmp_path, STUCK, grace=0.1, patience=0.1), signal.SIGTERM)
    assert code == EXIT_UNSAVED
    assert "the update did not end within 0.1 s" in errors
    assert not (tmp_path / "saved").exists()


CAUGHT = """
ready()
while True:
    try:
        with preemption.updating():
            update()
        time.sleep(0.001)
    except Exception:
        pass
"""


def test_a_program_that_swallows_exceptions_ends_too(tmp_path):
    code, printed, _ = _ended(_start(tmp_path, CAUGHT), signal.SIGTERM, pause=0.02)
    assert code == EXIT_SAVED
    assert printed == ["unwound"]


LEAVING = """
ready()
signal.pthread_kill = lambda *_: None  # the save ends when the block is being left
with preemption.updating():
    update()
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_as_the_last_update_ends_is_not_lost(tmp_path):
    code, printed, _ = _ended(_start(tmp_path, LEAVING, save_seconds=0.2))
    assert code == EXIT_SAVED
    assert printed == ["unwound"]
    assert _saves(tmp_path) == [{"a": 1, "b": 1, "where": "start"}]


LATE = """
ready()
send = preemption._sender
class Late:
    def send(self, data):
        send.send(data)
        preemption._decided.wait()
        os.kill(os.getpid(), signal.SIGTERM)  # nobody watches any more
    def close(self):
        send.close()
preemption._sender = Late()
"""


def test_a_signal_after_the_watch_ended_reaches_the_handler_from_before(tmp_path):
    code, _, _ = _ended(_start(tmp_path, LATE))
    assert code == -signal.SIGTERM


FORKING = """
pid = os.fork()
if pid == 0:
    print("ready", flush=True)
    time.sleep(60)
assert os.waitpid(pid, 0)[1] == signal.SIGTERM
time.sleep(0.2)
state["where"] = "after the worker"
"""


def test_the_end_of_a_forked_worker_is_not_the_parents(tmp_path):
    body = FORKING.replace(
        'print("ready", flush=True)', 'print("ready", flush=True); os.kill(os.getpid(), 15)'
    )
    code, printed, errors = _ended(_start(tmp_path, body))
    assert code == 0, errors
    assert printed == ["unwound", "went", "on"]
    assert not (tmp_path / "saved").exists()


HOLDING_IT_ITSELF = """
def save_in_an_update():
    with preemption.updating():
        return save()

preemption._save = save_in_an_update
ready()
while True:
    with preemption.updating():
        update()
"""


def test_a_save_may_hold_the_update_itself(tmp_path):
    assert _ended(_start(tmp_path, HOLDING_IT_ITSELF), signal.SIGTERM, pause=0.05)[0] == EXIT_SAVED
    assert [state["a"] - state["b"] for state in _saves(tmp_path)] == [0]


FORKING_AND_LEAVING = """
child = os.fork()
if not child:
    raise SystemExit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
update()
ready()
time.sleep(60)
"""


def test_a_forked_child_may_leave_the_block_and_the_parent_still_saves(tmp_path):
    child = _start(tmp_path, FORKING_AND_LEAVING)
    assert child.stdout.readline() == "unwound\n"  # the forked one
    code, printed, errors = _ended(child, signal.SIGTERM, pause=0.05)
    assert code == EXIT_SAVED, errors
    assert printed == ["unwound"]
    assert len(_saves(tmp_path)) == 1


ASYNCIO = """
import asyncio

async def train():
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print)
    ready()
    while True:
        with preemption.updating():
            update()
        await asyncio.sleep(0.01)

asyncio.run(train())
"""


def test_an_event_loop_inside_the_block_does_not_keep_the_signal_to_itself(tmp_path):
    code, printed, errors = _ended(_start(tmp_path, ASYNCIO), signal.SIGTERM, pause=0.05)
    assert code == EXIT_SAVED, errors
    assert printed == ["unwound"]
    assert len(_saves(tmp_path)) == 1


WITHOUT_A_READER = """
ready()
import atexit
atexit.register(print, "this stays in the buffer")
print = lambda *_, **__: None  # the program's own would find out
time.sleep(60)
"""


def test_the_exit_code_is_kept_when_the_reader_of_the_output_has_gone(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    child = _start(tmp_path, WITHOUT_A_READER)
    assert child.stdout.readline() == "ready\n"
    child.stdout.close()  # as tee does at the same Ctrl-C
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == EXIT_SAVED
    child.stderr.close()


TWO_RUNS = """
try:
    with Preemption(save):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
except SystemExit:
    pass
with Preemption(save):
    update()
"""


def test_a_later_run_of_the_program_that_ends_well_has_no_exit_code_of_an_earlier(tmp_path):
    source = (PROGRAM.split("try:")[0] + TWO_RUNS).replace("SAVE_SECONDS", "0")
    ended = subprocess.run([sys.executable, "-c", source, str(tmp_path / "saved")], timeout=60)
    assert ended.returncode == 0
