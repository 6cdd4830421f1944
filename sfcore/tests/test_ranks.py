"""The ranks of a run decide together: all do a thing or none, and none waits for ever."""

import threading

import pytest

from sfcore.exchange import CheckpointError
from sfcore.ranks import Ranks


class Store:
    """A key-value store in memory."""

    def __init__(self):
        self.held = {}

    def put(self, key, value):
        self.held[key] = value

    def get(self, key):
        return self.held.get(key)

    def drop(self, key):
        self.held.pop(key, None)


class Gone(Store):
    """One whose server has ended."""

    def get(self, key):
        raise RuntimeError("Connection reset by peer")


def on_ranks(count, work, store=None, limit=0.3):
    """Runs work(ranks) on threads; returns for each its result or its error."""
    store, found = store or Store(), [None] * count

    def run(rank):
        try:
            found[rank] = work(Ranks(rank, count, store, "run", limit))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_know_what_all_told():
    found = on_ranks(3, lambda ranks: ranks.agree("count", lambda: ranks.rank, tell=lambda rank: rank * 10))
    assert found == [(rank, [0, 10, 20]) for rank in range(3)]


def test_what_was_said_before_is_forgotten():
    store = Store()

    def work(ranks):
        for number in range(50):
            assert ranks.agree("count", lambda number=number: number, tell=str)[1] == [str(number)] * 2

    assert on_ranks(2, work, store) == [None, None]
    assert len(store.held) <= 7  # three of them from when they met


def fail_on(failing, error):
    def work(ranks):
        def fail():
            if ranks.rank in failing:
                raise error

        return ranks.agree("save", fail)

    return work


def test_what_fails_on_one_is_raised_on_all_and_names_it():
    found = on_ranks(3, fail_on({1}, CheckpointError("the disk is full")))
    assert [str(one) for one in found] == ["rank 1 of 3 cannot save, so none does: the disk is full"] * 3
    assert all(isinstance(one, CheckpointError) for one in found)


def test_several_that_fail_are_counted():
    found = on_ranks(3, fail_on({1, 2}, CheckpointError("full")))
    assert [str(one) for one in found] == ["rank 1 of 3 (and 1 more) cannot save, so none does: full"] * 3


@pytest.mark.parametrize("error", [TypeError("model must be"), KeyboardInterrupt()], ids=repr)
def test_an_error_of_another_type_stays_itself_where_it_was_raised(error):
    first, second = on_ranks(2, fail_on({1}, error))
    assert second is error
    assert str(first).startswith(f"rank 1 of 2 cannot save, so none does: {type(error).__name__}")


def test_what_all_raise_is_raised_as_it_is():
    found = on_ranks(2, fail_on({0, 1}, CheckpointError("position must be >= 0")))
    assert [str(one) for one in found] == ["position must be >= 0"] * 2


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_one_that_never_comes_is_named_by_all_others_in_time(silent):
    def work(ranks):
        return None if ranks.rank == silent else ranks.agree("save", lambda: None)

    found = on_ranks(3, work, limit=0.3)
    others = [one for rank, one in enumerate(found) if rank != silent]
    assert [str(one) for one in others] == [
        f"every rank must save, got no word of rank {silent} of 3 within 0.3 s: make the same calls on every "
        "rank, or see why it stopped."
    ] * 2


def test_after_that_nothing_is_tried_again():
    def work(ranks):
        if ranks.rank:
            return None
        with pytest.raises(CheckpointError, match="no word of rank 1"):
            ranks.agree("save", lambda: None)
        with pytest.raises(CheckpointError, match=r"no word of rank 1 .* Start all of them again"):
            ranks.agree("save", lambda: None)
        return "done"

    assert on_ranks(2, work) == ["done", None]


def test_ranks_that_do_different_things_are_told_so():
    found = on_ranks(2, lambda ranks: ranks.agree("restore" if ranks.rank else "save", lambda: None))
    assert [str(one) for one in found] == [
        "every rank must make the same calls, got rank 1 of 2 at 'restore' where rank 0 of 2 is at 'save'.",
        "every rank must make the same calls, got rank 0 of 2 at 'save' where rank 1 of 2 is at 'restore'.",
    ]


def test_a_store_that_is_gone_is_named():
    found = on_ranks(2, lambda ranks: ranks.agree("save", lambda: None), Gone())
    assert [str(one) for one in found] == [
        f"rank {rank} of 2 cannot reach the others for save (Connection reset by peer). Start all of them "
        "again"
        for rank in (0, 1)
    ]


def test_what_must_be_the_same_names_the_first_that_differs():
    with pytest.raises(
        CheckpointError, match="step must be the same on every rank, got 3 on rank 0 of 3 and 4 on r"
    ):
        Ranks(0, 3, Store(), "run").require_same("step", [3, 3, 4], "step together")


def test_alone_nothing_is_asked_of_anyone():
    def fail():
        raise OSError("full")

    assert Ranks().agree("save", lambda: 3, tell=str) == (3, ["3"])
    with pytest.raises(OSError, match="full"):
        Ranks().agree("save", fail)


def test_what_an_earlier_run_left_in_the_store_is_not_believed():
    store = Store()

    def work(ranks):
        for word in ("old", "older"):
            ranks.agree("save", lambda: None, tell=lambda _, word=word: word)
        ranks.named("preemption", 1.0).call()

    def again(ranks):
        assert not ranks.named("preemption", 1.0).is_called()
        return ranks.agree("save", lambda: None, tell=lambda _: f"new {ranks.rank}")[1]

    assert on_ranks(2, work, store) == [None, None]
    assert on_ranks(2, again, store) == [["new 0", "new 1"]] * 2
    assert on_ranks(3, again, store) == [["new 0", "new 1", "new 2"]] * 3


def test_a_call_of_one_is_known_to_all():
    def work(ranks):
        mine = ranks.named("preemption", 1.0)
        if ranks.rank:
            mine.call()
        ranks.agree("go on", lambda: None)
        return mine.is_called()

    assert on_ranks(2, work) == [True, True]
    assert not Ranks().named("preemption", 1.0).is_called()
