"""What a result belongs to: the images that it was made from."""

import json
import os
import shutil

import pytest
import torch
from conftest import save_picture
from shared import same, settings, without_seconds

import helpers as h

SMALL = {"image_size": 64, "n_epochs": 2, "batch_size": 8, "lr": 1e-3, "amp": "off"}


def run_simple(food, out, *stages, **changes):
    """The exit code of the command line on a data folder."""
    names = ",".join(stages or ["simple"])
    small_run = settings(**(SMALL | changes))
    arguments = ["run", "--data", str(food), "--out", str(out), "--stages", names, *small_run]
    return h.main(arguments)


def draw_others(folder, seed=7000):
    """Other pictures under the names that a folder has."""
    for n, path in enumerate(sorted(folder.rglob("*.jpg"))):
        save_picture(path, seed + n)


# --- other images under the same names ------------------------------------------------------------


@pytest.mark.parametrize("split", ["training", "validation"])
@pytest.mark.parametrize("n_epochs", [2, 3])  # the run is finished, or goes on
def test_other_images_under_the_same_names_are_another_run(food, tmp_path, capsys, split, n_epochs):
    assert run_simple(food, tmp_path / "out") == 0
    before = without_seconds(tmp_path / "out/simple")
    draw_others(food / split)
    assert run_simple(food, tmp_path / "out", n_epochs=n_epochs) == 2
    error = capsys.readouterr().err
    assert f"other settings: the {split} images (they have changed)" in error
    assert same(without_seconds(tmp_path / "out/simple"), before)
    assert h.run(h.find_data(food), ["simple"], out=tmp_path / "out", fresh=True, **SMALL)


def test_one_other_picture_is_enough(food, tmp_path, capsys):
    assert run_simple(food, tmp_path / "out") == 0
    save_picture(food / "training/7_1.jpg", 4321)
    assert run_simple(food, tmp_path / "out") == 2
    assert "the training images (they have changed)" in capsys.readouterr().err


def test_the_same_images_in_another_place_with_other_times_go_on(
    food, tmp_path, monkeypatch, capsys
):
    """Another machine: another mount, other times, an empty cache."""
    assert run_simple(food, tmp_path / "whole", n_epochs=3) == 0
    assert run_simple(food, tmp_path / "cut") == 0
    there = tmp_path / "elsewhere/Food-11"
    shutil.copytree(food, there, copy_function=shutil.copy)
    for n, path in enumerate(sorted(there.rglob("*.jpg"))):
        os.utime(path, (1e9 + n, 1e9 + n))
    monkeypatch.setenv("HW13_CACHE", str(tmp_path / "empty_cache"))
    capsys.readouterr()
    assert run_simple(there, tmp_path / "cut", n_epochs=3) == 0
    assert "goes on after epoch 2" in capsys.readouterr().out
    assert same(
        without_seconds(tmp_path / "cut/simple"), without_seconds(tmp_path / "whole/simple")
    )
    assert run_simple(there, tmp_path / "cut", n_epochs=3) == 0
    assert "finished before" in capsys.readouterr().out


def test_other_evaluation_images_are_predicted_anew(food, tmp_path, capsys):
    assert run_simple(food, tmp_path / "out") == 0
    save_picture(food / "evaluation/0005.jpg", 33)
    assert run_simple(food, tmp_path / "out") == 0
    assert "finished before" in capsys.readouterr().out
    assert h.validate_submission(tmp_path / "out/simple.csv", 6) == 6


def test_class_folders_whose_files_have_other_names_are_another_run(food, tmp_path, capsys):
    for split in h.SPLITS:
        for path in sorted((food / split).glob("*.jpg")):
            label = 0 if split == "evaluation" else int(path.name.split("_")[0])
            name = h.CLASS_NAMES[label].replace("/", "-")
            path.rename(save_picture(food / split / name / path.name))
    for name in h.CLASS_NAMES:
        (food / "evaluation" / name.replace("/", "-")).mkdir(exist_ok=True)
    assert run_simple(food, tmp_path / "out") == 0
    for n, path in enumerate(sorted((food / "training").rglob("*.jpg"))):
        save_picture(path.with_name(f"other_{path.name}"), n)
        path.unlink()
    assert run_simple(food, tmp_path / "out") == 2
    assert "the training images (they have changed)" in capsys.readouterr().err


def test_no_stage_trains_where_a_later_ones_images_have_changed(
    food, tmp_path, monkeypatch, capsys
):
    assert run_simple(food, tmp_path, exp_name="second") == 0
    draw_others(food / "training")
    data = h.find_data(food)
    stages = []
    for name in ("first", "second"):
        cfg = h.get_config("simple", exp_name=name, **SMALL)
        stages.append(h.prepare_stage(cfg, data, out=tmp_path))
    monkeypatch.setattr(h, "train_one_epoch", lambda *args: pytest.fail("trained"))
    with pytest.raises(h.UserError, match="second holds a run with other settings: the training"):
        h.train_in_turn(stages)


def test_a_loop_by_hand_refuses_other_images_too(food, tmp_path):
    def by_hand():
        data = h.find_data(food)
        cfg = h.get_config("simple", **SMALL)
        stage = h.prepare_stage(cfg, data, out=tmp_path)
        train_loader, valid_loader = h.build_loaders(cfg, data, stage.device)
        return h.fit(stage.loss_fn, train_loader, valid_loader, stage.folder)

    assert len(by_hand()) == 2
    draw_others(food / "validation")
    with pytest.raises(h.UserError, match="the validation images .they have changed."):
        by_hand()


def test_the_best_stage_is_submitted_not_the_first(food, tmp_path):
    data = h.find_data(food)
    runs = h.run(data, ["simple"], out=tmp_path, **SMALL)
    runs += h.run(data, ["simple"], out=tmp_path, **(SMALL | {"exp_name": "other"}))
    classes = torch.arange(5)
    for run, n_right in zip(runs, (1, 9), strict=True):
        run.correct = torch.arange(11) < n_right
        h.write_submission(run.csv, data.ids["evaluation"], (classes + n_right) % 11)
    h.write_best(runs, data, tmp_path)
    assert (tmp_path / "submission.csv").read_text() == (tmp_path / "other.csv").read_text()
    assert (tmp_path / "simple.csv").read_text() != (tmp_path / "other.csv").read_text()


def test_fresh_forgets_all_stages_before_the_first_one_trains(food, tmp_path, monkeypatch):
    """So that the same call without it, after a stop, finds nothing old."""
    data = h.find_data(food)
    for stage in ("simple", "other"):
        h.run(data, ["simple"], out=tmp_path, **(SMALL | {"exp_name": stage}))
    prepared = [
        h.prepare_stage(
            h.get_config("simple", **(SMALL | {"exp_name": stage})), data, out=tmp_path, fresh=True
        )
        for stage in ("simple", "other")
    ]

    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(h, "train_one_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        h.train_in_turn(prepared)
    assert not (tmp_path / "other/last.ckpt").exists()


def test_a_final_fit_of_other_images_is_made_again(food, tmp_path, capsys):
    def final(fresh=False):
        data = h.find_data(food)
        (run,) = h.run(data, ["simple"], out=tmp_path, fresh=fresh, **SMALL)
        capsys.readouterr()
        assert h.final_fit(run, data, out=tmp_path)
        return capsys.readouterr().out

    final()
    assert "finished before" in final()
    draw_others(food / "training")
    assert "simple_final: started again, for" in final(fresh=True)


# --- the cache ------------------------------------------------------------------------------------


def test_the_cache_sees_other_bytes_of_the_same_size_and_time(food):
    path = food / "training/3_0.jpg"
    first = h.load_data(h.find_data(food), "training", "whole", 44)
    images = first.images.clone()
    stat = path.stat()
    other = save_picture(food.parent / "other.jpg", 4444).read_bytes()
    size = 100 + max(stat.st_size, len(other))
    path.write_bytes(path.read_bytes() + bytes(size - stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    padded = h.load_data(h.find_data(food), "training", "whole", 44)
    assert torch.equal(padded.images, images)
    path.write_bytes(other + bytes(size - len(other)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = h.load_data(h.find_data(food), "training", "whole", 44)
    row = again.ids.index("3_0")
    assert not torch.equal(again.images[row], images[row])
    assert len({first.contents, padded.contents, again.contents}) == 3


def test_contents_are_those_of_the_files_whatever_the_form_and_the_cache(food, monkeypatch):
    (food / "training/5_0.jpg").write_bytes(b"no picture")
    data = h.find_data(food)
    whole = h.load_data(data, "training", "whole", 46)
    exact = h.load_data(data, "training", "eval", 52)
    assert whole.contents == exact.contents
    assert h.load_data(data, "training", "whole", 46).contents == whole.contents
    # What cannot be decoded counts too.
    (food / "training/5_0.jpg").write_bytes(b"no picture either")
    assert h.load_data(h.find_data(food), "training", "whole", 46).contents != whole.contents


# --- the best of what is there --------------------------------------------------------------------


def set_accuracy(folder, accuracy):
    """Let a stage's folder say that it reached another accuracy."""
    path = folder / h.RESULT
    path.write_text(json.dumps(json.loads(path.read_text()) | {"valid_acc": accuracy}))


@pytest.fixture
def good_there(food, tmp_path, capsys):
    """A folder in which a stage "good" (accuracy 0.9 by its own word) is there before."""
    out = tmp_path / "out"
    assert run_simple(food, out, exp_name="good", seed=1) == 0
    set_accuracy(out / "good", 0.9)
    capsys.readouterr()
    return out


def test_a_worse_stage_does_not_replace_a_better_ones_submission(good_there, food, capsys):
    assert run_simple(food, good_there, lr=0, exp_name="bad") == 0
    said = capsys.readouterr().out
    good, bad, submitted = (
        (good_there / f"{name}.csv").read_text() for name in ("good", "bad", "submission")
    )
    assert submitted == good != bad
    assert "good, of an earlier call, has the best validation accuracy, 0.9000" in said
    assert "the best of this call is bad, 0.0" in said
    assert "bad has the best" not in said


def test_a_better_stage_replaces_it(good_there, food, capsys):
    set_accuracy(good_there / "good", 0.0)
    assert run_simple(food, good_there, exp_name="better") == 0
    assert "better has the best validation accuracy" in capsys.readouterr().out
    submitted = (good_there / "submission.csv").read_text()
    assert submitted == (good_there / "better.csv").read_text()


def test_a_stage_that_is_started_again_does_not_count_as_it_was(good_there, food, capsys):
    data = h.find_data(food)
    h.run(data, ["simple"], out=good_there, fresh=True, **SMALL, exp_name="good", seed=2)
    assert "good has the best validation accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda food, out: save_picture(food / "evaluation/0003.jpg", 1), "its images were others"),
        (lambda food, out: draw_others(food / "training"), "its images were others"),
        (lambda food, out: (out / "good.csv").write_text("Id"), "good.csv is not what it wrote"),
        (lambda food, out: (out / "good.csv").unlink(), "good.csv is not what it wrote"),
        (lambda food, out: (out / "good" / h.RESULT).write_text("{"), None),
        (lambda food, out: (out / "good" / h.RESULT).write_text("[1]"), None),
    ],
)
def test_what_cannot_be_compared_is_said_and_left_out(good_there, food, harm, message, capsys):
    harm(food, good_there)
    assert run_simple(food, good_there, exp_name="bad") == 0
    said = capsys.readouterr().out
    assert "bad has the best validation accuracy" in said
    if message:
        assert "good is not compared with bad" in said
        assert message in said


def test_no_final_fit_of_a_stage_that_is_not_the_best(good_there, food, capsys):
    data = h.find_data(food)
    h.run(data, ["simple"], out=good_there, final="submit", **SMALL, exp_name="bad")
    said = capsys.readouterr().out
    assert f"no final fit: good ({good_there / 'good.csv'}) is better than bad" in said
    submitted = (good_there / "submission.csv").read_text()
    assert submitted == (good_there / "good.csv").read_text()
