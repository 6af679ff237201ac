"""Distil a ResNet-18 into a student of at most 60,000 parameters on Food-11.

This file holds all code of hw13_distill.ipynb, in the order in which the notebook teaches it:

 0  Ground             words, whole files, locks, devices, processes
 1  Configuration      Config, STAGES, get_config, diff_configs
 2  Data               find_data, load_data, the course's FoodDataset, the drawn demo set
 3  Loader             sample_affine, warp, BatchLoader
 4  Students           dwpw_conv, build_student, get_student_model, check_budget, layer_table
 5  Teacher            load_teacher, soft_labels, the teacher's stored logits
 6  Losses             loss_fn_kd, alignment, DistillLoss
 7  Training           train_one_epoch, evaluate, fit, several GPUs
 8  Submission         predict, write_submission, validate_submission, write_best
 9  Runs               probe, RunFolder, run_stage, run, train_teacher
10  Pictures           functions that take data and return a matplotlib Figure
11  Report             tables
12  Command line       python helpers.py run | evaluate | predict | validate
"""

import argparse
import ast
import base64
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import errno
import functools
import hashlib
import html
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
import types
from collections import Counter, OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

# OpenMP's threads wait for each other in a busy loop. A short one is as fast on an idle machine,
# and twice as fast beside other programs. torch reads this once, when it is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import filelock
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset  # noqa: F401  (the notebook uses h.DataLoader)
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm import tqdm

# ==================================================================================================
# 0  Ground
# ==================================================================================================

CLASS_NAMES = (
    "Bread",
    "Dairy product",
    "Dessert",
    "Egg",
    "Fried food",
    "Meat",
    "Noodles/Pasta",
    "Rice",
    "Seafood",
    "Soup",
    "Vegetable/Fruit",
)
NUM_CLASSES = len(CLASS_NAMES)
PARAM_LIMIT = 60_000
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# --- words ---


class UserError(ValueError):
    """A mistake that the user can mend, in one sentence. The command line exits with 2."""


def say(text):
    """Print a line, from the first process only."""
    if is_first_process():
        print(text, flush=True)


def some_of(names, n=3):
    """The first n names of a list in a text, with dots where there are more."""
    text = ", ".join(str(name) for name in names[:n])
    if len(names) > n:
        text += ", ..."
    return text


def is_switched_on(variable):
    """Whether an environment variable is set, and not to 0."""
    return os.environ.get(variable, "") not in ("", "0")


def kaggle_root():
    """/kaggle, or the folder that HW13_KAGGLE names in its place."""
    return Path(os.environ.get("HW13_KAGGLE") or "/kaggle")


def on_kaggle():
    """Whether this is a Kaggle session: its working folder is there."""
    return (kaggle_root() / "working").is_dir()


def out_folder(out=None):
    """Where results go: `out`, or /kaggle/working on Kaggle and submission/ elsewhere."""
    default = kaggle_root() / "working" if on_kaggle() else "submission"
    return Path(out or default).expanduser()


@contextlib.contextmanager
def illustration():
    """What is only looked at never stops the way to the CSV: its error is said, and a run goes on.

    `with illustration():` stands around the lines of a cell, `@illustration()` above a function,
    which then returns None. HW13_STRICT=1, which tests set, lets every error through.
    """
    try:
        yield
    except Exception as error:
        if is_switched_on("HW13_STRICT"):
            raise
        say(f"Not shown, and the run goes on: {type(error).__name__}: {error}")


@illustration()
def show_source(function):
    """A function's source, as it runs, coloured, for a notebook."""
    # Here, for the command line needs no IPython.
    from IPython.display import HTML, Code

    code = Code(inspect.getsource(function), language="python")
    # nbconvert would break lines inside words; a long line is scrolled to instead.
    page = code._repr_html_().replace("<pre>", '<pre style="white-space:pre;word-break:normal">')
    return HTML(f'<div style="font-family:monospace;overflow-x:auto">{page}</div>')


def in_notebook():
    """Whether the code runs in a Jupyter kernel."""
    # Not imported to find out: a kernel has it loaded.
    return "ipykernel" in sys.modules


def progress_bar(iterable=None, **options):
    """One tqdm bar of images with an ETA; off in all processes but the first."""
    file = cell_line() if in_notebook() else sys.stderr
    # In a log file a line every half a minute.
    every = 1.0 if in_notebook() or file.isatty() else 30.0
    options |= {"file": file, "mininterval": every, "ncols": 110, "unit": "img"}
    return tqdm(iterable, disable=not is_first_process(), **options)


def cell_line():
    """A file for tqdm: a line below the cell, each state in place of the one before.

    A rendered page would lack tqdm's widget, and have a line for each state of its plain bar.
    """
    from IPython.display import display

    line = display({"text/plain": ""}, raw=True, display_id=True)

    def write(text):
        if text.strip():
            line.update({"text/plain": text.strip()}, raw=True)

    return types.SimpleNamespace(write=write)


# --- files ---


def fingerprint(*parts):
    """A hash of JSON-able values, 20 hexadecimal digits: for cache keys and random seeds."""
    # Keys in one order, and what JSON does not know (a path) as its text.
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@contextlib.contextmanager
def written_whole(path):
    """A temporary path beside `path`, renamed over it if the block ends well, else removed.

    A killed process leaves it behind; the next writer takes it over. Raises UserError where the
    disk is full or read-only.
    """
    path = Path(path)
    # In the same folder, for a rename replaces a file at once only within one file system.
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); what was saved is intact"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # after the rename it is not there any more
            temporary.unlink()


def write_text(path, text):
    """Write a text file whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def save_checkpoint(obj, path):
    """torch.save, whole or not at all."""
    # Through memory, because torch reports a full disk as no OSError.
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    with written_whole(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_file(path):
    """torch.load on the CPU with weights_only=True: a file that would run code is refused.

    Raises UserError where the content is no checkpoint, saying how the file begins. Too little
    memory and an unreadable disk keep their own errors.
    """
    with open(path, "rb") as file:
        head = file.read(24)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: pickle, zip, runtime, EOF
        if isinstance(error, MemoryError | OSError) or "memory" in str(error):
            raise
        cause = textwrap.shorten(str(error), 150)
        raise UserError(
            f"{path} is not loaded ({type(error).__name__}: {cause}); it begins with {head!r}; "
            "wanted is a state dict, saved by torch.save(net.state_dict(), path)"
        ) from None


@contextlib.contextmanager
def locked(path, wait=False):
    """Hold `<path>.lock` for the block, from the first process; the file stays where it is.

    wait: until another process lets go; else UserError says that one holds it. Where the file
    system knows no locks, that is said and the block runs without one.
    """
    path = Path(path)
    lock = filelock.FileLock(path.with_name(f"{path.name}.lock"), timeout=-1 if wait else 0)
    if is_first_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"another run is working in {path}: wait, or choose another --out"
            ) from None
        except (NotImplementedError, OSError):
            say(f"WARNING: {path} cannot be locked here: see that one run at a time works in it")
    try:
        yield
    finally:
        lock.release()


# --- processes ---


def rank_and_world():
    """(rank, number of processes) of this process; (0, 1) where torch.distributed is not in use."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def is_first_process():
    """Whether this is the process that prints and writes."""
    return rank_and_world()[0] == 0


def is_first_on_machine():
    """Whether this is the process that fills its machine's cache: of several on it, the first."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def barrier():
    """Wait for all processes; nothing in a single one."""
    if rank_and_world()[1] > 1:
        torch.distributed.barrier()


def all_reduce(tensor):
    """Sum a tensor over all processes, in place."""
    if rank_and_world()[1] > 1:
        torch.distributed.all_reduce(tensor)


def from_first_process(value):
    """The first process's value in all processes: plain values, and tensors on the CPU."""
    if rank_and_world()[1] == 1:
        return value
    # A list, for torch replaces its entries by what it receives.
    handed = [value]
    torch.distributed.broadcast_object_list(handed, 0)
    return handed[0]


# --- devices ---


def pick_device():
    """The torch.device to train on: this process's GPU if a real kernel runs on it, else the CPU.

    An error of torch's gets a note where the card is too old for it (Kaggle's P100, for example).
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # torchrun numbers a machine's processes, and each has the GPU of its number.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        # A card can be available and this torch have no kernels for it: only running one tells.
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        with_note(error, f"torch {torch.__version__} cannot use this GPU; Kaggle: choose T4 x2")
        raise
    torch.cuda.set_device(device)
    # fp32 is fp32 on every card: newer ones would round what a convolution multiplies to 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    return device


def with_note(error, note):
    """Add a sentence to an error, and print it: Kaggle's IPython does not show notes."""
    error.add_note(note)
    say(note)


def keep_freed_memory():
    """Let glibc keep freed memory: fresh pages took a CPU's training step from 2.4 to 3.8 s."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # others have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def amp_dtype(device, amp="auto"):
    """torch.bfloat16, torch.float16 or None (full precision) for training on `device`.

    auto: on GPUs bf16 from CUDA capability 8.0 on, else fp16. The capability is asked, for
    torch.cuda.is_bf16_supported() is True on a T4, which emulates it slowly. On CPUs bf16 where it
    is the faster one: with a matrix unit (AMX), or with AVX512-BF16 that is not Intel's.
    """
    named = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if amp in named:
        return named[amp]
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
    # torch 2.10 has no such function yet; dict gives {} in its place.
    has = getattr(torch.cpu, "get_capabilities", dict)()
    is_intel = "Intel" in has.get("cpu_name", "")
    if has.get("amx_bf16") or (has.get("avx512_bf16") and not is_intel):
        return torch.bfloat16
    return None


def to_device(x, device, dtype=None):
    """A module or a tensor (B, C, H, W) on a device, channels last: convolutions are faster so."""
    return x.to(device, dtype, non_blocking=True, memory_format=torch.channels_last)


# ==================================================================================================
# 1  Configuration
# ==================================================================================================


def setting(default, meaning, low=0, high=math.inf, choices=(), view=False):
    """One Config key: its default, its meaning (`run --help` lists it) and the values allowed.

    view: whether it decides what picture a row shows in an epoch; stored logits depend on it.
    """
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices, "view": view}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Every setting of one stage, as plain values, with the course's own names where it has them.

    A wrong value raises UserError naming key, value and what is allowed; an unknown key is a
    TypeError. `get_config` returns a stage's Config, `STAGES` lists them.
    """

    exp_name: str = setting("simple", "name of the stage and of its folder")
    seed: int = setting(20220013, "all randomness is a function of it", view=True)
    image_size: int = setting(224, "pixels per side that the nets see", 40, 512, view=True)
    train_on: str = setting(
        "training", "both: validation images too", choices=("training", "both"), view=True
    )

    # The student. The sample net has no settings; widths, depths and strides of the others have
    # one entry per layer.
    student: str = setting(
        "sample", "sample, ir (inverted residuals), resnet18", choices=("sample", "ir", "resnet18")
    )
    stem_width: int = setting(48, "channels after the stem")
    widths: tuple = setting((64, 128, 256), "channels of layer1, layer2, ...")
    depths: tuple = setting((1, 1, 1), "blocks in each layer")
    strides: tuple = setting((1, 2, 2), "stride of each layer's first block")

    # The training view. An empty crop_scale is the course's sample transform: the evaluation crop,
    # and flips.
    crop_scale: tuple = setting(
        (), "area of RandomResizedCrop, low,high; () for the centre crop", high=1, view=True
    )
    hflip: float = setting(0.5, "probability of a horizontal flip", high=1, view=True)
    vflip: float = setting(0.0, "probability of a vertical flip", high=1, view=True)
    rotation: float = setting(0.0, "RandomRotation: degrees either way", view=True)
    affine: float = setting(0.0, "RandomAffine: degrees either way", view=True)

    # The loss.
    loss_fn_type: str = setting("CE", "CE: labels alone; KD: with a teacher", choices=("CE", "KD"))
    alpha: float = setting(0.5, "weight of the soft loss in loss_fn_kd", high=1)
    temperature: float = setting(20.0, "softens both distributions", 0.01)
    align_weights: tuple = setting((), "smooth-L1 weight of layer1, layer2, ...")
    loss_schedule: str = setting(
        "constant", "how the loss weights move with the epoch", choices=("constant", "handover")
    )
    teacher_views: int = setting(0, "store the teacher's logits for so many epochs (0: never)")

    # The optimisation.
    optimizer: str = setting("adam", "how the weights move", choices=("adam", "adamw"))
    lr: float = setting(3e-4, "learning rate (its peak, where it moves)")
    lr_schedule: str = setting(
        "constant", "constant, or cosine down to zero", choices=("constant", "cosine")
    )
    warmup_epochs: float = setting(0.0, "epochs of linear warm-up")
    weight_decay: float = setting(1e-5, "L2 penalty (decoupled for adamw)")
    grad_norm_max: float = setting(10.0, "gradients are clipped to this norm", 1e-6)
    batch_size: int = setting(64, "images per step", 2, view=True)
    n_epochs: int = setting(10, "passes over the training images", 1)
    patience: int = setting(300, "stop after so many epochs without a better one", 1)
    amp: str = setting("auto", "precision in training", choices=("auto", "off", "bf16", "fp16"))

    # How a run behaves. It does not change what is computed.
    time_limit_h: float = setting(
        0.0, "hours of a session after which a run ends (0: none; Kaggle: 11.5)"
    )

    def __post_init__(self):
        # By way of object, for a frozen dataclass refuses plain assignment even here.
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, allowed_value(f, getattr(self, f.name)))
        # It names a folder and a CSV; some names have a meaning of their own.
        own_name = r"(?!(submission|submission_demo|demo|exercises)$)[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
        if not re.fullmatch(own_name, self.exp_name):
            raise UserError(
                f"exp_name={self.exp_name!r}: allowed are letters, digits, '_' and '-', but not "
                "submission, demo or exercises"
            )
        if (self.rotation or self.affine or self.vflip) and not self.crop_scale:
            raise UserError("crop_scale=(): allowed is low,high with rotation, affine or vflip")

    @property
    def aligned_layers(self):
        """{"layer1": weight, ...}: the layers that the loss compares."""
        named = enumerate(self.align_weights, 1)
        return {f"layer{number}": weight for number, weight in named if weight}

    @property
    def needs_teacher(self):
        """Whether any term of the loss asks for a teacher (alpha 0 without alignment does not)."""
        asks = self.alpha > 0 or self.aligned_layers or self.loss_schedule == "handover"
        return self.loss_fn_type == "KD" and bool(asks)

    @property
    def replays(self):
        """Whether the teacher's answers are stored and views shown again.

        Never with aligned layers: feature maps are too large to store.
        """
        return self.needs_teacher and self.teacher_views > 0 and not self.aligned_layers


def allowed_value(f, value):
    """The value of Config field `f` in the type of its default, or UserError."""
    low, high, choices = (f.metadata[name] for name in ("low", "high", "choices"))
    # Both as arrays: their kinds are U for text, i for whole numbers and f for others.
    default = np.asarray(f.default)
    given = np.asarray(value)
    kinds = {"U": "U", "i": "i", "f": "if"}[default.dtype.kind]
    is_right = given.dtype.kind in kinds and given.ndim == default.ndim
    if choices:
        is_right = value in choices
    elif is_right and kinds != "U":
        is_right = np.all((low <= given) & (given <= high))  # NaN fails, so it is refused too
    if not is_right:
        allowed = choices or f"{type(f.default).__name__}, {low} to {high}"
        raise UserError(f"{f.name}={value!r}: allowed is {allowed}")
    if kinds == "U":
        return value
    value = given.astype(default.dtype).tolist()
    return tuple(value) if default.ndim else value


# Simple and Medium keep their published values, because each one teaches a step. Strong, Boss and
# Beyond share the best legal student and optimiser that were found; each brings one step.
SIMPLE = Config()
MEDIUM = replace(
    SIMPLE,
    exp_name="medium",
    loss_fn_type="KD",
    # From epoch 51 on the teacher's answers are replayed, which costs no accuracy that was seen.
    teacher_views=50,
    n_epochs=700,
)
STRONG = replace(
    MEDIUM,
    exp_name="strong",
    student="ir",
    stem_width=16,
    widths=(24, 32, 48),
    depths=(2, 3, 2),
    strides=(2, 2, 1),
    crop_scale=(0.7, 1.0),
    vflip=0.5,
    rotation=180.0,
    affine=30.0,
    temperature=4.0,
    optimizer="adamw",
    lr=4e-3,
    lr_schedule="cosine",
    warmup_epochs=2.0,
    weight_decay=0.02,
    n_epochs=300,
)
BOSS = replace(
    STRONG,
    exp_name="boss",
    align_weights=(3.0, 2.0, 1.0),
    loss_schedule="handover",
    teacher_views=0,  # feature maps are too large to store
    n_epochs=600,
)
BEYOND = replace(
    STRONG,
    exp_name="beyond",
    loss_schedule="handover",
    crop_scale=(0.35, 1.0),
    vflip=0.0,
    rotation=0.0,
    affine=0.0,
    n_epochs=600,
)
STAGES = {cfg.exp_name: cfg for cfg in (SIMPLE, MEDIUM, STRONG, BOSS, BEYOND)}

TEACHER_CONFIG = Config(
    exp_name="teacher",
    student="resnet18",
    crop_scale=(0.5, 1.0),
    batch_size=128,
    lr=1e-3,
    optimizer="adamw",
    weight_decay=0.05,
    lr_schedule="cosine",
    warmup_epochs=5.0,
    n_epochs=200,
)
DEMO_TEACHER_SETTINGS = {
    "image_size": 64,
    "crop_scale": (0.7, 1.0),
    "batch_size": 32,
    "warmup_epochs": 1.0,
    "n_epochs": 5,
}

# LENGTH -> (fraction of a stage's epochs, but at least so many).
LENGTHS = {"full": (1.0, 1), "lesson": (0.1, 10), "quick": (0.01, 4), "fast": (0.0, 1)}
# Two cores train on the drawn demo set in minutes with these.
DEMO_SETTINGS = {"image_size": 64, "batch_size": 32, "lr": 4e-3, "patience": 100, "n_epochs": 40}


def get_config(stage, length="full", demo=False, **overrides):
    """The Config of a stage, for example get_config("boss", n_epochs=5).

    length: "full", "lesson", "quick" or "fast" scales the epochs. demo: the small settings for the
    drawn demo set, where every stage has the same number of epochs, so that they can be compared.
    Overrides win over both. UserError for an unknown stage or length, or a value not allowed.
    """
    for name, names in ((stage, STAGES), (length, LENGTHS)):
        if name not in names:
            raise UserError(f"{name!r} is unknown: allowed is one of {', '.join(names)}")
    cfg = STAGES[stage]
    if demo:
        cfg = replace(cfg, **DEMO_SETTINGS)
    fraction, at_least = LENGTHS[length]
    n_epochs = max(at_least, round(fraction * cfg.n_epochs))
    return replace(cfg, **{"n_epochs": n_epochs, **overrides})


def chosen_length(length="full"):
    """`length`, or "fast" under HW13_FAST=1, which tests set; then it says so."""
    if is_switched_on("HW13_FAST") and length != "fast":
        say(f"HW13_FAST is set: the shortest length, in place of LENGTH = {length!r}")
        return "fast"
    return length


def diff_configs(a, b):
    """Print the settings in which Config `b` differs from Config `a`, a line each."""
    for name, before in vars(a).items():
        after = getattr(b, name)
        if before != after:
            print(f"{name:<14} {before!s:>18}  ->  {after!s}")


# ==================================================================================================
# 2  Data
# ==================================================================================================

SPLITS = ("training", "validation", "evaluation")
# How the folder of a split may be called, in capitals too.
SPELLINGS = {
    "training": "training",
    "train": "training",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "evaluation": "evaluation",
    "eval": "evaluation",
    "testing": "evaluation",
    "test": "evaluation",
}
TEACHER_FILE = "resnet18_teacher.ckpt"
COMPETITION = "ml2023spring-hw13"
# Where the courses' archives unpack to.
NEARBY = (".", "data", COMPETITION, "ml2022spring-hw13")
FOOD = ("food11", "food11hw13")
PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Formats that Pillow decodes by itself. Others would start a program (PostScript: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
DEMO_WARNING = (
    "*** DEMO: drawn shapes, not photographs. No number below says anything about Food-11. ***"
)

# --- a data folder ---


@dataclass(frozen=True)
class FoodData:
    """The files of a data folder. Lists are parallel and sorted by path; a split may be empty."""

    root: Path
    origin: str  # what the pictures are, in words; every figure and table carries it
    files: dict  # split -> [Path]
    labels: dict  # split -> [int], -1 for evaluation: its labels are never read
    ids: dict  # split -> [str]
    teacher_path: Path | None

    @property
    def is_demo(self):
        """Whether it is the drawn demo set."""
        return self.origin.startswith("demo")

    def counts(self):
        """A DataFrame of the number of images by class and split, and a last row "all"."""
        names = (*CLASS_NAMES, "(unknown)")  # which the label -1 finds
        columns = {}
        for split, labels in self.labels.items():
            columns[split] = Counter(names[label] for label in labels)
        table = pd.DataFrame(columns, names).fillna(0).astype(int)
        table.loc["all"] = table.sum()
        return table

    def describe(self):
        """What the pictures are, where, and which teacher is with them."""
        if self.is_demo:
            return DEMO_WARNING
        teacher = self.teacher_path or f"no {TEACHER_FILE} is with them"
        return f"{self.origin}: {self.root}. Teacher: {teacher}."


def plain(name):
    """A name without case, spaces and signs: public copies spell folders in their own ways."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def split_of(name):
    """The split that a folder's name spells, or None."""
    return SPELLINGS.get(plain(name))


# --- where it lies ---


def find_data(root=None):
    """The FoodData to work on, or None where there is none, which is said.

    Looks at `root`; HW13_DATA; on Kaggle at every input and at what a cell unpacked into the
    working folder; elsewhere for a folder that is called Food-11 or food11-hw13.
    Raises UserError where the folder is not usable, and on Kaggle where there is none.
    """
    named = root or os.environ.get("HW13_DATA")
    if named:
        return read_folder(named)
    here = kaggle_root() / "working" if on_kaggle() else Path.cwd()
    found = attached_folders()
    for near in NEARBY:
        found += [path for path in sorted((here / near).glob("*/")) if plain(path.name) in FOOD]
    if found:
        return read_folder(found[0])
    looked = f"no folder Food-11 or food11-hw13 in {here}, nor in its {some_of(NEARBY[1:])}"
    if on_kaggle():
        raise UserError(
            f"{looked}, and no data in {kaggle_root() / 'input'}: press 'Add Input', attach the "
            f"competition '{COMPETITION}' (or a public copy of Food-11) and run again"
        )
    say(f"No data: HW13_DATA is not set, and there is {looked}.")
    return None


def attached_folders(name=None):
    """Folders of Kaggle's inputs that hold a file `name`, or data; the competition's come first."""
    found = []
    for folder, names, files in os.walk(kaggle_root() / "input"):
        splits = set(map(split_of, names))
        if name in files or (name is None and {"training", "validation"} <= splits):
            found.append(Path(folder))
        # Splits hold thousands of pictures and nothing else.
        names[:] = [inner for inner in names if split_of(inner) is None]
    return sorted(found, key=lambda path: (COMPETITION not in path.parts, str(path)))


def read_folder(root, needed=SPLITS):
    """The FoodData in `root`, in the homework's layout or with a folder per class.

    needed: the splits that must be there; others stay empty. A folder around the data's folder will
    do. Raises UserError for a missing or empty split, an unknown class folder, a file without a
    label, a label out of range, or two evaluation images with one id.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    # An unpacked archive often wraps the data in a folder.
    for place in (*sorted(root.glob("*/")), root):
        folders = {split_of(path.name): path for path in sorted(place.glob("*/"), reverse=True)}
        missing = [split for split in needed if split not in folders]
        if not missing:
            break
    else:
        raise UserError(f"{root} has no folder {missing[0]}: wanted are {', '.join(needed)}")
    splits = {}
    for split in SPLITS:
        splits[split] = read_split(folders[split], split) if split in needed else ([], [], [])
    files, labels, ids = ({split: splits[split][k] for split in SPLITS} for k in range(3))
    origin = f"photographs in {place.name}"
    if place.parent.name.startswith("demo-"):
        origin = "demo set (drawn, not photographs)"
    return FoodData(place, origin, files, labels, ids, teacher_near(place))


def teacher_near(root):
    """The path of the teacher's file in a data folder, beside it or in a Kaggle input, or None."""
    for folder in (root, root.absolute().parent, *attached_folders(TEACHER_FILE)):
        if (folder / TEACHER_FILE).is_file():
            return folder / TEACHER_FILE
    return None


def read_split(folder, split):
    """(files, labels, ids) of a split, sorted by path. Files that are no pictures are counted."""
    files, others = [], []
    for path in sorted(folder.rglob("*")):
        # Systems leave .DS_Store, ._a.jpg and __MACOSX/a.jpg behind.
        left_behind = re.search(r"(^|/)(\.|__)", path.relative_to(folder).as_posix())
        if not path.is_dir() and not left_behind:
            (files if path.suffix.lower() in PICTURES else others).append(path)
    if not files:
        raise UserError(f"{folder} holds no picture ({', '.join(PICTURES)})")
    if others:
        names = some_of([path.name for path in others])
        say(f"{folder}: {len(others):,} files are no pictures and not used: {names}")

    ids = [path.stem for path in files]
    label_of = label_in_name
    if all(path.parent != folder for path in files):  # a folder per class
        ids = [f"{i:04d}" for i in range(len(files))]  # names of two classes may be alike
        label_of = label_by_folder
    if split != "evaluation":
        return files, [label_of(path) for path in files], ids
    twice = [name for name, n in Counter(ids).items() if n > 1]
    if twice:
        raise UserError(f"{folder} holds two images with the id {twice[0]}")
    return files, [-1] * len(files), ids


def label_in_name(path):
    """The label of <label>_<n>.jpg; UserError without one, or for one out of range."""
    number = re.match("0*(10|[0-9])_", path.name)
    if number is None:
        raise UserError(f"{path} should be called <label>_<n>, the label from 0 to 10")
    return int(number[1])


def label_by_folder(path):
    """The label that the folder of a file spells (Bread, noodles_pasta, 0, 07), or UserError."""
    # Alphabetical positions would be wrong: a stray folder would shift every label.
    name = plain(path.parent.name)
    for label, class_name in enumerate(CLASS_NAMES):
        if name in (plain(class_name), str(label), f"{label:02d}"):
            return label
    raise UserError(
        f"{path.parent} is no class of Food-11: wanted are folders called "
        f"{', '.join(CLASS_NAMES)}, or 0 to 10"
    )


def with_training(data, files, labels, ids):
    """The FoodData with other training images."""
    return replace(
        data,
        files={**data.files, "training": files},
        labels={**data.labels, "training": labels},
        ids={**data.ids, "training": ids},
    )


def with_validation_images(data):
    """The FoodData whose training images are both the training and the validation images."""
    both = (
        lists["training"] + lists["validation"] for lists in (data.files, data.labels, data.ids)
    )
    return with_training(data, *both)


# --- one picture at a time: the course's Dataset, the reference ---


def open_image(path):
    """A file as an upright PIL image in RGB; UserError naming it where it cannot be decoded."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            with contextlib.suppress(Exception):  # odd EXIF entries beside good pixels
                image = ImageOps.exif_transpose(image)
            return image.convert("RGB")
    except Exception as error:  # PIL raises OSError, SyntaxError, DecompressionBombError, ...
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.EIO:
            raise  # of the machine, not of the file
        raise UserError(f"{path} cannot be decoded ({type(error).__name__}: {error})") from None


def source_size(image_size):
    """S: the side to which pictures are resized before the crop, as 256 is to 224."""
    return round(image_size * 256 / 224)


def eval_transform(image_size):
    """The reference test transform: PIL image -> Resize(S), CenterCrop(image_size) -> PIL image."""
    resize = transforms.Resize(source_size(image_size))
    return transforms.Compose([resize, transforms.CenterCrop(image_size)])


def reference_transform(cfg, train):
    """The course's own torchvision chain: PIL image -> normalised float tensor (3, S, S).

    The batched loader is measured and tested against it. torchvision turns pictures with NEAREST
    unless told otherwise; BILINEAR is used here as in the batched loader.
    """
    bilinear = transforms.InterpolationMode.BILINEAR
    steps = [eval_transform(cfg.image_size)]
    # An empty crop_scale is the course's sample transform: the evaluation crop, and flips.
    if train and cfg.crop_scale:
        steps = [transforms.RandomResizedCrop(cfg.image_size, cfg.crop_scale)]
    if train:
        steps += [
            transforms.RandomHorizontalFlip(cfg.hflip),
            transforms.RandomVerticalFlip(cfg.vflip),
        ]
    if train and (cfg.rotation or cfg.affine):
        steps.append(transforms.RandomRotation(cfg.rotation, bilinear))
        steps.append(transforms.RandomAffine(cfg.affine, interpolation=bilinear))
    steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return transforms.Compose(steps)


class FoodDataset(Dataset):
    """The course's Dataset: one file at a time, decoded and augmented with PIL.

    An item is (image (3, H, W) float, label). It is the reference path; `fit` takes a DataLoader of
    it or a BatchLoader. Where worker processes give errors in a notebook, use plain
    `from tqdm import tqdm` instead of `tqdm.auto`.
    """

    def __init__(self, data, split, transform):
        self.files = data.files[split]
        self.labels = data.labels[split]
        self.name = split
        self.transform = transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = open_image(self.files[i])
        return self.transform(image), self.labels[i]


# --- a split decoded once, into the cache ---


@dataclass(frozen=True)
class Split:
    """Decoded images of one split, as `load_data` gives them."""

    name: str  # training, validation or evaluation
    origin: str
    images: torch.Tensor  # (N, 3, H, W) uint8, memory-mapped from the cache
    labels: torch.Tensor  # (N,) int64, -1 where unknown
    ids: tuple  # N texts, in the order of the images
    aspects: torch.Tensor  # (N,) float32, width / height of the file
    contents: str  # a hash of the files' bytes and the labels; names and times do not count

    def __len__(self):
        return len(self.ids)


def cache_root():
    """The folder for decoded images: HW13_CACHE, or the user's own in the temporary directory."""
    default = Path(tempfile.gettempdir()) / f"hw13_cache_{Path.home().name}"
    return Path(os.environ.get("HW13_CACHE") or default).expanduser()


def load_data(data, split, form, image_size):
    """The Split of FoodData in one form, decoded once into the cache and memory-mapped from there.

    form: "whole", the picture squeezed to (3, S, S) with S = source_size(image_size), its aspect
    beside it; or "eval", (3, image_size, image_size), which equals the reference test transform bit
    for bit.
    A training or validation image that cannot be decoded is left out and named; more than one in
    twenty is a UserError. An evaluation image becomes grey, and its row stays.
    """
    files = data.files[split]
    stats = []
    for path in files:
        status = path.stat(follow_symlinks=path.exists())  # a broken link has its own
        stats.append((path.parts[-2:], status.st_size, status.st_mtime_ns))
    key = fingerprint(stats, form, image_size, Image.__version__, torchvision.__version__)
    path = cache_root() / f"{split}-{key}.npy"
    if is_first_on_machine():
        with locked(path, wait=True):
            if not (path.is_file() and path.with_suffix(".pt").is_file()):
                decode(files, split, form, image_size, path)
    barrier()
    facts = load_file(path.with_suffix(".pt"))
    keep = facts["kept"]  # (N,) bool
    labels = torch.tensor(data.labels[split])[keep]
    ids = tuple(itertools.compress(data.ids[split], keep))
    # "c": what is written to the images would go into a private copy.
    images = torch.from_numpy(np.load(path, mmap_mode="c"))
    if not keep.all():
        images = images[keep]
    contents = fingerprint(facts["contents"], labels.tolist())
    return Split(split, data.origin, images, labels, ids, facts["aspects"][keep], contents)


def decode(files, split, form, image_size, path):
    """Decode the files of a split in parallel into the cache file `path`, whole or not at all."""
    side = image_size
    transform = eval_transform(image_size)
    if form == "whole":
        side = source_size(image_size)
        transform = transforms.Resize((side, side))
    n = len(files)

    def decode_one(i):
        """(width / height, hash) of a file; without a hash where it cannot be decoded."""
        digest = ""
        try:
            image = open_image(files[i])
            digest = hashlib.sha256(files[i].read_bytes()).hexdigest()
        except UserError as error:
            say(f"WARNING: {error}; it is left out, or grey if it is an evaluation image")
            image = Image.new("RGB", (256, 256), "#7c7c7c")
        images[i] = transforms.functional.pil_to_tensor(transform(image))
        # Of the picture as it was, before it is squeezed or cropped.
        return image.width / image.height, digest

    with written_whole(path) as temporary:
        images = np.lib.format.open_memmap(temporary, "w+", np.uint8, (n, 3, side, side))
        if hasattr(os, "posix_fallocate"):  # a disk must not fill up below the mapping
            with open(temporary, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        # PIL lets go of the interpreter's lock, so threads decode side by side.
        with ThreadPoolExecutor(min(8, usable_cpus())) as pool:
            made = pool.map(decode_one, range(n))
            aspects, digests = zip(
                *progress_bar(made, desc=f"decode {split}", total=n), strict=True
            )
        bad = digests.count("")
        if bad == n or (bad > max(1, 0.05 * n) and split != "evaluation"):
            raise UserError(f"{bad} of {n} {split} images cannot be decoded: see above")
        images.flush()
        # An evaluation image's row must stay in the CSV.
        kept = torch.tensor([bool(digest) or split == "evaluation" for digest in digests])
        facts = {"aspects": torch.tensor(aspects), "kept": kept, "contents": fingerprint(digests)}
        save_checkpoint(facts, path.with_suffix(".pt"))


def usable_cpus():
    """How many CPUs this process may use: a container often has fewer than its machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


# --- the drawn demo set ---

# Part of the demo folder's name: raise it where `draw_dish` is to draw other pictures.
DEMO_VERSION = 2
# Pictures per class; those of the last folder are drawn for the teacher alone.
TEACHER_FOLDER = "teacher_pictures"
DEMO_PICTURES = {"training": 20, "validation": 60, "evaluation": 20, TEACHER_FOLDER: 300}
FAST_DEMO_PICTURES = {"training": 14, "validation": 6, "evaluation": 4, TEACHER_FOLDER: 10}
# So many training labels are wrong; no validation label is, and none that the teacher learns from.
DEMO_WRONG_LABELS = 0.3
# What tells a class is so often as the class has it, and else any.
DEMO_TYPICAL = 0.92


def draw_dish(label, rng):
    """One drawn picture of class `label`: a PIL image, 72 to 112 px per side.

    A plate with pieces of food on a table, noisy and partly covered. Hue, number and corners of the
    pieces tell the class, none of them alone: the hues of neighbouring classes overlap, and number
    and corners are now and then another class's.
    """
    canvas = Image.new("RGB", (96, 96), random_colour(rng))
    draw = ImageDraw.Draw(canvas)
    plate = rng.uniform(42, 54, 2)  # its centre
    draw.ellipse([*(plate - 40), *(plate + 40)], (225, 225, 220))
    draw_pieces(draw, plate, label, rng)
    corner = rng.uniform(0, 70, 2)
    opposite = corner + rng.uniform(12, 34)
    draw.rectangle([*corner, *opposite], random_colour(rng))
    noise = rng.normal(0, 6, (96, 96, 3))
    pixels = np.asarray(canvas, dtype=np.float32) + noise
    noisy = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    size = rng.integers(72, 113, 2)
    return noisy.resize(tuple(size.tolist()))


def draw_pieces(draw, plate, label, rng):
    """Draw one to three regular polygons of three to six corners around the plate's centre (2,)."""
    # Hues of neighbouring classes are 33 degrees apart, less than two standard deviations.
    hue = (360 * label / NUM_CLASSES + rng.normal(0, 18)) % 360
    saturation = rng.uniform(50, 90)
    value = rng.uniform(55, 95)
    base = np.array(ImageColor.getrgb(f"hsv({hue}, {saturation}%, {value}%)"))
    n_pieces = typically(1 + label % 3, (1, 2, 3), rng)
    # They lie a third of a turn apart, each a little off the dish's colour.
    for angle in 2 * math.pi * (rng.random() + np.arange(n_pieces) / 3):
        n_corners = typically(3 + label % 4, (3, 4, 5, 6), rng)
        direction = np.array([math.cos(angle), math.sin(angle)])
        x, y = plate + 18 * direction + rng.normal(0, 2, 2)
        colour = (base + rng.normal(0, 10, 3)).clip(0, 255).astype(int)
        radius = rng.uniform(15, 20)
        turn = rng.uniform(0, 360)
        draw.regular_polygon((x, y, radius), n_corners, turn, tuple(colour.tolist()))


def typically(own, values, rng):
    """The class's own value, or now and then any of `values`."""
    if rng.random() < DEMO_TYPICAL:
        return own
    return int(rng.choice(values))


def random_colour(rng):
    """A colour (red, green, blue) that is neither very dark nor very light."""
    return tuple(rng.integers(60, 220, 3).tolist())


def make_demo_data(seed=0):
    """Draw the demo set (once, under the cache folder) in Food-11's layout; return its FoodData.

    It lets the notebook run on a machine without data, and shows there what the stages are about:
    classes look alike, pictures with a label are few, three labels in ten are wrong, and the
    teacher has learned from many more drawings with right ones. Its difficulty was chosen for that
    alone, and its scores say nothing about Food-11. seed: another one draws other pictures.
    """
    per_class = FAST_DEMO_PICTURES if is_switched_on("HW13_FAST") else DEMO_PICTURES
    # In a folder of its own, for the teacher's pictures lie beside Food-11.
    folder = cache_root() / f"demo-{fingerprint(DEMO_VERSION, per_class, seed)}"
    if is_first_on_machine():
        with locked(folder, wait=True):
            if not folder.exists():
                draw_demo_set(folder, per_class, seed)
    barrier()
    return read_folder(folder / "Food-11")


def draw_demo_set(folder, per_class, seed):
    """Draw all splits: beside their place and then renamed, so that no half set is ever read."""
    drawing = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(drawing, ignore_errors=True)  # of a process that was killed
    # Seeds of their own: a split's pictures do not depend on how many the others have.
    for place, (split, n) in enumerate(per_class.items()):
        wrong = DEMO_WRONG_LABELS if split == "training" else 0.0
        # The teacher's lie beside the set and not in it: no student ever sees them.
        root = drawing / ("" if split == TEACHER_FOLDER else "Food-11")
        draw_split(root / split, n, (seed, place), wrong)
    drawing.rename(folder)


def draw_split(folder, per_class, seed, wrong_labels):
    """Draw so many pictures per class into a new folder that is called as its split.

    wrong_labels: the share of pictures whose name has the label of another class, any of the ten.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    # (11 per_class,): equally many of each class, in random order.
    labels = rng.permutation(NUM_CLASSES * per_class) % NUM_CLASSES
    for i, label in enumerate(labels.tolist()):
        picture = draw_dish(label, rng)
        if rng.random() < wrong_labels:
            # 1 to 10 steps around the circle of eleven classes never end at the right one.
            label = (label + int(rng.integers(1, NUM_CLASSES))) % NUM_CLASSES
        # As in the homework, names of evaluation images do not tell their labels.
        name = f"{i:04d}.jpg" if folder.name == "evaluation" else f"{label}_{i}.jpg"
        picture.save(folder / name, quality=90)


def with_teacher_pictures(data):
    """The demo set's FoodData with the training images that were drawn for the teacher alone."""
    return with_training(data, *read_split(data.root.parent / TEACHER_FOLDER, "training"))


# ==================================================================================================
# 3  Loader
# ==================================================================================================

# images (B, 3, S, S) float32, labels (B,) int64, rows (B,): their places in the Split.
# weight: own images * processes / images of the whole step. With it gradients that are averaged
# over processes are exact, also where the parts of a step differ in size.
# view_epoch: the epoch whose draws are shown.
Batch = namedtuple("Batch", "images labels rows weight view_epoch", defaults=((), 1.0, None))


def affine_matrix(a, b, c, d, x=0.0, y=0.0):
    """(N, 3, 3) float64 matrices [[a, b, x], [c, d, y], [0, 0, 1]]; entries are (N,) or numbers."""
    entries = [torch.as_tensor(e, dtype=torch.float64) for e in (a, b, x, c, d, y, 0, 0, 1)]
    # Nine entries of (N,) in row order: (N, 9) -> (N, 3, 3).
    return torch.stack(torch.broadcast_tensors(*entries), -1).view(-1, 3, 3)


def sample_crops(aspects, scale, generator, ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's draw for N pictures: (centre x, centre y, half width, half height).

    Each is (N,) in [-1, 1], in coordinates of the whole picture squeezed to a square, so that the
    picture's aspect (width / height) comes in here and nowhere else. As in torchvision: ten tries
    of an area in `scale` and a log-uniform width / height in `ratio`; the first that lies inside
    the picture is taken, else the largest central crop within `ratio`.
    """
    n = len(aspects)
    float64 = torch.float64
    # All ten tries of all pictures at once: (N, 10).
    area = torch.empty(n, 10, dtype=float64).uniform_(*scale, generator=generator)
    log_ratio = torch.empty(n, 10, dtype=float64)
    # Uniform in the logarithm, so that wide and tall crops are equally likely.
    log_ratio.uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=generator)

    # A crop's width and height as parts of the picture's own: (N, 10).
    aspect = aspects.double()[:, None]
    # From wide * high = area and wide * aspect / high = the crop's ratio in pixels.
    wide = (area * log_ratio.exp() / aspect).sqrt()
    high = (area / log_ratio.exp() * aspect).sqrt()
    fits = (wide <= 1) & (high <= 1)

    # argmax gives the first try that fits (and 0 where none does): (N,).
    first = fits.int().argmax(1, keepdim=True)
    wide = wide.gather(1, first)[:, 0]
    high = high.gather(1, first)[:, 0]

    # Where none fits: the whole picture, cut to the nearest allowed ratio, from the middle.
    none_fits = ~fits.any(1)
    # Of a picture wider than `ratio` only the width is cut, of a taller one only the height.
    allowed = aspects.double().clamp(*ratio)
    wide = torch.where(none_fits, (allowed / aspects).clamp(max=1), wide)
    high = torch.where(none_fits, (aspects / allowed).clamp(max=1), high)

    # A place in [-1, 1] becomes a centre that keeps the crop inside the picture.
    place = torch.rand(2, n, dtype=float64, generator=generator) * 2 - 1
    place = torch.where(none_fits, 0.0, place)
    return place[0] * (1 - wide), place[1] * (1 - high), wide, high


def sample_angles(n, degrees, generator):
    """(N,) angles in degrees, uniform within `degrees` either way."""
    places = torch.rand(n, dtype=torch.float64, generator=generator) * 2 - 1
    return places * degrees


def sample_flips(n, probability, generator):
    """(N,) float64: -1 where a picture is mirrored, else 1."""
    flipped = torch.rand(n, dtype=torch.float64, generator=generator) < probability
    return 1 - 2 * flipped.double()


def sample_affine(aspects, cfg, generator):
    """Draw the training view of N pictures of the given `aspects` (N,): matrices for `warp`.

    Returns (N, M, 2, 3) float32 on the CPU. The first matrix of an image composes the crop, the
    flips, RandomRotation and RandomAffine in the order of the course's Boss transform. Each turn
    cuts at the frame of the crop and fills with black, so its frame comes along as a matrix of its
    own (none where the config does not turn). Coordinates are in [-1, 1], from output to source.
    """
    n = len(aspects)
    x, y, wide, high = sample_crops(aspects, cfg.crop_scale, generator)
    hflip = sample_flips(n, cfg.hflip, generator)
    vflip = sample_flips(n, cfg.vflip, generator)
    # Flips mirror inside the crop: they change the sign of its half width and half height.
    crop = affine_matrix(wide * hflip, 0, 0, high * vflip, x, y)

    # From output to source the steps are undone in reverse order: affine first, then the rotation.
    # torchvision's rotate turns counter-clockwise and its affine clockwise, hence the sign.
    turns = []
    if cfg.affine:
        turns.append(-math.pi / 180 * sample_angles(n, cfg.affine, generator))
    if cfg.rotation:
        turns.append(math.pi / 180 * sample_angles(n, cfg.rotation, generator))

    # frames[k] leads from the output to the picture as it was before the k-th turn to be undone.
    frames = [torch.eye(3, dtype=torch.float64).expand(n, 3, 3)]
    for angle in turns:
        cos = angle.cos()
        sin = angle.sin()
        # A turn is undone after those before it in the list, so its matrix stands on their left.
        frames.append(affine_matrix(cos, -sin, sin, cos) @ frames[-1])
    to_source = crop @ frames[-1]
    # frames[0] is the output itself, which no pixel leaves: it needs no matrix.
    matrices = torch.stack([to_source, *frames[1:]], 1)  # (N, M, 3, 3)
    return matrices[:, :, :2].float()  # the last row is 0, 0, 1


def coordinates(matrices, size):
    """Where each pixel of an output of size x size lies, under N matrices (N, 2, 3).

    Returns (N, 2, size, size); the second dimension is x and y. As
    F.affine_grid(align_corners=False), but from two lines instead of a matrix product a pixel: a
    third of the time.
    """
    # Centres of `size` pixels on [-1, 1]: (size,).
    line = (torch.arange(size, device=matrices.device) * 2 + 1) / size - 1
    # The columns: what a step along x or y adds to a place, and where the middle lies.
    along_x, along_y, shift = matrices.unbind(2)  # (N, 2) each
    rows = along_y[..., None] * line + shift[..., None]  # (N, 2, size)
    # (N, 2, 1, size) + (N, 2, size, 1): x runs along a row, y from row to row.
    return along_x[..., None, None] * line + rows[..., None]


def warp(images, matrices, size):
    """Apply `matrices` (B, M, 2, 3) to uint8 `images` (B, 3, H, W): float32 (B, 3, size, size).

    Values stay in 0..255. The first matrix leads to the source, which the one bilinear grid_sample
    takes with its border repeated; each other one leads to a frame, outside of which the picture is
    black. A frame fades over half a pixel on either side of its edge, as grid_sample's zero padding
    would.
    """
    to_source, *frames = matrices.unbind(1)
    grid = coordinates(to_source, size).permute(0, 2, 3, 1)  # (B, size, size, 2), as torch wants it
    # In float, for grid_sample interpolates no integers and wants images and grid of one type.
    out = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    for frame in frames:
        # How far a pixel lies outside of the frame, which reaches from -1 to 1: (B, 1, size, size).
        # The larger of |x| and |y|, for the frame is a square.
        outside = coordinates(frame, size).abs_().amax(1, keepdim=True).sub_(1)
        # A pixel is 2 / size wide in these coordinates.
        # In pixels, from 1 (inside) to 0 (outside), one half on the edge itself.
        out *= outside.mul_(-size / 2).add_(0.5).clamp_(0, 1)
    return out


@functools.cache
def mean_and_std(device):
    """ImageNet's mean and deviation in pixels of 0..255, (3, 1, 1) each, put on a device once."""
    both = 255 * torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device)
    return both[:, :, None, None]


def normalize(images):
    """Pixels in 0..255, any dtype (B, 3, H, W) -> float32 with ImageNet's mean and deviation."""
    mean, std = mean_and_std(images.device)
    # (images - mean) / std, in one pass over the memory.
    return torch.addcmul(-mean / std, images, 1 / std)


def pixels_of(images):
    """What `normalize` made (..., 3, H, W) back as pixels, uint8 on the CPU."""
    mean, std = mean_and_std(torch.device("cpu"))
    return (images.cpu() * std + mean).clamp(0, 255).byte()


class BatchLoader:
    """Batches of a Split on the device: Batch(images, labels, rows, weight, view_epoch).

    train=True shuffles and augments as `cfg` says; every draw of an epoch is a function of
    (seed, epoch) alone and belongs to the image's row, so a resumed run sees what an uninterrupted
    one would. Otherwise batches come in order. The uint8 images are read batch by batch through
    pinned memory, or from the GPU itself inside `images_on_gpu`. Under torch.distributed each
    process yields its part of every batch, unless shared=False.
    split: in the form that `training_form(cfg)` names, to train; in the form "eval" otherwise.
    """

    def __init__(self, split, cfg, device, train=False, batch_size=None, shared=True):
        self.dataset = split  # named as in torch's DataLoader
        self.split = split
        self.cfg = cfg
        self.device = torch.device(device)
        self.train = train
        self.epoch = 0
        self.batch_size = batch_size or cfg.batch_size
        self.rank, self.world = rank_and_world() if shared else (0, 1)
        # What batches are read from; `images_on_gpu` puts a copy on the GPU in its place.
        self.images = split.images

    def set_epoch(self, epoch):
        """Choose the epoch whose order and views the next iteration yields."""
        # Where views are replayed, an epoch has the number of the one that it repeats.
        self.epoch = epoch % self.cfg.teacher_views if self.cfg.replays else epoch

    def batches(self):
        """The rows of each step, over all processes.

        A last batch of less than two images per process joins the one before.
        """
        order = torch.arange(len(self.split))
        if self.train:
            # Drawn on the CPU: the order is the same on every device and in every process.
            order = torch.randperm(len(self.split), generator=self._generator(0))
        steps = list(order.split(self.batch_size))
        # One image is too few for batch norm's statistics.
        if len(steps) > 1 and len(steps[-1]) < 2 * self.world:
            steps[-2:] = [torch.cat(steps[-2:])]
        return steps

    def __len__(self):
        return len(self.batches())

    def __iter__(self):
        # All rows at once, so that a row's view does not depend on the batch that it is in.
        draw = self.draw_epoch()
        for step in self.batches():
            # The parts differ by one image at most, and together they are the step.
            rows = step.tensor_split(self.world)[self.rank]
            images = self.views_of(rows, draw)
            labels = self.split.labels[rows].to(self.device, non_blocking=True)
            # The mean over processes of weighted means is the mean over the whole batch, also where
            # the parts are not of one size.
            weight = len(rows) * self.world / len(step)
            yield Batch(images, labels, rows, weight, self.epoch)

    def views_of(self, rows, draw=None):
        """The normalised images (B, 3, S, S) of some rows as the chosen epoch shows them."""
        if draw is None:
            draw = self.draw_epoch()
        rows_there = rows.to(self.device, non_blocking=True)
        # The type alone, for the devices "cuda" and "cuda:0" are not equal.
        if self.images.device.type == self.device.type:
            images = self.images[rows_there]
        else:
            # From pinned memory the copy runs while the GPU computes.
            images = self.images[rows].pin_memory().to(self.device, non_blocking=True)
        if self.train and self.cfg.crop_scale:
            # Whole pictures (B, 3, side, side) -> crops (B, 3, S, S).
            images = warp(images, draw[rows_there], self.cfg.image_size)
        elif self.train:
            mirrored = draw[rows_there, None, None, None]  # (B, 1, 1, 1) bool
            images = torch.where(mirrored, images.flip(3), images)
        return normalize(images)

    def _generator(self, stream):
        """A CPU generator for one of this epoch's independent random streams."""
        # 15 hexadecimal digits are 60 bits, which fit a signed seed of 64. A hash, for seeds that
        # are sums of small numbers meet again in other epochs.
        seed = int(fingerprint(self.cfg.seed, self.epoch, stream)[:15], 16)
        return torch.Generator().manual_seed(seed)

    def draw_epoch(self):
        """This epoch's view of every row, on the device.

        Matrices for `warp`; without a random crop flips (N,) bool; None if not training.
        """
        if not self.train:
            return None
        # Stream 0 is the order's: shuffling and views are drawn independently.
        generator = self._generator(1)
        if not self.cfg.crop_scale:
            flips = torch.rand(len(self.split), generator=generator) < self.cfg.hflip
            return flips.to(self.device)
        # In parts: what is drawn on the way is twenty times as large as what remains.
        matrices = []
        for aspects in self.split.aspects.split(4096):
            matrices.append(sample_affine(aspects, self.cfg, generator))
        return torch.cat(matrices).to(self.device)


@contextlib.contextmanager
def images_on_gpu(*loaders):
    """Keep the images of BatchLoaders on their GPU for the block, if half its memory takes them.

    The other half is for weights, feature maps and the teacher. A loader that outlives its stage,
    as a notebook's does, must not hold gigabytes.
    """
    ours = [loader for loader in loaders if isinstance(loader, BatchLoader)]
    try:
        for loader in ours:
            device = loader.device
            if device.type == "cuda":
                torch.cuda.empty_cache()  # what torch keeps for later counts as free too
                free, _ = torch.cuda.mem_get_info(device)  # bytes
                if loader.images.nbytes < free / 2:
                    loader.images = loader.images.to(device)
        yield
    finally:
        for loader in ours:
            loader.images = loader.split.images


def training_form(cfg):
    """The stored form that a config trains on: the whole picture for random crops, else "eval"."""
    return "whole" if cfg.crop_scale else "eval"


def build_loaders(cfg, data, device):
    """(training BatchLoader, validation BatchLoader) of a config: its views, and the eval form.

    With train_on="both" the validation images are trained on too, and the second is None.
    """
    if cfg.train_on == "both":
        data = with_validation_images(data)
    train = load_data(data, "training", training_form(cfg), cfg.image_size)
    train_loader = BatchLoader(train, cfg, device, train=True)
    if cfg.train_on == "both":
        return train_loader, None
    # Validation is scored on the reference crop, whatever the training views are. Nothing is kept
    # for a backward pass, so larger batches fit.
    valid = load_data(data, "validation", "eval", cfg.image_size)
    return train_loader, BatchLoader(valid, cfg, device, batch_size=2 * cfg.batch_size)


# ==================================================================================================
# 4  Students
# ==================================================================================================


class GlobalAvgPool(nn.Module):
    """(B, C, H, W) -> (B, C). On CUDA its backward is deterministic, unlike AdaptiveAvgPool2d's."""

    def forward(self, x):
        return x.mean((2, 3))


def dwpw_conv(in_channels, out_channels, kernel_size=3, stride=2, padding=1):
    """The course's depthwise-separable block: (B, in, H, W) -> (B, out, H / stride, W / stride).

    A depthwise k x k convolution sees space, a pointwise 1 x 1 convolution mixes channels (Howard
    et al. 2017, MobileNets): k*k*in + in*out weights instead of k*k*in*out. The sizes hold for
    padding = kernel_size // 2.
    """
    return nn.Sequential(
        # Depthwise: groups=in_channels gives every channel a filter of its own.
        nn.Conv2d(in_channels, in_channels, kernel_size, stride, padding, groups=in_channels),
        nn.BatchNorm2d(in_channels),
        nn.LeakyReLU(0.01),
        # Pointwise: 1 x 1, across all channels.
        nn.Conv2d(in_channels, out_channels, 1),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(0.01),
    )


def sample_student(cfg):
    """The course's sample net: 59,723 parameters. (B, 3, H, W) -> logits (B, 11)."""
    layers = OrderedDict(
        # No padding: each convolution makes the map two pixels smaller. Sizes are those for 224.
        conv1=nn.Conv2d(3, 4, 3),
        bn1=nn.BatchNorm2d(4),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(4, 16, 3),
        bn2=nn.BatchNorm2d(16),
        relu2=nn.ReLU(),
        # (B, 16, 220, 220) -> (B, 16, 110, 110)
        pool2=nn.MaxPool2d(2),
        conv3=nn.Conv2d(16, 64, 3),
        bn3=nn.BatchNorm2d(64),
        relu3=nn.ReLU(),
        # (B, 64, 108, 108) -> (B, 64, 54, 54)
        pool3=nn.MaxPool2d(2),
        conv4=nn.Conv2d(64, 84, 3),
        bn4=nn.BatchNorm2d(84),
        relu4=nn.ReLU(),
        # (B, 84, 52, 52) -> (B, 84, 26, 26)
        pool4=nn.MaxPool2d(2),
        pool=GlobalAvgPool(),
        fc=nn.Linear(84, NUM_CLASSES),
    )
    return nn.Sequential(layers)


def plain_student():
    """A student of dwpw_conv blocks, 58,235 parameters: (B, 3, H, W) -> logits (B, 11).

    Its layers are as wide as the teacher's, so that they can be compared with them.
    """
    stem = nn.Sequential(
        # No bias: the batch norm behind it would subtract it again.
        nn.Conv2d(3, 48, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    return nn.Sequential(
        OrderedDict(
            stem=stem,  # (B, 48, H / 4, W / 4)
            layer1=dwpw_conv(48, 64, stride=1),  # (B, 64, H / 4, W / 4)
            layer2=dwpw_conv(64, 128),  # (B, 128, H / 8, W / 8)
            layer3=dwpw_conv(128, 256),  # (B, 256, H / 16, W / 16)
            pool=GlobalAvgPool(),  # (B, 256)
            fc=nn.Linear(256, NUM_CLASSES),
        )
    )


def conv_bn(in_channels, out_channels, kernel_size=1, stride=1, groups=1, activate=True):
    """A convolution without bias, batch norm, and hard-swish (Howard et al. 2019) if `activate`."""
    padding = kernel_size // 2
    layers = nn.Sequential(
        nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        ),
        nn.BatchNorm2d(out_channels),
    )
    if activate:
        layers.append(nn.Hardswish())
    return layers


class InvertedResidual(nn.Module):
    """A depthwise convolution between two widths (MobileNetV2, Sandler et al. 2018).

    (B, in, H, W) -> (B, out, H / stride, W / stride): expand 1x1, k x k depthwise, project 1x1.
    Space is seen at `expansion` times the width, where a depthwise weight is cheap; the narrow ends
    carry a shortcut where their shapes agree, so that many blocks can be stacked.
    """

    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1, expansion=3):
        super().__init__()
        wide = in_channels * expansion
        self.shortcut = stride == 1 and in_channels == out_channels
        self.expand = conv_bn(in_channels, wide)
        self.depthwise = conv_bn(wide, wide, kernel_size, stride, groups=wide)
        # No activation at the narrow end, where it would cut away what few channels hold.
        self.project = conv_bn(wide, out_channels, activate=False)

    def forward(self, x):
        out = self.expand(x)  # (B, wide, H, W)
        out = self.depthwise(out)  # (B, wide, H / stride, W / stride)
        out = self.project(out)  # (B, out, H / stride, W / stride)
        if self.shortcut:
            out = x + out
        return out


def ir_student(cfg):
    """A student of inverted residuals behind a 3x3 stride-2 stem: (B, 3, H, W) -> logits (B, 11).

    Only the first block of a layer has the layer's stride and changes the width. Late layers
    without a stride keep large feature maps, which cost multiply-adds, no parameters.
    """
    # (B, 3, H, W) -> (B, stem_width, H / 2, W / 2)
    net = nn.Sequential(OrderedDict(stem=conv_bn(3, cfg.stem_width, 3, 2)))
    width = cfg.stem_width
    shapes = zip(cfg.widths, cfg.depths, cfg.strides, strict=True)
    for number, (out_channels, depth, stride) in enumerate(shapes, 1):
        layer = nn.Sequential()
        for place in range(depth):
            stride = stride if place == 0 else 1
            layer.append(InvertedResidual(width, out_channels, stride=stride))
            width = out_channels
        net.add_module(f"layer{number}", layer)
    net.add_module("pool", GlobalAvgPool())
    net.add_module("fc", nn.Linear(width, NUM_CLASSES))
    return net


def resnet18(cfg):
    """torchvision's ResNet-18 with 11 classes and fresh weights: the teacher's net."""
    return torchvision.models.resnet18(num_classes=NUM_CLASSES)


NETS = {"sample": sample_student, "ir": ir_student, "resnet18": resnet18}


def build_student(cfg):
    """The net that `cfg` trains, its weights drawn from cfg.seed.

    The global random state is left alone.
    """
    # Weights are drawn on the CPU, whose generator is put back after the block.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return NETS[cfg.student](cfg)


def get_student_model():
    """The course's name for the student: the net of the last stage."""
    return build_student(BEYOND)


@contextlib.contextmanager
def evaluation_mode(model):
    """Eval mode and no gradients for the block, which gets the model's device.

    Afterwards the model is in the mode that it was in.
    """
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            yield device
    finally:
        model.train(training)


def check_budget(model, limit=PARAM_LIMIT, image_size=64):
    """The number of parameters of `model`, counted the strict way; UserError above `limit`.

    Strict is the larger of two counts. All parameters once, trained or frozen: that catches a bare
    nn.Parameter. Each module's own parameters once per call: that catches a module called twice,
    which the course's tool counts twice. A block that stands alone, dwpw_conv(64, 128), is counted
    too. image_size: the count does not depend on it, but a net may take images of one size alone.
    """
    calls = trace_calls(model, image_size)
    # parameters() yields a tensor that two modules share once.
    once = sum(p.numel() for p in model.parameters())
    count = max(once, sum(own for _, _, own in calls))
    if count > limit:
        raise UserError(
            f"the student has {count:,} parameters; the homework allows {limit:,}: "
            "choose smaller widths"
        )
    return count


def trace_calls(model, image_size):
    """[(name, output shape, own parameters)] for every call of a module that has parameters."""
    calls = []

    def record_as(name):
        def record(module, inputs, output):
            # The children's parameters are counted at the children's own calls.
            own = sum(p.numel() for p in module.parameters(False))
            if own:
                # A module that answers with a tuple (attention) is counted too.
                calls.append((name, tuple(getattr(output, "shape", ())[1:]), own))

        return record

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(record_as(name)))
        ask_once(model, image_size)
    return calls


def ask_once(model, image_size):
    """Run a made-up image (1, C, S, S) through a model in eval mode.

    C is 3, or what the first convolution of a block takes that stands alone.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    channels = convolutions[0].in_channels if convolutions else 0
    with evaluation_mode(model) as device:
        # nn.LazyConv2d has 0 channels until it has seen an image.
        model(torch.zeros(1, channels or 3, image_size, image_size, device=device))


def macs_by_module(model, image_size):
    """{module's name: multiply-adds for one image}; "" is the whole model.

    torch counts the operations of convolutions and matrix products: two per multiply-add.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        ask_once(model, image_size)
    macs = {}
    for name, operations in counter.get_flop_counts().items():
        # torch's names begin with the model's class; the whole is called Global.
        macs[name.partition(".")[2]] = sum(operations.values()) // 2
    return macs


def count_macs(model, image_size):
    """Multiply-adds of convolutions and linear layers for one image."""
    return macs_by_module(model, image_size)[""]


@illustration()
def layer_table(model, image_size=224):
    """A DataFrame of output shape, parameters and multiply-adds, and their sum.

    A row is a layer, or a block of layers (layer1.0, layer1.1, ...).
    """
    macs = macs_by_module(model, image_size)
    rows = []
    for name, shape, parameters in trace_calls(model, image_size):
        # Only layers without children have parameters of their own here. There are no multiply-adds
        # for what is no convolution or product, batch norm for example.
        output = " x ".join(map(str, shape))
        # "layer1.0.expand.0" belongs to the block "layer1.0".
        block = ".".join(name.split(".")[:2])
        rows.append((block, output, parameters, macs.get(name, 0)))
    frame = pd.DataFrame(rows, columns=["layer", "output", "parameters", "multiply-adds"])
    # In the order of the forward pass; a block's output is that of its last layer.
    frame = frame.groupby("layer", sort=False).agg(
        {"output": "last", "parameters": "sum", "multiply-adds": "sum"}
    )
    frame.loc["all"] = ["", frame["parameters"].sum(), macs[""]]
    return frame


# ==================================================================================================
# 5  Teacher
# ==================================================================================================


def load_weights(net, path):
    """Load a checkpoint into a net, and return it: the file itself or one of its values.

    The keys may have a prefix in common (module., model., _orig_mod.). Raises UserError where torch
    finds a key or shape that does not fit, or for values that are not finite.
    """
    saved = load_file(path)
    wanted = [key for key in net.state_dict() if not key.endswith("num_batches_tracked")]
    inner = saved.values() if isinstance(saved, dict) else ()
    found = []
    for state in (saved, *inner):
        for key in state if isinstance(state, dict) else ():
            prefix = str(key).removesuffix(wanted[0])
            if prefix != key and all(prefix + name in state for name in wanted):
                # What does not begin so is of something else.
                ours = filter(lambda item: item[0].startswith(prefix), state.items())
                found.append({name.removeprefix(prefix): value for name, value in ours})
    try:
        net.load_state_dict(found[0] if found else saved)
    except (RuntimeError, TypeError) as error:  # torch names what is missing or of another shape
        raise UserError(f"{path} is not loaded: {textwrap.shorten(str(error), 300)}") from None
    # A sum, for it is finite only if all its terms are.
    if not sum(value.double().sum() for value in net.state_dict().values()).isfinite():
        raise UserError(f"{path} is not loaded: it holds values that are not finite")
    return net


def load_teacher(path, device="cpu"):
    """The frozen teacher from a ResNet-18's checkpoint with torchvision's names and 11 classes.

    It is in eval mode, on `device`. Raises UserError where the file is no such teacher.
    """
    teacher = load_weights(build_student(TEACHER_CONFIG), path)
    return to_device(freeze(teacher), device)


def freeze(model):
    """Eval mode and no gradients: what runs through `model` moves no weights or statistics."""
    return model.eval().requires_grad_(False)


def state_checksum(model):
    """sha256 over all weights and buffers of a model, to prove that it was not changed."""
    checksum = hashlib.sha256()
    for name, value in model.state_dict().items():
        checksum.update(name.encode())
        # tobytes reads in C order, so a net in channels last has the same hash.
        checksum.update(value.cpu().numpy().tobytes())
    return checksum.hexdigest()


def copy_of_weights(model):
    """A copy of a model's state dict, contiguous and on the CPU."""
    weights = {}
    for name, value in model.state_dict().items():
        # Channels last is this device's choice; a file holds the plain layout.
        weights[name] = value.cpu().clone(memory_format=torch.contiguous_format)
    return weights


def soft_labels(logits, temperature):
    """softmax(logits / temperature) over the last dimension, fp32: (..., 11) -> (..., 11)."""
    return F.softmax(logits.float() / temperature, dim=-1)


VIEW_KEYS = tuple(f.name for f in dataclasses.fields(Config) if f.metadata["view"])


class StoredLogits:
    """The teacher's logits of K replayable epochs in one file: stored once, computed no more.

    Order and draws of epoch e are functions of (seed, e mod K), so a row's view e mod K is always
    the same picture. The file's name holds all that the logits depend on. Logits that are not
    stored yet are NaN, so a file that was half filled when the run was killed is filled up later.
    """

    def __init__(self, cfg, loader, teacher_key, dtype):
        split = loader.split
        shape = (cfg.teacher_views, len(split), NUM_CLASSES)
        # All that decides what picture a row shows, and how its logits are rounded.
        settings = [getattr(cfg, name) for name in VIEW_KEYS]
        how = (str(dtype), loader.device.type, loader.world)
        key = fingerprint(teacher_key, split.ids, split.contents, shape, settings, how)
        path = cache_root() / f"teacher-{key}.npy"
        # Each machine has a cache; its first process makes the file.
        if is_first_on_machine() and not path.is_file():
            with written_whole(path) as temporary, open(temporary, "wb") as file:
                np.save(file, np.full(shape, np.nan, np.float32))
        barrier()
        # Mapped: what is written to them is in the file.
        self.logits = torch.from_numpy(np.lib.format.open_memmap(path, "r+"))

    def read(self, batch):
        """Stored logits (B, 11) of a Batch, or None if one of them is not stored yet."""
        logits = self.logits[batch.view_epoch, batch.rows]
        # NaN is "not stored yet"; for one of them the teacher answers the whole batch again.
        if logits.isnan().any():
            return None
        return logits.to(batch.labels.device, non_blocking=True)

    def write(self, batch, logits):
        """Store the logits (B, 11) of a Batch."""
        self.logits[batch.view_epoch, batch.rows] = logits.detach().float().cpu()


CONFIG = "config.json"  # a run's settings, beside its checkpoints


def load_student(path):
    """(student in eval mode, its Config) from a student_best.ckpt with its config.json beside it.

    Raises UserError where the file is no student of that config (a net of your own, say).
    """
    cfg = Config(**json.loads(Path(path).with_name(CONFIG).read_text(encoding="utf-8")))
    return freeze(load_weights(build_student(cfg), path)), cfg


# ==================================================================================================
# 6  Losses
# ==================================================================================================


def loss_fn_kd(student_logits, labels, teacher_logits, alpha=0.5, temperature=20.0):
    """Knowledge distillation (Hinton, Vinyals, Dean 2015), computed in fp32:

        alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE(student, labels)

    student_logits, teacher_logits: (B, 11); labels: (B,) int64, or (B, 11) probabilities. KL is the
    mean over the batch of distributions softened by T; T^2 keeps its gradient at the size of the
    other term's. Returns a scalar.
    """
    student_logits = student_logits.float()

    # The soft loss: both distributions are softened by the temperature. F.kl_div(log_p, q) is
    # KL(q || p): the logarithms of the student's probabilities come first.
    log_p_student = F.log_softmax(student_logits / temperature, dim=1)
    p_teacher = soft_labels(teacher_logits, temperature)
    soft_loss = F.kl_div(log_p_student, p_teacher, reduction="batchmean")

    # The hard loss: the labels, without a temperature.
    hard_loss = F.cross_entropy(student_logits, labels)
    return alpha * temperature**2 * soft_loss + (1 - alpha) * hard_loss


LossWeights = namedtuple("LossWeights", "kd alpha align")


def loss_weights(cfg, progress):
    """LossWeights at progress p = (epoch + 1) / n_epochs.

    The loss is kd * loss_fn_kd(alpha) + align * alignment.

    cfg.loss_schedule "constant": the config's alpha, and both terms as they are. "handover": the
    published Boss form, in which alignment leads and the labels take over, 10 p^2 [(1 - p^2) T^2 KL
    + p^2 CE] + alignment, which is loss_fn_kd with alpha 1 - p^2, times 10 p^2.
    """
    if cfg.loss_schedule == "handover":
        return LossWeights(kd=10 * progress**2, alpha=1 - progress**2, align=1.0)
    return LossWeights(kd=1.0, alpha=cfg.alpha, align=1.0)


@contextlib.contextmanager
def feature_hooks(model, layers):
    """A dict that a forward pass inside the block fills with the named layers' outputs, in fp32.

    No hook outlives the block.
    """
    features = {}

    # A function that makes the hook, so that each hook has its own name and not the loop's last.
    def keep_as(name):
        def keep(module, inputs, output):
            features[name] = output.float()  # as the losses want it, whatever the autocast

        return keep

    # A hook's handle is a context manager: it is removed with the stack, after an error too.
    with contextlib.ExitStack() as hooks:
        for name in layers:
            layer = model.get_submodule(name)
            hooks.enter_context(layer.register_forward_hook(keep_as(name)))
        yield features


def features_of(model, layers, images):
    """{layer: (B, C, H, W)}: what the named layers of a model give for images, in eval mode."""
    with evaluation_mode(model) as device, feature_hooks(model, layers) as maps:
        model(images.to(device))
    return maps


def pooled_to(maps, side):
    """Feature maps (B, C, H, W) in fp32; larger ones are averaged down to (B, C, side, side)."""
    # Maps are square, for images are.
    if maps.shape[-1] == side:
        return maps.float()
    return F.adaptive_avg_pool2d(maps.float(), side)


def alignment(student_maps, teacher_maps, weights, adapters):
    """Sum over layers of weight * smooth-L1(adapter(student map), teacher map), in fp32.

    Layer-wise supervision: FitNets, Romero et al. 2015. Maps: {layer: (B, C, H, W)}; weights:
    {layer: number}; adapters: {layer: module}, which bring a student map to the teacher's width.
    The larger of two maps is averaged down to the size of the other one. Returns a scalar.
    """
    total = 0.0
    for layer, weight in weights.items():
        ours = student_maps[layer]
        theirs = teacher_maps[layer]
        side = min(ours.shape[-1], theirs.shape[-1])
        ours = adapters[layer](pooled_to(ours, side))  # (B, teacher's channels, side, side)
        theirs = pooled_to(theirs, side)
        # The mean over images, channels and places: a large map weighs no more than a small one.
        total = total + weight * F.smooth_l1_loss(ours, theirs)
    return total


def build_adapters(cfg, student, teacher, layers):
    """{layer: module}: a 1x1 convolution where student and teacher differ in width, else nothing.

    Their weights are drawn from cfg.seed; the global random state is left alone. torch's own error
    names a layer that the student lacks.
    """
    # A forward pass tells the widths of any net, a learner's own too: (1, C, H, W) per layer.
    image = torch.zeros(1, 3, cfg.image_size, cfg.image_size)
    ours = features_of(student, layers, image)
    theirs = features_of(teacher, layers, image)
    adapters = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        for layer in layers:
            width = ours[layer].shape[1]
            wanted = theirs[layer].shape[1]
            adapters[layer] = nn.Identity() if width == wanted else nn.Conv2d(width, wanted, 1)
    return adapters


# What DistillLoss gives: the loss to be minimised, its terms before they are weighed
# ({"ce", "kl", "align"} -> scalars without gradient), and both nets' logits (B, 11).
Distilled = namedtuple("Distilled", "loss terms student_logits teacher_logits")

# What trains where nobody hands in their own.
OWN_CODE = {"loss_fn_kd": loss_fn_kd, "alignment": alignment, "loss_weights": loss_weights}


class DistillLoss(nn.Module):
    """Student, teacher, adapters and the weighted sum of losses in one object.

    No training step can swap them. forward(images (B, 3, S, S), labels, teacher_logits=None) ->
    Distilled. The teacher does not run where the loss needs labels alone, nor where its logits are
    given and no layers are aligned. Adapters are 1x1 convolutions where a student layer is narrower
    or wider than the teacher's: trained, never counted, never saved with the student. The networks
    run under autocast to `dtype`; the losses are fp32.

    own: loss_fn_kd, alignment, loss_weights, your own in place of this module's, with the same
    arguments. The loss gets fp32 logits and the true alpha and temperature, and its value is what
    is minimised. Raises UserError where a term needs a teacher and there is none.
    """

    def __init__(self, cfg, student, teacher=None, **own):
        super().__init__()
        if cfg.needs_teacher and teacher is None:
            raise UserError(f"{cfg.exp_name} needs a teacher: README says how to get one")
        self.cfg = cfg
        self.student = student
        # Stored in __dict__, so that nn.Module does not register it: no optimizer, checkpoint or
        # data-parallel wrapper sees the teacher's weights, and train() does not reach it. A teacher
        # that no term asks about would only cost time.
        self.__dict__["teacher"] = freeze(teacher) if cfg.needs_teacher else None
        self.own = own
        for name, code in {**OWN_CODE, **own}.items():
            setattr(self, name, code)
        self.layers = cfg.aligned_layers if cfg.needs_teacher else {}
        # Registered, unlike the teacher: the optimizer moves them and a checkpoint keeps them.
        self.adapters = nn.ModuleDict()
        if self.layers:
            self.adapters = build_adapters(cfg, student, teacher, self.layers)
        self.dtype = None  # of the networks under autocast; None: full precision
        self.set_progress(0.0)

    @property
    def device(self):
        """Where the student is."""
        return next(self.student.parameters()).device

    def on(self, device):
        """Move all nets to a device, in its layout and training precision; returns self."""
        to_device(self, device)
        if self.teacher is not None:
            to_device(self.teacher, device)
        self.dtype = amp_dtype(torch.device(device), self.cfg.amp)
        return self

    def set_progress(self, progress):
        """Choose the weights for progress p = (epoch + 1) / n_epochs."""
        self.weights = self.loss_weights(self.cfg, progress)

    def forward(self, images, labels, teacher_logits=None):
        with self._autocast(images), feature_hooks(self.student, self.layers) as student_maps:
            student_logits = self.student(images)
        # Labels alone: the losses are fp32 whatever the networks run in.
        if self.teacher is None:
            loss = F.cross_entropy(student_logits.float(), labels)
            return Distilled(loss, {"ce": loss.detach()}, student_logits, None)

        teacher_maps = {}
        # Stored logits spare the teacher's pass, but its feature maps are too large to be stored.
        if self.layers or teacher_logits is None:
            with (
                torch.no_grad(),
                self._autocast(images),
                feature_hooks(self.teacher, self.layers) as teacher_maps,
            ):
                # It sees the very views that the student sees.
                teacher_logits = self.teacher(images)

        kd, alpha, align = self.weights
        temperature = self.cfg.temperature
        plain = (student_logits.detach(), labels, teacher_logits)
        terms = {
            "ce": loss_fn_kd(*plain, 0.0, temperature),
            "kl": loss_fn_kd(*plain, 1.0, temperature),
        }
        # A learner's own loss need not know of autocast, and may write to what it gets: the
        # teacher's logits, which are stored for later epochs, it gets as a copy.
        both = (student_logits.float(), labels, teacher_logits.float().clone())
        loss = kd * self.loss_fn_kd(*both, alpha, temperature)
        if self.layers:
            term = self.alignment(student_maps, teacher_maps, self.layers, self.adapters)
            loss = loss + align * term
            terms["align"] = term.detach()
        return Distilled(loss, terms, student_logits, teacher_logits)

    def _autocast(self, images):
        return torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None)


# ==================================================================================================
# 7  Training
# ==================================================================================================

HISTORY_COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "train_acc",
    "ce",
    "kl",
    "align",
    "valid_loss",
    "valid_acc",
    "n",
    "seconds",
)
# Steps between two looks at whether the loss is finite; each look waits for the device.
CHECK_FINITE_EVERY = 20
KAGGLE_HOURS = 12
# In the environment, so that the processes that this one starts know it too.
SESSION_START = float(os.environ.setdefault("HW13_SESSION_START", str(time.time())))


def build_optimizer(cfg, parameters):
    """The optimizer of the config over `parameters`: one fused kernel per step."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[cfg.optimizer]
    return kind(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def learning_rate(cfg, epoch):
    """The learning rate at a fractional epoch."""
    # 1) linear warm-up; the thousandth, so that the first step moves too
    if epoch < cfg.warmup_epochs:
        return cfg.lr * min(1.0, (epoch + 1e-3) / cfg.warmup_epochs)
    # 2) constant
    if cfg.lr_schedule == "constant":
        return cfg.lr
    # 3) half a cosine from lr down to zero over the epochs that remain
    # 1e-9 against a division by zero where all epochs are warm-up.
    done = (epoch - cfg.warmup_epochs) / max(cfg.n_epochs - cfg.warmup_epochs, 1e-9)
    return cfg.lr * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def best_so_far(history):
    """(best validation accuracy in a history's rows, epochs since then).

    Without validation (NaN) every epoch counts as the best so far: the last one is kept.
    """
    best = -1.0
    since = 0
    for row in history:
        since += 1
        if row["valid_acc"] > best or math.isnan(row["valid_acc"]):
            best = row["valid_acc"]
            since = 0
    return best, since


def is_finished(history, cfg):
    """Whether a run has had all its epochs, or `patience` of them without a better accuracy."""
    return len(history) >= cfg.n_epochs or best_so_far(history)[1] >= cfg.patience


class TrainState:
    """All that a run carries from epoch to epoch.

    state_dict() and load_state_dict() make resuming exact.
    """

    def __init__(self, loss_fn):
        self.loss_fn = loss_fn
        self.history = []
        self.best = copy_of_weights(loss_fn.student)  # of the best epoch by validation accuracy
        # Student and adapters; the teacher is not registered.
        self.optimizer = build_optimizer(loss_fn.cfg, loss_fn.parameters())
        # bf16 has the range of fp32, so only fp16 needs its loss scaled.
        in_fp16 = loss_fn.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(loss_fn.device.type, enabled=in_fp16)

    def state_dict(self):
        return {
            "history": self.history,
            "best": self.best,
            "processes": rank_and_world()[1],
            "loss_fn": self.loss_fn.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state):
        self.history = state["history"]
        self.best = state["best"]
        self.loss_fn.load_state_dict(state["loss_fn"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run was not in fp16
            self.scaler.load_state_dict(state["scaler"])


def refuse_evaluation(loader):
    """UserError for a loader or Dataset of evaluation images, however torch wrapped it."""
    while loader is not None:
        if getattr(loader, "name", None) == "evaluation":
            raise UserError(
                "evaluation images are for predictions alone: "
                "they must not enter training or validation"
            )
        loader = getattr(loader, "dataset", None)


def train_one_epoch(state, forward, loader, epoch, stored=None, on_step=None):
    """One pass over the training images: {"lr", "train_loss", "train_acc"} and the loss's terms.

    forward: state.loss_fn or its data-parallel wrapper. loader yields (images, labels) or Batch.
    stored: StoredLogits to read or fill. on_step is told how many images each step had. Sums stay
    on the device, so no step waits for one. Raises UserError where a loss is not finite.
    """
    loss_fn = state.loss_fn
    cfg = loss_fn.cfg
    # The student alone: the teacher is no submodule and stays in eval mode.
    loss_fn.train()
    # A schedule moves from epoch to epoch, never within one.
    loss_fn.set_progress((epoch + 1) / cfg.n_epochs)
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    # For what draws from the global random state: dropout, an own loss, a DataLoader. Processes
    # draw apart, for each has other images.
    torch.manual_seed(int(fingerprint(cfg.seed, epoch, rank_and_world()[0])[:12], 16))

    n_steps = len(loader)
    sums = EpochSums()
    unchecked = []  # (loss, rows, teacher's logits) since the last look
    for step, batch in enumerate(loader):
        batch = Batch(*batch)
        # Views are made in fp32; networks under autocast want their own type at once.
        images = to_device(batch.images, loss_fn.device, loss_fn.dtype or torch.float32)
        labels = batch.labels.to(loss_fn.device, non_blocking=True)

        teacher_logits = stored.read(batch) if stored else None
        out = forward(images, labels, teacher_logits)
        lr = learning_rate(cfg, epoch + step / n_steps)
        # The weight is 1, except where the processes' parts of a step differ in size (see Batch).
        optimizer_step(state, out.loss * batch.weight, lr, cfg.grad_norm_max)
        # The teacher answered anew: kept for the epoch in which this view comes again.
        if stored and teacher_logits is None:
            stored.write(batch, out.teacher_logits)

        # The loss without the weight, for the sums count by images.
        sums.add(out, labels)
        unchecked.append((out.loss.detach(), batch.rows, out.teacher_logits))
        # Looking at a loss waits for the device, so it is done for many steps together.
        if len(unchecked) == CHECK_FINITE_EVERY or step == n_steps - 1:
            check_finite(unchecked, cfg, epoch, loader)
            unchecked = []
        if on_step:
            on_step(len(labels))
    return {"lr": lr, **sums.means()}


class EpochSums:
    """Sums over an epoch's images, kept on the device: loss, right answers, terms of the loss."""

    def __init__(self):
        self.sums = {}

    def add(self, out, labels):
        """Count a step: Distilled and labels (B,)."""
        n = len(labels)
        correct = (out.student_logits.detach().argmax(1) == labels).sum()
        step = {
            "train_loss": out.loss.detach() * n,
            "train_acc": correct,
            "n": torch.tensor(n),
        }
        step |= {name: term * n for name, term in out.terms.items()}
        for name, total in step.items():
            # fp64: a sum of a million small numbers in fp32 would lose the last of them.
            self.sums[name] = self.sums.get(name, 0.0) + total.double()

    def means(self):
        """{"train_loss", "train_acc"} and the terms: means over the images of all processes."""
        for total in self.sums.values():
            all_reduce(total)
        totals = {name: total.item() for name, total in self.sums.items()}
        n = totals.pop("n")
        return {name: total / n for name, total in totals.items()}


def check_finite(losses, cfg, epoch, loader):
    """UserError naming epoch and images of the first loss that is not finite.

    losses: (loss, rows, teacher's logits) of some steps. It reads the device, so it is called every
    CHECK_FINITE_EVERY batches and not at each. The teacher is asked first: where its answers are
    not finite, no learning rate helps.
    """
    good = torch.stack([loss for loss, *_ in losses]).isfinite().tolist()
    if all(good):
        return
    _, rows, teacher_logits = losses[good.index(False)]
    what = f"the loss is not finite: lower lr (now {cfg.lr:g}) or set amp=off"
    if teacher_logits is not None and not teacher_logits.isfinite().all():
        what = "the teacher's answers are not finite: set amp=off, or take another teacher"
    # A DataLoader does not tell which images a batch has: no rows.
    ids = some_of([loader.split.ids[row] for row in rows])
    raise UserError(f"{what} (in epoch {epoch + 1}, at the images {ids}); what was saved is intact")


def optimizer_step(state, loss, lr, grad_norm_max):
    """Backward pass, clipped gradients, one step.

    Under fp16 the gradients are unscaled before they are clipped; without it the scaler does
    nothing.
    """
    # Set by hand at each step, so that a resumed run needs no scheduler's state.
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    state.scaler.unscale_(state.optimizer)
    # Student and adapters together: one norm over all that is trained.
    nn.utils.clip_grad_norm_(state.loss_fn.parameters(), grad_norm_max)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def predict_logits(model, loader):
    """(logits (N, 11) float32, labels (N,)) on the CPU, in the loader's order.

    In eval mode and full precision. Under torch.distributed these are this process's parts of every
    batch alone.
    """
    all_logits = []
    all_labels = []
    with evaluation_mode(model) as device:
        for images, labels, *_ in loader:
            all_logits.append(model(to_device(images, device)).float())
            all_labels.append(labels)
    return torch.cat(all_logits).cpu(), torch.cat(all_labels).cpu()


def evaluate(model, loader):
    """{"valid_loss", "valid_acc", "n"} of a model on a loader's labelled (validation) images.

    Every process evaluates a part of each batch; the sums are over all of them.
    """
    logits, labels = predict_logits(model, loader)
    # Sums, not means: the processes' parts may differ in size.
    loss = F.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(1) == labels).sum()
    device = next(model.parameters()).device
    sums = torch.tensor([loss, correct, len(labels)], dtype=torch.float64, device=device)
    all_reduce(sums)
    loss, correct, n = sums.tolist()
    return {"valid_loss": loss / n, "valid_acc": correct / n, "n": int(n)}


def standard_error(accuracy, n):
    """sqrt(p (1 - p) / n): what an accuracy over n images is uncertain by.

    Numbers, or Series and DataFrames of them.
    """
    return (accuracy * (1 - accuracy) / n) ** 0.5


def plus_minus(accuracy, n):
    """An accuracy over n images with its standard error: "0.8123 +- 0.0101"."""
    return f"{accuracy:.4f} +- {standard_error(accuracy, n):.4f}"


def paired_difference(correct, others_correct):
    """(difference in accuracy, its standard error) of two nets on the same N images.

    correct, others_correct: (N,) bool, whether each image was answered rightly. Images on which
    both are right or both are wrong say nothing about the difference, so this error is the smaller
    one: that of the mean of N values -1, 0 or 1.
    """
    differences = correct.double() - others_correct.double()  # (N,)
    # Divided by N and not N - 1, as `standard_error` has it: p (1 - p) is such a variance.
    error = differences.std(correction=0) / math.sqrt(len(differences))
    return differences.mean().item(), error.item()


def introduce_teacher(teacher, split, n_images=200):
    """Say the teacher's accuracy on some validation images, and return it.

    split: validation in the `eval` form; n_images are taken at equal distances, so all classes are
    among them. It is said loudly where the teacher is no better than chance: trained on classes in
    another order, or not trained. Raises UserError where its answers are not finite.
    """
    rows = torch.linspace(0, len(split) - 1, min(n_images, len(split))).long()
    labels = split.labels[rows]
    # Fifty at a time, which bounds the memory that feature maps take.
    batches = zip(normalize(split.images[rows]).split(50), labels.split(50), strict=True)
    score = evaluate(teacher, batches)
    if not math.isfinite(score["valid_loss"]):
        raise UserError("the teacher cannot teach: its answers to validation images are not finite")
    accuracy = score["valid_acc"]
    n = len(rows)
    say(f"the teacher's accuracy is {plus_minus(accuracy, n)} on {n} validation images")
    # Chance: to answer always with the most frequent class. Two standard errors above it, a
    # teacher knows something.
    chance = labels.bincount().max().item() / n
    if accuracy < chance + 2 * standard_error(chance, n):
        say(
            "WARNING: THIS TEACHER IS NO BETTER THAN CHANCE: its classes are in another order, or "
            "it is not trained; students learn its mistakes"
        )
    return accuracy


def fit(loss_fn, train_loader, valid_loader=None, folder=None):
    """Train the student of a DistillLoss as its config says; returns the history, a dict per epoch.

    It trains any net. The loaders are BatchLoaders or the course's DataLoaders (valid_loader None:
    no validation, the last epoch's net counts); the net is on its device. folder: a RunFolder, to
    which every epoch is saved, and from which a run goes on, exactly as if it had not stopped (on
    CPUs; CUDA's sums are not the same from run to run). The student ends with its best weights,
    also where the time limit ends it early, or Ctrl-C or a notebook's stop button.
    Raises UserError where a loss is not finite, or where it is handed evaluation images.
    """
    cfg = loss_fn.cfg
    refuse_evaluation(train_loader)
    refuse_evaluation(valid_loader)
    # Layout and precision, in case the caller moved the net by hand.
    loss_fn.on(loss_fn.device)
    if loss_fn.device.type == "cpu":
        keep_freed_memory()
    state = TrainState(loss_fn)
    if folder:
        folder.open(state)
    stored = None
    if cfg.replays and isinstance(train_loader, BatchLoader):
        stored = StoredLogits(cfg, train_loader, state_checksum(loss_fn.teacher), loss_fn.dtype)
    try:
        with images_on_gpu(train_loader, valid_loader):
            train_epochs(state, train_loader, valid_loader, stored, folder)
    except torch.OutOfMemoryError as error:
        with_note(error, f"{cfg.exp_name}: set batch_size={cfg.batch_size // 2}, or less")
        raise
    except KeyboardInterrupt:
        say(f"{cfg.exp_name}: stopped after epoch {len(state.history)}; run again, and it goes on")
        raise
    finally:
        # After an error too: the caller's net is the best one in any case.
        loss_fn.student.load_state_dict(state.best)
    return state.history


def train_epochs(state, train_loader, valid_loader, stored, folder):
    """Train, validate and save epoch by epoch, until the last, or patience or time runs out."""
    loss_fn = state.loss_fn
    cfg = loss_fn.cfg
    # The wrapper averages gradients over processes; what has state is still read from loss_fn.
    forward = data_parallel(loss_fn)
    n_images = len(train_loader.dataset)
    n_processes = rank_and_world()[1]
    options = {"total": cfg.n_epochs * n_images, "initial": len(state.history) * n_images}
    with progress_bar(desc=cfg.exp_name, **options) as bar:

        def on_step(n):
            bar.update(n * n_processes)  # each has about as many

        # The length of the history is the clock, so a restored run goes on at the right epoch.
        while not is_finished(state.history, cfg):
            epoch = len(state.history)
            if time_is_up(cfg, state.history):
                say(
                    f"{cfg.exp_name}: ends after epoch {epoch}, for the session's time is nearly up"
                    "; a new one goes on (on Kaggle: attach this one's output as an input)"
                )
                break
            start = time.perf_counter()
            row = train_one_epoch(state, forward, train_loader, epoch, stored, on_step)
            share_buffers(loss_fn.student)
            scores = evaluate(loss_fn.student, valid_loader) if valid_loader else {}
            # Saving is not counted: it is no part of the training's speed.
            seconds = time.perf_counter() - start
            row = {"epoch": epoch + 1, **row, "valid_acc": math.nan, **scores, "seconds": seconds}
            state.history.append(row)
            best, since = best_so_far(state.history)
            if since == 0:
                state.best = copy_of_weights(loss_fn.student)
            shown = {"valid": row["valid_acc"], "best": best} if valid_loader else {}
            bar.set_postfix(shown, loss=row["train_loss"])
            if folder:
                folder.save(state)
            barrier()


def time_is_up(cfg, history):
    """Whether another epoch would leave too little of the session to predict and write the CSV.

    Needed are the next epoch, a prediction (counted as one more epoch), and five minutes, or a
    tenth of a short limit. The first of several processes decides.
    """
    hours = cfg.time_limit_h or (KAGGLE_HOURS - 0.5 if on_kaggle() else math.inf)
    limit = 3600 * hours
    # A guess for the first epoch, which the longest one so far replaces.
    longest = max((row["seconds"] for row in history), default=min(300, limit / 20))
    needed = 2 * longest + min(300, limit / 10)
    return from_first_process(time.time() - SESSION_START + needed > limit)


# --- several processes ---


def data_parallel(loss_fn):
    """The loss in torch's data-parallel wrapper; itself in a single process."""
    if rank_and_world()[1] == 1:
        return loss_fn
    device_ids = [loss_fn.device] if loss_fn.device.type == "cuda" else None
    # The loss and not the net, so that adapters are averaged with the student.
    return nn.parallel.DistributedDataParallel(loss_fn, device_ids)


def share_buffers(student):
    """Give all processes the first one's batch-norm statistics, with which all then validate."""
    if rank_and_world()[1] > 1:
        for buffer in student.buffers():
            torch.distributed.broadcast(buffer, 0)


@contextlib.contextmanager
def process_group():
    """Join the processes that torch.distributed's environment variables name, for the block.

    torchrun sets them, and `fit_on_all`; without them this is the only process. GPUs use NCCL,
    and gloo beside it, by which values in the CPU's memory are handed on.
    """
    if {"RANK", "MASTER_PORT"} <= os.environ.keys():
        device = pick_device()
        is_gpu = device.type == "cuda"
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if is_gpu else "gloo",
            timeout=datetime.timedelta(hours=12),  # the others wait while one decodes
            device_id=device if is_gpu else None,
        )
    yield
    # Not in a finally: a process that failed must end at once, so that the others are ended.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def n_gpus(loss_fn):
    """How many GPUs train a stage: all of a notebook's machine; own code lives in one process."""
    n = torch.cuda.device_count()
    if n < 2 or not in_notebook() or loss_fn.device != torch.device("cuda", 0):
        return 1
    if loss_fn.own:
        say(f"one of {n} GPUs trains, for your own code is in this notebook only")
        return 1
    return n


def fit_on_all(loss_fn, data, folder, n):
    """`fit` with n processes, one per GPU, which leave the run in the folder: the history."""
    from torch.distributed.elastic.utils.distributed import get_free_port

    cfg = loss_fn.cfg
    state = TrainState(loss_fn)
    folder.open(state)
    if not is_finished(state.history, cfg):
        say(f"{cfg.exp_name}: {n} GPUs train, a process each")
        # A copy, for processes share tensors of the CPU.
        job = (n, str(get_free_port()), copy.deepcopy(loss_fn).on("cpu"), data, folder)
        torch.cuda.empty_cache()  # the first process trains on this one's GPU
        started = torch.multiprocessing.spawn(train_rank, job, nprocs=n, join=False)
        try:
            while not started.join():  # it returns as each of them ends
                pass
        except torch.multiprocessing.ProcessRaisedException as error:
            # Its text is the traceback of the process.
            sentence = re.search("UserError: (.+)", str(error))
            if sentence:
                raise UserError(sentence[1]) from None
            raise
        finally:
            # The stop button may reach this process alone.
            for process in started.processes:
                process.terminate()
        folder.open(state)
        # The processes swallow the stop button.
        if not is_finished(state.history, cfg) and not time_is_up(cfg, state.history):
            raise KeyboardInterrupt
    loss_fn.student.load_state_dict(state.best)
    return state.history


def train_rank(rank, n, port, loss_fn, data, folder):
    """What one of n processes does: join, train its part of every batch, leave."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(n))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(max(1, usable_cpus() // n))
    # helpers.py may have been edited since the notebook imported it.
    folder.check_code(loss_fn)
    with process_group():
        device = pick_device()
        train_loader, valid_loader = build_loaders(loss_fn.cfg, data, device)
        # A copy, for the processes share tensors of the CPU.
        fit(copy.deepcopy(loss_fn).on(device), train_loader, valid_loader, folder)


# ==================================================================================================
# 8  Submission
# ==================================================================================================

# Of a picture's shorter side; 1.0 is its largest central square.
VIEW_SCALES = (1.0, 0.75)
PREDICTIONS = "predictions.csv"  # in a run's folder; <out>/<stage>.csv is a copy
RESULT = "result.json"  # what a later call compares a stage's CSV by


def centre_crops(aspects, scale):
    """Matrices (N, 1, 2, 3) to the central square of `scale` times a picture's shorter side.

    In the `whole` form, where a picture of any aspect is a square.
    """
    # A square in pixels: of the longer side, which counts as 1 too, a smaller part.
    wide = scale * (1 / aspects).clamp(max=1)
    high = scale * aspects.clamp(max=1)
    return affine_matrix(wide, 0, 0, high)[:, None, :2].float()


def six_views(student, eval_loader, whole_loader):
    """Mean class probabilities (N, 11) over six views of each picture; nothing is drawn.

    The views are the evaluation crop, two other scales of it, and the mirror images of all three.
    eval_loader, whole_loader: BatchLoaders of one split in either form, in equal batches.
    """
    aspects = whole_loader.split.aspects
    # (N, 1, 2, 3): a way to the source and no frame, so `warp` blackens nothing.
    crops = [centre_crops(aspects, scale).to(whole_loader.device) for scale in VIEW_SCALES]
    size = whole_loader.cfg.image_size
    parts = []
    with evaluation_mode(student):
        for cropped, whole in zip(eval_loader, whole_loader, strict=True):
            views = [cropped.images]
            # They are normalised already, which sampling keeps, for its four weights sum to 1.
            views += [warp(whole.images, matrices[whole.rows], size) for matrices in crops]
            total = 0.0
            for images in views:
                total = total + F.softmax(student(images).float(), 1)
                total = total + F.softmax(student(images.flip(3)).float(), 1)
            # Two answers to each view, plain and mirrored: the mean (B, 11).
            parts.append(total.cpu() / (2 * len(views)))
    return torch.cat(parts)


def predict(student, data, cfg, device, split="evaluation", views=6):
    """The class (N,) int64 of every image of a split of FoodData, in the order of its ids.

    views: 1, the reference crop, or 6 (`six_views`). UserError for answers that are not finite.
    """
    student = student.to(device)
    loaders = []
    for form in ("eval", "whole") if views == 6 else ("eval",):
        images = load_data(data, split, form, cfg.image_size)
        # Every process predicts all images, so none has to collect the others' parts.
        loader = BatchLoader(images, cfg, device, batch_size=2 * cfg.batch_size, shared=False)
        loaders.append(loader)
    answers = six_views(student, *loaders) if views == 6 else predict_logits(student, *loaders)[0]
    # The largest of NaNs would be class 0, for every image.
    if not answers.isfinite().all():
        raise UserError(
            f"the net's answers to {split} images are not finite: its weights are damaged or too "
            "large; no CSV is written"
        )
    return answers.argmax(1)


def write_submission(path, ids, classes):
    """Write the CSV Id,Category, a row per image in the given order, whole or not at all."""
    # An array, for a tensor would be written as "tensor(3)".
    rows = pd.DataFrame({"Id": ids, "Category": np.asarray(classes)})
    write_text(path, rows.to_csv(index=False, lineterminator="\n"))


def validate_submission(path, ids):
    """The number of rows of a CSV that Kaggle would take; UserError says what is wrong, and where.

    ids: the wanted ones. The order of the rows does not count, as on Kaggle. Rows count from 1 and
    with the header, as an editor shows them.
    """
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:  # empty, binary, or of rows of other lengths
        raise UserError(f"{path} is no CSV: {str(error).strip()}") from None
    # Rows that are longer than the header make their first field the index.
    if list(rows) != ["Id", "Category"] or not isinstance(rows.index, pd.RangeIndex):
        raise UserError(f"{path}, row 1: the header is {some_of(list(rows))}, not Id,Category")
    missing = dict.fromkeys(ids)
    for number, (name, category) in enumerate(rows.itertuples(index=False), 2):
        if name not in missing or not re.fullmatch("[0-9]|10", category):
            raise UserError(
                f"{path}, row {number} is {name},{category}: wanted is each evaluation image's id "
                "once (was it there before?), and a class from 0 to 10"
            )
        del missing[name]
    if missing:
        raise UserError(f"{path}: {len(missing)} ids are missing ({some_of(list(missing))})")
    return len(rows)


def write_predictions(student, data, cfg, path, device, views):
    """Predict the evaluation images, write the CSV and validate it, from the first process."""
    classes = predict(student, data, cfg, device, views=views)
    if is_first_process():
        write_submission(path, data.ids["evaluation"], classes)
        n = validate_submission(path, data.ids["evaluation"])
        say(f"{path}: {n} rows, of {len(classes.unique())} classes")
        if len(classes.unique()) == 1:
            say("WARNING: all in one class: this net tells nothing apart")


def write_result(run, images):
    """Leave a Run's score and a hash of its images in its folder, for later calls."""
    score = -1.0 if math.isnan(run.valid_acc) else run.valid_acc
    result = {"stage": run.label, "valid_acc": score, "images": images}
    write_text(run.folder / RESULT, json.dumps(result, indent=1) + "\n")


def read_result(folder):
    """What `write_result` left in a folder."""
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def best_run(runs):
    """The Run with the best validation accuracy, the first of equal ones.

    One without an epoch, or that has trained on the validation images, is never the best.
    """
    scored = [run for run in runs if len(run.history) and run.correct is not None]
    if not scored:
        raise UserError("no run has an epoch and a validation score yet")
    return max(scored, key=lambda run: run.valid_acc)


def write_best(runs, data, out=None, final=None):
    """Copy the CSV of the best run by validation accuracy to submission.csv; return its path.

    Stages of earlier calls in the folder count too, those of the exercises edition among them, if
    their images were the same. final: a Run (train_on="both", say) whose CSV is wanted instead. For
    the demo set the file is called submission_demo.csv.
    """
    name = "submission_demo.csv" if data.is_demo else "submission.csv"
    path = out_folder(out) / name
    if not is_first_process():
        return path
    best = final or best_run(runs)
    folder = best.folder
    why = f"the final fit, {best.label}, as asked"
    if final is None:
        result = read_result(folder)
        for other in sorted(path.parent.glob(f"**/{RESULT}")):
            found = read_result(other.parent)
            same_images = found["images"] == result["images"]
            if same_images and found["valid_acc"] > result["valid_acc"]:
                result, folder = found, other.parent
        why = f"{result['stage']} has the best validation accuracy, {result['valid_acc']:.4f}"
    write_text(path, (folder / PREDICTIONS).read_text(encoding="utf-8"))
    say(f"{path} is {folder / PREDICTIONS}: {why} ({data.origin})")
    return path


# ==================================================================================================
# 9  Runs
# ==================================================================================================

BEST = "student_best.ckpt"  # a plain state dict
LAST = "last.ckpt"  # what a run goes on from

# --- what a run is ---


def probe(loss_fn):
    """What one made-up training step answers: {part: [numbers]}. So code is known by what it does.

    A batch with all eleven classes goes through the views, both nets and the loss, on the CPU and
    without autocast. Other machines differ by 4e-5 at most (relative), a temperature that is 1 %
    off by 3e-3 in the gradients. The net is asked with numbers that are filled in, for an instance
    made without a seed has other first weights in each session.
    Raises UserError for answers that are no eleven logits, a loss that is not finite, and a student
    that no gradient reaches.
    """
    try:
        return probe_on("cpu", copy.deepcopy(loss_fn))
    except RuntimeError:
        # A loss of one's own may hold tensors on the GPU.
        return probe_on(loss_fn.device, copy.deepcopy(loss_fn))


def probe_on(device, loss_fn):
    """`probe` on a device, of a DistillLoss that may be changed."""
    loss_fn.on(device).dtype = None
    fill_in(loss_fn)
    images = made_up_views(loss_fn.cfg).to(device)
    labels = torch.arange(NUM_CLASSES, device=device)
    answers, losses = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for dropout
        loss_fn.train()
        for progress in (0.1, 0.5, 1.0):
            loss_fn.set_progress(progress)
            logits = loss_fn.student(images)
            if logits.shape != (NUM_CLASSES, NUM_CLASSES):
                raise UserError(f"the student answers eleven images with {tuple(logits.shape)}")
            out = loss_fn(images, labels)
            answers += [net_logits for net_logits in out[2:] if net_logits is not None]
            losses += [out.loss, *out.terms.values(), *loss_fn.weights]
            if not torch.isfinite(out.loss):
                raise UserError("the loss of a made-up batch is not finite: a logarithm of 0?")
            if out.loss.requires_grad:
                out.loss.backward()
    gradients = [p.grad.flatten() for p in loss_fn.student.parameters() if p.grad is not None]
    all_gradients = torch.cat([torch.zeros(1, device=device), *gradients])
    if not all_gradients.any():
        raise UserError("no gradient reaches the student: is it frozen, or is the loss detached?")
    return {
        "the views": norms(images),
        "the nets' answers": norms(answers),
        "the loss": [float(torch.as_tensor(value).detach()) for value in losses],
        # One norm: where two maxima of a pool are nearly equal, a single layer's may move.
        "the gradients": [len(gradients), *norms([all_gradients])],
        "the statistics": norms(loss_fn.student.buffers()),  # which batch norm's momentum moves
    }


def norms(tensors):
    """The norm of each tensor, as numbers."""
    return [float(tensor.detach().double().norm()) for tensor in tensors]


def fill_in(module):
    """Give all trained weights numbers that depend on their shapes and order alone."""
    generator = torch.Generator().manual_seed(0)
    for inner in module.modules():
        if hasattr(inner, "reset_running_stats"):  # batch norm's, which a look at shapes moves
            inner.reset_running_stats()
    for parameter in module.parameters():
        numbers = torch.randn(parameter.shape, generator=generator)
        # As large as first weights are.
        inputs = torch.atleast_1d(parameter)[0].numel()
        parameter.data.copy_(numbers / inputs**0.5)


def made_up_views(cfg):
    """Eleven made-up pictures as a config's loader shows them in training: (11, 3, S, S)."""
    side = source_size(cfg.image_size) if cfg.crop_scale else cfg.image_size
    rows = torch.arange(NUM_CLASSES)
    shape = (NUM_CLASSES, 3, side, side)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    aspects = torch.linspace(0.6, 1.8, NUM_CLASSES)
    split = Split("training", "made up", images, rows, tuple(rows), aspects, "")
    return BatchLoader(split, cfg, "cpu", train=True).views_of(rows)


def run_facts(loss_fn, first_weights):
    """What a result depends on, as plain values; the images are added when they are decoded.

    first_weights: the student's, if they are drawn from the config's seed.
    """
    teacher = loss_fn.teacher
    code = {"teacher": None if teacher is None else state_checksum(teacher), **probe(loss_fn)}
    code["first weights"] = norms(first_weights)
    return {"config": dataclasses.asdict(loss_fn.cfg), "data": {}, "code": code}


def differences(was, now):
    """In words, in what two runs' facts differ, a list; time_limit_h is no difference."""
    texts = []
    for kind, facts in now.items():
        for name, value in facts.items():
            before = was.get(kind, {}).get(name)
            if name == "time_limit_h" or alike(before, value):
                continue
            texts.append(f"{name} {before}, now {value}" if kind == "config" else f"other {name}")
    return texts


def alike(before, value):
    """Whether two facts are equal but for what machines round otherwise."""
    if not isinstance(value, list) or not isinstance(before, list) or len(value) != len(before):
        return before == value
    # Absolute too, for a bias before a batch norm has a gradient of nothing but rounding.
    largest = max(map(abs, value), default=0)
    return np.allclose(before, value, rtol=1e-4, atol=1e-5 * largest)


class RunFolder:
    """The folder of one run: config.json (its facts), student_best.ckpt, log.csv and last.ckpt.

    Another run (other settings, images or code, or a file that cannot be loaded) is never
    overwritten and never in the way: its folder is renamed to <name>.1, .2, ..., and that is said.
    A run that was put aside comes back when its facts are asked for again.
    """

    def __init__(self, path, facts):
        self.path = Path(path)
        self.facts = facts

    def open(self, state):
        """Bring a TrainState to where this run stopped; nothing where it begins.

        The first process decides and hands its checkpoint to the others, so that no two can go on
        from two epochs.
        """
        saved = from_first_process(self._find() if is_first_process() else None)
        if saved is None:
            return
        state.load_state_dict(saved)
        what = f"goes on after epoch {len(state.history)}"
        if is_finished(state.history, state.loss_fn.cfg):
            what = "finished before, loaded"
        elif saved["processes"] != rank_and_world()[1]:
            what += f" (began on {saved['processes']} processes: no longer the same bit for bit)"
        say(f"{self.path}: {what}")

    def _find(self):
        """The checkpoint to go on from, in this folder afterwards, or None."""
        saved, why = self._read(self.path)
        place = self.path
        asides = sorted(self.path.parent.glob(f"{self.path.name}.[0-9]*/"))
        # Attached is an earlier Kaggle session's output. The longest run wins, this folder's first.
        for other in asides + attached_folders(LAST):
            found, different = self._read(other)
            if found and len(found["history"]) > len(saved["history"] if saved else ()):
                saved, place = found, other
                why = why or ["the same run got further elsewhere"]
            elif different and other.name == self.path.name:
                say(f"{other} is another run, and not taken: {some_of(different)}")
        if why and self.path.exists():
            self._put_aside(why)
        if place in asides:
            place.rename(self.path)
        elif place != self.path:
            self.path.mkdir(parents=True)
            for file in filter(Path.is_file, place.iterdir()):
                shutil.copyfile(file, self.path / file.name)  # contents, not read-only modes
        if place != self.path:
            say(f"{self.path} is what {place} was")
        return saved

    def _read(self, folder):
        """(checkpoint or None, in what it differs) of a run's folder."""
        if not (folder / LAST).is_file():  # nothing to go on from
            return None, []
        try:
            saved = load_file(folder / LAST)
            different = differences(saved["facts"], self.facts)
        except (UserError, KeyError, TypeError, AttributeError) as error:
            return None, [f"no run can be read: {error}"]
        return None if different else saved, different

    def _put_aside(self, why):
        number = 1
        while self.path.with_name(f"{self.path.name}.{number}").exists():
            number += 1
        aside = self.path.with_name(f"{self.path.name}.{number}")
        say(f"{self.path} holds another run ({some_of(why)}): it is {aside} now")
        self.path.rename(aside)
        # The CSV went with it; this is its copy.
        self.path.with_name(f"{self.path.name}.csv").unlink(missing_ok=True)

    def save(self, state):
        """Write the run's files, last.ckpt at the end: killed before it, the last save counts."""
        if not is_first_process():
            return
        write_text(self.path / CONFIG, json.dumps(self.facts["config"], indent=1))
        save_checkpoint(state.best, self.path / BEST)
        log = pd.DataFrame(state.history, columns=HISTORY_COLUMNS)
        write_text(self.path / "log.csv", log.to_csv(index=False, lineterminator="\n"))
        save_checkpoint({"facts": self.facts, **state.state_dict()}, self.path / LAST)

    def check_code(self, loss_fn):
        """UserError where this process's code is not that of the notebook which started it."""
        different = differences(self.facts, {"code": probe(loss_fn)})
        if different:
            raise UserError(f"helpers.py has changed ({some_of(different)}): restart the kernel")


# --- a stage ---


@dataclass
class Run:
    """What a stage leaves: settings, history, scores and files. `student()` gives its best net."""

    cfg: Config
    folder: Path
    origin: str
    history: pd.DataFrame  # a row per epoch, as in log.csv
    n_params: int
    correct: torch.Tensor | None  # (N,) bool: which validation images it answers rightly
    net: nn.Module  # the trained student

    @property
    def name(self):
        return self.cfg.exp_name

    @property
    def label(self):
        """Its name for tables and figures, which says so where the run is not finished."""
        if self.finished:
            return self.name
        return f"{self.name} (unfinished: {len(self.history)} of {self.cfg.n_epochs} epochs)"

    @property
    def valid_acc(self):
        """The accuracy on the validation images; nan where the run has trained on them."""
        return math.nan if self.correct is None else self.correct.double().mean().item()

    @property
    def finished(self):
        """Whether it has had all its epochs, or `patience` has ended it."""
        return is_finished(self.history.to_dict("records"), self.cfg)

    def student(self, device="cpu"):
        """A copy of the best net of this run, in eval mode."""
        return to_device(freeze(copy.deepcopy(self.net)), device)


def stage_folder(cfg, data, out=None):
    """Where a stage keeps its files: <out>/<stage>, for the demo set <out>/demo/<stage>."""
    return out_folder(out) / ("demo" if data.is_demo else "") / cfg.exp_name


def own_student(cfg, student):
    """The net to train: a copy of a net that is handed in, or what a function or class builds.

    A builder's weights are drawn from cfg.seed. A compiled net is trained as the plain net that it
    holds. UserError for a net above the limit, and where layers lie in a plain list: no state dict
    holds them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        net = student if isinstance(student, nn.Module) else student()
        net = getattr(net, "_orig_mod", net)
        check_budget(net, image_size=cfg.image_size)  # and a lazy layer draws its weights now
    copies = {}
    net = copy.deepcopy(net, copies)
    own = set(net.parameters())
    if any(isinstance(made, nn.Parameter) and made not in own for made in copies.values()):
        raise UserError(
            "the student holds layers that are neither counted nor saved: hold them in an "
            "nn.ModuleList or nn.Sequential, not in a plain list"
        )
    return net


def prepare_stage(cfg, data, teacher=None, out=None, device=None, student=None, **own):
    """(DistillLoss, RunFolder) of a stage. All that can be wrong is said here.

    student: your own net, or a function without arguments that builds it. own: loss_fn_kd,
    alignment, loss_weights, your own functions in place of this module's (see DistillLoss).
    Raises UserError as `own_student` and `probe` do.
    """
    net = own_student(cfg, student or functools.partial(build_student, cfg))
    # An instance has other first weights in each session.
    first_weights = () if isinstance(student, nn.Module) else list(net.parameters())
    loss_fn = DistillLoss(cfg, net, teacher, **own)
    if student is not None:
        loss_fn.own["student"] = student
    folder = RunFolder(stage_folder(cfg, data, out), run_facts(loss_fn, first_weights))
    return loss_fn.on(device or pick_device()), folder


def train_stage(loss_fn, data, folder):
    """Train a DistillLoss, or load it where it is finished: (history, validation loader)."""
    train_loader, valid_loader = build_loaders(loss_fn.cfg, data, loss_fn.device)
    contents = (train_loader.split.contents, valid_loader and valid_loader.split.contents)
    folder.facts["data"]["images"] = contents
    n = n_gpus(loss_fn)
    if n > 1:
        return fit_on_all(loss_fn, data, folder, n), valid_loader
    return fit(loss_fn, train_loader, valid_loader, folder), valid_loader


def carry_out(loss_fn, data, folder, views):
    """Train a prepared stage, score its student, predict the evaluation images: its Run."""
    net = loss_fn.student
    cfg = loss_fn.cfg
    with locked(folder.path):
        history, valid_loader = train_stage(loss_fn, data, folder)
        correct = None
        if valid_loader:
            # Every process scores all images, so that each knows which are answered rightly.
            valid_loader.rank, valid_loader.world = (0, 1)
            logits, labels = predict_logits(net, valid_loader)
            correct = logits.argmax(1) == labels
        frame = pd.DataFrame(history, columns=HISTORY_COLUMNS)
        n_params = check_budget(net, image_size=cfg.image_size)
        run = Run(cfg, folder.path, data.origin, frame, n_params, correct, net)
        if not history:
            say(f"{cfg.exp_name}: no CSV, for it has no epoch yet")
            return run
        path = folder.path / PREDICTIONS
        write_predictions(net, data, cfg, path, loss_fn.device, views)
        evaluation = load_data(data, "evaluation", "eval", cfg.image_size)
        if is_first_process():
            images = (folder.facts["data"], evaluation.contents, evaluation.ids)
            write_result(run, fingerprint(images))
            # Beside the folder too, where people look for it.
            rows = path.read_text(encoding="utf-8")
            write_text(folder.path.with_name(f"{run.name}.csv"), rows)
    return run


def run_stage(cfg, data, teacher=None, out=None, device=None, views=6, **own):
    """Train one stage, or load it where it is finished, and write <out>/<stage>.csv: its Run.

    views: how many views of an evaluation image are averaged, 1 or 6. own: student, loss_fn_kd,
    alignment, loss_weights, as `prepare_stage` takes them, which says what can be wrong. In a
    notebook on a machine with several GPUs all of them train, without own code.
    """
    loss_fn, folder = prepare_stage(cfg, data, teacher, out, device, **own)
    return carry_out(loss_fn, data, folder, views)


def run(
    data, stages=tuple(STAGES), teacher_path=None, out=None, length="full", views=6, **settings
):
    """Run stages one after another and write the best by validation as submission.csv: their Runs.

    teacher_path: a file (default: as `find_teacher`). A stage that needs a teacher where there is
    none is left out, and that is said. settings: config keys to change. What is wrong raises
    UserError before any stage trains.
    """
    configs = [get_config(stage, length, data.is_demo, **settings) for stage in stages]
    device = pick_device()
    teacher = None
    if any(cfg.needs_teacher for cfg in configs):
        teacher = find_teacher(data, teacher_path, out, device)
    prepared = []
    for cfg in configs:
        if cfg.needs_teacher and teacher is None:
            say(
                f"{cfg.exp_name} is left out, for it needs a teacher: put {TEACHER_FILE} into "
                f"{data.root}, name one with --teacher, or train one (README)"
            )
        else:
            prepared.append(prepare_stage(cfg, data, teacher, out, device))
    if not prepared:
        raise UserError("no stage is left to run without a teacher")
    if teacher is not None:
        introduce_teacher(teacher, load_data(data, "validation", "eval", configs[0].image_size))
    runs = []
    for loss_fn, folder in prepared:
        runs.append(carry_out(loss_fn, data, folder, views))
        # The time is up, and a later stage would find none either.
        if not runs[-1].finished:
            say(f"{runs[-1].label}: the stages after it, if any, are left for the next time")
            break
    if any(len(done.history) for done in runs):
        write_best(runs, data, out)
    return runs


# --- the teacher ---


def train_teacher(data, out=None):
    """Train a ResNet-18 from scratch on the training images: the path of its checkpoint.

    The homework allows a teacher of one's own; it is not bound by the parameter limit and never
    submitted. On the demo set it learns from pictures of its own (`with_teacher_pictures`). Its
    settings are TEACHER_CONFIG. Raises UserError where the session's time ends it too early: call
    it again to go on.
    """
    cfg = TEACHER_CONFIG
    if data.is_demo:
        cfg = replace(cfg, **DEMO_TEACHER_SETTINGS)
    if is_switched_on("HW13_FAST"):
        cfg = replace(cfg, n_epochs=1)
    folder = stage_folder(cfg, data, out)
    if data.is_demo:
        data = with_teacher_pictures(data)
    loss_fn = DistillLoss(cfg, build_student(cfg)).on(pick_device())
    with locked(folder):
        history, _ = train_stage(loss_fn, data, RunFolder(folder, run_facts(loss_fn, ())))
    if not is_finished(history, cfg):
        raise UserError("the teacher is not finished and must not teach yet: run again to go on")
    if is_first_on_machine():  # another machine has no folder of this run
        save_checkpoint(copy_of_weights(loss_fn.student), folder / TEACHER_FILE)
    barrier()
    return folder / TEACHER_FILE


def find_teacher(data, path=None, out=None, device="cpu"):
    """The frozen teacher: `path`, the data's own, or what `train_teacher` left; None without one.

    For the demo set it is trained here. UserError where a file is no teacher.
    """
    trained = stage_folder(TEACHER_CONFIG, data, out) / TEACHER_FILE
    if path is None and data.is_demo:
        path = train_teacher(data, out)
    path = path or data.teacher_path or (trained if trained.is_file() else None)
    return None if path is None else load_teacher(path, device)


# ==================================================================================================
# 10  Pictures
# ==================================================================================================

# Of a chart's lines, in turn. Okabe and Ito's colours: colour-blind readers and grey print tell
# them apart.
STYLES = plt.cycler(
    color=("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#000000"),
    marker=("o", "s", "^", "D", "v", "*"),
)


class AltTextFigure(plt.Figure):
    """A Figure that a notebook shows with an alternative text: its title and one sentence."""

    alt_text = ""

    def _repr_html_(self):
        """An image with alternative text, which a plain picture output does not have."""
        buffer = io.BytesIO()
        # 0.01, not a power of ten, whose letters would be too small.
        with plt.rc_context({"axes.formatter.min_exponent": 5}):
            self.savefig(buffer)
        picture = base64.b64encode(buffer.getvalue()).decode()
        alt_text = html.escape(self.alt_text)
        # On a narrow screen it shrinks from 480 pixels until letters of 11 have 9, then it scrolls.
        return (
            '<div style="overflow-x:auto"><img style="max-width:100%;min-width:390px" '
            f'alt="{alt_text}" src="data:image/png;base64,{picture}"></div>'
        )

    @illustration()
    def _ipython_display_(self):
        """Called by IPython, which would else add the picture a second time."""
        from IPython.display import display

        display({"text/html": self._repr_html_(), "text/plain": self.alt_text}, raw=True)


def new_figure(title, sentence, height=3.6):
    """An empty Figure, six inches wide, which is 480 pixels; height in inches.

    sentence: what it shows, which follows the title in its alternative text. Letters have
    matplotlib's 10 points or more, 11 pixels.
    """
    figure = plt.figure(
        figsize=(6, height), dpi=80, layout="constrained", FigureClass=AltTextFigure
    )
    plt.close(figure)
    figure.suptitle(textwrap.fill(title, 70), fontsize=11)
    figure.alt_text = f"{title}. {sentence}"
    return figure


# --- pictures ---


def draw_picture(ax, image, title=""):
    """Draw an image (3, H, W), uint8 or normalised, or a map (H, W) of any numbers."""
    if image.ndim == 3:
        if image.is_floating_point():
            image = pixels_of(image)
        image = image.movedim(0, -1)  # (H, W, 3), as matplotlib wants it
    ax.imshow(image.numpy())
    ax.set_title(title, fontsize=10)
    ax.axis("off")


def picture_grid(title, sentence, images, titles=()):
    """A figure of images, four in a row, each under its title; titles may be fewer."""
    rows = math.ceil(len(images) / 4)
    figure = new_figure(title, sentence, 0.6 + 1.8 * rows)
    cells = itertools.zip_longest(images, titles, fillvalue="")
    for place, (image, image_title) in enumerate(cells, 1):
        draw_picture(figure.add_subplot(rows, 4, place), image, image_title)
    return figure


@illustration()
def plot_samples(split):
    """The first image of each class of a Split."""
    labels, rows = np.unique(split.labels, return_index=True)
    titles = [CLASS_NAMES[label] for label in labels]
    title = f"{split.name} images by class: {split.origin}"
    return picture_grid(title, "An image of each class.", split.images[rows], titles)


@illustration()
def plot_dishes():
    """A typical drawn dish of each class: what tells the classes of the demo set apart."""
    dishes = []  # drawn with seeds that give each what is typical of its class
    for label in range(NUM_CLASSES):
        dish = draw_dish(label, np.random.default_rng((564, label)))
        dishes.append(transforms.functional.pil_to_tensor(dish))
    return picture_grid(
        "drawn dishes, not photographs",
        "Hue, number and corners of the pieces on the plate tell the class.",
        dishes,
        CLASS_NAMES,
    )


@illustration()
def plot_views(loader):
    """What training sees: four pictures, in a row per epoch of a training BatchLoader."""
    rows = torch.arange(4)
    views = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        views.extend(loader.views_of(rows))
    title = f"the training views of {loader.cfg.exp_name}: {loader.split.origin}"
    return picture_grid(title, "A column per picture, a row per epoch.", views)


@illustration()
def plot_mistakes(split, classes):
    """At most twelve images that were classified wrongly, with the true and the predicted class.

    classes: (N,) int64, predicted.
    """
    wrong = (classes != split.labels).nonzero()[:, 0]
    title = f"{len(wrong)} mistakes, {split.name}: {split.origin}"
    wrong = wrong[:: len(wrong) // 12 + 1]  # spread over the split, which is sorted by class
    titles = []
    for true, predicted in zip(split.labels[wrong], classes[wrong], strict=True):
        titles.append(f"{CLASS_NAMES[true]}\nnot {CLASS_NAMES[predicted]}")
    return picture_grid(title, "The true class, not the predicted.", split.images[wrong], titles)


def attention_map(model, images, layer):
    """How active a layer is at each place: the mean square over its channels, (B, H, W).

    images: (B, 3, S, S) (Zagoruyko and Komodakis 2017).
    """
    features = features_of(model, [layer], images)[layer]  # (B, C, H, W)
    return features.square().mean(1).cpu()


@illustration()
def plot_attention(images, nets, layer, origin):
    """Four pictures (4, 3, S, S), and below each where a layer of each net is active.

    nets: {name: net}, the teacher first. The numbers are correlations with the
    teacher's map.
    """
    maps = []
    titles = [""] * len(images)
    for name, net in nets.items():
        # Averaged down to the same 8 x 8 places, so that maps can be compared.
        small = F.adaptive_avg_pool2d(attention_map(net, images, layer), 8)
        # Of mean 0 and deviation 1: the mean product of two maps is their correlation.
        own = F.layer_norm(small, (8, 8))
        maps.append(own)
        similar = (own * maps[0]).mean((1, 2))
        titles += [f"{name} {value:.2f}" for value in similar]
    title = f"where {layer} is active: {origin}"
    cells = [*images, *torch.cat(maps)]
    return picture_grid(title, "Below each picture the map of each net.", cells, titles)


def picture_and_bars(title, image, charts):
    """A bar chart for each {name: probabilities (11,)}, and beside them the picture."""
    figure = new_figure(title, "A picture, and the share of each class as bars.", 2.8)
    *axes, picture_ax = figure.subplots(1, 1 + len(charts))
    draw_picture(picture_ax, image)
    for ax, (name, probabilities) in zip(axes, charts.items(), strict=True):
        ax.barh(CLASS_NAMES, probabilities.tolist())
        ax.set(title=name, xlim=(0, 1), xticks=(0, 1))
        ax.invert_yaxis()  # the first class on top
        ax.label_outer()  # the class names stand once, left of the first chart
    return figure


@illustration()
def plot_soft_labels(logits, image, label, temperatures, origin, soft_labels=soft_labels):
    """A picture's label, and beside it what the teacher's logits become at several temperatures.

    logits: (11,); image: (3, S, S); label: a class, int or tensor. soft_labels: your own in place
    of this module's.
    """
    charts = {"label": F.one_hot(torch.as_tensor(label), NUM_CLASSES)}
    for temperature in temperatures:
        charts[f"T = {temperature:g}"] = soft_labels(logits[None], temperature)[0]
    return picture_and_bars(f"label and soft labels: {origin}", image, charts)


@illustration()
def plot_answers(image, answers, title):
    """A picture (3, S, S) and what each net makes of it: {name: logits (11,)}."""
    charts = {name: logits.softmax(-1) for name, logits in answers.items()}
    return picture_and_bars(title, image, charts)


# --- charts ---

BELOW = {"loc": "outside lower center", "ncols": 2}  # a legend that hides no line


@illustration()
def plot_bars(frame, title, xlabel):
    """The rows of a DataFrame as groups of horizontal bars, a colour per column."""
    figure = new_figure(title, "The numbers of a table as bars.", 1.5 + 0.5 * len(frame))
    ax = figure.subplots()
    frame.plot.barh(ax=ax, width=0.8, legend=False, xlabel=xlabel, ylabel="")
    for bars in ax.containers:
        ax.bar_label(bars, fmt="%.3g", padding=3)
    ax.margins(x=0.15)  # for the numbers
    ax.invert_yaxis()  # the first row on top
    figure.legend(**BELOW)
    return figure


@illustration()
def plot_lines(frame, title, ylabel, errors=None, **settings):
    """Each column of a DataFrame as a line over its index.

    errors: a Series for all columns, or a DataFrame of the same columns, drawn as bars of +- one.
    settings: of pandas' plot (logx=True, loglog=True, ...).
    """
    figure = new_figure(title, "The columns of a table as lines.")
    ax = figure.subplots()
    ax.set_prop_cycle(STYLES)
    frame.plot(ax=ax, yerr=errors, ylabel=ylabel, **settings)
    # A tick at each value that was measured, also on a logarithmic scale.
    ax.set_xticks(frame.index, frame.index)
    ax.minorticks_off()
    return figure


@illustration()
def plot_history(runs):
    """Training loss and, below it, validation accuracy by epoch of several Runs."""
    runs = list(runs)
    figure = new_figure(
        f"learning curves: {runs[0].origin}",
        "Above the training loss, below the validation accuracy of each run by epoch.",
        6.4,
    )
    loss_ax, accuracy_ax = figure.subplots(2)
    loss_ax.set_prop_cycle(STYLES)
    accuracy_ax.set_prop_cycle(STYLES)
    for run in runs:
        epochs = run.history["epoch"]
        # A marker at each epoch would hide the line.
        loss_ax.plot(epochs, run.history["train_loss"], markevery=20)
        accuracy_ax.plot(epochs, run.history["valid_acc"], markevery=20, label=run.label)
    # Losses of different kinds cannot be compared, hence the hint.
    loss_ax.set(ylabel="training loss (each its own)", yscale="log")
    accuracy_ax.set(xlabel="epoch", ylabel="validation accuracy")
    figure.legend(**BELOW)
    return figure


@illustration()
def plot_loss_weights(cfg, loss_weights=loss_weights):
    """How the weights of the loss terms move: ce (labels), kl (soft labels) and align.

    loss_weights: your own in place of this module's.
    """
    rows = {}
    for progress in np.linspace(0, 1, 11).round(1):
        kd, alpha, align = loss_weights(cfg, progress)
        # kd * [alpha T^2 KL + (1 - alpha) CE] + align * alignment, term by term.
        rows[progress] = {"ce": kd * (1 - alpha), "kl": kd * alpha, "align": align}
    title = f"weights of the loss terms of {cfg.exp_name}"
    return plot_lines(pd.DataFrame(rows).T, title, "weight", xlabel="part of the training")


def confusion_matrix(labels, classes):
    """(11, 11) int64: row = true class, column = predicted class. labels, classes: (N,) int64."""
    # Each pair (true, predicted) has a number of its own, which is counted: (121,).
    pairs = labels * NUM_CLASSES + classes
    counts = torch.bincount(pairs, minlength=NUM_CLASSES**2)
    return counts.view(NUM_CLASSES, NUM_CLASSES)


@illustration()
def plot_confusion(labels, classes, origin):
    """The confusion matrix: counts, coloured by their share of the true class."""
    counts = confusion_matrix(labels, classes)
    # A class without images has a row of zeros, not of 0 / 0.
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = new_figure(
        f"confusion matrix, validation: {origin}",
        "A row per true class, a column per predicted class.",
        5.8,
    )
    ax = figure.subplots()
    # Half of the colours: on the darker half black letters could not be read.
    ax.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=2)
    for true, predicted in counts.nonzero().tolist():
        ax.text(predicted, true, counts[true, predicted].item(), ha="center", va="center")
    ax.set_xticks(range(NUM_CLASSES), CLASS_NAMES, rotation=45, ha="right")
    ax.set_yticks(range(NUM_CLASSES), CLASS_NAMES)
    ax.set(xlabel="predicted", ylabel="true")
    return figure


# ==================================================================================================
# 11  Report
# ==================================================================================================


def score_columns(correct, above=None):
    """One row of a table: an accuracy, and the difference to the row above; both with an error.

    correct, above: (N,) bool, which images the two nets answer rightly. A column is empty where
    there is nothing to tell or to compare.
    """
    row = dict.fromkeys(("accuracy", "+- s.e.", "difference", "its s.e."), "")
    if correct is not None:
        accuracy = correct.double().mean().item()
        error = standard_error(accuracy, len(correct))
        row |= {"accuracy": round(accuracy, 4), "+- s.e.": round(error, 4)}
        if above is not None:
            difference, error = paired_difference(correct, above)
            row |= {"difference": f"{difference:+.4f}", "its s.e.": f"{error:.4f}"}
    return row


@illustration()
def stage_table(runs):
    """A DataFrame with a row per Run: accuracy on validation, parameters, epochs, seconds.

    The difference is to the row above. A run without a validation score has gaps.
    """
    rows = []
    above = None
    for run in runs:
        # First what is compared, so that it is on a narrow screen too.
        row = {
            "stage": run.label,
            **score_columns(run.correct, above),
            "parameters": run.n_params,
            "epochs": len(run.history),
            "seconds": round(run.history["seconds"].sum()),
        }
        rows.append(row)
        above = run.correct
    return pd.DataFrame(rows).set_index("stage")


def accuracy_table(labels, predictions, caption):
    """A DataFrame of accuracies, a row for each {name: predicted classes (N,)}; labels: (N,).

    The difference is to the row above. caption: what the names are.
    """
    rows = []
    above = None
    for name, classes in predictions.items():
        correct = classes == labels
        rows.append({caption: name, **score_columns(correct, above)})
        above = correct
    return pd.DataFrame(rows).set_index(caption)


# --- classes that the student never sees ---


def missing_class_table(
    cfg, data, teacher, device, classes=(9, 3), temperatures=(1, 4, 20), n_epochs=40, seeds=1
):
    """How well a student knows classes that it has never seen, if its teacher knows them.

    All pictures of these classes are taken out of its training images, together. It learns the rest
    from labels alone, and from soft labels alone at each temperature. Returns a DataFrame with a
    row per way to learn and a column per class: the share of its validation images that is answered
    rightly, the mean over `seeds` trainings. Nothing but the teacher's logits is written.
    Source: Hinton, Vinyals and Dean 2015, section 3.
    """
    # Four epochs of views, shown again: the teacher answers them once for all its students.
    cfg = replace(cfg, teacher_views=4, n_epochs=min(n_epochs, cfg.n_epochs))
    ways = {"labels alone": replace(cfg, alpha=0.0)}
    for temperature in temperatures:
        soft = replace(cfg, alpha=1.0, temperature=temperature)
        ways[f"soft labels, T = {temperature:g}"] = soft
    train, valid = build_loaders(cfg, data, device)
    split = without_classes(train.split, classes, teacher, device)
    rows = []
    for (way, own), seed in itertools.product(ways.items(), range(seeds)):
        own = replace(own, seed=cfg.seed + seed)
        loss_fn = DistillLoss(own, build_student(own), teacher).on(device)
        fit(loss_fn, BatchLoader(split, own, device, train=True))
        answers = predict_logits(loss_fn.student, valid)[0].argmax(1)
        row = {"trained with": way}
        for label in classes:
            of_class = answers[valid.split.labels == label]
            row[CLASS_NAMES[label]] = (of_class == label).double().mean().item()
        rows.append(row)
    return pd.DataFrame(rows).groupby("trained with", sort=False).mean().round(3)


def without_classes(split, classes, teacher, device):
    """A Split without the images that are labelled as one of these classes, or look like one.

    Looks are the teacher's: behind a wrong label the student would see the class after all.
    """
    logits, labels = predict_logits(teacher, BatchLoader(split, TEACHER_CONFIG, device))
    missing = torch.tensor(classes)
    seen = ~torch.isin(labels, missing) & ~torch.isin(logits.argmax(1), missing)
    return replace(
        split,
        images=split.images[seen],
        labels=labels[seen],
        ids=tuple(itertools.compress(split.ids, seen)),
        aspects=split.aspects[seen],
    )


# --- pruning ---


def prune_unstructured(model, ratio):
    """A copy in which the smallest weights of every convolution are zero.

    ratio: the fraction of them that goes, by L1 (torch's own).
    """
    # torch's pruning wants weights in the default memory layout.
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", ratio)
            prune.remove(module, "weight")  # only torch's mask is removed: the zeros stay
    return model.to(memory_format=torch.channels_last)


def prune_structured(model, ratio):
    """A copy of a ResNet-18 with thinner blocks.

    ratio: the fraction of each block's inner channels that goes, by L1 norm. Inner are those
    between its two convolutions: no shortcut passes there, so the tensors really become smaller.
    """
    model = copy.deepcopy(model)
    for block in model.modules():
        if not isinstance(block, torchvision.models.resnet.BasicBlock):
            continue
        norms = block.conv1.weight.abs().sum((1, 2, 3))  # (inner channels,)
        # Rounded up, for a convolution without any channel cannot run.
        keep = norms.topk(math.ceil((1 - ratio) * len(norms))).indices
        # What has an entry for each inner channel in its first dimension.
        norm = block.bn1
        statistics = (norm.running_mean, norm.running_var)
        for tensor in (block.conv1.weight, *norm.parameters(), *statistics):
            # Through .data: a parameter stays the same object while its shape changes.
            tensor.data = tensor.data[keep]
        # The second convolution reads the inner channels: (out, inner, 3, 3).
        block.conv2.weight.data = block.conv2.weight.data[:, keep]
    return model.to(memory_format=torch.channels_last)


def pruning_table(model, loader, ratios=(0.0, 0.2, 0.4, 0.6, 0.8)):
    """A DataFrame with a row per pruning ratio, and columns by what is measured and kind.

    Accuracy on a loader, weights that are not zero (millions), and milliseconds per image.
    """
    rows = []
    evaluate(model, loader)  # the first pass is slower
    for ratio in ratios:
        for prune_copy in (prune_unstructured, prune_structured):
            net = prune_copy(model, ratio)
            start = time.perf_counter()
            score = evaluate(net, loader)
            # `evaluate` has read its sums from the device, so nothing is still running there.
            seconds = time.perf_counter() - start
            # Both kinds show here: fewer weights, or as many of which more are zero.
            weights = sum(int(p.count_nonzero()) for p in net.parameters())
            row = {
                "pruning ratio": ratio,
                "pruning": prune_copy.__name__.removeprefix("prune_"),
                "accuracy": score["valid_acc"],
                "weights (M)": weights / 1e6,
                "ms per image": 1000 * seconds / score["n"],
            }
            rows.append(row)
    # The columns get two levels: what is measured, and the kind of pruning.
    return pd.DataFrame(rows).pivot(index="pruning ratio", columns="pruning").round(3)


# --- where an epoch's time goes ---


@illustration()
def epoch_parts(cfg, loader, device):
    """The seconds of an epoch: {"waiting for pictures": s, "training on them": s}.

    Scaled up from three batches after the first, which pays for start-up. Teacher and student are
    untrained: what they know does not change their speed.
    """
    loss_fn = DistillLoss(cfg, build_student(cfg), build_student(TEACHER_CONFIG)).on(device)
    state = TrainState(loss_fn)
    moments = [clock(device)]
    with images_on_gpu(loader):
        for images, labels, *_ in itertools.islice(loader, 4):
            moments.append(clock(device))
            images = to_device(images, device, loss_fn.dtype)
            loss = loss_fn(images, labels.to(device)).loss
            optimizer_step(state, loss, cfg.lr, cfg.grad_norm_max)
            moments.append(clock(device))
    # Without the first batch; of each other the seconds of waiting and of training.
    waiting, training = np.diff(moments)[2:].reshape(-1, 2).mean(0) * len(loader)
    return {"waiting for pictures": waiting, "training on them": training}


def clock(device):
    """Seconds, once the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ==================================================================================================
# 12  Command line
# ==================================================================================================


def run_command(args):
    """Train stages and write their CSVs."""
    settings = dict(map(parse_setting, args.set))
    with process_group():
        # Inside the group, so that one process of a machine draws and the others wait for it.
        data = make_demo_data() if args.demo else find_data(args.data)
        if data is None:
            raise UserError("name the data's folder with --data DIR, or use --demo for drawn data")
        say(f"{data.describe()}\n{data.counts().to_string()}")
        length = args.length or chosen_length()
        stages = args.stages.split(",")
        runs = run(data, stages, args.teacher, args.out, length, args.views, **settings)
        with illustration():
            say(stage_table(runs).to_string())


def parse_setting(text):
    """("key", value) from KEY=VALUE; lists are 64,128,256 and () is empty."""
    name, _, value = text.partition("=")
    if name not in vars(SIMPLE):
        raise UserError(f"--set {text}: write KEY=VALUE; the keys are {', '.join(vars(SIMPLE))}")
    with contextlib.suppress(ValueError, SyntaxError):  # a text stays one
        value = ast.literal_eval(value)
    return name, value


def evaluate_command(args):
    """Validation accuracy of a student_best.ckpt."""
    data = read_folder(args.data, needed=("validation",))
    student, cfg = load_student(args.checkpoint)
    if cfg.train_on == "both":
        raise UserError(f"{args.checkpoint} has trained on the validation images: it has no score")
    images = load_data(data, "validation", "eval", cfg.image_size)
    device = pick_device()
    score = evaluate(student.to(device), BatchLoader(images, cfg, device))
    print(f"validation accuracy {plus_minus(score['valid_acc'], score['n'])}")


def predict_command(args):
    """Write the CSV of a student_best.ckpt."""
    data = read_folder(args.data, needed=("evaluation",))
    student, cfg = load_student(args.checkpoint)
    write_predictions(student, data, cfg, args.out, pick_device(), args.views)


def validate_command(args):
    """Is a CSV what Kaggle takes?"""
    ids = [f"{i:04d}" for i in range(args.rows)]
    print(f"{args.csv}: {validate_submission(args.csv, ids)} rows, valid")


def build_parser():
    """The command line's parser: each command sets `function`, which gets the arguments."""
    parser = argparse.ArgumentParser("helpers.py", description="Distil a ResNet-18 on Food-11.")
    commands = parser.add_subparsers(required=True)

    def command(name, function):
        added = commands.add_parser(name, help=function.__doc__)
        added.set_defaults(function=function)
        return added

    train = command("run", run_command)
    score = command("evaluate", evaluate_command)
    answer = command("predict", predict_command)
    check = command("validate", validate_command)
    train.formatter_class = argparse.RawDescriptionHelpFormatter
    keys = [f"  {f.name:<15} {f.metadata['meaning']}" for f in dataclasses.fields(Config)]
    train.epilog = "\n".join(["the keys of --set:", *keys])
    train.add_argument("--data", help="folder with training/, validation/, evaluation/")
    train.add_argument("--demo", action="store_true", help="use the drawn demo set")
    train.add_argument("--out", help="results (default: submission/)")
    train.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
    train.add_argument("--teacher", help="default: the data's own")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    train.add_argument("--length", choices=list(LENGTHS), help="how many epochs (default: full)")
    for one in (score, answer):
        one.add_argument("--data", required=True)
        one.add_argument("--checkpoint", required=True)
    answer.add_argument("--out", required=True)
    for one in (train, answer):
        one.add_argument("--views", type=int, choices=(1, 6), default=6, help="per image")
    check.add_argument("csv")
    check.add_argument("--rows", type=int, required=True)
    return parser


def main(argv=None):
    """The command line. Returns the exit code: 0; 2 for a mistake of the user; 130 when stopped."""
    args = build_parser().parse_args(argv)
    try:
        args.function(args)
        return 0
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        print(f"helpers.py: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    if rank_and_world()[1] > 1:
        os._exit(code)  # at once: the others may wait for this process for ever
    return code


if __name__ == "__main__":
    sys.exit(main())
