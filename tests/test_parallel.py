"""Two processes on two CPUs (gloo) against one."""

import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT

import helpers as h


def torchrun(n, *command, **environment):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(n),
            *map(str, command),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_gradients_of_two_processes_equal_one(food, teacher_file, tmp_path):
    from parallel_worker import gradients

    gradients(food, teacher_file, tmp_path / "one.pt")
    result = torchrun(
        2, ROOT / "tests/parallel_worker.py", "gradients", food, teacher_file, tmp_path / "two.pt"
    )
    assert result.returncode == 0, result.stderr
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys() and max(g.abs().max() for g in one.values()) > 0.01
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5, rtol=1e-4), name


def test_a_process_that_fails_ends_all_with_its_message(food):
    result = torchrun(2, ROOT / "tests/parallel_worker.py", "die")
    assert result.returncode != 0 and "this process cannot go on" in result.stderr


@pytest.fixture
def arguments(food, teacher_file):
    return [
        "run",
        "--data",
        food,
        "--stages",
        "boss",
        "--set",
        "image_size=64",
        "--set",
        "batch_size=10",
        "--set",
        "n_epochs=3",
        "--set",
        "amp=off",
        "--out",
    ]


def test_run_with_two_processes_writes_one_set_of_files_and_resumes(
    food, arguments, tmp_path, capsys
):
    out = tmp_path / "two"
    result = torchrun(2, ROOT / "helpers.py", *arguments, out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 processes") == 1 and result.stdout.count("accuracy  +- s.e.") == 1
    assert sorted(p.name for p in (out / "boss").iterdir()) == [
        "config.json",
        "last.ckpt",
        "log.csv",
        "previous.ckpt",
        "student_best.ckpt",
    ]
    assert h.validate_submission(out / "submission.csv", 5) == 5
    again = torchrun(2, ROOT / "helpers.py", *arguments, out)
    assert again.returncode == 0 and "finished before, loaded" in again.stdout
    assert (
        h.main([*map(str, arguments), str(out)]) == 0
    )  # finished: any number of processes may load it
    assert "finished before, loaded" in capsys.readouterr().out
    last = torch.load(out / "boss/last.ckpt", weights_only=True)
    torch.save(last | {"history": last["history"][:2]}, out / "boss/last.ckpt")
    assert (
        h.main([*map(str, arguments), str(out)]) == 2
    )  # not finished: the parts of a batch would be others
    assert "processes 2 (now 1)" in capsys.readouterr().err
    # One process on the same data: batch norm sees other batches, so the curves agree but are not
    # equal.
    assert h.main([*map(str, arguments), str(tmp_path / "one")]) == 0
    one, two = (pd.read_csv(tmp_path / name / "boss/log.csv") for name in ("one", "two"))
    assert (one["train_loss"] / two["train_loss"]).between(0.8, 1.25).all()
    assert one["n"].tolist() == two["n"].tolist() == [11] * 3


def test_two_processes_go_on_exactly_where_two_stopped(food, teacher_file, tmp_path):
    """Two epochs and then a third equal three at once, for a stage whose settings do not depend on
    n_epochs.
    """

    def train(out, n_epochs):
        result = torchrun(
            2,
            ROOT / "helpers.py",
            "run",
            "--data",
            food,
            "--stages",
            "medium",
            "--set",
            "image_size=64",
            "--set",
            "batch_size=10",
            "--set",
            f"n_epochs={n_epochs}",
            "--out",
            tmp_path / out,
        )
        assert result.returncode == 0, result.stderr
        return torch.load(tmp_path / out / "medium/last.ckpt", weights_only=True)

    train("cut", 2)
    cut, whole = train("cut", 3), train("whole", 3)
    assert all(torch.equal(cut["loss_fn"][key], whole["loss_fn"][key]) for key in whole["loss_fn"])
    assert [{**row, "seconds": 0} for row in cut["history"]] == [
        {**row, "seconds": 0} for row in whole["history"]
    ]
