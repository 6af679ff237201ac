"""Is a run that was killed again and again the same, bit for bit, as one that was not?

    python tests/bench/kill.py [--kills 100] [--seed 0] [--out FOLDER]

On the drawn demo set. For each of several settings one run is left alone; then the same run is started with an empty
cache, killed with SIGKILL at a random moment and started again, until it ends by itself. Compared are the student,
the checkpoint (weights, optimizer, history but its seconds, best student), and both CSVs. Prints a table:
runs, kills, identical results.
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

from shared import same, without_seconds  # noqa: E402

import helpers as h  # noqa: E402

SETTINGS = {
    "simple": {"n_epochs": 12},
    "medium, replayed views": {"teacher_views": 3},
    "strong": {},
    "strong, sgd, early stop": {"optimizer": "sgd", "patience": 3, "n_epochs": 12},
    "boss": {},
    "boss, replayed views": {"align_weights": "()", "teacher_views": 8},
}
BASE = {"image_size": 64, "batch_size": 32, "n_epochs": 8, "lr": 2e-3}


def command(name, out, teacher):
    """The command line of a setting's run."""
    settings = BASE | SETTINGS[name]
    return [sys.executable, ROOT / "helpers.py", "run", "--demo", "--out", out, "--stages", name.split(",")[0],
            "--teacher", teacher, *(part for key, value in settings.items() for part in ("--set", f"{key}={value}"))]


def outcome(out, name):
    """What must be equal: the bytes of the student and the CSVs, and the checkpoint without the times."""
    folder = out / "demo" / name.split(",")[0]
    files = (folder / "student_best.ckpt", folder.with_suffix(".csv"), out / "submission_demo.csv")
    return without_seconds(folder), [path.read_bytes() for path in files]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rng, rows, names = random.Random(args.seed), {}, list(SETTINGS)
    with tempfile.TemporaryDirectory() as work:
        os.environ |= {"HW13_FAST": "1", "HW13_CACHE": f"{work}/cache"}
        teacher = h.train_teacher(h.make_demo_data(), work)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        turn = 0
        while sum(row["kills"] for row in rows.values()) < args.kills:
            name = names[turn % len(names)]
            if name not in rows:
                out = Path(work) / f"whole {name}"
                start = time.monotonic()
                subprocess.run(command(name, out, teacher), check=True, **quiet)
                rows[name] = {"setting": name, "seconds alone": time.monotonic() - start, "runs": 0, "kills": 0,
                              "identical": 0, "wanted": outcome(out, name)}
            row, out = rows[name], Path(work) / f"cut {turn}"
            os.environ["HW13_CACHE"] = f"{work}/cache {turn}"  # kills meet drawing, decoding and stored views too
            while True:
                process = subprocess.Popen(command(name, out, teacher), **quiet)
                try:
                    code = process.wait(rng.uniform(0.3, 1.0) * row["seconds alone"])
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    row["kills"] += 1
                    continue
                if code:
                    sys.exit(f"{name}: ended with code {code} after a kill")
                break
            row["runs"] += 1
            row["identical"] += same(outcome(out, name), row["wanted"])
            turn += 1
            print({key: value for key, value in row.items() if key != "wanted"}, flush=True)
    frame = pd.DataFrame(rows.values()).drop(columns="wanted")
    frame.loc[len(frame)] = {"setting": "all", **frame[["seconds alone", "runs", "kills", "identical"]].sum().to_dict()}
    print(frame.round(1).to_string(index=False))
    args.out.mkdir(parents=True, exist_ok=True)
    frame["date"] = time.strftime("%Y-%m-%d")
    frame.to_csv(args.out / "kill.csv", index=False)


if __name__ == "__main__":
    main()
