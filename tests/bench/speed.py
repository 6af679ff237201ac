"""Where the time of a Boss epoch goes, how far that is from the hardware's limit, and how the old way compares.

    HW13_PHOTOS=DIR python tests/bench/speed.py [--size 224] [--batch 128] [--steps 4] [--repeats 3] [--out FOLDER]

Prints three tables and stores them as CSV with a picture. A "side" is one way to run the same Boss training steps:

    device   the steps alone, on tensors that are on the device and augmented already
    ours     the same through BatchLoader
    old0/4   the homework's own loop: DataLoader with 0 or 4 workers, PIL transforms, fp32, channels-first, plain Adam

Every side runs in a process of its own, the sides in turn, so that a drift of a shared machine meets all of them; the
figures are medians, the ratios are taken within a turn.
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
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


class Steps:
    """The first `n` batches of a loader, as often as asked."""

    def __init__(self, loader, n):
        self.loader, self.n, self.epoch = loader, n, 0

    def __len__(self):
        return self.n

    def __iter__(self):
        return itertools.islice(self.loader, self.n)

    def set_epoch(self, epoch):
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)


def prepare(args, device):
    """(data, config, DistillLoss, TrainState, training BatchLoader) of a Boss stage."""
    data = h.find_data(args.data)
    cfg = h.get_config("boss", **DWPW, image_size=args.size, batch_size=args.batch)
    teacher, student = h.load_teacher(data.teacher, device), h.build_student(cfg).to(device)
    loss_fn = h.DistillLoss(cfg, student, teacher, h.amp_dtype(device)).to(device, memory_format=torch.channels_last)
    split = h.load_data(data, "training", "whole", cfg.image_size)
    return data, cfg, loss_fn, h.TrainState(loss_fn, cfg, device), h.BatchLoader(split, cfg, device, train=True)


def on_device(loader, n, dtype):
    """`n` batches as the networks want them, made before the clock starts."""
    return [h.Batch(b.images.to(dtype or torch.float32, memory_format=torch.channels_last), *b[1:])
            for b in itertools.islice(loader, n)]


def run_ours(args, device, ready):
    """Seconds an image of train_one_epoch; with `ready` on batches that are on the device and augmented."""
    _, cfg, loss_fn, state, loader = prepare(args, device)
    steps = on_device(loader, args.steps, loss_fn.dtype) if ready else Steps(loader, args.steps)

    def epoch():
        h.train_one_epoch(state, loss_fn, steps, cfg, 300)

    return seconds(epoch, device, 1) / (args.steps * args.batch)


def run_old(args, device, workers):
    """Seconds an image of the homework's loop: PIL in the loader, fp32, a number read back in every step."""
    data = h.find_data(args.data)
    cfg = h.get_config("boss", **DWPW, image_size=args.size, batch_size=args.batch, amp="off")
    teacher, student = h.load_teacher(data.teacher, device), h.build_student(cfg).to(device)
    loss_fn = h.DistillLoss(cfg, student, teacher).train()
    loss_fn.set_progress(0.5)
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    dataset = h.FoodDataset(data, "training", h.reference_transform(cfg, train=True))
    loader = DataLoader(dataset, cfg.batch_size, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda")
    n, start = 0, time.perf_counter()
    for step, (images, labels) in enumerate(loader):
        images, labels = images.to(device), labels.to(device)
        loss, logits, _ = loss_fn(images, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(loss_fn.parameters(), cfg.grad_norm_max)
        optimizer.step()
        loss.item(), (logits.argmax(1) == labels).float().mean().item()
        if step == 0:
            start = time.perf_counter()  # the first batch pays for warm-up and for starting the workers
            continue
        n += len(labels)
        if step == args.steps:
            break
    return (time.perf_counter() - start) / n


def compare_sides(args):
    """A DataFrame of seconds an image: a row a turn, a column a side."""
    rows = []
    for _ in range(args.repeats):
        row = {}
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            row[side] = json.loads(out.stdout.splitlines()[-1])
        rows.append(row)
        print({side: round(1 / value, 1) for side, value in row.items()}, "images/s", flush=True)
    return pd.DataFrame(rows)


def measure_parts(args, device):
    """{part: seconds an image} of one step's pieces, of decoding and of validation."""
    data, cfg, loss_fn, state, loader = prepare(args, device)
    loss_fn.train().set_progress(0.5)
    batch = on_device(loader, 1, loss_fn.dtype)[0]
    teacher, student = loss_fn.teacher, loss_fn.student

    def autocast(net, images):
        with torch.autocast(device.type, loss_fn.dtype, enabled=loss_fn.dtype is not None):
            return net(images)

    def teach():
        with torch.no_grad():
            autocast(teacher, batch.images)

    draw, rows = loader._draw(), batch.rows

    def backward():
        loss = loss_fn(batch.images, batch.labels)[0]
        loss.backward()

    def views():
        images = loader.views_of(rows, draw)
        images.to(loss_fn.dtype or torch.float32, memory_format=torch.channels_last)

    times = {
        "draw": seconds(loader._draw, device, args.repeats) / len(loader.split),
        "warp": seconds(views, device, args.repeats) / args.batch,
        "teacher": seconds(teach, device, args.repeats) / args.batch,
        "student forward": seconds(lambda: autocast(student, batch.images), device, args.repeats) / args.batch,
    }
    forward = seconds(lambda: loss_fn(batch.images, batch.labels), device, args.repeats) / args.batch
    both = seconds(backward, device, args.repeats) / args.batch
    loss = loss_fn(batch.images, batch.labels)[0]
    loss.backward()
    times["alignment and losses"] = max(forward - times["teacher"] - times["student forward"], 0)
    times["backward"] = both - forward
    times["optimizer"] = seconds(state.optimizer.step, device, args.repeats) / args.batch
    valid = h.BatchLoader(h.load_data(data, "validation", "eval", cfg.image_size), cfg, device, batch_size=256)
    few = list(itertools.islice(valid, 2))
    times["validation (an image)"] = seconds(lambda: h.evaluate(student, few), device, 1) / sum(len(b[1]) for b in few)
    for pixels in (None, 512):
        times[f"decode once ({'512 px' if pixels else 'as they are'})"] = decode(args, data, pixels)
    return times


def decode(args, data, pixels, n=384):
    """Seconds an image of filling the cache with `n` pictures, enlarged to `pixels` on the longer side if given."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i, path in enumerate(data.files["training"][:: len(data.files["training"]) // n][:n]):
            target = Path(folder) / f"{i:05d}.jpg"
            if pixels:
                with Image.open(path) as image:
                    scale = pixels / max(image.size)
                    image.convert("RGB").resize(tuple(round(s * scale) for s in image.size)).save(target, quality=90)
            else:
                shutil.copy(path, target)
            files.append(target)
        few = h.dataclasses.replace(data, root=Path(folder), files={"training": files}, labels={"training": [0] * n},
                                    ids={"training": [p.stem for p in files]})
        with mock.patch.dict(os.environ, HW13_CACHE=folder):
            start = time.perf_counter()
            h.load_data(few, "training", "whole", args.size)
            elapsed = time.perf_counter() - start
        return elapsed / n


def floor(args, device):
    """What an image costs at the rates that this device reaches: a table of FLOPs, bytes, rates and seconds.

    FLOPs: 2 a multiply-add, teacher once, student three times (forward, and two products backward). Bytes: every
    layer's output written once and read once in the training precision, the student's three times over.
    """
    cfg = h.get_config("boss", **DWPW, image_size=args.size)
    dtype = h.amp_dtype(device) or torch.float32
    student, teacher = h.build_student(cfg), h.build_student(h.Config(student="resnet18"))
    flops = 2 * (h.count_macs(teacher, args.size) + 3 * h.count_macs(student, args.size))

    def outputs(net):
        return sum(h.math.prod(shape) for _, shape, *_ in h._trace(net, args.size))

    moved = 2 * dtype.itemsize * (outputs(teacher) + 3 * outputs(student))
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    matmul = 2 * size**3 / seconds(lambda: a @ a, device, 5)
    block = torch.empty(2**28 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    copy = 2 * block.nbytes / seconds(lambda: target.copy_(block), device, 5)
    return pd.DataFrame({
        "an image needs": [flops / 1e9, moved / 1e6], "unit": ["GFLOP", "MB"],
        "measured rate, a second": [matmul / 1e12, copy / 1e9], "rate unit": ["TFLOP", "GB"],
        "seconds an image": [flops / matmul, moved / copy]}, index=["arithmetic", "memory"])


def picture(sides, parts, title):
    """Seconds for an epoch of 9,993 images, from seconds an image of each side and of the parts of ours."""
    figure, axes = h._figure(title, 1, 2, 11, 3.4)
    n = h.HOMEWORK_COUNTS["training"]
    names = {"device": "steps alone", "ours": "ours", "old0": "old way, 0 workers", "old4": "old way, 4 workers"}
    bars = axes[0, 0].barh([names[s] for s in SIDES], [sides[s] * n for s in SIDES],
                           color=["#999999", "#009E73", "#E69F00", "#D55E00"], edgecolor="black")
    axes[0, 0].bar_label(bars, fmt="{:,.1f} s", padding=3)
    axes[0, 0].set_xlabel("seconds an epoch of 9,993 images")
    axes[0, 0].margins(x=0.25)
    axes[0, 0].invert_yaxis()
    inside = [k for k in parts if not k.startswith(("decode", "validation"))]
    bars = axes[0, 1].barh(inside, [parts[k] * n for k in inside], color="#56B4E9", edgecolor="black")
    axes[0, 1].bar_label(bars, fmt="{:,.2f} s", padding=3)
    axes[0, 1].set_xlabel("seconds an epoch, parts of ours measured alone")
    axes[0, 1].margins(x=0.25)
    axes[0, 1].invert_yaxis()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    if args.side and args.side.startswith("old"):  # without pick_device: its memory setting is ours
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return print(json.dumps(run_old(args, device, int(args.side[3:]))))
    device = h.pick_device()
    if args.side:
        return print(json.dumps(run_ours(args, device, ready=args.side == "device")))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    title = f"{name}, {args.size} px, batch {args.batch}, {time.strftime('%Y-%m-%d')}"
    sides = compare_sides(args)
    parts, limit = measure_parts(args, device), floor(args, device)
    n = h.HOMEWORK_COUNTS["training"]
    ratios = pd.DataFrame({"share of arithmetic": sides["ours"] / sides["device"],
                           "times faster than 0 workers": sides["old0"] / sides["ours"],
                           "times faster than 4 workers": sides["old4"] / sides["ours"]})
    print(f"\n{title}\n\nseconds for {n} images, median of {len(sides)} turns")
    print((sides.median() * n).round(1).to_string())
    print("\nratios within a turn: median, lowest, highest")
    print(ratios.agg(["median", "min", "max"]).T.round(2).to_string())
    print(f"\nparts, milliseconds an image\n{(pd.Series(parts) * 1000).round(3).to_string()}")
    print(f"\nfloor\n{limit.round(4).to_string()}")
    print(f"steps alone: {sides['device'].median() / limit['seconds an image'].sum():.2f} times arithmetic plus memory")
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"speed-{'gpu' if device.type == 'cuda' else 'cpu'}"
    rows = [*((f"seconds an image: {s}", v) for s, v in sides.median().items()),
            *((f"ratio: {k}", v) for k, v in ratios.median().items()),
            *((f"part, seconds an image: {k}", v) for k, v in parts.items()),
            *((f"floor, seconds an image: {k}", v) for k, v in limit["seconds an image"].items())]
    frame = pd.DataFrame(rows, columns=["figure", "value"])
    frame["machine"] = title
    frame.to_csv(stem.with_suffix(".csv"), index=False)
    picture(sides.median(), parts, f"a training epoch of Boss: {title}").savefig(stem.with_suffix(".png"), dpi=100)
    return None


if __name__ == "__main__":
    main()
