"""One of several processes started by test_parallel.py with torch.distributed.run: argv is a task
and its arguments.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import helpers as h  # noqa: E402


def gradients(data_folder, teacher_file, result):
    """Gradients of one Boss step over all processes, batch norm in eval mode, to compare with one
    process's.
    """
    cfg = h.get_config("boss", image_size=64, batch_size=22, amp="off")
    loss_fn = h.DistillLoss(cfg, h.build_student(cfg), h.load_teacher(teacher_file))
    loader = h.build_loaders(cfg, h.find_data(data_folder), torch.device("cpu"))[0]
    loss_fn.set_progress(0.5)
    forward = h.data_parallel(loss_fn)
    forward.eval()
    batch = next(iter(loader))
    (forward(batch.images, batch.labels).loss * batch.weight).backward()
    if h.rank_and_world()[0] == 0:
        torch.save({name: p.grad for name, p in loss_fn.named_parameters()}, result)


def die():
    """The second process fails while the first waits for it."""
    if h.rank_and_world()[0] == 1:
        raise h.UserError("this process cannot go on")
    torch.distributed.barrier()


def disagree():
    """The second process has another learning rate."""
    rank = h.rank_and_world()[0]
    h.check_processes_agree({"lr": 0.1 * rank, "n_epochs": 2, "time_limit_h": rank})


def main_killed(log, *command):
    """helpers.py's command line, in which the second process dies once `log` has three epochs."""
    if os.environ["RANK"] == "1":
        threading.Thread(target=die_after_epochs, args=(Path(log),), daemon=True).start()
    sys.exit(h.main(list(command)))


def die_after_epochs(log):
    while not log.is_file() or len(log.read_text().splitlines()) < 4:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    os.environ["HW13_FAST"] = "1"
    task = globals()[sys.argv[1]]
    if task is main_killed:  # it joins the group by itself
        task(*sys.argv[2:])
    with h.process_group():
        task(*sys.argv[2:])
