"""What the benches share: the command line, the clock, a Boss training, and where helpers.py is."""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

import pandas as pd
import torch

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
sys.path[:0] = [str(BENCH.parent), str(BENCH.parent.parent)]

import helpers as h  # noqa: E402


def arguments(doc, argv=None, **defaults):
    """The command line's values: --data, --out, and an option per keyword.

    An option has its default's type; a list takes one value or more. doc: the script's docstring.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=os.environ.get("HW13_PHOTOS"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    for name, default in defaults.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(default, list):
            parser.add_argument(option, type=type(default[0]), nargs="+", default=default)
        else:
            parser.add_argument(option, type=type(default), default=default)
    return parser.parse_args(argv)


def find_data(args):
    """The FoodData of --data or HW13_PHOTOS; the program ends where neither names a folder."""
    if not args.data:
        sys.exit("name a data folder with --data DIR or HW13_PHOTOS")
    return h.find_data(args.data)


def thinned(data, every, most=None):
    """The FoodData with every `every`-th of its training images, `most` of them at most."""
    fewer = {}
    for name in ("files", "labels", "ids"):
        splits = getattr(data, name)
        fewer[name] = {**splits, "training": splits["training"][::every][:most]}
    return h.replace(data, **fewer)


def store(rows, path, **columns):
    """Write rows (dicts, or a DataFrame) as a CSV, and print the last; columns: one value each."""
    frame = pd.DataFrame(rows).assign(**columns)
    print(frame.tail(10).round(4).to_string(index=False), flush=True)
    h.write_text(path, frame.to_csv(index=False, float_format="%.5g"))


def today():
    """The date, as rows have it."""
    return time.strftime("%Y-%m-%d")


def machine_name():
    """The card, or how many cores there are."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores"


def seconds(function, device, repeats=3):
    """Median seconds of a call after one warm-up; a GPU is waited for."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


class Steps:
    """The first `n` batches of a loader, as often as asked."""

    def __init__(self, loader, n):
        self.loader = loader
        self.n = n

    def __len__(self):
        return self.n

    def __iter__(self):
        return itertools.islice(self.loader, self.n)


def prepare(args, data, device, student=None):
    """(TrainState, training BatchLoader) of Boss, with the data's teacher.

    student: a net in the place of the stage's.
    """
    cfg = h.replace(h.BOSS, image_size=args.size, batch_size=args.batch)
    h.keep_freed_memory()
    teacher = h.load_teacher(data.teacher_path)
    loss_fn = h.DistillLoss(cfg, student or h.build_student(cfg), teacher).on(device)
    split = h.load_data(data, "training", h.training_form(cfg), cfg.image_size)
    return h.TrainState(loss_fn), h.BatchLoader(split, cfg, device, train=True)
