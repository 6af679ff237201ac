"""How many replayed teacher views are enough? Strong at several K.

    HW13_PHOTOS=DIR python tests/bench/views.py [--counts 1 10 50 0] [--epochs 60] [--size 64]
        [--teacher-size 64] [--subset 3]

K is the number of stored views; 0 means that every epoch has views of its own and the teacher
always runs. Strong trains on one fixed half of the training images and is scored on the other half,
at the last epoch; the last K is what the others are compared with, paired. Also printed: seconds
per epoch while the teacher runs and while its logits are replayed. --subset N trains on every N-th
image. A row is stored as it comes, and a killed call goes on where it stopped.
"""

import common
import pandas as pd
import recipes

import helpers as h


def measure(k, args, data, teacher, device):
    """(row of `k` stored views, which held-out images were answered rightly (N,))."""
    args.views = k
    net, cfg, history, _ = recipes.train("strong", args, 1, data, teacher, device)
    labels = h.load_data(data, "validation", "eval", cfg.image_size).labels
    correct = h.predict(net, data, cfg, device, "validation", views=1) == labels
    accuracy = correct.double().mean().item()
    history = pd.DataFrame(history)
    seconds = history["seconds"]
    row = {
        "K": k or "all",
        "epochs": len(history),
        "images": len(data.files["training"]),
        "accuracy": accuracy,
        "+- s.e.": h.standard_error(accuracy, len(labels)),
        "training accuracy": history["train_acc"].iloc[-1],
        "s an epoch, teacher runs": seconds[: cfg.teacher_views].median(),
        "s an epoch, replayed": seconds[cfg.teacher_views :].median(),
    }
    return row, correct


def main(argv=None):
    options = {"counts": [1, 10, 50, 0], "epochs": 60, "size": 64, "teacher_size": 64, "subset": 1}
    args = common.arguments(__doc__, argv, **options, amp="auto", scored="half")
    args.work = h.cache_root() / f"views-{args.subset}"
    device = h.pick_device()
    data = common.thinned(recipes.choosing_data(common.find_data(args)), args.subset)
    teacher = recipes.load_ring_teacher(args, data, device)
    rows = []
    answers = {}
    for k in args.counts:
        row, answers[k] = measure(k, args, data, teacher, device)
        rows.append(row)
        common.store(rows, args.out / "views.csv", date=common.today())
    *others, last = answers
    for k in others:
        difference, error = h.paired_difference(answers[k], answers[last])
        print(f"K {k} less K {last}: {difference:+.4f}, paired s.e. {error:.4f}")


if __name__ == "__main__":
    main()
