"""Does the drawn demo set show what it is made to show?

    python tests/bench/demo.py [--seeds 3] [--out FOLDER]

For each seed (of the drawing and of all trainings) the teacher and the stages are trained as the
notebook does it. Prints a table: validation accuracies, and differences with their paired standard
errors. It measures the demo set, and no recipe.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from sys import path

import pandas as pd

path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import helpers as h  # noqa: E402


def train_all(seed, work):
    """({name: seconds of training}, {name: which validation images are right}) for one seed."""
    data = h.make_demo_data(seed)
    training_seed = h.SIMPLE.seed + seed
    teacher_cfg = replace(h.TEACHER_CONFIG, **h.DEMO_TEACHER_SETTINGS, seed=training_seed)
    start = time.monotonic()
    checkpoint = h.train_teacher(data, work, teacher_cfg)
    seconds = {"teacher": time.monotonic() - start}
    correct = {}
    for run in h.run(data, teacher_path=checkpoint, out=work, seed=training_seed):
        correct[run.name] = run.correct
        seconds[run.name] = run.history["seconds"].sum()
    split = h.load_data(data, "validation", "eval", teacher_cfg.image_size)
    classes = h.predict(h.load_teacher(checkpoint), split, teacher_cfg)
    correct["teacher"] = classes == split.labels
    return seconds, correct


def rows_of(seed, seconds, correct):
    """The rows of a seed: accuracy, and the difference to a net that ought to be worse."""
    accuracies = {name: right.double().mean().item() for name, right in correct.items()}
    students = [name for name in accuracies if name != "teacher"]
    best = max(students, key=accuracies.get)
    compared = {"medium": "simple", "strong": "medium", "teacher": best}
    rows = []
    for name, right in correct.items():
        row = {"seed": seed, "net": name, "accuracy": accuracies[name], "seconds": seconds[name]}
        if name in compared:
            other = compared[name]
            difference, error = h.paired_difference(right, correct[other])
            row |= {"against": other, "difference": difference, "paired s.e.": error}
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as work:
            rows += rows_of(seed, *train_all(seed, work))
        frame = pd.DataFrame(rows)
        print(frame.round(4).to_string(index=False), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    frame["date"] = time.strftime("%Y-%m-%d")
    frame.round(4).to_csv(args.out / "demo.csv", index=False)


if __name__ == "__main__":
    main()
