"""Is a run that was killed again and again the same, bit for bit, as one that was not?

    python tests/bench/kill.py [--kills 100] [--seed 0] [--out FOLDER]

On the drawn demo set. For each of several settings one run is left alone; then the same run is
started with an empty cache, killed with SIGKILL at a random moment and started again, until it ends
by itself. Compared are the student, the checkpoint (weights, optimizer, history but its seconds,
best student), and both CSVs. Prints a table: runs, kills, identical results.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from shared import same, settings, without_seconds  # noqa: E402

import helpers as h  # noqa: E402

SETTINGS = {
    "simple": {"n_epochs": 12},
    "medium, replayed views": {"teacher_views": 3},
    "strong": {},
    "strong, sgd, early stop": {"optimizer": "sgd", "patience": 3, "n_epochs": 12},
    "boss": {},
    "boss, replayed views": {"align_weights": "()", "teacher_views": 8},
}
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
BASE = {"image_size": 64, "batch_size": 32, "n_epochs": 8, "lr": 2e-3}


def command(name, out, teacher):
    """The command line of a setting's run."""
    stage = name.split(",")[0]
    arguments = ["--demo", "--out", out, "--stages", stage, "--teacher", teacher]
    arguments += settings(**BASE | SETTINGS[name])
    return [sys.executable, ROOT / "helpers.py", "run", *arguments]


def outcome(out, name):
    """What must be equal: the bytes of student and CSVs, and the checkpoint without the times."""
    folder = out / "demo" / name.split(",")[0]
    files = (folder / "student_best.ckpt", folder.with_suffix(".csv"), out / "submission_demo.csv")
    return without_seconds(folder), [path.read_bytes() for path in files]


def run_alone(name, work, teacher):
    """The row of a setting, from one run that is left alone."""
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
    """The rows of all settings, once there were enough kills."""
    os.environ |= {"HW13_FAST": "1", "HW13_CACHE": f"{work}/cache"}
    teacher = h.train_teacher(h.make_demo_data(), work)
    rng = random.Random(args.seed)
    names = list(SETTINGS)
    rows = {}
    wanted = {}
    turn = 0
    while sum(row["kills"] for row in rows.values()) < args.kills:
        name = names[turn % len(names)]
        if name not in rows:
            rows[name], wanted[name] = run_alone(name, work, teacher)
        row = rows[name]
        out = Path(work) / f"cut {turn}"
        # A cache of its own: kills meet drawing, decoding and stored views too.
        os.environ["HW13_CACHE"] = f"{work}/cache {turn}"
        run_killed(name, out, teacher, row, rng)
        row["runs"] += 1
        row["identical"] += same(outcome(out, name), wanted[name])
        turn += 1
        print(row, flush=True)
    return list(rows.values())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        frame = pd.DataFrame(kill_again_and_again(args, work))
    sums = frame[["seconds alone", "runs", "kills", "identical"]].sum()
    frame.loc[len(frame)] = {"setting": "all", **sums.to_dict()}
    print(frame.round(1).to_string(index=False))
    args.out.mkdir(parents=True, exist_ok=True)
    frame["date"] = time.strftime("%Y-%m-%d")
    frame.to_csv(args.out / "kill.csv", index=False)


if __name__ == "__main__":
    main()
