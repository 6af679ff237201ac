"""The same distillation with this project and with what people would use instead.

    HW13_PHOTOS=DIR python tests/bench/peers.py [--python PATH] [--sizes 224 128] [--turns 3]
        [--photographs 512] [--epochs 2] [--workers N] [--sides ours timm ...] [--out FOLDER]
        [--show]

All sides train the student of stage Strong from the same frozen ResNet-18 with the same loss
(`loss_fn_kd` with the stage's alpha and temperature), batch, photographs and views: a random
resized crop and a horizontal flip, made as each side makes them. (Strong's turns and vertical flips
are left out, for not every side offers them.)

    ours          BatchLoader and train_one_epoch: photographs are decoded once, a batch's views are
                  made at once
    old0, old4    the homework's own loop with 0 or 4 workers (speed.py)
    tutorial      PyTorch's knowledge distillation tutorial: Adam, fp32; the DataLoader with workers
                  that persist
    tuned         the same with what PyTorch's performance tuning guide adds: autocast and
                  channels-last
    torchdistill  its DistillationBox with KDLoss, set up as its sample configurations are: fp32
    timm          its LogitDistillationTask, loader (fast collate, prefetcher) and optimizer as its
                  training script sets them up with --amp --amp-dtype bfloat16 --channels-last

The peers' packages are none of this project's: they are looked for in the environment of the Python
named with --python, and a side whose package is absent is left out. Every side runs in a process of
its own, the sides in turn, so that a drift of a shared machine meets all of them; ratios are taken
within a turn. A side's process stops unless its loss is `loss_fn_kd` on a made-up batch, its loss
stays finite, its student changes and each photograph comes once an epoch.

A row of results/peers-cpu.csv (peers-CARD.csv on a GPU) is written as it comes, and what is in the
file is not measured again (--fresh: it is). Its columns:

    turn, side, size, batch, photographs, epochs, workers, machine    what was run
    images_per_second     over the epochs, the first batch and each epoch's start included; two
                          steps on noise come before
    before_first_step_s   seconds from the files to the first batch: ours decodes all of them here
    pss_mb                peak of the side's processes together, sampled twice a second; what
                          they share counts once (PSS)
    pss_file_mb           of that what is mapped from files, which the system can drop: libraries,
                          and our decoded photographs
    main_rss_mb           the kernel's peak for the training process alone
    cuda_mb               torch.cuda.max_memory_allocated; 0 on a CPU
    loss                  of the last epoch or step
    versions, date
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/bench")]

import speed  # noqa: E402

import helpers as h  # noqa: E402

# What the builder of a side gets: the networks are on the CPU.
Setup = namedtuple("Setup", "cfg data device workers epochs teacher student")
# What it returns. loss_of(images, labels): a tensor, nothing is trained. make_loader(): batches of
# (images, labels, ...). run_epoch(loader, epoch): trains, and returns a loss.
Side = namedtuple("Side", "student loss_of make_loader run_epoch")

PACKAGES = {"torchdistill": "torchdistill", "timm": "timm"}
NOISE_STEPS = 2
KEY = ["turn", "side", "size", "batch", "photographs", "epochs", "workers", "machine"]


# --- the sides ------------------------------------------------------------------------------------


def ours(setup):
    """This project's own training."""
    device = h.pick_device()
    loss_fn = h.DistillLoss(setup.cfg, setup.student, setup.teacher).on(device)
    state = h.TrainState(loss_fn)

    def loss_of(images, labels):
        images = h.to_device(images, device, loss_fn.dtype or torch.float32)
        return loss_fn(images, labels.to(device)).loss

    def make_loader():
        split = h.load_data(setup.data, "training", "whole", setup.cfg.image_size)
        loader = h.BatchLoader(split, setup.cfg, device, train=True)
        loader.move_images()
        return loader

    def run_epoch(loader, epoch):
        return h.train_one_epoch(state, loss_fn, loader, epoch)["train_loss"]

    return Side(setup.student, loss_of, make_loader, run_epoch)


def old(setup, workers):
    """The homework's own loop."""
    loss_fn, optimizer, loader = speed.old_training(setup.cfg, setup.data, setup.device, workers)

    def loss_of(images, labels):
        return loss_fn(images.to(setup.device), labels.to(setup.device)).loss

    def run_epoch(batches, epoch):
        for images, labels in batches:
            loss = speed.old_step(loss_fn, optimizer, images, labels)
        return loss

    return Side(loss_fn.student, loss_of, lambda: loader, run_epoch)


def old0(setup):
    return old(setup, 0)


def old4(setup):
    return old(setup, 4)


def loader_settings(setup):
    """What a DataLoader gets by PyTorch's performance tuning guide."""
    return {
        "batch_size": setup.cfg.batch_size,
        "num_workers": setup.workers,
        "persistent_workers": setup.workers > 0,
        "pin_memory": setup.device.type == "cuda",
    }


def with_torchvision(setup):
    """The training photographs, each read and cropped by torchvision's transforms."""
    return h.FoodDataset(setup.data, "training", h.reference_transform(setup.cfg, train=True))


def autocast_of(device, dtype):
    """An autocast to `dtype`, or one that does nothing for None."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def tutorial_loss(cfg, teacher, student, images, labels):
    """The tutorial's weighted sum of the soft and the hard loss."""
    with torch.no_grad():
        p_teacher = F.softmax(teacher(images) / cfg.temperature, dim=-1)
    logits = student(images)
    log_p_student = F.log_softmax(logits / cfg.temperature, dim=-1)
    soft_loss = F.kl_div(log_p_student, p_teacher, reduction="batchmean")
    hard_loss = F.cross_entropy(logits, labels)
    return cfg.alpha * cfg.temperature**2 * soft_loss + (1 - cfg.alpha) * hard_loss


def tutorial(setup, dtype=None, layout=torch.contiguous_format):
    """PyTorch's tutorial: the teacher's pass, the student's, both losses, Adam."""
    device = setup.device
    teacher = setup.teacher.to(device, memory_format=layout)
    student = setup.student.to(device, memory_format=layout).train()
    optimizer = torch.optim.Adam(student.parameters(), lr=setup.cfg.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def loss_of(images, labels):
        images = images.to(device, memory_format=layout, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with autocast_of(device, dtype):
            return tutorial_loss(setup.cfg, teacher, student, images, labels)

    def run_epoch(loader, epoch):
        running_loss = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = loss_of(images, labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            running_loss += loss.item()
        return running_loss / len(loader)

    def make_loader():
        return DataLoader(with_torchvision(setup), shuffle=True, **loader_settings(setup))

    return Side(student, loss_of, make_loader, run_epoch)


def tuned(setup):
    """The tutorial's loop with autocast and channels-last."""
    torch.backends.cudnn.benchmark = True
    return tutorial(setup, h.amp_dtype(setup.device), torch.channels_last)


def torchdistill_config(setup):
    """The `train` part of a configuration, as its samples of logit distillation have it."""
    cfg = setup.cfg
    logits = {"teacher_module_path": ".", "teacher_module_io": "output"}
    logits |= {"student_module_path": ".", "student_module_io": "output"}
    # Its alpha is the weight of the labels.
    kd = {"temperature": cfg.temperature, "alpha": 1 - cfg.alpha, "reduction": "batchmean"}
    kd_loss = {"key": "KDLoss", "kwargs": logits | kd}
    adamw = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    return {
        "num_epochs": cfg.n_epochs,
        "train_data_loader": {
            "dataset_id": "food/train",
            "sampler": {"class_or_func": RandomSampler, "kwargs": {}},
            "kwargs": loader_settings(setup),
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "AdamW", "kwargs": adamw, "max_grad_norm": cfg.grad_norm_max},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": kd_loss, "weight": 1.0}}},
        },
    }


def torchdistill(setup):
    """torchdistill's box, driven as its image classification example drives it."""
    from torchdistill.core.distillation import get_distillation_box

    torch.backends.cudnn.benchmark = True
    device = setup.device
    teacher = setup.teacher.to(device)
    student = setup.student.to(device)
    datasets = {"food/train": with_torchvision(setup)}
    config = torchdistill_config(setup)
    box = get_distillation_box(teacher, student, datasets, config, device, None, False, 1)

    def loss_of(images, labels):
        return box.forward_process(images.to(device), labels.to(device), {})

    def run_epoch(loader, epoch):
        box.pre_epoch_process(epoch=epoch)
        for images, labels, *_ in loader:
            loss = loss_of(images, labels)
            box.post_forward_process(loss=loss)
            value = loss.item()
        box.post_epoch_process()
        return value

    return Side(student, loss_of, lambda: box.train_data_loader, run_epoch)


def timm_task(setup):
    """timm's distillation task on its device, channels-last."""
    from timm.task import LogitDistillationTask

    # It asks the student for the normalisation of its pictures, which timm's own students know.
    setup.student.pretrained_cfg = {"mean": h.IMAGENET_MEAN, "std": h.IMAGENET_STD}
    setup.student.num_classes = h.NUM_CLASSES
    setup.student.in_chans = 3
    layout = {"memory_format": torch.channels_last}
    return LogitDistillationTask(
        setup.student.to(setup.device, **layout),
        setup.teacher.to(setup.device, **layout),
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=1 - setup.cfg.alpha,
        temperature=setup.cfg.temperature,
        device=setup.device,
    )


def timm_loader(setup):
    """timm's loader: uint8 batches, normalised on the device a batch ahead; no colour jitter."""
    from timm.data import create_loader

    return create_loader(
        h.FoodDataset(setup.data, "training", None),  # create_loader sets the transform
        input_size=(3, setup.cfg.image_size, setup.cfg.image_size),
        is_training=True,
        scale=setup.cfg.crop_scale,
        hflip=setup.cfg.hflip,
        color_jitter=None,
        interpolation="bilinear",
        device=setup.device,
        **loader_settings(setup),
    )


def timm(setup):
    """timm's task, loader and optimizer, driven as its training script drives them."""
    from timm.optim import create_optimizer_v2
    from timm.utils import dispatch_clip_grad

    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    cfg = setup.cfg
    dtype = h.amp_dtype(setup.device)
    task = timm_task(setup).train()
    decay = cfg.weight_decay
    optimizer = create_optimizer_v2(setup.student, opt="adamw", lr=cfg.lr, weight_decay=decay)
    scaler = torch.amp.GradScaler(setup.device.type, enabled=dtype is torch.float16)

    def loss_of(images, labels):
        images = images.to(setup.device).contiguous(memory_format=torch.channels_last)
        with autocast_of(setup.device, dtype):
            return task(images, labels.to(setup.device))["loss"]

    def run_epoch(loader, epoch):
        for images, labels in loader:
            loss = loss_of(images, labels)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            dispatch_clip_grad(setup.student.parameters(), cfg.grad_norm_max, mode="norm")
            scaler.step(optimizer)
            scaler.update()
            value = loss.item()
            optimizer.zero_grad()
        return value

    return Side(setup.student, loss_of, lambda: timm_loader(setup), run_epoch)


SIDES = {
    "ours": ours,
    "old0": old0,
    "old4": old4,
    "tutorial": tutorial,
    "tuned": tuned,
    "torchdistill": torchdistill,
    "timm": timm,
}


# --- one side, in a process of its own ------------------------------------------------------------


class Watched(speed.Steps):
    """A loader that notes when the first batch came and how many images it gave."""

    def __init__(self, loader):
        super().__init__(loader, len(loader))
        self.first_batch = None
        self.images = 0

    def __iter__(self):
        for batch in super().__iter__():
            if self.first_batch is None:
                self.first_batch = time.perf_counter()
            self.images += len(batch[1])
            yield batch


def some_photographs(data, n):
    """FoodData with `n` of the training photographs, evenly chosen; all, if there are fewer."""
    every = max(1, len(data.files["training"]) // n)
    few = {}
    for name in ("files", "labels", "ids"):
        few[name] = {"training": getattr(data, name)["training"][::every][:n]}
    return h.replace(data, **few)


def prepare(args):
    """The Setup of a side's process."""
    data = h.find_data(args.data)
    if data.teacher_path is None:
        sys.exit(f"{h.TEACHER_FILE} is missing in {args.data}")
    same_views = {"vflip": 0.0, "rotation": 0.0, "affine": 0.0}
    cfg = h.get_config("strong", image_size=args.size, batch_size=args.batch, **same_views)
    torch.manual_seed(cfg.seed)
    return Setup(
        cfg,
        some_photographs(data, args.photographs),
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        args.workers,
        args.epochs,
        h.freeze(h.load_resnet(data.teacher_path)),
        h.build_student(cfg),
    )


def noise(setup):
    """A made-up batch of the side's size."""
    size = setup.cfg.image_size
    images = torch.randn(setup.cfg.batch_size, 3, size, size)
    return images, torch.randint(h.NUM_CLASSES, (len(images),))


@torch.no_grad()
def wanted_loss(setup, images, labels):
    """`loss_fn_kd` of the untrained student, in fp32; its statistics do not move."""
    student = copy.deepcopy(setup.student).train()
    teacher_logits = setup.teacher(images)
    cfg = setup.cfg
    loss = h.loss_fn_kd(student(images), labels, teacher_logits, cfg.alpha, cfg.temperature)
    return loss.item()


def train(setup, side):
    """What a side took for its epochs: a dict of the columns that its process knows."""
    side.run_epoch([noise(setup)] * NOISE_STEPS, 0)
    before = h.copy_of_weights(side.student)
    started = time.perf_counter()
    loader = Watched(side.make_loader())
    begin = time.perf_counter()
    for epoch in range(setup.epochs):
        loss = side.run_epoch(loader, epoch)
    if setup.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    check_trained(setup, side, before, loss, loader.images)
    return {
        "images_per_second": loader.images / seconds,
        "before_first_step_s": loader.first_batch - started,
        "loss": loss,
    }


def check_loss(side, wanted, images, labels):
    """Stop unless a side's loss is the wanted one, but for bfloat16's rounding."""
    with torch.no_grad():
        loss = side.loss_of(images, labels).item()
    if not math.isclose(loss, wanted, rel_tol=0.03):
        sys.exit(f"the loss of a made-up batch is {loss:.4f} and not {wanted:.4f}")


def check_trained(setup, side, before, loss, images):
    """Stop unless the loss is finite, parameters moved and each photograph came once an epoch."""
    wanted = setup.epochs * len(setup.data.files["training"])
    if images != wanted:
        sys.exit(f"{images} images were shown and not {wanted}")
    if not math.isfinite(loss):
        sys.exit(f"the loss is {loss}")
    for name, parameter in side.student.named_parameters():
        now = parameter.detach().cpu()
        if not now.isfinite().all() or now.equal(before[name]):
            sys.exit(f"{name} did not change, or is not finite")


def versions_of(side):
    """The versions that a row names."""
    names = ["torch", "torchvision"]
    if side in PACKAGES:
        names.append(PACKAGES[side])
    return ", ".join(f"{name} {version(name)}" for name in names)


def run_side(args):
    """The row of one side, but for what only its parent sees."""
    setup = prepare(args)
    images, labels = noise(setup)
    wanted = wanted_loss(setup, images, labels)
    side = SIDES[args.side](setup)
    check_loss(side, wanted, images, labels)
    row = train(setup, side)
    row["main_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row["cuda_mb"] = 0.0
    if setup.device.type == "cuda":
        row["cuda_mb"] = torch.cuda.max_memory_allocated() / 2**20
    row["versions"] = versions_of(args.side)
    return row


# --- all sides in turn ----------------------------------------------------------------------------


def absent_sides(args):
    """{side: package} of the sides that the named Python has no package for."""
    code = "import importlib.util as u, json, sys; "
    code += "print(json.dumps([name for name in sys.argv[1:] if not u.find_spec(name)]))"
    out = subprocess.check_output([args.python, "-c", code, *PACKAGES.values()], text=True)
    missing = json.loads(out)
    return {side: name for side, name in PACKAGES.items() if name in missing}


def processes_of(session):
    """The /proc folders of a session's processes."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended
            if os.getsid(int(entry.name)) == session:
                found.append(entry)
    return found


class PeakMemory:
    """The most memory that a session's processes were seen to have together, in MB.

    total: their PSS, files: the part of it that is mapped from files.
    """

    def __init__(self, session):
        self.session = session
        self.total = 0.0
        self.files = 0.0
        self.most_pages = 0

    def look(self):
        """Look once. The PSS takes the kernel 0.1 s and holds up what the process allocates, so it
        is asked for only where the resident pages, which cost nothing, are more than ever.
        """
        folders = processes_of(self.session)
        pages = 0
        for folder in folders:
            with contextlib.suppress(OSError):
                pages += int((folder / "statm").read_text().split()[1])
        if pages < 1.02 * self.most_pages:
            return
        self.most_pages = pages
        kilobytes = Counter()
        for folder in folders:
            with contextlib.suppress(OSError):
                for line in (folder / "smaps_rollup").read_text().splitlines()[1:]:
                    name, value = line.split()[:2]
                    kilobytes[name] += int(value)
        if kilobytes["Pss:"] / 1024 > self.total:
            self.total = kilobytes["Pss:"] / 1024
            self.files = kilobytes["Pss_File:"] / 1024


def measure(command, environment):
    """(row that a side's process prints, the PeakMemory of it and its workers)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        streams = {"stdout": out, "stderr": errors, "env": environment}
        process = subprocess.Popen(command, start_new_session=True, **streams)
        peak = PeakMemory(process.pid)
        try:
            while process.poll() is None:
                peak.look()
                time.sleep(0.5)
        finally:  # also where this process is stopped
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        out.seek(0)
        errors.seek(0)
        lines = out.read().splitlines()
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed: {errors.read()[-2000:]}")
    return json.loads(lines[-1]), peak


def measure_side(args, key):
    """A row of the table: a side's process, with a cache of its own so that decoding is timed."""
    command = [args.python, __file__, "--data", args.data, "--side", key["side"]]
    for name in ("size", "batch", "photographs", "epochs", "workers"):
        command += [f"--{name}", str(key[name])]
    with tempfile.TemporaryDirectory() as cache:
        row, peak = measure(command, {**os.environ, "HW13_CACHE": cache})
    row["pss_mb"] = peak.total
    row["pss_file_mb"] = peak.files
    row["date"] = time.strftime("%Y-%m-%d")
    return key | row


def machine_name():
    """The card, or how many cores there are."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores"


def keys_of(args, sides):
    """What is to be run, in turn: dicts of the KEY columns."""
    machine = machine_name()
    keys = []
    for turn, size, side in itertools.product(range(1, args.turns + 1), args.sizes, sides):
        values = (turn, side, size, args.batch, args.photographs, args.epochs, args.workers)
        keys.append(dict(zip(KEY, (*values, machine), strict=True)))
    return keys


def measure_all(args, path):
    """A DataFrame of the runs that `args` ask for; those that the file has not are measured."""
    absent = absent_sides(args)
    for side in args.sides:
        if side in absent:
            print(f"{side} is left out: {args.python} has no {absent[side]}")
    keys = keys_of(args, [side for side in args.sides if side not in absent])
    rows = []
    if path.exists() and not args.fresh:
        rows = pd.read_csv(path).to_dict("records")
    for key in keys:
        if args.show or any(key.items() <= row.items() for row in rows):
            continue
        row = measure_side(args, key)
        rows.append(row)
        pd.DataFrame(rows).round(3).to_csv(path, index=False)
        print(f"turn {key['turn']}, {key['size']} px, {key['side']}:", end=" ")
        print(f"{row['images_per_second']:.1f} images/s", flush=True)
    if not rows:
        sys.exit(f"{path} has no rows yet")
    return pd.DataFrame(rows).merge(pd.DataFrame(keys), on=KEY)


def summary(frame):
    """A DataFrame of medians, a row a size and side, with how many times faster ours is.

    The ratios are within a turn: their median, lowest and highest.
    """
    speeds = frame.pivot(index=["size", "turn"], columns="side", values="images_per_second")
    by_size = frame.groupby(["size", "side"], sort=False)
    columns = ["images_per_second", "before_first_step_s", "pss_mb", "pss_file_mb", "main_rss_mb"]
    table = by_size[[*columns, "cuda_mb"]].median()
    table.insert(0, "turns", by_size.size())
    if "ours" not in speeds:
        return table
    ratios = speeds.rdiv(speeds["ours"], axis=0).stack().groupby(["size", "side"])
    for name in ("median", "min", "max"):
        table[f"ours is faster, {name}"] = ratios.agg(name)
    return table


def parser():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=os.environ.get("HW13_PHOTOS"))
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 128])
    parser.add_argument("--batch", type=int, default=h.STRONG.batch_size)
    parser.add_argument("--photographs", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    parser.add_argument("--show", action="store_true", help="measure nothing: print the table")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--side", choices=SIDES, help="run one side here, at --size")
    parser.add_argument("--size", type=int, default=224)
    return parser


def main(arguments=None):
    args = parser().parse_args(arguments)
    if not args.data:
        sys.exit("name a data folder with --data DIR or HW13_PHOTOS")
    if args.side:
        print(json.dumps(run_side(args)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    machine = "cpu"
    if torch.cuda.is_available():
        machine = re.sub(r"\W+", "-", machine_name())
    frame = measure_all(args, args.out / f"peers-{machine}.csv")
    print(f"\n{machine_name()}: medians over the turns, ratios within a turn")
    print(summary(frame).round(2).to_string())


if __name__ == "__main__":
    main()
