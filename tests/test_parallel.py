"""Two processes on two CPUs (gloo) against one."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest
import torch
from conftest import ROOT
from shared import begun_by_two, settings, without_seconds

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


def end_after_what_is_saved(folder):
    """Write into a run's checkpoint that it was to have as many epochs as it has; how many."""
    # A stop between two renames leaves the previous one alone.
    newest = folder / "last.ckpt"
    if not newest.is_file():
        newest = folder / "previous.ckpt"
    last = torch.load(newest, weights_only=True)
    n = len(last["history"])
    facts = json.loads(last["facts"])
    facts["config"]["n_epochs"] = n
    torch.save(last | {"facts": json.dumps(facts)}, folder / "last.ckpt")
    return n


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


def test_processes_that_differ_are_named_with_the_key():
    result = torchrun(2, WORKER, "disagree")
    assert result.returncode != 0
    assert "process 1 differs from process 0 in lr: start all" in result.stderr


def test_what_processes_compare_before_they_train(food):
    cfg = h.Config(image_size=64, batch_size=4)
    data = h.find_data(food)
    train, _ = h.build_loaders(cfg, data, torch.device("cpu"))
    loss_fn = h.DistillLoss(cfg, h.build_student(cfg))
    facts = h.facts_of_training(loss_fn, train, [])
    assert facts["lr"] == cfg.lr
    assert facts == h.facts_of_training(loss_fn, train, [])

    def different(*arguments):
        others = h.facts_of_training(*arguments)
        return [key for key in facts if others[key] != facts[key]]

    assert different(loss_fn, train, [{"epoch": 1}]) == ["history"]
    train.batch_size = 5
    assert different(loss_fn, train, []) == ["steps"]


# --- all GPUs from a notebook: here two CPU processes ---------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(h, "gpus_of_notebook", lambda device: 2)


def medium_stage(food, teacher_file, out, n_epochs=3, **more):
    """A small Medium by run_stage, as the notebook calls it."""
    cfg = h.get_config("medium", image_size=64, batch_size=10, n_epochs=n_epochs, amp="off")
    return h.run_stage(cfg, h.find_data(food), h.load_teacher(teacher_file), out=out, **more)


def test_a_stage_of_the_notebook_trains_on_all_gpus_is_stopped_and_goes_on(
    food, teacher_file, tmp_path, two_gpus, capsys
):
    log = tmp_path / "medium/log.csv"

    def press_stop():
        while not log.is_file() or len(log.read_text().splitlines()) < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell starts what runs in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=press_stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        medium_stage(food, teacher_file, tmp_path, n_epochs=1000)
    said = capsys.readouterr().out
    assert "medium: 2 GPUs train, a process each" in said
    assert "2 processes" in said  # the child's own line
    assert "every whole epoch is saved; run this cell again to go on" in said
    n = end_after_what_is_saved(tmp_path / "medium")
    assert 1 <= n < 1000

    run = medium_stage(food, teacher_file, tmp_path, n_epochs=n + 1)
    said = capsys.readouterr().out
    assert f"goes on after epoch {n}" in said
    assert run.history["epoch"].tolist() == list(range(1, n + 2))
    assert run.facts["processes"] == 2
    assert run.valid_acc == pytest.approx(run.history["valid_acc"].max())
    assert files_in(tmp_path / "medium") == FILES
    assert h.validate_submission(run.csv, 5) == 5
    best = torch.load(tmp_path / "medium/student_best.ckpt", weights_only=True)
    assert all(torch.equal(best[name], value) for name, value in run.net.state_dict().items())

    # A finished run is loaded, as ever.
    assert len(medium_stage(food, teacher_file, tmp_path, n_epochs=n + 1).history) == n + 1


def test_one_process_trains_where_several_cannot_and_says_why(
    food, teacher_file, tmp_path, two_gpus, monkeypatch, capsys
):
    def broken(job, n):
        return [sys.executable, "-c", "raise RuntimeError('NCCL has no shared memory')"]

    monkeypatch.setattr(h, "job_command", broken)
    run = medium_stage(food, teacher_file, tmp_path, n_epochs=2)
    said = capsys.readouterr().out
    why = "could not be started ('RuntimeError: NCCL has no shared memory'); one trains"
    assert why in said
    assert len(run.history) == 2
    assert run.facts["processes"] == 1
    # Begun by one process, it goes on so.
    run = medium_stage(food, teacher_file, tmp_path, n_epochs=3)
    assert len(run.history) == 3
    assert "could not be started" not in capsys.readouterr().out

    # One that began on several is not thrown away where they cannot be started.
    path = tmp_path / "medium/last.ckpt"
    begun_by_two(path)
    before = path.read_bytes()
    with pytest.raises(h.UserError, match="its run began on several: run this cell again"):
        medium_stage(food, teacher_file, tmp_path, n_epochs=4)
    assert path.read_bytes() == before


def test_a_run_goes_on_with_as_many_processes_as_it_began_with(
    food, teacher_file, tmp_path, monkeypatch, capsys
):
    """Two began it, and this machine has four GPUs."""
    medium_stage(food, teacher_file, tmp_path, n_epochs=1)
    facts = begun_by_two(tmp_path / "medium/last.ckpt")
    monkeypatch.setattr(h, "gpus_of_notebook", lambda device: 4)
    cfg = h.Config(**(facts["config"] | {"n_epochs": 2}))
    device = torch.device("cpu")
    assert h.processes_for(cfg, tmp_path / "medium", device, False, {}) == 2
    assert "2 of 4 GPUs at work" in capsys.readouterr().out
    assert h.processes_for(cfg, tmp_path / "medium", device, True, {}) == 4  # it starts again
    # None is what a caller without own code hands on.
    nothing = {"student": None, "loss_fn_kd": None}
    assert h.processes_for(cfg, tmp_path / "medium", device, True, nothing) == 4


def test_own_code_trains_in_the_notebooks_process(
    food, teacher_file, tmp_path, two_gpus, monkeypatch, capsys
):
    def my_loss(student_logits, labels, teacher_logits, alpha, temperature):
        return h.loss_fn_kd(student_logits, labels, teacher_logits, alpha, temperature)

    monkeypatch.setattr(h, "train_in_processes", None)  # it is not asked
    medium_stage(food, teacher_file, tmp_path, n_epochs=1, loss_fn_kd=my_loss)
    said = capsys.readouterr().out
    assert "one of 2 GPUs trains, for your own loss_fn_kd is in this notebook only" in said


def test_gpus_are_counted_in_a_notebook_on_the_first_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu = torch.device("cuda", 0)
    assert h.gpus_of_notebook(gpu) == 1  # no notebook
    monkeypatch.setattr(h, "in_notebook", lambda: True)
    assert h.gpus_of_notebook(gpu) == 2
    assert h.gpus_of_notebook(torch.device("cuda", 1)) == 1
    assert h.gpus_of_notebook(torch.device("cpu")) == 1
    monkeypatch.setattr(h, "rank_and_world", lambda: (0, 2))
    assert h.gpus_of_notebook(gpu) == 1


def test_a_bar_redraws_its_line_and_lines_stay_lines():
    printed = io.BytesIO("one\n\r 10%|█\r 20%|██\ntwo\nlast".encode())
    assert list(h.texts_of(printed)) == [
        ("one", False),
        (" 10%|█", True),
        (" 20%|██", True),
        ("two", False),
        ("last", False),  # cut off, without an end
    ]


# --- two machines ---------------------------------------------------------------------------------


def two_machines(folder, script, arguments_of, first=0):
    """Exit codes and outputs of two agents that share nothing; machine `first` has process 0.

    Each works in folder/0 or folder/1, with data, cache and results of its own.
    """
    port = str(free_port())
    agents = []
    for machine in (0, 1):
        place = folder / str(machine)
        rank = str(int(machine != first))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        launcher += ["--node-rank", rank, "--nproc-per-node", "1"]
        launcher += ["--master-addr", "127.0.0.1", "--master-port", port]
        environment = {"OMP_NUM_THREADS": "1", "HW13_CACHE": str(place / "cache")}
        command = [*launcher, str(script), *map(str, arguments_of(place))]
        agent = subprocess.Popen(
            command,
            env=os.environ | environment,
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        agents.append(agent)
    outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    return [agent.returncode for agent in agents], outputs


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def machines(food, teacher_file, tmp_path):
    """A folder with two copies of the data, one a machine."""
    folder = tmp_path / "machines"
    for machine in ("0", "1"):
        shutil.copytree(food, folder / machine / "Food-11")
        (folder / machine / "cache").mkdir()
    return folder


def a_run_of(n_epochs):
    """The command line of a run in a machine's place, as a function of it."""

    def arguments_of(place):
        small_run = settings(image_size=64, batch_size=10, n_epochs=n_epochs, amp="off")
        data = ["run", "--data", place / "Food-11", "--stages", "medium"]
        return [*data, *small_run, "--out", place / "out"]

    return arguments_of


def files_in(folder):
    return sorted(os.listdir(folder))


def test_two_machines_with_nothing_in_common_leave_one_set_of_files(machines):
    """A worker is killed in the middle; they go on; then the other machine is the first."""

    def killed(place):
        log = machines / "0/out/medium/log.csv"
        return ["main_killed", log, *a_run_of(1000)(place)]

    codes, outputs = two_machines(machines, WORKER, killed)
    assert 0 not in codes, outputs
    assert not (machines / "1/out").exists()

    # n_epochs of a constant schedule may grow, so the kill came in a run that was to end here.
    n = end_after_what_is_saved(machines / "0/out/medium")
    assert 2 <= n < 1000
    codes, outputs = two_machines(machines, HELPERS, a_run_of(n + 1))
    assert codes == [0, 0], outputs
    assert f"goes on after epoch {n}" in outputs[0]
    log = pd.read_csv(machines / "0/out/medium/log.csv")
    assert log["epoch"].tolist() == list(range(1, n + 2))
    assert files_in(machines / "0/out/medium") == FILES
    assert h.validate_submission(machines / "0/out/submission.csv", 5) == 5
    assert not (machines / "1/out").exists()

    # The other machine has no run: it begins one, whatever lies on the one that is second now.
    before = (machines / "0/out/medium/last.ckpt").read_bytes()
    codes, outputs = two_machines(machines, HELPERS, a_run_of(n), first=1)
    assert codes == [0, 0], outputs
    assert files_in(machines / "1/out/medium") == FILES
    other = pd.read_csv(machines / "1/out/medium/log.csv")
    assert other["epoch"].tolist() == list(range(1, n + 1))
    # The same run as the one that was killed and went on.
    columns = ["train_loss", "valid_acc"]
    assert other[columns].equals(log[columns][:n])
    assert (machines / "0/out/medium/last.ckpt").read_bytes() == before
