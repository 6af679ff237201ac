"""The comparison with what people would use instead (tests/bench/peers.py), at its smallest."""

import sys

import pandas as pd
import pytest
from conftest import ROOT

import helpers as h

sys.path.insert(0, str(ROOT / "tests/bench"))

import peers  # noqa: E402

SMALL = ["--batch", "4", "--photographs", "8", "--epochs", "2", "--workers", "0"]


@pytest.fixture
def run(food, teacher_file, tmp_path):
    """A function: the rows of a call of the script."""

    def run(*more):
        peers.main(["--data", str(food), "--out", str(tmp_path), *SMALL, *more])
        return pd.read_csv(next(tmp_path.glob("peers-*.csv")))

    return run


@pytest.fixture
def prepared(food, teacher_file):
    """The Setup of a side's process."""
    return peers.prepare(peers.parser().parse_args(["--data", str(food), "--size", "40", *SMALL]))


def test_each_side_is_a_process_and_what_the_file_has_is_not_measured_again(
    run, monkeypatch, capsys
):
    arguments = ("--sizes", "40", "--turns", "1", "--sides", "ours", "old0")
    rows = run(*arguments).set_index("side")
    assert list(rows.index) == ["ours", "old0"]
    assert (rows[["images_per_second", "before_first_step_s", "main_rss_mb"]] > 0).all().all()
    if sys.platform == "linux":
        assert (rows["pss_mb"] > 100).all()
    assert "ours is faster" in capsys.readouterr().out

    monkeypatch.setattr(peers, "measure", lambda *_: pytest.fail("measured again"))
    assert len(run(*arguments)) == 2
    assert len(run("--show", "--sizes", "40", "64", "--turns", "3", "--sides", "ours", "old0")) == 2


@pytest.mark.parametrize("name", peers.SIDES)
def test_a_side_has_the_loss_of_the_course_and_trains(prepared, name):
    if name in peers.PACKAGES:
        pytest.importorskip(peers.PACKAGES[name])
    batch = peers.noise(prepared)
    wanted = peers.wanted_loss(prepared, *batch)
    side = peers.SIDES[name](prepared)
    peers.check_loss(side, wanted, *batch)
    row = peers.train(prepared, side)
    assert row["images_per_second"] > 0


def test_another_loss_and_an_untrained_student_are_found(prepared):
    side = peers.tutorial(prepared)
    batch = peers.noise(prepared)
    with pytest.raises(SystemExit, match="made-up batch"):
        peers.check_loss(side, 1.1 * peers.wanted_loss(prepared, *batch), *batch)
    idle = side._replace(run_epoch=lambda loader, epoch: len(list(loader)))
    with pytest.raises(SystemExit, match="did not change"):
        peers.train(prepared, idle)


def test_a_side_without_its_package_is_left_out_with_a_line(run, monkeypatch, capsys):
    monkeypatch.setattr(peers, "absent_sides", lambda args: {"timm": "timm"})
    row = {"images_per_second": 2.0, "before_first_step_s": 1.0, "main_rss_mb": 1.0, "cuda_mb": 0}
    monkeypatch.setattr(peers, "measure", lambda *_: (dict(row), peers.PeakMemory(0)))
    rows = run("--sizes", "40", "64", "--turns", "2", "--sides", "ours", "timm")
    assert list(rows["side"]) == ["ours"] * 4
    assert "timm is left out" in capsys.readouterr().out


def test_ratios_are_taken_within_a_turn():
    speeds = {"ours": [10.0, 40.0], "old0": [5.0, 10.0]}
    rows = []
    for side, values in speeds.items():
        for turn, value in enumerate(values, 1):
            row = dict.fromkeys(("before_first_step_s", "pss_mb", "pss_file_mb"), 1.0)
            row |= {"main_rss_mb": 1.0, "cuda_mb": 0.0, "images_per_second": value}
            rows.append({"turn": turn, "side": side, "size": 64, **row})
    table = peers.summary(pd.DataFrame(rows)).loc[(64, "old0")]
    assert table["ours is faster, median"] == 3
    assert table["ours is faster, min"] == 2
    assert table["ours is faster, max"] == 4


def test_photographs_are_chosen_evenly(food):
    data = h.find_data(food)
    few = peers.some_photographs(data, 11)
    assert few.files["training"] == data.files["training"][::2]
    assert few.labels["training"] == data.labels["training"][::2]
    assert len(few.ids["training"]) == 11
