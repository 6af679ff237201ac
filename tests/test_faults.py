"""The faults that this program answers with a sentence of its own, numbered as in the design.

Everything else is Python's, torch's or pandas' own error.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch
from conftest import ids, save_picture, settings_of
from torch import nn

import helpers as h

SMALL = {"image_size": 40, "n_epochs": 2, "batch_size": 8, "lr": 1e-3, "amp": "off"}
DISK_FULL = OSError(28, "No space left on device")
READ_ONLY = OSError(30, "Read-only file system")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def simple_run(food, out, **changes):
    """The Run of a small Simple stage; names of arguments of run_stage go there."""
    own = {key: changes.pop(key) for key in ("student",) if key in changes}
    cfg = h.get_config("simple", **(SMALL | changes))
    return h.run_stage(cfg, h.find_data(food), out=out, views=1, **own)


def fails_with(error):
    """A function that raises this, whatever it is called with."""

    def fail(*args, **options):
        raise error

    return fail


def state_of(run):
    return h.state_checksum(run.student("cpu"))


# --- data: 1 to 5, 10 -----------------------------------------------------------------------------


def test_01_no_data_is_said_with_what_was_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert h.find_data() is None
    said = capsys.readouterr().out
    for word in ("HW13_DATA", "Food-11", "food11-hw13"):
        assert word in said


def test_01_the_demo_set_says_loudly_what_it_is():
    data = h.make_demo_data()
    assert data.is_demo
    assert "*** DEMO" in data.describe()
    assert "demo set" in data.origin


def test_01_on_kaggle_no_data_is_an_error_that_names_the_button(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "working").mkdir()
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path))
    with pytest.raises(h.UserError, match="Add Input"):
        h.find_data()


def no_split(food):
    (food / "validation").rename(food / "valuation")


def odd_class_folder(food):
    for path in (food / "training").iterdir():
        path.unlink()
    for name in ("Bread", "Pizza"):
        save_picture(food / f"training/{name}/0.jpg")


def label_eleven(food):
    save_picture(food / "training/11_0.jpg", 0)


def no_label(food):
    save_picture(food / "training/bread.jpg", 0)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (no_split, "no.* validation"),
        (odd_class_folder, "Pizza"),
        (label_eleven, "11_0.jpg.*0 to 10"),
        (no_label, "bread.jpg.*<label>"),
    ],
)
def test_02_a_folder_of_another_layout_is_one_sentence(food, harm, words):
    harm(food)
    with pytest.raises(h.UserError, match=words):
        h.read_folder(food)


def test_03_files_that_are_no_pictures_are_counted_and_three_are_named(food, capsys):
    for n in range(4):
        (food / f"training/note{n}.txt").write_text("x")
    assert len(h.read_folder(food).files["training"]) == 22
    said = capsys.readouterr().out
    assert "4 files" in said
    assert "note0.txt, note1.txt, note2.txt, ..." in said


def spoilt(path):
    # PostScript, for which Pillow would start another program.
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")


def broken_link(path):
    path.unlink()
    path.symlink_to("nowhere.jpg")


@pytest.mark.parametrize("harm", [spoilt, broken_link])
def test_04_a_damaged_training_image_is_left_out_and_named(food, harm, capsys):
    harm(food / "training/3_1.jpg")
    split = h.load_data(h.read_folder(food), "training", "eval", 40)
    assert len(split) == 21
    assert "3_1" not in split.ids
    assert split.labels.tolist() == [int(name.split("_")[0]) for name in split.ids]
    assert "3_1.jpg" in capsys.readouterr().out


@pytest.mark.parametrize("harm", [spoilt, broken_link])
def test_04_a_damaged_evaluation_image_keeps_its_row_in_grey(food, harm, capsys):
    harm(food / "evaluation/0001.jpg")
    harm(food / "evaluation/0002.jpg")
    split = h.load_data(h.read_folder(food), "evaluation", "eval", 40)
    assert split.ids == ("0000", "0001", "0002", "0003", "0004")
    assert split.images[1:3].unique().numel() <= 3
    assert "0002.jpg" in capsys.readouterr().out


def test_04_many_damaged_training_images_are_an_error(food, capsys):
    for n in range(4):
        spoilt(food / f"training/{n}_0.jpg")
    with pytest.raises(h.UserError, match="4 of 22 training images"):
        h.load_data(h.read_folder(food), "training", "eval", 40)
    assert "UnidentifiedImageError" in capsys.readouterr().out


def test_04_a_disk_that_fails_stops_and_calls_no_picture_damaged(food, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(h.Image, "open", fails_with(OSError(5, "Input/output error")))
        with pytest.raises((OSError, h.UserError), match="Input/output error"):
            h.load_data(h.read_folder(food), "evaluation", "eval", 40)
    h.load_data(h.read_folder(food), "evaluation", "eval", 40)


def test_05_two_evaluation_images_with_one_id_are_named(food):
    save_picture(food / "evaluation/0001.png", 0)
    with pytest.raises(h.UserError, match="0001"):
        h.read_folder(food)


def test_10_evaluation_images_do_not_train(food):
    cfg = h.get_config("simple", **SMALL)
    split = h.load_data(h.find_data(food), "evaluation", "eval", 40)
    loader = h.BatchLoader(split, cfg, "cpu", train=True)
    loss_fn = h.DistillLoss(cfg, h.build_student(cfg))
    for loaders in ((loader, None), (torch.utils.data.DataLoader(loader.split), loader)):
        with pytest.raises(h.UserError, match="evaluation images"):
            h.fit(loss_fn, *loaders)


# --- nets: 6 to 9, 11, 12 -------------------------------------------------------------------------


def test_06_without_a_teacher_its_stages_are_left_out_and_how_to_get_one_is_said(food, out, capsys):
    runs = h.run(h.find_data(food), ["simple", "medium"], out=out, views=1, **SMALL)
    assert [run.name for run in runs] == ["simple"]
    said = capsys.readouterr().out
    assert "medium" in said
    assert h.TEACHER_FILE in said


@pytest.fixture(scope="module")
def weights():
    """The state dict of an untrained teacher."""
    torch.manual_seed(1)
    return h.build_student(h.TEACHER_CONFIG).state_dict()


def a_page(path, weights):
    path.write_bytes(b"<!DOCTYPE html> please log in")


def cut_short(path, weights):
    torch.save(weights, path)
    os.truncate(path, 100_000)


def another_net(path, weights):
    torch.save({"stem.weight": torch.ones(3)}, path)


def other_shape(path, weights):
    torch.save({"net": weights | {"fc.bias": torch.ones(9)}}, path)


def runs_code(path, weights):
    torch.save(print, path)


def not_finite(path, weights):
    torch.save(weights | {"fc.bias": torch.full((11,), float("nan"))}, path)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (a_page, "begins with.*<!DOCTYPE.*state dict"),
        (cut_short, "begins with.*PK.*state dict"),
        (another_net, "Missing key.*conv1.weight"),
        (other_shape, "size mismatch for fc.bias"),
        (runs_code, "UnpicklingError"),
        (not_finite, "not finite"),
    ],
)
def test_07_a_teacher_that_does_not_load_is_described(weights, tmp_path, harm, words):
    path = tmp_path / "teacher.ckpt"
    harm(path, weights)
    with pytest.raises(h.UserError, match=f"teacher.ckpt.*{words}"):
        h.load_teacher(path)


@pytest.mark.parametrize("error", [MemoryError("small"), OSError(5, "Input/output error")])
def test_07_a_good_file_is_not_called_damaged(weights, tmp_path, monkeypatch, error):
    torch.save(weights, tmp_path / "teacher.ckpt")
    monkeypatch.setattr(h.torch, "load", fails_with(error))
    with pytest.raises(type(error), match=str(error.args[-1])):
        h.load_teacher(tmp_path / "teacher.ckpt")


def test_08_a_teacher_near_chance_is_said_loudly(food, capsys):
    split = h.load_data(h.find_data(food), "validation", "eval", 40)
    teacher = h.freeze(h.build_student(h.TEACHER_CONFIG))
    accuracy = h.introduce_teacher(teacher, split)
    said = capsys.readouterr().out
    assert f"{accuracy:.4f}" in said
    assert "NO BETTER THAN CHANCE" in said


class Net(nn.Module):
    """A net of `width` parameters per colour and so many answers, with its last layer in a list."""

    def __init__(self, width=4, answers=11, hidden=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 1), h.GlobalAvgPool())
        head = nn.Linear(width, answers)
        self.heads = [head] if hidden else nn.ModuleList([head])

    def forward(self, images):
        return self.heads[0](self.body(images))


def frozen():
    return Net().requires_grad_(False)


def without_gradient(student_logits, labels, *rest):
    return torch.tensor(1.0)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"student": lambda: Net(5000)}, "75,011 parameters.*60,000"),
        ({"student": lambda: Net(answers=10)}, "11"),
        ({"student": frozen}, "gradient|frozen"),
        ({"student": lambda: Net(hidden=True)}, "list"),
        ({"student": Net(hidden=True)}, "list"),
        ({"loss_fn_kd": without_gradient}, "gradient"),
    ],
)
def test_09_what_cannot_train_is_refused_before_anything_is_decoded(
    food, out, monkeypatch, own, words
):
    monkeypatch.setattr(h, "load_data", fails_with(AssertionError("decoded")))
    cfg = h.get_config("medium", **SMALL)
    teacher = h.freeze(h.build_student(h.TEACHER_CONFIG))
    with pytest.raises(h.UserError, match=words):
        h.run_stage(cfg, h.find_data(food), teacher, out=out, **own)


def test_11_a_loss_that_is_not_finite_says_where_and_what_to_change(food, out, monkeypatch):
    original = h.BatchLoader.views_of

    def poisoned(loader, *arguments):
        factor = float("nan") if loader.train and loader.epoch == 1 else 1.0
        return original(loader, *arguments) * factor

    monkeypatch.setattr(h.BatchLoader, "views_of", poisoned)
    with pytest.raises(h.UserError, match="loss is not finite: lower lr.*in epoch 2.*saved"):
        simple_run(food, out)
    assert not list(out.glob("*.csv"))


def test_11_answers_that_are_not_finite_give_no_csv(food):
    cfg = h.get_config("simple", **SMALL)
    net = h.build_student(cfg)
    with torch.no_grad():
        net.fc.bias[3] = float("inf")
    with pytest.raises(h.UserError, match="answers to evaluation images are not finite.*no CSV"):
        h.predict(net, h.find_data(food), cfg, torch.device("cpu"), views=6)


def test_12_no_memory_is_torchs_error_with_a_note(food, out, monkeypatch, capsys):
    monkeypatch.setattr(h, "optimizer_step", fails_with(torch.OutOfMemoryError("CUDA out of")))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        simple_run(food, out)
    assert "batch_size" in " ".join(caught.value.__notes__)
    assert "batch_size" in capsys.readouterr().out


def test_12_a_card_without_kernels_names_what_to_choose(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fails_with(RuntimeError("no kernel image")))
    with pytest.raises(RuntimeError, match="no kernel image"):
        h.pick_device()
    assert "T4 x2" in capsys.readouterr().out


# --- runs: 13 to 17 -------------------------------------------------------------------------------


KILLED = """
import os, sys
sys.path.insert(0, {folder!r})
import helpers as h
original = os.replace
names = []
def replace(source, target):
    names.append(os.path.basename(target))
    if names.count("last.ckpt") == 2:
        os.kill(os.getpid(), 9)
    original(source, target)
os.replace = replace
h.main({arguments!r})
"""


def test_13_killed_while_it_saves_a_run_goes_on_bit_for_bit(food, tmp_path):
    command = ["run", "--data", str(food), "--stages", "simple", "--views", "1", "--out"]
    command[1:1] = settings_of(**SMALL)
    code = KILLED.format(
        folder=str(Path(h.__file__).parent), arguments=[*command, str(tmp_path / "cut")]
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut/simple.csv").exists()
    for folder in ("cut", "whole"):
        assert h.main([*command, str(tmp_path / folder)]) == 0
    for name in ("simple.csv", "submission.csv", "simple/student_best.ckpt"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "cut" / name).read_bytes() == whole, name
    assert not list(tmp_path.glob("cut/**/*.part"))


def test_13_the_button_ends_the_queue_and_the_same_call_goes_on(food, tmp_path, monkeypatch):
    original = h.BatchLoader.views_of

    def pressed(loader, *arguments):
        if loader.train and loader.epoch == 1:
            raise KeyboardInterrupt
        return original(loader, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(h.BatchLoader, "views_of", pressed)
        h.run(h.find_data(food), ["simple"], out=tmp_path / "cut", views=1, **SMALL)
    wanted = state_of(simple_run(food, tmp_path / "whole"))
    assert state_of(simple_run(food, tmp_path / "cut")) == wanted


def test_14_another_run_is_put_aside_and_found_again(food, out, capsys):
    first = state_of(simple_run(food, out))
    csv = (out / "simple/predictions.csv").read_bytes()
    capsys.readouterr()
    simple_run(food, out, lr=0.5)
    assert "lr 0.001" in capsys.readouterr().out
    assert (out / "simple.1/predictions.csv").read_bytes() == csv
    assert state_of(simple_run(food, out)) == first
    assert (out / "simple.csv").read_bytes() == csv
    assert not (out / "simple.1").exists()


def test_14_a_folder_whose_content_does_not_load_is_put_aside(food, out, capsys):
    first = state_of(simple_run(food, out))
    (out / "simple/last.ckpt").write_bytes(b"half")
    assert state_of(simple_run(food, out)) == first
    assert "simple.1" in capsys.readouterr().out
    assert (out / "simple.1/last.ckpt").read_bytes() == b"half"
    h.save_checkpoint({"other": 1}, out / "simple/last.ckpt")
    assert state_of(simple_run(food, out)) == first


def test_14_an_attached_run_that_differs_is_said(food, tmp_path, monkeypatch, capsys):
    simple_run(food, tmp_path / "input/night", lr=0.5)
    (tmp_path / "working").mkdir()
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path))
    capsys.readouterr()
    assert len(simple_run(food, tmp_path / "working").history) == 2
    said = capsys.readouterr().out
    assert "night" in said
    assert "lr 0.5" in said


def test_15_the_second_of_two_runs_is_told(food, out):
    out.mkdir()
    with (
        filelock.FileLock(out / "simple.lock"),
        pytest.raises(h.UserError, match="another run is working in .*simple"),
    ):
        simple_run(food, out)
    assert len(simple_run(food, out).history) == 2


def test_15_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(h.filelock.FileLock, "acquire", fails_with(OSError(95, "no locks")))
    with h.locked(tmp_path / "run"):
        pass
    assert "cannot be locked" in capsys.readouterr().out


def test_16_a_stage_without_an_epoch_writes_no_csv(food, out, monkeypatch, capsys):
    monkeypatch.setattr(h, "SESSION_START", time.time() - 3600)
    data = h.find_data(food)
    simple_run(food, out, lr=0.5)  # another run, whose CSV goes aside with it
    h.run(data, ["simple"], out=out, views=1, **SMALL, time_limit_h=0.5)
    assert "time" in capsys.readouterr().out
    assert not list(out.glob("*.csv"))


def test_16_a_run_ends_in_time_and_the_next_session_goes_on(food, tmp_path, monkeypatch, capsys):
    wanted = state_of(simple_run(food, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(h, "time_is_up", lambda cfg, history: len(history) == 1)
        run = simple_run(food, tmp_path / "cut", time_limit_h=1.0)
    assert len(run.history) == 1
    assert not run.finished
    assert "ends after epoch 1, for the session" in capsys.readouterr().out
    assert state_of(simple_run(food, tmp_path / "cut")) == wanted


def test_16_a_run_that_two_gpus_began_goes_on_with_one_and_says_so(food, out, capsys):
    simple_run(food, out)
    path = out / "simple/last.ckpt"
    saved = h.load_file(path)
    h.save_checkpoint(saved | {"processes": 2, "history": saved["history"][:1]}, path)
    assert len(simple_run(food, out).history) == 2
    assert "no longer the same bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize("error", [DISK_FULL, READ_ONLY])
def test_17_a_full_or_read_only_disk_is_one_sentence_and_files_stay_whole(
    tmp_path, monkeypatch, error
):
    h.save_checkpoint({"epoch": 1}, tmp_path / "last.ckpt")
    monkeypatch.setattr(h.os, "fsync", fails_with(error))
    with pytest.raises(h.UserError, match=f"last.ckpt cannot be written .{error.strerror}"):
        h.save_checkpoint({"epoch": 2}, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert h.load_file(tmp_path / "last.ckpt") == {"epoch": 1}


# --- the submission and the notebook: 18 to 20 ----------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,category\n0000,1\n0001,2\n", "row 1.*Id,Category"),
        ("Id,Category\n0000,1\n0001,11\n", "row 3.*0001,11.*0 to 10"),
        ("Id,Category\n0000,1\n0001,\n", "row 3"),
        ("Id,Category\n0000,1\n1,2\n", "row 3.*1,2"),
        ("Id,Category\n0000,1,5\n0001,2,5\n", "row"),
        ("Id,Category\n0000,1.0\n0001,1\n", "row 2"),
        ("Id,Category\n0000,1 \n0001,1\n", "row 2"),
        ("Id,Category\n0000,1\n", "missing.*0001"),
        ("Id,Category\n0000,1\n0001,2\n0001,2\n", "row 4.*0001,2.*before"),
    ],
)
def test_18_a_csv_that_kaggle_refuses_names_the_row(tmp_path, text, words):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(h.UserError, match=f"s.csv.*{words}"):
        h.validate_submission(tmp_path / "s.csv", ["0000", "0001"])


def test_19_a_net_that_answers_one_class_only_is_said(food, out, capsys):
    net = Net()
    with torch.no_grad():
        net.heads[0].bias[3] = 100.0
    run = simple_run(food, out, student=net)
    assert h.validate_submission(run.folder / h.PREDICTIONS, ids(5)) == 5
    said = capsys.readouterr().out
    assert str(run.folder / h.PREDICTIONS) in said
    assert "WARNING: all in one class" in said


def test_20_a_picture_that_fails_says_why_and_the_run_goes_on(monkeypatch, capsys):
    @h.illustration()
    def broken():
        raise ValueError("a table without rows")

    monkeypatch.setenv("HW13_STRICT", "0")
    assert broken() is None
    said = capsys.readouterr().out
    assert "the run goes on" in said
    assert "ValueError: a table without rows" in said
    monkeypatch.setenv("HW13_STRICT", "1")
    with pytest.raises(ValueError, match="without rows"):
        broken()
