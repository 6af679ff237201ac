"""A plan for half an hour of a GPU: each row's prediction stands here, its outcome comes with it.

    HW13_PHOTOS=DIR python tests/bench/gpu.py [--out FOLDER] [--minutes 8] [--size 224]

The same command again and again: each call runs the rows that are not in gpu.csv of FOLDER yet,
until its minutes are nearly used up, and says whether rows are left. A row that cannot run (no
compiler, for example) has its reason as outcome and stops nothing. Rows of another card, size or
version of torch are other rows. Last come the long recipes, which go on where they were cut off.
"""

import functools
import subprocess
import sys
import time
import warnings

import common
import pandas as pd
import torch
from common import seconds

import helpers as h

RECIPES = ("handover_early", "handover_bare", "boss", "published_boss")


# --- the rows -------------------------------------------------------------------------------------


def train_stage(args, stage):
    """Two epochs of a stage: its losses, and the warnings that torch gives."""
    settings = {"image_size": args.size, "batch_size": args.batch, "n_epochs": 2}
    cfg = h.get_config(stage, **settings, exp_name=f"gpu_{stage}")
    teacher = h.load_teacher(args.food.teacher_path, args.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = h.run_stage(cfg, args.food, teacher, args.out, args.device)
    first, last = run.history["train_loss"]
    said = f"loss {first:.4f}, then {last:.4f}; valid {run.valid_acc:.4f}; "
    said += f"{run.history['seconds'].iloc[-1]:.2f} s the second epoch; {len(caught)} warnings"
    return said


def per_step(args, change=None):
    """Milliseconds of a training step on a batch that lies ready. change(loss_fn): a candidate."""
    state, loader = common.prepare(args, args.food, args.device)
    loss_fn = state.loss_fn
    batch = next(iter(loader))
    images = h.to_device(batch.images, args.device, loss_fn.dtype or torch.float32)
    if change:
        change(loss_fn)
        state = h.TrainState(loss_fn)

    def step():
        loss = loss_fn(images, batch.labels).loss
        h.optimizer_step(state, loss, 1e-3, 10.0)

    step()  # a compiler works in the first ones
    return f"{1000 * seconds(step, args.device, args.repeats):.1f} ms a step"


def compile_nets(loss_fn, teacher=True, mode=None):
    """Candidates: the student compiled, or both; "reduce-overhead" replays CUDA graphs."""
    loss_fn.student.compile(mode=mode)
    if teacher:
        loss_fn.teacher.compile(mode=mode)


def with_benchmark(args):
    """A step after cuDNN has tried its algorithms."""
    torch.backends.cudnn.benchmark = True
    try:
        return per_step(args)
    finally:
        torch.backends.cudnn.benchmark = False


def bench(args, script, *options):
    """Run another bench on the same data and into the same folder: the end of what it says.

    RuntimeError if it fails. It is cut off with the call, subprocess.TimeoutExpired.
    """
    command = [sys.executable, common.BENCH / script, "--data", args.food.root, "--out", args.out]
    command = [str(part) for part in (*command, "--size", args.size, *options)]
    left = args.end - time.time()
    result = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
    if result.returncode != 0:
        raise RuntimeError(result.stderr.strip()[-200:])
    return " ".join(result.stdout.split())[-300:]


def speed(args):
    """speed.py at this size."""
    return bench(args, "speed.py", "--batch", args.batch)


def peers(args):
    """peers.py at this size."""
    return bench(args, "peers.py", "--sizes", args.size, "--turns", 2)


def recipe(args, name):
    """A long recipe at this size; it may take several calls, so it is no row until it ends."""
    options = ["--names", name, "--epochs", args.epochs, "--teacher-size", args.size]
    options += ["--scored", "once", "--amp", "auto", "--work", args.out / "work"]
    return bench(args, "recipes.py", *options, "--csvs", args.out)


# --- the plan -------------------------------------------------------------------------------------

CANDIDATES = (
    (
        "student compiled",
        "T4 a quarter faster, H100 a third",
        functools.partial(compile_nets, teacher=False),
    ),
    (
        "CUDA graphs",
        "T4 like compiled, H100 another third off",
        functools.partial(compile_nets, mode="reduce-overhead"),
    ),
)


def plan():
    """[(row, prediction, function of the arguments)], in the order in which they run."""
    rows = []
    for stage in h.STAGES:
        expected = "the loss falls, no warning"
        if h.STAGES[stage].loss_schedule == "handover":
            expected = "the loss rises, for its weights grow; no warning"
        rows.append((f"stage {stage}", expected, functools.partial(train_stage, stage=stage)))
    rows += [
        ("step", "T4 70 to 130 ms, H100 6 to 15 ms (the host's launches)", per_step),
        ("cudnn.benchmark", "T4 5 to 15 % faster, H100 no difference", with_benchmark),
    ]
    for row, prediction, change in CANDIDATES:
        rows.append((row, prediction, functools.partial(per_step, change=change)))
    rows += [
        ("speed.py", "T4 6 to 10 s an epoch, H100 0.5 to 1 s", speed),
        ("peers.py", "ours ahead of the tuned loop by 1.5 to 4 times: its cores decode", peers),
    ]
    for name in RECIPES:
        rows.append((f"recipe {name}", "see RESULTS.md", functools.partial(recipe, name=name)))
    return rows


def outcome_of(function, args):
    """What a row says, or why it could not run; None where the call's time ended."""
    try:
        return function(args)
    except subprocess.TimeoutExpired:
        return None  # the next call goes on
    except Exception as error:  # a plan must not end at one row
        return f"failed: {type(error).__name__}: {str(error)[:300]}"


def main(argv=None):
    args = common.arguments(__doc__, argv, minutes=8.0, size=224, batch=128, epochs=100, repeats=10)
    args.end = time.time() + 60 * args.minutes
    args.food = common.find_data(args)
    args.device = h.pick_device()
    path = args.out / "gpu.csv"
    stored = pd.read_csv(path).to_dict("records") if path.is_file() else []
    machine = {"card": common.machine_name(), "torch": str(torch.__version__)}
    for row, prediction, function in plan():
        key = {**machine, "size": args.size, "batch": args.batch, "row": row}
        if any(key.items() <= done.items() for done in stored):
            continue
        start = time.time()
        outcome = outcome_of(function, args) if start < args.end - 30 else None
        if outcome is None:
            print("time is up: the same command goes on")
            return
        taken = time.time() - start
        stored.append({**key, "prediction": prediction, "outcome": outcome, "seconds": taken})
        common.store(stored, path)
    print("every row is stored")


if __name__ == "__main__":
    main()
