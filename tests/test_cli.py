"""The command line, in process: what it prints, what it leaves, and what a mistake gives."""

import dataclasses
import shutil

import pandas as pd
import pytest
from conftest import settings_of

import helpers as h

# Without a teacher, which is faster.
SMALL = settings_of(image_size=40, n_epochs=1, batch_size=8, loss_fn_type="CE")
CHECKPOINT = "--data Food-11 --checkpoint out/strong/student_best.ckpt"


def exit_code(line, *more):
    """The exit code of a command line, argparse's own way out included."""
    try:
        return h.main([*line.split(), *more])
    except SystemExit as end:
        return end.code


@pytest.fixture
def here(copied_run, monkeypatch):
    """A finished run, in whose folder the command line is given: Food-11/ and out/."""
    monkeypatch.chdir(copied_run)
    return copied_run


def test_help_lists_every_key(capsys):
    assert exit_code("run --help") == 0
    keys = capsys.readouterr().out.partition("the keys of --set:")[2]
    for field in dataclasses.fields(h.Config):
        assert f"  {field.name} " in keys


def test_run_writes_its_stages_ends_in_a_table_and_loads_them_again(here, capsys):
    line = "run --data Food-11 --out new --stages simple,boss --length quick"
    assert exit_code(line, *SMALL) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("boss")
    assert exit_code("validate new/submission.csv --rows 5") == 0
    assert exit_code(line, *SMALL) == 0
    assert capsys.readouterr().out.count("finished before") == 2


def test_evaluate_gives_the_runs_accuracy(here, capsys):
    assert exit_code(f"evaluate {CHECKPOINT}") == 0
    accuracy = pd.read_csv("out/strong/log.csv")["valid_acc"].max()
    assert h.plus_minus(accuracy, 11) in capsys.readouterr().out.splitlines()[-1]


def test_predict_needs_evaluation_alone_and_gives_the_runs_own_csv(here, monkeypatch):
    shutil.rmtree("Food-11/training")
    shutil.rmtree("Food-11/validation")
    assert exit_code(f"predict {CHECKPOINT} --out new/a.csv") == 0
    assert (here / "new/a.csv").read_text() == (here / "out/strong.csv").read_text()
    assert exit_code("validate new/a.csv --rows 5") == 0
    monkeypatch.setattr(h, "six_views", None)
    assert exit_code(f"predict {CHECKPOINT} --out b.csv --views 1") == 0


# What follows helpers.py on the command line, and the message.
MISTAKES = [
    ("", "required"),
    ("run --data Food-11 --stages simple,bos", "'bos'"),
    ("run --data Food-11 --set epochs=1", "the keys are exp_name, seed"),
    ("run --data Food-11 --views 2", "invalid choice"),
    ("run --data Food-11 --stages simple --set student=resnet18", "11,182,155 parameters"),
    ("run --data Food-11 --stages simple --set exp_name=demo", "exp_name='demo'"),
    ("evaluate --data Food-11 --checkpoint no/no.ckpt", "no/config.json"),
    ("predict --data out --checkpoint no.ckpt --out a.csv", "out"),
    ("validate out/strong/last.ckpt --rows 3", "last.ckpt is no CSV"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_exit_2_and_leaves_nothing(here, capsys, line, message):
    before = sorted(here.rglob("*"))
    assert exit_code(line) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    # argparse shows the usage before its line.
    assert len(error) == 1 or error[0].startswith("usage: helpers.py")
    assert sorted(here.rglob("*")) == before


def test_stopped_by_the_keyboard_is_exit_130(here, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(h, "train_one_epoch", interrupt)
    assert exit_code("run --data Food-11 --out new --stages simple,boss", *SMALL) == 130
    assert "simple: stopped after epoch 0; run again" in capsys.readouterr().out
