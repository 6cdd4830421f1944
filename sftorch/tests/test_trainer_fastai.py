"""A real fastai Learner validates, saves and leaves x. What a run saves and a resume: in test_safe_models."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

import sftorch
from sftorch.tests.pages import run
from sftorch.trainers import unwrap

pytest.importorskip("fastai", reason="needs fastai, 250 MB with spacy and pandas")

with warnings.catch_warnings():  # of torch and pandas, about fastai
    warnings.simplefilter("ignore")
    from fastai.basics import Callback, CancelFitException, Datasets, Learner, OptimWrapper, load_learner

    from sftorch.trainers.fastai import ScheduleFreeCallback

pytestmark = pytest.mark.filterwarnings("ignore")
OURS = functools.partial(OptimWrapper, opt=sftorch.AdamWScheduleFree, warmup_steps=2)


def loss(out, target):
    return (out - target).square().mean()


def row(seed, size):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def loaders():
    columns = [[functools.partial(row, size=4)], [functools.partial(row, size=2)]]
    data = Datasets(list(range(30)), columns, splits=(list(range(20)), list(range(20, 30))))
    return data.dataloaders(bs=5, num_workers=0)


def learner(folder, opt_func=OURS):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    learn = Learner(loaders(), model, loss, opt_func, lr=0.05, path=folder, cbs=ScheduleFreeCallback())
    learn.no_bar().__enter__()
    learn.no_logging().__enter__()
    return learn


class Witness(Callback):
    """Notes at what the model is validated, and what it holds in training."""

    order = 100

    def before_fit(self):
        self.at_x, self.at_y = [], []

    def holds_x(self):
        x = unwrap(self.learn.opt).eval_params()
        return all(torch.equal(p, x[p]) for p in self.model.parameters())

    def before_validate(self):
        self.at_x.append(self.holds_x())

    def after_train(self):
        self.at_y.append(not self.holds_x())


def test_it_validates_at_x_trains_at_y_and_leaves_x(tmp_path):
    learn, witness = learner(tmp_path), Witness()
    learn.fit(3, cbs=witness)
    assert witness.at_x == witness.at_y == [True] * 3
    assert Witness.holds_x(witness_of(learn))
    assert unwrap(learn.opt).metrics()[0]["step"] == 12
    learn.fit(1)
    assert unwrap(learn.opt).metrics()[0]["step"] == 16


def witness_of(learn):
    witness = Witness()
    witness.learn = learn
    return witness


def test_a_fit_that_is_cancelled_leaves_x(tmp_path):
    class Stops(Callback):
        def after_batch(self):
            if self.training and self.train_iter == 6:
                raise CancelFitException

    learn = learner(tmp_path)
    learn.fit(3, cbs=Stops())
    assert unwrap(learn.opt).metrics()[0]["step"] == 6
    assert witness_of(learn).holds_x()


def test_what_is_exported_is_x_and_can_be_loaded_and_validated(tmp_path):
    learn = learner(tmp_path)
    learn.fit(2)
    x = unwrap(learn.opt).eval_state_dict(learn.model)
    learn.export("export.pkl")
    loaded = load_learner(tmp_path / "export.pkl")
    assert all(torch.equal(value, x[name]) for name, value in loaded.model.state_dict().items())
    with loaded.no_bar(), loaded.no_logging():
        loaded.validate(dl=loaders().valid)


def test_a_cycle_is_refused_and_the_search_for_a_rate_is_not(tmp_path):
    learn = learner(tmp_path)
    with pytest.raises(ValueError, match=r"fit must schedule nothing, got ParamScheduler with lr, mom"):
        learn.fit_one_cycle(1)
    learn = learner(tmp_path)
    before = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    learn.lr_find(num_it=8, show_plot=False)
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    learn.fit(1)
    assert unwrap(learn.opt).metrics()[0]["step"] == 4


def test_another_optimizer_is_refused(tmp_path):
    learn = learner(tmp_path, functools.partial(OptimWrapper, opt=torch.optim.SGD))
    with pytest.raises(TypeError, match=r"must be one of sftorch's .* got torch\.optim\.sgd\.SGD"):
        learn.fit(1)


def test_the_page_tells_the_truth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = run("trainers.md", "fastai", model=torch.nn.Linear(4, 2), dls=loaders(), loss=loss)
    learn = names["learn"]
    expected = unwrap(learn.opt).eval_state_dict(learn.model)
    saved = torch.load(tmp_path / "models" / "final.pth", weights_only=True)["model"]
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
