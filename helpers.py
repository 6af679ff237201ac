"""Distil a ResNet-18 into a student of at most 60,000 parameters on Food-11: all code of hw13_distill.ipynb.

Sections, in the notebook's order:

0  Setup        errors, configuration, stages, device, progress display, safe files
1  Data         find_data, load_data, the decoded cache, the course's FoodDataset, the drawn demo set
2  Loader       sample_affine, warp, BatchLoader
3  Students     dwpw_conv, build_student, get_student_model, check_budget, layer_table
4  Teacher      load_teacher, state_checksum, soft_labels
5  Losses       loss_fn_kd, alignment, DistillLoss, check_loss_fn_kd
6  Training     fit and its parts, run_stage, run, train_teacher
7  Submission   predict, write_submission, validate_submission
8  Pictures     functions that take data and return a matplotlib Figure; the report questions' tables
9  Command line python helpers.py run | evaluate | predict | validate | export
"""

import argparse
import ast
import base64
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import fcntl
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
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageColor, ImageDraw, ImageFile, ImageOps
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset  # noqa: F401  (the notebook uses h.DataLoader)
from torchvision import transforms
from tqdm import tqdm

# =====================================================================================================================
# 0  Setup
# =====================================================================================================================

CLASS_NAMES = ("Bread", "Dairy product", "Dessert", "Egg", "Fried food", "Meat", "Noodles/Pasta", "Rice", "Seafood",
               "Soup", "Vegetable/Fruit")
NUM_CLASSES = len(CLASS_NAMES)
PARAM_LIMIT = 60_000
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HOMEWORK_COUNTS = {"training": 9993, "validation": 4432, "evaluation": 2218}
# What the re-built solution scored on Kaggle.
PUBLISHED_SCORES = {"simple": 0.45807, "medium": 0.75202, "boss": 0.82687}


class UserError(ValueError):
    """A mistake that the user can mend. The message is one sentence; the command line prints it and exits with 2."""


def _key(default, meaning, low=None, high=None, choices=None):
    """One Config key: its default, what it means (`run --help` lists it), and which values are allowed."""
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting of one stage, as plain values. The keys that the course has keep the course's names and values.

    A wrong value raises UserError naming key, value and what is allowed; an unknown key is a TypeError.
    `get_config` returns a stage's Config, `STAGES` lists them.
    """

    exp_name: str = _key("simple", "name of the stage and of its folder")
    seed: int = _key(20220013, "all randomness is a function of (seed, epoch)", 0, 2**31 - 1)
    image_size: int = _key(224, "pixels a side that the networks see", 40, 512)
    # The student. The sample net has no settings; of the others, widths, depths and strides have one entry a layer.
    student: str = _key("sample", "sample, dwpw, ir, or a builder of your own in STUDENTS")
    stem_width: int = _key(48, "channels after the stem", 1, 1024)
    widths: tuple = _key((64, 128, 256), "channels of layer1, layer2, ...", 1, 4096)
    depths: tuple = _key((1, 1, 1), "blocks in each layer", 1, 64)
    strides: tuple = _key((1, 2, 2), "stride of each layer's first block", 1, 4)
    kernel_size: int = _key(3, "depthwise kernel", 1, 15)
    expansion: int = _key(3, "an inverted residual is so many times as wide inside", 1, 16)
    # The training view. An empty crop_scale is the course's sample transform: the exact evaluation crop, and flips.
    crop_scale: tuple = _key((), "area of RandomResizedCrop, (low, high), or () for the centre crop", 0.01, 1.0)
    hflip: float = _key(0.5, "probability of a horizontal flip", 0.0, 1.0)
    vflip: float = _key(0.0, "probability of a vertical flip", 0.0, 1.0)
    rotation: float = _key(0.0, "RandomRotation: degrees either way", 0.0, 180.0)
    affine: float = _key(0.0, "RandomAffine: degrees either way", 0.0, 180.0)
    # The loss.
    loss_fn_type: str = _key("CE", "CE: labels alone; KD: with a teacher", choices=("CE", "KD"))
    alpha: float = _key(0.5, "share of the soft loss in loss_fn_kd", 0.0, 1.0)
    temperature: float = _key(20.0, "softens both distributions", 0.01, 1000.0)
    align_weights: tuple = _key((), "smooth-L1 weight of layer1, layer2, ... against the teacher's", 0.0, 1000.0)
    loss_schedule: str = _key("constant", "how the loss weights move with the epoch", choices=("constant", "handover"))
    teacher_views: int = _key(0, "store the teacher's logits for this many replayed epochs (0: never)", 0, 100_000)
    # The optimisation.
    optimizer: str = _key("adam", "how the weights move", choices=("adam", "adamw", "sgd"))
    lr: float = _key(3e-4, "learning rate (its peak, where it moves)", 0.0, 100.0)
    lr_schedule: str = _key("constant", "constant, or cosine down to zero", choices=("constant", "cosine"))
    warmup_epochs: float = _key(0.0, "epochs of linear warm-up", 0.0, 10_000.0)
    weight_decay: float = _key(1e-5, "L2 penalty (decoupled for adamw)", 0.0, 10.0)
    grad_norm_max: float = _key(10.0, "gradients are clipped to this norm", 1e-6, 1e9)
    batch_size: int = _key(64, "images a step", 2, 65_536)
    n_epochs: int = _key(10, "passes over the training images", 1, 100_000)
    patience: int = _key(300, "stop after so many epochs without a better validation accuracy", 1, 100_000)
    amp: str = _key("auto", "precision of the networks in training", choices=("auto", "off", "bf16", "fp16"))
    # How a run behaves. These may change when it goes on, for they do not change what it computes.
    time_limit_h: float = _key(0.0, "hours of a session after which a run ends (0: none; Kaggle: 11.5)", 0.0, 1000.0)
    finite_check: int = _key(20, "batches between two looks at whether the loss is finite", 1, 100_000)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        n_layers, crop = len(self.widths), list(self.crop_scale)
        aligns = self.loss_fn_type == "KD" and self.student != "sample"
        for key, right, allowed in (
            ("exp_name", re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.exp_name), "letters, digits, '_', '-'"),
            ("crop_scale", len(crop) in (0, 2) and crop == sorted(crop), "() or (low, high)"),
            ("kernel_size", self.kernel_size % 2, "an odd number"),
            ("depths", n_layers == len(self.depths) == len(self.strides) > 0, "as many entries as widths and strides"),
            ("align_weights", len(self.align_weights) <= (min(4, n_layers) if aligns else 0),
             "a weight for each layer, 4 at most; () for the sample net and unless loss_fn_type=KD"),
            # Feature maps are too large to store.
            ("teacher_views", not (self.teacher_views and any(self.align_weights)), "0 with align_weights"),
            # The centre crop has horizontal flips alone.
            ("crop_scale", self.crop_scale or not (self.rotation or self.affine or self.vflip),
             "(low, high) with rotation, affine or vflip"),
        ):
            if not right:
                raise UserError(f"{key}={getattr(self, key)!r}: allowed is {allowed}")

    @property
    def needs_teacher(self):
        """Whether any term of the loss asks for a teacher (alpha 0 without alignment does not)."""
        return self.loss_fn_type == "KD" and any((self.alpha, *self.align_weights, self.loss_schedule == "handover"))


def _checked(f, value):
    """The value of Config field `f` in the type of its default, or UserError."""
    kind, low, high, choices = type(f.default), f.metadata["low"], f.metadata["high"], f.metadata["choices"]
    whole = kind is int or (kind is tuple and isinstance(next(iter(f.default), None), int))

    def usable(v):
        return isinstance(v, int if whole else (int, float)) and not isinstance(v, bool) and low <= v <= high

    if kind is str and isinstance(value, str) and (not choices or value in choices):
        return value
    if kind is tuple and isinstance(value, (tuple, list)) and all(map(usable, value)):
        return tuple(map(int if whole else float, value))
    if kind in (int, float) and usable(value):
        return kind(value)
    numbers = f"{'a list of ' * (kind is tuple)}{'whole ' * whole}numbers from {low} to {high}"
    allowed = f"one of {', '.join(choices)}" if choices else "text" if kind is str else numbers
    raise UserError(f"{f.name}={value!r}: allowed is {allowed}")


def parse_setting(text):
    """("key", value) from the command line's KEY=VALUE; lists are written 64,128,256 and () is the empty one.

    Raises UserError for a text without '=', an unknown key, or a value that is not of the key's type.
    """
    key, sign, value = (part.strip() for part in text.partition("="))
    fields = {f.name: f for f in dataclasses.fields(Config)}
    if not sign or key not in fields or len(text) > 300:
        raise UserError(f"--set {text}: write KEY=VALUE, for example n_epochs=2; the keys are {', '.join(fields)}")
    kind = type(fields[key].default)
    if kind is not str:
        # What is no number stays text, and is refused below.
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
        value = (value,) if kind is tuple and not isinstance(value, tuple) else value
    return key, _checked(fields[key], value)


# Simple and Medium keep their published values, poor or not, because each one teaches a step. Strong, Boss and Beyond
# share the best legal student and optimiser that were found (tests/bench/RESULTS.md); each brings one step.
_SIMPLE = Config()
_MEDIUM = replace(_SIMPLE, exp_name="medium", loss_fn_type="KD", n_epochs=700)
_STRONG = replace(_MEDIUM, exp_name="strong", student="ir", stem_width=16, widths=(24, 32, 48), depths=(2, 3, 2),
                  strides=(2, 2, 1), crop_scale=(0.7, 1.0), vflip=0.5, rotation=180.0, affine=30.0, temperature=4.0,
                  optimizer="adamw", lr=4e-3, lr_schedule="cosine", warmup_epochs=2.0, weight_decay=0.02, n_epochs=300)
_BOSS = replace(_STRONG, exp_name="boss", align_weights=(3.0, 2.0, 1.0), loss_schedule="handover", n_epochs=600)
_BEYOND = replace(_STRONG, exp_name="beyond", crop_scale=(0.35, 1.0), vflip=0.0, rotation=0.0, affine=0.0, n_epochs=600)
STAGES = {cfg.exp_name: cfg for cfg in (_SIMPLE, _MEDIUM, _STRONG, _BOSS, _BEYOND)}

TEACHER_CONFIG = Config(exp_name="teacher", student="resnet18", crop_scale=(0.5, 1.0), batch_size=128, lr=1e-3,
                        optimizer="adamw", weight_decay=0.05, lr_schedule="cosine", warmup_epochs=5.0, n_epochs=200)
DEMO_TEACHER_SETTINGS = {"image_size": 64, "batch_size": 32, "warmup_epochs": 1.0, "n_epochs": 7}

# LENGTH -> (share of a stage's epochs, but at least so many).
LENGTHS = {"full": (1.0, 1), "lesson": (0.1, 10), "quick": (0.01, 4), "fast": (0.0, 1)}
# Two cores train on the drawn demo set in minutes with these; a step counts more than an epoch there.
DEMO_SETTINGS = {"image_size": 64, "batch_size": 32, "lr": 2e-3, "patience": 100}
DEMO_EPOCHS = 10


def get_config(stage, length="full", demo=False, **overrides):
    """The Config of a stage, for example get_config("boss", n_epochs=5).

    length: "full", "lesson", "quick" or "fast" scales the epochs; HW13_FAST=1 in the environment means "fast".
    demo: use the small settings for the drawn demo set. Overrides win over both; an unknown one is a TypeError,
    an unknown stage or length, or a value that is not allowed, a UserError.
    """
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}; the stages are {', '.join(STAGES)}")
    length = "fast" if is_fast() else length
    if length not in LENGTHS:
        raise UserError(f"LENGTH={length!r}: allowed is one of {', '.join(LENGTHS)}")
    cfg, (share, at_least) = STAGES[stage], LENGTHS[length]
    n_epochs = min(cfg.n_epochs, max(at_least, round(share * cfg.n_epochs)), DEMO_EPOCHS if demo else math.inf)
    return replace(cfg, **({"n_epochs": n_epochs} | (DEMO_SETTINGS if demo else {}) | overrides))


def diff_configs(a, b):
    """Print the settings in which Config `b` differs from Config `a`, a line each."""
    before, after = dataclasses.asdict(a), dataclasses.asdict(b)
    lines = [f"{key:<14} {old!s:>18}  ->  {after[key]!s}" for key, old in before.items() if old != after[key]]
    print("\n".join(lines) or "no difference")


def is_fast():
    """True under HW13_FAST=1, the shortest run, for tests."""
    return os.environ.get("HW13_FAST", "") not in ("", "0")


def kaggle_root():
    """/kaggle, or the folder that HW13_KAGGLE names in its place."""
    return Path(os.environ.get("HW13_KAGGLE") or "/kaggle")


def on_kaggle():
    """Whether this is a Kaggle session (the working folder is there)."""
    return (kaggle_root() / "working").is_dir()


def default_out():
    """Where results go: /kaggle/working on Kaggle, submission/ elsewhere."""
    return kaggle_root() / "working" if on_kaggle() else Path("submission")


def show_source(function):
    """A function's source, as it runs, coloured, for a notebook."""
    from IPython.display import HTML, Code
    code = Code(inspect.getsource(function), language="python")
    # nbconvert lets <pre> in an output inherit its font, so the font is named around it.
    return HTML(f'<div style="font-family:monospace">{code._repr_html_()}</div>')


def in_notebook():
    """Whether the code runs in a Jupyter kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)  # Colab's is a subclass


class _CellBar(tqdm):
    """A tqdm that redraws one line below a notebook cell, so that only its last state is kept."""

    @staticmethod
    def status_printer(file):
        """What tqdm calls with the text of the bar each time that it redraws it."""
        from IPython.display import display
        handle = display({"text/plain": ""}, raw=True, display_id=True)
        return lambda text: handle.update({"text/plain": text}, raw=True)


def progress_bar(total, desc, initial=0):
    """One tqdm bar of images with an ETA: in a notebook a line that redraws itself, else on stderr; off on rank > 0.

    It is plain tqdm on purpose: tqdm.auto's widgets and worker processes that fork in a notebook do not get on, and
    widgets are lost when the notebook is rendered.
    """
    in_cell = {"file": io.StringIO(), "ascii": False, "ncols": 120, "mininterval": 0.5}
    in_shell = {"file": sys.stderr, "dynamic_ncols": True, "mininterval": 0.5 if sys.stderr.isatty() else 30.0}
    kind, place = (_CellBar, in_cell) if in_notebook() else (tqdm, in_shell)
    return kind(total=total, desc=desc, initial=initial, unit="img", disable=rank_and_world()[0] != 0, **place)


def rank_and_world():
    """(rank, number of processes) of this process; (0, 1) where torch.distributed is not in use."""
    dist = torch.distributed
    used = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if used else (0, 1)


def _collective(name, *args):
    """Call torch.distributed.<name> where there are several processes; do nothing in a single one."""
    if rank_and_world()[1] > 1:
        getattr(torch.distributed, name)(*args)


def say(text):
    """Print a line, from the first process only."""
    if rank_and_world()[0] == 0:
        print(text.encode("utf-8", "backslashreplace").decode(), flush=True)  # file names may hold any byte


def pick_device():
    """The torch.device to train on: this process's GPU if a real kernel runs on it, else the CPU.

    Raises UserError where the GPU is too old for the installed torch (Kaggle's P100, for example).
    """
    if not torch.cuda.is_available():
        _keep_freed_memory()
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.index >= torch.cuda.device_count():
        raise UserError(f"there are {torch.cuda.device_count()} GPUs: start at most as many processes")
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        name, why = torch.cuda.get_device_name(device), str(error).splitlines()[0]
        raise UserError(f"the GPU {name} cannot run torch {torch.__version__} ({why}); Kaggle: choose T4 x2") from None
    torch.cuda.set_device(device)
    return device


def _keep_freed_memory():
    """Let glibc keep freed memory instead of handing it back: fresh pages made a CPU's training step a third longer."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def amp_dtype(device, amp="auto"):
    """torch.bfloat16, torch.float16 or None (full precision) for training on `device`.

    auto: bf16 from CUDA capability 8.0 on and on CPUs that have it in hardware, fp16 on older GPUs. The capability
    is asked, for torch.cuda.is_bf16_supported() is True on a T4, which emulates it slowly.
    """
    if amp != "auto":
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else None


@contextlib.contextmanager
def written_whole(path, keep_as=None):
    """A temporary path beside `path`: flushed to disk and renamed over it if the block ends well; else removed.

    keep_as: a name beside it under which the file that was there is kept.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(".*.tmp"):  # by a killed process, a day ago or more
            if left.name.startswith(f".{path.name}.") and time.time() - left.stat().st_mtime > 86_400:
                left.unlink(missing_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep_as and path.is_file():
            os.replace(path, path.with_name(keep_as))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); what was saved is intact") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def locked(folder):
    """Hold a folder (None: nothing) for the block: UserError where another process holds it or it cannot be written.

    A killed process holds nothing, for the system closes its files.
    """
    with contextlib.ExitStack() as held:
        if folder and rank_and_world()[0] == 0:
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                file = os.open(folder, os.O_RDONLY)
                held.callback(os.close, file)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is working in {folder}: wait for it or choose another --out") from None
            except OSError as error:
                raise UserError(f"{folder} cannot be written ({error.strerror}); what was saved is intact") from None
        yield


def check_writable(folder):
    """UserError unless `folder`, or the first folder above it that exists, can be written to; nothing is made."""
    there = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{folder} cannot be written to: {there} is {'read-only' if there.is_dir() else 'a file'}")


def write_text(path, text):
    """Write a text file whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_checkpoint(obj, path, keep_as=None):
    """torch.save through `written_whole`. (Through memory, because torch reports a full disk as no OSError.)"""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    with written_whole(path, keep_as) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_file(path):
    """torch.load with weights_only=True on the CPU: a file that would run code is refused.

    Raises UserError for a missing, damaged or unsafe file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: pickle, zip, runtime, EOF
        if getattr(error, "errno", None) or isinstance(error, MemoryError):  # it could not be read: not its fault
            raise
        unsafe = re.search("Unsupported|weights_only", str(error))
        why = "it holds more than tensors and plain values" if unsafe else "it is damaged or no torch file"
        raise UserError(f"{path} is not loaded: {why}") from None


def fingerprint(*parts):
    """A short hash of JSON-able values, for cache keys and for the question whether two runs are the same."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


# =====================================================================================================================
# 1  Data
# =====================================================================================================================

SPLITS = ("training", "validation", "evaluation")
TEACHER_FILE = "resnet18_teacher.ckpt"
COMPETITION = "ml2023spring-hw13"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
CACHE_VERSION = 2
MAX_BAD_SHARE = 0.05
NEUTRAL_GREY = 124


@dataclass(frozen=True)
class FoodData:
    """The files of a data folder. Lists are parallel and sorted by file name; labels are -1 where unknown."""

    root: Path
    origin: str  # what the pictures are, in words; every figure and table carries it
    files: dict  # split -> [Path]
    labels: dict  # split -> [int]
    ids: dict  # split -> [str]
    ignored: tuple  # stray files, names without a label, empty files
    teacher: Path | None
    class_folders: bool

    @property
    def is_demo(self):
        return self.origin.startswith("demo")

    @property
    def is_homework(self):
        """Whether it has the homework's layout and counts, so that published scores may stand beside its own."""
        return not self.class_folders and {s: len(f) for s, f in self.files.items()} == HOMEWORK_COUNTS

    def counts(self):
        """A DataFrame of the number of images by class and split; evaluation images of unknown class are one row."""
        table = {s: Counter(CLASS_NAMES[k] if k >= 0 else "(unknown)" for k in self.labels[s]) for s in SPLITS}
        frame = pd.DataFrame(table).reindex([*CLASS_NAMES, "(unknown)"]).fillna(0).astype(int)
        frame.loc["all"] = frame.sum()
        return frame[frame.sum(axis=1) > 0]

    def describe(self):
        """One paragraph: where, what, how many, what was ignored, whether there is a teacher."""
        counts = ", ".join(f"{s} {len(self.files[s])}" for s in SPLITS)
        loud = "*** DEMO: drawn shapes, not photographs. No number below says anything about Food-11. ***\n"
        names, n = ", ".join(sorted({p.name for p in self.ignored})[:4]), len(self.ignored)
        stray = f" Ignored {n} stray, empty or unlabelled files ({names}, ...)." if n else ""
        teacher = self.teacher or f"no file {TEACHER_FILE}"
        return f"{loud * self.is_demo}{self.origin} in {self.root}: {counts}.{stray} Teacher: {teacher}."


def find_data(root=None):
    """The FoodData to work on, or None where there is none.

    Looks, in this order, at: `root`; the variable HW13_DATA; every folder under /kaggle/input that holds the three
    splits (the competition's own before a public copy); ./Food-11; ./data/Food-11. Raises UserError where a named
    folder is not usable, and on Kaggle where no input is attached.
    """
    named = root or os.environ.get("HW13_DATA")
    mounts = [folder for folder, names, _ in _walk_inputs() if {"training", "validation"} <= names]
    mounts.sort(key=lambda folder: (COMPETITION not in folder.parts, str(folder)))
    here = [] if on_kaggle() else [folder for folder in (Path("Food-11"), Path("data/Food-11")) if folder.is_dir()]
    folder = named or next(iter(mounts + here), None)
    if folder is None and on_kaggle():
        raise UserError(f"no Food-11 under {kaggle_root() / 'input'}: press 'Add Input', attach the competition "
                        f"'{COMPETITION}' (or a public copy of Food-11) and run again")
    return read_folder(folder) if folder else None


def _walk_inputs():
    """(folder, names of its folders, names of its files) of all that is under /kaggle/input, but for the pictures."""
    for folder, names, files in os.walk(kaggle_root() / "input"):
        yield Path(folder), set(names), files
        names[:] = [n for n in names if not n.startswith(".") and not (n in SPLITS and "validation" in names)]


def attached_files(name):
    """Paths of the files called `name` in any Kaggle input, sorted; none elsewhere."""
    return sorted(folder / name for folder, _, files in _walk_inputs() if name in files)


def read_folder(root):
    """The FoodData in `root` (training/, validation/, evaluation/). See the README for the two layouts.

    Raises UserError for a missing or empty split, a stray or missing class folder, a label out of range, or two
    evaluation files with one id.
    """
    root, ignored, splits = Path(root), [], {}
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    root = root / "Food-11" if (root / "Food-11").is_dir() and not (root / "training").is_dir() else root
    for split in SPLITS:
        if not (root / split).is_dir():
            raise UserError(f"{root} has no folder '{split}'; wanted are {', '.join(SPLITS)}")
        splits[split] = _read_split(root / split, split == "evaluation", ignored)
        if not splits[split][0]:
            raise UserError(f"{root / split} holds no usable image (.jpg, .jpeg or .png)")
    files, labels, ids = ({split: rows[i] for split, rows in splits.items()} for i in range(3))
    # The teacher lies in the data folder or beside it; on Kaggle in any input, for public copies have none.
    places = (root / TEACHER_FILE, root.parent / TEACHER_FILE, *attached_files(TEACHER_FILE))
    teacher = next(filter(Path.is_file, places), None)
    in_folders = bool(_class_folders(root / "training"))
    data = FoodData(root, "", files, labels, ids, tuple(ignored), teacher, in_folders)
    origin = ("demo set (drawn, not photographs)" if (root / "DRAWN_DEMO_SET").exists() else
              "public copy of Food-11 (not the homework's split)" if data.class_folders else
              "Food-11 of the homework" if data.is_homework else "own photographs (not Food-11)")
    return replace(data, origin=origin)


def _class_folders(folder):
    """{folder: label} of the class folders in a split, matched by name; {} for the flat layout."""
    numbers = {_normalised(name): k for k, name in enumerate(CLASS_NAMES)}
    paths = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith((".", "__"))]
    folders = {path: numbers.get(_normalised(path.name)) for path in paths}
    found = Counter(folders.values())
    stray = [path.name for path, k in folders.items() if k is None or found[k] > 1]
    missing = [f"{name} (missing)" for k, name in enumerate(CLASS_NAMES) if k not in found]
    if folders and stray + missing:
        raise UserError(f"{folder}: wanted is one folder a class of Food-11; amiss are {', '.join(stray + missing)}")
    return folders


def _normalised(name):
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _read_split(folder, evaluation, ignored):
    """(files, labels, ids) of a split in either layout, sorted by relative path; what is no image goes to `ignored`.

    An evaluation image is kept even if it is empty, for its row belongs to the CSV.
    """
    folders = _class_folders(folder)
    files, labels, unlabelled = [], [], []
    for path in sorted(p for place in folders or [folder] for p in place.iterdir() if p.is_file()):
        number = re.match(r"(\d+)_", path.name)
        label = folders.get(path.parent, -1) if folders or evaluation else int(number[1]) if number else None
        image = not path.name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES
        if not image or not evaluation and path.stat().st_size == 0:
            ignored.append(path)
        elif label is None:
            unlabelled.append(path)
        elif label >= NUM_CLASSES:
            raise UserError(f"{path} has label {label}; allowed are 0 to {NUM_CLASSES - 1}")
        elif evaluation and not path.name.isprintable():
            raise UserError(f"{ascii(str(path))} has a name that is no text: rename it")
        else:
            files.append(path)
            labels.append(label)
    if len(unlabelled) > MAX_BAD_SHARE * (len(files) + len(unlabelled)):
        raise UserError(f"{len(unlabelled)} images have no label in their name (<label>_<n>.jpg): {unlabelled[0]}, ...")
    ignored.extend(unlabelled)
    ids = [f"{i:04d}" if folders else path.stem for i, path in enumerate(files)]
    twice = [i for i, n in Counter(ids).items() if n > 1]
    if twice:
        raise UserError(f"{folder} holds two images with the id {twice[0]}")
    return files, labels, ids


def open_image(path):
    """A file as an upright PIL image in RGB, whatever its mode (grey, CMYK, palette, RGBA, 16 bit) and EXIF turn.

    Raises UserError naming the file where it cannot be decoded or is a decompression bomb.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bit: PIL would clip it to white
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, DecompressionBombError, ...
        raise UserError(f"{path} cannot be decoded ({type(error).__name__}: {error})") from None


def source_size(image_size):
    """S: the side to which pictures are resized before the crop of `image_size`, as 256 is to 224."""
    return round(image_size * 256 / 224)


def eval_transform(image_size):
    """The reference test transform up to the pixels: PIL image -> Resize(S), CenterCrop(image_size) -> PIL image."""
    return transforms.Compose([transforms.Resize(source_size(image_size)), transforms.CenterCrop(image_size)])


def reference_transform(cfg, train):
    """The course's own torchvision chain for a PIL image -> normalised float tensor (3, image_size, image_size).

    It is what the batched loader is measured and tested against. torchvision turns pictures with NEAREST unless
    told otherwise; BILINEAR is used here as in the batched loader.
    """
    bilinear = transforms.InterpolationMode.BILINEAR
    random_crop = transforms.RandomResizedCrop(cfg.image_size, cfg.crop_scale or (1, 1))
    steps = [random_crop if train and cfg.crop_scale else eval_transform(cfg.image_size)]
    if train:
        steps += [transforms.RandomHorizontalFlip(cfg.hflip), transforms.RandomVerticalFlip(cfg.vflip)]
        steps += [transforms.RandomRotation(cfg.rotation, bilinear)] if cfg.rotation else []
        steps += [transforms.RandomAffine(cfg.affine, interpolation=bilinear)] if cfg.affine else []
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


class FoodDataset(Dataset):
    """The course's Dataset: one file at a time, decoded and augmented with PIL. -> (image (3, H, W) float, label).

    It is the reference path. Use it with DataLoader(num_workers=...); `fit` takes that or a BatchLoader. Where worker
    processes give multiprocessing errors in a notebook, use plain `from tqdm import tqdm` instead of `tqdm.auto`.
    """

    def __init__(self, data, split, transform):
        self.files, self.labels, self.name, self.transform = data.files[split], data.labels[split], split, transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.transform(open_image(self.files[i])), self.labels[i]


@dataclass(frozen=True)
class Split:
    """Decoded images of one split. `whole` holds each picture squeezed to a square, `eval` the reference crop."""

    name: str  # training, validation or evaluation
    view: str  # whole or eval
    origin: str
    images: torch.Tensor  # (N, 3, H, W) uint8, memory-mapped from the cache
    labels: torch.Tensor  # (N,) int64, -1 where unknown
    ids: tuple  # N file stems, in the order of the images
    aspects: torch.Tensor  # (N,) float32, width / height of the file
    cache: Path

    def __len__(self):
        return len(self.ids)


def cache_root():
    """The folder for decoded images: HW13_CACHE, or a private one of the user's in the temporary directory."""
    named = os.environ.get("HW13_CACHE")
    root = Path(named) if named else Path(tempfile.gettempdir()) / f"hw13_cache_{os.getuid()}"
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o777 if named else 0o700)
    except OSError as error:
        raise UserError(f"the cache folder {root} cannot be made ({error.strerror}); set HW13_CACHE") from None
    if not named and root.stat().st_uid != os.getuid():
        raise UserError(f"the cache folder {root} belongs to another user; set HW13_CACHE to a folder of your own")
    return root


def load_data(data, split, view, image_size):
    """The Split `split` of FoodData in one view, decoded once into the cache and memory-mapped from there.

    view: "whole" (N, 3, S, S) with S = source_size(image_size), or "eval" (N, 3, image_size, image_size), which
    equals the reference test transform bit for bit. A training or validation image that cannot be decoded is left out
    and named, many are an error; an evaluation image is never left out: a damaged one is decoded as far as it goes,
    else it becomes grey, and is named.
    """
    files, n = data.files[split], len(data.files[split])
    side = source_size(image_size) if view == "whole" else image_size
    stats = [(p.relative_to(data.root).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = fingerprint(CACHE_VERSION, Image.__version__, torchvision.__version__, view, image_size, stats)
    path = cache_root() / f"{split}-{view}-{image_size}-{key}.images"
    if not _is_cache(path, n, side) and rank_and_world()[0] == 0:
        to_view = transforms.Resize((side, side)) if view == "whole" else eval_transform(image_size)
        _decode_all(files, split, to_view, side, path)
    _collective("barrier")
    aspects, good, images = _map_cache(path, n, side)
    keep, damaged = good.nonzero()[:, 0], int((good != 1).sum())
    if damaged:
        say(f"WARNING: {damaged} of {n} {split} images are damaged; each was named when {path.name} was made")
    return Split(split, view, data.origin, images[:len(keep)], torch.tensor(data.labels[split])[keep],
                 tuple(data.ids[split][i] for i in keep.tolist()), aspects[keep], path)


def _is_cache(path, n, side):
    """Whether a cache file is there: of the right size, and not the zeros that a failed copy or disk leaves."""
    right_size = path.is_file() and path.stat().st_size == _cache_bytes(n, side)
    return right_size and bool(_map_cache(path, n, side)[0].all())


def _cache_bytes(n, side):
    """Size of a cache file: per image an aspect (float32), a flag (a byte) and its pixels."""
    return n * (4 + 1 + 3 * side**2)


def _map_cache(path, n, side, mode="r"):
    """A cache file's aspects (n,) float32, flags (n,) uint8 and images (n, 3, side, side) uint8, mapped.

    Flags: 0 left out, 1 good, 2 damaged and kept.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that a mapping made for reading cannot be written to
        flat = torch.from_numpy(np.memmap(path, np.uint8, mode, shape=_cache_bytes(n, side)))
    aspects, good, pixels = flat.split([4 * n, n, 3 * n * side**2])
    return aspects.view(torch.float32), good, pixels.view(n, 3, side, side)


def _decode_all(files, split, to_view, side, path):
    """Decode the files of a split in parallel into the cache file `path`, written whole or not at all."""
    bad = {}
    with written_whole(path) as temporary:
        try:
            aspects, good, images = _map_cache(temporary, len(files), side, "w+")
            with open(temporary, "rb+") as file:  # take the room now: a disk must not fill up below the mapping
                getattr(os, "posix_fallocate", lambda *args: None)(file.fileno(), 0, temporary.stat().st_size)
        except OSError as error:
            size, where = _cache_bytes(len(files), side) / 1e9, f"{path.parent} ({error.strerror}): set HW13_CACHE"
            raise UserError(f"the cache of {size:.1f} GB cannot be made in {where}") from None
        aspects.fill_(1)
        good.fill_(1)

        def store(i, image):
            aspects[i] = image.width / image.height
            images[i] = torch.from_numpy(np.array(to_view(image))).permute(2, 0, 1)

        def decode(i):
            try:
                store(i, open_image(files[i]))
            except UserError as error:
                if getattr(error.__context__, "errno", None):  # it could not be read now: not the picture's fault
                    raise
                bad[i] = str(error)

        with (warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool,
              progress_bar(len(files), f"decode {split}") as bar):
            warnings.simplefilter("ignore")  # odd EXIF and palette bytes; what cannot be decoded is named below
            for _ in pool.map(decode, range(len(files))):
                bar.update()
        if split == "evaluation":
            for i in sorted(bad):
                image, how = _rescue(files[i])
                store(i, image)
                good[i] = 2
                say(f"WARNING: {bad[i]}; {how}, so that its row stays in the CSV")
        elif bad:
            _leave_out(bad, good, images)


def _rescue(path):
    """(image, how) for an evaluation file that would not decode: as far as it goes, else grey."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        return open_image(path), "decoded as far as it goes"
    except UserError:
        return Image.new("RGB", (256, 256), (NEUTRAL_GREY,) * 3), "replaced by a grey picture"
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _leave_out(bad, good, images):
    """Training or validation images that would not decode: named, marked, and the rest moved together."""
    text = f"{len(bad)} of {len(good)} images: {'; '.join(bad[i] for i in sorted(bad)[:5])}"
    if len(bad) > max(1, MAX_BAD_SHARE * len(good)):
        raise UserError(f"cannot use {text}")
    say(f"WARNING: left out {text}")
    good[list(bad)] = 0
    for to, i in enumerate(good.nonzero()[:, 0].tolist()):
        images[to] = images[i].clone()


# --- the drawn demo set ----------------------------------------------------------------------------------------------

def draw_dish(label, rng):
    """One drawn picture of class `label`: a PIL image, 72 to 112 px a side, tinted, noisy, partly covered.

    A plate with one to three pieces of food on a table: their hue, their number and their corners tell the class.
    """
    canvas = Image.new("RGB", (96, 96), tuple(rng.integers(60, 220, 3).tolist()))
    draw, plate = ImageDraw.Draw(canvas), rng.uniform(42, 54, 2)
    draw.ellipse([*(plate - 40), *(plate + 40)], (225, 225, 220))
    base = np.array(ImageColor.getrgb(f"hsv({360 * label / NUM_CLASSES}, 70%, 80%)")) + rng.normal(0, 16, 3)
    for angle in 2 * math.pi * (rng.random() + np.arange(1 + label % 3) / 3):
        x, y = plate + 18 * np.array([math.cos(angle), math.sin(angle)]) + rng.normal(0, 2, 2)
        colour = tuple((base + rng.normal(0, 10, 3)).clip(0, 255).astype(int).tolist())
        draw.regular_polygon((x, y, rng.uniform(13, 19)), 3 + label % 4, rng.uniform(0, 360), colour)
    corner = rng.uniform(0, 70, 2)
    draw.rectangle([*corner, *(corner + rng.uniform(12, 34))], tuple(rng.integers(60, 220, 3).tolist()))
    pixels = np.asarray(canvas, dtype=np.float32) + rng.normal(0, 8, (96, 96, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize(tuple(rng.integers(72, 113, 2).tolist()))


def make_demo_data():
    """Draw the demo set (once, under the cache folder) in Food-11's layout, and return its FoodData.

    It exists so that the notebook runs on a machine without data. Its scores say nothing about Food-11.
    """
    per_class = dict(zip(SPLITS, (20, 6, 4) if is_fast() else (110, 40, 20), strict=True))
    root = cache_root() / f"demo-{fingerprint(inspect.getsource(draw_dish), per_class)}" / "Food-11"
    if not root.is_dir():
        building = Path(tempfile.mkdtemp(dir=cache_root())) / "Food-11"
        for number, (split, n) in enumerate(per_class.items()):
            (building / split).mkdir(parents=True)
            rng = np.random.default_rng(number)
            for i, label in enumerate((rng.permutation(NUM_CLASSES * n) % NUM_CLASSES).tolist()):
                name = f"{i:04d}.jpg" if split == "evaluation" else f"{label}_{i}.jpg"
                draw_dish(label, rng).save(building / split / name, quality=90)
        (building / "DRAWN_DEMO_SET").write_text("Drawn shapes, not photographs.\n")
        with contextlib.suppress(OSError):  # another process was first
            os.replace(building.parent, root.parent)
    return read_folder(root)


# =====================================================================================================================
# 2  Loader
# =====================================================================================================================

# images (B, 3, S, S) float32, labels (B,) int64, rows (B,): their places in the Split;
# share: this process's images x number of processes / images of the step, so that averaged gradients are exact.
Batch = namedtuple("Batch", "images labels rows share", defaults=(None, 1.0))


def _matrix(a, b, c, d, x=0.0, y=0.0):
    """(N, 3, 3) float64 affine matrices [[a, b, x], [c, d, y], [0, 0, 1]] from entries that are (N,) or numbers."""
    entries = (torch.as_tensor(entry, dtype=torch.float64) for entry in (a, b, x, c, d, y, 0, 0, 1))
    return torch.stack(torch.broadcast_tensors(*entries), -1).view(-1, 3, 3)


def sample_crops(aspects, scale, generator, ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's draw for N pictures: (centre x, centre y, half width, half height), each (N,) in [-1, 1].

    As in torchvision, ten tries of an area in `scale` and a log-uniform width / height in `ratio`; the first that lies
    inside the picture is taken, else the largest central crop within `ratio`. Coordinates are those of the whole
    picture squeezed to a square, so that the picture's aspect (width / height) comes in here and nowhere else.
    """
    n = len(aspects)
    area = torch.empty(n, 10, dtype=torch.float64).uniform_(*scale, generator=generator)
    log_ratio = torch.empty(n, 10, dtype=torch.float64).uniform_(*map(math.log, ratio), generator=generator)
    aspect = aspects.double()[:, None]
    wide = (area * log_ratio.exp() / aspect).sqrt()
    high = (area / log_ratio.exp() * aspect).sqrt()
    fits = (wide <= 1) & (high <= 1)
    first = fits.int().argmax(1, keepdim=True)
    wide, high = wide.gather(1, first)[:, 0], high.gather(1, first)[:, 0]
    none, limit = ~fits.any(1), aspects.double().clamp(*ratio)
    wide = torch.where(none, (limit / aspects).clamp(max=1), wide)
    high = torch.where(none, (aspects / limit).clamp(max=1), high)
    place = torch.where(none, 0.0, torch.rand(2, n, dtype=torch.float64, generator=generator) * 2 - 1)
    return place[0] * (1 - wide), place[1] * (1 - high), wide, high


def sample_affine(aspects, cfg, generator):
    """Draw the training view of N pictures of the given `aspects` (N,): matrices (N, M, 2, 3) for `warp`, on the CPU.

    The first matrix of an image composes the crop, the flips, RandomRotation and RandomAffine in the order of the
    course's Boss transform. Each turn cuts at the frame of the crop and fills with black, so its frame comes along as
    a matrix of its own (none where the config does not turn). Coordinates are in [-1, 1], from output to source.
    """
    n = len(aspects)

    def uniform(limit):
        return (torch.rand(n, dtype=torch.float64, generator=generator) * 2 - 1) * limit

    def flip(probability):
        return 1 - 2 * (torch.rand(n, dtype=torch.float64, generator=generator) < probability).double()

    x, y, wide, high = sample_crops(aspects, cfg.crop_scale, generator)
    crop = _matrix(wide * flip(cfg.hflip), 0, 0, high * flip(cfg.vflip), x, y)
    # Undone in reverse order. torchvision's rotate turns counter-clockwise and its affine clockwise.
    turns = [sign * math.pi / 180 * uniform(limit) for sign, limit in ((-1, cfg.affine), (1, cfg.rotation)) if limit]
    frames = [torch.eye(3, dtype=torch.float64).expand(n, 3, 3)]
    for angle in turns:
        frames.append(_matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos()) @ frames[-1])
    return torch.stack([crop @ frames[-1], *frames[1:]], 1)[:, :, :2].float()


def coordinates(matrices, size):
    """Where each pixel of a (size, size) output lies under N affine matrices (N, 2, 3): x and y, (N, 2, size, size).

    As F.affine_grid(align_corners=False), but from two lines instead of a matrix product a pixel: a third of the time.
    """
    line = (torch.arange(size, device=matrices.device) * 2 + 1) / size - 1
    along_x, along_y, shift = matrices.unbind(2)
    return along_x[..., None, None] * line + (along_y[..., None] * line + shift[..., None])[..., None]


def warp(images, matrices, size):
    """Apply `matrices` (B, M, 2, 3) to uint8 `images` (B, 3, H, W): float32 (B, 3, size, size) in 0..255.

    The first matrix leads to the source, which the one bilinear grid_sample takes with its border repeated; each other
    one leads to a frame, outside of which the picture is black. A frame fades over half a pixel on either side of its
    edge, as grid_sample's zero padding would.
    """
    to_source, *frames = matrices.unbind(1)
    grid = coordinates(to_source, size).permute(0, 2, 3, 1)
    out = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    for frame in frames:
        outside = coordinates(frame, size).abs_().amax(1, keepdim=True).sub_(1)
        out *= outside.mul_(-size / 2).add_(0.5).clamp_(0, 1)
    return out


@functools.cache
def _mean_and_std(device):
    """ImageNet's mean and deviation in pixels of 0..255, (3, 1, 1) each, put on a device once."""
    return tuple(255 * torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))


def normalize(images):
    """Pixels in 0..255, any dtype (B, 3, H, W) -> float32 with ImageNet's mean and deviation, as the teacher wants."""
    mean, std = _mean_and_std(images.device)
    return torch.addcmul(-mean / std, images, 1 / std)


class BatchLoader:
    """Batches of a Split on the device: Batch(images (B, 3, S, S) float32 normalised, labels (B,), rows (B,), share).

    train=True shuffles and augments as `cfg` says; every draw of an epoch is a function of (seed, epoch) alone and
    belongs to the image's row, so a resumed run sees what an uninterrupted one would. Otherwise batches come in order.
    The uint8 images move onto the GPU when they fit in half of its free memory, else they are read batch by batch
    through pinned memory. Under torch.distributed each process yields its part of every batch, unless shared=False.
    Raises UserError where the view is not the one that the config's crop wants.
    """

    def __init__(self, split, cfg, device, train=False, batch_size=None, shared=True):
        if train and (split.view == "whole") != bool(cfg.crop_scale):
            raise UserError(f"the config wants the {'whole' if cfg.crop_scale else 'eval'} view, not {split.view}")
        self.dataset = self.split = split  # "dataset" as in torch's DataLoader
        self.cfg, self.device, self.train, self.epoch = cfg, torch.device(device), train, 0
        self.batch_size = batch_size or cfg.batch_size
        self.rank, self.world = rank_and_world() if shared else (0, 1)
        self.images, self.labels = split.images, split.labels.to(self.device)
        if self.device.type == "cuda" and self.images.nbytes < torch.cuda.mem_get_info(self.device)[0] / 2:
            self.images = self.images.to(self.device)

    def set_epoch(self, epoch):
        """Choose the epoch whose order and views the next iteration yields."""
        replayed = self.cfg.teacher_views and self.cfg.needs_teacher
        self.epoch = epoch % self.cfg.teacher_views if replayed else epoch

    def batches(self):
        """The rows of each step, over all processes: a last batch of less than two for each joins the one before."""
        n = len(self.split)
        order = torch.randperm(n, generator=self._generator(0)) if self.train else torch.arange(n)
        steps = list(order.split(self.batch_size))
        if len(steps) > 1 and len(steps[-1]) < 2 * self.world:
            steps[-2:] = [torch.cat(steps[-2:])]
        return steps

    def __len__(self):
        return len(self.batches())

    def __iter__(self):
        draw = self._draw()
        for step in self.batches():
            rows = step.tensor_split(self.world)[self.rank]
            labels = self.labels[rows.to(self.device, non_blocking=True)]
            yield Batch(self.views_of(rows, draw), labels, rows, len(rows) * self.world / len(step))

    def views_of(self, rows, draw=None):
        """The normalised images (B, 3, S, S) of some rows as the chosen epoch shows them."""
        there = rows.to(self.device, non_blocking=True)
        near = self.images.device.type == self.device.type
        images = self.images[there] if near else self.images[rows].pin_memory().to(self.device, non_blocking=True)
        draw = self._draw() if draw is None else draw
        if self.train and self.cfg.crop_scale:
            images = warp(images, draw[there], self.cfg.image_size)
        elif self.train:
            images = torch.where(draw[there, None, None, None], images.flip(3), images)
        return normalize(images)

    def _generator(self, stream):
        """A CPU generator for one of this epoch's independent random streams."""
        return torch.Generator().manual_seed(int(fingerprint(self.cfg.seed, self.epoch, stream)[:15], 16))

    def _draw(self):
        """This epoch's view of every row, on the device: matrices for `warp`; flips (N,) bool; None if not training."""
        generator = self._generator(1)
        if not self.train:
            return None
        if not self.cfg.crop_scale:
            return (torch.rand(len(self.split), generator=generator) < self.cfg.hflip).to(self.device)
        # In parts: what is drawn on the way is twenty times as large as what remains.
        parts = [sample_affine(part, self.cfg, generator) for part in self.split.aspects.split(4096)]
        return torch.cat(parts).to(self.device)


# =====================================================================================================================
# 3  Students
# =====================================================================================================================


class GlobalAvgPool(nn.Module):
    """(B, C, H, W) -> (B, C). AdaptiveAvgPool2d's backward is not deterministic on CUDA, mean's is."""

    def forward(self, x):
        return x.mean((2, 3))


def dwpw_conv(in_channels, out_channels, kernel_size=3, stride=2, padding=1):
    """The course's depthwise-separable block: (B, in, H, W) -> (B, out, H / stride, W / stride).

    A depthwise k x k convolution sees space, a pointwise 1 x 1 convolution mixes channels (Howard et al. 2017,
    MobileNets): k*k*in + in*out weights instead of k*k*in*out. The sizes hold for padding = kernel_size // 2.
    """
    depthwise = nn.Conv2d(in_channels, in_channels, kernel_size, stride, padding, groups=in_channels)
    pointwise = nn.Conv2d(in_channels, out_channels, 1)
    return nn.Sequential(depthwise, nn.BatchNorm2d(in_channels), nn.LeakyReLU(0.01),
                         pointwise, nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.01))


def sample_student(cfg):
    """The course's sample net: four plain 3x3 convolutions, 59,723 parameters. (B, 3, H, W) -> logits (B, 11)."""
    parts = OrderedDict()
    for i, (width, out) in enumerate(itertools.pairwise((3, 4, 16, 64, 84)), 1):
        parts |= {f"conv{i}": nn.Conv2d(width, out, 3), f"bn{i}": nn.BatchNorm2d(out), f"relu{i}": nn.ReLU()}
        parts |= {f"pool{i}": nn.MaxPool2d(2)} if i > 1 else {}
    return nn.Sequential(parts | {"pool": GlobalAvgPool(), "fc": nn.Linear(84, NUM_CLASSES)})


def stacked(cfg, stem, block):
    """stem, then layer1, layer2, ... of `block(width, out, stride)` as the config says, then pool and classifier."""
    parts, width = OrderedDict(stem=stem), cfg.stem_width
    for number, (out, depth, stride) in enumerate(zip(cfg.widths, cfg.depths, cfg.strides, strict=True), 1):
        later = (block(out, out, 1) for _ in range(1, depth))
        parts[f"layer{number}"], width = nn.Sequential(block(width, out, stride), *later), out
    return nn.Sequential(parts | {"pool": GlobalAvgPool(), "fc": nn.Linear(width, NUM_CLASSES)})


def dwpw_student(cfg):
    """A student of dwpw_conv blocks; with strides 1, 2, 2 its maps have the teacher's feature sizes (1/4, 1/8, 1/16).

    The stem is the teacher's shape (7x7 stride 2, max-pool); widths, depths, strides and kernel come from `cfg`.
    (B, 3, H, W) -> logits (B, 11).
    """
    width, k = cfg.stem_width, cfg.kernel_size
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return stacked(cfg, nn.Sequential(*stem), lambda width, out, stride: dwpw_conv(width, out, k, stride, k // 2))


def conv_bn(in_channels, out_channels, kernel_size=1, stride=1, groups=1, activate=True):
    """A convolution without bias, batch norm and, unless activate=False, hard-swish (Howard et al. 2019)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), *([nn.Hardswish()] if activate else []))


class InvertedResidual(nn.Module):
    """A depthwise convolution between two widths: expand 1x1, k x k, project 1x1 (MobileNetV2, Sandler et al. 2018).

    (B, in, H, W) -> (B, out, H / stride, W / stride). Space is seen at `expansion` times the width, where a depthwise
    weight is cheap; the narrow ends carry a shortcut where their shapes agree, so that many blocks can be stacked.
    """

    def __init__(self, in_channels, out_channels, kernel_size=5, stride=1, expansion=3):
        super().__init__()
        wide = in_channels * expansion
        self.shortcut = stride == 1 and in_channels == out_channels
        self.expand = conv_bn(in_channels, wide)
        self.depthwise = conv_bn(wide, wide, kernel_size, stride, groups=wide)
        self.project = conv_bn(wide, out_channels, activate=False)

    def forward(self, x):
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.shortcut else out


def ir_student(cfg):
    """A student of inverted residuals behind a 3x3 stride-2 stem: (B, 3, H, W) -> logits (B, 11).

    Late layers without a stride keep large feature maps, which cost multiply-adds and no parameters.
    """
    def block(width, out, stride):
        return InvertedResidual(width, out, cfg.kernel_size, stride, cfg.expansion)

    return stacked(cfg, conv_bn(3, cfg.stem_width, 3, 2), block)


def resnet(cfg):
    """torchvision's ResNet `cfg.student` with 11 classes and fresh weights: a teacher of one's own."""
    return torchvision.models.get_model(cfg.student, num_classes=NUM_CLASSES)


STUDENTS = {"sample": sample_student, "dwpw": dwpw_student, "ir": ir_student,
            "resnet18": resnet, "resnet34": resnet, "resnet50": resnet}


def build_student(cfg):
    """The net that `cfg` describes, its weights drawn from cfg.seed (the global random state is left alone).

    A builder of your own, Config -> nn.Module, goes into STUDENTS under a new name. UserError for an unknown one.
    """
    if cfg.student not in STUDENTS:
        raise UserError(f"student={cfg.student!r}: allowed is one of {', '.join(STUDENTS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return STUDENTS[cfg.student](cfg)


def get_student_model():
    """The course's name for the student: the net of the last stage."""
    return build_student(list(STAGES.values())[-1])


def check_budget(model, limit=PARAM_LIMIT):
    """The number of parameters of `model`, counted the strict way; UserError above `limit`.

    Strict is the larger of two counts: all parameters once, trained or frozen (catches a bare nn.Parameter), and those
    of every module each time that it is called (catches a module called twice, which the course's tool counts twice).
    """
    called = sum(own for _, _, own, _ in _trace(model, 64))
    count = max(called, sum(p.numel() for p in model.parameters()))
    if count > limit:
        raise UserError(f"the student has {count:,} parameters; the homework allows {limit:,}: choose smaller widths")
    return count


@contextlib.contextmanager
def evaluation_mode(model):
    """Eval mode and no gradients for the block; afterwards the model is in the mode that it was in."""
    training = model.training
    try:
        with torch.no_grad():
            yield next(model.eval().parameters()).device
    finally:
        model.train(training)


def _trace(model, image_size):
    """[(name, output shape, parameters, multiply-adds)] for every call of a module that has parameters of its own."""
    calls, names = [], {module: name or "(model)" for name, module in model.named_modules()}

    def record(module, inputs, output):
        own = sum(p.numel() for p in module.parameters(recurse=False))
        macs = output.numel() * module.weight[0].numel() if isinstance(module, (nn.Conv2d, nn.Linear)) else 0
        if own:
            calls.append((names.get(module, "(hidden)"), tuple(output.shape[1:]), own, macs))

    with evaluation_mode(model) as device, nn.modules.module.register_module_forward_hook(record):
        model(torch.zeros(1, 3, image_size, image_size, device=device))
    return calls


def count_macs(model, image_size):
    """Multiply-adds of convolutions and linear layers for one image."""
    return sum(macs for *_, macs in _trace(model, image_size))


def layer_table(model, image_size=224):
    """A DataFrame of output shape, parameters and multiply-adds, a row a layer or block of layers, and a sum."""
    frame = pd.DataFrame(_trace(model, image_size), columns=["layer", "output", "parameters", "multiply-adds"])
    frame["output"] = [" x ".join(map(str, shape)) for shape in frame["output"]]
    blocks = frame.groupby(frame["layer"].str.split(".").str[:2].str.join("."), sort=False)
    frame = blocks.agg({"output": "last", "parameters": "sum", "multiply-adds": "sum"})
    frame.loc["all"] = ["", frame["parameters"].sum(), frame["multiply-adds"].sum()]
    return frame


# =====================================================================================================================
# 4  Teacher
# =====================================================================================================================

def load_weights(path):
    """A state dict from a checkpoint file: a wrapper (state_dict, model) and prefixes (module., _orig_mod.) come off.

    Raises UserError where the file is missing, damaged, unsafe or holds no state dict.
    """
    state = load_file(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path} is not loaded: it holds no state dict (names of layers -> tensors)")
    return OrderedDict((re.sub(r"^((module|_orig_mod)\.)+", "", str(key)), value) for key, value in state.items())


class AveragedTeachers(nn.Module):
    """Several teachers as one: logits (B, 11) whose softmax is the mean of their probabilities, not of logits."""

    def __init__(self, teachers):
        super().__init__()
        self.members = nn.ModuleList(teachers)

    def forward(self, x):
        log_p = [F.log_softmax(teacher(x).float(), 1) for teacher in self.members]
        return torch.logsumexp(torch.stack(log_p), 0) - math.log(len(log_p))


def load_teacher(path, device="cpu"):
    """The frozen teacher from a checkpoint with torchvision's ResNet names and 11 classes, in eval mode, on `device`.

    path: a file, or several, comma-separated or as a list, which become AveragedTeachers. Raises UserError saying what
    a file holds instead.
    """
    paths = path.split(",") if isinstance(path, str) else path if isinstance(path, (list, tuple)) else [path]
    teachers = [_load_resnet(one) for one in paths]
    teacher = teachers[0] if len(teachers) == 1 else AveragedTeachers(teachers)
    return freeze(teacher).to(device, memory_format=torch.channels_last)


def _load_resnet(path):
    """The ResNet-18, -34 or -50 of a checkpoint, told apart by their layers."""
    state = load_weights(path)
    name = "resnet34" if "layer1.2.conv1.weight" in state else "resnet18"
    teacher = build_student(Config(student="resnet50" if "layer1.0.conv3.weight" in state else name))
    try:
        teacher.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is not loaded: it is no ResNet of 11 classes ({why})") from None
    return teacher


def freeze(model):
    """Eval mode and no gradients: nothing that runs through `model` afterwards moves its weights or statistics."""
    return model.eval().requires_grad_(False)


def state_checksum(model):
    """sha256 over all weights and buffers of a model, to prove that it was not changed."""
    parts = (key.encode() + value.cpu().numpy().tobytes() for key, value in model.state_dict().items())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def soft_labels(logits, temperature):
    """softmax(logits / temperature) over the last dimension, fp32: (..., 11) -> (..., 11)."""
    return F.softmax(logits.float() / temperature, dim=-1)


class TeacherViews:
    """The teacher's logits of K replayable epochs in one flat file: what is stored once, no teacher computes again.

    Order and draws of epoch e are functions of (seed, e mod K), so a row's view e mod K is always the same picture.
    The file is keyed by all that the logits depend on; one that holds another key is refused, never reused. Logits
    that are not stored yet are NaN, so a file that was cut short by a kill goes on where it stopped.
    """

    def __init__(self, cfg, loader, teacher_checksum, dtype=None):
        split = loader.split
        shape = (cfg.teacher_views, len(split), NUM_CLASSES)
        keys = ("seed", "image_size", "batch_size", "crop_scale", "hflip", "vflip", "rotation", "affine")
        settings = [str(dtype), loader.device.type, rank_and_world()[1], *(getattr(cfg, key) for key in keys)]
        key = fingerprint(teacher_checksum, split.ids, split.cache.name, shape, settings).encode()
        self.path = cache_root() / f"teacher-{key.decode()}.logits"
        size = len(key) + 4 * math.prod(shape)
        if not self.path.is_file() and rank_and_world()[0] == 0:
            with written_whole(self.path) as temporary, open(temporary, "wb") as file:
                file.write(key)
                for _ in range(shape[0]):
                    file.write(np.full(shape[1:], np.nan, np.float32).tobytes())
        _collective("barrier")
        if self.path.stat().st_size != size or self.path.open("rb").read(len(key)) != key:
            raise UserError(f"{self.path} holds the teacher's logits for other pictures or settings: delete it")
        try:
            flat = torch.from_file(str(self.path), shared=True, size=size, dtype=torch.uint8)
        except RuntimeError:
            raise UserError(f"{self.path} cannot be written; set HW13_CACHE to a folder of your own") from None
        self.logits = flat[len(key):].view(torch.float32).view(shape)

    def read(self, view, rows, device):
        """Stored logits (B, 11) of rows in a view, or None if one of them is not stored yet."""
        logits = self.logits[view, rows]
        return None if logits.isnan().any() else logits.to(device, non_blocking=True)

    def write(self, view, rows, logits):
        """Store the logits (B, 11) of rows in a view."""
        self.logits[view, rows] = logits.detach().float().cpu()


# =====================================================================================================================
# 5  Losses
# =====================================================================================================================


def loss_fn_kd(student_logits, labels, teacher_logits, alpha=0.5, temperature=20.0):
    """Knowledge distillation (Hinton, Vinyals, Dean 2015), computed in fp32:

        alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE(student, labels)

    student_logits, teacher_logits: (B, 11); labels: (B,) int64, or (B, 11) probabilities. KL is the mean over the
    batch of distributions softened by T; T^2 keeps its gradient at the size of the other term's. Returns a scalar.
    """
    student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    log_p_student = F.log_softmax(student_logits / temperature, dim=1)
    log_p_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    soft_loss = F.kl_div(log_p_student, log_p_teacher, reduction="batchmean", log_target=True)
    hard_loss = F.cross_entropy(student_logits, labels)
    return alpha * temperature**2 * soft_loss + (1 - alpha) * hard_loss


def loss_weights(cfg, progress):
    """Weights of (CE, T^2 KL, alignment) at progress p = (epoch + 1) / n_epochs.

    constant: (1 - alpha, alpha, 1), which is loss_fn_kd plus the alignment. handover: the published Boss form, in
    which alignment leads and the labels take over: 10 p^2 (p^2 CE + (1 - p^2) T^2 KL) + alignment.
    """
    if cfg.loss_fn_type == "CE":
        return 1.0, 0.0, 0.0
    if cfg.loss_schedule == "handover":
        return 10 * progress**4, 10 * progress**2 * (1 - progress**2), 1.0
    return 1 - cfg.alpha, cfg.alpha, 1.0


@contextlib.contextmanager
def feature_hooks(model, layers):
    """A dict that a forward pass inside the block fills with the outputs of the named layers; no hook outlives it."""
    features = {}

    def keep(name, module, inputs, output):
        features[name] = output

    with contextlib.ExitStack() as hooks:
        for name in layers:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(functools.partial(keep, name)))
        yield features


def alignment(student_maps, teacher_maps, weights, adapters):
    """Sum over layers of weight * smooth-L1(adapter(student map), teacher map), fp32. Maps: {name: (B, C, H, W)}.

    The larger of two maps is averaged down to the size of the other one. A layer whose weight is zero is
    left out. weights: {name: number}; adapters: {name: module}. Layer-wise supervision: FitNets, Romero et al. 2015.
    """
    def term(ours, theirs, adapter):
        side = min(ours.shape[-1], theirs.shape[-1])
        ours, theirs = (maps.float() if maps.shape[-1] == side else F.adaptive_avg_pool2d(maps.float(), side)
                        for maps in (ours, theirs))
        return F.smooth_l1_loss(adapter(ours), theirs)

    return sum(w * term(student_maps[k], teacher_maps[k], adapters[k]) for k, w in weights.items() if w)


class DistillLoss(nn.Module):
    """Student, teacher, adapters and the weighted sum of CE, KL and alignment in one object, so no call can swap them.

    forward(images (B, 3, S, S), labels, teacher_logits=None) -> (loss, student_logits, teacher_logits or None). A term
    of zero weight is dropped, and the teacher does not run when no term needs it or its logits are given. Adapters are
    1x1 convolutions where a student layer is narrower or wider than the teacher's: trained, never counted, never saved
    with the student. The networks run under autocast to `dtype`; the losses are fp32.
    Raises UserError where a term needs a teacher and there is none.
    """

    def __init__(self, cfg, student, teacher=None, dtype=None):
        super().__init__()
        if cfg.needs_teacher and teacher is None:
            raise UserError(f"{cfg.exp_name} needs a teacher: put {TEACHER_FILE} into the data folder or use --teacher")
        self.cfg, self.student, self.dtype = cfg, student, dtype
        if any(cfg.align_weights) and isinstance(teacher, AveragedTeachers):
            raise UserError(f"{cfg.exp_name} aligns layers, which wants a single teacher")
        # Past nn.Module's notice: its weights are nobody's parameters, and train() does not reach it.
        self.__dict__["teacher"] = None if teacher is None else freeze(teacher)
        self.layers = {f"layer{i}": w for i, w in enumerate(cfg.align_weights, 1) if w}
        self.adapters = nn.ModuleDict()
        if self.layers:
            image = torch.zeros(1, 3, cfg.image_size, cfg.image_size)
            ours, theirs = (features_of(net, self.layers, image) for net in (student, teacher))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(cfg.seed)
                for name in self.layers:
                    width, wanted = ours[name].shape[1], theirs[name].shape[1]
                    self.adapters[name] = nn.Conv2d(width, wanted, 1) if width != wanted else nn.Identity()
        self.set_progress(0.0)

    def set_progress(self, progress):
        """Choose the weights for progress p = (epoch + 1) / n_epochs."""
        self.w_ce, self.w_kl, self.w_align = loss_weights(self.cfg, progress)

    def forward(self, images, labels, teacher_logits=None):
        with self._autocast(images), feature_hooks(self.student, self.layers) as student_maps:
            student_logits = self.student(images)
        teacher_maps = {}
        if self.layers or (self.w_kl and teacher_logits is None):
            with torch.no_grad(), self._autocast(images), feature_hooks(self.teacher, self.layers) as teacher_maps:
                teacher_logits = self.teacher(images)
        loss = 0.0
        if self.w_kl:
            loss = self.w_kl * loss_fn_kd(student_logits, labels, teacher_logits, 1.0, self.cfg.temperature)
        if self.w_ce:
            loss = loss + self.w_ce * F.cross_entropy(student_logits.float(), labels)
        if self.layers:
            loss = loss + self.w_align * alignment(student_maps, teacher_maps, self.layers, self.adapters)
        return loss, student_logits, teacher_logits

    def _autocast(self, images):
        return torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None)


def features_of(model, layers, images):
    """{layer: (B, C, H, W)}: what the named layers of a model give for images, in eval mode."""
    with evaluation_mode(model) as device, feature_hooks(model, layers) as maps:
        model(images.to(device))
    return maps


def _kd(student, labels, teacher, alpha, t, first=F.log_softmax, second=F.softmax, reduction="batchmean", divisor=1,
        power=2, student_power=1, teacher_power=1, swapped=False, flipped=False):
    """loss_fn_kd with its details open to be got wrong, for check_loss_fn_kd."""
    student, teacher = (teacher, student) if swapped else (student, teacher)
    alpha = 1 - alpha if flipped else alpha
    log_p, q = first(student / t**student_power, 1), second(teacher / t**teacher_power, 1)
    soft_loss = F.kl_div(log_p, q, reduction=reduction) / divisor
    return alpha * t**power * soft_loss + (1 - alpha) * F.cross_entropy(student, labels)


# hint -> a loss with this mistake: (hint, which detail of _kd, its wrong value)
KD_MISTAKES = {hint: functools.partial(_kd, **{detail: value}) for hint, detail, value in (
    ("reduction='mean' divides by the classes too (11 times too small): use 'batchmean'", "divisor", NUM_CLASSES),
    ("reduction='sum' grows with the batch: use 'batchmean'", "reduction", "sum"),
    ("F.kl_div wants log-probabilities of the student first: log_softmax, not softmax", "first", F.softmax),
    ("F.kl_div wants the teacher's probabilities, not their logarithm", "second", F.log_softmax),
    ("the soft loss is not multiplied by temperature ** 2", "power", 0),
    ("the soft loss is multiplied by temperature, not by its square", "power", 1),
    ("the student's logits are not divided by the temperature", "student_power", 0),
    ("the teacher's logits are not divided by the temperature", "teacher_power", 0),
    ("student and teacher are swapped", "swapped", True),
    ("alpha weighs the labels instead of the soft loss", "flipped", True),
)}


def check_loss_fn_kd(my_loss):
    """Tell a learner whether their own loss_fn_kd is right and, if not, which known mistake it looks like.

    my_loss(student_logits, labels, teacher_logits, alpha, temperature) -> scalar. Prints a line, returns True or False.
    """
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 6, NUM_CLASSES, generator=generator)).unbind()
    labels = torch.randint(NUM_CLASSES, (6,), generator=generator)
    cases = [(student, labels, teacher, alpha, t) for alpha, t in ((0.3, 4.0), (0.8, 2.0))]

    def agrees(other):
        return all(torch.allclose(g, other(*case), rtol=1e-4, atol=1e-4, equal_nan=True)
                   for g, case in zip(given, cases, strict=True))

    try:
        given = [torch.as_tensor(my_loss(*case)).detach().float().reshape(()) for case in cases]
    except Exception as error:  # whatever a learner's code raises is theirs to read
        print(f"Not yet: it raises {type(error).__name__}: {error}")
        return False
    if agrees(loss_fn_kd):
        print("Right: it agrees with loss_fn_kd.")
        return True
    unknown = f"it gives {given[0]:.4f} where {loss_fn_kd(*cases[0]):.4f} is wanted, and that is no known mistake"
    print(f"Not yet: {next((hint for hint, mistaken in KD_MISTAKES.items() if agrees(mistaken)), unknown)}.")
    return False


# =====================================================================================================================
# 6  Training
# =====================================================================================================================

KAGGLE_HOURS, SESSION_START = 12, time.time()
RUN_FILES = ("last.ckpt", "previous.ckpt")  # what a run goes on from, and the save before it
BEHAVIOUR_KEYS = {"time_limit_h", "finite_check"}
HISTORY_COLUMNS = ("epoch", "lr", "train_loss", "train_acc", "valid_loss", "valid_acc", "n", "seconds")
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def build_optimizer(cfg, parameters):
    """The optimizer of the config over `parameters`: one fused kernel a step; SGD has Nesterov momentum 0.9."""
    extra = {"momentum": 0.9, "nesterov": True} if cfg.optimizer == "sgd" else {}
    return OPTIMIZERS[cfg.optimizer](parameters, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True, **extra)


def learning_rate(cfg, epoch):
    """The learning rate at a fractional epoch: linear warm-up, then constant or a half cosine down to zero."""
    if epoch < cfg.warmup_epochs:  # the thousandth, so that the first step moves too
        return cfg.lr * (epoch + 1e-3) / cfg.warmup_epochs
    done = (epoch - cfg.warmup_epochs) / max(cfg.n_epochs - cfg.warmup_epochs, 1e-9)
    return cfg.lr if cfg.lr_schedule == "constant" else cfg.lr * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def best_so_far(history):
    """(best validation accuracy in a history's rows, epochs since then); an epoch without validation is never best."""
    best, since = -1.0, 0
    for row in history:
        best, since = (row["valid_acc"], 0) if row["valid_acc"] > best else (best, since + 1)
    return best, since


def is_finished(history, cfg):
    """Whether a run with this history has had all its epochs, or `patience` of them without a better accuracy."""
    return len(history) >= cfg.n_epochs or best_so_far(history)[1] >= cfg.patience


class TrainState:
    """All that a run carries from epoch to epoch; state_dict() and load_state_dict() make resuming exact."""

    def __init__(self, loss_fn, cfg, device):
        self.loss_fn, self.history = loss_fn, []
        self.best = _copy_of(loss_fn.student)  # of the epoch with the best validation accuracy
        self.optimizer = build_optimizer(cfg, loss_fn.parameters())
        self.scaler = torch.amp.GradScaler(device.type, enabled=loss_fn.dtype is torch.float16)
        self.parts = {"loss_fn": loss_fn, "optimizer": self.optimizer, "scaler": self.scaler}

    def state_dict(self):
        return {"history": self.history, "best": self.best} | {n: part.state_dict() for n, part in self.parts.items()}

    def load_state_dict(self, state):
        self.history, self.best = state["history"], state["best"]
        for name, part in self.parts.items():
            if state[name]:  # the scaler's is empty where the run was not in fp16
                part.load_state_dict(state[name])


def refuse_evaluation(loader):
    """UserError for a loader or Dataset of evaluation images, whatever torch wrapped around them."""
    if getattr(loader, "name", None) == "evaluation":
        raise UserError("evaluation images are for predictions alone: they must not enter training or validation")
    for inside in (*getattr(loader, "datasets", ()), *([loader.dataset] if hasattr(loader, "dataset") else [])):
        refuse_evaluation(inside)


def train_one_epoch(state, forward, loader, cfg, epoch, views=None, on_step=None):
    """One pass over the training images: {"lr", "train_loss", "train_acc"}.

    forward: state.loss_fn or its data-parallel wrapper. loader yields (images, labels) or Batch. views: TeacherViews
    to read or fill. on_step(n_images, sums) is told of each step. Sums stay on the device, so no step waits for one.
    Raises UserError where a loss is not finite, or for evaluation images.
    """
    refuse_evaluation(loader)
    loss_fn, device = state.loss_fn, next(state.loss_fn.parameters()).device
    loss_fn.train()
    loss_fn.set_progress((epoch + 1) / cfg.n_epochs)
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    else:  # a DataLoader draws from the global random state
        torch.manual_seed(int(fingerprint(cfg.seed, epoch)[:12], 16))
    view, n_steps, recent = getattr(loader, "epoch", epoch), len(loader), []  # recent: (loss, rows) since the last look
    sums = torch.zeros(3, device=device, dtype=torch.float64)  # loss * images, correct, images
    for step, batch in enumerate(loader):
        images, labels, rows, share = Batch(*batch)
        images = images.to(device, loss_fn.dtype or torch.float32, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        stored = views.read(view, rows, device) if views else None
        loss, student_logits, teacher_logits = forward(images, labels, stored)
        lr = learning_rate(cfg, epoch + step / n_steps)
        optimizer_step(state, loss * share, lr, cfg.grad_norm_max)
        if views and stored is None and teacher_logits is not None:
            views.write(view, rows, teacher_logits)
        sums[0] += loss.detach() * len(labels)
        sums[1] += (student_logits.detach().argmax(1) == labels).sum()
        sums[2] += len(labels)
        recent.append((loss.detach(), rows))
        if len(recent) == cfg.finite_check or step == n_steps - 1:
            check_finite(recent, cfg, epoch, loader)
            recent = []
        if on_step:
            on_step(len(labels), sums)
    _collective("all_reduce", sums)
    loss, correct, n = sums.tolist()
    return {"lr": lr, "train_loss": loss / n, "train_acc": correct / n}


def check_finite(recent, cfg, epoch, loader):
    """UserError naming epoch and images of the first of the `recent` (loss, rows) whose loss is not finite.

    It reads the device, so it is called every cfg.finite_check batches and not at each.
    """
    good = torch.stack([loss for loss, _ in recent]).isfinite().tolist()
    if not all(good):
        rows = recent[good.index(False)][1]
        ids = "" if rows is None else f" at the images {', '.join(loader.split.ids[i] for i in rows[:8].tolist())}, ..."
        raise UserError(f"the loss of epoch {epoch + 1} is not finite{ids}: lower lr (now {cfg.lr:g}) or set amp=off, "
                        "with --fresh; the last whole epoch is saved")


def optimizer_step(state, loss, lr, grad_norm_max):
    """Backward pass, clipped gradients, one step.

    Under fp16 the gradients are unscaled before they are clipped; without it the scaler does nothing.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    state.scaler.unscale_(state.optimizer)
    nn.utils.clip_grad_norm_(state.loss_fn.parameters(), grad_norm_max)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def predict_logits(model, loader):
    """(logits (N, 11) float32, labels (N,)) on the CPU, in the loader's order: eval mode, full precision.

    Under torch.distributed these are this process's parts of every batch alone.
    """
    with evaluation_mode(model) as device:
        pairs = [(model(images.to(device, memory_format=torch.channels_last)).float(), labels)
                 for images, labels, *_ in loader]
    return tuple(torch.cat(part).cpu() for part in zip(*pairs, strict=True))


def evaluate(model, loader):
    """{"valid_loss", "valid_acc", "n"} of a model on a loader's labelled (validation) images, over all processes."""
    logits, labels = predict_logits(model, loader)
    sums = torch.tensor([F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum(),
                         len(labels)], dtype=torch.float64, device=next(model.parameters()).device)
    _collective("all_reduce", sums)
    loss, correct, n = sums.tolist()
    return {"valid_loss": loss / n, "valid_acc": correct / n, "n": int(n)}


def epoch_parts(cfg, loader, device, batches=3):
    """Where the seconds of an epoch go with a loader: {"waiting for pictures": s, "training on them": s}.

    Scaled up from some batches after the first, which pays for start-up. Teacher and student are untrained here: what
    they know does not change their speed.
    """
    teacher = build_student(TEACHER_CONFIG).to(device, memory_format=torch.channels_last)
    loss_fn = DistillLoss(cfg, build_student(cfg), teacher, amp_dtype(device, cfg.amp))
    state = TrainState(loss_fn.to(device, memory_format=torch.channels_last), cfg, device)
    batch, seconds, n = itertools.chain.from_iterable(itertools.repeat(loader)), np.zeros(2), 0
    for number in range(batches + 1):
        start = _clock(device)
        images, labels, *_ = next(batch)
        ready = _clock(device)
        images = images.to(device, loss_fn.dtype or torch.float32, memory_format=torch.channels_last)
        optimizer_step(state, loss_fn(images, labels.to(device))[0], cfg.lr, cfg.grad_norm_max)
        if number:
            seconds, n = seconds + (ready - start, _clock(device) - ready), n + len(labels)
    return dict(zip(("waiting for pictures", "training on them"), seconds * len(loader.dataset) / n, strict=True))


def _clock(device):
    """Seconds, once the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def standard_error(accuracy, n):
    """sqrt(p (1 - p) / n): what an accuracy over n images is uncertain by."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def plus_minus(accuracy, n):
    """An accuracy over n images with its standard error: "0.8123 +- 0.0101"."""
    return f"{accuracy:.4f} +- {standard_error(accuracy, n):.4f}"


class RunDisplay:
    """One progress bar over all epochs of a fit, with live loss and accuracy, and one line with the measured pace."""

    def __init__(self, cfg, n_images, history):
        self.cfg, self.history, self.told = cfg, history, False
        self.bar = progress_bar(cfg.n_epochs * n_images, cfg.exp_name, len(history) * n_images)

    def on_step(self, n, sums):
        """Count a step of `n` images; where the bar redrew itself read the sums (loss * images, correct, images)."""
        if self.bar.update(n * rank_and_world()[1]):
            loss, correct, images = sums.tolist()
            self.show(len(self.history) + 1, loss / images, correct / images)
            if self.bar.format_dict["elapsed"] > 20 and not self.told:
                self.tell_pace(self.bar.format_dict["elapsed"])

    def show(self, epoch, loss, accuracy):
        """Write an epoch's loss and accuracy behind the bar."""
        self.bar.set_postfix_str(f"epoch {epoch}/{self.cfg.n_epochs}, loss {loss:.3f}, acc {accuracy:.3f}, "
                                 f"best valid {max(best_so_far(self.history)[0], 0):.3f}", refresh=False)

    def tell_pace(self, seconds):
        """Say once, after so many `seconds`: the pace, the end, and whether Kaggle's session is long enough for it."""
        rate, self.told = (self.bar.n - self.bar.initial) / seconds, True
        left = datetime.timedelta(seconds=round((self.bar.total - self.bar.n) / rate))
        rest = datetime.timedelta(hours=KAGGLE_HOURS, seconds=round(SESSION_START - time.time()))
        advice = ": choose LENGTH = 'lesson' or a smaller n_epochs, or go on in a second session" * (left > rest)
        session = f"; the Kaggle session has {rest} left{advice}" * on_kaggle()
        if left > datetime.timedelta(minutes=1):
            end = f"{datetime.datetime.now() + left:%H:%M}"
            say(f"{self.cfg.exp_name}: {rate:,.0f} images/s, {left} to go, till {end}{session}")


def time_is_up(cfg, history, device):
    """Whether another epoch would leave too little of the session to predict and to write every CSV.

    Kept free are the longest epoch so far once more (a prediction is shorter) and five minutes, or a tenth of a limit
    that is short. The session began when this module was imported. The first of several processes decides.
    """
    limit = 3600 * (cfg.time_limit_h or (KAGGLE_HOURS - 0.5 if on_kaggle() else math.inf))
    longest = max((row["seconds"] for row in history), default=min(300, limit / 20))
    up = torch.tensor(time.time() - SESSION_START + 2 * longest + min(300, limit / 10) > limit, device=device)
    _collective("broadcast", up, 0)
    return bool(up)


def fit(student, train_loader, valid_loader, cfg, teacher=None, folder=None, facts=None, fresh=False):
    """Train any net as `cfg` says and return the history: a list of rows, one an epoch.

    The loaders are BatchLoaders or the course's DataLoaders (valid_loader None: no validation, the last epoch's net is
    the best); the net is on its device. With a folder it writes student_best.ckpt (a plain fp32 state dict of the net
    with the best validation accuracy), last.ckpt, log.csv and config.json after every epoch, and goes on from last.ckpt
    where one is there, exactly as if it had not stopped (on CPUs; CUDA's sums are not the same from run to run).
    facts: what `data_facts` returns; it must be the same for going on. fresh=True starts again.
    The student ends with its best weights: also where the time limit, or a notebook's stop button, ends it early.
    Raises UserError where the folder's run has other settings or another process works there, where a loss is not
    finite, where memory does not suffice, or where it is handed evaluation images.
    """
    refuse_evaluation(train_loader)
    refuse_evaluation(valid_loader)
    if cfg.teacher_views and not isinstance(train_loader, BatchLoader):
        raise UserError("teacher_views wants a BatchLoader: a DataLoader's views cannot be replayed")
    device = next(student.parameters()).device
    loss_fn = DistillLoss(cfg, student, teacher, amp_dtype(device, cfg.amp))
    loss_fn.to(device, memory_format=torch.channels_last)
    with locked(folder), out_of_memory_named(cfg):
        state, facts = TrainState(loss_fn, cfg, device), run_facts(cfg, student, facts)
        if folder and fresh:
            for name in RUN_FILES:
                (Path(folder) / name).unlink(missing_ok=True)
        elif folder:
            go_on(state, cfg, folder, facts)
        _collective("barrier")  # all have read what the first process writes next
        if isinstance(train_loader, BatchLoader):
            say(describe_run(cfg, train_loader))
        replays = cfg.teacher_views and cfg.needs_teacher
        views = TeacherViews(cfg, train_loader, state_checksum(teacher), loss_fn.dtype) if replays else None
        save_run(state, folder, facts, last=not is_finished(state.history, cfg))
        try:
            train_epochs(state, train_loader, valid_loader, cfg, views, folder, facts)
        except KeyboardInterrupt:  # a notebook's stop button ends the training, not the cell
            if not in_notebook():
                raise
            say(f"{cfg.exp_name}: stopped after epoch {len(state.history)}, best student kept; run the cell to go on")
        student.load_state_dict(state.best)
    return state.history


def train_epochs(state, train_loader, valid_loader, cfg, views, folder, facts):
    """Train, validate and save epoch by epoch until the last one, until patience or the session's time runs out."""
    forward, device = state.loss_fn, next(state.loss_fn.parameters()).device
    if rank_and_world()[1] > 1:
        forward = nn.parallel.DistributedDataParallel(forward, [device] if device.type == "cuda" else None)
    display = RunDisplay(cfg, len(train_loader.dataset), state.history)
    with contextlib.closing(display.bar):
        while not is_finished(state.history, cfg):
            if time_is_up(cfg, state.history, device):
                say(f"{cfg.exp_name}: ends after epoch {len(state.history)} of {cfg.n_epochs}, for the session's time "
                    "is nearly up; a new session goes on from there (on Kaggle: attach this one's output as an input)")
                break
            start, epoch = time.perf_counter(), len(state.history)
            row = train_one_epoch(state, forward, train_loader, cfg, epoch, views, display.on_step)
            student = state.loss_fn.student
            for buffer in student.buffers():  # all processes validate the net with the first one's statistics
                _collective("broadcast", buffer, 0)
            row |= evaluate(student, valid_loader) if valid_loader else {"valid_acc": math.nan}
            if not valid_loader or best_so_far([*state.history, row])[1] == 0:
                state.best = _copy_of(student)
            state.history.append({"epoch": epoch + 1, **row, "seconds": time.perf_counter() - start})
            display.show(epoch + 1, row["train_loss"], row["train_acc"])
            save_run(state, folder, facts)


@contextlib.contextmanager
def out_of_memory_named(cfg):
    """Memory that does not suffice becomes a UserError that names the settings to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeErrors of many wordings
        if not re.search("MemoryError|out of memory|allocate memory|enough memory|ALLOC_FAILED|bad_alloc", repr(error)):
            raise
        traceback.clear_frames(error.__traceback__)  # a notebook would keep them, and with them the memory
        now, half = f"batch_size={cfg.batch_size}, image_size={cfg.image_size}", max(2, cfg.batch_size // 2)
        mend = f"set batch_size={half} or a smaller image_size, with --fresh"
        raise UserError(f"{cfg.exp_name}: out of memory with {now}: {mend}") from None


def _copy_of(model):
    """A copy of a model's state dict, contiguous and on the CPU."""
    return {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()}


def save_run(state, folder, facts, last=True):
    """Write a run's files, if it has a folder, from the first process. last.ckpt holds all that the others are made of.

    The last.ckpt of the save before is kept as previous.ckpt. last=False leaves last.ckpt as it is, if it is there.
    """
    if folder and rank_and_world()[0] == 0:
        folder = Path(folder)
        write_text(folder / "config.json", json.dumps(facts, indent=1) + "\n")
        save_checkpoint(state.best, folder / "student_best.ckpt")
        write_text(folder / "log.csv", pd.DataFrame(state.history, columns=HISTORY_COLUMNS).to_csv(index=False))
        if last or not (folder / RUN_FILES[0]).is_file():
            save_checkpoint({"facts": json.dumps(facts), **state.state_dict()}, folder / RUN_FILES[0], RUN_FILES[1])
    _collective("barrier")


def go_on(state, cfg, folder, facts):
    """Bring `state` to where the folder's run stopped, if there is one; on Kaggle to where an input's did, if later."""
    runs = [(resumable_run(cfg, folder, facts), folder), *attached_runs(cfg, folder, facts)]
    saved, place = max(runs, key=lambda run: len(run[0]["history"]) if run[0] else -1)
    if saved:
        try:
            state.load_state_dict(saved)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"{place} holds a run of another student or program ({why}); --fresh restarts it") from None
        n, finished = len(state.history), is_finished(state.history, cfg)
        say(f"{cfg.exp_name}: {'finished before, loaded' if finished else f'goes on after epoch {n}'} from {place}")


def attached_runs(cfg, folder, facts):
    """Yield (checkpoint, its folder) of each run of the same stage in a Kaggle input; nothing elsewhere.

    An earlier session's output, attached as an input, is found so. A run with other settings is ignored, and said.
    """
    name = Path(folder).relative_to(default_out()) if Path(folder).is_relative_to(default_out()) else Path(cfg.exp_name)
    for path in (p for p in attached_files(RUN_FILES[0]) if p.match(f"{name}/{RUN_FILES[0]}")):
        try:
            yield resumable_run(cfg, path.parent, facts), path.parent
        except UserError as error:
            say(f"ignored: {error}")


def run_facts(cfg, student, facts=None):
    """What must be the same for a run to go on: config, layers, number of processes, and what `data_facts` returns."""
    layers = fingerprint([(name, repr(module)) for name, module in student.named_modules()])
    return {"config": dataclasses.asdict(cfg), "layers": layers, "processes": rank_and_world()[1], **(facts or {})}


def resumable_run(cfg, folder, facts):
    """The checkpoint of the run in a folder, or None where there is none. Raises UserError where it cannot go on.

    A damaged last.ckpt is said, and the save before it is taken. A larger n_epochs is no other setting where neither
    the learning rate nor the loss depends on it (the run simply goes on), nor is another number of processes where
    the run is finished.
    """
    saved = read_run(folder)
    if saved is None:
        return None
    was, now = saved["facts"], json.loads(json.dumps(facts))
    if cfg.lr_schedule == cfg.loss_schedule == "constant" and was["config"].get("n_epochs", 0) < cfg.n_epochs:
        was["config"]["n_epochs"] = cfg.n_epochs
    if is_finished(saved["history"], cfg):
        now["processes"] = was.get("processes")
    was, now = ({**one.pop("config"), **one} for one in (was, now))
    other = [f"{key} {was.get(key)} (now {now.get(key)})" for key in {**was, **now}
             if was.get(key) != now.get(key) and key not in BEHAVIOUR_KEYS]
    if other:
        raise UserError(f"{folder} holds a run with other settings: {', '.join(other)}; --fresh starts it again")
    return saved


def read_run(folder):
    """What last.ckpt of a folder holds, or previous.ckpt where that is damaged or missing; None without either.

    "facts" are parsed. A damaged last.ckpt is put aside, so that the next save cannot keep it as its predecessor.
    Raises UserError where files are there and none is whole.
    """
    wrong = {}  # {damaged file: what is wrong with it}
    for path in filter(Path.is_file, (Path(folder) / name for name in RUN_FILES)):
        try:
            saved = load_file(path)
            saved["facts"] = json.loads(saved["facts"])
            dict(saved["facts"]["config"])
            best_so_far(saved["history"])  # reads each row, as all that follows does
        except (KeyError, TypeError, ValueError) as error:
            wrong[path] = str(error) if isinstance(error, UserError) else f"{path} is no run of this program"
            continue
        for damaged, why in wrong.items():
            say(f"WARNING: {why}; going on from {path.name}, the save before it")
            with contextlib.suppress(OSError):
                os.replace(damaged, damaged.with_name("damaged.ckpt"))
        return saved
    if wrong:
        raise UserError(f"{next(iter(wrong.values()))}; --fresh starts the run again")
    return None


@dataclass
class Run:
    """What a stage leaves: its settings, history, scores and files. `student()` loads its best net."""

    cfg: Config
    folder: Path
    origin: str
    history: pd.DataFrame  # a row an epoch, as in log.csv
    n_params: int
    macs: int
    valid_acc: float
    n_valid: int
    csv: Path

    @property
    def name(self):
        return self.cfg.exp_name

    def student(self, device="cpu"):
        """The best net of this run, in eval mode."""
        return load_student(self.folder / "student_best.ckpt", device)[0]


def load_student(path, device="cpu"):
    """(student in eval mode, its Config) from a student_best.ckpt with its config.json beside it, or UserError."""
    state = load_weights(path)
    try:
        cfg = Config(**json.loads(Path(path).with_name("config.json").read_text())["config"])
        student = build_student(cfg)
        student.load_state_dict(state)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not go with a config.json beside it ({str(error).splitlines()[0]})") from None
    return freeze(student).to(device), cfg


def build_loaders(cfg, data, device):
    """(training BatchLoader, validation BatchLoader) of a config: the views that it trains on and the exact one.

    Raises UserError where the data cannot be decoded or the cache not be written.
    """
    train = load_data(data, "training", "whole" if cfg.crop_scale else "eval", cfg.image_size)
    valid = load_data(data, "validation", "eval", cfg.image_size)
    return BatchLoader(train, cfg, device, train=True), BatchLoader(valid, cfg, device, batch_size=2 * cfg.batch_size)


def describe_run(cfg, loader):
    """One line at the start of a stage: device, precision, processes, and where the decoded images lie."""
    device, split, world = loader.device, loader.split, rank_and_world()[1]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    how = str(amp_dtype(device, cfg.amp) or torch.float32)[6:] + f", {world} processes" * (world > 1)
    where = f"{split.cache}{', moved onto the GPU' * loader.images.is_cuda}"
    return f"{cfg.exp_name}: {split.origin}; {name}, {how}; {len(split):,} images in {where}"


def stage_folder(cfg, data, out=None):
    """Where a stage keeps its files: <out>/<stage>, or <out>/demo/<stage> so that demo files never meet real ones."""
    out = Path(out or default_out())
    return (out / "demo" if data.is_demo else out) / cfg.exp_name


def data_facts(data, teacher=None):
    """What a run depends on besides its config, as JSON-able facts: the data, and the teacher's weights."""
    return {"origin": data.origin, "data": fingerprint(data.ids, data.labels),
            "teacher": state_checksum(teacher) if teacher is not None else None}


def checked_stage(cfg, data, teacher, out, fresh, device):
    """(student on `device`, folder, facts) of a stage: all that can be wrong is said before anything is decoded.

    Raises UserError for a student above the limit, a loss that does not fit the teacher, or a folder with a run of
    other settings (unless it is started again).
    """
    student, folder, facts = build_student(cfg).to(device), stage_folder(cfg, data, out), data_facts(data, teacher)
    check_budget(student)
    DistillLoss(cfg, student, teacher)
    if not fresh:
        resumable_run(cfg, folder, run_facts(cfg, student, facts))
    return student, folder, facts


def run_stage(cfg, data, teacher=None, out=None, fresh=False, device=None):
    """Train one stage, or load it where it is finished, and write <out>/<stage>.csv. Returns its Run.

    The parameter limit is checked before anything is decoded or trained. The teacher is checksummed before and after:
    RuntimeError where it was changed.
    """
    device, teacher = device or pick_device(), teacher if cfg.needs_teacher else None
    student, folder, facts = checked_stage(cfg, data, teacher, out, fresh, device)
    train, valid = build_loaders(cfg, data, device)
    history = fit(student, train, valid, cfg, teacher, folder, facts, fresh)
    if data_facts(data, teacher) != facts:
        raise RuntimeError(f"stage {cfg.exp_name} changed the teacher's weights or statistics")
    return finish_stage(student, valid, cfg, data, history, folder)


def finish_stage(student, valid_loader, cfg, data, history, folder):
    """Score a trained student, predict the evaluation images into <folder>.csv, and return the stage's Run."""
    score = evaluate(student, valid_loader)
    run = Run(cfg, Path(folder), data.origin, pd.DataFrame(history, columns=HISTORY_COLUMNS), check_budget(student),
              count_macs(student, cfg.image_size), score["valid_acc"], score["n"], Path(folder).with_suffix(".csv"))
    submit(student, data, cfg, run.csv, valid_loader.device)
    return run


def run(data, stages=tuple(STAGES), teacher=None, out=None, fresh=False, length="full", final=None, **overrides):
    """Run stages one after another and write the best by validation as submission.csv. Returns the list of Runs.

    teacher: a path (default: the data folder's file; on the demo set one is trained). A stage that needs a teacher
    where there is none is left out, and that is said. final: "csv" repeats the best stage on training and validation
    images (`final_fit`), "submit" also makes that submission.csv. What is wrong raises UserError before any work.
    """
    out, device = Path(out or default_out()), pick_device()
    configs = [get_config(stage, length, data.is_demo, **overrides) for stage in stages]
    if len({cfg.exp_name for cfg in configs}) < len(configs):
        raise UserError(f"run wants each stage once, under a name of its own: {', '.join(c.exp_name for c in configs)}")
    for cfg in configs:
        check_budget(build_student(cfg))
    check_writable(out)
    teacher = find_teacher(data, teacher, out, device, fresh) if any(cfg.needs_teacher for cfg in configs) else None
    possible = [cfg for cfg in configs if teacher is not None or not cfg.needs_teacher]
    if not possible:
        raise UserError(f"no stage could run without a teacher: put {TEACHER_FILE} into {data.root} or use --teacher")
    for cfg in configs:  # what is wrong with a later stage is said before the first one trains
        if cfg in possible:
            checked_stage(cfg, data, teacher if cfg.needs_teacher else None, out, fresh, device)
        else:
            say(f"{cfg.exp_name}: left out, for it needs a teacher: no {TEACHER_FILE} in {data.root} (see --teacher)")
    with locked(out):
        runs = []
        for cfg in possible:
            runs.append(run_stage(cfg, data, teacher, out, fresh, device))
            if not is_finished(runs[-1].history.to_dict("records"), cfg):
                say(f"{cfg.exp_name} is not finished: the stages after it, if any, are left for the next time")
                break
        write_best(runs, data, out)
        if final:
            final_fit(max(runs, key=lambda run: run.valid_acc), data, teacher, out, fresh, final == "submit")
    return runs


def final_fit(validated, data, teacher=None, out=None, fresh=False, submit_it=False):
    """Repeat a validated Run on training and validation images together; the path of its CSV, None if not finished.

    Every choice is the validated stage's, its best epoch included: there it stops. No images are left to validate on,
    so it has no validation score. It replaces submission.csv only with submit_it=True.
    """
    if validated.history.empty:
        say(f"{validated.name}: no final fit, for it has no epoch yet")
        return None
    best_epoch = int(validated.history["valid_acc"].argmax()) + 1
    cfg = replace(validated.cfg, exp_name=f"{validated.name}_final", patience=best_epoch)
    device, teacher = pick_device(), teacher if cfg.needs_teacher else None
    parts = {key: getattr(data, key) for key in ("files", "labels", "ids")}  # their training images: both splits
    everything = replace(data, **{k: v | {"training": v["training"] + v["validation"]} for k, v in parts.items()})
    student, folder, facts = checked_stage(cfg, everything, teacher, out, True, device)
    facts["final"] = True
    try:
        resumable_run(cfg, folder, run_facts(cfg, student, facts))
    except UserError as error:  # the validated stage has moved on since
        say(f"{cfg.exp_name}: started again, for {error}")
        fresh = True
    train = build_loaders(cfg, everything, device)[0]
    if not is_finished(fit(student, train, None, cfg, teacher, folder, facts, fresh), cfg):
        say(f"{cfg.exp_name}: not finished, so no CSV is written; the same call goes on")
        return None
    path = folder.with_suffix(".csv")
    submit(student, data, cfg, path, device)
    say(f"{cfg.exp_name}: repeats {validated.name} (validated {plus_minus(validated.valid_acc, validated.n_valid)}) "
        f"for {best_epoch} epochs on {len(train.split):,} images; it has no validation score of its own")
    if submit_it:
        copy_submission(path, data, out, f"the final fit of {validated.name}, as asked")
    return path


def train_teacher(data, out=None, cfg=None, fresh=False):
    """Train a torchvision ResNet from scratch on the training images and return the path of its checkpoint.

    The homework allows a teacher of one's own; it is not bound by the parameter limit and never submitted. It is also
    the way on for who has a public copy of Food-11, which holds no teacher file. cfg: its settings, by default
    TEACHER_CONFIG. Raises UserError where the session's time ends it too early: call it again to go on.
    """
    settings = (DEMO_TEACHER_SETTINGS if data.is_demo else {}) | ({"n_epochs": 1} if is_fast() else {})
    cfg = cfg or replace(TEACHER_CONFIG, **settings)
    device, folder = pick_device(), stage_folder(cfg, data, out)
    train, valid = build_loaders(cfg, data, device)
    history = fit(build_student(cfg).to(device), train, valid, cfg, None, folder, data_facts(data), fresh)
    if not is_finished(history, cfg):
        raise UserError("the teacher is not finished, and a half-trained one must not teach: run again to go on")
    return folder / "student_best.ckpt"


def find_teacher(data, path=None, out=None, device="cpu", fresh=False):
    """The frozen teacher: of `path`, else of the data folder, else (demo set) trained here; None without one.

    Raises UserError where a file is no teacher.
    """
    path = path or data.teacher
    if path is None and data.is_demo:
        path = train_teacher(data, out, fresh=fresh)
    return load_teacher(path, device) if path else None


# =====================================================================================================================
# 7  Submission
# =====================================================================================================================


TTA_SCALES = (1.0, 0.75)


def centre_crops(aspects, scale):
    """Matrices (N, 1, 2, 3) to the central square of `scale` times a picture's shorter side, in the `whole` view."""
    wide, high = (scale * (aspects ** sign).clamp(max=1) for sign in (-1, 1))
    return _matrix(wide, 0, 0, high)[:, None, :2].float()


def tta_probabilities(student, exact, whole, scales=TTA_SCALES):
    """Mean class probabilities (N, 11) over the exact evaluation view, other scales of it, and all their mirror images.

    exact and whole: BatchLoaders of the `eval` and of the `whole` view of one split, in equal batches. Nothing is
    drawn.
    """
    crops, parts = [centre_crops(whole.split.aspects, scale).to(whole.device) for scale in scales], []
    with evaluation_mode(student):
        for batch, full in zip(exact, whole, strict=True):
            cut = [warp(full.images, crop[full.rows], whole.cfg.image_size) for crop in crops]
            views = [view for images in (batch.images, *cut) for view in (images, images.flip(3))]
            parts.append(sum(F.softmax(student(view).float(), 1) for view in views).cpu() / len(views))
    return torch.cat(parts)


def predict(student, split, cfg, device="cpu", whole=None):
    """The class (N,) int64 of every image of a Split in the `eval` view, in its order.

    whole: the same split in the `whole` view, for test-time augmentation.
    """
    def loader(view):
        return BatchLoader(view, cfg, device, batch_size=2 * cfg.batch_size, shared=False)

    student, exact = student.to(device), loader(split)
    if whole:
        return tta_probabilities(student, exact, loader(whole)).argmax(1)
    return predict_logits(student, exact)[0].argmax(1)


def write_submission(path, ids, classes):
    """Write the CSV Id,Category, a row an image in the given order, whole or not at all."""
    write_text(path, pd.DataFrame({"Id": list(ids), "Category": [int(k) for k in classes]}).to_csv(index=False))


def validate_submission(path, ids):
    """Return the number of rows of a submission CSV; UserError names the first row that is wrong, and why.

    ids: the wanted ids in their order, or how many rows ("0000", "0001", ...).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no text in UTF-8 with commas ({error})") from None
    if not rows or rows[0] != ["Id", "Category"]:
        raise UserError(f"{path}, row 1: the header is {','.join(rows[0]) if rows else 'missing'}, not Id,Category")
    n = ids if isinstance(ids, int) else len(ids)
    if len(rows) - 1 != n:
        raise UserError(f"{path}: {len(rows) - 1} rows, wanted are {n}")
    ids = [f"{i:04d}" for i in range(n)] if isinstance(ids, int) else ids
    for number, (row, wanted) in enumerate(zip(rows[1:], ids, strict=True), 2):
        if len(row) != 2 or row[0] != wanted or not re.fullmatch("[0-9]|10", row[1]):
            raise UserError(f"{path}, row {number} is {','.join(row)!r}: wanted are the id {wanted!r}, a comma and a "
                            f"class from 0 to {NUM_CLASSES - 1}")
    return n


def submit(student, data, cfg, path, device, tta=False):
    """Predict the evaluation images, write the CSV and validate it. Where labels are known, say the accuracy."""
    split = load_data(data, "evaluation", "eval", cfg.image_size)
    whole = load_data(data, "evaluation", "whole", cfg.image_size) if tta else None
    classes = predict(student, split, cfg, device, whole)
    if rank_and_world()[0] == 0:
        write_submission(path, split.ids, classes)
        validate_submission(path, split.ids)
    if (split.labels >= 0).all():
        accuracy = (classes == split.labels).double().mean().item()
        say(f"accuracy on {len(classes)} evaluation images of {data.origin}: {plus_minus(accuracy, len(classes))}")


def write_best(runs, data, out=None):
    """Copy the CSV of the best run by validation accuracy to submission.csv and return its path.

    For the demo set it is submission_demo.csv. A public copy of Food-11 gets none, for its ids are not the homework's:
    None is returned and that is said.
    """
    best = max(runs, key=lambda run: run.valid_acc)
    return copy_submission(best.csv, data, out, f"{best.name} has the best validation accuracy, "
                           f"{plus_minus(best.valid_acc, best.n_valid)} ({best.n_valid} images, {data.origin})")


def copy_submission(csv_path, data, out, why):
    """Copy a CSV to submission.csv (submission_demo.csv for the demo set), say why, and return the path or None."""
    if data.class_folders:
        say("no submission.csv: the evaluation images of a public copy of Food-11 are not the homework's")
        return None
    path = Path(out or default_out()) / ("submission_demo.csv" if data.is_demo else "submission.csv")
    if rank_and_world()[0] == 0:
        write_text(path, csv_path.read_text())
    say(f"{path} is {csv_path}: {why}")
    return path


def download_link(path):
    """A link for the notebook, from which the browser downloads a file."""
    from IPython.display import HTML
    return HTML(f'<a href="{os.path.relpath(path)}" download>Download {os.path.relpath(path)}</a>')


# =====================================================================================================================
# 8  Pictures
# =====================================================================================================================

# Okabe and Ito's palette, which colour-blind readers and grey print keep apart; a stage keeps its colour and marker.
STAGE_STYLES = {"simple": ("#E69F00", "o"), "medium": ("#56B4E9", "s"), "strong": ("#009E73", "^"),
                "boss": ("#CC79A7", "D"), "beyond": ("#D55E00", "v"), "teacher": ("#000000", "*")}


def stage_style(name):
    """{"color", "marker"} of a stage, grey for an unknown one."""
    return dict(zip(("color", "marker"), STAGE_STYLES.get(name, ("#777777", "x")), strict=True))


class _Figure(plt.Figure):
    """A Figure that a notebook shows with its title as the alt text, for who cannot see it."""

    def _repr_html_(self):
        buffer, title = io.BytesIO(), html.escape(" ".join(self.get_suptitle().split()))
        self.savefig(buffer, format="webp", pil_kwargs={"quality": 85})  # a third of a PNG, which counts in a notebook
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<img alt="{title}" style="max-width:100%" src="data:image/webp;base64,{data}">'

    def _ipython_display_(self):
        """Called by IPython: as HTML alone, for a picture output has no alt text when a notebook is rendered."""
        from IPython.display import HTML, display
        display(HTML(self._repr_html_()))


def _figure(title, rows=1, columns=1, width=8.0, height=3.2):
    """(Figure, (rows, columns) array of Axes); closed in pyplot, so that a notebook shows it once, as a value."""
    figure = plt.figure(figsize=(width, height), dpi=80, layout="constrained", FigureClass=_Figure)
    plt.close(figure)
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _picture(axes, image, title=""):
    """Draw a (3, H, W) uint8 or normalised float image, or a map (H, W) of any numbers."""
    if image.ndim == 3 and image.is_floating_point():
        mean, std = _mean_and_std(torch.device("cpu"))
        image = (image.cpu() * std + mean).clamp(0, 255).byte()
    axes.imshow(image.movedim(0, -1).numpy() if image.ndim == 3 else image.numpy())
    axes.set_title(title, fontsize=8)
    axes.axis("off")


def _grid(title, cells, rows, columns, width, height):
    """A figure of pictures, row by row: cells are (image, title); places without a cell stay empty."""
    figure, axes = _figure(title, rows, columns, width, height)
    for ax, cell in itertools.zip_longest(axes.flat, cells, fillvalue=()):
        ax.axis("off")
        if cell:
            _picture(ax, *cell)
    return figure


def plot_samples(split, per_class=2):
    """A few images of each class, a column a class."""
    columns = [(split.labels == k).nonzero()[:per_class, 0].tolist() for k in range(NUM_CLASSES)]
    cells = [(split.images[rows[i]], CLASS_NAMES[k] * (i == 0)) if i < len(rows) else ()
             for i in range(per_class) for k, rows in enumerate(columns)]
    title = f"{split.name} images by class: {split.origin}"
    return _grid(title, cells, per_class, NUM_CLASSES, 11, 1 + per_class)


def plot_views(loader, n_images=3, n_views=6):
    """What training sees: each row one picture in several epochs of a training BatchLoader."""
    rows, columns = torch.linspace(0, len(loader.split) - 1, n_images).long(), []
    for epoch in range(n_views):
        loader.set_epoch(epoch)
        columns.append([(image, f"epoch {epoch + 1}" * (i == 0)) for i, image in enumerate(loader.views_of(rows))])
    title, cells = f"the training views of {loader.cfg.exp_name}: {loader.split.origin}", zip(*columns, strict=True)
    return _grid(title, itertools.chain(*cells), n_images, n_views, 9, 1.5 * n_images)


def plot_epoch_parts(parts, origin):
    """Stacked bars of where an epoch's seconds go: {loader's name: what `epoch_parts` returns}."""
    figure, ((ax,),) = _figure(f"seconds of an epoch under each loader: {origin}", height=1.2 + 0.5 * len(parts))
    pd.DataFrame(parts).T.plot.barh(ax=ax, stacked=True, color=["#E69F00", "#56B4E9"], edgecolor="black", width=0.7)
    ax.bar_label(ax.containers[-1], [f"{sum(p.values()):,.1f} s" for p in parts.values()], padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=2, frameon=False, fontsize=8)
    return figure


def plot_lines(frame, title, ylabel, **axes):
    """Each column of a DataFrame as a line over its index; what follows is set on the axes (xscale="log", ...)."""
    figure, ((ax,),) = _figure(title, width=7)
    frame.plot(ax=ax, style=["o-", "s-", "D-", "^-", "v-"], markersize=5)
    ax.set(ylabel=ylabel, **axes)
    ax.set_xticks(frame.index, [f"{x:g}" for x in frame.index], minor=False)
    ax.legend(fontsize=8)
    return figure


def attention_map(model, images, layer):
    """How active a layer is at each place: mean square over its channels, (B, H, W) (Zagoruyko, Komodakis 2017)."""
    return features_of(model, [layer], images)[layer].float().square().mean(1).cpu()


def plot_attention(images, nets, layer, origin):
    """Pictures (B, 3, S, S), and below them where a layer of each net looks: {name: net}, the teacher first.

    The number is the correlation of a map with the first net's.
    """
    maps = {name: attention_map(net, images, layer) for name, net in nets.items()}
    side = min(m.shape[-1] for m in maps.values())
    maps = {name: F.adaptive_avg_pool2d(m, side) for name, m in maps.items()}
    first, cells = next(iter(maps.values())), [(image, "") for image in images]
    for name, own in maps.items():
        alike = [torch.corrcoef(torch.stack([a.ravel(), b.ravel()]))[0, 1] for a, b in zip(own, first, strict=True)]
        cells += [(m, name if own is first else f"{name}, {r:+.2f}") for m, r in zip(own, alike, strict=True)]
    return _grid(f"where {layer} is active: {origin}", cells, len(nets) + 1, len(images), 9, 1.6 * (len(nets) + 1))


def plot_soft_labels(logits, image, temperatures, origin):
    """One picture and what the teacher's logits (11,) become at several temperatures."""
    figure, axes = _figure(f"the teacher's soft labels: {origin}", 1, len(temperatures) + 1, 11, 3.4)
    _picture(axes[0, 0], image)
    for i, (t, ax) in enumerate(zip(temperatures, axes[0, 1:], strict=True)):
        ax.barh(CLASS_NAMES, soft_labels(logits, t).tolist(), color=stage_style("teacher")["color"])
        ax.set(xlim=(0, 1), title=f"T = {t:g}")
        ax.invert_yaxis()
        ax.tick_params(labelsize=8, labelleft=i == 0)
    return figure


def plot_history(runs, published=None):
    """Training loss and validation accuracy by epoch of several Runs; published {name: score} become dashed lines."""
    figure, axes = _figure(f"learning curves of {', '.join(run.name for run in runs)}: {runs[0].origin}", 1, 2, 10, 3.6)
    for run in runs:
        style = stage_style(run.name) | {"markersize": 4, "linewidth": 1.4}
        for ax, key in zip(axes[0], ("train_loss", "valid_acc"), strict=True):
            ax.plot(run.history["epoch"], run.history[key], label=run.name, **style)
    for name, score in (published or {}).items():
        axes[0, 1].axhline(score, ls="--", lw=1, color=stage_style(name)["color"], label=f"{name}, published")
    axes[0, 0].set(xlabel="epoch", ylabel="training loss (each stage its own)", yscale="log")
    axes[0, 1].set(xlabel="epoch", ylabel="validation accuracy")
    axes[0, 1].legend(fontsize=8)
    return figure


def confusion_matrix(labels, classes):
    """(11, 11) int64: row = true class, column = predicted class."""
    return torch.bincount(labels * NUM_CLASSES + classes, minlength=NUM_CLASSES**2).view(NUM_CLASSES, NUM_CLASSES)


def plot_confusion(labels, classes, origin):
    """The confusion matrix as shares of each true class, with counts."""
    counts = confusion_matrix(labels, classes)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure, ((ax,),) = _figure(f"confusion matrix, validation: {origin}", width=7, height=6)
    ax.imshow(share.numpy(), cmap="cividis", vmin=0, vmax=1)
    for i, j in counts.nonzero().tolist():
        ax.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=8,
                color="black" if share[i, j] > 0.5 else "white")
    ax.set_xticks(range(NUM_CLASSES), CLASS_NAMES, rotation=45, ha="right", fontsize=8)
    ax.set_yticks(range(NUM_CLASSES), CLASS_NAMES, fontsize=8)
    ax.set(xlabel="predicted", ylabel="true")
    return figure


def plot_calibration(labels, logits, origin, bins=10):
    """Accuracy against confidence of several nets, {name: logits (N,11)}; on the diagonal a net knows how sure it is.

    Bins of less than five images are not drawn. ECE is the mean distance from the diagonal, weighted by the images of
    each bin (Guo et al. 2017).
    """
    figure, ((ax,),) = _figure(f"calibration, validation: {origin}", width=6, height=4)
    ax.plot([0, 1], [0, 1], color="#BBBBBB", ls="--")
    for name, z in logits.items():
        confidence, classes = soft_labels(z, 1.0).max(1)
        rows = pd.DataFrame({"confidence": confidence.double(), "right": (classes == labels).double()})
        means = rows.groupby((rows["confidence"] * bins).clip(upper=bins - 1).astype(int)).agg(["mean", "size"])
        x, y, n = means["confidence", "mean"], means["right", "mean"], means["right", "size"]
        ax.plot(x[n >= 5], y[n >= 5], label=f"{name}: ECE {(abs(x - y) * n).sum() / n.sum():.3f}", **stage_style(name))
    ax.set(xlabel="confidence (largest probability)", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    ax.legend(fontsize=8)
    return figure


def plot_mistakes(split, classes, right=None, n=12):
    """A grid of images that were classified wrongly, with the true and the predicted class.

    right: classes of another net, (N,); shown are the mistakes of the one that the other gets right.
    """
    mistaken = (classes != split.labels) & (right == split.labels if right is not None else True)
    wrong = mistaken.nonzero()[:, 0].tolist()
    rows = max(1, math.ceil(min(n, len(wrong)) / 6))
    what = "mistakes" if right is None else "mistakes of the student that the teacher gets right"
    title = f"{len(wrong)} {what}, {len(split)} {split.name} images (first {min(n, len(wrong))}): {split.origin}"
    cells = [(split.images[i], f"{CLASS_NAMES[split.labels[i]]}\nnot {CLASS_NAMES[classes[i]]}") for i in wrong[:n]]
    return _grid(title, cells, rows, 6, 10, 2 * rows)


# --- tables, and the course's report questions ------------------------------------------------------------------------

def stage_table(runs):
    """A DataFrame with a row a stage: parameters, multiply-adds, validation accuracy +- s.e., epochs, seconds."""
    return pd.DataFrame([{
        "stage": run.name, "parameters": run.n_params, "multiply-adds (M)": round(run.macs / 1e6, 1),
        "accuracy": round(run.valid_acc, 4), "+- s.e.": round(standard_error(run.valid_acc, run.n_valid), 4),
        "epochs": len(run.history), "seconds": round(run.history["seconds"].sum()),
    } for run in runs]).set_index("stage")


def accuracy_table(labels, predictions, caption):
    """A DataFrame of accuracy +- standard error, a row for each {name: predicted classes (N,)}."""
    rows = {name: (classes == labels).double().mean().item() for name, classes in predictions.items()}
    return pd.DataFrame([{caption: name, "accuracy": round(a, 4), "+- s.e.": round(standard_error(a, len(labels)), 4)}
                         for name, a in rows.items()]).set_index(caption)


def dwpw_arithmetic(in_channels=128, out_channels=256, kernel_size=3, size=14):
    """A DataFrame: weights and multiply-adds of a full convolution against depthwise + pointwise."""
    depthwise, pointwise = in_channels * kernel_size**2, in_channels * out_channels
    frame = pd.DataFrame({"weights": {"full convolution": pointwise * kernel_size**2, "depthwise": depthwise,
                                      "pointwise": pointwise, "depthwise + pointwise": depthwise + pointwise}})
    frame["multiply-adds (M)"] = (frame["weights"] * size**2 / 1e6).round(2)
    frame["share of full"] = (frame["weights"] / frame["weights"].iloc[0]).round(3)
    return frame


def gradient_sizes(student_logits, labels, teacher_logits, temperatures):
    """How hard each term of the loss pulls at a picture's student logits: a DataFrame, a row a temperature.

    The mean norm over the batch of the gradient of KL alone, of T^2 KL and of CE. Logits (B, 11), labels (B,).
    """
    def size(alpha, temperature):
        logits = student_logits.detach().float().requires_grad_()
        loss_fn_kd(logits, labels, teacher_logits, alpha, temperature).backward()
        return logits.grad.norm(dim=1).sum().item()

    rows = [(size(1.0, t) / t**2, size(1.0, t), size(0.0, t)) for t in temperatures]
    return pd.DataFrame(rows, index=pd.Index(temperatures, name="temperature"), columns=["KL", "T^2 KL", "CE"])


def temperature_table(cfg, temperatures, data, teacher, device, n_epochs=10):
    """A DataFrame: validation accuracy +- standard error of short trainings that differ in their temperature alone.

    Nothing is written.
    """
    (train, valid), classes = build_loaders(cfg, data, device), {}
    for temperature in temperatures:
        short, net = replace(cfg, temperature=temperature, n_epochs=min(n_epochs, cfg.n_epochs)), build_student(cfg)
        fit(net.to(device), train, valid, short, teacher)
        logits, labels = predict_logits(net, valid)
        classes[temperature] = logits.argmax(1)
    return accuracy_table(labels, classes, "temperature")


def prune_unstructured(model, share):
    """A copy in which the smallest weights of every convolution are zero: `share` of them, by L1 (torch's own)."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # which torch's pruning wants
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", share)
            prune.remove(module, "weight")
    return model.to(memory_format=torch.channels_last)


def prune_structured(model, share):
    """A copy of a ResNet-18 or -34 with thinner blocks: `share` of each block's inner channels are gone, by L1 norm.

    Those between its two convolutions, for no shortcut passes there, so that the tensors really become smaller.
    """
    model = copy.deepcopy(model)
    for block in model.modules():
        if isinstance(block, torchvision.models.resnet.BasicBlock):
            norms = block.conv1.weight.abs().sum((1, 2, 3))
            keep = norms.topk(max(1, round((1 - share) * len(norms)))).indices
            for tensor in (block.conv1.weight, *block.bn1.parameters(), block.bn1.running_mean, block.bn1.running_var):
                tensor.data = tensor.data[keep]
            block.conv2.weight.data = block.conv2.weight.data[:, keep]
    return model.to(memory_format=torch.channels_last)


def pruning_table(model, loader, shares=(0.0, 0.2, 0.4, 0.6, 0.8)):
    """A DataFrame: accuracy on a loader, weights that are not zero, and milliseconds an image, by kind and share."""
    rows = []
    evaluate(model, loader)  # the first pass is slower
    for share, prune_it in itertools.product(shares, (prune_unstructured, prune_structured)):
        net = prune_it(model, share)
        start = time.perf_counter()
        score = evaluate(net, loader)
        milliseconds = 1000 * (time.perf_counter() - start) / score["n"]
        weights = sum(int((p != 0).sum()) for p in net.parameters()) / 1e6
        rows.append((share, prune_it.__name__.removeprefix("prune_"), score["valid_acc"], weights, milliseconds))
    columns = ["pruned share", "pruning", "accuracy", "weights (M)", "ms an image"]
    return pd.DataFrame(rows, columns=columns).pivot(index=columns[0], columns=columns[1]).round(3)


# =====================================================================================================================
# 9  Command line
# =====================================================================================================================

NOTEBOOK = "hw13_distill.ipynb"
KAGGLE_NOTEBOOK = "submission/hw13_distill_kaggle.ipynb"


def export_notebook(folder=None):
    """Write the one-file notebook for Kaggle, the notebook with this module in its first cell; returns its path.

    folder: where the notebook lies, default beside this module. Outputs are left out.
    """
    import nbformat
    folder = Path(folder or Path(__file__).parent)
    notebook = nbformat.read(folder / NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    text = "%%writefile helpers.py\n" + Path(__file__).read_text(encoding="utf-8")
    hidden = {"jupyter": {"source_hidden": True}}
    notebook.cells.insert(1, nbformat.v4.new_code_cell(text, id="helpers", metadata=hidden))
    write_text(folder / KAGGLE_NOTEBOOK, nbformat.writes(notebook) + "\n")
    return folder / KAGGLE_NOTEBOOK


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors: one line, no usage text."""

    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists the arguments)")


def build_parser():
    """The command line's parser."""
    parser = _Parser(prog="helpers.py", description="Distil a ResNet-18 into at most 60,000 parameters on Food-11.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(name, function, help, **more):
        parser = commands.add_parser(name, help=help, description=help, **more)
        parser.set_defaults(function=function)
        return parser.add_argument

    fields = ((f.name, f.metadata["meaning"], f.metadata["choices"] or "") for f in dataclasses.fields(Config))
    keys = "\n".join(f"  {name:<16}{meaning} {choices}" for name, meaning, choices in fields)
    add = command("run", _run_command, "train stages and write their CSVs", epilog=f"the keys of --set:\n{keys}",
                  formatter_class=argparse.RawDescriptionHelpFormatter)
    add("--data", metavar="DIR", help="folder with training/, validation/, evaluation/")
    add("--demo", action="store_true", help="use the drawn demo set")
    add("--out", metavar="DIR", help="results (default: submission/, on Kaggle its working folder)")
    add("--stages", default=",".join(STAGES), help="comma-separated (default: %(default)s)")
    add("--teacher", metavar="FILE", help=f"teacher checkpoint (default: {TEACHER_FILE} of the data)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a config key, listed below")
    add("--length", default="full", choices=list(LENGTHS), help="share of each stage's epochs")
    add("--final", choices=["csv", "submit"], help="repeat the best stage on all labelled images; or also submit that")
    add("--fresh", action="store_true", help="start again where a run is there already")
    for name, function, help in (("evaluate", _evaluate_command, "validation accuracy of a checkpoint"),
                                 ("predict", _predict_command, "write the CSV of a checkpoint")):
        add = command(name, function, help)
        add("--data", metavar="DIR", required=True)
        add("--checkpoint", metavar="FILE", required=True)
    add("--out", metavar="CSV", required=True)
    add("--tta", action="store_true", help="average several views of each image")
    add = command("validate", lambda args: print(f"{args.csv}: {validate_submission(args.csv, args.rows)} rows, valid"),
                  "check a submission CSV")
    add("csv", metavar="CSV")
    add("--rows", type=int, required=True, metavar="N")
    command("export", lambda args: print(export_notebook()), "write the one-file notebook for Kaggle")
    return parser


def _run_command(args):
    settings = dict(parse_setting(text) for text in args.set)
    stages = [stage.strip() for stage in args.stages.split(",")]
    for stage in stages:
        get_config(stage, args.length, **settings)
    if args.demo and args.data:
        raise UserError("--demo draws its own data: leave out --data")
    with data_parallel():
        data = make_demo_data() if args.demo else find_data(args.data)
        if data is None:
            raise UserError("no data found: name its folder with --data DIR, or use --demo for the drawn demo set")
        say(f"{data.describe()}\n{data.counts().to_string()}")
        runs = run(data, stages, args.teacher, args.out, args.fresh, args.length, args.final, **settings)
        say(stage_table(runs).to_string())


def _evaluate_command(args):
    data, device = read_folder(args.data), pick_device()
    student, cfg = load_student(args.checkpoint, device)
    if json.loads(Path(args.checkpoint).with_name("config.json").read_text()).get("final"):
        raise UserError(f"{args.checkpoint} was trained on the validation images too: it has no validation accuracy")
    valid = BatchLoader(load_data(data, "validation", "eval", cfg.image_size), cfg, device, batch_size=256)
    score = evaluate(student, valid)
    print(f"{args.checkpoint}: stage {cfg.exp_name}, {cfg.image_size} px, {data.origin}")
    print(f"validation accuracy {plus_minus(score['valid_acc'], score['n'])} ({score['n']} images)")


def _predict_command(args):
    if not Path(args.out).name or Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a folder: name a CSV file")
    check_writable(Path(args.out).parent)
    data, device = read_folder(args.data), pick_device()
    student, cfg = load_student(args.checkpoint, device)
    check_budget(student)
    submit(student, data, cfg, args.out, device, args.tta)
    print(f"{args.out}: {len(data.ids['evaluation'])} rows, {data.origin}")


@contextlib.contextmanager
def data_parallel():
    """Join torchrun's process group for the block (NCCL on GPUs, gloo on CPUs); without torchrun do nothing."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        backend, patience = "nccl" if pick_device().type == "cuda" else "gloo", datetime.timedelta(hours=12)
        torch.distributed.init_process_group(backend, timeout=patience)  # others wait while one decodes
    yield
    # Not in a finally: a process that failed must end at once, so that torchrun ends the others.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(argv=None):
    """The command line. Returns the exit code: 0, 2 for a mistake of the user, 130 when stopped, with one line each."""
    try:
        args = build_parser().parse_args(argv)
        args.function(args)
        return 0
    except (UserError, OSError, UnicodeError, MemoryError, torch.OutOfMemoryError) as error:
        text = str(error) or "out of memory: choose a smaller batch_size or image_size"  # MemoryError says nothing
        print(f"helpers.py: {' '.join(text.split())}", file=sys.stderr, flush=True)
        if rank_and_world()[1] > 1:
            os._exit(2)  # at once, without waiting for the other processes: torchrun ends them
        return 2
    except KeyboardInterrupt:
        print("helpers.py: stopped; the same command goes on after the last whole epoch", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
