"""The command line, in process: what it prints, what it leaves, and one line on stderr for every
mistake.
"""

import dataclasses
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT

import helpers as h

SMALL = ["--set", "image_size=64", "--set", "n_epochs=1", "--set", "batch_size=8"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_help_lists_every_config_key(capsys):
    with pytest.raises(SystemExit) as end:
        h.main(["run", "--help"])
    keys = capsys.readouterr().out.partition("the keys of --set:")[2]
    assert end.value.code == 0 and all(f"  {f.name} " in keys for f in dataclasses.fields(h.Config))


def test_run_evaluate_predict_validate(food, teacher_file, here, capsys):
    assert (
        h.main(["run", "--data", str(food), "--out", "out", "--stages", "simple,boss", *SMALL]) == 0
    )
    out = capsys.readouterr().out
    assert "accuracy" in out.splitlines()[-4] and out.splitlines()[-1].startswith("boss")
    assert {p.relative_to(here / "out").as_posix() for p in (here / "out").rglob("*")} == {
        "submission.csv",
        *(
            f"{s}{end}"
            for s in ("simple", "boss")
            for end in (
                "",
                ".csv",
                "/student_best.ckpt",
                "/last.ckpt",
                "/previous.ckpt",
                "/log.csv",
                "/config.json",
            )
        ),
    }
    checkpoint = "out/boss/student_best.ckpt"
    assert h.main(["evaluate", "--data", str(food), "--checkpoint", checkpoint]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    accuracy = pd.read_csv("out/boss/log.csv")["valid_acc"].max()
    assert (
        last
        == f"validation accuracy {accuracy:.4f} +- {h.standard_error(accuracy, 11):.4f} (11 images)"
    )
    assert (
        h.main(["predict", "--data", str(food), "--checkpoint", checkpoint, "--out", "mine.csv"])
        == 0
    )
    assert (here / "mine.csv").read_bytes() == (here / "out/boss.csv").read_bytes()
    assert (
        h.main(
            [
                "predict",
                "--data",
                str(food),
                "--checkpoint",
                checkpoint,
                "--out",
                "tta.csv",
                "--tta",
            ]
        )
        == 0
    )
    assert h.main(["validate", "tta.csv", "--rows", "5"]) == 0
    assert capsys.readouterr().out.endswith("5 rows, valid\n")


def test_run_resumes_and_fresh_starts_again(food, here, capsys):
    arguments = ["run", "--data", str(food), "--stages", "simple", *SMALL]
    assert h.main(arguments) == 0
    first = (here / "submission/simple/last.ckpt").stat().st_mtime_ns
    assert h.main(arguments) == 0
    assert "finished before, loaded" in capsys.readouterr().out
    assert (here / "submission/simple/last.ckpt").stat().st_mtime_ns == first
    assert h.main([*arguments, "--fresh"]) == 0
    assert (here / "submission/simple/last.ckpt").stat().st_mtime_ns > first
    assert h.main([*arguments, "--set", "lr=0.5"]) == 2
    assert "lr 0.0003 (now 0.5)" in capsys.readouterr().err


def test_kaggle_results_go_to_its_working_folder(food, here, monkeypatch):
    (here / "k/working").mkdir(parents=True)
    (here / "k/input").mkdir()
    food.rename(here / "k/input/ml2023spring-hw13")
    monkeypatch.setenv("HW13_KAGGLE", str(here / "k"))
    assert h.main(["run", "--stages", "simple", *SMALL]) == 0
    assert h.validate_submission(here / "k/working/submission.csv", 5) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["fly"], "invalid choice"),
        (["run"], "--demo"),
        (["run", "--data", "nowhere"], "there is no folder nowhere"),
        (["run", "--data", "FOOD", "--demo"], "leave out --data"),
        (["run", "--data", "FOOD", "--stages", "simple,bos"], "unknown stage 'bos'"),
        (["run", "--data", "FOOD", "--stages", ","], "unknown stage ''"),
        (["run", "--data", "FOOD", "--set", "n_epochs"], "KEY=VALUE"),
        (["run", "--data", "FOOD", "--set", "n_epochs=0"], "n_epochs=0: allowed"),
        (["run", "--data", "FOOD", "--set", "epochs=1"], "the keys are exp_name, seed"),
        (
            ["run", "--data", "FOOD", "--set", "teacher_views=3"],
            "teacher_views=3: allowed is 0 with align_weights",
        ),
        (["run", "--data", "FOOD", "--stages", "simple,simple"], "each stage once"),
        (["run", "--data", "FOOD", "--set", "exp_name=mine"], "each stage once"),
        (
            ["run", "--data", "FOOD", "--stages", "simple", "--set", "student=resnet18"],
            "11,182,155 parameters",
        ),
        (["run", "--data", "FOOD", "--teacher", "no.ckpt"], "there is no file no.ckpt"),
        (["run", "--data", "FOOD", "--stages", "boss"], "no stage could run without a teacher"),
        (["run", "--data", "FOOD", "--out", "bare.ckpt/out"], "bare.ckpt is a file"),
        (["run", "--data", "FOOD", "--frsh"], "unrecognized arguments"),
        (["evaluate", "--data", "FOOD"], "--checkpoint"),
        (["evaluate", "--data", "FOOD", "--checkpoint", "no.ckpt"], "there is no file no.ckpt"),
        (
            ["evaluate", "--data", "FOOD", "--checkpoint", "bare.ckpt"],
            "does not go with a config.json beside it",
        ),
        (
            ["predict", "--data", "FOOD", "--checkpoint", "no.ckpt", "--out", "a.csv"],
            "there is no file no.ckpt",
        ),
        (
            ["predict", "--data", "FOOD", "--checkpoint", "no.ckpt", "--out", "."],
            "--out . is a folder",
        ),
        (["validate", "bare.ckpt", "--rows", "9" * 15], "is no text in UTF-8"),
        (["run", "--data", "FOOD", "--set", "lr=" + "-" * 5000], "KEY=VALUE"),
        (["validate", "no.csv", "--rows", "3"], "there is no file no.csv"),
        (["validate", "no.csv", "--rows", "x"], "invalid int value"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_2_and_leaves_nothing(
    food, here, capsys, arguments, message
):
    torch.save({"a": torch.zeros(1)}, "bare.ckpt")
    before = sorted(here.rglob("*"))
    assert h.main([str(food) if a == "FOOD" else a for a in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and "usage" not in captured.err
    assert sorted(here.rglob("*")) == before


def test_stopped_by_the_keyboard_is_one_line_too(food, here, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(h, "fit", interrupt)
    assert h.main(["run", "--data", str(food), "--stages", "simple", *SMALL]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("helpers.py: stopped")


def test_as_a_program_it_answers_in_the_same_way(here):
    result = subprocess.run(
        [sys.executable, ROOT / "helpers.py", "validate", "no.csv", "--rows", "2"],
        capture_output=True,
        text=True,
        cwd=here,
        check=False,
    )
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
