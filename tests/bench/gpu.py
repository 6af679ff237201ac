"""A plan for half an hour of a GPU: each row's prediction stands here, its outcome comes with it.

    HW13_PHOTOS=DIR python tests/bench/gpu.py [--out FOLDER] [--minutes 8] [--size 224]

The same command again and again: each call runs the rows that are not in gpu.csv of FOLDER yet,
until its minutes are nearly used up, and says whether rows are left. A row that cannot run (no
compiler, no jupyter) has its reason as outcome and stops nothing. Rows of another card, size or
version of torch are other rows. Last come the long recipes, which go on where they were cut off.
"""

import argparse
import functools
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

ROOT = Path(__file__).resolve().parent.parent.parent
BENCH = ROOT / "tests/bench"
sys.path[:0] = [str(ROOT), str(BENCH)]

from speed import seconds  # noqa: E402

import helpers as h  # noqa: E402

KEYS = ("card", "torch", "size", "batch", "row")
COLUMNS = (*KEYS, "prediction", "outcome", "seconds")


# --- part 1: does it run, with real numbers -------------------------------------------------------


def run_tests(args):
    """The tests that need neither jupyter nor photographs."""
    files = ("losses", "loader", "students", "training", "runs")
    paths = [str(ROOT / f"tests/test_{name}.py") for name in files]
    command = [sys.executable, "-m", "pytest", "-q", *paths]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    except subprocess.TimeoutExpired:
        return "not ended after 400 s"
    lines = (result.stdout or result.stderr).strip().splitlines()
    return lines[-1]


def train_stage(args, stage):
    """Two epochs of a stage: its losses, and the warnings that torch gives."""
    cfg = h.get_config(stage, image_size=args.size, batch_size=args.batch, n_epochs=2)
    teacher = None
    if cfg.needs_teacher:
        teacher = h.load_teacher(args.data.teacher_path, args.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = h.run_stage(cfg, args.data, teacher, args.out, fresh=True, device=args.device)
    first, last = run.history["train_loss"]
    said = f"loss {first:.4f}, then {last:.4f}; valid {run.valid_acc:.4f}; "
    said += f"{run.history['seconds'].iloc[-1]:.2f} s the second epoch; {len(caught)} warnings"
    if caught:
        said += f", the first: {str(caught[0].message)[:100]}"
    return said


def resume(args):
    """Two epochs at once against one and then another, from the checkpoint."""
    nets = []
    for name, lengths in (("whole", (2,)), ("cut", (1, 2))):
        for n_epochs in lengths:
            settings = {"image_size": args.size, "batch_size": args.batch, "n_epochs": n_epochs}
            cfg = h.get_config("simple", **settings, exp_name=f"resume_{name}")
            fresh = n_epochs == lengths[0]
            run = h.run_stage(cfg, args.data, None, args.out, fresh=fresh, device=args.device)
        nets.append(torch.cat([p.flatten() for p in run.student().parameters()]))
    difference = (nets[0] - nets[1]).abs().max().item()
    if difference == 0:
        return "the same bit for bit"
    return f"largest difference of a weight {difference:.1e}"


# --- part 2: what a Boss step costs ---------------------------------------------------------------


def prepared(args):
    """(DistillLoss of Boss, a batch as `train_one_epoch` makes it, training BatchLoader)."""
    cfg = h.get_config("boss", image_size=args.size, batch_size=args.batch)
    teacher = h.load_teacher(args.data.teacher_path)
    loss_fn = h.DistillLoss(cfg, h.build_student(cfg), teacher).on(args.device)
    loader = h.BatchLoader(
        h.load_data(args.data, "training", "whole", args.size), cfg, args.device, train=True
    )
    loader.move_images()
    batch = next(iter(loader))
    images = h.to_device(batch.images, args.device, loss_fn.dtype or torch.float32)
    return loss_fn, batch._replace(images=images), loader


def per_step(args, change=None):
    """Milliseconds of a training step on a batch that lies ready. change(loss_fn): a candidate."""
    loss_fn, batch, _ = prepared(args)
    if change:
        change(loss_fn)
    state = h.TrainState(loss_fn)

    def step():
        loss = loss_fn(batch.images, batch.labels).loss
        h.optimizer_step(state, loss, 1e-3, 10.0)

    step()  # a compiler works in the first ones
    return f"{1000 * seconds(step, args.device, args.repeats):.1f} ms a step"


class Contiguous(nn.Module):
    """A net in the channels-first layout, whatever it is given."""

    def __init__(self, net):
        super().__init__()
        self.net = net.to(memory_format=torch.contiguous_format)

    def forward(self, images):
        return self.net(images.contiguous())

    def get_submodule(self, name):
        return self.net.get_submodule(name)


def contiguous_student(loss_fn):
    loss_fn.student = Contiguous(loss_fn.student)


def fold_teacher(loss_fn):
    """The teacher's batch norms go into its convolutions, its weights into half precision once."""
    teacher = loss_fn.teacher
    blocks = [teacher]
    blocks += [m for m in teacher.modules() if hasattr(m, "conv1") and m is not teacher]
    for block in blocks:
        for number in ("1", "2"):
            if hasattr(block, f"bn{number}"):
                fold(block, f"conv{number}", f"bn{number}")
        if getattr(block, "downsample", None):
            fold(block.downsample, "0", "1")
    teacher.to(loss_fn.dtype or torch.float32)


def fold(parent, conv, norm):
    folded = fuse_conv_bn_eval(parent.get_submodule(conv), parent.get_submodule(norm))
    setattr(parent, conv, folded)
    setattr(parent, norm, nn.Identity())


def compile_student(loss_fn):
    loss_fn.student.compile()


def compile_both(loss_fn):
    loss_fn.student.compile()
    loss_fn.teacher.compile()


def compile_as_graphs(loss_fn):
    """Both nets compiled, each of their passes replayed as one CUDA graph."""
    loss_fn.student.compile(mode="reduce-overhead")
    loss_fn.teacher.compile(mode="reduce-overhead")


def with_benchmark(args):
    torch.backends.cudnn.benchmark = True
    try:
        return per_step(args)
    finally:
        torch.backends.cudnn.benchmark = False


def parts_of_step(args):
    """Milliseconds of a step's parts, each alone."""
    loss_fn, batch, loader = prepared(args)
    rows = torch.arange(len(batch.labels))
    draw = loader.draw_epoch()  # once an epoch, so it is no part of a step

    def in_precision(net):
        with torch.no_grad(), loss_fn._autocast(batch.images):
            net(batch.images)

    parts = {
        "views": lambda: loader.views_of(rows, draw),
        "teacher": lambda: in_precision(loss_fn.teacher),
        "student forward": lambda: in_precision(loss_fn.student),
    }
    texts = []
    for name, part in parts.items():
        texts.append(f"{name} {1000 * seconds(part, args.device, args.repeats):.1f}")
    return ", ".join(texts) + " ms"


def validation(args):
    """Milliseconds an image of validation in fp32 and under autocast."""
    loss_fn, batch, _ = prepared(args)
    student = loss_fn.student.eval()
    full = batch.images.float()

    @torch.no_grad()
    def in_fp32():
        student(full)

    @torch.no_grad()
    def under_autocast():
        with loss_fn._autocast(batch.images):
            student(batch.images)

    n = len(full) / 1000
    fp32 = seconds(in_fp32, args.device, args.repeats) / n
    mixed = seconds(under_autocast, args.device, args.repeats) / n
    return f"fp32 {fp32:.3f}, autocast {mixed:.3f} ms an image"


def bench(args, script, *options):
    """Run another benchmark on the same data; RuntimeError if it fails.

    It is cut off with the call, subprocess.TimeoutExpired.
    """
    command = [sys.executable, str(BENCH / script), *map(str, options)]
    command += ["--data", str(args.data.root)]
    left = args.end - time.time()
    result = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
    if result.returncode != 0:
        raise RuntimeError(next(iter(result.stderr.strip().splitlines()[-1:]), "no word"))


def newest_rows(args, pattern):
    """What the benchmark that just ended wrote: the newest CSV of a pattern, as a DataFrame."""
    path = max(args.out.glob(pattern), key=os.path.getmtime)
    return pd.read_csv(path)


def speed(args):
    """speed.py: seconds an epoch, the share of arithmetic, times against the homework's loop."""
    bench(args, "speed.py", "--size", args.size, "--batch", args.batch, "--out", args.out)
    figures = newest_rows(args, "speed-*.csv").set_index("figure")["value"]
    epoch = figures["seconds an image: ours"] * h.HOMEWORK_COUNTS["training"]
    parts = [f"{epoch:.2f} s an epoch of 9,993 images"]
    for name, value in figures.filter(like="ratio: ").items():
        parts.append(f"{name.removeprefix('ratio: ')} {value:.2f}")
    return ", ".join(parts)


def peers(args):
    """peers.py: images a second of each side whose package is here."""
    bench(args, "peers.py", "--sizes", args.size, "--turns", 2, "--out", args.out)
    rows = newest_rows(args, "peers-*.csv")
    medians = rows.groupby("side")["images_per_second"].median()
    return ", ".join(f"{side} {value:,.0f}" for side, value in medians.items()) + " images/s"


# --- part 3: the long recipes ---------------------------------------------------------------------

RECIPES = ("handover_early", "handover_bare", "boss", "published_boss")


def recipe(args, name):
    """A long recipe at this size; it may take several calls, so it is no row until it ends."""
    options = ["--size", args.size, "--teacher-size", args.size, "--epochs", args.epochs]
    options += ["--scored", "once", "--views", 50, "--amp", "auto"]
    options += ["--results", args.out, "--work", args.out / "work"]
    bench(args, "recipes.py", name, *options)
    row = pd.read_csv(args.out / "recipes.csv").iloc[-1]
    return f"accuracy {row['accuracy']:.4f}, with six views {row['six_views']:.4f}"


# --- the plan -------------------------------------------------------------------------------------


def plan():
    """[(row, prediction, function of the arguments)], in the order in which they run."""
    rows = [("tests", "all pass", run_tests)]
    for stage in h.STAGES:
        train = functools.partial(train_stage, stage=stage)
        expected = "the loss falls, no warning"
        if stage == "boss":
            expected = "the loss rises, for its weights grow; no warning"
        rows.append((f"stage {stage}", expected, train))
    rows += [
        ("resume", "not bit for bit: CUDA's sums have no fixed order", resume),
        ("step", "T4 70 to 130 ms, H100 6 to 15 ms (the host's launches)", per_step),
        ("parts", "T4: the teacher is half of it; H100: all are small", parts_of_step),
        ("cudnn.benchmark", "T4 5 to 15 % faster, H100 no difference", with_benchmark),
    ]
    candidates = (
        ("student contiguous", "T4 not known, half as fast to a third faster", contiguous_student),
        ("teacher folded, in half precision", "a tenth faster on both", fold_teacher),
        ("student compiled", "T4 a quarter faster, H100 a third", compile_student),
        ("both compiled", "a little more than the student alone", compile_both),
        ("CUDA graphs", "T4 like compiled, H100 another third off", compile_as_graphs),
    )
    for row, prediction, change in candidates:
        rows.append((row, prediction, functools.partial(per_step, change=change)))
    rows += [
        ("validation", "under autocast half of the time of fp32", validation),
        ("speed.py", "T4 6 to 10 s an epoch, H100 0.5 to 1 s; 5 to 20 times the old way", speed),
        ("peers.py", "ours ahead of the tuned loop by 1.5 to 4 times: its cores decode", peers),
    ]
    for name in RECIPES:
        rows.append((f"recipe {name}", "see RESULTS.md", functools.partial(recipe, name=name)))
    return rows


def outcome_of(function, args):
    """What a row says, or why it could not run."""
    try:
        return function(args)
    except subprocess.TimeoutExpired:
        return None  # cut off by the end of the call: the next one goes on
    except Exception as error:  # a plan must not end at one row
        first_line = next(iter(str(error).splitlines()), "")
        return f"failed: {type(error).__name__}: {first_line}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", default=os.environ.get("HW13_PHOTOS"))
    add("--out", type=Path, default=Path("gpu_results"))
    add("--minutes", type=float, default=8.0)
    add("--size", type=int, default=224)
    add("--batch", type=int, default=128)
    add("--epochs", type=int, default=100, help="of the long recipes")
    add("--repeats", type=int, default=10)
    args = parser.parse_args(argv)
    args.end = time.time() + 60 * args.minutes
    args.data = h.find_data(args.data)
    args.device = h.pick_device()
    args.out.mkdir(parents=True, exist_ok=True)
    run_plan(args)


def run_plan(args):
    """Run the rows that are not stored yet, until the minutes are used up."""
    table = args.out / "gpu.csv"
    card = "CPU"
    if args.device.type == "cuda":
        card = torch.cuda.get_device_name(args.device)
    stored = []
    if table.is_file():
        stored = pd.read_csv(table, dtype=str).to_dict("records")
    done = {tuple(record[name] for name in KEYS) for record in stored}
    for row, prediction, function in plan():
        key = (card, str(torch.__version__), str(args.size), str(args.batch), row)
        if key in done:
            continue
        if time.time() > args.end - 30:
            break
        print(f"{row}: expected {prediction}", flush=True)
        start = time.time()
        outcome = outcome_of(function, args)
        if outcome is None:
            break
        taken = round(time.time() - start, 1)
        print(f"{row}: {outcome} ({taken} s)", flush=True)
        stored.append(dict(zip(COLUMNS, (*key, prediction, outcome, taken), strict=True)))
        h.write_text(table, pd.DataFrame(stored).to_csv(index=False))
    else:
        print("every row is stored")
        return
    print("time is up: the same command goes on")


if __name__ == "__main__":
    main()
