"""Does a set of any size go through one cache at the same pace and in the same memory?

    HW13_PHOTOS=DIR python tests/bench/scale.py [--times 1 4 16] [--size 128] [--out FOLDER]

Links the training photographs 1, 4 and 16 times into a data folder and, in a process of its own for
each, decodes them into the cache, makes every augmented view of an epoch, without a network, and
takes some Boss training steps with the data's teacher. Prints milliseconds per image (decoding; the
views; a training step) and private memory at the end (anonymous pages; the mapped
cache file is shared and can be dropped).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import pandas as pd

import helpers as h

STEPS = 8


def private_memory():
    """Megabytes of this process that no file backs, now."""
    status = Path("/proc/self/status").read_text()
    kilobytes = status.split("RssAnon:")[1].split()[0]
    return int(kilobytes) / 1024


def copies(data, times, folder):
    """The data with links to its training photographs, `times` times, under other names."""
    files = []
    for copy in range(times):
        for path in data.files["training"]:
            link = folder / f"{copy:02d}_{path.name}"
            link.symlink_to(path.resolve())
            files.append(link)
    many = {"files": {"training": files}, "ids": {"training": [path.stem for path in files]}}
    labels = {"training": data.labels["training"] * times}
    return h.replace(data, root=folder, labels=labels, **many)


def measure(args):
    """Milliseconds per image and megabytes for `args.one` times the training set."""
    device = h.pick_device()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HW13_CACHE"] = folder
        many = copies(common.find_data(args), args.one, Path(folder))
        start = time.perf_counter()
        n = len(h.load_data(many, "training", "whole", args.size))
        row = {"images": n, "decode": 1000 * (time.perf_counter() - start) / n}
        state, loader = common.prepare(args, many, device)
        start = time.perf_counter()
        for _ in loader:
            pass
        row["views, first epoch"] = 1000 * (time.perf_counter() - start) / n
        steps = common.Steps(loader, min(STEPS, len(loader)))

        def epoch_of_steps():
            h.train_one_epoch(state, state.loss_fn, steps, 0)

        taken = common.seconds(epoch_of_steps, device, 1)
        row["training step"] = 1000 * taken / (len(steps) * args.batch)
        row["private MB"] = private_memory()
    return row


def measure_in_a_process(times):
    """The row of `measure`, from a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", str(times)]
    result = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    return {"times": times, **json.loads(result.stdout.splitlines()[-1])}


def main():
    args = common.arguments(__doc__, times=[1, 4, 16], size=128, batch=128, one=0)
    if args.one:
        print(json.dumps(measure(args)))
        return
    frame = pd.DataFrame([measure_in_a_process(times) for times in args.times])
    whole_run = frame["decode"] + 10 * frame["training step"]
    frame["whole run of 10 epochs"] = whole_run
    frame["against the smallest"] = whole_run / whole_run[0]
    machine = f"{common.machine_name()}, {args.size} px, {common.today()}"
    common.store(frame, args.out / "scale.csv", machine=machine)


if __name__ == "__main__":
    main()
