"""Does a set of any size go through one cache at the same pace and in the same memory?

    HW13_PHOTOS=DIR python tests/bench/scale.py [--times 1 4 16] [--size 128] [--out FOLDER]

Links the training photographs 1, 4 and 16 times into a data folder and, in a process of its own for each, decodes them
into the cache, makes every augmented view of two epochs, without a network, and takes some Boss training steps with a
random teacher. Prints milliseconds an image (decoding; the views of the first epoch, which maps the file, and of the
second; a training step) and the largest private memory (anonymous pages; the mapped cache file is shared and can be
dropped).
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

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from shared import DWPW  # noqa: E402
from speed import Steps  # noqa: E402

import helpers as h  # noqa: E402


def private_memory():
    """Megabytes of this process that no file backs, now."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def copies(data, times, folder):
    """The data with its training photographs `times` times, as hard links or copies under other names."""
    target = Path(folder) / "training"
    target.mkdir()
    files, labels = [], []
    for copy in range(times):
        for path, label in zip(data.files["training"], data.labels["training"], strict=True):
            name = target / f"{label}_{copy:02d}{path.stem.split('_')[1]}.jpg"
            try:
                os.link(path, name)
            except OSError:
                name.symlink_to(path)
            files.append(name)
            labels.append(label)
    return h.dataclasses.replace(data, root=Path(folder), files={"training": files}, labels={"training": labels},
                                 ids={"training": [p.stem for p in files]})


def measure(data, times, size):
    """Seconds and memory for `times` the training set."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HW13_CACHE"] = folder
        many = copies(data, times, folder)
        device = h.pick_device()
        times, start = {}, time.perf_counter()
        split = h.load_data(many, "training", "whole", size)
        times["decode"] = 1000 * (time.perf_counter() - start) / len(split)
        cfg = h.get_config("boss", **DWPW, image_size=size)
        loader, memory = h.BatchLoader(split, cfg, device, train=True), private_memory()
        for epoch, name in enumerate(("views, first epoch", "views, second epoch")):
            loader.set_epoch(epoch)
            start = time.perf_counter()
            for _ in loader:
                memory = max(memory, private_memory())
            times[name] = 1000 * (time.perf_counter() - start) / len(split)
        teacher = h.freeze(h.build_student(h.TEACHER_CONFIG))
        loss_fn = h.DistillLoss(cfg, h.build_student(cfg), teacher, h.amp_dtype(device)).to(device)
        state = h.TrainState(loss_fn, cfg, device)
        steps = Steps(loader, 8)
        h.train_one_epoch(state, loss_fn, steps, cfg, 0)
        start = time.perf_counter()
        h.train_one_epoch(state, loss_fn, steps, cfg, 1)
        times["training step"] = 1000 * (time.perf_counter() - start) / (steps.n * cfg.batch_size)
        memory = max(memory, private_memory())
        return {"images": len(split), **times, "private MB": memory, "cache MB": split.cache.stat().st_size / 1e6}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("HW13_PHOTOS"))
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.data:
        sys.exit("name a data folder with --data DIR or HW13_PHOTOS")
    if args.one:
        return print(json.dumps(measure(h.find_data(args.data), args.one, args.size)))
    rows = []
    for times in args.times:
        out = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", str(times)], check=True, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
        rows.append({"times": times, **json.loads(out.splitlines()[-1])})
    frame = pd.DataFrame(rows)
    frame["whole run of 10 epochs"] = frame["decode"] + 10 * frame["training step"]
    frame["against the smallest"] = frame["whole run of 10 epochs"] / frame["whole run of 10 epochs"][0]
    frame["machine"] = f"{os.cpu_count()} CPU cores, {args.size} px, {time.strftime('%Y-%m-%d')}"
    print(frame.round(3).to_string(index=False))
    args.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(args.out / "scale.csv", index=False)
    return None


if __name__ == "__main__":
    main()
