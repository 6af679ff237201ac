"""Is a run that was killed again and again the same, bit for bit, as one that was not?

    python tests/bench/kill.py [--kills 100] [--seed 0] [--out FOLDER]

On the drawn demo set. For each of several settings one run is left alone; then the same run is
started with an empty cache, killed with SIGKILL at a random moment and started again, until it ends
by itself. Compared are the bytes of the student and of both CSVs, and the log without its seconds.
Prints a table: runs, kills, identical results.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import pandas as pd

import helpers as h

SETTINGS = {
    "simple": {"n_epochs": 12},
    "medium, replayed views": {"teacher_views": 3},
    "strong": {},
    "strong, adam, early stop": {"optimizer": "adam", "patience": 3, "n_epochs": 12},
    "boss": {},
    "beyond, replayed views": {"teacher_views": 3},
}
BASE = {"image_size": 64, "batch_size": 32, "n_epochs": 8, "lr": 2e-3}
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def stage_of(name):
    """The stage of a setting."""
    return name.split(",")[0]


def command(name, out, teacher):
    """The command line of a setting's run."""
    arguments = ["--demo", "--out", out, "--stages", stage_of(name), "--teacher", teacher]
    for key, value in {**BASE, **SETTINGS[name]}.items():
        arguments += ["--set", f"{key}={value}"]
    return [sys.executable, h.__file__, "run", *arguments]


def outcome(out, name):
    """What must be equal: the bytes of student and CSVs, and the log without its seconds."""
    stage = stage_of(name)
    demo = out / "demo"
    log = pd.read_csv(demo / stage / "log.csv").drop(columns="seconds")
    files = (demo / stage / "student_best.ckpt", demo / f"{stage}.csv", out / "submission_demo.csv")
    return [log.to_csv(), *(path.read_bytes() for path in files)]


def run_alone(name, work, teacher):
    """(the row of a setting, its outcome), from one run that is left alone."""
    out = Path(work) / f"whole {name}"
    start = time.monotonic()
    subprocess.run(command(name, out, teacher), check=True, **QUIET)
    seconds = time.monotonic() - start
    row = {"setting": name, "seconds alone": seconds, "runs": 0, "kills": 0, "identical": 0}
    return row, outcome(out, name)


def run_killed(name, out, teacher, row, rng):
    """Run a setting to its end through kills at random moments, which are counted in its row."""
    while True:
        process = subprocess.Popen(command(name, out, teacher), **QUIET)
        try:
            code = process.wait(rng.uniform(0.3, 1.0) * row["seconds alone"])
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            row["kills"] += 1
            continue
        if code:
            sys.exit(f"{name}: ended with code {code} after a kill")
        return


def kill_again_and_again(args, work):
    """The rows of all settings, each with its part of the kills or a few more."""
    os.environ.update(HW13_FAST="1", HW13_CACHE=f"{work}/cache")
    teacher = h.train_teacher(h.make_demo_data(), work)
    rng = random.Random(args.seed)
    rows = []
    for name in SETTINGS:
        row, wanted = run_alone(name, work, teacher)
        while row["kills"] < args.kills / len(SETTINGS):
            out = Path(work) / f"{name} {row['runs']}"
            # A cache of its own: kills meet drawing, decoding and stored views too.
            os.environ["HW13_CACHE"] = f"{out} cache"
            run_killed(name, out, teacher, row, rng)
            row["runs"] += 1
            row["identical"] += outcome(out, name) == wanted
        rows.append(row)

    return rows


def main():
    args = common.arguments(__doc__, kills=100, seed=0)
    with tempfile.TemporaryDirectory() as work:
        frame = pd.DataFrame(kill_again_and_again(args, work))
    frame.loc[len(frame)] = ["all", *frame.sum(numeric_only=True)]
    common.store(frame, args.out / "kill.csv", date=common.today())


if __name__ == "__main__":
    main()
