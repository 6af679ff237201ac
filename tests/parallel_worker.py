"""One of several processes started by test_parallel.py with torch.distributed.run: argv is a task
and its arguments.
"""

import os
import sys
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


if __name__ == "__main__":
    os.environ["HW13_FAST"] = "1"
    with h.process_group():
        globals()[sys.argv[1]](*sys.argv[2:])
