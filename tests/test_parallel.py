"""Two processes on two CPUs (gloo) against one."""

import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT
from shared import settings, without_seconds

import helpers as h

HELPERS = ROOT / "helpers.py"
WORKER = ROOT / "tests/parallel_worker.py"


def torchrun(n, *command, **environment):
    """A finished command of n processes on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    processes = ["--nproc-per-node", str(n)]
    return subprocess.run(
        [*launcher, *processes, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_gradients_of_two_processes_equal_one(food, teacher_file, tmp_path):
    from parallel_worker import gradients

    gradients(food, teacher_file, tmp_path / "one.pt")
    result = torchrun(2, WORKER, "gradients", food, teacher_file, tmp_path / "two.pt")
    assert result.returncode == 0, result.stderr
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert one.keys() == two.keys()
    # Gradients of nothing but zeros would agree as well.
    assert max(gradient.abs().max() for gradient in one.values()) > 0.01
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5, rtol=1e-4), name


def test_a_process_that_fails_ends_all_with_its_message(food):
    result = torchrun(2, WORKER, "die")
    assert result.returncode != 0
    assert "this process cannot go on" in result.stderr


@pytest.fixture
def arguments(food, teacher_file):
    """A small boss stage; the folder it writes to comes after them."""
    small_run = settings(image_size=64, batch_size=10, n_epochs=3, amp="off")
    return ["run", "--data", str(food), "--stages", "boss", *small_run, "--out"]


FILES = ["config.json", "last.ckpt", "log.csv", "previous.ckpt", "result.json", "student_best.ckpt"]


def test_run_with_two_processes_writes_one_set_of_files_and_resumes(
    food, arguments, tmp_path, capsys
):
    out = tmp_path / "two"
    result = torchrun(2, HELPERS, *arguments, out)
    assert result.returncode == 0, result.stderr
    # Only the first process prints and writes.
    assert result.stdout.count("2 processes") == 1
    assert result.stdout.count("accuracy  +- s.e.") == 1
    assert sorted(os.listdir(out / "boss")) == FILES
    assert h.validate_submission(out / "submission.csv", 5) == 5
    again = torchrun(2, HELPERS, *arguments, out)
    assert again.returncode == 0
    assert "finished before, loaded" in again.stdout
    # A finished stage: any number of processes may load it.
    assert h.main([*arguments, str(out)]) == 0
    assert "finished before, loaded" in capsys.readouterr().out
    # An unfinished one: the parts of a batch would be others.
    last = torch.load(out / "boss/last.ckpt", weights_only=True)
    torch.save(last | {"history": last["history"][:2]}, out / "boss/last.ckpt")
    assert h.main([*arguments, str(out)]) == 2
    assert "processes 2 (now 1)" in capsys.readouterr().err
    # One process on the same data: batch norm sees other batches, so the curves agree but are not
    # equal.
    assert h.main([*arguments, str(tmp_path / "one")]) == 0
    one = pd.read_csv(tmp_path / "one/boss/log.csv")
    two = pd.read_csv(tmp_path / "two/boss/log.csv")
    assert (one["train_loss"] / two["train_loss"]).between(0.8, 1.25).all()
    assert one["n"].tolist() == [11] * 3
    assert two["n"].tolist() == [11] * 3


def test_two_processes_go_on_exactly_where_two_stopped(food, teacher_file, tmp_path):
    """Two epochs and then a third equal three at once, for a stage whose settings do not depend on
    n_epochs.
    """

    def train(out, n_epochs):
        small_run = settings(image_size=64, batch_size=10, n_epochs=n_epochs)
        stage = ["run", "--data", food, "--stages", "medium", *small_run]
        result = torchrun(2, HELPERS, *stage, "--out", tmp_path / out)
        assert result.returncode == 0, result.stderr
        return without_seconds(tmp_path / out / "medium")

    train("cut", 2)
    cut = train("cut", 3)
    whole = train("whole", 3)
    for name, value in whole["loss_fn"].items():
        assert torch.equal(cut["loss_fn"][name], value), name
    assert cut["history"] == whole["history"]
