"""The same distillation with this project and with what people would use instead.

    HW13_PHOTOS=DIR python tests/bench/peers.py [--python PATH] [--sizes 224 128] [--turns 3]
        [--photographs 512] [--epochs 2] [--workers N] [--sides ours timm ...] [--out FOLDER]

All sides train the student of stage Strong from the same frozen ResNet-18 with the same loss
(`loss_fn_kd` with the stage's alpha and temperature), batch, photographs and views: a random
resized crop and a horizontal flip, made as each side makes them. (Strong's turns and vertical flips
are left out, for not every side offers them.)

    ours          BatchLoader and train_one_epoch: photographs are decoded once, a batch's views are
                  made at once
    old0, old4    the homework's own loop with 0 or 4 workers: PIL transforms, fp32, Adam
    tutorial      PyTorch's knowledge distillation tutorial: Adam, fp32; the DataLoader with workers
                  that persist
    tuned         the same with what PyTorch's performance tuning guide adds: autocast and
                  channels-last
    torchdistill  its DistillationBox with KDLoss, set up as its sample configurations are: fp32
    timm          its LogitDistillationTask, loader (fast collate, prefetcher) and optimizer as its
                  training script sets them up with --amp --amp-dtype bfloat16 --channels-last

The peers' packages are none of this project's: they are looked for in the environment of the Python
named with --python, and a side whose package is absent is left out. Every side runs in a process of
its own with an empty cache, the sides in turn; ratios are taken within a turn. A side's process
stops unless its loss is `loss_fn_kd` on a made-up batch, its loss stays finite, its student changes
and each photograph comes once per epoch.

A row of results/peers-cpu.csv (peers-CARD.csv on a GPU) is written as it comes, and what is in the
file is not measured again. Its columns: what was run; images_per_second over the epochs, the first
batch included (two steps on noise come before); loss of the last epoch or step; main_rss_mb, the
peak of the training process alone; versions; date. Rows of November 2026 have more columns.
"""

import copy
import functools
import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from importlib.metadata import version

import common
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

import helpers as h

# What the builder of a side gets: the networks are on the CPU.
Setup = namedtuple("Setup", "cfg data device workers epochs teacher student")
# What it returns. loss_of(images, labels): a tensor, nothing is trained. make_loader(): batches of
# (images, labels, ...). run_epoch(loader, epoch): trains, and returns a loss.
Side = namedtuple("Side", "student loss_of make_loader run_epoch")
KEY = ["turn", "side", "size", "batch", "photographs", "epochs", "workers", "machine"]


# --- the sides ------------------------------------------------------------------------------------


def ours(setup):
    """This project's own training."""
    h.keep_freed_memory()
    loss_fn = h.DistillLoss(setup.cfg, setup.student, setup.teacher).on(setup.device)
    state = h.TrainState(loss_fn)

    def loss_of(images, labels):
        images = h.to_device(images, setup.device, loss_fn.dtype or torch.float32)
        return loss_fn(images, labels.to(setup.device)).loss

    def make_loader():
        split = h.load_data(setup.data, "training", "whole", setup.cfg.image_size)
        return h.BatchLoader(split, setup.cfg, setup.device, train=True)

    def run_epoch(loader, epoch):
        with h.images_on_gpu(getattr(loader, "loader", None)):
            return h.train_one_epoch(state, loss_fn, loader, epoch)["train_loss"]

    return Side(setup.student, loss_of, make_loader, run_epoch)


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


def usual_loop(setup, loss_of, optimizer, dtype=None, clip=True):
    """run_epoch of the loop that most programs have; each step reads its loss back."""
    scaler = torch.amp.GradScaler(setup.device.type, enabled=dtype is torch.float16)

    def run_epoch(loader, epoch):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = loss_of(images, labels)
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(setup.student.parameters(), setup.cfg.grad_norm_max)
            scaler.step(optimizer)
            scaler.update()
            value = loss.item()
        return value

    return run_epoch


def tutorial(setup, dtype=None, layout=torch.preserve_format, clip=False, **loading):
    """PyTorch's tutorial: the teacher's pass, the student's, both losses, Adam."""
    device = setup.device
    teacher = setup.teacher.to(device, memory_format=layout)
    student = setup.student.to(device, memory_format=layout).train()
    optimizer = torch.optim.Adam(student.parameters(), lr=setup.cfg.lr)

    def loss_of(images, labels):
        images = images.to(device, memory_format=layout, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with autocast_of(device, dtype):
            return tutorial_loss(setup.cfg, teacher, student, images, labels)

    def make_loader():
        settings = {**loader_settings(setup), **loading}
        return DataLoader(with_torchvision(setup), shuffle=True, **settings)

    run_epoch = usual_loop(setup, loss_of, optimizer, dtype, clip)
    return Side(student, loss_of, make_loader, run_epoch)


def tuned(setup):
    """The tutorial's loop with autocast and channels-last."""
    torch.backends.cudnn.benchmark = True
    return tutorial(setup, h.amp_dtype(setup.device), torch.channels_last)


def old(setup, workers):
    """The homework's own loop: fp32, workers that start anew in each epoch, clipped gradients.

    The teacher is channels-last, which on a CPU does it a favour.
    """
    setup = setup._replace(teacher=h.to_device(setup.teacher, setup.device))
    loading = {"num_workers": workers, "persistent_workers": False}
    return tutorial(setup, clip=True, **loading)


def torchdistill_config(setup):
    """The `train` part of a configuration, as its samples of logit distillation have it."""
    cfg = setup.cfg
    kd = {
        "teacher_module_path": ".",
        "teacher_module_io": "output",
        "student_module_path": ".",
        "student_module_io": "output",
        "temperature": cfg.temperature,
        "alpha": 1 - cfg.alpha,  # its alpha is the weight of the labels
        "reduction": "batchmean",
    }
    kd_loss = {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}
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
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": kd_loss}}},
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
    return LogitDistillationTask(
        h.to_device(setup.student, setup.device),
        h.to_device(setup.teacher, setup.device),
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

    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    cfg = setup.cfg
    dtype = h.amp_dtype(setup.device)
    task = timm_task(setup).train()
    settings = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    optimizer = create_optimizer_v2(setup.student, opt="adamw", **settings)

    def loss_of(images, labels):
        images = images.to(setup.device).contiguous(memory_format=torch.channels_last)
        with autocast_of(setup.device, dtype):
            return task(images, labels.to(setup.device))["loss"]

    run_epoch = usual_loop(setup, loss_of, optimizer, dtype)
    return Side(setup.student, loss_of, lambda: timm_loader(setup), run_epoch)


SIDES = {
    "ours": ours,
    "old0": functools.partial(old, workers=0),
    "old4": functools.partial(old, workers=4),
    "tutorial": tutorial,
    "tuned": tuned,
    "torchdistill": torchdistill,
    "timm": timm,
}


# --- one side, in a process of its own ------------------------------------------------------------


class Counted(common.Steps):
    """A loader that counts the images that it gave."""

    images = 0

    def set_epoch(self, epoch):
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)

    def __iter__(self):
        for batch in super().__iter__():
            self.images += len(batch[1])
            yield batch


def prepare(args):
    """The Setup of a side's process."""
    data = common.find_data(args)
    every = max(1, len(data.files["training"]) // args.photographs)
    same_views = {"vflip": 0.0, "rotation": 0.0, "affine": 0.0}
    cfg = h.get_config("strong", image_size=args.size, batch_size=args.batch, **same_views)
    torch.manual_seed(cfg.seed)
    return Setup(
        cfg,
        common.thinned(data, every, args.photographs),
        h.pick_device(),
        args.workers,
        args.epochs,
        # In the plain layout, which is the peers' own choice to change.
        h.freeze(h.load_weights(h.build_student(h.TEACHER_CONFIG), data.teacher_path)),
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


def check_loss(side, wanted, images, labels):
    """Stop unless a side's loss is the wanted one, but for bfloat16's rounding."""
    with torch.no_grad():
        loss = side.loss_of(images, labels).item()
    if not math.isclose(loss, wanted, rel_tol=0.03):
        sys.exit(f"the loss of a made-up batch is {loss:.4f} and not {wanted:.4f}")


def train(setup, side):
    """What a side took for its epochs: a dict of the columns that its process knows.

    It stops unless each photograph came once per epoch, the loss is finite and parameters moved.
    """
    side.run_epoch([noise(setup)] * 2, 0)
    before = h.copy_of_weights(side.student)
    loader = side.make_loader()
    loader = Counted(loader, len(loader))
    begin = time.perf_counter()
    for epoch in range(setup.epochs):
        loss = side.run_epoch(loader, epoch)
    if setup.device.type == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - begin
    if loader.images != setup.epochs * len(setup.data.files["training"]):
        sys.exit(f"{loader.images} images were shown")
    for name, parameter in side.student.named_parameters():
        if parameter.detach().cpu().equal(before[name]) or not math.isfinite(loss):
            sys.exit(f"{name} did not change, or the loss is not finite: {loss}")
    return {"images_per_second": loader.images / taken, "loss": loss}


def run_side(args):
    """The row of one side, but for what only its parent sees."""
    setup = prepare(args)
    images, labels = noise(setup)
    wanted = wanted_loss(setup, images, labels)
    side = SIDES[args.side](setup)
    check_loss(side, wanted, images, labels)
    row = train(setup, side)
    row["main_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    packages = ["torch", "torchvision"]
    if args.side in ("torchdistill", "timm"):
        packages.append(args.side)
    row["versions"] = ", ".join(f"{name} {version(name)}" for name in packages)
    return row


# --- all sides in turn ----------------------------------------------------------------------------


def measure_side(args, key):
    """A row of the table from a side's own process, or None where its package is absent."""
    command = [args.python, __file__, "--data", str(args.data), "--side", key["side"]]
    for name in ("size", "batch", "photographs", "epochs", "workers"):
        command += [f"--{name}", str(key[name])]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HW13_CACHE": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "ModuleNotFoundError" in done.stderr:
        print(f"{key['side']} is left out: {args.python} has not its package")
        return None
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return {**key, **json.loads(done.stdout.splitlines()[-1]), "date": common.today()}


def measure_all(args, path):
    """A DataFrame of the runs that `args` ask for; those that the file has not are measured."""
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    fixed = (args.batch, args.photographs, args.epochs, args.workers, common.machine_name())
    keys = []
    for what in itertools.product(range(1, args.turns + 1), args.sides, args.sizes):
        keys.append(dict(zip(KEY, what + fixed, strict=True)))
    for key in keys:
        if any(key.items() <= row.items() for row in rows):
            continue
        row = measure_side(args, key)
        if row:
            rows.append(row)
            common.store(rows, path)
    return pd.DataFrame(rows).merge(pd.DataFrame(keys), on=KEY)


def summary(frame):
    """A DataFrame of medians by size and side, with how many times faster ours is within a turn."""
    speeds = frame.pivot(index=["size", "turn"], columns="side", values="images_per_second")
    by_size = frame.groupby(["size", "side"], sort=False)
    table = by_size[["images_per_second", "main_rss_mb"]].median()
    if "ours" in speeds:
        ratios = speeds.rdiv(speeds["ours"], axis=0).stack().groupby(["size", "side"])
        for name in ("median", "min", "max"):
            table[f"ours is faster, {name}"] = ratios.agg(name)
    return table


def parse(argv=None):
    """The command line's values."""
    return common.arguments(
        __doc__,
        argv,
        python=sys.executable,
        sizes=[224, 128],
        batch=h.STRONG.batch_size,
        photographs=512,
        epochs=2,
        workers=os.cpu_count(),
        turns=3,
        sides=list(SIDES),
        side="",  # one side, in this process, at --size
        size=224,
    )


def main(argv=None):
    args = parse(argv)
    if args.side:
        print(json.dumps(run_side(args)))
        return
    machine = "cpu"
    if torch.cuda.is_available():
        machine = re.sub(r"\W+", "-", common.machine_name())
    frame = measure_all(args, args.out / f"peers-{machine}.csv")
    print(summary(frame).round(2).to_string())


if __name__ == "__main__":
    main()
