"""Two processes on the CPU against one, from a shell and from a notebook."""

import os
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
import torch
from conftest import ids, same, settings_of, without_seconds
from test_training import made_up

import helpers as h

SMALL = {"image_size": 40, "batch_size": 15, "n_epochs": 2, "amp": "off"}


def answers():
    """What this process says of a small Boss: gradients, score, statistics."""
    cfg = h.get_config("boss", **SMALL)
    torch.manual_seed(0)
    loss_fn = h.DistillLoss(cfg, h.build_student(cfg), h.plain_student())
    train = h.BatchLoader(made_up("training", 22, side=46), cfg, "cpu", train=True)
    valid = h.BatchLoader(made_up("validation", 11), cfg, "cpu", batch_size=5)
    score = h.evaluate(loss_fn.student, valid)
    forward = h.data_parallel(loss_fn)
    forward.eval()
    loss_fn.set_progress(0.5)
    batch = next(iter(train))  # 15 images, which two processes cannot share alike
    (forward(batch.images, batch.labels).loss * batch.weight).backward()
    gradient = torch.cat([p.grad.flatten() for p in loss_fn.parameters()])
    forward.train()(batch.images, batch.labels)
    own = h.state_checksum(loss_fn.student)
    h.share_buffers(loss_fn.student)
    return gradient, score, own, h.state_checksum(loss_fn.student)


def worker(folder, *command):
    """One of torchrun's processes: the command line, and its answers among the others."""
    run = h.run

    def answer_and_run(*arguments, **settings):
        torch.save(answers(), f"{folder}/{h.rank_and_world()[0]}.pt")
        return run(*arguments, **settings)

    h.run = answer_and_run
    sys.exit(h.main(command))


@pytest.fixture(scope="module")
def by_torchrun(trained, tmp_path_factory):
    """(folder in which two processes ran a small Medium and left their answers, what was said)."""
    folder = tmp_path_factory.mktemp("shell")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, folder, "run", "--stages", "medium"]
    command += ["--data", trained / "Food-11", "--out", folder / "out", "--views", "1"]
    threads = {"OMP_NUM_THREADS": str(max(1, h.usable_cpus() // 2))}
    done = subprocess.run(
        [*map(str, command), *settings_of(**SMALL)],
        env=os.environ | threads | {"HW13_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_two_processes_answer_as_one_and_leave_with_the_same_net(by_torchrun):
    gradient, score, *_ = answers()
    both = [torch.load(by_torchrun[0] / f"{rank}.pt") for rank in (0, 1)]
    for theirs, their_score, _, shared in both:
        assert torch.allclose(theirs, gradient, atol=1e-5, rtol=1e-3)
        assert their_score == pytest.approx(score)
        assert shared == both[0][2]
    assert both[1][2] != both[0][2]


def prepared_medium(root, out):
    """What fit_on_all takes: a small Medium of a data folder with a teacher."""
    data = h.read_folder(root / "Food-11")
    cfg = h.get_config("medium", **SMALL)
    loss_fn, folder = h.prepare_stage(cfg, data, h.load_teacher(data.teacher_path), out)
    return loss_fn, data, folder


def test_a_notebooks_processes_leave_the_run_that_torchrun_leaves(
    by_torchrun, trained, tmp_path, monkeypatch
):
    loss_fn, data, folder = prepared_medium(trained, tmp_path)
    monkeypatch.setattr(h, "n_gpus", lambda loss_fn: 2)
    assert len(h.train_stage(loss_fn, data, folder)[0]) == 2
    out = by_torchrun[0] / "out"
    theirs = without_seconds(out / "medium")
    assert same(without_seconds(folder.path), theirs)
    assert same(h.copy_of_weights(loss_fn.student), theirs["best"])
    # Only the first of two writes and speaks.
    assert h.validate_submission(out / "submission.csv", ids(5)) == 5
    assert by_torchrun[1].count("medium has the best") == 1


def test_an_edited_module_is_told(trained, tmp_path):
    loss_fn, _, folder = prepared_medium(trained, tmp_path)
    folder.check_code(loss_fn)
    folder.facts["code"]["the loss"][0] += 1.0
    with pytest.raises(h.UserError, match="helpers.py has changed .*restart the kernel"):
        folder.check_code(loss_fn)


RAISED = torch.multiprocessing.ProcessRaisedException("...\nhelpers.UserError: too hot\n", 0, 0)


@pytest.mark.parametrize(
    ("end", "error", "words"),
    [
        (RAISED, h.UserError, "^too hot$"),
        (KeyboardInterrupt, KeyboardInterrupt, "^$"),  # the button reached this process
        ([True], KeyboardInterrupt, "^$"),  # it reached the others
    ],
)
def test_the_end_of_the_processes_is_the_notebooks_too(
    end, error, words, trained, tmp_path, monkeypatch
):
    started = MagicMock(processes=[MagicMock(), MagicMock()])
    started.join.side_effect = end
    monkeypatch.setattr(torch.multiprocessing, "spawn", lambda *args, **options: started)
    with pytest.raises(error, match=words):
        h.fit_on_all(*prepared_medium(trained, tmp_path), 2)
    assert all(process.terminate.called for process in started.processes)


if __name__ == "__main__":
    worker(*sys.argv[1:])
