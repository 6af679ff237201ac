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
from shared import settings

import helpers as h

SMALL = settings(image_size=64, n_epochs=1, batch_size=8)
STAGE_FILES = (
    "student_best.ckpt",
    "last.ckpt",
    "previous.ckpt",
    "log.csv",
    "config.json",
    "result.json",
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, in which the command line is given."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_help_lists_every_config_key(capsys):
    with pytest.raises(SystemExit) as end:
        h.main(["run", "--help"])
    assert end.value.code == 0
    keys = capsys.readouterr().out.partition("the keys of --set:")[2]
    for field in dataclasses.fields(h.Config):
        assert f"  {field.name} " in keys


def test_run_evaluate_predict_validate(food, teacher_file, here, capsys):
    data = ["--data", str(food)]
    assert h.main(["run", *data, "--out", "out", "--stages", "simple,boss", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    # The table comes last: the columns' names, the index's name, a row a stage.
    assert "accuracy" in lines[-4]
    assert lines[-1].startswith("boss")

    expected = {"submission.csv"}
    for stage in ("simple", "boss"):
        expected |= {stage, f"{stage}.csv"}
        expected |= {f"{stage}/{name}" for name in STAGE_FILES}
    out = here / "out"
    assert {path.relative_to(out).as_posix() for path in out.rglob("*")} == expected

    checkpoint = ["--checkpoint", "out/boss/student_best.ckpt"]
    assert h.main(["evaluate", *data, *checkpoint]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    accuracy = pd.read_csv("out/boss/log.csv")["valid_acc"].max()
    error = h.standard_error(accuracy, 11)
    assert last == f"validation accuracy {accuracy:.4f} +- {error:.4f} (11 images)"

    # A folder of pictures is called by its name, for it may be of any split.
    assert h.main(["evaluate", "--data", str(food / "training"), *checkpoint]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("accuracy in training 0.")
    assert h.main(["evaluate", *data, "--checkpoint", "out/boss/last.ckpt"]) == 2
    assert "name the student_best.ckpt beside it" in capsys.readouterr().err

    assert h.main(["predict", *data, *checkpoint, "--out", "mine.csv"]) == 0
    assert (here / "mine.csv").read_bytes() == (out / "boss.csv").read_bytes()
    assert h.main(["predict", *data, *checkpoint, "--out", "tta.csv", "--tta"]) == 0
    assert h.main(["validate", "tta.csv", "--rows", "5"]) == 0
    assert capsys.readouterr().out.endswith("5 rows, valid\n")


def test_a_tilde_is_the_home_folder_in_every_path(food, teacher_file, here, monkeypatch):
    home = food.parent
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HW13_CACHE", "~/decoded")
    data = ["--data", "~/Food-11"]
    teacher = ["--teacher", f"~/Food-11/{teacher_file.name}"]
    assert h.main(["run", *data, *teacher, "--out", "~/out", "--stages", "medium", *SMALL]) == 0
    checkpoint = ["--checkpoint", "~/out/medium/student_best.ckpt"]
    assert h.main(["evaluate", *data, *checkpoint]) == 0
    assert h.main(["predict", *data, *checkpoint, "--out", "~/mine.csv"]) == 0
    assert h.main(["validate", "~/mine.csv", "--rows", "5"]) == 0
    assert (home / "mine.csv").read_bytes() == (home / "out/medium.csv").read_bytes()
    assert list((home / "decoded").iterdir())
    assert list(here.iterdir()) == []


def test_run_resumes_and_fresh_starts_again(food, here, capsys):
    arguments = ["run", "--data", str(food), "--stages", "simple", *SMALL]
    assert h.main(arguments) == 0
    checkpoint = here / "submission/simple/last.ckpt"
    first = checkpoint.stat().st_mtime_ns
    assert h.main(arguments) == 0
    assert "finished before, loaded" in capsys.readouterr().out
    assert checkpoint.stat().st_mtime_ns == first
    assert h.main([*arguments, "--fresh"]) == 0
    assert checkpoint.stat().st_mtime_ns > first
    assert h.main([*arguments, *settings(lr=0.5)]) == 2
    assert "lr 0.0003 (now 0.5)" in capsys.readouterr().err


def test_kaggle_results_go_to_its_working_folder(food, here, monkeypatch):
    kaggle = here / "k"
    (kaggle / "working").mkdir(parents=True)
    (kaggle / "input").mkdir()
    food.rename(kaggle / "input/ml2023spring-hw13")
    monkeypatch.setenv("HW13_KAGGLE", str(kaggle))
    assert h.main(["run", "--stages", "simple", *SMALL]) == 0
    assert h.validate_submission(kaggle / "working/submission.csv", 5) == 5


# What follows helpers.py on the command line, where FOOD is a data folder; the message.
MISTAKES = [
    ("", "command"),
    ("fly", "invalid choice"),
    ("run", "--demo"),
    ("run --data nowhere", "there is no folder nowhere"),
    ("run --data FOOD --demo", "leave out --data"),
    ("run --data FOOD --stages simple,bos", "unknown stage 'bos'"),
    ("run --data FOOD --stages ,", "unknown stage ''"),
    ("run --data FOOD --set n_epochs", "KEY=VALUE"),
    ("run --data FOOD --set n_epochs=0", "n_epochs=0: allowed"),
    ("run --data FOOD --set epochs=1", "the keys are exp_name, seed"),
    ("run --data FOOD --set teacher_views=3", "teacher_views=3: allowed is 0 with align_weights"),
    ("run --data FOOD --stages simple,simple", "each stage once"),
    ("run --data FOOD --set exp_name=mine", "each stage once"),
    ("run --data FOOD --stages simple --set student=resnet18", "11,182,155 parameters"),
    ("run --data FOOD --teacher no.ckpt", "there is no file no.ckpt"),
    ("run --data FOOD --stages boss", "no stage could run without a teacher"),
    ("run --data FOOD --out bare.ckpt/out", "bare.ckpt is a file"),
    ("run --data FOOD --frsh", "unrecognized arguments"),
    ("evaluate --data FOOD", "--checkpoint"),
    ("evaluate --data FOOD --checkpoint no.ckpt", "there is no file no.ckpt"),
    ("evaluate --data FOOD --checkpoint bare.ckpt", "has no config.json beside it"),
    ("evaluate --data FOOD --checkpoint FOOD", "is a folder: name a file in it"),
    ("evaluate --data bare.ckpt --checkpoint bare.ckpt", "bare.ckpt is a file"),
    ("predict --data FOOD --checkpoint no.ckpt --out a.csv", "there is no file no.ckpt"),
    ("predict --data FOOD --checkpoint no.ckpt --out .", "--out . is a folder"),
    ("predict --data FOOD --checkpoint bare.ckpt --out bare.ckpt", "no CSV of predictions"),
    ("predict --data FOOD --checkpoint no.ckpt --out EVALUATION/12.csv", "would count as an"),
    ("predict --data FOOD --checkpoint no.ckpt --out /dev/null", "no CSV of predictions"),
    (
        "run --data FOOD --stages simple --set exp_name=teacher",
        "exp_name='teacher': allowed is any",
    ),
    ("validate bare.ckpt --rows " + "9" * 15, "is no text in UTF-8"),
    pytest.param("run --data FOOD --set lr=" + "-" * 5000, "KEY=VALUE", id="a long value"),
    ("validate no.csv --rows 3", "there is no file no.csv"),
    ("validate no.csv --rows x", "invalid int value"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_exit_2_and_leaves_nothing(
    food, here, capsys, line, message
):
    torch.save({"a": torch.zeros(1)}, "bare.ckpt")
    before = sorted(here.rglob("*"))
    line = line.replace("EVALUATION", str(food / "evaluation")).replace("FOOD", str(food))
    arguments = line.split()
    assert h.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "usage" not in error
    assert sorted(here.rglob("*")) == before


def test_stopped_by_the_keyboard_is_one_line_too(food, here, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(h, "fit", interrupt)
    assert h.main(["run", "--data", str(food), "--stages", "simple", *SMALL]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "helpers.py: stopped; the same command goes on after the last whole epoch"
    # --fresh would throw away what is saved, and what is no training has no epochs.
    assert h.main(["run", "--data", str(food), "--stages", "simple", "--fresh", *SMALL]) == 130
    assert "the same command without --fresh goes on" in capsys.readouterr().err
    monkeypatch.setattr(h, "validate_submission", interrupt)
    assert h.main(["validate", "x.csv", "--rows", "2"]) == 130
    assert capsys.readouterr().err == "helpers.py: stopped\n"


def test_as_a_program_it_answers_in_the_same_way(here):
    command = [sys.executable, ROOT / "helpers.py", "validate", "no.csv", "--rows", "2"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=here, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
