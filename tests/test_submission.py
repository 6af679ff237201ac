"""Six views, the CSV and its check, and which stage's CSV is submitted."""

import pandas as pd
import pytest
import torch
from conftest import ids
from torch import nn

import helpers as h


def test_six_views_are_the_mean_over_scales_and_mirror_images_by_hand(food):
    data = h.read_folder(food)
    cfg = h.get_config("simple", image_size=64, batch_size=2)
    # Untrained nets give all pictures one class; this one tells them apart.
    torch.manual_seed(0)
    student = h.freeze(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 11)))
    student[2].weight *= 9
    exact, whole = (h.load_data(data, "evaluation", form, 64) for form in ("eval", "whole"))
    views = [exact.images]
    for scale in (1.0, 0.75):
        views.append(h.warp(whole.images, h.centre_crops(whole.aspects, scale), 64))
    views += [images.flip(3) for images in views]
    wanted = sum(student(h.normalize(images)).softmax(1) for images in views) / 6
    loaders = [h.BatchLoader(split, cfg, "cpu") for split in (exact, whole)]
    assert torch.allclose(h.six_views(student, *loaders), wanted, atol=1e-5)
    assert torch.equal(h.predict(student, data, cfg, "cpu"), wanted.argmax(1))
    classes = h.predict(student, data, cfg, "cpu", views=1)
    assert torch.equal(classes, student(h.normalize(exact.images)).argmax(1))
    assert len(classes.unique()) > 2


# --- the CSV --------------------------------------------------------------------------------------


def test_a_written_csv_is_as_the_homework_wants_it(tmp_path):
    path = tmp_path / "new/a.csv"
    names = ["0000", "0001", "caf\u00e9"]
    h.write_submission(path, names, torch.tensor([3, 10, 0]))
    assert path.read_bytes() == "Id,Category\n0000,3\n0001,10\ncaf\u00e9,0\n".encode()
    assert h.validate_submission(path, names) == 3


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffId,Category\n0000,1\n0001,10\n",  # Excel
        "Id,Category\r\n0000,1\r\n0001,10\r\n",
        '"Id","Category"\n"0000","1"\n"0001","10"\n',
        "Id,Category\n0001,1\n0000,1\n",  # another order
        "Id,Category\n0000,1\n0001,10\n\n",
        "Id,Category\n0000,1\n0001,10",
    ],
)
def test_what_kaggle_takes_is_valid(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode())
    assert h.validate_submission(path, ids(2)) == 2


# --- the best of them -----------------------------------------------------------------------------


@pytest.fixture
def run_of(tmp_path):
    """Make a Run by hand: so many of ten validation images are right, and its CSV names it."""

    def make(name, n_right, images="these"):
        correct = None if n_right is None else torch.arange(10) < n_right
        history = pd.DataFrame([{"epoch": 1, "valid_acc": 0.5}])
        run = h.Run(h.replace(h.SIMPLE, n_epochs=1), tmp_path / name, "", history, 1, correct, None)
        h.write_text(run.folder / h.PREDICTIONS, name)
        h.write_result(run, images)
        return run

    return make


@pytest.fixture
def submitted(tmp_path, trained):
    """Whose CSV write_best submits."""
    data = h.read_folder(trained / "Food-11")
    return lambda *runs, **options: h.write_best(runs, data, tmp_path, **options).read_text()


def test_the_best_run_is_submitted_and_the_first_of_equal_ones(run_of, submitted):
    runs = [run_of("a", 2), run_of("b", 8), run_of("c", 8)]
    assert h.best_run(runs) is runs[1]
    assert submitted(*runs) == "b"


@pytest.mark.parametrize("earlier", ["strong", "strong.1", "exercises/strong"])
def test_a_better_result_of_an_earlier_call_counts_and_an_equal_one_does_not(
    run_of, submitted, earlier
):
    run_of(earlier, 8)
    assert submitted(run_of("new", 7)) == earlier
    assert submitted(run_of("newer", 8)) == "newer"


def test_a_result_of_other_images_does_not_count(run_of, submitted):
    run_of("others", 9, images="others")
    assert submitted(run_of("new", 7)) == "new"


def test_a_final_fit_is_submitted_where_it_is_asked_for_and_is_never_the_best(run_of, submitted):
    simple = run_of("simple", 1)
    final = run_of("both", None)
    assert submitted(simple, final) == "simple"
    assert submitted(simple, final, final=final) == "both"
