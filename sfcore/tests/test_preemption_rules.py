"""Preemption without a signal: nothing changes, others' signals reach them, misuse is refused."""

import asyncio
import os
import signal
import subprocess
import sys
import threading

import pytest

from sfcore.preemption import EXIT_SAVED, Preemption


def test_without_a_signal_everything_is_as_before():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Preemption(lambda: None) as preemption:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        with preemption.updating(), preemption.updating():
            pass
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == 1 or "sfcore.preemption" not in {t.name for t in threading.enumerate()}


def test_an_error_of_the_program_comes_through():
    with pytest.raises(ZeroDivisionError), Preemption(lambda: None):
        _ = 1 / 0
    assert signal.set_wakeup_fd(-1) == -1


def test_signals_of_others_reach_them():
    async def program():
        heard = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.set)
        with Preemption(lambda: None):
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.wait_for(heard.wait(), 10)
        return heard.is_set()

    assert asyncio.run(program())


def test_a_second_preemption_is_refused():
    with Preemption(lambda: None), pytest.raises(RuntimeError, match="one Preemption must be active"):
        Preemption(lambda: None).__enter__()


def test_another_thread_than_the_main_one_is_refused():
    caught = []

    def enter():
        try:
            Preemption(lambda: None).__enter__()
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "must be entered in the main thread" in caught[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signals": ()}, "signals must name at least one"),
        ({"signals": [signal.SIGTERM, signal.SIGKILL]}, "signals must be some that a program can catch, got"),
        ({"grace": -1}, "grace must be a number of seconds >= 0, got -1"),
        ({"patience": float("nan")}, "patience must be a number of seconds >= 0, got nan"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Preemption(lambda: None, **options)


UNUSUAL = """
import signal, time
from sfcore.preemption import Preemption
ends = signal.SIGRTMIN + 1  # has no name
with Preemption(lambda: "here", {}) as preemption:
    signal.raise_signal(preemption._signals[-1])
    for _ in range(1000):
        with preemption.updating():
            pass
        time.sleep(0.01)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="no real-time signals here")
@pytest.mark.parametrize("options", ["patience=float('inf'), grace=float('inf')", "signals=[ends]"])
def test_unusual_options_do_not_keep_a_signal_from_being_saved_at(options):
    program = UNUSUAL.replace("{}", options)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == EXIT_SAVED, ended.stderr


def test_a_signal_named_twice_goes_back_to_its_handler_from_before():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption(lambda: None, signals=[signal.SIGTERM, signal.SIGTERM]):
        pass
    assert signal.getsignal(signal.SIGTERM) == before
