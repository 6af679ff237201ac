"""Does a set of any size go through one cache at the same pace and in the same memory?

    HW13_PHOTOS=DIR python tests/bench/scale.py [--times 1 4 16] [--size 128] [--out FOLDER]

Links the training photographs 1, 4 and 16 times into a data folder and, in a process of its own for
each, decodes them into the cache, makes every augmented view of two epochs, without a network, and
takes some Boss training steps with a random teacher. Prints milliseconds an image (decoding; the
views of the first epoch, which maps the file, and of the second; a training step) and the largest
private memory (anonymous pages; the mapped cache file is shared and can be dropped).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from shared import DWPW  # noqa: E402
from speed import Steps  # noqa: E402

import helpers as h  # noqa: E402


def private_memory():
    """Megabytes of this process that no file backs, now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            kilobytes = int(line.split()[1])
            return kilobytes / 1024
    raise OSError("/proc/self/status holds no RssAnon")


def copies(data, times, folder):
    """The data with its training photographs `times` times, as hard links or copies under other
    names.
    """
    target = Path(folder) / "training"
    target.mkdir()
    files = []
    labels = []
    for copy in range(times):
        for path, label in zip(data.files["training"], data.labels["training"], strict=True):
            name = target / f"{label}_{copy:02d}{path.stem.split('_')[1]}.jpg"
            try:
                os.link(path, name)
            except OSError:
                name.symlink_to(path)
            files.append(name)
            labels.append(label)
    return h.dataclasses.replace(
        data,
        root=Path(folder),
        files={"training": files},
        labels={"training": labels},
        ids={"training": [path.stem for path in files]},
    )


def measure(data, times, size):
    """Milliseconds an image and megabytes for `times` the training set."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HW13_CACHE"] = folder
        many = copies(data, times, folder)
        device = h.pick_device()
        start = time.perf_counter()
        split = h.load_data(many, "training", "whole", size)
        row = {"images": len(split), "decode": milliseconds_since(start, len(split))}
        cfg = h.get_config("boss", **DWPW, image_size=size)
        loader = h.BatchLoader(split, cfg, device, train=True)
        loader.move_images()
        memory = private_memory()
        for epoch, name in enumerate(("views, first epoch", "views, second epoch")):
            loader.set_epoch(epoch)
            start = time.perf_counter()
            for _ in loader:
                memory = max(memory, private_memory())
            if device.type == "cuda":
                torch.cuda.synchronize()  # the views are asked for, but may not be made yet
            row[name] = milliseconds_since(start, len(split))
        row["training step"] = measure_step(cfg, loader, device)
        row["private MB"] = max(memory, private_memory())
        row["cache MB"] = split.cache.stat().st_size / 1e6
        return row


def milliseconds_since(start, n):
    """Milliseconds since `start` for each of `n` images."""
    return 1000 * (time.perf_counter() - start) / n


def measure_step(cfg, loader, device):
    """Milliseconds an image of some Boss training steps, after as many to warm up."""
    teacher = h.freeze(h.build_student(h.TEACHER_CONFIG))
    loss_fn = h.DistillLoss(cfg, h.build_student(cfg), teacher).on(device)
    state = h.TrainState(loss_fn)
    steps = Steps(loader, 8)
    h.train_one_epoch(state, loss_fn, steps, 0)
    start = time.perf_counter()
    h.train_one_epoch(state, loss_fn, steps, 1)
    return milliseconds_since(start, steps.n * cfg.batch_size)


def measure_in_a_process(times):
    """The row of `measure`, from a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", str(times)]
    result = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return {"times": times, **json.loads(result.stdout.splitlines()[-1])}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=os.environ.get("HW13_PHOTOS"))
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.data:
        sys.exit("name a data folder with --data DIR or HW13_PHOTOS")
    if args.one:
        print(json.dumps(measure(h.find_data(args.data), args.one, args.size)))
        return
    frame = pd.DataFrame([measure_in_a_process(times) for times in args.times])
    whole_run = frame["decode"] + 10 * frame["training step"]
    frame["whole run of 10 epochs"] = whole_run
    frame["against the smallest"] = whole_run / whole_run[0]
    frame["machine"] = f"{os.cpu_count()} CPU cores, {args.size} px, {time.strftime('%Y-%m-%d')}"
    print(frame.round(3).to_string(index=False))
    args.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(args.out / "scale.csv", index=False)


if __name__ == "__main__":
    main()
