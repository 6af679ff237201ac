"""Does the drawn demo set show what it is made to show?

    python tests/bench/demo.py [--seeds 3] [--out FOLDER]

For each seed (of the drawings and the stages) the teacher and the stages are trained as the
notebook does it. Prints a table: validation accuracies, and differences with their paired standard
errors. It measures the demo set, and no recipe.
"""

import tempfile

import common

import helpers as h


def train_all(seed, work):
    """{net: which validation images it answers rightly (N,)}, stages and teacher, for one seed."""
    data = h.make_demo_data(seed)
    training_seed = h.SIMPLE.seed + seed
    checkpoint = h.train_teacher(data, work)
    correct = {}
    for run in h.run(data, teacher_path=checkpoint, out=work, seed=training_seed):
        correct[run.name] = run.correct
    labels = h.load_data(data, "validation", "eval", run.cfg.image_size).labels
    teacher = h.load_teacher(checkpoint)
    classes = h.predict(teacher, data, run.cfg, "cpu", "validation", views=1)
    correct["teacher"] = classes == labels
    return correct


def rows_of(seed, correct):
    """The rows of a seed: accuracy, and the difference to a net that ought to be worse."""
    accuracies = {name: right.double().mean().item() for name, right in correct.items()}
    students = [name for name in accuracies if name != "teacher"]
    best = max(students, key=accuracies.get)
    compared = {"medium": "simple", "strong": "medium", "teacher": best}
    rows = []
    for name, right in correct.items():
        row = {"seed": seed, "net": name, "accuracy": accuracies[name]}
        if name in compared:
            other = compared[name]
            row["against"] = other
            pair = h.paired_difference(right, correct[other])
            row["difference"], row["paired s.e."] = pair
        rows.append(row)
    return rows


def main(argv=None):
    args = common.arguments(__doc__, argv, seeds=3)
    rows = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as work:
            rows += rows_of(seed, train_all(seed, work))
        common.store(rows, args.out / "demo.csv", date=common.today())


if __name__ == "__main__":
    main()
