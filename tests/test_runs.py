"""A stage's folder: what is put aside, comes back, goes on and is copied in; what a Run leaves; own
code; the teacher.
"""

import importlib
import json
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import draw_food, ids, same, save_picture, without_seconds
from torch import nn

import helpers as h

SMALL = {"image_size": 40, "n_epochs": 2, "batch_size": 8, "lr": 1e-3, "amp": "off"}


def stage(root, name="simple", teacher=None, own=None, **changes):
    """The Run of a small stage of two epochs in a folder with Food-11/; results go to its out/."""
    data = h.read_folder(root / "Food-11")
    cfg = h.get_config(name, **(SMALL | changes))
    return h.run_stage(cfg, data, teacher, root / "out", views=1, **(own or {}))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished Simple stage, made once: Food-11/, out/, and half/, its run as it
    was after one of its two epochs.
    """
    root = tmp_path_factory.mktemp("finished")
    draw_food(root / "Food-11")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HW13_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr(h, "time_is_up", lambda cfg, history: len(history) == 1)
        stage(root)
        shutil.copytree(root / "out/simple", root / "half")
        patch.undo()
        stage(root)
    return root


@pytest.fixture
def root(finished, tmp_path, monkeypatch):
    """A copy of `finished` for a test of its own, and what is called Kaggle's root there."""
    root = shutil.copytree(finished, tmp_path / "root")
    monkeypatch.setenv("HW13_KAGGLE", str(root))
    return root


@pytest.fixture
def out(root):
    return root / "out"


@pytest.fixture
def trains_no_more(monkeypatch):
    """Call it: from then on an epoch that is trained is an error."""
    return lambda: monkeypatch.setattr(h, "train_one_epoch", lambda *_: pytest.fail("trained"))


def contents(folder):
    """{name: bytes} of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder, pattern="*"):
    return sorted(path.name for path in folder.glob(pattern))


# --- put aside and brought back -------------------------------------------------------------------


def test_runs_that_are_put_aside_are_numbered_and_stay_as_they_are(root, out):
    first = contents(out / "simple")
    second = contents(stage(root, n_epochs=1, lr=0.5).folder)
    stage(root, n_epochs=1, lr=0.25)
    assert contents(out / "simple.1") == first
    assert contents(out / "simple.2") == second


def test_quick_then_full_then_quick_trains_each_once(root, out, trains_no_more):
    full = contents(out / "simple")
    quick = contents(stage(root, n_epochs=1).folder)
    trains_no_more()
    for n_epochs, wanted in ((2, full), (1, quick), (2, full)):
        stage(root, n_epochs=n_epochs)
        assert contents(out / "simple") == wanted
        assert (out / "simple.csv").read_bytes() == wanted["predictions.csv"]


@pytest.mark.parametrize("split", ["training", "validation"])
def test_another_picture_under_the_same_name_is_another_run(root, out, split):
    save_picture(root / f"Food-11/{split}/7_0.jpg", 4321)
    stage(root)
    assert names(out, "simple.[0-9]") == ["simple.1"]


def test_the_same_pictures_elsewhere_are_the_same_run_and_new_ones_are_predicted(
    root, trains_no_more
):
    trains_no_more()
    save_picture(root / "Food-11/evaluation/0005.jpg", 33)
    run = stage(root.rename(root.with_name("moved")))
    assert h.validate_submission(run.folder / h.PREDICTIONS, ids(6)) == 6


# --- an attached Kaggle run -----------------------------------------------------------------------


def attach(root, run):
    """Move a run to an input that is read-only for everybody but root."""
    folder = root / "input/session1/simple"
    shutil.copytree(root / run, folder)
    shutil.rmtree(root / run)
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555)
    return folder


def test_an_attached_run_is_copied_in_with_modes_that_can_be_written(root, out, trains_no_more):
    trains_no_more()
    attach(root, "out/simple")
    run = stage(root)
    assert all(path.stat().st_mode & 0o200 for path in (run.folder, *run.folder.iterdir()))
    assert names(out) == ["simple", "simple.csv", "simple.lock"]


@pytest.mark.parametrize("own_is_longer", [True, False])
def test_of_an_own_and_an_attached_run_the_longer_wins(root, out, own_is_longer, trains_no_more):
    trains_no_more()
    attach(root, "half" if own_is_longer else "out/simple")
    if not own_is_longer:
        (root / "half").rename(out / "simple")
    assert len(stage(root).history) == 2
    stage(root)  # and now they are equal, or the own one is longer
    assert names(out, "simple.[0-9]") == ([] if own_is_longer else ["simple.1"])


# --- what a run leaves ----------------------------------------------------------------------------

FILES = ["config.json", "last.ckpt", "log.csv", "predictions.csv", "result.json"]


@pytest.mark.parametrize("name", [*FILES, "student_best.ckpt", "simple.csv"])
def test_a_crash_at_any_write_leaves_a_run_that_goes_on(root, out, finished, monkeypatch, name):
    shutil.rmtree(out)
    shutil.copytree(root / "half", out / "simple")
    replace = os.replace

    def crash(source, target):
        if os.path.basename(target) == name:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", crash)
        stage(root)
    run = stage(root)
    assert same(without_seconds(run.folder), without_seconds(finished / "out/simple"))
    assert (out / "simple.csv").read_bytes() == (finished / "out/simple.csv").read_bytes()


def test_result_json_and_load_student_give_what_the_run_says(root):
    run = stage(root)
    result = json.loads((run.folder / "result.json").read_text())
    assert result["valid_acc"] == run.valid_acc == max(run.history["valid_acc"])
    run.student().fc.bias.data.zero_()  # of a copy
    net, cfg = h.load_student(run.folder / "student_best.ckpt")
    assert cfg == run.cfg
    assert same(net.state_dict(), run.student().state_dict())


# --- own code -------------------------------------------------------------------------------------


def test_a_changed_loss_under_one_name_trains_anew_and_a_renamed_one_is_loaded(
    root, trains_no_more
):
    teacher = h.freeze(h.build_student(h.STRONG))

    def train(own):
        run = stage(root, "medium", teacher, {"loss_fn_kd": own}, n_epochs=1)
        return run.history["train_loss"][0]

    def labels_only(student_logits, labels, *rest):
        return F.cross_entropy(student_logits, labels)

    first = train(labels_only)
    assert train(lambda *arguments: 2 * labels_only(*arguments)) != first
    trains_no_more()
    assert train(lambda a, b, *others: F.cross_entropy(a, b)) == first


class Net(nn.Sequential):
    """A learner's own student."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), h.GlobalAvgPool(), nn.Linear(8, 11))


def test_an_own_student_trains_and_the_one_handed_in_stays_as_it_was(root):
    net = Net()
    before = h.copy_of_weights(net)
    run = stage(root, own={"student": net})
    assert same(net.state_dict(), before)
    assert not same(run.student().state_dict(), before)
    assert h.own_student(h.SIMPLE, lambda: net) is not net


def test_a_compiled_student_trains_and_saves_plain_keys(root):
    run = stage(root, own={"student": torch.compile(Net(), backend="eager")}, n_epochs=1)
    saved = h.load_file(run.folder / "student_best.ckpt")
    assert saved.keys() == Net().state_dict().keys()


def test_reloading_the_module_does_no_harm(root, out, tmp_path, monkeypatch):
    """Objects made before it work. Of a copy of the module, for tests hold this one's classes."""
    shutil.copy(h.__file__, tmp_path / "a_copy.py")
    monkeypatch.syspath_prepend(tmp_path)
    copy = importlib.import_module("a_copy")
    data = copy.read_folder(root / "Food-11")
    cfg = copy.get_config("simple", **SMALL)
    importlib.reload(copy)
    run = copy.run_stage(cfg, data, out=out, views=1)
    assert len(run.history) == 2


# --- the teacher ----------------------------------------------------------------------------------


def test_a_trained_teacher_is_found_once_it_is_finished(root, out, monkeypatch):
    monkeypatch.setitem(h.NETS, "resnet18", h.NETS["sample"])  # which is faster
    data = h.read_folder(root / "Food-11")
    monkeypatch.setattr(h, "TEACHER_CONFIG", h.replace(h.TEACHER_CONFIG, **SMALL))
    with monkeypatch.context() as patch, pytest.raises(h.UserError, match="not finished"):
        patch.setattr(h, "time_is_up", lambda cfg, history: True)
        h.train_teacher(data, out)
    assert h.find_teacher(data, out=out) is None
    saved = h.load_file(h.train_teacher(data, out))
    assert same(saved, h.copy_of_weights(h.find_teacher(data, out=out)))
    assert same(saved, h.load_file(out / "teacher/student_best.ckpt"))
