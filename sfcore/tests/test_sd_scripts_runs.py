"""Real training runs of sd-scripts, stopped and resumed, with the launcher and without.

SD_SCRIPTS names a checkout of github.com/kohya-ss/sd-scripts; without it most tests are skipped. Its loop
runs as it is, around a toy of a model (sd_scripts_train.py).
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sftorch
from sfcore.plan import check

SD = os.environ.get("SD_SCRIPTS", "")
needs_sd = pytest.mark.skipif(not SD, reason="SD_SCRIPTS names no checkout of kohya-ss/sd-scripts")
pytestmark = pytest.mark.timeout(1800)  # on a busy machine, by hand


def trained_with(folder, runs):
    """Returns what each run tells; see sd_scripts_train.py."""
    program = [sys.executable, str(Path(__file__).with_name("sd_scripts_train.py")), str(folder)]
    done = subprocess.run(program, input=json.dumps(runs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# (accumulation, updates of the run, a state every so many), with 96 micro-batches an epoch; in docs/kohya.md.
LENGTHS = ((1, 288, 96), (1, 240, 110), (2, 144, 48), (2, 120, 30), (4, 72, 24), (4, 60, 15), (5, 50, 17))


@needs_sd
def test_a_resumed_run_trains_on_as_many_micro_batches_as_the_plan_says(tmp_path):
    """The real loop, resumed from its own states."""
    runs, cases = [], []
    for accumulation, total, every in LENGTHS:
        common = ["--max_train_steps", str(total), "--gradient_accumulation_steps", str(accumulation)]
        folder = tmp_path / f"{accumulation} {total}"
        runs.append(
            [*common, "--output_dir", str(folder), "--save_state", "--save_every_n_steps", str(every)]
        )
        runs[-1] += ["--output_name", "a"]
        for skip in ((), ("--skip_until_initial_step",)):
            words = [*common, *skip, "--resume", str(folder / f"a-step{every:08}-state")]
            cases.append(["train_network.py", *words])
            runs.append([*words, "--output_dir", str(tmp_path / "out"), "--output_name", "b"])
    told = trained_with(SD, [{"words": words} for words in runs])
    trained = [one["trained"] for one, words in zip(told, runs, strict=True) if "--resume" in words]
    plans = [check(words, samples=96) for words in cases]
    assert [plan.resumed[0] for plan in plans] == trained
    for plan, n in zip(plans, trained, strict=True):
        codes = {problem.code for problem in plan.problems} & {"SF402", "SF403"}
        assert bool(codes) == (n != plan.resumed[1]), plan.config
        assert all(f"trains on {n} micro-batches" in p.why for p in plan.problems if p.code in codes)


def beside(checkout, folder, patch=None):
    """Returns a folder with a toy of a script beside what it needs of a checkout, patched or not."""
    folder.mkdir()
    for name in ("train_network.py", "fine_tune.py", "library", "networks"):
        if patch is None:
            (folder / name).symlink_to(Path(checkout, name).resolve())
        else:
            copy = shutil.copytree if Path(checkout, name).is_dir() else shutil.copy
            copy(Path(checkout, name), folder / name)
    if patch is not None:
        subprocess.run(["git", "apply", str(patch)], cwd=folder, check=True)
    for base, run in (("train_network", "as_script"), ("fine_tune", "as_fine_tuning")):
        text = f"import {base}\nfrom sd_scripts_train import {run}\n\n{run}({base})\n"
        (folder / f"toy_{base}.py").write_text(text)
    return folder


BATCHES = 23  # of an epoch, which no accumulation divides
LAW_OPTIONS = {
    "AdamWScheduleFree": [
        "--learning_rate",
        "0.05",
        "--optimizer_args",
        "warmup_steps=3",
        "weight_decay=0.1",
    ],
    "RAdamScheduleFree": ["--learning_rate", "0.05", "--optimizer_args", "weight_decay=0.1"],
    "SGDScheduleFree": ["--learning_rate", "0.5", "--optimizer_args", "warmup_steps=3"],
}
# Accumulation -> updates of the run, and after how many a state is saved: inside an epoch.
STOPS_AT = {1: (58, 26), 2: (30, 14), 4: (15, 8)}


class Course:
    """The options of one run, its stops and its resumes."""

    def __init__(self, folder, law, accumulation, shuffled, launched, *more):
        self.folder, self.accumulation = folder / f"{law} {accumulation} {shuffled} {launched}", accumulation
        self.total, self.at = STOPS_AT[accumulation]
        self.words = ["--optimizer_type", f"sftorch.{law}", *LAW_OPTIONS[law], *more]
        self.words += ["--gradient_accumulation_steps", str(accumulation)]
        self.spec = {"samples": BATCHES, "shuffled": shuffled, "launched": launched}

    def run(self, name, *more, total=None, kill=None):
        words = [*self.words, "--max_train_steps", str(total or self.total), *more]
        words += ["--output_dir", str(self.folder / name), "--output_name", "a"]
        return self.spec | {"words": words} | ({"kill": kill} if kill else {})

    def whole(self):
        return self.run("whole")

    def killed(self):
        """Inside of an update, and three micro-batches after a state."""
        at = self.at // -(-BATCHES // self.accumulation) * BATCHES  # those of whole epochs
        at += self.at % -(-BATCHES // self.accumulation) * self.accumulation
        return self.run("killed", "--save_state", "--save_every_n_steps", str(self.at), kill=at + 3)

    def stopped(self):
        return self.run("stopped", "--save_state", total=self.at)

    def resumed(self, stop, *more):
        state = {"killed": f"a-step{self.at:08}-state", "stopped": "a-state"}[stop]
        return self.run(f"after {stop}", "--resume", str(self.folder / stop / state), *more)


def assert_the_same(whole, resumed):
    assert resumed["losses"] == whole["losses"][-resumed["trained"] :]
    assert {**resumed, "trained": 0, "losses": 0} == {**whole, "trained": 0, "losses": 0}


@needs_sd
@pytest.mark.parametrize("accumulation", STOPS_AT)
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "in order"])
def test_with_the_launcher_a_resumed_run_is_the_run_without_a_stop(tmp_path, shuffled, accumulation):
    """Killed or stopped, in the same bits, and the file is x; their train_network.py, their networks.lora."""
    folder = beside(SD, tmp_path / "scripts")
    courses = [Course(tmp_path, law, accumulation, shuffled, True) for law in LAW_OPTIONS]
    runs = [
        (one.whole(), one.killed(), one.stopped(), one.resumed("killed"), one.resumed("stopped"))
        for one in courses
    ]
    told = trained_with(folder, [run for each in runs for run in each])
    for course in courses:
        whole, killed, stopped, *resumed = [told.pop(0) for _ in range(5)]
        assert killed is None
        assert stopped["trained"] < whole["trained"]
        for one in resumed:
            assert one["trained"] == whole["trained"] - stopped["trained"], course.words
            assert_the_same(whole, one)
        assert whole["weights"] == whole["x"] != whole["y"]


@needs_sd
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "in order"])
def test_without_the_launcher_the_plan_says_what_a_resumed_run_trains_on(tmp_path, shuffled):
    runs, cases = [], []
    for law, accumulation in itertools.product(LAW_OPTIONS, STOPS_AT):
        course = Course(tmp_path, law, accumulation, shuffled, False)
        runs += [course.killed(), course.resumed("killed")]
        runs += [course.resumed("killed", "--skip_until_initial_step")]
        cases += runs[-2:]
    told = trained_with(SD, runs)
    trained = [one["trained"] for one in told if one]
    plans = [check(["train_network.py", *run["words"]], samples=BATCHES) for run in cases]
    assert len(trained) == 2 * len(LAW_OPTIONS) * len(STOPS_AT)
    assert [plan.resumed[0] for plan in plans] == trained
    for plan, n in zip(plans, trained, strict=True):
        codes = {problem.code for problem in plan.problems} & {"SF402", "SF403"}
        assert bool(codes) == (n != plan.resumed[1]), plan.config


@needs_sd
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "in order"])
def test_without_the_launcher_runs_of_whole_epochs_go_on_from_the_end_of_one(tmp_path, shuffled):
    """The commands of docs/kohya.md: killed in each of three epochs, and resumed by --initial_epoch."""
    runs = []
    for accumulation in STOPS_AT:
        more = ("--max_data_loader_n_workers", "2", "--save_state", "--save_every_n_epochs", "1")
        course = Course(tmp_path, "AdamWScheduleFree", accumulation, shuffled, False, *more)
        course.total = 3 * -(-BATCHES // accumulation)
        first = ["--resume", str(course.folder / "killed" / "a-000001-state"), "--initial_epoch", "2"]
        second = ["--resume", str(course.folder / "again" / "a-000002-state"), "--initial_epoch", "3"]
        runs += [course.whole(), course.run("killed", kill=BATCHES + 9)]
        runs += [course.run("again", *first, kill=BATCHES + 9), course.run("last", *second)]
    told = trained_with(SD, runs)
    for whole, killed, again, last in zip(told[::4], told[1::4], told[2::4], told[3::4], strict=True):
        assert (killed, again, last["trained"]) == (None, None, BATCHES)
        assert_the_same(whole, last)


@needs_sd
def test_without_workers_the_first_batch_after_a_resume_is_another(tmp_path):
    """sd-scripts tells its data the epoch after the first batch of it is read."""
    course = Course(tmp_path, "AdamWScheduleFree", 4, True, False)
    course.total = 12
    state = ["--resume", str(course.folder / "whole" / "a-000001-state"), "--initial_epoch", "2"]
    runs = [course.run("whole", "--save_state", "--save_every_n_epochs", "1"), course.run("again", *state)]
    whole, again = trained_with(SD, runs)
    assert again["trained"] == BATCHES
    same = [a == b for a, b in zip(whole["losses"][-BATCHES:], again["losses"], strict=True)]
    assert same[:5] == [False, True, True, True, False]  # the update that it is part of


@needs_sd
def test_the_launcher_goes_on_with_workers_without_a_seed_and_from_the_end_of_an_epoch(tmp_path):
    folder, told = beside(SD, tmp_path / "scripts"), []
    workers = Course(tmp_path / "a", "AdamWScheduleFree", 4, True, True, "--max_data_loader_n_workers", "2")
    unseeded = Course(tmp_path / "b", "AdamWScheduleFree", 2, True, True)
    unseeded.spec["unseeded"] = True
    ends = Course(tmp_path / "c", "SGDScheduleFree", 4, True, True)
    ends.at = 6
    runs = [each for one in (workers, ends) for each in (one.whole(), one.killed(), one.resumed("killed"))]
    runs += [unseeded.run("killed", "--save_state", "--save_every_n_steps", "14")]
    runs += [unseeded.resumed("killed"), unseeded.resumed("killed")]
    by_epochs = ["--save_state", "--save_every_n_epochs", "1"]
    runs += [ends.run("by epochs", *by_epochs, kill=BATCHES + 5)]
    runs += [ends.run("last", "--resume", str(ends.folder / "by epochs" / "a-000001-state"))]
    told = trained_with(folder, runs)
    assert_the_same(told[0], told[2])
    assert_the_same(told[3], told[5])
    assert_the_same(told[6], told[7])
    assert_the_same(told[6], told[8])
    assert_the_same(told[3], told[10])


@needs_sd
@pytest.mark.parametrize("accumulation", [1, 4])
def test_with_the_launcher_fine_tune_saves_x_and_trains_as_before(tmp_path, accumulation):
    """The loop of fine_tune.py, which never calls optimizer.eval()."""
    folder, runs = beside(SD, tmp_path / "scripts"), []
    for law, launched in itertools.product(LAW_OPTIONS, (True, False)):
        words = ["--optimizer_type", f"sftorch.{law}", *LAW_OPTIONS[law], "--output_name", "a"]
        words += ["--gradient_accumulation_steps", str(accumulation), "--max_train_steps", "9"]
        words += ["--save_every_n_steps", "4", "--output_dir", str(tmp_path / f"{law} {launched}")]
        runs.append({"script": "fine_tune", "launched": launched, "words": words, "samples": BATCHES})
    told = trained_with(folder, runs)
    for launched, plain in zip(told[::2], told[1::2], strict=True):
        assert launched["losses"] == plain["losses"]
        assert len(launched["losses"]) > 8
        assert [*launched["files"]] == ["a-step00000004.ckpt", "a-step00000008.ckpt", "a.ckpt"]
        assert launched["files"]["a.ckpt"]["x"] != launched["files"]["a.ckpt"]["y"]
        for name, file in launched["files"].items():
            assert file["weights"] == file["x"]
            assert plain["files"][name] == file | {"weights": file["y"]}  # it ships y


@needs_sd
def test_the_patch_for_upstream_mends_a_fault_that_is_there_without_it(tmp_path):
    """`git apply` in a copy of the checkout; then no launcher is needed."""
    patch = Path(sftorch.__file__).parent / "trainers" / "sd_scripts" / "resume.patch"
    plain, mended = beside(SD, tmp_path / "plain"), beside(SD, tmp_path / "mended", patch)
    course = Course(tmp_path, "AdamWScheduleFree", 4, True, False)
    runs = [course.whole(), course.killed(), course.resumed("killed", "--skip_until_initial_step")]
    whole, _, resumed = trained_with(plain, runs)
    assert resumed["trained"] == 0
    assert resumed["losses"] != whole["losses"][-27:]
    whole, _, resumed = trained_with(mended, runs)
    assert resumed["trained"] == 27
    assert_the_same(whole, resumed)
    launched = trained_with(plain, [run | {"launched": True} for run in runs])
    assert_the_same(whole, launched[0])
    assert_the_same(whole, launched[2])


RESUMED = "train_network.py --max_train_steps 30 --gradient_accumulation_steps 2 --resume there"
LAUNCHED = [
    f"schedulefree launch sd-scripts -- {RESUMED}",
    f"python -m sfcore launch sd-scripts {RESUMED}",
    f"accelerate launch --num_processes 1 -m sftorch.trainers.sd_scripts sd-scripts/{RESUMED}",
]


@pytest.mark.parametrize("command", LAUNCHED)
def test_the_plan_knows_the_launcher_which_resumes_where_the_state_stands(command):
    """14 of 30 updates, of 12 an epoch: 23 + 4 of 23 + 23 + 12 micro-batches are done."""
    words = command.split()
    for plan in (
        check(words, samples=BATCHES, initial_step=14),
        check([*words, "--initial_step", "14", "--skip_until_initial_step"], samples=BATCHES),
        check([*words, "--initial_step", "14"], samples=BATCHES),
    ):
        assert plan.resumed == (31, 31)
        assert not {problem.code for problem in plan.problems} & {"SF402", "SF403"}
