"""What both twins' Checkpoints do alike: one save at a time, its error once, a place for each checkpoint."""

import logging
import threading

import pytest

from sfcore import store
from sfcore.exchange import CheckpointError
from sfcore.saving import Background, Saving
from sfcore.tests import examples

# As in JAX: a step has one name only.
ONE_NAME = store.PLAIN._replace(
    checkpoints=lambda folder: sorted((int(path.name), path) for path in folder.glob("[0-9]*")),
    name=lambda step, older: str(step),
)


class Saver(Saving):
    def __init__(self, folder, background=True):
        log = logging.getLogger("saver")
        super().__init__(folder, 2, 0, "loss", background, 0.0, 600.0, store.PLAIN, log)

    def save(self, step, write=None):
        def plain():
            return store.write(self.folder, examples.meta(step), examples.state(step), {})

        self.wait()
        self._start(step, write or plain)


@pytest.mark.parametrize("background", [True, False])
def test_the_newest_stay_and_the_path_of_the_last_is_told(background, tmp_path):
    with Saver(tmp_path, background) as saver:
        assert saver.wait() is None
        for step in (1, 2, 3):
            saver.save(step)
        assert saver.wait() == store.newest(tmp_path)
    assert list(store.steps(tmp_path)) == [2, 3]


def test_an_error_is_logged_at_once_and_raised_once(tmp_path, caplog):
    saver = Saver(tmp_path)
    saver.save(1, lambda: 1 / 0)
    with pytest.raises(CheckpointError, match=r"the save of step 1 failed: ZeroDivisionError"):
        saver.wait()
    assert "the save of step 1 failed" in caplog.text
    saver.save(1)
    assert saver.wait() == store.newest(tmp_path)


def test_what_is_newer_is_set_aside_with_a_word(tmp_path, caplog):
    with Saver(tmp_path, background=False) as saver:
        saver.save(9)
        saver.save(4)
    assert list(store.steps(tmp_path)) == [4]
    assert "is newer than step 4, where this run is: it was set aside" in caplog.text


def test_work_in_the_background_is_waited_for(tmp_path):
    background, goes_on, done = Background("test", True), threading.Event(), []
    background.start(lambda: goes_on.wait(60) and done.append(1))
    assert not done
    goes_on.set()
    background.wait()
    assert done == [1]


def fill(text):
    def filled(path):
        path.mkdir()
        (path / "file").write_text(text)

    return filled


def test_a_step_of_one_name_is_replaced_and_nothing_else_stays(tmp_path):
    for text in ("old", "new"):
        assert store.put(tmp_path, 3, fill(text), ONE_NAME) == tmp_path / "3"
    assert (tmp_path / "3" / "file").read_text() == "new"
    assert examples.listed(tmp_path) == ["3"]


def test_a_fill_that_fails_leaves_the_older_one_of_that_name(tmp_path):
    store.put(tmp_path, 3, fill("old"), ONE_NAME)
    with pytest.raises(ZeroDivisionError):
        store.put(tmp_path, 3, lambda path: 1 / 0, ONE_NAME)
    assert (tmp_path / "3" / "file").read_text() == "old"
    assert examples.listed(tmp_path) == ["3"]


@pytest.mark.parametrize("arrived", [True, False])
def test_what_made_way_comes_back_if_no_new_one_came(arrived, tmp_path):
    (tmp_path / store.REPLACED / "3").mkdir(parents=True)
    (tmp_path / store.REPLACED / "3" / "file").write_text("old")
    if arrived:
        store.put(tmp_path, 3, fill("new"), ONE_NAME)
    store.clean(tmp_path, ONE_NAME)
    assert (tmp_path / "3" / "file").read_text() == ("new" if arrived else "old")
    assert examples.listed(tmp_path) == ["3"]


def test_a_clean_leaves_alone_what_this_process_is_putting_in_place(tmp_path, monkeypatch):
    store.put(tmp_path, 3, fill("old"), ONE_NAME)
    rename = store.files.rename

    def after_a_clean(path, final):
        store.clean(tmp_path, ONE_NAME)
        rename(path, final)

    monkeypatch.setattr(store.files, "rename", after_a_clean)
    store.put(tmp_path, 3, fill("new"), ONE_NAME)
    assert (tmp_path / "3" / "file").read_text() == "new"
    assert examples.listed(tmp_path) == ["3"]
