"""Real signals to processes that leave, end, fork or go on: the exit code and what was saved stay right."""

import signal
import subprocess
import sys

from sfcore.preemption import EXIT_SAVED
from sfcore.tests.preempted import PROGRAM, ended, saves, start

LATER = """
import atexit
atexit.register(print, "later")
update()
ready()
time.sleep(60)
"""


def test_what_was_registered_before_the_module_does_not_run_at_the_end(tmp_path):
    # It may take apart what a compilation still uses, and with a crash there the exit code would be lost.
    child = start(tmp_path, LATER, first='import atexit; atexit.register(print, "before")')
    code, printed, _ = ended(child, signal.SIGTERM, pause=0.05)
    assert code == EXIT_SAVED
    assert printed == ["unwound", "later"]


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
    child = start(tmp_path, body)
    assert child.stdout.readline() == "unwound\n"
    code, printed, errors = ended(child, signal.SIGTERM, signal.SIGINT, pause=0.05)
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
    code, _, errors = ended(child, signal.SIGTERM)
    assert code == -signal.SIGTERM, errors
    assert len(saves(tmp_path)) == 1


LEAVING = """
ready()
signal.pthread_kill = lambda *_: None  # the save ends when the block is being left
with preemption.updating():
    update()
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_as_the_last_update_ends_is_not_lost(tmp_path):
    code, printed, _ = ended(start(tmp_path, LEAVING, save_seconds=0.2))
    assert code == EXIT_SAVED
    assert printed == ["unwound"]
    assert saves(tmp_path) == [{"a": 1, "b": 1, "where": "start"}]


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
    code, _, _ = ended(start(tmp_path, LATE))
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
    code, printed, errors = ended(start(tmp_path, body))
    assert code == 0, errors
    assert printed == ["unwound", "went", "on"]
    assert not (tmp_path / "saved").exists()


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
    child = start(tmp_path, FORKING_AND_LEAVING)
    assert child.stdout.readline() == "unwound\n"  # the forked one
    code, printed, errors = ended(child, signal.SIGTERM, pause=0.05)
    assert code == EXIT_SAVED, errors
    assert printed == ["unwound"]
    assert len(saves(tmp_path)) == 1


WITHOUT_A_READER = """
ready()
import atexit
atexit.register(print, "this stays in the buffer")
print = lambda *_, **__: None  # the program's own would find out
time.sleep(60)
"""


def test_the_exit_code_is_kept_when_the_reader_of_the_output_has_gone(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    child = start(tmp_path, WITHOUT_A_READER)
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
    done = subprocess.run([sys.executable, "-c", source, str(tmp_path / "saved")], timeout=60)
    assert done.returncode == 0
