"""Work beside other work."""

import threading

import pytest

from sfcore.beside import beside, checking


def test_both_run_at_once_and_the_result_is_there_in_the_block_and_after_it():
    meet = threading.Barrier(2, timeout=20)

    def work():
        meet.wait()
        return "done"

    with beside(work) as result:
        meet.wait()
        assert result() == "done"
    assert result() == "done"


def test_what_the_work_raises_comes_where_its_result_is_asked_for():
    with beside(lambda: 1 // 0) as result:
        pass
    with pytest.raises(ZeroDivisionError):
        result()


def test_an_error_of_the_block_waits_for_the_work():
    ended = []
    with pytest.raises(KeyError), beside(lambda: ended.append(1)):
        raise KeyError
    assert ended == [1]


def test_without_threads_it_is_done_first(monkeypatch):
    def start(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    order = []
    with beside(lambda: order.append("work")) as result:
        order.append("block")
    assert (result(), order) == (None, ["work", "block"])


def test_checks_are_done_in_order_before_the_block_has_ended():
    meet, found = threading.Barrier(2, timeout=20), []
    with checking() as later:
        later(meet.wait)
        for i in range(3):
            later(lambda i=i: found.append(i))
        meet.wait()
    assert found == [0, 1, 2]


def check(*errors, block=None):
    with checking() as later:
        for error in errors:
            later(lambda error=error: fail(error))
        fail(block)


def fail(error):
    if error:
        raise error


def test_the_first_check_that_failed_raises_also_where_the_block_does():
    errors = None, ValueError("first"), ValueError("second")
    with pytest.raises(ValueError, match="first"):
        check(*errors)
    with pytest.raises(ValueError, match="first"):
        check(*errors, block=KeyError())
    with pytest.raises(KeyError):
        check(None, block=KeyError())


def test_without_threads_checks_are_done_at_once(monkeypatch):
    def start(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    with checking() as later:
        found = []
        later(lambda: found.append(1))
        assert found == [1]
        with pytest.raises(ZeroDivisionError):
            later(lambda: 1 // 0)
