"""Where the time of a Boss epoch goes, how far that is from the hardware's limit and the old way.

    HW13_PHOTOS=DIR python tests/bench/speed.py [--size 224] [--batch 128] [--steps 4] [--repeats 3]
        [--out FOLDER]

Prints three tables and stores them as CSV with a picture. A "side" is one way to run the same Boss
training steps:

    device   the steps alone, on tensors that are on the device and augmented already
    ours     the same through BatchLoader
    old0/4   the homework's own loop: DataLoader with 0 or 4 workers, PIL transforms, fp32,
             channels-first, plain Adam

Every side runs in a process of its own, the sides in turn, so that a drift of a shared machine
meets
all of them; the figures are medians, the ratios are taken within a turn.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from shared import DWPW  # noqa: E402

import helpers as h  # noqa: E402

SIDES = ("device", "ours", "old0", "old4")


def seconds(function, device, repeats=3):
    """Median seconds of a call after one warm-up; CUDA events on a GPU."""
    function()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            times.append(cuda_seconds(function))
            continue
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    times.sort()
    return times[len(times) // 2]


def cuda_seconds(function):
    """Seconds that the GPU takes for a call."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


class Steps:
    """The first `n` batches of a loader, as often as asked."""

    def __init__(self, loader, n):
        self.loader = loader
        self.n = n
        self.epoch = 0

    def __len__(self):
        return self.n

    def __iter__(self):
        return itertools.islice(self.loader, self.n)

    def set_epoch(self, epoch):
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)


def prepare(args, device):
    """(data, TrainState, training BatchLoader) of a Boss stage with the course's blocks."""
    data = h.find_data(args.data)
    cfg = h.get_config("boss", **DWPW, image_size=args.size, batch_size=args.batch)
    teacher = h.load_teacher(data.teacher_path)
    loss_fn = h.DistillLoss(cfg, h.build_student(cfg), teacher).on(device)
    split = h.load_data(data, "training", "whole", cfg.image_size)
    loader = h.BatchLoader(split, cfg, device, train=True)
    loader.move_images()
    return data, h.TrainState(loss_fn), loader


def on_device(loader, n, dtype):
    """`n` batches as the networks want them, made before the clock starts."""
    batches = []
    for batch in itertools.islice(loader, n):
        images = h.to_device(batch.images, batch.images.device, dtype or torch.float32)
        batches.append(batch._replace(images=images))
    return batches


def run_ours(args, device, ready):
    """Seconds an image of train_one_epoch; `ready`: on batches that are made before."""
    _, state, loader = prepare(args, device)
    steps = Steps(loader, args.steps)
    if ready:
        steps = on_device(loader, args.steps, state.loss_fn.dtype)

    def epoch():
        h.train_one_epoch(state, state.loss_fn, steps, 300)

    return seconds(epoch, device, 1) / (args.steps * args.batch)


def run_old(args, device, workers):
    """Seconds an image of the homework's loop."""
    data = h.find_data(args.data)
    cfg = h.get_config("boss", **DWPW, image_size=args.size, batch_size=args.batch)
    loss_fn, optimizer, loader = old_training(cfg, data, device, workers)
    n = 0
    for step, (images, labels) in enumerate(loader):
        old_step(loss_fn, optimizer, images, labels)
        if step == 0:  # the first batch pays for warm-up and for starting the workers
            start = time.perf_counter()
            continue
        n += len(labels)
        if step == args.steps:
            break
    return (time.perf_counter() - start) / n


def old_training(cfg, data, device, workers):
    """(DistillLoss, Adam, DataLoader) of the homework's loop: fp32, PIL in the loader.

    The teacher lies in memory as `load_teacher` lays it, channels last, which on a CPU does the old
    way a favour (a sixth of the teacher's time).
    """
    cfg = h.replace(cfg, amp="off")
    teacher = h.load_teacher(data.teacher_path, device)
    student = h.build_student(cfg).to(device)
    loss_fn = h.DistillLoss(cfg, student, teacher).train()
    loss_fn.set_progress(0.5)
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    dataset = h.FoodDataset(data, "training", h.reference_transform(cfg, train=True))
    pin = device.type == "cuda"
    loader = DataLoader(dataset, cfg.batch_size, shuffle=True, num_workers=workers, pin_memory=pin)
    return loss_fn, optimizer, loader


def old_step(loss_fn, optimizer, images, labels):
    """A step of the homework's loop, which reads loss and accuracy back: the loss, a number."""
    images = images.to(loss_fn.device)
    labels = labels.to(loss_fn.device)
    out = loss_fn(images, labels)
    optimizer.zero_grad()
    out.loss.backward()
    nn.utils.clip_grad_norm_(loss_fn.parameters(), loss_fn.cfg.grad_norm_max)
    optimizer.step()
    (out.student_logits.argmax(1) == labels).float().mean().item()
    return out.loss.item()


def compare_sides(args):
    """A DataFrame of seconds an image: a row a turn, a column a side."""
    rows = []
    for _ in range(args.repeats):
        row = {}
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            out = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            row[side] = json.loads(out.stdout.splitlines()[-1])
        rows.append(row)
        print({side: round(1 / value, 1) for side, value in row.items()}, "images/s", flush=True)
    return pd.DataFrame(rows)


def measure_parts(args, device):
    """{part: seconds an image} of one step's pieces, of decoding and of validation."""
    data, state, loader = prepare(args, device)
    times = measure_step(args, device, state, loader)
    size = state.loss_fn.cfg.image_size
    split = h.load_data(data, "validation", "eval", size)
    valid_loader = h.BatchLoader(split, state.loss_fn.cfg, device, batch_size=256)
    few = list(itertools.islice(valid_loader, 2))
    n_images = sum(len(batch.labels) for batch in few)
    validation = seconds(lambda: h.evaluate(state.loss_fn.student, few), device, 1)
    times["validation (an image)"] = validation / n_images
    times["decode once (as they are)"] = decode(args, data, None)
    times["decode once (512 px)"] = decode(args, data, 512)
    return times


def measure_step(args, device, state, loader):
    """{part: seconds an image} of one training step's pieces, each measured alone."""
    loss_fn = state.loss_fn
    loss_fn.train().set_progress(0.5)
    batch = on_device(loader, 1, loss_fn.dtype)[0]
    draw = loader.draw_epoch()

    def views():
        images = loader.views_of(batch.rows, draw)
        h.to_device(images, device, loss_fn.dtype or torch.float32)

    def autocast():
        return torch.autocast(device.type, loss_fn.dtype, enabled=loss_fn.dtype is not None)

    def teacher_forward():
        with torch.no_grad(), autocast():
            loss_fn.teacher(batch.images)

    def student_forward():
        with autocast():
            loss_fn.student(batch.images)

    def forward():
        return loss_fn(batch.images, batch.labels).loss

    def both():
        forward().backward()

    def an_image(function):
        return seconds(function, device, args.repeats) / args.batch

    times = {"draw": seconds(loader.draw_epoch, device, args.repeats) / len(loader.split)}
    times["warp"] = an_image(views)
    times["teacher"] = an_image(teacher_forward)
    times["student forward"] = an_image(student_forward)
    all_forward = an_image(forward)
    nets = times["teacher"] + times["student forward"]
    times["alignment and losses"] = max(all_forward - nets, 0)
    times["backward"] = an_image(both) - all_forward
    times["optimizer"] = an_image(state.optimizer.step)  # with the gradients that `both` left
    return times


def decode(args, data, pixels, n=384):
    """Seconds an image of filling the cache with `n` pictures.

    They are enlarged to `pixels` on the longer side, if given.
    """
    every = len(data.files["training"]) // n
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i, path in enumerate(data.files["training"][::every][:n]):
            files.append(Path(folder) / f"{i:05d}.jpg")
            if pixels:
                enlarge(path, files[-1], pixels)
            else:
                shutil.copy(path, files[-1])
        few = h.dataclasses.replace(
            data,
            root=Path(folder),
            files={"training": files},
            labels={"training": [0] * n},
            ids={"training": [path.stem for path in files]},
        )
        with mock.patch.dict(os.environ, HW13_CACHE=folder):
            start = time.perf_counter()
            h.load_data(few, "training", "whole", args.size)
            return (time.perf_counter() - start) / n


def enlarge(path, target, pixels):
    """Save a picture with its longer side enlarged to `pixels`."""
    with Image.open(path) as image:
        scale = pixels / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image.convert("RGB").resize(size).save(target, quality=90)


def floor(args, device):
    """What an image costs at the rates that this device reaches.

    A table of FLOPs, bytes, rates and seconds. FLOPs: 2 a multiply-add, teacher once, student three
    times (forward, and two products backward). Bytes: every layer's output written once and read
    once in the training precision, the student's three times over.
    """
    cfg = h.get_config("boss", **DWPW, image_size=args.size)
    dtype = h.amp_dtype(device) or torch.float32
    student = h.build_student(cfg)
    teacher = h.build_student(h.Config(student="resnet18"))
    macs = h.count_macs(teacher, args.size) + 3 * h.count_macs(student, args.size)
    outputs = count_outputs(teacher, args.size) + 3 * count_outputs(student, args.size)
    flops = 2 * macs
    moved = 2 * dtype.itemsize * outputs
    matmul = matmul_rate(device, dtype)
    copy = copy_rate(device)
    return pd.DataFrame(
        {
            "an image needs": [flops / 1e9, moved / 1e6],
            "unit": ["GFLOP", "MB"],
            "measured rate, a second": [matmul / 1e12, copy / 1e9],
            "rate unit": ["TFLOP", "GB"],
            "seconds an image": [flops / matmul, moved / copy],
        },
        index=["arithmetic", "memory"],
    )


def count_outputs(net, size):
    """Numbers that the layers of a net give for one image."""
    return sum(h.math.prod(shape) for _, shape, _ in h.trace_calls(net, size))


def matmul_rate(device, dtype):
    """FLOPs a second of a large matrix product."""
    size = 2048
    if device.type == "cuda":
        size = 8192
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / seconds(lambda: a @ a, device, 5)


def copy_rate(device):
    """Bytes a second that a copy reads and writes."""
    n_bytes = 2**27
    if device.type == "cuda":
        n_bytes = 2**28
    block = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    return 2 * n_bytes / seconds(lambda: target.copy_(block), device, 5)


SIDE_NAMES = {
    "device": "steps alone",
    "ours": "ours",
    "old0": "old way, 0 workers",
    "old4": "old way, 4 workers",
}


def picture(sides, parts, title):
    """Seconds for an epoch of 9,993 images, from seconds an image of each side and of our parts."""
    n = h.HOMEWORK_COUNTS["training"]
    figure, ((left, right),) = h.new_figure(title, 1, 2, 11, 3.4)
    colours = ["#999999", "#009E73", "#E69F00", "#D55E00"]
    names = [SIDE_NAMES[side] for side in SIDES]
    bars = left.barh(names, [sides[s] * n for s in SIDES], color=colours, edgecolor="black")
    left.bar_label(bars, fmt="{:,.1f} s", padding=3)
    left.set_xlabel("seconds an epoch of 9,993 images")

    in_a_step = [name for name in parts if not name.startswith(("decode", "validation"))]
    times = [parts[name] * n for name in in_a_step]
    bars = right.barh(in_a_step, times, color="#56B4E9", edgecolor="black")
    right.bar_label(bars, fmt="{:,.2f} s", padding=3)
    right.set_xlabel("seconds an epoch, parts of ours measured alone")
    for ax in (left, right):
        ax.margins(x=0.25)
        ax.invert_yaxis()
    return figure


def ratios_of(sides):
    """A DataFrame of the ratios within each turn."""
    return pd.DataFrame(
        {
            "share of arithmetic": sides["ours"] / sides["device"],
            "times faster than 0 workers": sides["old0"] / sides["ours"],
            "times faster than 4 workers": sides["old4"] / sides["ours"],
        }
    )


def report(title, sides, ratios, parts, limit):
    """Print the tables."""
    n = h.HOMEWORK_COUNTS["training"]
    print(f"\n{title}\n\nseconds for {n} images, median of {len(sides)} turns")
    print((sides.median() * n).round(1).to_string())
    print("\nratios within a turn: median, lowest, highest")
    print(ratios.agg(["median", "min", "max"]).T.round(2).to_string())
    print(f"\nparts, milliseconds an image\n{(pd.Series(parts) * 1000).round(3).to_string()}")
    print(f"\nfloor\n{limit.round(4).to_string()}")
    times = sides["device"].median() / limit["seconds an image"].sum()
    print(f"steps alone: {times:.2f} times arithmetic plus memory")


def as_rows(sides, ratios, parts, limit):
    """All figures as a DataFrame of two columns."""
    groups = {
        "seconds an image": sides.median(),
        "ratio": ratios.median(),
        "part, seconds an image": parts,
        "floor, seconds an image": limit["seconds an image"],
    }
    rows = []
    for group, values in groups.items():
        for name, value in values.items():
            rows.append((f"{group}: {name}", value))
    return pd.DataFrame(rows, columns=["figure", "value"])


def run_side(args):
    """Print the seconds an image of one side, for the process that compares them."""
    if args.side.startswith("old"):  # without pick_device: its memory setting is ours
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(json.dumps(run_old(args, device, int(args.side[3:]))))
    else:
        print(json.dumps(run_ours(args, h.pick_device(), ready=args.side == "device")))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=os.environ.get("HW13_PHOTOS"))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--side", choices=SIDES)
    args = parser.parse_args()
    if not args.data:
        sys.exit("name a data folder with --data DIR or HW13_PHOTOS")
    if args.side:
        run_side(args)
        return
    device = h.pick_device()
    name = f"{os.cpu_count()} CPU cores"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    title = f"{name}, {args.size} px, batch {args.batch}, {time.strftime('%Y-%m-%d')}"
    sides = compare_sides(args)
    parts = measure_parts(args, device)
    limit = floor(args, device)
    ratios = ratios_of(sides)
    report(title, sides, ratios, parts, limit)

    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"speed-{'gpu' if device.type == 'cuda' else 'cpu'}"
    frame = as_rows(sides, ratios, parts, limit)
    frame["machine"] = title
    frame.to_csv(stem.with_suffix(".csv"), index=False)
    figure = picture(sides.median(), parts, f"a training epoch of Boss: {title}")
    figure.savefig(stem.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
