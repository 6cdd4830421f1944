"""Work beside other work."""

import threading

import pytest

from sfcore.beside import beside, each


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


def test_several_are_worked_on_at_once_and_found_in_their_order():
    meet = threading.Barrier(2, timeout=20)

    def work(one):
        meet.wait()
        return -one

    assert each(work, [1, 2, 3, 4]) == [-1, -2, -3, -4]
    assert each(work, []) == []


def test_the_first_that_failed_raises_and_the_rest_is_left():
    begun, end = [], threading.Event()

    def work(one):
        begun.append(one)
        if one == 1:
            raise ValueError("first")
        assert one == 0 or end.wait(20)
        if one == 3:
            raise KeyError("second")

    many = range(100)
    timer = threading.Timer(0.2, end.set)
    timer.start()
    with pytest.raises(ValueError, match="first"):
        each(work, many)
    timer.join()
    assert len(begun) < len(many)


def test_without_threads_they_are_done_one_after_the_other(monkeypatch):
    def start(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert each(abs, [-1, 2]) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        each(lambda one: 1 // one, [1, 0])
