"""A save in the background: interrupted, at the end of the program, beside another object's."""

import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from sfcore import store
from sftorch.checkpoint import Checkpoints
from sftorch.tests.checkpoint_runs import PLAIN, started, train


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs a signal to one thread")
def test_a_save_after_an_interrupted_wait_does_not_reach_the_one_in_flight(tmp_path, monkeypatch):
    model, optimizer = started()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    # A test run that was started in the background ignores SIGINT.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    going_on, write = threading.Event(), store.write
    monkeypatch.setattr(store, "write", lambda *arguments: going_on.wait(60) and write(*arguments))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer, step=1)
        interrupt = (threading.get_ident(), signal.SIGINT)
        threading.Timer(0.5, signal.pthread_kill, interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait()
        signal.signal(signal.SIGINT, handler)
        train(model, optimizer, PLAIN, 3, 4)
        threading.Timer(0.5, going_on.set).start()
        checkpoints.save(model, optimizer, step=2)
    _, arrays = store.read(store.steps(tmp_path)[1])
    assert all(np.array_equal(arrays[f"y/{name}"], value) for name, value in expected.items())


@pytest.mark.parametrize("runs", [True, False])
def test_a_save_interrupted_while_its_thread_starts_leaves_later_ones_possible(tmp_path, monkeypatch, runs):
    model, optimizer = started()
    start = threading.Thread.start

    def interrupted(thread):
        if thread.name != "sftorch.checkpoint":  # what the save itself starts
            return start(thread)
        if runs:
            start(thread)
        raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(model, optimizer, step=1)
    assert checkpoints._background._idle.wait(60)  # or everything after it would hang
    checkpoints.save(model, optimizer, step=2)
    assert checkpoints.wait() == store.steps(tmp_path)[2]
    checkpoints.close()


AT_EXIT = """
import atexit, sys, torch, sftorch
from sftorch.checkpoint import Checkpoints
model = torch.nn.Linear(2, 1)
optimizer = sftorch.AdamWScheduleFree(model.parameters())
atexit.register(Checkpoints(sys.argv[1]).save, model, optimizer, step=7)
"""


def test_a_save_while_the_program_ends_is_there_when_it_has_ended(tmp_path):
    subprocess.run([sys.executable, "-c", AT_EXIT, tmp_path], check=True)
    assert list(store.steps(tmp_path)) == [7]


def test_a_relative_folder_stays_where_it_was_when_the_program_goes_elsewhere(tmp_path, monkeypatch):
    model, optimizer = started()
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    checkpoints.save(model, optimizer)
    assert checkpoints.wait() == tmp_path / "run" / "step_000000003"


def test_the_first_save_of_another_object_leaves_a_save_in_flight_alone(tmp_path, monkeypatch):
    model, optimizer = started()
    filled, goes_on = threading.Event(), threading.Event()

    def fill(*args, inner=store._fill):
        inner(*args)
        filled.set()
        goes_on.wait()

    with monkeypatch.context() as patch, Checkpoints(tmp_path) as checkpoints:
        patch.setattr(store, "_fill", fill)
        checkpoints.save(model, optimizer, step=4)
        filled.wait()
        patch.undo()
        Checkpoints(tmp_path, background=False).save(model, optimizer, step=3)
        goes_on.set()
    assert list(store.steps(tmp_path)) == [3, 4]
