"""How many replayed teacher views are enough? One short recipe at several K, on the photo set.

    HW13_PHOTOS=DIR python tests/bench/views.py [--views 1 10 50 0] [--epochs 60] [--size 64] [--subset 3]

K is the number of stored views, 0 means that every epoch has a view of its own and the teacher always runs. Prints
validation accuracy +- standard error, and seconds an epoch while the teacher runs and while its logits are replayed.
--subset N trains on every N-th training image, so that many epochs fit into little time.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("HW13_PHOTOS"))
    parser.add_argument("--views", type=int, nargs="+", default=[1, 10, 50, 0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--subset", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if not args.data:
        sys.exit("name a data folder with --data DIR or HW13_PHOTOS")
    device, data = h.pick_device(), h.find_data(args.data)
    few = slice(None, None, args.subset)
    data = h.dataclasses.replace(data, **{
        name: getattr(data, name) | {"training": getattr(data, name)["training"][few]}
        for name in ("files", "labels", "ids")})
    teacher = h.load_teacher(data.teacher, device)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HW13_CACHE"] = cache
        for k in args.views:
            cfg = h.get_config("strong", image_size=args.size, n_epochs=args.epochs, alpha=1.0, teacher_views=k)
            train, valid = h.build_loaders(cfg, data, device)
            history = pd.DataFrame(h.fit(h.build_student(cfg).to(device), train, valid, cfg, teacher))
            first, later = history["seconds"][: k or None], history["seconds"][k:] if k else history["seconds"][:0]
            last = history["valid_acc"].iloc[-1]
            rows.append({"K": k or "all", "epochs": len(history), "last validation accuracy": last,
                         "+- s.e.": h.standard_error(last, len(valid.split)), "best": history["valid_acc"].max(),
                         "s an epoch, teacher runs": first.median(), "s an epoch, replayed": later.median()})
            print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)
    frame = pd.DataFrame(rows)
    frame["machine"] = (f"{device.type}, {args.size} px, {len(train.split)} training images, strong with alpha 1, "
                        f"{time.strftime('%Y-%m-%d')}")
    args.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(args.out / "views.csv", index=False)


if __name__ == "__main__":
    main()
