"""Real signals to real processes: everything is saved, whatever the main thread is doing."""

import random
import signal

import pytest

from sfcore.preemption import EXIT_SAVED, EXIT_UNSAVED
from sfcore.tests.preempted import ended, saves, start

SLEEPING = """
update()
ready()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_sleep_saves_says_where_and_unwinds(tmp_path, number):
    code, printed, errors = ended(start(tmp_path, SLEEPING), number, pause=0.05)
    assert code == EXIT_SAVED == 75
    assert saves(tmp_path) == [{"a": 1, "b": 1, "where": "start"}]
    assert f"saved {tmp_path / 'saved'}; start again to go on from there. Exit code 75" in errors
    assert f"{number.name}: saving" in errors
    assert printed == ["unwound"]


LONG_C_CALL = """
update()
ready()
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, deaf to signals, without the GIL
"""


def test_a_signal_during_a_long_c_call_saves_and_ends_the_process_under_it(tmp_path):
    code, printed, errors = ended(start(tmp_path, LONG_C_CALL, grace=0.1), signal.SIGTERM, pause=0.05)
    assert code == EXIT_SAVED
    assert saves(tmp_path) == [{"a": 1, "b": 1, "where": "start"}]
    assert "Exit code 75" in errors
    assert printed == []


COMPILING = """
import jax, jax.numpy as jnp
jax.config.update("jax_enable_compilation_cache", False)
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
    code, printed, errors = ended(start(tmp_path, COMPILING, grace=grace), signal.SIGTERM, pause=0.2)
    # With grace JAX lets the main thread out while XLA compiles on, and crashes in a normal end of Python.
    assert code == EXIT_SAVED, errors
    assert printed == (["unwound"] if grace else [])
    assert len(saves(tmp_path)) == 1


EVALUATING = """
with preemption.updating():
    update()
    state["where"] = "evaluation"
ready()
for _ in range(10000):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 20000)
"""


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(tmp_path):
    code, printed, _ = ended(start(tmp_path, EVALUATING), signal.SIGTERM, pause=0.05)
    assert code == EXIT_SAVED
    assert saves(tmp_path) == [{"a": 1, "b": 1, "where": "evaluation"}]
    assert printed == ["unwound"]


TRAINING = """
ready()
while True:
    with preemption.updating():
        update()
"""


def test_the_next_update_ends_a_program_that_the_system_does_not_interrupt(tmp_path):
    body = "signal.pthread_kill = lambda *_: None\n" + TRAINING
    code, printed, _ = ended(start(tmp_path, body, save_seconds=0.1), signal.SIGTERM, pause=0.02)
    assert code == EXIT_SAVED
    assert printed == ["unwound"]
    (state,) = saves(tmp_path)
    assert state["a"] == state["b"]


def test_an_update_is_never_saved_by_half(tmp_path):
    rng = random.Random(0)
    for _ in range(6):
        code, _, _ = ended(start(tmp_path, TRAINING), signal.SIGTERM, pause=rng.uniform(0, 0.05))
        assert code == EXIT_SAVED
    states = saves(tmp_path)
    assert len(states) == 6
    assert all(state["a"] == state["b"] for state in states)


@pytest.mark.parametrize("body", [TRAINING, SLEEPING, LONG_C_CALL])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_further_signals_change_nothing(tmp_path, body, second):
    child = start(tmp_path, body, save_seconds=0.3, grace=0.2)
    code, _, errors = ended(child, signal.SIGTERM, second, second, pause=0.02)
    assert code == EXIT_SAVED, errors
    (state,) = saves(tmp_path)
    assert state["a"] == state["b"]
    assert errors.count("Exit code") == 1


FAILING = """
def save():
    raise OSError(28, "No space left on device")
preemption._save = save
ready()
time.sleep(60)
"""


def test_a_save_that_fails_has_its_own_exit_code_and_says_why(tmp_path):
    code, printed, errors = ended(start(tmp_path, FAILING), signal.SIGTERM)
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
    code, _, errors = ended(start(tmp_path, STUCK, grace=0.1, patience=0.1), signal.SIGTERM)
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
    code, printed, _ = ended(start(tmp_path, CAUGHT), signal.SIGTERM, pause=0.02)
    assert code == EXIT_SAVED
    assert printed == ["unwound"]


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
    assert ended(start(tmp_path, HOLDING_IT_ITSELF), signal.SIGTERM, pause=0.05)[0] == EXIT_SAVED
    assert [state["a"] - state["b"] for state in saves(tmp_path)] == [0]


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
    code, printed, errors = ended(start(tmp_path, ASYNCIO), signal.SIGTERM, pause=0.05)
    assert code == EXIT_SAVED, errors
    assert printed == ["unwound"]
    assert len(saves(tmp_path)) == 1
