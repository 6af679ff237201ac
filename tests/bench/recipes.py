"""A fair ring: named recipes trained on one data folder under one budget.

    HW13_PHOTOS=DIR python tests/bench/recipes.py --names handover_bare boss [--epochs 30]
        [--size 112] [--teacher-size 176] [--seeds 1 2] [--views 50] [--amp bf16] [--threads 1]
        [--scored half] [--against published_boss] [--out FOLDER] [--work FOLDER] [--csvs FOLDER]

Every recipe of a call has the same images, teacher, sizes and number of epochs. The teacher sees
the views enlarged to --teacher-size. With --views K, recipes without aligned layers replay the
teacher's answers to K epochs of views (0: one view per epoch). A row is appended to recipes.csv in
--out when its training ends, and the evaluation CSVs are written into --csvs, at one view and at
six; a row that is there is not trained again. Checkpoints and answers lie in the work folder, so a
killed call goes on where it stopped, with one thread and on a CPU bit for bit. In the end the rows
of the call's budget are printed with paired differences to --against; without a data folder, that
is all.

What a row is trained and scored on, --scored:

    half   for choosing: trained on one fixed half of the training images, scored on the other half
    once   for a chosen recipe: trained on all training images, scored on the validation images
    both   the final fit: trained on training and validation images, scored on nothing

No epoch is scored before the last: the student is what the schedule ends with. Stored rows called
"best" are older and kept their best epoch. Recipes that lost are gone; RESULTS.md has their rows
and the commit that holds their code. cpu_seconds are processor time of all threads, empty for a
training that was killed on the way.
"""

import copy
import dataclasses
import itertools
import json
import time
from dataclasses import dataclass, replace

import common
import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import helpers as h

BUDGET = ("epochs", "size", "teacher_size", "views", "scored", "amp")  # columns of a row


# --- nets and losses that the program does not have -----------------------------------------------


class EnlargingTeacher(torchvision.models.ResNet):
    """The teacher, looking at pictures enlarged to `size` px: (B, 3, H, W) -> logits (B, 11).

    One trained at 224 px answers badly on small pictures. It runs under autocast to `dtype`. The
    size is a buffer, so that its checksum, the key of stored logits, tells it from the teacher.
    """

    def __init__(self, teacher, size, dtype):
        block = torchvision.models.resnet.BasicBlock
        super().__init__(block, [2, 2, 2, 2], h.NUM_CLASSES)
        self.load_state_dict(teacher.state_dict())
        self.register_buffer("size", torch.tensor(size))
        self.dtype = dtype

    def forward(self, x):
        x = F.interpolate(x.float(), int(self.size), mode="bicubic", align_corners=False)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None):
            return super().forward(x)


def load_ring_teacher(args, data, device):
    """The data folder's teacher, enlarging what it sees where --teacher-size says so."""
    teacher = h.load_teacher(data.teacher_path, device)
    if args.teacher_size == args.size:
        return teacher
    dtype = h.amp_dtype(torch.device(device), args.amp)
    larger = h.freeze(EnlargingTeacher(teacher, args.teacher_size, dtype))
    return h.to_device(larger, device)


class FrozenStem(nn.Sequential):
    """Layers that stay as they were copied: no gradients, and batch norm always in eval mode."""

    def train(self, mode=True):
        return super().train(False)


def published_boss_net(cfg, teacher):
    """The published Boss student, 99,891 parameters: (B, 3, H, W) -> logits (B, 11).

    The teacher's own stem, copied and frozen, and four dwpw_convs.
    """
    stem = FrozenStem(teacher.conv1, teacher.bn1, teacher.relu, teacher.maxpool)
    net = nn.Sequential()
    net.add_module("stem", copy.deepcopy(stem).requires_grad_(False))
    net.add_module("layer1", h.dwpw_conv(64, 64, stride=1))
    net.add_module("layer2", h.dwpw_conv(64, 128))
    net.add_module("layer3", h.dwpw_conv(128, 256))
    net.add_module("layer4", h.dwpw_conv(256, 140))
    net.add_module("pool", h.GlobalAvgPool())
    net.add_module("fc", nn.Linear(140, h.NUM_CLASSES))
    return net


def own_net(cfg, teacher):
    """The config's student."""
    return h.build_student(cfg)


class EarlyAlignment(h.DistillLoss):
    """DistillLoss whose layers are aligned in the first half of the training only.

    The config itself aligns nothing, so the teacher's logits may be stored: in the second half,
    where no feature map is asked for, they stand in for the teacher.
    """

    early_layers = h.BOSS.aligned_layers

    def __init__(self, cfg, student, teacher):
        super().__init__(cfg, student, teacher)
        self.adapters = h.build_adapters(cfg, student, teacher, self.early_layers)

    def set_progress(self, progress):
        super().set_progress(progress)
        self.layers = self.early_layers if progress <= 0.5 else {}


# --- recipes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A Config, and what differs from the stages: the net and the loss."""

    cfg: h.Config
    build: object = own_net  # (cfg, teacher) -> net
    loss: object = h.DistillLoss  # (cfg, student, teacher) -> a DistillLoss

    def net(self, cfg, teacher):
        """The student with weights drawn from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            return self.build(cfg, teacher)


PUBLISHED_BOSS = replace(
    h.BOSS,
    temperature=20.0,
    optimizer="adam",
    lr=1e-3,
    lr_schedule="constant",
    warmup_epochs=0.0,
    weight_decay=1e-5,
    batch_size=128,
)
RECIPES = {
    "published_boss": Recipe(PUBLISHED_BOSS, published_boss_net),
    "strong": Recipe(h.STRONG),
    "boss": Recipe(h.BOSS),
    "handover_bare": Recipe(h.BEYOND),  # the stage Beyond, as its rows are called
    "handover_early": Recipe(h.BEYOND, loss=EarlyAlignment),
}


def recipe_config(name, args, seed):
    """A recipe's Config under this call's budget."""
    cfg = RECIPES[name].cfg
    views = 0
    if cfg.needs_teacher and not cfg.aligned_layers:
        views = args.views or args.epochs
    return replace(
        cfg,
        exp_name=name,
        image_size=args.size,
        n_epochs=args.epochs,
        seed=seed,
        patience=args.epochs,
        teacher_views=views,
        amp=args.amp,
        train_on="both" if args.scored == "both" else "training",
    )


def choosing_data(data):
    """The FoodData on which recipes are chosen: its training images, in two fixed halves.

    One is trained on, the other stands where the validation split was. An image's half is that of
    its id, whatever else is in the folder; the validation images themselves are not in it.
    """
    halves = {}
    is_held_out = [int(h.fingerprint(image_id), 16) % 2 for image_id in data.ids["training"]]
    for name in ("files", "labels", "ids"):
        splits = getattr(data, name)
        kept = {0: [], 1: []}
        for value, held in zip(splits["training"], is_held_out, strict=True):
            kept[held].append(value)
        halves[name] = {**splits, "training": kept[0], "validation": kept[1]}
    return replace(data, **halves)


# --- rows and files -------------------------------------------------------------------------------


def stored_rows(args):
    """(all rows of recipes.csv so far, which of them are of this call's budget)."""
    path = args.out / "recipes.csv"
    rows = pd.DataFrame(columns=["recipe", *BUDGET, "seed"])
    if path.is_file():
        rows = pd.read_csv(path)
    fits = rows["recipe"].notna()
    for column in BUDGET:
        fits &= rows[column] == getattr(args, column)
    return rows, fits


def work_folder(name, args, seed):
    """Where a training keeps its files."""
    budget = [str(getattr(args, column)) for column in BUDGET]
    return args.work / "-".join([name, *budget, str(seed)])


def csv_name(name, args, seed):
    """What an evaluation CSV is called: recipe, epochs if not 30, seed if not 1, half or both."""
    if args.epochs != 30:
        name = f"{name}_{args.epochs}"
    if seed != 1:
        name = f"{name}_seed{seed}"
    if args.scored != "once":
        name = f"{name}_{args.scored}"
    return name


# --- the ring -------------------------------------------------------------------------------------


def answers_of(net, data, cfg, device, split):
    """{"one": classes, "six": classes} (N,) of a split, at one view and at six."""
    one = h.predict(net, data, cfg, device, split, views=1)
    six = h.predict(net, data, cfg, device, split, views=6)
    return {"one": one, "six": six}


def share(a, b):
    """The share of images on which two tensors of classes (N,) agree."""
    return (a == b).double().mean().item()


def train(name, args, seed, data, teacher, device):
    """Train a recipe to its end: (its net, Config, history, processor seconds or None)."""
    recipe = RECIPES[name]
    cfg = recipe_config(name, args, seed)
    path = work_folder(name, args, seed)
    is_whole_run = not path.exists()
    start = time.process_time()
    net = recipe.net(cfg, teacher)
    train_loader, _ = h.build_loaders(cfg, data, device)
    loss_fn = recipe.loss(cfg, net, teacher).on(device)
    facts = {
        "config": dataclasses.asdict(cfg),
        "data": {"training images": train_loader.split.contents},
        "code": {"teacher": h.state_checksum(teacher)},
    }
    facts = json.loads(json.dumps(facts))  # as they come back from a file
    # Without validation `fit` keeps the last epoch's student.
    history = h.fit(loss_fn, train_loader, None, h.RunFolder(path, facts))
    cpu_seconds = time.process_time() - start if is_whole_run else None
    return net, cfg, history, cpu_seconds


def scores(answers, labels, teacher_classes):
    """The columns of a row that say how good a student is, from its classes (N,) and the labels."""
    accuracy = share(answers["one"], labels)
    return {
        "accuracy": accuracy,
        "s.e.": h.standard_error(accuracy, len(labels)),
        "last_accuracy": accuracy,
        "six_views": share(answers["six"], labels),
        "agreement": share(answers["one"], teacher_classes),
    }


def train_all(args, data, teacher, device):
    """Train the recipes that have no row yet, seed by seed; store each row and its CSVs."""
    cfg = h.Config(image_size=args.size)
    labels = h.load_data(data, "validation", "eval", args.size).labels
    teachers = {}  # its answers, asked for when the first training has ended
    for seed, name in itertools.product(args.seeds, args.names):
        rows, fits = stored_rows(args)
        if (fits & (rows["recipe"] == name) & (rows["seed"] == seed)).any():
            print(f"{name}, seed {seed}: its row is stored already")
            continue
        net, cfg, history, cpu_seconds = train(name, args, seed, data, teacher, device)
        row = {"recipe": name, "seed": seed}
        for column in BUDGET:
            row[column] = getattr(args, column)
        if args.scored != "both":  # which has no image left to be scored on
            if not teachers:
                teachers = answers_of(teacher, data, cfg, device, "validation")
                print("the teacher:", share(teachers["one"], labels))
            answers = answers_of(net, data, cfg, device, "validation")
            path = work_folder(name, args, seed) / "answers.pt"
            h.save_checkpoint({**answers, "labels": labels}, path)
            row.update(scores(answers, labels, teachers["one"]))
        row["parameters"] = sum(p.numel() for p in net.parameters())
        row["macs_224"] = h.count_macs(net, 224)
        row["seconds"] = sum(epoch["seconds"] for epoch in history)
        row["cpu_seconds"] = cpu_seconds
        row["device"] = device.type
        row["date"] = common.today()
        write_csvs(args.csvs / csv_name(name, args, seed), net, cfg, data, device)
        common.store([*rows.to_dict("records"), row], args.out / "recipes.csv")


def write_csvs(path, net, cfg, data, device):
    """The evaluation CSVs of a net: `path`.csv at one view, `path`_six.csv at six."""
    ids = data.ids["evaluation"]
    answers = answers_of(net, data, cfg, device, "evaluation")
    h.write_submission(path.with_name(f"{path.name}.csv"), ids, answers["one"])
    h.write_submission(path.with_name(f"{path.name}_six.csv"), ids, answers["six"])


# --- the table ------------------------------------------------------------------------------------


def correct(name, args, seed):
    """(N,) whether a trained recipe is right, per validation image; None without its answers."""
    path = work_folder(name, args, seed) / "answers.pt"
    if not path.is_file():
        return None
    answers = h.load_file(path)
    return answers["one"] == answers["labels"]


def table(args):
    """A DataFrame: the rows of this call's budget, with paired differences to --against by seed."""
    rows, fits = stored_rows(args)
    rows = rows[fits].copy()
    for place, row in rows.iterrows():
        ours = correct(row["recipe"], args, row["seed"])
        theirs = correct(args.against, args, row["seed"])
        if ours is not None and theirs is not None:
            rows.loc[place, ["difference", "its s.e."]] = h.paired_difference(ours, theirs)
    return rows


def main(argv=None):
    args = common.arguments(
        __doc__,
        argv,
        names=["handover_bare"],
        epochs=30,
        size=112,
        teacher_size=176,
        seeds=[1],
        views=50,
        scored="half",
        amp="bf16",
        threads=1,
        against="published_boss",
        work=h.cache_root() / "recipes",
        csvs=common.BENCH / "photo_submissions",
    )
    if args.data:
        torch.set_num_threads(args.threads)
        device = h.pick_device()
        data = common.find_data(args)
        if args.scored == "half":
            data = choosing_data(data)
        train_all(args, data, load_ring_teacher(args, data, device), device)
    print(table(args).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
