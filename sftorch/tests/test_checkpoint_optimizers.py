"""A checkpoint under another optimizer, its closure form, or another base: what is carried over."""

import pytest
import torch

import sftorch
from sftorch.checkpoint import Checkpoints
from sftorch.tests.bases import BASES
from sftorch.tests.checkpoint_runs import (
    ADAMW,
    Case,
    adamw_saved,
    assert_x,
    build,
    digest,
    fresh,
    train,
    x_of,
)


@pytest.fixture
def saved(tmp_path):
    return adamw_saved(tmp_path)


class TestAnotherOptimizer:
    """What the two share goes on, what only one has starts anew."""

    def test_adamw_to_radam_carries_everything(self, saved):
        checkpoints, x, old_model, old = saved
        model, optimizer = fresh(sftorch.RAdamScheduleFree, lr=0.01, weight_decay=0.1)
        (notice,) = checkpoints.restore(model, optimizer).notices
        assert notice == (
            "optimizer: saved 'adamw', configured 'radam': carried over: x, y, z, the average, "
            "the second moment v"
        )
        assert_x(x_of(model, optimizer), x)
        for p, q in zip(old_model.parameters(), model.parameters(), strict=True):
            for name in ("z", "exp_avg_sq"):
                assert torch.equal(optimizer.state[q][name], old.state[p][name])
            assert optimizer.state[q]["step"] == 12

    def test_adamw_to_sgd_keeps_x_and_an_average_that_counts(self, saved):
        checkpoints, x, *_ = saved
        model, optimizer = fresh(sftorch.SGDScheduleFree, lr=0.5, weight_decay=0.1)
        (notice,) = checkpoints.restore(model, optimizer).notices
        assert "units of the configured lr" in notice
        assert_x(x_of(model, optimizer), x)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert optimizer.metrics()[0]["c"] == pytest.approx(1 / 13)

    def test_sgd_to_adamw_starts_v_anew_with_its_own_bias_correction(self, tmp_path):
        case = Case("sgd", "float32", 1, 12, "train")
        model, optimizer = build(case)
        train(model, optimizer, case, 0, 12)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(model, optimizer)
        model, optimizer = fresh(sftorch.AdamWScheduleFree, lr=0.01)
        notice = checkpoints.restore(model, optimizer).notices[0]
        assert "starts anew: the second moment v" in notice
        before = [optimizer.state[p]["z"].clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        # A first step of AdamW moves z by lr; with v = 0 taken for a mature one it would be 9 times that.
        for p, z in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(optimizer.state[p]["z"], z - 0.01, rtol=0, atol=1e-6)

    def test_the_closure_form_takes_over_x_and_gives_it_back(self, saved):
        checkpoints, x, *_ = saved
        model, optimizer = fresh(sftorch.AdamWScheduleFreeClosure, lr=0.01, weight_decay=0.1)
        assert checkpoints.restore(model, optimizer).notices == []
        assert all(torch.equal(p, value) for p, value in zip(model.parameters(), x, strict=True))
        with checkpoints:
            checkpoints.save(model, optimizer, step=13)
        model, optimizer = fresh(sftorch.AdamWScheduleFree, lr=0.01, weight_decay=0.1)
        checkpoints.restore(model, optimizer)
        assert_x(x_of(model, optimizer), x)

    def test_the_closure_form_resumes_exactly(self, tmp_path):
        def steps(model, optimizer, count):
            for _ in range(count):

                def closure():
                    optimizer.zero_grad()
                    loss = model(torch.randn(5, 4)).square().mean()
                    loss.backward()
                    return loss

                optimizer.step(closure)

        model, _ = build(ADAMW)
        optimizer = sftorch.AdamWScheduleFreeClosure(model.parameters(), lr=0.01)
        steps(model, optimizer, 5)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(model, optimizer)
        steps(model, optimizer, 5)
        expected = digest(model, optimizer)
        model, _ = build(ADAMW, seed=7)
        optimizer = sftorch.AdamWScheduleFreeClosure(model.parameters(), lr=0.01)
        checkpoints.restore(model, optimizer)
        steps(model, optimizer, 5)
        assert digest(model, optimizer) == expected


class TestWrapper:
    """The base's options are its user's, its state is the checkpoint's, wherever the base keeps it."""

    def saved(self, folder, base):
        model, _ = build(ADAMW)
        optimizer = sftorch.ScheduleFreeWrapper(base(model.parameters()))
        train(model, optimizer, ADAMW, 0, 6)
        checkpoints = Checkpoints(folder, background=False)
        checkpoints.save(model, optimizer)
        return checkpoints, optimizer

    def resumed(self, checkpoints, base):
        model, _ = build(ADAMW, seed=7)
        optimizer = sftorch.ScheduleFreeWrapper(base(model.parameters()))
        return optimizer, checkpoints.restore(model, optimizer).notices

    def test_another_option_of_the_base_is_said_and_holds(self, tmp_path):
        checkpoints, _ = self.saved(tmp_path, lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9))
        optimizer, notices = self.resumed(checkpoints, lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.99))
        assert notices == [
            "alpha (group 0): saved 0.9, configured 0.99: the configured value holds from the next step"
        ]
        assert optimizer.param_groups[0]["alpha"] == 0.99

    def test_state_among_the_bases_options_is_restored(self, tmp_path):
        def base(params):
            found = torch.optim.SGD(params, lr=0.01)
            found.defaults["d"] = found.param_groups[0]["d"] = 1.0
            return found

        model, _ = build(ADAMW)
        optimizer = sftorch.ScheduleFreeWrapper(base(model.parameters()))
        train(model, optimizer, ADAMW, 0, 2)
        optimizer.param_groups[0]["d"] = 0.25  # as Prodigy does in a step
        checkpoints = Checkpoints(tmp_path, background=False)
        checkpoints.save(model, optimizer)
        optimizer, notices = self.resumed(checkpoints, base)
        assert notices == []
        assert optimizer.param_groups[0]["d"] == 0.25

    def test_options_of_the_base_may_have_the_names_of_our_books(self, tmp_path):
        checkpoints, old = self.saved(tmp_path, BASES["Prodigal"])
        optimizer, notices = self.resumed(checkpoints, BASES["Prodigal"])
        assert notices == []
        assert (optimizer.param_groups[0]["k"], optimizer.param_groups[0]["d"]) == (
            6,
            old.param_groups[0]["d"],
        )

    def test_a_parameter_that_has_not_started_gets_no_state(self, tmp_path):
        def build_one():
            model, _ = build(ADAMW)
            next(model.parameters()).requires_grad_(False)
            return model, sftorch.ScheduleFreeWrapper(torch.optim.RMSprop(model.parameters(), lr=0.01))

        model, optimizer = build_one()
        train(model, optimizer, ADAMW, 0, 2)
        checkpoints = Checkpoints(tmp_path, background=False)
        checkpoints.save(model, optimizer)
        expected = optimizer.state_dict()["state"].keys()
        model, optimizer = build_one()
        checkpoints.restore(model, optimizer)
        assert optimizer.state_dict()["state"].keys() == expected

    def test_another_base_starts_anew_and_x_goes_on(self, tmp_path):
        checkpoints, old = self.saved(tmp_path, lambda p: torch.optim.RMSprop(p, lr=0.01))
        optimizer, notices = self.resumed(checkpoints, lambda p: torch.optim.Adagrad(p, lr=0.01))
        assert notices == [
            "base (group 0): saved 'RMSprop', configured 'Adagrad': the base's state starts anew"
        ]
        for p, q in zip(old._params(), optimizer._params(), strict=True):
            assert torch.equal(old.state[p]["z"], optimizer.state[q]["z"])
