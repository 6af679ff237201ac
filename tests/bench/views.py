"""How many replayed teacher views are enough? One short recipe at several K, on the photo set.

    HW13_PHOTOS=DIR python tests/bench/views.py [--views 1 10 50 0] [--epochs 60] [--size 64]
        [--subset 3]

K is the number of stored views, 0 means that every epoch has a view of its own and the teacher
always runs. Prints validation accuracy +- standard error, and seconds an epoch while the teacher
runs and while its logits are replayed. --subset N trains on every N-th training image, so that many
epochs fit into little time.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import helpers as h  # noqa: E402


def with_every_nth_training_image(data, n):
    """The FoodData with a part of its training images."""
    fewer = {}
    for name in ("files", "labels", "ids"):
        splits = getattr(data, name)
        fewer[name] = splits | {"training": splits["training"][::n]}
    return h.dataclasses.replace(data, **fewer)


def measure(k, args, data, teacher, device):
    """The row of `k` stored views (0: as many as epochs) and the number of training images."""
    cfg = h.get_config(
        "strong", image_size=args.size, n_epochs=args.epochs, alpha=1.0, teacher_views=k
    )
    train_loader, valid_loader = h.build_loaders(cfg, data, device)
    loss_fn = h.DistillLoss(cfg, h.build_student(cfg), teacher).on(device)
    history = pd.DataFrame(h.fit(loss_fn, train_loader, valid_loader))
    n_with_teacher = k or args.epochs
    last = history["valid_acc"].iloc[-1]
    row = {
        "K": k or "all",
        "epochs": len(history),
        "last validation accuracy": last,
        "+- s.e.": h.standard_error(last, len(valid_loader.split)),
        "best": history["valid_acc"].max(),
        "s an epoch, teacher runs": history["seconds"][:n_with_teacher].median(),
        "s an epoch, replayed": history["seconds"][n_with_teacher:].median(),
    }
    return row, len(train_loader.split)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=os.environ.get("HW13_PHOTOS"))
    parser.add_argument("--views", type=int, nargs="+", default=[1, 10, 50, 0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--subset", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if not args.data:
        sys.exit("name a data folder with --data DIR or HW13_PHOTOS")
    device = h.pick_device()
    data = with_every_nth_training_image(h.find_data(args.data), args.subset)
    teacher = h.load_teacher(data.teacher_path, device)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HW13_CACHE"] = cache
        for k in args.views:
            row, n_images = measure(k, args, data, teacher, device)
            rows.append(row)
            print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)
    frame = pd.DataFrame(rows)
    frame["machine"] = (
        f"{device.type}, {args.size} px, {n_images} training images, strong with alpha 1, "
        f"{time.strftime('%Y-%m-%d')}"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(args.out / "views.csv", index=False)


if __name__ == "__main__":
    main()
