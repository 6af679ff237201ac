"""How many replayed teacher views are enough? Strong at several K, on the photo set.

    HW13_PHOTOS=DIR python tests/bench/views.py [--views 1 10 50 0] [--epochs 60] [--size 64]
        [--teacher-size 64] [--subset 3]

K is the number of stored views, 0 means that every epoch has a view of its own and the teacher
always runs. Trained on one fixed half of the training images and scored on the other half, at the
last epoch; the last row is what the others are compared with, paired. Also printed: seconds an
epoch while the teacher runs and while its logits are replayed. --subset N trains on every N-th
image, so that many epochs fit into little time. A row is stored as it comes, and a killed call goes
on where it stopped.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/bench")]

from recipes import choosing_data, load_ring_teacher  # noqa: E402

import helpers as h  # noqa: E402


def with_every_nth_training_image(data, n):
    """The FoodData with a part of its training images."""
    fewer = {}
    for name in ("files", "labels", "ids"):
        splits = getattr(data, name)
        fewer[name] = splits | {"training": splits["training"][::n]}
    return h.dataclasses.replace(data, **fewer)


def measure(k, args, data, teacher, device):
    """(row of `k` stored views, which held-out images were answered rightly (N,))."""
    cfg = h.get_config(
        "strong",
        image_size=args.size,
        n_epochs=args.epochs,
        teacher_views=k or args.epochs,
        patience=args.epochs,
    )
    train_loader, valid_loader = h.build_loaders(cfg, data, device)
    loss_fn = h.DistillLoss(cfg, h.build_student(cfg), teacher).on(device)
    name = "-".join(map(str, (args.size, args.teacher_size, args.epochs, args.subset, k)))
    folder = h.RunFolder(args.work / name, loss_fn, data)
    # Without validation `fit` keeps the last epoch's student.
    history = pd.DataFrame(h.fit(loss_fn, train_loader, None, folder))
    logits, labels = h.predict_logits(loss_fn.student, valid_loader)
    correct = logits.argmax(1) == labels
    accuracy = correct.double().mean().item()
    seconds = history["seconds"]
    n_with_teacher = k or args.epochs
    row = {
        "K": row_name(k),
        "epochs": len(history),
        "images": len(train_loader.split),
        "accuracy": accuracy,
        "+- s.e.": h.standard_error(accuracy, len(labels)),
        "training accuracy": history["train_acc"].iloc[-1],
        "s an epoch, teacher runs": seconds[:n_with_teacher].median(),
        "s an epoch, replayed": seconds[n_with_teacher:].median(),
    }
    return row, correct


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default=os.environ.get("HW13_PHOTOS"))
    add("--views", type=int, nargs="+", default=[1, 10, 50, 0])
    add("--epochs", type=int, default=60)
    add("--size", type=int, default=64)
    add("--teacher-size", type=int, default=64, help="what the teacher sees the views enlarged to")
    add("--subset", type=int, default=1)
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--work", type=Path, default=h.cache_root() / "views")
    args = parser.parse_args()
    if not args.data:
        sys.exit("name a data folder with --data DIR or HW13_PHOTOS")
    device = h.pick_device()
    data = with_every_nth_training_image(choosing_data(h.find_data(args.data)), args.subset)
    teacher = load_ring_teacher(args, data, device)
    compare(args, data, teacher, device)


def compare(args, data, teacher, device):
    """Measure each K, store the rows, and print each one's difference to the last."""
    rows = []
    answers = {}
    for k in args.views:
        row, answers[row_name(k)] = measure(k, args, data, teacher, device)
        row["machine"] = f"{device.type}, {args.size} px, {time.strftime('%Y-%m-%d')}"
        rows.append(row)
        h.write_text(args.out / "views.csv", pd.DataFrame(rows).to_csv(index=False))
        print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)
    *others, last = answers
    for name in others:
        difference, error = h.paired_difference(answers[name], answers[last])
        print(f"K {name} less K {last}: {difference:+.4f}, paired s.e. {error:.4f}")


def row_name(k):
    """A number of stored views as rows have it."""
    return k or "all"


if __name__ == "__main__":
    main()
