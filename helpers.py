"""Distil a ResNet-18 into a student of at most 60,000 parameters on Food-11.

This file holds all code of hw13_distill.ipynb, in the order in which the notebook teaches it:

 0  Setup              constants, errors, places
 1  Configuration      Config, STAGES, get_config, diff_configs
 2  Data               find_data, load_data, the course's FoodDataset, the drawn demo set
 3  Loader             sample_affine, warp, BatchLoader
 4  Students           dwpw_conv, build_student, get_student_model, check_budget, layer_table
 5  Teacher            load_teacher, soft_labels, the teacher's stored logits
 6  Losses             loss_fn_kd, alignment, DistillLoss; the checks of a learner's own answers
 7  Training           train_one_epoch, evaluate, fit
 8  Runs               RunFolder, prepare_stage, run_stage, run, final_fit, train_teacher
 9  Submission         predict, write_submission, validate_submission
10  Pictures           functions that take data and return a matplotlib Figure
11  Report questions   tables: arithmetic, gradients, temperature, pruning
12  Machinery          devices, precision, processes, progress bar, whole files, locks
13  Exercises          a learner's answers; the exercises edition of the notebook
14  Command line       python helpers.py run | evaluate | predict | validate | export | train
"""

import argparse
import ast
import base64
import codecs
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import dis
import errno
import functools
import gc
import getpass
import hashlib
import html
import inspect
import io
import itertools
import json
import math
import numbers
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import types
import unicodedata
import urllib.parse
import warnings
import zipfile
from collections import Counter, OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import filelock
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import ExifTags, Image, ImageColor, ImageDraw, ImageFile
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset  # noqa: F401  (the notebook uses h.DataLoader)
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm import tqdm

# ==================================================================================================
# 0  Setup
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
HOMEWORK_COUNTS = {"training": 9993, "validation": 4432, "evaluation": 2218}
# What the re-built solution scored on Kaggle.
PUBLISHED_SCORES = {"simple": 0.45807, "medium": 0.75202, "boss": 0.82687}


class UserError(ValueError):
    """A mistake that the user can mend, in one sentence. The command line exits with 2."""

    def __init__(self, text):
        super().__init__(readable(text))


LONGEST_WORD = 200  # characters that a message quotes of a file's content or name without a blank


def readable(text):
    """A message without invisible characters, and with the middle of endless words left out.

    Control characters, bidirectional marks and lone surrogates are written as escapes; a line end
    stays.
    """
    visible = []
    for character in str(text):
        if character.isprintable() or character == "\n":
            visible.append(character)
        else:
            # ascii() puts quotes around the escape, which go.
            visible.append(ascii(character)[1:-1])
    text = "".join(visible)
    # \S{201,}: text without a blank, as base64, which would fill the screen.
    return re.sub(rf"\S{{{LONGEST_WORD + 1},}}", shortened, text)


def shortened(match):
    """The two ends of a matched word."""
    word = match[0]
    # 98 + 3 + 98 characters: short enough to pass `readable` once more unchanged.
    half = LONGEST_WORD // 2 - 2
    return f"{word[:half]}...{word[-half:]}"


def is_fast():
    """True under HW13_FAST=1, the shortest run, for tests."""
    return is_switched_on("HW13_FAST")


def is_switched_on(variable):
    """Whether an environment variable is set, and not to 0."""
    return os.environ.get(variable, "") not in ("", "0")


def kaggle_root():
    """/kaggle, or the folder that HW13_KAGGLE names in its place."""
    return Path(os.environ.get("HW13_KAGGLE") or "/kaggle")


def on_kaggle():
    """Whether this is a Kaggle session (the working folder is there)."""
    return (kaggle_root() / "working").is_dir()


def default_out():
    """Where results go: /kaggle/working on Kaggle, submission/ elsewhere."""
    if on_kaggle():
        return kaggle_root() / "working"
    return Path("submission")


def user_path(text):
    """A path as its user wrote it, with ~ for the home folder, which not every shell puts in.

    ~name of an unknown user stays as it is; Path.expanduser would raise a RuntimeError.
    """
    return os.path.expanduser(text)


def results_folder(out=None):
    """The Path of a results folder as its user wrote it (~ is the home folder), or the default."""
    return Path(user_path(out or default_out()))


@contextlib.contextmanager
def illustration():
    """What is only looked at never stops the way to the CSV: its error is said, and a run goes on.

    `with illustration():` stands around the lines of a cell, `@illustration()` above a function,
    which then returns None. A stop by hand goes through, and so does every error under
    HW13_STRICT=1, which tests set.
    """
    try:
        yield
    except Exception as error:
        if is_switched_on("HW13_STRICT"):
            raise
        say(f"Not shown, and the run goes on: {reason(error)}")


def reason(error):
    """The kind of an error and the first line of its text, at most 200 characters.

    A UserError's text alone: it is a sentence.
    """
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    if isinstance(error, UserError):
        text = lines[0]
    # The error of a DataLoader's worker quotes a traceback, which ends in the worker's own error.
    if any("Traceback" in line for line in lines):
        text = lines[-1]
    return textwrap.shorten(text, 200, placeholder=" ...")


@illustration()
def show_source(function):
    """A function's source, as it runs, coloured, for a notebook."""
    # Imported where it is used, for the command line needs no IPython.
    from IPython.display import HTML, Code

    code = Code(inspect.getsource(function), language="python")
    # nbconvert lets <pre> in an output inherit its font, so the font is named around it, and breaks
    # lines inside words; a long line is scrolled to instead.
    page = code._repr_html_().replace("<pre>", '<pre style="white-space:pre;word-break:normal">')
    return HTML(f'<div style="font-family:monospace;overflow-x:auto">{page}</div>')


# ==================================================================================================
# 1  Configuration and stages
# ==================================================================================================


def setting(default, meaning, low=None, high=None, choices=None):
    """One Config key: its default, its meaning (`run --help` lists it) and the values allowed."""
    allowed = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=allowed)


@dataclass(frozen=True)
class Config:
    """Every setting of one stage, as plain values, with the course's own names where it has them.

    A wrong value raises UserError naming key, value and what is allowed; an unknown key is a
    TypeError. `get_config` returns a stage's Config, `STAGES` lists them.
    """

    exp_name: str = setting("simple", "name of the stage and of its folder")
    seed: int = setting(20220013, "all randomness is a function of (seed, epoch)", 0, 2**31 - 1)
    image_size: int = setting(224, "pixels a side that the networks see", 40, 512)

    # The student. The sample net has no settings; of the others, widths, depths and strides have
    # one entry a layer.
    student: str = setting("sample", "sample, dwpw, ir, or a builder of your own in NETS")
    stem_width: int = setting(48, "channels after the stem", 1, 1024)
    widths: tuple = setting((64, 128, 256), "channels of layer1, layer2, ...", 1, 4096)
    depths: tuple = setting((1, 1, 1), "blocks in each layer", 1, 64)
    strides: tuple = setting((1, 2, 2), "stride of each layer's first block", 1, 4)
    kernel_size: int = setting(3, "depthwise kernel", 1, 15)
    expansion: int = setting(3, "an inverted residual is so many times as wide inside", 1, 16)

    # The training view. An empty crop_scale is the course's sample transform: the evaluation crop,
    # and flips.
    crop_scale: tuple = setting(
        (), "area of RandomResizedCrop, (low, high), or () for the centre crop", 0.01, 1.0
    )
    hflip: float = setting(0.5, "probability of a horizontal flip", 0.0, 1.0)
    vflip: float = setting(0.0, "probability of a vertical flip", 0.0, 1.0)
    rotation: float = setting(0.0, "RandomRotation: degrees either way", 0.0, 180.0)
    affine: float = setting(0.0, "RandomAffine: degrees either way", 0.0, 180.0)

    # The loss.
    loss_fn_type: str = setting("CE", "CE: labels alone; KD: with a teacher", choices=("CE", "KD"))
    alpha: float = setting(0.5, "weight of the soft loss in loss_fn_kd", 0.0, 1.0)
    temperature: float = setting(20.0, "softens both distributions", 0.01, 1000.0)
    align_weights: tuple = setting(
        (), "smooth-L1 weight of layer1, layer2, ... against the teacher's", 0.0, 1000.0
    )
    loss_schedule: str = setting(
        "constant", "how the loss weights move with the epoch", choices=("constant", "handover")
    )
    teacher_views: int = setting(
        0, "store the teacher's logits for this many replayed epochs (0: never)", 0, 100_000
    )

    # The optimisation.
    optimizer: str = setting("adam", "how the weights move", choices=("adam", "adamw", "sgd"))
    lr: float = setting(3e-4, "learning rate (its peak, where it moves)", 0.0, 100.0)
    lr_schedule: str = setting(
        "constant", "constant, or cosine down to zero", choices=("constant", "cosine")
    )
    warmup_epochs: float = setting(0.0, "epochs of linear warm-up", 0.0, 10_000.0)
    weight_decay: float = setting(1e-5, "L2 penalty (decoupled for adamw)", 0.0, 10.0)
    grad_norm_max: float = setting(10.0, "gradients are clipped to this norm", 1e-6, 1e9)
    batch_size: int = setting(64, "images a step", 2, 65_536)
    n_epochs: int = setting(10, "passes over the training images", 1, 100_000)
    patience: int = setting(
        300, "stop after so many epochs without a better validation accuracy", 1, 100_000
    )
    amp: str = setting(
        "auto", "precision of the networks in training", choices=("auto", "off", "bf16", "fp16")
    )

    # How a run behaves. It may change when a run goes on, for it does not change what is computed.
    time_limit_h: float = setting(
        0.0, "hours of a session after which a run ends (0: none; Kaggle: 11.5)", 0.0, 1000.0
    )

    def __post_init__(self):
        # By way of object, for a frozen dataclass refuses plain assignment even here.
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, allowed_value(f, getattr(self, f.name)))
        self._check_name()
        self._check_layers()
        self._check_crop()
        self._check_alignment()

    def _check_name(self):
        # It names a folder and a CSV: no separators, and no dot that with_suffix would cut at.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.exp_name):
            self._refuse("exp_name", "letters, digits, '_', '-', at most 64")
        # submission.csv is a copy of the best stage's.
        is_taken = self.exp_name in ("submission", "submission_demo")
        # teacher/ is where train_teacher keeps its net, and looks for it.
        if self.exp_name == "teacher" and not self.student.startswith("resnet"):
            is_taken = True
        if is_taken:
            self._refuse("exp_name", "any other name")

    def _check_layers(self):
        # With padding kernel_size // 2 an even kernel would make each map a pixel larger.
        if self.kernel_size % 2 == 0:
            self._refuse("kernel_size", "an odd number")
        if not len(self.widths) == len(self.depths) == len(self.strides) > 0:
            self._refuse("depths", "as many entries as widths and strides")

    def _check_crop(self):
        if len(self.crop_scale) not in (0, 2) or list(self.crop_scale) != sorted(self.crop_scale):
            self._refuse("crop_scale", "() or (low, high)")
        turned = self.rotation or self.affine or self.vflip
        if turned and not self.crop_scale:  # the centre crop has horizontal flips alone
            self._refuse("crop_scale", "(low, high) with rotation, affine or vflip")

    def _check_alignment(self):
        can_align = self.loss_fn_type == "KD" and self.student != "sample"
        most = 0
        if can_align:
            most = min(4, len(self.widths))  # the teacher has four layers
        if len(self.align_weights) > most:
            self._refuse(
                "align_weights",
                "a weight for each layer, 4 at most; "
                "() for the sample net and unless loss_fn_type=KD",
            )
        if self.teacher_views and self.aligns:  # feature maps are too large to store
            self._refuse("teacher_views", "0 with align_weights")

    def _refuse(self, name, allowed):
        value = printable(repr(getattr(self, name)))
        raise UserError(f"{name}={value}: allowed is {allowed}")

    @property
    def aligns(self):
        """Whether the loss compares feature maps."""
        return any(self.align_weights)

    @property
    def aligned_layers(self):
        """{"layer1": weight, ...}: the layers that the loss compares."""
        layers = {}
        for number, weight in enumerate(self.align_weights, 1):
            if weight:
                layers[f"layer{number}"] = weight
        return layers

    @property
    def needs_teacher(self):
        """Whether any term of the loss asks for a teacher (alpha 0 without alignment does not)."""
        if self.loss_fn_type == "CE":
            return False
        return self.alpha > 0 or self.aligns or self.loss_schedule == "handover"

    @property
    def replays(self):
        """Whether the teacher's answers are stored and views are shown again."""
        return self.teacher_views > 0 and self.needs_teacher

    def view_epoch(self, epoch):
        """The epoch whose order and draws `epoch` shows: itself, unless views are replayed."""
        if self.replays:
            return epoch % self.teacher_views
        return epoch


def allowed_value(f, value):
    """The value of Config field `f` in the type of its default, or UserError."""
    if isinstance(value, np.generic):  # as a loop over np.arange gives them
        value = value.item()
    kind = type(f.default)
    choices = f.metadata["choices"]
    if kind is str:
        if isinstance(value, str) and (not choices or value in choices):
            return value
        allowed = "text"
        if choices:
            allowed = f"one of {', '.join(choices)}"
        raise UserError(f"{f.name}={printable(repr(value))}: allowed is {allowed}")

    low = f.metadata["low"]
    high = f.metadata["high"]
    number = kind
    if kind is tuple:  # its entries are whole where those of the default are
        number = int if f.default and isinstance(f.default[0], int) else float
    wanted = int if number is int else (int, float)

    def usable(v):
        # bool is a subclass of int. NaN fails the comparison, so it is refused too.
        return isinstance(v, wanted) and not isinstance(v, bool) and low <= v <= high

    if kind is tuple and isinstance(value, (tuple, list)) and all(map(usable, value)):
        return tuple(map(number, value))
    if kind is not tuple and usable(value):
        return kind(value)
    allowed = f"numbers from {low} to {high}"
    if number is int:
        allowed = f"whole {allowed}"
    if kind is tuple:
        allowed = f"a list of {allowed}"
    raise UserError(f"{f.name}={printable(repr(value))}: allowed is {allowed}")


def parse_setting(text):
    """("key", value) from the command line's KEY=VALUE; lists are 64,128,256 and () is empty.

    Raises UserError for a text without '=', an unknown key, or a value not of the key's type.
    """
    name, sign, value = (part.strip() for part in text.partition("="))
    fields = {f.name: f for f in dataclasses.fields(Config)}
    # literal_eval of a long, deeply nested text can crash the interpreter.
    if not sign or name not in fields or len(text) > 300:
        raise UserError(
            f"--set {printable(text)}: write KEY=VALUE, for example n_epochs=2; "
            f"the keys are {', '.join(fields)}"
        )
    kind = type(fields[name].default)
    if kind is not str:
        # What is no number stays text, and is refused below.
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    # One entry without a comma: align_weights=3.0 means (3.0,).
    if kind is tuple and not isinstance(value, (tuple, list)):
        value = (value,)
    return name, allowed_value(fields[name], value)


# Simple and Medium keep their published values, poor or not, because each one teaches a step.
# Strong, Boss and Beyond share the best legal student and optimiser that were found
# (tests/bench/RESULTS.md); each brings one step.
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
# Two cores train on the drawn demo set in minutes with these; a step counts more than an epoch
# there.
DEMO_SETTINGS = {"image_size": 64, "batch_size": 32, "lr": 4e-3, "patience": 100}
DEMO_EPOCHS = 40


def get_config(stage, length="full", demo=False, **overrides):
    """The Config of a stage, for example get_config("boss", n_epochs=5).

    length: "full", "lesson", "quick" or "fast" scales the epochs.
    demo: use the small settings for the drawn demo set, where every stage has the same number of
    epochs, so that they can be compared. Overrides win over both; an unknown one is a TypeError, an
    unknown stage or length, or a value that is not allowed, a UserError.
    """
    if stage not in STAGES:
        stage = printable(repr(stage))
        raise UserError(f"unknown stage {stage}; the stages are {', '.join(STAGES)}")
    if length not in LENGTHS:
        length = printable(repr(length))
        raise UserError(f"LENGTH={length}: allowed is one of {', '.join(LENGTHS)}")
    cfg = STAGES[stage]
    if demo:
        cfg = replace(cfg, n_epochs=DEMO_EPOCHS, **DEMO_SETTINGS)
    fraction, at_least = LENGTHS[length]
    # The minimum must not lengthen a stage that has fewer epochs.
    n_epochs = min(cfg.n_epochs, max(at_least, round(fraction * cfg.n_epochs)))
    cfg = replace(cfg, n_epochs=n_epochs)
    return replace(cfg, **overrides)


def chosen_length(length="full"):
    """`length`, or "fast" under HW13_FAST=1, which tests set; then it says so."""
    if is_fast() and length != "fast":
        say(f"HW13_FAST is set: the shortest length, in place of LENGTH = {length!r}")
        return "fast"
    return length


def diff_configs(a, b):
    """Print the settings in which Config `b` differs from Config `a`, a line each."""
    before = dataclasses.asdict(a)
    after = dataclasses.asdict(b)
    different = [name for name in before if before[name] != after[name]]
    for name in different:
        print(f"{name:<14} {before[name]!s:>18}  ->  {after[name]!s}")
    if not different:
        print("no difference")


# ==================================================================================================
# 2  Data
# ==================================================================================================

SPLITS = ("training", "validation", "evaluation")
# How the folder of a split may be called, in capitals too; the first of them that is there is read.
SPELLINGS = {
    "training": ("training", "train"),
    "validation": ("validation", "valid", "val"),
    "evaluation": ("evaluation", "eval", "testing", "test"),
}
TEACHER_FILE = "resnet18_teacher.ckpt"
COMPETITION = "ml2023spring-hw13"
# Names that end like this are pictures'. Not all can be decoded: those that cannot are named then.
JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jp2", ".j2k", ".jpf", ".jpx", ".mpo"}
OTHER_SUFFIXES = {
    ".png",
    ".apng",
    ".webp",
    ".gif",
    ".bmp",
    ".dib",
    ".tif",
    ".tiff",
    ".avif",
    ".ppm",
}
RARE_SUFFIXES = {".heic", ".heif", ".jxl", ".pgm", ".pbm", ".pnm", ".tga", ".psd", ".svg", ".eps"}
RAW_SUFFIXES = {".dng", ".cr2", ".nef", ".arw", ".raw"}
PICTURE_SUFFIXES = JPEG_SUFFIXES | OTHER_SUFFIXES | RARE_SUFFIXES | RAW_SUFFIXES
ARCHIVE_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
# What file managers leave behind, beside files that begin with a dot.
SYSTEM_FILES = ("thumbs.db", "desktop.ini")
# A split with more images that have no label, that are empty or cannot be decoded, is refused.
MAX_BAD_FRACTION = 0.05
# The shade that stands for a picture which cannot be seen: near ImageNet's mean red, 0.485 x 255.
NEUTRAL_GREY = 124
# Marks a folder as the drawn demo set.
DEMO_MARK = "DRAWN_DEMO_SET"
DEMO_WARNING = (
    "*** DEMO: drawn shapes, not photographs. No number below says anything about Food-11. ***\n"
)

# --- a data folder --------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoodData:
    """The files of a data folder.

    Lists are parallel and sorted by file name; labels are -1 where unknown. A split that was not
    read has empty ones.
    """

    root: Path
    origin: str  # what the pictures are, in words; every figure and table carries it
    files: dict  # split -> [Path]
    labels: dict  # split -> [int]
    ids: dict  # split -> [str]
    # Path -> why it is not used: all other files of the splits, and the pictures beside them.
    ignored: dict
    teacher_path: Path | None
    class_folders: bool  # whether a split has a folder for each class

    @property
    def is_demo(self):
        """Whether it is the drawn demo set."""
        return self.origin.startswith("demo")

    @property
    def is_homework(self):
        """Whether it is the homework's own data, a few files more or less.

        Then published scores may stand beside its own.
        """
        known = known_set(self)
        return known is not None and known.counts == HOMEWORK_COUNTS

    @property
    def published_scores(self):
        """{stage: score} of the re-built solution on the homework's own data; else empty."""
        if self.is_homework:
            return PUBLISHED_SCORES
        return {}

    @property
    def has_evaluation_labels(self):
        """Whether labels of evaluation images are known; the homework's are not."""
        return any(label >= 0 for label in self.labels["evaluation"])

    def counts(self):
        """A DataFrame of the number of images by class and split.

        Evaluation images of unknown class are one row.
        """
        # The label -1 finds the last name.
        names = (*CLASS_NAMES, "(unknown)")
        columns = {}
        for split in SPLITS:
            columns[split] = Counter(names[label] for label in self.labels[split])
        table = pd.DataFrame(columns).reindex(names)
        # A class without images in a split is a gap, and gaps make the column float.
        table = table.fillna(0).astype(int)
        table.loc["all"] = table.sum()
        has_images = table.sum(axis=1) > 0
        return table[has_images]

    def account(self):
        """What the pictures are, where, how many, what was ignored and what is amiss, in lines."""
        read = [split for split in SPLITS if self.files[split]]
        counts = ", ".join(f"{split} {len(self.files[split])}" for split in read)
        text = f"{self.origin} in {self.root}: {counts}."
        if self.is_demo:
            text = DEMO_WARNING + text
        if self.has_evaluation_labels:
            text += " The labels of its evaluation images are known."
        if self.ignored:
            text += f" {self.ignored_in_words()}"
        return "\n".join([text, *(f"WARNING: {sentence}" for sentence in what_is_amiss(self))])

    def ignored_in_words(self):
        """How many files are ignored and why, with some names."""
        by_reason = {}
        for path, why in self.ignored.items():
            name = printable(path.relative_to(self.root).as_posix())
            by_reason.setdefault(why, []).append(name)
        reasons = []
        for why, names in by_reason.items():
            reasons.append(f"{why}: {len(names)} ({some_of(names)})")
        return f"Ignored {counted(len(self.ignored), 'file')}, {'; '.join(reasons)}."

    def describe(self):
        """What `account` says, and in one more line whether there is a teacher."""
        if self.is_demo:
            return f"{self.account()}\nIts teacher is trained when it is first asked for."
        if self.teacher_path is None:
            return f"{self.account()}\nNo teacher's file {TEACHER_FILE} is with them."
        return f"{self.account()}\nA teacher's file is with them: {self.teacher_path}."


# --- where it lies --------------------------------------------------------------------------------


def find_data(root=None):
    """The FoodData to work on, or None where there is none.

    Looks, in this order, at: `root`; the variable HW13_DATA; every folder under /kaggle/input that
    holds the splits (the competition's own before a public copy); Food-11 here, in data/ or in a
    folder that is called as the competition.
    Raises UserError where the folder is not usable, and on Kaggle where no input is attached.
    """
    named = root or os.environ.get("HW13_DATA")
    if named:
        return read_folder(named)
    attached = attached_data_folders()
    if attached:
        return read_folder(attached[0])
    # Kaggle's working folder holds results, not data: it is not searched.
    if on_kaggle():
        raise UserError(
            f"no Food-11 under {kaggle_root() / 'input'}: press 'Add Input', attach the "
            f"competition '{COMPETITION}' (or a public copy of Food-11) and run again"
        )
    # The last is what the competition's own archive is called, unpacked into a folder of its name.
    places = (Path(), Path("data"), Path(COMPETITION))
    nearby = [found for place in places for found in food_in(place)]
    # An archive counts where nothing is unpacked; False sorts before True.
    nearby.sort(key=is_archive)
    if nearby:
        return read_folder(nearby[0])
    return None


def food_in(folder):
    """Folders and archives that are called Food-11 in a folder, that very spelling first."""
    if not folder.is_dir():
        return []
    # False sorts before True, so the exact spelling comes first.
    paths = sorted(folder.iterdir(), key=lambda path: (path.name != "Food-11", path.name))
    return [path for path in paths if is_called_food(path)]


def is_called_food(path):
    """Whether a folder is called Food-11, or an archive so or, as on Kaggle, the competition."""
    if is_archive(path):
        name = letters_and_digits(path.stem.removesuffix(".tar"))
        return name in ("food11", letters_and_digits(COMPETITION))
    return path.is_dir() and letters_and_digits(path.name) == "food11"


def walk_inputs():
    """Walk all that is under /kaggle/input, but for the pictures.

    Yields (folder, names of its folders, names of its files).
    """
    for folder, names, files in os.walk(kaggle_root() / "input"):
        all_names = set(names)
        kept = [name for name in names if not name.startswith(".")]
        # Splits hold thousands of pictures and nothing else.
        if "validation" in map(split_of, names):
            kept = [name for name in kept if split_of(name) is None]
        names[:] = kept  # os.walk goes into the folders that this list still holds
        yield Path(folder), all_names, files


def attached_data_folders():
    """Folders of any Kaggle input that hold splits.

    The competition's come first, then those that spell the splits as Food-11 does, then by name.
    """
    found = []
    for folder, names, _ in walk_inputs():
        if {"training", "validation"} <= set(map(split_of, names)):
            is_own = COMPETITION in folder.parts
            is_exact = {"training", "validation"} <= names
            found.append((not is_own, not is_exact, str(folder), folder))
    return [folder for *_, folder in sorted(found)]


def attached_files(name):
    """Paths of the files called `name` in any Kaggle input, sorted; none elsewhere."""
    return sorted(folder / name for folder, _, files in walk_inputs() if name in files)


def teacher_file_near(root):
    """The path of the teacher's checkpoint in the data folder `root` or beside it, or None.

    On Kaggle it may be in any input, for public copies of Food-11 have none.
    """
    above = Path(os.path.abspath(root)).parent  # of "." too
    places = [root / TEACHER_FILE, above / TEACHER_FILE, *attached_files(TEACHER_FILE)]
    for path in places:
        if path.is_file():
            return path
    return None


def data_root(root, needed=SPLITS):
    """The folder that holds the needed splits: `root` or the only one in the two levels below it.

    A folder of pictures will do where one split is needed. Raises UserError where there is none.
    """
    root = Path(user_path(root))
    if is_archive(root):
        raise UserError(f"{root} is an archive: unpack it and name the folder that comes out")
    if root.is_file():
        raise UserError(f"{root} is a file: name the folder of the data")
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    if set(needed) <= set(split_folders(root)):
        return root
    level = [root]
    # Level by level: an unpacked archive often wraps the data in a folder or two.
    for _ in range(2):
        level = [inner for folder in level for inner in subfolders(folder)]
        found = [folder for folder in level if set(needed) <= set(split_folders(folder))]
        # The very name wins over others beside it.
        found = [folder for folder in found if folder.name == "Food-11"] or found
        if len(found) > 1:
            raise UserError(f"{root} holds several data folders, {some_of(found)}: name one")
        if found:
            return found[0]
    # Last, for a picture may lie beside the data.
    if is_plain_folder(root, needed):
        return root
    raise UserError(missing_splits(root, needed))


def missing_splits(root, needed):
    """The sentence for a folder without the needed splits: what is missing, what to do."""
    there = split_folders(root)
    missing = [split for split in needed if split not in there]
    text = f"{root} has no folder '{missing[0]}'; wanted: {', '.join(needed)}"
    archives = sorted(path.name for path in root.iterdir() if is_archive(path))
    if archives:
        return f"{text}. Unpack {printable(archives[0])} first"
    # The user named a split's own folder, one level too deep.
    if split_of(Path(os.path.abspath(root)).name):
        return f"{text}. Name the folder above it"
    return text


def is_plain_folder(root, needed):
    """Whether a folder is itself the one split that is needed: pictures or class folders."""
    if len(needed) > 1 or split_folders(root):
        return False
    return holds_pictures(root) or any(class_of(path.name) is not None for path in subfolders(root))


def is_archive(path):
    """Whether a path is a packed file."""
    return path.suffix.lower() in ARCHIVE_SUFFIXES and path.is_file()


def subfolders(folder):
    """The folders in a folder, sorted, without hidden and system ones."""
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        return []
    paths = []
    for entry in entries:
        if is_folder(entry) and not entry.name.startswith((".", "__")):
            paths.append(Path(entry.path))
    return sorted(paths)


def is_folder(entry):
    """Whether an os.DirEntry is a folder or a link to one; a link to itself raises nothing."""
    if entry.is_symlink():
        return os.path.isdir(entry.path)
    return entry.is_dir()


def split_folders(folder):
    """{split: its folders in `folder`}, the first spelling of SPELLINGS first."""
    found = {}
    for path in subfolders(folder):
        split = split_of(path.name)
        if split is not None:
            found.setdefault(split, []).append(path)
    for split, paths in found.items():
        spellings = SPELLINGS[split]
        paths.sort(key=lambda path: spellings.index(letters_and_digits(path.name)))
    return found


def split_of(name):
    """The split that a folder's name spells, or None."""
    for split, spellings in SPELLINGS.items():
        if letters_and_digits(name) in spellings:
            return split
    return None


def class_of(name):
    """The label that a folder's name spells (Bread, noodles-pasta, 0, 00, ... 10), or None."""
    # Alphabetical positions would be wrong: spellings differ, and so does their order.
    plain = letters_and_digits(name)
    for label, class_name in enumerate(CLASS_NAMES):
        if plain in (letters_and_digits(class_name), str(label), f"{label:02d}"):
            return label
    return None


def letters_and_digits(name):
    """A name without case, spaces and signs: public copies spell the classes in their own ways."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


# --- what it holds --------------------------------------------------------------------------------

# Why a file of a split's folder is not used.
HIDDEN = "hidden or the system's"
MISPLACED = "in folders where no picture is expected"
LOOSE = "beside the class folders"
SECOND_FOLDER = "in a second folder of the split"
UNUSABLE_SPLIT = "in a split that cannot be used"
BROKEN_LINK = "broken links"
NOT_A_FILE = "no regular files"
NO_PICTURE = "no pictures"
EMPTY = "empty"
NO_LABEL = "without a label in their name"
OUTSIDE = "in no split's folder"

SplitFiles = namedtuple("SplitFiles", "files labels ids ignored class_folders")
UNREAD = SplitFiles([], [], [], {}, False)


def read_folder(root, needed=SPLITS):
    """The FoodData in `root` (training/, validation/, evaluation/).

    See the README for the layouts. needed: the splits that must be there and usable; others are
    read where they are. Raises UserError for a missing or empty split, a stray or missing class
    folder, a label out of range, an evaluation image that cannot be read, or two files of a split
    with one id.
    """
    root = data_root(root, needed)
    folders = split_folders(root)
    if is_plain_folder(root, needed):
        folders = {needed[0]: [root]}
    splits = {}
    for split in SPLITS:
        splits[split] = read_split_if_usable(folders.get(split, []), split, split in needed)
    ignored = dict.fromkeys(pictures_outside(root, folders), OUTSIDE)
    for found in splits.values():
        ignored |= found.ignored
    data = FoodData(
        root=root,
        origin="",
        files={split: found.files for split, found in splits.items()},
        labels={split: found.labels for split, found in splits.items()},
        ids={split: found.ids for split, found in splits.items()},
        ignored=ignored,
        teacher_path=teacher_file_near(root),
        class_folders=any(found.class_folders for found in splits.values()),
    )
    # Its origin depends on its counts, so it comes last.
    return replace(data, origin=origin_of(data))


def pictures_outside(root, folders):
    """Pictures in a data folder or directly in a folder of it that is no split's, sorted.

    folders: {split: its folders}.
    """
    of_splits = {path for paths in folders.values() for path in paths}
    if root in of_splits:
        return []
    found = []
    for place in (root, *subfolders(root)):
        if place not in of_splits:
            found += [path for path in files_in(place) if path.suffix.lower() in PICTURE_SUFFIXES]
    return found


def files_in(folder):
    """The regular files directly in a folder, sorted, but hidden ones; [] where it is closed."""
    try:
        paths = sorted(folder.iterdir())
    except PermissionError:
        return []
    return [path for path in paths if path.is_file() and not path.name.startswith(".")]


def read_split_if_usable(folders, split, needed):
    """`read_split`; where the split is not needed, what is amiss with it is no error."""
    if needed:
        return read_split(folders, split)
    try:
        if folders:
            return read_split(folders, split)
    except UserError:
        paths = [path for folder in folders for path in paths_below(folder)]
        return UNREAD._replace(ignored=dict.fromkeys(paths, UNUSABLE_SPLIT))
    return UNREAD


def read_split(folders, split):
    """The SplitFiles of a split in either layout; of several folders only the first is used.

    Files are sorted by path. Every file below the folders is either used or ignored for a reason.
    """
    folder, *others = folders
    # Pictures are used from `home`; any other file below `folder` is ignored for a reason.
    home = without_doubling(folder)
    class_folders = find_class_folders(home)
    files, ignored = sort_out(folder, home, class_folders, split)
    for other in others:
        ignored |= dict.fromkeys(paths_below(other), SECOND_FOLDER)
    if split == "evaluation":
        check_evaluation_files(files, ignored)
        keep_ids_without_picture(files, ignored)
    else:
        check_few(ignored, (EMPTY, BROKEN_LINK), files, 1, "are empty or broken links")
    if class_folders:
        # A loose evaluation picture has a row, but no label.
        labels = [class_folders.get(path.parent, -1) for path in files]
        # Files of two classes may have one name, so they are numbered.
        ids = [f"{i:04d}" for i in range(len(files))]
    else:
        if split == "evaluation":
            labels = evaluation_labels(files)
        else:
            files, labels = labelled_by_name(files, ignored)
        ids = [path.stem for path in files]
    if not files:
        raise UserError(f"{folder} holds no usable image")
    check_unique(ids, folder)
    return SplitFiles(files, labels, ids, dict(sorted(ignored.items())), bool(class_folders))


def without_doubling(folder):
    """The folder that a split's files are in: its own, or the one in it that holds them all."""
    # An archive may repeat the name once or twice: training/training/0_1.jpg.
    for _ in range(2):
        inside = subfolders(folder)
        if len(inside) != 1 or class_of(inside[0].name) is not None or holds_pictures(folder):
            break
        folder = inside[0]
    return folder


def holds_pictures(folder):
    """Whether pictures lie directly in a folder."""
    for path in folder.iterdir():
        if not path.name.startswith(".") and path.is_file() and is_picture(path):
            return True
    return False


def find_class_folders(folder):
    """{folder: label} of the class folders in a split, matched by name; {} for the flat layout.

    Raises UserError where a folder fits no class, and where a class has none or two.
    """
    folders = {path: class_of(path.name) for path in subfolders(folder)}
    if not folders:
        return {}
    n_folders = Counter(folders.values())
    n_classes = len(set(folders.values()) - {None})
    # Few beside pictures are strays in the flat layout.
    if n_classes < NUM_CLASSES / 2 and holds_pictures(folder):
        return {}
    # Everything that is amiss is named at once.
    amiss = []
    for path, label in folders.items():
        if label is None or n_folders[label] > 1:
            amiss.append(printable(path.name))
    for label, name in enumerate(CLASS_NAMES):
        if n_folders[label] == 0:
            amiss.append(f"{name} (missing)")
    if amiss:
        raise UserError(
            f"{folder}: wanted is one folder a class of Food-11, by name or number (0 to "
            f"{NUM_CLASSES - 1}); amiss are {some_of(amiss, 6)}"
        )
    return folders


def sort_out(folder, home, class_folders, split):
    """([picture], {other file: why it is ignored}) of all files below a split's folder, sorted."""
    homes = set(class_folders) or {home}
    if split == "evaluation":
        homes.add(home)  # so that a picture beside the class folders keeps its row
    files = []
    ignored = {}
    # A link to the folder of the class folders is followed too.
    for path in paths_below(folder, homes | {home}):
        why = None
        if is_hidden(path.relative_to(folder)):
            why = HIDDEN
        elif path.parent in homes:
            why = why_no_picture(path, may_be_empty=split == "evaluation")
        elif path.parent == home:
            why = LOOSE
        else:
            why = MISPLACED
        if why is None:
            files.append(path)
        else:
            ignored[path] = why
    return files, ignored


def paths_below(folder, homes=()):
    """All paths below a folder that are no folders, sorted.

    Links to folders are not followed, and count as files, unless they are among `homes`.
    """
    paths = []
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if is_folder(entry) and (path in homes or not entry.is_symlink()):
            paths += paths_below(path, homes)
        else:
            paths.append(path)
    return sorted(paths)


def is_hidden(path):
    """Whether a relative path is one that systems leave: .DS_Store, ._a.jpg, __MACOSX/a.jpg."""
    if any(part.startswith(".") for part in path.parts):
        return True
    if any(part.startswith("__") for part in path.parent.parts):
        return True
    return path.name.lower() in SYSTEM_FILES


def why_no_picture(path, may_be_empty):
    """Why a file cannot be an image of its split, or None where it can."""
    try:
        status = path.stat()
    except OSError:
        return BROKEN_LINK
    if not stat.S_ISREG(status.st_mode):
        return NOT_A_FILE
    if not is_picture(path):
        return NO_PICTURE
    if status.st_size == 0 and not may_be_empty:
        return EMPTY
    return None


def is_picture(path):
    """Whether a file is a picture by the end of its name, or else by its first bytes."""
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return True
    try:
        # Image.open reads the header alone.
        with warnings.catch_warnings(), Image.open(path, formats=picture_formats()):
            return True
    except Image.UnidentifiedImageError:
        return False
    # It is known for a picture, but a bomb, or cannot be read now: decoding will say so.
    except (OSError, ValueError, Image.DecompressionBombError):
        return True


# Unicode's categories of signs that have no place in a CSV: control characters, ends of lines and
# paragraphs, and what is no character.
NO_TEXT = {"Cc", "Zl", "Zp", "Cs"}


def check_evaluation_files(files, ignored):
    """UserError where the row of an evaluation image would be lost, or its id is no text."""
    lost = [path for path, why in ignored.items() if why in (BROKEN_LINK, NOT_A_FILE)]
    if lost:
        raise UserError(
            f"{counted(len(lost), 'evaluation image')} cannot be read, being broken links or no "
            f"files ({some_of([printable(path) for path in lost], 2)}): put the pictures there, "
            "for each needs its row"
        )
    for path in files:
        if any(unicodedata.category(sign) in NO_TEXT for sign in path.name):
            raise UserError(f"{ascii(str(path))} has a name that is no text: rename it")


def is_called_as_an_id(path):
    """Whether a file is called as evaluation images are: 0001, or 3_17 as in the original set."""
    return re.fullmatch(r"\d+(_\d+)?", path.stem) is not None


def keep_ids_without_picture(files, ignored):
    """Move evaluation files that are no pictures, but alone have an id, from `ignored` to `files`.

    They cannot be decoded and become grey, so that their rows stay in the CSV.
    """
    taken = {path.stem for path in files}
    for path, why in list(ignored.items()):
        if why == NO_PICTURE and is_called_as_an_id(path) and path.stem not in taken:
            taken.add(path.stem)
            files.append(path)
            del ignored[path]
    files.sort()


def labelled_by_name(files, ignored):
    """(files, labels) of those files that have a label in their name; others go to `ignored`."""
    labelled = []
    labels = []
    for path in files:
        label = label_in_name(path)
        if label is None:
            ignored[path] = NO_LABEL
            continue
        labelled.append(path)
        labels.append(label)
    check_few(ignored, (NO_LABEL,), labelled, 0, "have no label in their name (<label>_<n>.jpg)")
    return labelled, labels


def label_in_name(path):
    """The label of a file called <label>_<n>.jpg, or None where its name has none."""
    number = re.match(r"(\d+)_", path.name)
    if number is None:
        return None
    label = int(number[1])
    if label >= NUM_CLASSES:
        raise UserError(f"{path} has label {label}; allowed are 0 to {NUM_CLASSES - 1}")
    return label


def evaluation_labels(files):
    """Labels of evaluation images, -1 where unknown.

    In the original distribution they are called <label>_<n>.jpg. Where more than a few are not,
    such names mean something else, and none is known.
    """
    labels = []
    for path in files:
        # Two digits at most: a camera's 20230501_1 tells no label.
        number = re.fullmatch(r"(\d\d?)_\d+", path.stem)
        label = -1
        if number and int(number[1]) < NUM_CLASSES:
            label = int(number[1])
        labels.append(label)
    if labels.count(-1) > MAX_BAD_FRACTION * len(labels):
        return [-1] * len(labels)
    return labels


def check_few(ignored, reasons, files, allowed, what):
    """UserError where more than `allowed`, and than a few of a split's images, are ignored."""
    bad = [path for path, why in ignored.items() if why in reasons]
    n = len(bad) + len(files)
    # `allowed` is for small sets, where a single file is more than that fraction.
    if len(bad) > max(allowed, MAX_BAD_FRACTION * n):
        raise UserError(f"{len(bad)} of {n} images {what}: {printable(bad[0])}, ...")


def check_unique(ids, folder):
    """UserError naming the first id that two images of a split's folder have."""
    for name, n in Counter(ids).items():
        if n > 1:
            raise UserError(f"{folder} holds two images with the id {name}")


def printable(name):
    """A name or path as text, signs that cannot be seen escaped."""
    text = str(name)
    if not text.isprintable():
        text = ascii(text)[1:-1]
    if len(text) > 160:
        text = f"{text[:80]}...{text[-77:]}"
    return text


def counted(n, noun):
    """`1 file`, `2,218 files`."""
    if n == 1:
        return f"1 {noun}"
    return f"{n:,} {noun}s"


# --- what the pictures are, and what is amiss with them -------------------------------------------

# labels: what may be known of the evaluation images' labels; None where there are no such images.
KnownSet = namedtuple("KnownSet", "name counts labels")
ORIGINAL_COUNTS = {"training": 9866, "validation": 3430, "evaluation": 3347}
KNOWN_SETS = (
    KnownSet("Food-11 of the homework", HOMEWORK_COUNTS, (False, None)),
    KnownSet("Food-11 of homework 13 of 2022", ORIGINAL_COUNTS, (False,)),
    KnownSet(
        "Food-11, its original distribution (not the homework's split)", ORIGINAL_COUNTS, (True,)
    ),
    KnownSet("Food-11 in its original split (not the homework's)", ORIGINAL_COUNTS, (None,)),
)
PUBLIC_COPY = "public copy of Food-11 (not the homework's split)"


def origin_of(data):
    """What the pictures of a FoodData are, in words."""
    if (data.root / DEMO_MARK).exists():
        return "demo set (drawn, not photographs)"
    known = known_set(data)
    is_original = known is None or known.counts == ORIGINAL_COUNTS
    if data.class_folders and is_original:
        return PUBLIC_COPY
    if known is not None:
        if differing_counts(data, known):
            return f"{known.name}, with other counts"
        return known.name
    if data.has_evaluation_labels:
        return "pictures named as in Food-11's original distribution (not the homework's split)"
    return "photographs of no known set (not the homework's Food-11)"


def known_set(data):
    """The KnownSet whose counts the splits have, or nearly have; None for other pictures.

    Near are counts of which two are equal or all within 5 %. The known sets are further apart.
    """
    has_labels = None
    if data.files["evaluation"]:
        has_labels = data.has_evaluation_labels
    read = [split for split in SPLITS if data.files[split]]
    for known in KNOWN_SETS:
        # Three sets have the same counts: what is known of evaluation labels tells them apart.
        if has_labels not in known.labels:
            continue
        wrong = differing_counts(data, known)
        far = [split for split in wrong if abs(wrong[split]) > 0.05 * known.counts[split]]
        if not wrong or (len(read) == 3 and (len(wrong) < 2 or not far)):
            return known
    return None


def differing_counts(data, known):
    """{split: how many images it has more than in a KnownSet} where it was read and differs."""
    more = {}
    for split, wanted in known.counts.items():
        n = len(data.files[split])
        # 0 is a split that was not read.
        if n not in (0, wanted):
            more[split] = n - wanted
    return more


def what_is_amiss(data):
    """Sentences on what is probably wrong with a FoodData that can be used all the same."""
    sentences = []
    known = known_set(data)
    if known is not None and differing_counts(data, known):
        sentences.append(describe_difference(data, known))
    absent = set(range(NUM_CLASSES)) - set(data.labels["training"])
    if data.files["training"] and absent:
        names = some_of([CLASS_NAMES[label] for label in sorted(absent)], NUM_CLASSES)
        sentences.append(f"no training image of {names}: the student cannot learn it")
    odd = odd_ids(data.ids["evaluation"])
    if odd:
        sentences.append(
            f"{counted(len(odd), 'evaluation id')} unlike the others, perhaps copies "
            f"({some_of([quoted(name) for name in odd])}): each gets a row"
        )
    if known is None or differing_counts(data, known):  # a known set is as it is
        for (split, other), n in copies_between_splits(data.files).items():
            sentences.append(
                f"{n:,} of {counted(len(data.files[split]), f'{split} image')} "
                f"are byte for byte {other} images too, which flatters the accuracy on them"
            )
    return sentences


def describe_difference(data, known):
    """What a folder has more and less than the KnownSet that it nearly is."""
    parts = []
    for split in differing_counts(data, known):
        parts.append(f"{split} {len(data.files[split]):,} of {known.counts[split]:,}")
    text = f"nearly {known.name}, but not whole: {', '.join(parts)}"
    if known.counts == HOMEWORK_COUNTS and data.ids["evaluation"]:
        there = set(data.ids["evaluation"])
        wanted = [f"{i:04d}" for i in range(HOMEWORK_COUNTS["evaluation"])]
        missing = [name for name in wanted if name not in there]
        if missing:
            text += f"; {counted(len(missing), 'evaluation image')} missing ({some_of(missing)})"
    return text


def odd_ids(ids):
    """The ids of another form than nearly all, as `0001 (1)` among `0000`, `0001`, ..."""
    if not ids:
        return []
    # `0001` becomes `0`, `0001 (1)` becomes `0 (0)`.
    forms = [re.sub(r"\d+", "0", name) for name in ids]
    usual, n_usual = Counter(forms).most_common(1)[0]
    # Own photographs may have any names.
    if n_usual < 0.75 * len(ids):
        return []
    return [name for name, form in zip(ids, forms, strict=True) if form != usual]


def copies_between_splits(files):
    """{(split, earlier split): how many of its files are byte for byte one of the earlier's}.

    files: split -> [Path]. Only files of one size are opened, and read whole if they end alike.
    """
    n_copies = Counter()
    # Each test costs more than the one before, and sees only the files that it left.
    for of_one_size in shared_groups(files, lambda path: path.stat().st_size):
        for of_one_end in shared_groups(of_one_size, lambda path: ends_digest(path, 4096)):
            for equal in shared_groups(of_one_end, ends_digest):
                # Groups keep the order of the splits, so the first of two is the earlier one.
                for earlier, split in itertools.combinations(equal, 2):
                    n_copies[split, earlier] += len(equal[split])
    return dict(n_copies)


def shared_groups(files, key):
    """The groups {split: [Path]} of files with one key that lie in more than one split."""
    groups = {}
    for split, paths in files.items():
        for path in paths:
            groups.setdefault(key(path), {}).setdefault(split, []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def ends_digest(path, n_bytes=None):
    """A digest of a file's last bytes, or of all; the path itself where it cannot be read."""
    try:
        with open(path, "rb") as file:
            if n_bytes is not None:
                file.seek(max(0, path.stat().st_size - n_bytes))
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        # No other file has this key, so it counts as no copy.
        return path


# --- one picture at a time: the course's Dataset, the reference -----------------------------------


# Formats that Pillow decodes by itself. Others would start a program (PostScript: Ghostscript).
PICTURE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# A longer strip would be resized to a picture that takes gigabytes.
MAX_ASPECT = 300


@functools.cache
def picture_formats():
    """Those of PICTURE_FORMATS that this Pillow was built with."""
    # Without it Pillow has loaded its commonest plugins at most.
    Image.init()
    return tuple(name for name in PICTURE_FORMATS if name in Image.OPEN)


def open_image(path):
    """A file as an upright PIL image in RGB; of several frames the first.

    Its mode (grey, CMYK, palette, RGBA, 16 bit) and EXIF turn may be any. Transparency is dropped:
    the colours that the file stores below it show, as in PIL's and torchvision's own loaders.
    Raises UserError naming the file where it cannot be decoded, is a decompression bomb, or is a
    strip of more than MAX_ASPECT times its width.
    """
    try:
        with Image.open(path, formats=picture_formats()) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"a strip of {image.width} x {image.height} pixels")
            image.load()
            turn = turn_of(image)
            # 16 bit a pixel: PIL would clip it to white, so the upper 8 are taken.
            if image.mode.startswith("I"):
                high_bytes = np.asarray(image) >> 8
                image = Image.fromarray(high_bytes.clip(0, 255).astype(np.uint8))
            if turn is not None:
                image = image.transpose(turn)
            return image.convert("RGB")
    except MemoryError:
        raise UserError(
            f"{path} cannot be decoded, for the memory is full: end other programs and run again"
        ) from None
    # PIL raises OSError, SyntaxError, struct.error, DecompressionBombError, ...
    except Exception as error:
        kind = type(error).__name__
        raise UserError(f"{path} cannot be decoded ({kind}: {error})") from None


# EXIF's orientation -> what makes the picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_of(image):
    """The Image.Transpose that makes a loaded PIL image upright, by its EXIF data; None without.

    ImageOps.exif_transpose would also write the EXIF data anew, which fails for odd entries beside
    good pixels, and for a picture whose mode was changed it finds none.
    """
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF data raises many kinds; the pixels are what counts
        return None


def source_size(image_size):
    """S: the side to which pictures are resized before the crop, as 256 is to 224."""
    return round(image_size * 256 / 224)


def eval_transform(image_size):
    """The reference test transform up to the pixels.

    PIL image -> Resize(S), CenterCrop(image_size) -> PIL image.
    """
    resize = transforms.Resize(source_size(image_size))
    return transforms.Compose([resize, transforms.CenterCrop(image_size)])


def reference_transform(cfg, train):
    """The course's own torchvision chain: PIL image -> float tensor (3, image_size, image_size).

    The tensor is normalised. The batched loader is measured and tested against this chain.
    torchvision turns pictures with NEAREST unless told otherwise; BILINEAR is used here as in the
    batched loader.
    """
    bilinear = transforms.InterpolationMode.BILINEAR
    steps = []
    # An empty crop_scale is the course's sample transform: the evaluation crop, and flips.
    if train and cfg.crop_scale:
        steps.append(transforms.RandomResizedCrop(cfg.image_size, cfg.crop_scale))
    else:
        steps.append(eval_transform(cfg.image_size))
    if train:
        steps.append(transforms.RandomHorizontalFlip(cfg.hflip))
        steps.append(transforms.RandomVerticalFlip(cfg.vflip))
    if train and cfg.rotation:
        steps.append(transforms.RandomRotation(cfg.rotation, bilinear))
    if train and cfg.affine:
        steps.append(transforms.RandomAffine(cfg.affine, interpolation=bilinear))
    steps.append(transforms.ToTensor())
    steps.append(transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD))
    return transforms.Compose(steps)


class FoodDataset(Dataset):
    """The course's Dataset: one file at a time, decoded and augmented with PIL.

    An item is (image (3, H, W) float, label). It is the reference path. Use it with
    DataLoader(num_workers=...); `fit` takes that or a BatchLoader. Where worker processes give
    multiprocessing errors in a notebook, use plain `from tqdm import tqdm` instead of `tqdm.auto`.
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


# --- a split decoded once, into the cache ---------------------------------------------------------

CACHE_VERSION = 3
DIGEST_BYTES = 16  # of each file's contents
# What became of an image in the cache.
LEFT_OUT = 0
GOOD = 1
DAMAGED_BUT_KEPT = 2

# A cache file, mapped. In the order of the files: aspects (n,) float32, states (n,) uint8, one of
# the three above, and digests (n, DIGEST_BYTES) uint8 of the files' bytes. Then the images
# (n, 3, side, side) uint8, those that are not left out first.
CacheArrays = namedtuple("CacheArrays", "aspects states digests images")


@dataclass(frozen=True)
class Split:
    """Decoded images of one split.

    The form `whole` holds each picture squeezed to a square, `eval` the reference crop.
    """

    name: str  # training, validation or evaluation
    form: str  # whole or eval
    origin: str
    images: torch.Tensor  # (N, 3, H, W) uint8, memory-mapped from the cache
    labels: torch.Tensor  # (N,) int64, -1 where unknown
    ids: tuple  # N file stems, in the order of the images
    aspects: torch.Tensor  # (N,) float32, width / height of the file
    contents: (
        str  # a hash of the bytes of all files, damaged ones too; names and times do not count
    )
    cache: Path

    def __len__(self):
        return len(self.ids)


def cache_root():
    """The folder for decoded images.

    It is HW13_CACHE, or a private one of the user's in the temporary directory. Raises UserError
    where it cannot be made or is another user's.
    """
    named = os.environ.get("HW13_CACHE")
    if named:
        root = Path(user_path(named))
        mode = 0o777
    else:
        root = Path(tempfile.gettempdir()) / f"hw13_cache_{user_id()}"
        mode = 0o700
    try:
        root.mkdir(parents=True, exist_ok=True, mode=mode)
    except OSError as error:
        why = error.strerror
        raise UserError(f"the cache folder {root} cannot be made ({why}); set HW13_CACHE") from None
    # In a shared temporary directory another user could change the files of a folder of theirs.
    if not named and not is_own(root):
        raise UserError(
            f"the cache folder {root} belongs to another user; "
            "set HW13_CACHE to a folder of your own"
        )
    return root


def user_id():
    """The user's number, or the name on systems that have none (Windows)."""
    if hasattr(os, "getuid"):
        return os.getuid()
    return getpass.getuser()


def is_own(folder):
    """Whether a folder belongs to the user; taken for granted on Windows."""
    if hasattr(os, "getuid"):
        return folder.stat().st_uid == os.getuid()
    return True


def load_data(data, split, form, image_size):
    """The Split `split` of FoodData in one form.

    It is decoded once into the cache and memory-mapped from there. form: "whole" (N, 3, S, S) with
    S = source_size(image_size), or "eval" (N, 3, image_size, image_size), which equals the
    reference test transform bit for bit.

    A training or validation image that cannot be decoded is left out and named, many are an error
    (UserError). An evaluation image is never left out: a damaged one is decoded as far as it goes,
    else it becomes grey, and is named.
    """
    files = data.files[split]
    n = len(files)
    if form == "whole":
        side = source_size(image_size)
        # Squeezed to a square; the aspect, stored beside it, lets `sample_crops` undo that.
        transform = transforms.Resize((side, side))
    else:
        side = image_size
        transform = eval_transform(image_size)
    path = cache_path(data, split, form, image_size)
    # The processes of a machine share one cache file: the first writes it, the others wait.
    if not is_cache(path, n, side) and is_first_on_node():
        decode_all(files, split, transform, side, path)
    barrier()
    cached = map_cache(path, n, side)
    damaged = [printable(files[i].name) for i in (cached.states != GOOD).nonzero()[:, 0].tolist()]
    if damaged:
        say(
            f"WARNING: {len(damaged)} of {n} {split} images are damaged ({some_of(damaged)}); "
            f"what became of each was said when {path.name} was made"
        )
    # (N,): places in `files` of the images that are not left out.
    keep = cached.states.nonzero()[:, 0]
    ids = data.ids[split]
    return Split(
        name=split,
        form=form,
        origin=data.origin,
        images=cached.images[: len(keep)],
        labels=torch.tensor(data.labels[split])[keep],
        ids=tuple(ids[i] for i in keep.tolist()),
        aspects=cached.aspects[keep],
        contents=fingerprint(cached.digests.numpy().tobytes().hex()),
        cache=path,
    )


def cache_path(data, split, form, image_size):
    """The cache file of a split in one form: other files or decoders give it another name."""
    stats = []
    for path in data.files[split]:
        stat = path.stat()
        name = path.relative_to(data.root).as_posix()
        # st_mtime can be set back, as unpacking and copying do: st_ctime moves with every writing.
        # Where only times differ, as on another mount, the files are decoded once more.
        stats.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    # Another version may decode or resize to slightly other pixels.
    decoders = (Image.__version__, torchvision.__version__)
    key = fingerprint(CACHE_VERSION, *decoders, form, image_size, stats)
    return cache_root() / f"{split}-{form}-{image_size}-{key}.images"


def is_cache(path, n, side):
    """Whether a cache file is there, whole."""
    if not path.is_file() or path.stat().st_size != cache_bytes(n, side):
        return False
    # A failed copy or disk leaves zeros, and no picture has the aspect 0.
    return bool(map_cache(path, n, side).aspects.all())


def cache_bytes(n, side):
    """Size of a cache file: per image an aspect (float32), a state (a byte), digest and pixels."""
    return n * (4 + 1 + DIGEST_BYTES + 3 * side**2)


def map_cache(path, n, side, mode="r"):
    """The CacheArrays of a cache file of n images; the modes are np.memmap's."""
    mapped = np.memmap(path, np.uint8, mode, shape=cache_bytes(n, side))
    with warnings.catch_warnings():
        # torch warns that a mapping made for reading cannot be written to.
        warnings.simplefilter("ignore")
        flat = torch.from_numpy(mapped)
    # (4n,), (n,), (16n,) and (3 n side side,) bytes.
    aspects, states, digests, pixels = flat.split([4 * n, n, DIGEST_BYTES * n, 3 * n * side**2])
    return CacheArrays(
        aspects=aspects.view(torch.float32),
        states=states,
        digests=digests.view(n, DIGEST_BYTES),
        images=pixels.view(n, 3, side, side),
    )


def decode_all(files, split, transform, side, path):
    """Decode the files of a split in parallel into the cache file `path`.

    It is written whole or not at all. transform: PIL image -> PIL image of `side` x `side`.
    """
    with written_whole(path) as temporary:
        # A function of its own, whose mapping ends with it: Windows renames no file that is mapped.
        fill_cache(temporary, files, split, transform, side)


def fill_cache(path, files, split, transform, side):
    """Decode the files of a split in parallel into a new cache file, as `decode_all` says."""
    cached = new_cache(path, len(files), side)
    failures = {}  # place of the file -> why it cannot be decoded

    def decode(i):
        try:
            image = open_image(files[i])
        except UserError as error:
            if is_of_the_system(error.__context__):  # it cannot be read now
                raise
            failures[i] = str(error)
        else:
            store_image(cached, i, image, transform)
        # Of the file, not of the pixels: another version of PIL may round them otherwise.
        cached.digests[i] = digest_of(files[i])

    # PIL and torchvision let go of the interpreter lock, so threads decode side by side.
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress_bar(len(files), f"decode {split}") as bar,
    ):
        # Odd EXIF and palette bytes; what cannot be decoded is named below.
        warnings.simplefilter("ignore")
        # What a thread raised is raised here, when its result is asked for.
        for _ in pool.map(decode, range(len(files))):
            bar.update()
    if split == "evaluation":
        keep_damaged(failures, files, transform, cached)
    elif failures:
        leave_out(failures, cached)


def new_cache(path, n, side):
    """The CacheArrays of a new cache file: all aspects 1, all states GOOD.

    Raises UserError where the disk has no room.
    """
    try:
        cached = map_cache(path, n, side, "w+")
        # Take the room now: a disk must not fill up below the mapping.
        if hasattr(os, "posix_fallocate"):
            with open(path, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        size = cache_bytes(n, side) / 1e9
        raise UserError(
            f"the cache of {size:.1f} GB cannot be made in {path.parent} ({error.strerror}): "
            "set HW13_CACHE"
        ) from None
    # A new file is all zeros, which `is_cache` takes for a broken one.
    cached.aspects.fill_(1)
    cached.states.fill_(GOOD)
    return cached


def digest_of(path):
    """A hash of a file's bytes: (DIGEST_BYTES,) uint8. UserError where it cannot be read."""
    checksum = hashlib.blake2b(digest_size=DIGEST_BYTES)
    try:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                checksum.update(part)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    return torch.tensor(list(checksum.digest()), dtype=torch.uint8)


def store_image(cached, i, image, transform):
    """Put a decoded PIL image, transformed, into place i of the CacheArrays."""
    # Of the picture as it was, before it is squeezed or cropped.
    cached.aspects[i] = image.width / image.height
    pixels = torch.from_numpy(np.array(transform(image)))  # (side, side, 3)
    cached.images[i] = pixels.permute(2, 0, 1)


def keep_damaged(failures, files, transform, cached):
    """Evaluation images that would not decode: named, and stored as well as it goes."""
    # After the threads have ended, for `rescue` must be alone.
    for i, why in sorted(failures.items()):
        image, how = rescue(files[i])
        store_image(cached, i, image, transform)
        cached.states[i] = DAMAGED_BUT_KEPT
        say(f"WARNING: {why}; {how}, so that its row stays in the CSV")


def rescue(path):
    """(image, how) for an evaluation file that would not decode: as far as it goes, else grey."""
    # A switch of PIL's for the whole process: no other thread may be decoding.
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        return open_image(path), "decoded as far as it goes"
    except UserError:
        grey = (NEUTRAL_GREY, NEUTRAL_GREY, NEUTRAL_GREY)
        return Image.new("RGB", (256, 256), grey), "replaced by a grey picture"
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def leave_out(failures, cached):
    """Training or validation images that would not decode: named, marked, the rest moved together.

    Raises UserError where they are many.
    """
    n = len(cached.states)
    places = sorted(failures)
    if len(failures) > max(1, MAX_BAD_FRACTION * n) or len(failures) == n:
        reasons = "; ".join(failures[i] for i in places[:5])
        raise UserError(f"cannot use {len(failures)} of {n} images: {reasons}")
    for i in places:
        say(f"WARNING: {failures[i]}; left out")
    cached.states[places] = LEFT_OUT
    # LEFT_OUT is 0, so these are the places of the images that stay, in order.
    keep = cached.states.nonzero()[:, 0].tolist()
    # Each image moves forward or stays, so none is overwritten before it has moved.
    for to, i in enumerate(keep):
        cached.images[to] = cached.images[i].clone()


# --- the drawn demo set ---------------------------------------------------------------------------

# Part of the demo folder's name: raise it where `draw_dish` is to draw other pictures.
DEMO_VERSION = 2
# Pictures a class; those of the last folder are drawn for the teacher alone.
DEMO_TEACHER_FOLDER = "teacher_pictures"
DEMO_PICTURES = {"training": 20, "validation": 60, "evaluation": 20, DEMO_TEACHER_FOLDER: 300}
FAST_DEMO_PICTURES = {"training": 14, "validation": 6, "evaluation": 4, DEMO_TEACHER_FOLDER: 10}
# So many training labels are wrong; no validation label is, and none that the teacher learns from.
DEMO_WRONG_LABELS = 0.3
# What tells a class is so often as the class has it, and else any.
DEMO_TYPICAL = 0.92


def draw_dish(label, rng):
    """One drawn picture of class `label`: a PIL image, 72 to 112 px a side.

    A plate with pieces of food on a table, noisy and partly covered. Hue, number and corners of the
    pieces tell the class, none of them alone: the hues of neighbouring classes overlap, and number
    and corners are now and then another class's.
    """
    canvas = Image.new("RGB", (96, 96), random_colour(rng))
    draw = ImageDraw.Draw(canvas)
    plate = rng.uniform(42, 54, 2)  # its centre
    draw.ellipse([*(plate - 40), *(plate + 40)], (225, 225, 220))
    draw_pieces(draw, plate, label, rng)
    # Something lies in front of it.
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

    It exists so that the notebook runs on a machine without data, and shows there what the stages
    are about: classes look alike, pictures with a label are few, three labels in ten are wrong, and
    the teacher has learned from many more draws with right ones. Its difficulty was chosen for that
    alone: that Simple, Medium, Strong and the teacher come out in this order is no evidence for any
    recipe, and its scores say nothing about Food-11. seed: another one draws other pictures.
    """
    per_class = DEMO_PICTURES
    if is_fast():
        per_class = FAST_DEMO_PICTURES
    name = fingerprint(DEMO_VERSION, per_class, seed)
    # In a folder of its own, for the teacher's pictures lie beside Food-11.
    root = cache_root() / f"demo-{name}" / "Food-11"
    to_draw = is_first_on_node() and not is_whole_demo_set(root, per_class)
    if to_draw and (not root.parent.exists() or removed_demo_set(root.parent)):
        draw_demo_set(root, per_class, seed)
    barrier()
    return read_folder(root)


def removed_demo_set(folder):
    """Remove a demo set that has lost files, as cleaners of temporary folders take them.

    False where it cannot be removed, as in a folder that can only be read: it is used as it is.
    """
    try:
        # Moved first, for half of a set would look like a whole one.
        aside = Path(tempfile.mkdtemp(prefix="demo-drawing-", dir=cache_root()))
        os.replace(folder, aside / folder.name)
    except OSError:
        say(f"WARNING: the demo set in {folder} has lost files, and it cannot be drawn anew there")
        return False
    shutil.rmtree(aside, ignore_errors=True)
    say(f"the demo set in {folder} had lost files: it is drawn anew")
    return True


def is_whole_demo_set(root, per_class):
    """Whether a folder holds all pictures of a drawn demo set, the teacher's too, and its mark."""
    folders = [root / split for split in SPLITS]
    folders.append(root.parent / DEMO_TEACHER_FOLDER)
    for folder in folders:
        wanted = NUM_CLASSES * per_class[folder.name]
        if not folder.is_dir() or len(files_in(folder)) < wanted:
            return False
    return (root / DEMO_MARK).is_file()


def with_teacher_pictures(data):
    """The demo set's FoodData with the training images that were drawn for the teacher alone.

    They lie beside the demo set, so no student ever sees them. A demo set that was copied without
    them stays as it is.
    """
    folder = data.root.parent / DEMO_TEACHER_FOLDER
    if not folder.is_dir():
        return data
    found = read_split([folder], "training")
    return replace(
        data,
        root=folder.parent,
        files=data.files | {"training": found.files},
        labels=data.labels | {"training": found.labels},
        ids=data.ids | {"training": found.ids},
    )


def draw_demo_set(root, per_class, seed):
    """Draw all splits: beside their place and then renamed, so that no half set is ever read."""
    for left in cache_root().glob("demo-drawing-*"):  # of a process that was killed
        if is_a_day_old(left):
            shutil.rmtree(left, ignore_errors=True)
    drawing = Path(tempfile.mkdtemp(prefix="demo-drawing-", dir=cache_root()))
    # Seeds of their own: a split's pictures do not depend on how many the others have.
    for place, split in enumerate(SPLITS):
        wrong = DEMO_WRONG_LABELS if split == "training" else 0.0
        draw_split(drawing / root.name / split, per_class[split], (seed, place), wrong)
    # Beside the set and not in it: no reader of the folder finds them.
    folder = drawing / DEMO_TEACHER_FOLDER
    draw_split(folder, per_class[folder.name], (seed, len(SPLITS)))
    (drawing / root.name / DEMO_MARK).write_text("Drawn shapes, not photographs.\n")
    try:
        os.replace(drawing, root.parent)
    except OSError:  # another program was first
        shutil.rmtree(drawing, ignore_errors=True)


def draw_split(folder, per_class, seed, wrong_labels=0.0):
    """Draw so many pictures a class into a new folder that is called as its split.

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
        name = f"{label}_{i}.jpg"
        # As in the homework, names of evaluation images do not tell their labels.
        if folder.name == "evaluation":
            name = f"{i:04d}.jpg"
        picture.save(folder / name, quality=90)


# ==================================================================================================
# 3  Loader
# ==================================================================================================

# images (B, 3, S, S) float32, labels (B,) int64, rows (B,): their places in the Split.
# weight: own images * processes / images of the whole step. With it gradients that are averaged
# over processes are exact, also where the parts of a step differ in size.
# view_epoch: the epoch whose draws are shown.
Batch = namedtuple("Batch", "images labels rows weight view_epoch", defaults=(None, 1.0, None))


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
    mean = 255 * torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
    std = 255 * torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    return mean, std


def normalize(images):
    """Pixels in 0..255, any dtype (B, 3, H, W) -> float32 with ImageNet's mean and deviation."""
    mean, std = mean_and_std(images.device)
    # (images - mean) / std, in one pass over the memory.
    return torch.addcmul(-mean / std, images, 1 / std)


class BatchLoader:
    """Batches of a Split on the device: Batch(images, labels, rows, weight, view_epoch).

    train=True shuffles and augments as `cfg` says; every draw of an epoch is a function of
    (seed, epoch) alone and belongs to the image's row, so a resumed run sees what an uninterrupted
    one would. Otherwise batches come in order. The uint8 images are read batch by batch through
    pinned memory, or from the GPU itself inside `images_on_gpu`. Under torch.distributed each
    process yields its part of every batch, unless shared=False.
    Raises UserError where the split's form is not the one that the config's crop wants, or where a
    training step has no image for some of the processes.
    """

    def __init__(self, split, cfg, device, train=False, batch_size=None, shared=True):
        wanted = training_form(cfg)
        # Without training either form will do: test-time augmentation reads whole pictures.
        if train and split.form != wanted:
            raise UserError(f"the config wants the {wanted} form, not {split.form}")
        self.dataset = split  # named as in torch's DataLoader
        self.split = split
        self.cfg = cfg
        self.device = torch.device(device)
        self.train = train
        self.epoch = 0
        self.batch_size = batch_size or cfg.batch_size
        self.rank, self.world = (0, 1)
        if shared:
            # Each process takes its part of every batch.
            self.rank, self.world = rank_and_world()
        # What batches are read from; `move_images` puts a copy on the GPU in its place.
        self.images = split.images
        self.labels = split.labels.to(self.device)
        if train:
            self._check_step_size()

    def _check_step_size(self):
        """UserError where a step has fewer images than there are processes."""
        # A shorter last step has two images for each process, or it joins the one before.
        smallest = min(self.batch_size, len(self.split))
        if smallest < self.world:
            raise UserError(
                f"{self.cfg.exp_name}: a step has {smallest} images (batch_size {self.batch_size}, "
                f"{len(self.split)} training images), too few for {self.world} processes: "
                "start fewer processes"
            )

    def move_images(self):
        """Put the images on the GPU, for many passes, if they fit in half of its free memory."""
        if self.device.type != "cuda" or self.images.is_cuda:
            return
        # The other half is for weights, feature maps and the teacher.
        if self.images.nbytes < free_memory(self.device) / 2:
            self.images = self.images.to(self.device)

    def give_images_back(self):
        """Leave the GPU's memory to others: from here on the images are read from the host."""
        # The mapped tensor again; the GPU's copy goes with its last reference.
        self.images = self.split.images

    def set_epoch(self, epoch):
        """Choose the epoch whose order and views the next iteration yields."""
        # Where views are replayed, an epoch has the number of the one that it repeats.
        self.epoch = self.cfg.view_epoch(epoch)

    def batches(self):
        """The rows of each step, over all processes.

        A last batch of less than two images for each process joins the one before.
        """
        n = len(self.split)
        if self.train:
            # Drawn on the CPU: the order is the same on every device and in every process.
            order = torch.randperm(n, generator=self._generator(0))
        else:
            order = torch.arange(n)
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
            labels = self.labels[rows.to(self.device, non_blocking=True)]
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
            # (B, 3, side, side) uint8, the whole pictures -> (B, 3, S, S), the crops.
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
    """Keep the images of BatchLoaders on their GPU for the block, where they fit.

    What makes many passes asks for it. A single pass is as fast from the host, and a loader that
    outlives its stage, as a notebook's does, must not hold gigabytes.
    """
    # A DataLoader, or None for no validation, has no images to move.
    ours = [loader for loader in loaders if isinstance(loader, BatchLoader)]
    try:
        for loader in ours:
            loader.move_images()
        yield
    finally:
        for loader in ours:
            loader.give_images_back()


def training_form(cfg):
    """The stored form that a config trains on: the whole picture for random crops, else "eval"."""
    if cfg.crop_scale:
        return "whole"
    return "eval"


def load_labelled(cfg, data):
    """(training Split, validation Split) that a config wants, decoded or from the cache.

    Raises UserError where the data cannot be decoded or the cache not be written.
    """
    train = load_data(data, "training", training_form(cfg), cfg.image_size)
    # Validation is scored on the reference crop, whatever the training views are.
    valid = load_data(data, "validation", "eval", cfg.image_size)
    return train, valid


def loaders_of(train, valid, cfg, device):
    """(training BatchLoader, validation BatchLoader) of two Splits."""
    train_loader = BatchLoader(train, cfg, device, train=True)
    # Nothing is kept for a backward pass, so larger batches fit.
    valid_loader = BatchLoader(valid, cfg, device, batch_size=2 * cfg.batch_size)
    return train_loader, valid_loader


def build_loaders(cfg, data, device):
    """(training BatchLoader, validation BatchLoader) of a config: its views, and the eval form.

    Raises UserError as `load_labelled` does.
    """
    train, valid = load_labelled(cfg, data)
    return loaders_of(train, valid, cfg, device)


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
    net = nn.Sequential()
    net.add_module("stem", stem)  # (B, 48, H / 4, W / 4)
    net.add_module("layer1", dwpw_conv(48, 64, stride=1))  # (B, 64, H / 4, W / 4)
    net.add_module("layer2", dwpw_conv(64, 128))  # (B, 128, H / 8, W / 8)
    net.add_module("layer3", dwpw_conv(128, 256))  # (B, 256, H / 16, W / 16)
    net.add_module("pool", GlobalAvgPool())  # (B, 256)
    net.add_module("fc", nn.Linear(256, NUM_CLASSES))
    return net


def stacked(cfg, stem, block):
    """stem, then layer1, layer2, ... as the config says, then pool and classifier.

    block(in_channels, out_channels, stride) builds one block of a layer; only the first of a layer
    has the layer's stride and changes the width.
    """
    net = nn.Sequential()
    net.add_module("stem", stem)
    in_channels = cfg.stem_width
    shapes = zip(cfg.widths, cfg.depths, cfg.strides, strict=True)
    for number, (out_channels, depth, stride) in enumerate(shapes, 1):
        layer = nn.Sequential(block(in_channels, out_channels, stride))
        for _ in range(1, depth):
            layer.append(block(out_channels, out_channels, 1))
        net.add_module(f"layer{number}", layer)
        in_channels = out_channels
    net.add_module("pool", GlobalAvgPool())
    net.add_module("fc", nn.Linear(in_channels, NUM_CLASSES))
    return net


def dwpw_student(cfg):
    """A student of dwpw_conv blocks: (B, 3, H, W) -> logits (B, 11).

    The stem is the teacher's shape (7x7 stride 2, max-pool); widths, depths, strides and kernel
    come from `cfg`. With strides 1, 2, 2 its maps have the teacher's sizes (1/4, 1/8, 1/16).
    """
    # (B, 3, H, W) -> (B, stem_width, H / 4, W / 4)
    stem = nn.Sequential(
        nn.Conv2d(3, cfg.stem_width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(cfg.stem_width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    )

    def block(in_channels, out_channels, stride):
        # Kernels are odd (see Config), so a map keeps its size where the stride is 1.
        padding = cfg.kernel_size // 2
        return dwpw_conv(in_channels, out_channels, cfg.kernel_size, stride, padding)

    return stacked(cfg, stem, block)


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

    Late layers without a stride keep large feature maps, which cost multiply-adds, no parameters.
    """
    # (B, 3, H, W) -> (B, stem_width, H / 2, W / 2)
    stem = conv_bn(3, cfg.stem_width, 3, 2)

    def block(in_channels, out_channels, stride):
        return InvertedResidual(in_channels, out_channels, cfg.kernel_size, stride, cfg.expansion)

    return stacked(cfg, stem, block)


def resnet(cfg):
    """torchvision's ResNet `cfg.student` with 11 classes and fresh weights."""
    return torchvision.models.get_model(cfg.student, num_classes=NUM_CLASSES)


NETS = {
    "sample": sample_student,
    "dwpw": dwpw_student,
    "ir": ir_student,
    "resnet18": resnet,
    "resnet34": resnet,
    "resnet50": resnet,
}


def build_student(cfg):
    """The net that `cfg` trains, its weights drawn from cfg.seed.

    The global random state is left alone. UserError for a name that is not in NETS.
    """
    if cfg.student not in NETS:
        name = printable(repr(cfg.student))
        raise UserError(f"student={name}: allowed is one of {', '.join(NETS)}")
    # Weights are drawn on the CPU, whose generator is put back after the block.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return NETS[cfg.student](cfg)


def get_student_model():
    """The course's name for the student: the net of the last stage."""
    last_stage = list(STAGES.values())[-1]
    return build_student(last_stage)


def check_budget(model, limit=PARAM_LIMIT, image_size=64):
    """The number of parameters of `model`, counted the strict way; UserError above `limit`.

    Strict is the larger of two counts. All parameters once, trained or frozen: that catches a bare
    nn.Parameter. Each module's own parameters once for each call: that catches a module called
    twice, which the course's tool counts twice. A stage is checked when it is prepared, and again
    before its student predicts. A block that stands alone, dwpw_conv(64, 128), is counted too.

    image_size: the count does not depend on it, but a net may take images of one size alone.
    """
    # parameters() yields a tensor that two modules share once.
    once = sum(p.numel() for p in model.parameters())
    at_each_call = sum(own for _, _, own in trace_calls(model, image_size))
    count = max(once, at_each_call)
    if count > limit:
        raise UserError(
            f"the student has {count:,} parameters; the homework allows {limit:,}: "
            "choose smaller widths"
        )
    return count


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


MODEL = "(model)"  # the name of a net itself among its layers
HIDDEN_LAYER = "(hidden)"  # the name of a layer that a net calls and does not know as its own


def check_no_hidden_layers(model, image_size):
    """UserError where a net holds layers in a plain list, or builds them in forward.

    An optimizer does not see such layers, and a state dict does not hold them.
    """
    if any(name == HIDDEN_LAYER for name, _, _ in trace_calls(model, image_size)):
        raise UserError(
            "the student calls layers that are not its own, so they are neither trained nor saved: "
            "hold them in an nn.ModuleList or nn.Sequential, not in a plain list"
        )


@contextlib.contextmanager
def every_layer_called():
    """Without torch's fused attention for the block: in eval mode it calls none of its layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def trace_calls(model, image_size):
    """[(name, output shape, own parameters)] for every call of a module that has parameters."""
    names = {module: name or MODEL for name, module in model.named_modules()}
    calls = []

    def record(module, inputs, output):
        # The children's parameters are counted at the children's own calls.
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if own:
            calls.append((names.get(module, HIDDEN_LAYER), shape_without_batch(output), own))

    with (
        every_layer_called(),
        evaluation_mode(model) as device,
        # For all modules there are, so that one which the net holds in a plain list is seen too.
        nn.modules.module.register_module_forward_hook(record),
    ):
        try:
            model(torch.zeros(1, 3, image_size, image_size, device=device))
        except RuntimeError:
            # A net that fails on images shows its own error; only a block gets a second try.
            channels = first_channels(model)
            if channels in (None, 3):
                raise
            # It is no net but a block, which takes feature maps.
            # The calls before the error would be counted twice.
            calls.clear()
            model(torch.zeros(1, channels, image_size, image_size, device=device))
    return calls


def shape_without_batch(output):
    """The shape of what a module gives for one image; of several outputs the first's.

    () where it is no tensor, as a dict.
    """
    if isinstance(output, (tuple, list)) and output:  # as attention and recurrent layers answer
        return shape_without_batch(output[0])
    if isinstance(output, torch.Tensor):
        return tuple(output.shape[1:])
    return ()


def first_channels(model):
    """What the first convolution of a model takes, None without one."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return None


def macs_by_module(model, image_size):
    """{module's name: multiply-adds for one image}; "" is the whole model.

    torch counts the operations of convolutions and matrix products: two to a multiply-add.
    """
    counter = FlopCounterMode(display=False)
    with every_layer_called(), evaluation_mode(model) as device, counter:
        model(torch.zeros(1, 3, image_size, image_size, device=device))
    macs = {}
    for name, operations in counter.get_flop_counts().items():
        # torch's names begin with the model's class, the whole is called Global.
        inside = name.partition(".")[2]
        macs[inside] = sum(operations.values()) // 2
    macs[""] = counter.get_total_flops() // 2
    return macs


def count_macs(model, image_size):
    """Multiply-adds of convolutions and linear layers for one image; nan where torch cannot count.

    The number only stands in a table: a trained student keeps its CSV without it.
    """
    with illustration():
        return macs_by_module(model, image_size)[""]
    # Reached where the count failed, for `illustration` lets the block end early.
    return math.nan


@illustration()
def layer_table(model, image_size=224):
    """A DataFrame of output shape, parameters and multiply-adds, and their sum.

    A row is a layer, or a block of layers (layer1.0, layer1.1, ...).
    """
    macs = macs_by_module(model, image_size)
    own_macs = without_children(macs)
    rows = []
    for name, shape, parameters in trace_calls(model, image_size):
        output = " x ".join(map(str, shape))
        # Those of all calls stand at the first. There are none for what is no convolution or
        # product, batch norm for example.
        rows.append((name, output, parameters, own_macs.pop(name, 0)))
    frame = pd.DataFrame(rows, columns=["layer", "output", "parameters", "multiply-adds"])
    # "layer1.0.expand.0" belongs to the block "layer1.0".
    block = frame["layer"].str.split(".").str[:2].str.join(".")
    # In the order of the forward pass; a block's output is that of its last layer.
    frame = frame.groupby(block, sort=False).agg(
        {"output": "last", "parameters": "sum", "multiply-adds": "sum"}
    )
    frame.loc["all"] = ["", frame["parameters"].sum(), macs[""]]
    return frame


def without_children(macs):
    """{module's name: multiply-adds} as `macs_by_module` gives them, less those of its children."""
    own = {}
    for name, count in macs.items():
        children = [other for other in macs if other and other.rpartition(".")[0] == name]
        own[name or MODEL] = count - sum(macs[child] for child in children)
    return own


# ==================================================================================================
# 5  Teacher
# ==================================================================================================


# What profilers and averaged models leave beside a net's own entries.
HARMLESS_ENTRIES = {"n_averaged", "total_ops", "total_params"}


def state_dicts_in(saved):
    """[(its name in the file, {key: tensor})]: everything in a loaded file that may be a net.

    The file itself comes first, under the name "". What is no tensor is left out.
    """
    found = []
    # A queue: outer dicts are looked at before those inside them. The last of each entry are the
    # dicts around it, for a dict in a file may hold itself.
    waiting = [("", saved, [])]
    while waiting:
        name, value, around = waiting.pop(0)
        if not isinstance(value, dict) or any(value is outer for outer in around):
            continue
        tensors = {}
        for key, entry in value.items():
            if isinstance(entry, torch.Tensor):
                tensors[str(key)] = entry
            elif isinstance(entry, dict):
                waiting.append((f"{name}.{key}".lstrip("."), entry, [*around, value]))
        if tensors:
            found.append((name, tensors))
    return found


def prefixes_before(first_key, tensors):
    """What stands before a net's first key in the keys of a state dict, the shortest first.

    Several where it holds several nets side by side ("student.", "teacher.").
    """
    found = []
    for key in tensors:
        # With a dot before both, so that "deconv1.weight" is not taken for "conv1.weight".
        if f".{key}".endswith(f".{first_key}"):
            found.append(key.removesuffix(first_key))
    outermost = []
    for prefix in sorted(found, key=len):
        # In a ResNet "layer1.0.conv1.weight" ends with the first key too, but lies further in.
        if not prefix.startswith(tuple(outermost)):
            outermost.append(prefix)
    return outermost


def without_prefix(tensors, prefix):
    """What a state dict holds under a prefix; keys that do not begin so are of something else."""
    plain = OrderedDict()
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix)
        is_harmless = name.rpartition(".")[2] in HARMLESS_ENTRIES
        if key.startswith(prefix) and not is_harmless:
            plain[name] = tensor
    return plain


def misfit(state, net):
    """Why a state dict is not one of `net`, in a few words; None where it is."""
    wanted = net.state_dict()
    missing = []
    for key in wanted:
        if key not in state and not key.endswith("num_batches_tracked"):  # old files have none
            missing.append(key)
    if missing:
        return f"it has no {some_of(missing)}"
    other = [key for key in state if key not in wanted]
    if other:
        return f"it also has {some_of(other)}"
    # Every key is one of the net's by now, and only shapes can differ.
    for key, tensor in state.items():
        if tensor.shape != wanted[key].shape:
            ours = " x ".join(map(str, wanted[key].shape))
            theirs = " x ".join(map(str, tensor.shape))
            return f"{key} is {theirs or 'a number'}, not {ours or 'a number'}"
    return None


# What a net's weights may be stored in: int8 and float8 would want a scale beside them.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
COUNTS = (torch.int64, torch.int32, *FLOATS)


def check_values(path, state):
    """UserError naming the first tensor of a state dict that is no trained net's."""
    for key, tensor in state.items():
        why = unusable_values(key, tensor)
        if why:
            raise UserError(f"{path} is not loaded: {key} holds {why}")


def unusable_values(key, tensor):
    """What in a tensor no trained net has, in a few words; None where it may be one's."""
    is_count = key.endswith("num_batches_tracked")
    if tensor.dtype not in (COUNTS if is_count else FLOATS):
        kind = str(tensor.dtype).removeprefix("torch.")
        return f"{kind} values, where floating-point numbers are wanted"
    if tensor.is_meta:
        return "no values, only a shape"
    # In float32 as the net has them: a larger number of float64 becomes infinite there.
    values = tensor.float()
    if not values.isfinite().all():
        return "values that are not finite"
    # Batch norm takes its root, which would make NaN of every answer.
    if key.endswith("running_var") and (values < 0).any():
        return "variances below zero"
    return None


def load_net(path, first_key, net_for, what):
    """A net with the weights of a checkpoint file.

    The state dict may be the whole file or any of its values (state_dict, model, net, teacher,
    ...), and its keys may have a prefix in common (module., model., _orig_mod.), which is what
    stands before `first_key`, a key of the net. net_for(state dict without the prefix) -> the net
    that it may belong to. what: the net in words, for the message. Raises UserError saying what the
    file holds instead, which tensor is not usable, or that it holds several such nets.
    """
    saved = load_file(path)
    fitting = {}
    reasons = []
    for name, state in candidates_in(saved, first_key):
        net = net_for(state)
        why = misfit(state, net)
        if why:
            reasons.append(why)
        else:
            fitting[name] = (net, state)
    if not fitting:
        holds = describe_contents(saved)
        # The first misfit belongs to the outermost dict that looked like a net.
        why = f"{reasons[0]}; " if reasons else ""
        raise UserError(f"{path} is not loaded: it is no {what} ({why}it holds {holds})")
    name = the_one_to_take(path, list(fitting))
    net, state = fitting[name]
    check_values(path, state)
    net.load_state_dict(state, strict=False)  # strict but for num_batches_tracked, see `misfit`
    return net


def candidates_in(saved, first_key):
    """(name, state dict without its prefix) of all that may be a net in a loaded file."""
    for name, tensors in state_dicts_in(saved):
        prefixes = prefixes_before(first_key, tensors)
        for prefix in prefixes:
            whole_name = name
            if len(prefixes) > 1:  # only then it says something
                whole_name = f"{name}.{prefix}".strip(".")
            yield whole_name, without_prefix(tensors, prefix)


def the_one_to_take(path, names):
    """Which of several fitting state dicts is loaded; UserError where none is the plain one."""
    if len(names) == 1:
        return names[0]
    # In order of preference: the file itself, then the names that training scripts use.
    for usual in ("", "state_dict", "model"):
        if usual in names:
            say(f"{path} holds {len(names)} nets; taken is {usual or 'the outer one'}")
            return usual
    raise UserError(
        f"{path} is not loaded: it holds {len(names)} nets ({some_of(names)}): save one of them"
    )


def describe_contents(saved):
    """What a loaded file holds, in at most some 200 characters."""
    if not isinstance(saved, dict):
        return f"a {type(saved).__name__}"
    if not saved:
        return "nothing"
    parts = []
    for key, value in list(saved.items())[:6]:
        if isinstance(value, torch.Tensor):
            parts.append(f"{key} {' x '.join(map(str, value.shape))}".strip())
        elif isinstance(value, dict):
            parts.append(f"{key} ({len(value)} entries)")
        else:
            parts.append(f"{key} ({type(value).__name__})")
    text = ", ".join(parts)
    if len(saved) > len(parts):
        text += f", ... ({len(saved)} entries)"
    # `quoted` makes a stranger's keys printable and short; its quotation marks go.
    return quoted(text, 200)[1:-1]


class AveragedTeachers(nn.Module):
    """Several teachers as one: logits (B, 11) whose softmax is the mean of their probabilities.

    Probabilities are averaged and not logits, for a sure teacher's logits are the larger ones.
    """

    def __init__(self, teachers):
        super().__init__()
        self.members = nn.ModuleList(teachers)

    def forward(self, x):
        # fp32 before the softmax, whatever autocast made of the logits.
        log_p = [F.log_softmax(teacher(x).float(), 1) for teacher in self.members]
        # log of the mean of p, without leaving logarithms: (members, B, 11) -> (B, 11).
        return torch.logsumexp(torch.stack(log_p), 0) - math.log(len(log_p))


def load_teacher(path, device="cpu"):
    """The frozen teacher from a checkpoint with torchvision's ResNet names and 11 classes.

    It is in eval mode, on `device`. path: a file, or a list of files, which become
    AveragedTeachers. Raises UserError saying what a file holds instead.
    """
    paths = path if isinstance(path, (list, tuple)) else [path]
    if not paths or not all(isinstance(one, (str, os.PathLike)) for one in paths):
        raise UserError("load_teacher wants the path of a teacher's file, or a list of paths")
    teachers = [load_resnet(one) for one in paths]
    teacher = teachers[0]
    if len(teachers) > 1:
        teacher = AveragedTeachers(teachers)
    teacher.source = some_of(paths)  # for `introduce_teacher`
    return to_device(freeze(teacher), device)


def load_resnet(path):
    """The ResNet-18, -34 or -50 of a checkpoint, told apart by their layers."""
    return load_net(path, "conv1.weight", resnet_for, f"ResNet of {NUM_CLASSES} classes")


def resnet_for(state):
    """The ResNet that a state dict may belong to, with fresh weights."""
    name = "resnet18"
    # A third convolution is in bottleneck blocks alone; ResNet-34's layer1 has a third block.
    if "layer1.0.conv3.weight" in state:
        name = "resnet50"
    elif "layer1.2.conv1.weight" in state:
        name = "resnet34"
    return build_student(Config(student=name))


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


def soft_labels(logits, temperature):
    """softmax(logits / temperature) over the last dimension, fp32: (..., 11) -> (..., 11)."""
    return F.softmax(logits.float() / temperature, dim=-1)


class TeacherViews:
    """The teacher's logits of K replayable epochs in one flat file: stored once, computed no more.

    Order and draws of epoch e are functions of (seed, e mod K), so a row's view e mod K is always
    the same picture. The file is keyed by all that the logits depend on; one that holds another key
    is refused, never reused. Logits that are not stored yet are NaN, so a file that was half
    filled when the run was killed is filled up later.
    """

    def __init__(self, cfg, loader, teacher_key, dtype=None):
        split = loader.split
        shape = (cfg.teacher_views, len(split), NUM_CLASSES)
        # All that decides what picture a row shows, and how its logits are rounded.
        keys = ("seed", "image_size", "batch_size", "crop_scale")
        keys += ("hflip", "vflip", "rotation", "affine")
        settings = [str(dtype), loader.device.type, rank_and_world()[1]]
        settings += [getattr(cfg, name) for name in keys]
        name = fingerprint(teacher_key, split.ids, split.cache.name, shape, settings)
        self.path = cache_root() / f"teacher-{name}.logits"
        # A cache belongs to a machine, whose first process makes the file.
        if is_first_on_node() and not self.path.is_file():
            self._create(name, shape)
        # Nobody maps the file before it is there.
        barrier()
        self.logits = self._map(name, shape)

    def _create(self, name, shape):
        """The file: its key, then NaN for every logit, view by view."""
        n_views, n_images, n_classes = shape
        nothing_yet = np.full((n_images, n_classes), np.nan, np.float32).tobytes()
        with written_whole(self.path) as temporary, open(temporary, "wb") as file:
            file.write(name.encode())
            # One view at a time, for all K in memory could be gigabytes.
            for _ in range(n_views):
                file.write(nothing_yet)

    def _map(self, name, shape):
        """The logits (K, N, 11) float32, mapped: what is written to them is in the file."""
        # 20 bytes of key, a multiple of 4, as a view of the rest in float32 wants it.
        start = len(name)
        size = start + 4 * math.prod(shape)
        with open(self.path, "rb") as file:
            stored_name = file.read(start)
        # The file's name holds the key too, but a file may be renamed; only its content is trusted.
        if self.path.stat().st_size != size or stored_name != name.encode():
            raise UserError(
                f"{self.path} holds the teacher's logits for other pictures or settings: delete it"
            )
        try:
            # shared: what `write` stores goes into the file, for all processes of the machine.
            flat = torch.from_file(str(self.path), shared=True, size=size, dtype=torch.uint8)
        except RuntimeError:
            raise UserError(
                f"{self.path} cannot be written; set HW13_CACHE to a folder of your own"
            ) from None
        return flat[start:].view(torch.float32).view(shape)

    def read(self, batch, device):
        """Stored logits (B, 11) of a Batch, or None if one of them is not stored yet."""
        # view_epoch is e mod K already: one view, (B,) rows -> (B, 11).
        logits = self.logits[batch.view_epoch, batch.rows]
        # NaN is "not stored yet"; for one of them the teacher answers the whole batch again.
        if logits.isnan().any():
            return None
        return logits.to(device, non_blocking=True)

    def write(self, batch, logits):
        """Store the logits (B, 11) of a Batch."""
        self.logits[batch.view_epoch, batch.rows] = logits.detach().float().cpu()


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


def maps_it_has(model, layers, image):
    """{layer: (1, C, H, W)} for an image, of those of the named layers that a model has and calls.

    A list of layers that forward loops over is not called as a whole, so it has no output.
    """
    names = dict(model.named_modules())
    there = [layer for layer in layers if layer in names]
    return features_of(model, there, image)


def build_adapters(cfg, student, teacher, layers):
    """{layer: module}: a 1x1 convolution where student and teacher differ in width, else nothing.

    Their weights are drawn from cfg.seed; the global random state is left alone.
    """
    # A forward pass tells the widths of any net, a learner's own too.
    image = torch.zeros(1, 3, cfg.image_size, cfg.image_size)
    # (1, C, H, W) for each layer, of which C is of use here.
    ours = maps_it_has(student, layers, image)
    missing = [layer for layer in layers if layer not in ours]
    if missing:
        raise UserError(
            f"{cfg.exp_name} aligns {', '.join(layers)}: the student has no {', '.join(missing)}; "
            "name its layers so and call each as a whole, or set align_weights=()"
        )
    theirs = features_of(teacher, layers, image)
    adapters = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        for layer in layers:
            width = ours[layer].shape[1]
            wanted = theirs[layer].shape[1]
            if width == wanted:
                adapters[layer] = nn.Identity()
            else:
                adapters[layer] = nn.Conv2d(width, wanted, 1)
    return adapters


# What DistillLoss gives: the loss to be minimised, its terms before they are weighed
# ({"ce", "kl", "align"} -> scalars without gradient), and both nets' logits (B, 11).
Distilled = namedtuple("Distilled", "loss terms student_logits teacher_logits")


def taught_functions():
    """The loss, the alignment and the schedule that train where nobody hands in their own."""
    # Returned by a function, for in DistillLoss.__init__ arguments of these names hide them.
    return loss_fn_kd, alignment, loss_weights


class DistillLoss(nn.Module):
    """Student, teacher, adapters and the weighted sum of losses in one object.

    No training step can swap them. forward(images (B, 3, S, S), labels, teacher_logits=None) ->
    Distilled. The teacher does not run where the loss needs labels alone, nor where its logits are
    given and no layers are aligned. Adapters are 1x1 convolutions where a student layer is narrower
    or wider than the teacher's: trained, never counted, never saved with the student. The networks
    run under autocast to `dtype`; the losses are fp32.

    loss_fn_kd, alignment, loss_weights: your own in place of this module's, with the same
    arguments. The loss gets fp32 logits and the true alpha and temperature, and its value is what
    is minimised.
    Raises UserError where a term needs a teacher and there is none.
    """

    def __init__(
        self, cfg, student, teacher=None, loss_fn_kd=None, alignment=None, loss_weights=None
    ):
        super().__init__()
        if cfg.needs_teacher and teacher is None:
            raise UserError(
                f"{cfg.exp_name} needs a teacher: "
                f"put {TEACHER_FILE} into the data folder or use {option('--teacher')}"
            )
        if cfg.aligns and isinstance(teacher, AveragedTeachers):
            raise UserError(f"{cfg.exp_name} aligns layers, which wants a single teacher")
        # A teacher that no term asks about would only cost time, and a checksum in the run's facts.
        if not cfg.needs_teacher:
            teacher = None
        self.cfg = cfg
        self.student = student
        # Stored in __dict__, so that nn.Module does not register it: no optimizer, checkpoint or
        # data-parallel wrapper sees the teacher's weights, and train() does not reach it.
        self.__dict__["teacher"] = None if teacher is None else freeze(teacher)
        standard_loss, standard_alignment, standard_weights = taught_functions()
        self.loss_fn_kd = loss_fn_kd or standard_loss
        self.alignment = alignment or standard_alignment
        self.loss_weights = loss_weights or standard_weights
        self.layers = cfg.aligned_layers
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
        # For the log, before they are weighed.
        terms = kd_terms(student_logits.detach(), labels, teacher_logits, temperature)
        # A learner's own loss need not know of autocast, and may write to what it gets: the
        # teacher's logits, which are stored for later epochs, it gets as a copy.
        both = (student_logits.float(), labels, teacher_logits.float().clone())
        loss = kd * self.loss_fn_kd(*both, alpha, temperature)
        if self.layers:
            term = self.alignment(student_maps, teacher_maps, self.layers, self.adapters)
            loss = loss + align * term
            terms["align"] = term.detach()
        return Distilled(loss, terms, student_logits, teacher_logits)

    def check_answers(self):
        """UserError unless student and teacher give each image eleven logits.

        Asked before pictures are decoded: on a GPU a label without a logit ends the whole program.
        """
        size = self.cfg.image_size
        images = torch.zeros(2, 3, size, size, device=self.device)
        with evaluation_mode(self.student), self._autocast(images):
            answers = {"student": self.student(images)}
            if self.teacher is not None:
                answers["teacher"] = self.teacher(images)
        for net, logits in answers.items():
            if not isinstance(logits, torch.Tensor):
                raise UserError(f"the {net} returns {kind_of(logits)}, where logits are wanted")
            if tuple(logits.shape) != (2, NUM_CLASSES):
                raise UserError(
                    f"the {net} gives two images answers of the shape {tuple(logits.shape)}, "
                    f"where {NUM_CLASSES} logits each are wanted, {(2, NUM_CLASSES)}"
                )

    def _autocast(self, images):
        return torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None)


def kd_terms(student_logits, labels, teacher_logits, temperature):
    """{"ce", "kl"}: the two terms of loss_fn_kd, CE and T^2 KL, before they are weighed."""
    return {
        "ce": F.cross_entropy(student_logits.float(), labels),
        "kl": loss_fn_kd(student_logits, labels, teacher_logits, 1.0, temperature),
    }


# --- checking a learner's own answers -------------------------------------------------------------

# A check asks an answer and its reference the same made-up questions. Where they differ it asks
# wrong versions too, which a table of mistakes describes: {hint: what is changed in the right
# version}. The mistake that gives what the answer gives is named; two at once are tried last.
# Made-up tensors are on the device that trains, for an answer may be right on one and fail on
# another; a net is asked where it lies.


class WrongAnswer(Exception):
    """What is wrong with a learner's answer, as the end of a sentence."""


def same_tensor(x, y):
    """Whether two tensors are equal but for rounding; NaN equals NaN."""
    if x.shape != y.shape:
        return False
    # Loose enough for sums that are taken in another order.
    return torch.allclose(x.float(), y.float(), rtol=1e-3, atol=1e-4, equal_nan=True)


def same_tensors(given, wanted):
    """Whether all of {what: tensor} are equal but for rounding."""
    return all(same_tensor(given[what], wanted[what]) for what in wanted)


def mistakes_to_try(mistakes):
    """Yield (hint, changes): each mistake alone, then each two that can be made at once."""
    yield from mistakes.items()
    for one, other in itertools.combinations(mistakes, 2):
        # Two mistakes that change the same choice cannot be made at once.
        if not mistakes[one].keys() & mistakes[other].keys():
            yield f"{one}. And: {other}", mistakes[one] | mistakes[other]


def choices_of(right, changes):
    """The choices of a right version with some of them changed, as attributes."""
    return types.SimpleNamespace(**(right | changes))


def named_mistake(given, observe, variant, mistakes):
    """The hint of the mistake with which `observe` sees what it saw of the answer, or None."""
    # The first that fits is named, so the order of the table matters.
    for hint, changes in mistakes_to_try(mistakes):
        # Two mistakes together need not even run.
        with contextlib.suppress(WrongAnswer, RuntimeError, ValueError):
            if same_tensors(given, observe(functools.partial(variant, **changes))):
                return hint
    return None


def seen_of(observe, answer):
    """What `observe` sees of a learner's answer; WrongAnswer where it cannot be asked."""
    try:
        return observe(answer)
    except WrongAnswer:
        # It is an Exception too, which the last case would wrap once more.
        raise
    except UserError as error:
        raise WrongAnswer(str(error)) from None
    except Exception as error:  # whatever a learner's code raises is theirs to read
        # As the empty place of an exercise raises it; torch's own has a text.
        if isinstance(error, NotImplementedError) and not error.args:
            raise WrongAnswer(f"{unwritten_part(error, answer)} is still to be written") from None
        where = line_of_answer(error, answer)
        raise WrongAnswer(f"it raises {type(error).__name__}{where}: {error}") from None


def unwritten_part(error, answer):
    """The function that raised a bare NotImplementedError, where the answer calls it; else "it"."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    raised_by = frame.f_code
    if raised_by is getattr(answer, "__code__", raised_by):
        return "it"
    return f"{raised_by.co_name}, which it calls,"


def line_of_answer(error, answer):
    """ " in line 3" of a cell, where an exception passed through a learner's function; else ""."""
    code = getattr(answer, "__code__", None)
    lines = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        if code and frame.f_code.co_filename == code.co_filename:
            lines.append(line)
    # The last is the innermost.
    return f" in line {lines[-1]}" if lines else ""


def check_order_of_arguments(answer, reference):
    """WrongAnswer where a learner's function has the right arguments in another order."""
    wanted = list(inspect.signature(reference).parameters)
    try:
        given = list(inspect.signature(answer).parameters)
    except (TypeError, ValueError):  # no function; calling it will say so
        return
    if given != wanted and sorted(given) == sorted(wanted):
        raise WrongAnswer(f"the order of the arguments is {', '.join(wanted)}")


def check_same_device(given, wanted):
    """WrongAnswer naming the first of {what: tensor} that lies elsewhere than it should."""
    for what, tensor in wanted.items():
        if given[what].device != tensor.device:
            raise WrongAnswer(
                f"{what} lies on {given[what].device}, where the arguments lie on {tensor.device}"
            )


def check_unchanged(given, before, name):
    """WrongAnswer where an answer has written to the logits that it was given."""
    if not torch.equal(given, before):
        raise WrongAnswer(
            f"it changes {name} in place, which others read: write {name} / temperature, not /="
        )


def first_difference(given, wanted):
    """Where two {what: tensor} part first, in words."""
    for what, y in wanted.items():
        x = given[what]
        if x.shape != y.shape:
            return f"{what} has the shape {tuple(x.shape)}, not {tuple(y.shape)}"
        if not same_tensor(x, y):
            # NaN counts as the largest difference.
            place = (x - y).abs().nan_to_num(math.inf).flatten().argmax()
            return (
                f"{what} is {short(x.flatten()[place])} where {short(y.flatten()[place])} is wanted"
            )
    return "nothing differs"


def short(number):
    """A number with at most four digits behind the point."""
    return f"{number:.4f}".rstrip("0").rstrip(".")


def say_not_yet(why):
    """Print what is wrong with an answer; returns False."""
    text = str(why)
    if not text.endswith((".", "?")):
        text += "."
    print(f"Not yet: {text}")
    return False


def judge(answer, reference, observe, variant, mistakes, name=None):
    """Print "Right ..." or "Not yet: ..." with the reason, and return True or False.

    answer, reference: a learner's function and this module's. observe(function) -> what comes out
    of it, {what: tensor}. variant(*arguments, **changes): the function with a mistake. name: of
    the reference, where its own says less.
    """
    # Outside of the try, for an error of the reference is not the learner's.
    wanted = observe(reference)
    try:
        check_order_of_arguments(answer, reference)
        given = seen_of(observe, answer)
        check_same_device(given, wanted)
        if not same_tensors(given, wanted):
            known = named_mistake(given, observe, variant, mistakes)
            unknown = f"{first_difference(given, wanted)}, and that is no known mistake"
            raise WrongAnswer(known or unknown)
    except WrongAnswer as why:
        return say_not_yet(why)
    print(f"Right: it agrees with {name or reference.__name__}.")
    return True


def kind_of(value):
    """What an answer returned, in words."""
    if value is None:
        return "nothing (is the return statement missing?)"
    return f"a {type(value).__name__}"


def as_tensor(value, shape):
    """What an answer returned, if it is a tensor of that shape; else WrongAnswer."""
    if not isinstance(value, torch.Tensor):
        raise WrongAnswer(f"it returns {kind_of(value)}, where a tensor is wanted")
    if tuple(value.shape) != shape:
        wanted = f"the shape {shape}"
        if shape == ():
            wanted = "a scalar"
        raise WrongAnswer(f"it returns the shape {tuple(value.shape)}, where {wanted} is wanted")
    return value


def gradients_of(value, inputs):
    """{what: gradient} of a scalar for {name: input}, zero where it does not depend on one."""
    if isinstance(value, (int, float)):
        raise WrongAnswer("it returns a plain number, which has no gradient: leave out .item()")
    value = as_tensor(value, ())
    if not value.requires_grad:
        raise WrongAnswer(
            "its value has no gradient, so nothing could learn from it: "
            "leave out .detach(), .item() and torch.no_grad()"
        )
    gradients = torch.autograd.grad(
        value, list(inputs.values()), allow_unused=True, materialize_grads=True
    )
    named = {}
    for name, gradient in zip(inputs, gradients, strict=True):
        named[f"the gradient for {name}"] = gradient
    return named


# The soft labels.

# power: the logits are multiplied by T to this power. dim: of the softmax.
RIGHT_SOFT_LABELS = {
    "power": -1,
    "dim": -1,
    "log": False,
    "divides_after": False,
    "overflows": False,
}

SOFT_LABEL_MISTAKES = {
    "the logits are multiplied by the temperature: divide by it": {"power": 1},
    "the temperature is not used": {"power": 0},
    "the softmax runs over the batch: it belongs to the last dimension, the classes": {"dim": 0},
    "that is the logarithm of the softmax: softmax, not log_softmax": {"log": True},
    "the temperature divides the probabilities: divide the logits, before the softmax": {
        "power": 0,
        "divides_after": True,
    },
    "exp overflows for very large logits: F.softmax does not, nor does exp "
    "if the largest logit is subtracted first": {"overflows": True},
    "the softmax does not say over which dimension: the classes are the last one, dim=-1": {
        "dim": "left out"
    },
}


def soft_labels_variant(logits, temperature, **changes):
    """soft_labels with some of RIGHT_SOFT_LABELS changed."""
    choices = choices_of(RIGHT_SOFT_LABELS, changes)
    dim = choices.dim
    if dim == "left out":
        # What torch takes then.
        dim = 0 if logits.ndim in (1, 3) else 1
    scaled = logits.float() * temperature**choices.power
    # The exponential of the log-softmax, so that to leave it out is a choice.
    soft = F.log_softmax(scaled, dim)
    if not choices.log:
        soft = soft.exp()
    if choices.overflows:
        powers = scaled.exp()
        soft = powers / powers.sum(dim, keepdim=True)
    if choices.divides_after:
        soft = soft / temperature
    return soft


def observe_soft_labels(function):
    """The soft labels of a batch, one picture, two batches, and logits for which exp overflows."""
    logits = 3 * torch.randn(6, NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    logits = logits.to(pick_device())
    # (6, 11), (11,), (2, 3, 11) and (6, 11): dim=1 fails on the second, no dim at all means
    # another one for the third, and a bare exp overflows on the last.
    cases = {
        "the soft labels of a batch": (logits, 4.0),
        "those of one picture": (logits[0], 2.0),
        "those of two batches": (logits.reshape(2, 3, NUM_CLASSES), 3.0),
        "those of very large logits": (300 * logits, 1.0),
    }
    seen = {}
    for what, (case, temperature) in cases.items():
        # A copy, by which writing in place is noticed.
        given = case.clone()
        try:
            soft = function(given, temperature)
        except IndexError:
            raise WrongAnswer(
                "it fails for the logits of one picture, (11,): "
                "the classes are the last dimension, dim=-1"
            ) from None
        check_unchanged(given, case, "logits")
        at = f"{what} at T = {temperature:g}: one of them"
        seen[at] = as_tensor(soft, tuple(case.shape)).detach()
    return seen


def check_soft_labels(answer):
    """Tell a learner whether their soft_labels(logits, temperature) is right: True or False."""
    mistakes = SOFT_LABEL_MISTAKES
    return judge(answer, soft_labels, observe_soft_labels, soft_labels_variant, mistakes)


# The loss of distillation. The choices of the right version, and what a mistake makes of them.

RIGHT_KD = {
    "kl_div": ("log p", "q"),  # its arguments; p is the student's distribution, q the teacher's
    "is_cross_entropy": False,  # without the entropy of the second: the same gradient, if it is q
    "divisor": "batch",
    "sign": 1,
    "dim": 1,
    "student_power": 1,  # logits are divided by T to this power
    "teacher_power": 1,
    "soft_weight": "alpha",
    "soft_power": 2,  # the soft loss is multiplied by T to this power
    "hard_input": "logits",
    "hard_weight": "1 - alpha",
    "hard_power": 0,
    "hard_reduction": "mean",
    "swaps_nets": False,
    "swaps_numbers": False,
}

KD_MISTAKES = {
    "student and teacher are swapped inside the KL. F.kl_div(log_p, q) computes KL(q || p): "
    "the student's logarithms come first, the teacher's probabilities second": {
        "kl_div": ("log q", "p")
    },
    "student and teacher are swapped inside the cross-entropy: it is the teacher's probabilities "
    "times the student's logarithms": {"kl_div": ("log q", "p"), "is_cross_entropy": True},
    "reduction='mean' divides by the classes too (11 times too small): use 'batchmean'": {
        "divisor": "batch and classes"
    },
    "reduction='sum' grows with the batch: use 'batchmean'": {"divisor": "nothing"},
    "F.kl_div wants log-probabilities of the student first: log_softmax, not softmax": {
        "kl_div": ("p", "q")
    },
    "F.kl_div wants the teacher's probabilities, not their logarithm": {
        "kl_div": ("log p", "log q")
    },
    "the arguments of F.kl_div are in the wrong order: "
    "the student's logarithms come first, the teacher's probabilities second": {
        "kl_div": ("q", "log p")
    },
    "F.kl_div has the teacher's probabilities first and the student's second: "
    "it wants the student's logarithms first, the teacher's probabilities second": {
        "kl_div": ("q", "p")
    },
    "the soft loss has the wrong sign": {"sign": -1},
    "the soft loss is not multiplied by temperature ** 2": {"soft_power": 0},
    "the soft loss is multiplied by temperature, not by its square": {"soft_power": 1},
    "T ** 2 multiplies both losses: the labels' loss knows no temperature": {"hard_power": 2},
    "the student's logits are not divided by the temperature": {"student_power": 0},
    "the teacher's logits are not divided by the temperature": {"teacher_power": 0},
    "neither net's logits are divided by the temperature": {
        "student_power": 0,
        "teacher_power": 0,
    },
    "logits are multiplied by the temperature: divide by it": {
        "student_power": -1,
        "teacher_power": -1,
    },
    "the softmax runs over the batch (dim=0): it belongs over the classes, dim=1": {"dim": 0},
    "student and teacher are swapped in both losses": {"swaps_nets": True},
    "alpha and temperature are swapped: the arguments are (..., alpha, temperature)": {
        "swaps_numbers": True
    },
    "alpha weighs the labels instead of the soft loss": {
        "soft_weight": "1 - alpha",
        "hard_weight": "alpha",
    },
    "the labels' loss is not multiplied by 1 - alpha": {"hard_weight": "1"},
    "the labels' loss is multiplied by alpha: it wants 1 - alpha": {"hard_weight": "alpha"},
    "the soft loss is not multiplied by alpha": {"soft_weight": "1"},
    "the labels' loss is missing, or detached from its gradient": {"hard_weight": "0"},
    "the soft loss is missing, or detached from its gradient": {"soft_weight": "0"},
    "the cross-entropy sees logits divided by the temperature: it wants the plain ones": {
        "hard_input": "logits / T"
    },
    "the cross-entropy gets probabilities: F.cross_entropy wants logits": {
        "hard_input": "probabilities"
    },
    "the cross-entropy is summed over the batch: it wants the mean": {"hard_reduction": "sum"},
}


def soft_variant(student_logits, teacher_logits, temperature, choices):
    """The soft loss as the choices have it."""
    # (B, 11) each: p is the student's distribution, q the teacher's, as in RIGHT_KD.
    log_p = F.log_softmax(student_logits / temperature**choices.student_power, choices.dim)
    log_q = F.log_softmax(teacher_logits / temperature**choices.teacher_power, choices.dim)
    distributions = {"log p": log_p, "p": log_p.exp(), "log q": log_q, "q": log_q.exp()}
    first, second = (distributions[name] for name in choices.kl_div)
    # Summed here and divided below, so that the divisor is a choice.
    total = choices.sign * F.kl_div(first, second, reduction="sum")
    if choices.is_cross_entropy:
        total = -choices.sign * (second * first).sum()
    divisors = {"batch": len(log_p), "batch and classes": log_p.numel(), "nothing": 1}
    return total / divisors[choices.divisor]


def hard_variant(student_logits, labels, temperature, choices):
    """The labels' loss as the choices have it."""
    inputs = {
        "logits": student_logits,
        "logits / T": student_logits / temperature,
        "probabilities": F.softmax(student_logits, 1),
    }
    return F.cross_entropy(inputs[choices.hard_input], labels, reduction=choices.hard_reduction)


def kd_variant(student_logits, labels, teacher_logits, alpha, temperature, **changes):
    """loss_fn_kd with some of RIGHT_KD changed."""
    choices = choices_of(RIGHT_KD, changes)
    if choices.swaps_numbers:
        # Put back, else the call below would swap again.
        changes = changes | {"swaps_numbers": False}
        return kd_variant(student_logits, labels, teacher_logits, temperature, alpha, **changes)
    if choices.swaps_nets:
        # Put back, for the same reason.
        changes = changes | {"swaps_nets": False}
        return kd_variant(teacher_logits, labels, student_logits, alpha, temperature, **changes)
    soft_loss = soft_variant(student_logits, teacher_logits, temperature, choices)
    hard_loss = hard_variant(student_logits, labels, temperature, choices)
    weights = {"alpha": alpha, "1 - alpha": 1 - alpha, "1": 1, "0": 0}
    soft_weight = weights[choices.soft_weight] * temperature**choices.soft_power
    hard_weight = weights[choices.hard_weight] * temperature**choices.hard_power
    return soft_weight * soft_loss + hard_weight * hard_loss


def kd_test_cases():
    """Arguments to try a loss_fn_kd with: six made-up images, three alphas and temperatures."""
    generator = torch.Generator().manual_seed(0)
    both = 3 * torch.randn(2, 6, NUM_CLASSES, generator=generator)
    student, teacher = both.to(pick_device())
    labels = torch.randint(NUM_CLASSES, (6,), generator=generator).to(pick_device())
    numbers = ((0.3, 4.0), (0.8, 2.0), (0.55, 3.0))
    return [(student, labels, teacher, alpha, t) for alpha, t in numbers]


def observe_kd(function):
    """(values, gradients for the student's logits) of a loss_fn_kd on the test cases, by case."""
    values = {}
    gradients = {}
    for student, labels, teacher, alpha, temperature in kd_test_cases():
        # One tensor serves all cases, for autograd.grad does not add up in .grad.
        student = student.requires_grad_()
        # A copy, by which writing in place is noticed.
        given = teacher.clone()
        value = function(student, labels, given, alpha, temperature)
        check_unchanged(given, teacher, "teacher_logits")
        case = f"at alpha = {alpha}, T = {temperature:g}"
        gradients |= gradients_of(value, {f"the student's logits {case}": student})
        values[f"its value {case}"] = value.detach().float()
    return values, gradients


def check_loss_fn_kd(my_loss):
    """Tell a learner whether their own loss_fn_kd is right, else which known mistake it looks like.

    my_loss(student_logits, labels, teacher_logits, alpha, temperature) -> scalar. Gradients decide,
    for they are what trains: a loss with another value and the same gradient is right. Prints a
    line, returns True or False.
    """
    wanted_values, wanted = observe_kd(loss_fn_kd)
    try:
        check_order_of_arguments(my_loss, loss_fn_kd)
        values, gradients = seen_of(observe_kd, my_loss)
        check_same_device(values, wanted_values)
        if not same_tensors(gradients, wanted):
            known = named_mistake(
                gradients, lambda function: observe_kd(function)[1], kd_variant, KD_MISTAKES
            )
            raise WrongAnswer(known or unknown_kd_mistake(values, wanted_values))
        # Training stops at a loss that is not finite, however good its gradient.
        if not torch.stack(list(values.values())).isfinite().all():
            raise WrongAnswer("its value is not a finite number")
    except WrongAnswer as why:
        return say_not_yet(why)
    if same_tensors(values, wanted_values):
        print("Right: it agrees with loss_fn_kd.")
    else:
        print(
            "Right: it has the gradient of loss_fn_kd and another value, and the gradient is what "
            "trains. Cross-entropy with soft labels is such a loss: it is the KL plus the "
            "teacher's entropy, which no student can change."
        )
    return True


def unknown_kd_mistake(values, wanted_values):
    """In words, how a loss differs from loss_fn_kd by no mistake of the table."""
    if same_tensors(values, wanted_values):
        return "its value is right, but its gradient is not: is a part of it detached?"
    return f"{first_difference(values, wanted_values)}, and that is no known mistake"


# The depthwise-separable block.

RIGHT_DWPW = {
    "groups": None,  # one for each channel
    "pointwise_groups": False,
    "pointwise_first": False,
    "stride_on": "depthwise",
    "always_stride": None,  # the argument
    "always_padding": None,  # the argument
    "always_kernel": None,  # the argument
    "pointwise_is_1x1": True,
    "pointwise_pads": False,
    "bias": True,
    "normed": (0, 1),  # after which of the two convolutions there is a batch norm
    "activation": functools.partial(nn.LeakyReLU, 0.01),
    "active": (0, 1),  # after which of the two convolutions
    "norm_last": False,
}

DWPW_MISTAKES = {
    "the first convolution is a full one: give it groups=in_channels": {"groups": 1},
    "the pointwise convolution has groups: it must mix all channels": {"pointwise_groups": True},
    "the order is pointwise, depthwise: space comes first": {"pointwise_first": True},
    "the stride belongs to the depthwise convolution, not to the pointwise one": {
        "stride_on": "pointwise"
    },
    "the stride belongs to the depthwise convolution alone": {"stride_on": "both"},
    "the argument stride is not used: it is always 1": {"always_stride": 1},
    "the argument stride is not used: it is always 2": {"always_stride": 2},
    "the second convolution has the argument kernel_size: a pointwise one is 1 x 1": {
        "pointwise_is_1x1": False
    },
    "the second convolution has the arguments kernel_size and padding: a pointwise one is 1 x 1, "
    "and pads nothing": {"pointwise_is_1x1": False, "pointwise_pads": True},
    "the argument padding is not used": {"always_padding": 1},
    "the convolutions do not pad: hand the argument padding on": {"always_padding": 0},
    "the argument kernel_size is not used": {"always_kernel": 3},
    "the convolutions have no bias; the course's have one": {"bias": False},
    "the batch norms are missing": {"normed": ()},
    "there is no batch norm after the depthwise convolution": {"normed": (1,)},
    "there is no batch norm after the pointwise convolution": {"normed": (0,)},
    "the activations are missing": {"active": ()},
    "there is no activation between the two convolutions": {"active": (1,)},
    "there is no activation at the end": {"active": (0,)},
    "the activation is ReLU: it should be LeakyReLU(0.01)": {"activation": nn.ReLU},
    "the activation's slope is 0.1: it should be LeakyReLU(0.01)": {
        "activation": functools.partial(nn.LeakyReLU, 0.1)
    },
    "the activation's slope is 0.2: it should be LeakyReLU(0.01)": {
        "activation": functools.partial(nn.LeakyReLU, 0.2)
    },
    "the activation comes before the batch norm: it should follow it": {"norm_last": True},
}


def dwpw_variant(in_channels, out_channels, kernel_size=3, stride=2, padding=1, **changes):
    """dwpw_conv with some of RIGHT_DWPW changed."""
    choices = choices_of(RIGHT_DWPW, changes)
    kernel_size = choices.always_kernel or kernel_size
    stride = choices.always_stride or stride
    if choices.always_padding is not None:
        padding = choices.always_padding
    window = (kernel_size, stride, padding)
    convolutions = [
        depthwise_variant(in_channels, out_channels, *window, choices),
        pointwise_variant(in_channels, out_channels, *window, choices),
    ]
    if choices.pointwise_first:
        convolutions.reverse()
    block = nn.Sequential()
    for number, convolution in enumerate(convolutions):
        block.append(convolution)
        block.extend(norm_and_activation(convolution.out_channels, number, choices))
    return block


def depthwise_variant(in_channels, out_channels, kernel_size, stride, padding, choices):
    """The convolution that sees space, as the choices have it."""
    if choices.stride_on == "pointwise":
        stride = 1
    # It keeps the number of channels.
    width = out_channels if choices.pointwise_first else in_channels
    groups = choices.groups or width
    return nn.Conv2d(width, width, kernel_size, stride, padding, groups=groups, bias=choices.bias)


def pointwise_variant(in_channels, out_channels, kernel_size, stride, padding, choices):
    """The convolution that mixes channels, as the choices have it."""
    if choices.stride_on == "depthwise":
        stride = 1
    if choices.pointwise_is_1x1:
        kernel_size = 1
    if not choices.pointwise_pads:
        padding = 0
    # The most groups that divide both widths.
    groups = math.gcd(in_channels, out_channels) if choices.pointwise_groups else 1
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=choices.bias
    )


def norm_and_activation(channels, number, choices):
    """The layers after the convolution of this number, 0 or 1, as the choices have them."""
    layers = []
    if number in choices.normed:
        layers.append(nn.BatchNorm2d(channels))
    if number in choices.active:
        layers.append(choices.activation())
    if choices.norm_last:
        layers.reverse()
    return layers


def fill_with_numbers(parameters):
    """Give parameters values that depend on their order alone."""
    # Blocks with the same layers then give the same output, whatever weights they began with.
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        numbers = torch.randn(parameter.shape, generator=generator) / 3
        # Through .data, for autograd forbids writing to a trained leaf in place.
        parameter.data = numbers.to(parameter.device)


def parameters_as_called(block, images):
    """The parameters of a block in the order in which its layers are called."""
    layers = []

    def note(layer, inputs):
        layers.append(layer)

    with contextlib.ExitStack() as hooks:
        for layer in block.modules():
            hooks.enter_context(layer.register_forward_pre_hook(note))
        block(images)
    parameters = []
    # Each layer once, in the order of its first call.
    for layer in dict.fromkeys(layers):
        parameters += layer.parameters(recurse=False)
    return parameters


def observe_block(function):
    """Of blocks with several settings: the number of parameters, and output for fixed weights."""
    # Eight channels, which is what every block below takes.
    # Large enough for two convolutions of 5 x 5 without padding, a mistake that shall be named.
    images = torch.randn(4, 8, 24, 24, generator=torch.Generator().manual_seed(1))
    seen = {}
    # (in, out, kernel_size, stride, padding); each of the last three leaves its default once.
    for settings in ((8, 12), (8, 12, 3, 1, 1), (8, 12, 5, 2, 2), (8, 12, 5, 2, 0)):
        block = function(*settings)
        if not isinstance(block, nn.Module):
            raise WrongAnswer(f"it returns {kind_of(block)}, where a module is wanted")
        count = sum(parameter.numel() for parameter in block.parameters())
        # A block may put itself on the device that trains.
        on_device = images.to(next(block.parameters(), images).device)
        # In the order of calls, so that it does not matter in which order a block defines its
        # layers.
        fill_with_numbers(parameters_as_called(block, on_device))
        # In training mode: batch norm uses the batch's own statistics and needs no stored ones.
        output = block(on_device).detach().cpu()
        block_name = f"the block of {settings}"
        seen[f"the number of parameters in {block_name}"] = torch.tensor(float(count))
        seen[f"the output of {block_name}"] = output
    return seen


def check_dwpw_conv(answer):
    """Tell a learner whether their dwpw_conv is the course's block, in count and in output.

    answer(in_channels, out_channels, kernel_size, stride, padding) -> module. Prints a line,
    returns True or False.
    """
    return judge(answer, dwpw_conv, observe_block, dwpw_variant, DWPW_MISTAKES)


# The student.


def check_student(answer, image_size=64, limit=PARAM_LIMIT):
    """Tell a learner whether their own student can be trained and submitted: True or False.

    answer: a net, or a class or function without arguments that builds one. It must give logits
    (B, 11) for images (B, 3, H, W) of any size, also for a single one, have at most `limit`
    parameters, and let gradients reach every parameter.
    """
    try:
        # A copy, for the checks change its mode and leave gradients.
        student = seen_of(lambda build: copy.deepcopy(build_own(build)), answer)
        # As a net is built: it must run, then fit the limit, then learn. The first fault is told.
        seen_of(lambda net: draw_lazy_weights(net, image_size), student)
        seen_of(lambda net: check_no_hidden_layers(net, image_size), student)
        seen_of(lambda net: check_logits(net, image_size), student)
        count = seen_of(lambda net: check_budget(net, limit, image_size), student)
        seen_of(lambda net: check_gradients(net, image_size), student)
    except WrongAnswer as why:
        return say_not_yet(why)
    frozen = sum(p.numel() for p in student.parameters() if not p.requires_grad)
    trained = f"{frozen:,} of them are frozen" if frozen else "every one is trained"
    print(f"Right: {count:,} parameters, {limit - count:,} under the limit; {trained}.")
    return True


def build_own(student):
    """The net that is handed in, or that the class or function handed in builds."""
    net = student
    if not isinstance(student, nn.Module):
        net = student()
    if not isinstance(net, nn.Module):
        raise WrongAnswer(f"it builds {kind_of(net)}, where a module is wanted")
    return net


def check_logits(net, image_size):
    """WrongAnswer unless a net gives each image its own eleven logits, whatever their size."""
    generator = torch.Generator().manual_seed(0)
    # Several sizes, for a net that flattens its maps fits one alone.
    for side in (image_size, 100, 224):
        images = torch.randn(3, 3, side, side, generator=generator)
        with evaluation_mode(net) as device:
            images = images.to(device)
            try:
                together = as_tensor(net(images), (3, NUM_CLASSES))
                again = as_tensor(net(images), (3, NUM_CLASSES))
                alone = as_tensor(net(images[:1]), (1, NUM_CLASSES))
            except RuntimeError as error:
                why = str(error).splitlines()[0]
                raise WrongAnswer(f"it fails on images of {side} x {side}: {why}") from None
        if not together.isfinite().all():
            raise WrongAnswer("its logits are not finite numbers")
        if not torch.allclose(together, again, rtol=1e-3, atol=1e-3):
            raise WrongAnswer(
                "it answers otherwise each time, in evaluation mode too: F.dropout wants "
                "training=self.training"
            )
        # In eval mode batch norm uses what it stored, so an image cannot see its neighbours.
        # Loose, for another batch size may take another kernel, which rounds in its own way.
        if not torch.allclose(together[:1], alone, rtol=1e-3, atol=1e-3):
            raise WrongAnswer("its answer about an image depends on the others of the batch")
        # The sums of three images' logits are all 1 only after a softmax.
        if torch.allclose(together.sum(1), torch.ones(3, device=device), atol=1e-4):
            raise WrongAnswer("it gives probabilities: leave the softmax to the loss")


def last_activation(step):
    """The activation that a tensor with this grad_fn comes from, by its name, or None."""
    name = step.name()
    # A reshaping keeps the numbers as they are: the step before it counts.
    while re.match("View|Reshape|Unsafe|Squeeze|Select", name):
        step = step.next_functions[0][0]
        if step is None:
            return None
        name = step.name()
    found = re.match("(Sigmoid|Relu|LeakyRelu|Hardtanh|Tanh|Gelu|Silu|Hardswish|Elu)Backward", name)
    return found and found[1]


def check_gradients(net, image_size):
    """WrongAnswer naming a parameter that no gradient reaches."""
    net.train()
    device = next(net.parameters()).device
    images = torch.randn(4, 3, image_size, image_size, device=device)
    labels = torch.arange(4, device=device)
    logits = net(images)
    if not logits.requires_grad:
        raise WrongAnswer("none of its parameters is trained: is requires_grad off for them all?")
    activation = last_activation(logits.grad_fn)
    if activation:
        raise WrongAnswer(f"its last step is {activation}: logits are any numbers, leave it out")
    F.cross_entropy(logits, labels).backward()
    # None and not zero: a ReLU that is off has gradient zero, and may be on for other images.
    idle = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise WrongAnswer(
            f"no gradient reaches {some_of(idle)}: is it left out of forward, or detached?"
        )


# The views.

# Config key -> the transform of torchvision that it stands for.
VIEW_SETTINGS = {
    "crop_scale": "RandomResizedCrop(224, scale=(0.7, 1.0))",
    "hflip": "RandomHorizontalFlip(0.5)",
    "vflip": "RandomVerticalFlip(0.5)",
    "rotation": "RandomRotation(180)",
    "affine": "RandomAffine(30)",
}


def check_views(answer, cfg=BOSS):
    """Tell a learner whether a dict of settings makes the training views of a config.

    Prints a line, returns True or False.
    """
    if not isinstance(answer, dict):
        return say_not_yet(f"it is {kind_of(answer)}, where a dict of settings is wanted")
    if all(is_value(answer.get(name), getattr(SIMPLE, name)) for name in VIEW_SETTINGS):
        return say_not_yet("it is still to be written")
    for name, transform in VIEW_SETTINGS.items():
        wanted = getattr(cfg, name)
        given = answer.get(name)
        if not is_value(given, wanted):
            why = f"{name}={given!r} is not what {transform} does"
            if name in ("rotation", "affine"):
                why += ": wanted is one number, the largest angle to either side"
            return say_not_yet(why)
    unknown = answer.keys() - VIEW_SETTINGS.keys()
    if unknown:
        return say_not_yet(f"{some_of(sorted(unknown))} is no setting of a view")
    print(f"Right: these are the views of {cfg.exp_name}.")
    return True


def is_value(given, wanted):
    """Whether a learner's value of a setting is the wanted one; an array is none."""
    # Config takes lists too, and makes tuples of them.
    if isinstance(given, list):
        given = tuple(given)
    return isinstance(given, (int, float, tuple)) and given == wanted


# The alignment.


def bilinear(maps, side):
    """Maps (B, C, H, W) interpolated to (B, C, side, side)."""
    return F.interpolate(maps, (side, side), mode="bilinear", align_corners=False)


RIGHT_ALIGNMENT = {
    "distance": F.smooth_l1_loss,
    "reduction": "mean",
    "weighs": True,
    "adapted": "student",
    "side": "smaller",
    "divides": False,
    # Which of the layers' terms are added up
    "layers": slice(None),
    "pool": F.adaptive_avg_pool2d,
    "detaches": False,
}

ALIGNMENT_MISTAKES = {
    "the distance is the squared one: F.smooth_l1_loss is wanted": {"distance": F.mse_loss},
    "the distance is the absolute one: F.smooth_l1_loss is wanted": {"distance": F.l1_loss},
    "the distance is summed over the maps: leave its reduction at the mean": {"reduction": "sum"},
    "the weights of the layers are not used": {"weighs": False},
    "the adapters are not used": {"adapted": "nothing"},
    "the adapters belong to the student's maps, not to the teacher's": {"adapted": "teacher"},
    "the smaller map is enlarged: average the larger one down, whosever it is": {"side": "larger"},
    "the teacher's map is brought to the student's size, also where it is the smaller one: average "
    "the larger one down": {"side": "student's"},
    "the student's map is brought to the teacher's size, also where it is the smaller one: average "
    "the larger one down": {"side": "teacher's"},
    "the sum is divided by the number of layers": {"divides": True},
    "it returns at the first layer: is the return statement inside the loop?": {
        "layers": slice(0, 1)
    },
    "only the last layer counts: add the terms up": {"layers": slice(-1, None)},
    "the larger map is interpolated: average it down (adaptive_avg_pool2d)": {
        "pool": F.interpolate
    },
    "the larger map is interpolated linearly: average it down (adaptive_avg_pool2d)": {
        "pool": bilinear
    },
    "the larger map is pooled by its maximum: average it down": {"pool": F.adaptive_max_pool2d},
    "the student's maps are detached, so they learn nothing": {"detaches": True},
}


def alignment_variant(student_maps, teacher_maps, weights, adapters, **changes):
    """alignment with some of RIGHT_ALIGNMENT changed."""
    choices = choices_of(RIGHT_ALIGNMENT, changes)
    terms = []
    for layer, weight in weights.items():
        ours = student_maps[layer]
        theirs = teacher_maps[layer]
        sides = {"student's": ours.shape[-1], "teacher's": theirs.shape[-1]}
        sides |= {"smaller": min(sides.values()), "larger": max(sides.values())}
        side = sides[choices.side]
        # Maps of the right size are pooled too, which leaves each as it is.
        ours = choices.pool(ours.detach() if choices.detaches else ours, side)
        theirs = choices.pool(theirs, side)
        if choices.adapted == "student":
            ours = adapters[layer](ours)
        if choices.adapted == "teacher":
            theirs = adapters[layer](theirs)
        term = choices.distance(ours, theirs, reduction=choices.reduction)
        terms.append(weight * term if choices.weighs else term)
    kept = terms[choices.layers]
    return sum(kept) / (len(kept) if choices.divides else 1)


def observe_alignment(function):
    """The values of an alignment and their gradients, of all layers and of all but one.

    Maps are of equal and of other sizes.
    """
    generator = torch.Generator().manual_seed(0)

    def maps(*sides):
        made = {}
        for number, side in enumerate(sides, 1):
            drawn = torch.randn(2, 4, side, side, generator=generator)
            made[f"layer{number}"] = drawn.to(pick_device())
        return made

    # Sides of layer1 to layer4: equal, then the teacher's larger, then the student's. One is four
    # times as large, for at twice the size interpolation is an average too.
    student_maps = maps(8, 4, 8, 2)  # of layer4, which has no weight, nothing may depend
    teacher_maps = maps(8, 8, 2, 2)
    for drawn in student_maps.values():
        drawn.requires_grad_()
    # The second leaves a layer out, as align_weights=(3, 0, 1) does.
    three = {"layer1": 3.0, "layer2": 2.0, "layer3": 0.5}
    two = {"layer1": 3.0, "layer3": 0.5}
    seen = {}
    for weights, case in ((three, ""), (two, " without layer2")):
        # Convolutions although the widths agree, so that an answer without adapters differs.
        adapters = nn.ModuleDict({layer: nn.Conv2d(4, 4, 1) for layer in weights})
        fill_with_numbers(adapters.to(pick_device()).parameters())
        inputs = {f"the student's {layer}{case}": student_maps[layer] for layer in weights}
        for name, parameter in adapters.named_parameters():
            inputs[f"the adapter's {name}{case}"] = parameter
        try:
            # Copies, for an answer may put its pooled maps back.
            value = function(dict(student_maps), dict(teacher_maps), weights, adapters)
        except KeyError as error:
            layer = error.args[0]
            if layer in weights or layer not in student_maps:
                raise
            raise WrongAnswer(
                f"it fails on {layer}, which has no weight: the layers to align are the keys of "
                "weights"
            ) from None
        seen |= gradients_of(value, inputs)
        seen[f"its value{case}"] = value.detach()
    return seen


def check_alignment(answer):
    """Tell a learner whether their alignment is right: True or False.

    answer(student_maps, teacher_maps, weights, adapters) -> scalar, as `alignment` has them.
    """
    mistakes = ALIGNMENT_MISTAKES
    return judge(answer, alignment, observe_alignment, alignment_variant, mistakes)


# The schedule of the loss weights.

RIGHT_SCHEDULE = {
    "factor": 10,
    "power": 2,
    "alpha": "falls",
    "align": "stays",
    "constant_alpha": True,
    "handover_in": ("handover",),  # for which values of loss_schedule
}

SCHEDULE_MISTAKES = {
    "the factor 10 is missing": {"factor": 1},
    "progress is not squared": {"power": 1},
    "alpha weighs the soft labels: it starts near 1 and falls, 1 - p ** 2": {"alpha": "grows"},
    "alpha is the config's: in a handover it is 1 - p ** 2": {"alpha": "config"},
    "the weight of the alignment is 1: the other terms grow, it does not fall": {"align": "falls"},
    "the weight of the alignment is 1: it does not grow": {"align": "grows"},
    "without a handover alpha is the config's": {"constant_alpha": False},
    "the handover is for loss_schedule='handover' alone: else kd=1, alpha=cfg.alpha, align=1": {
        "handover_in": ("handover", "constant")
    },
    "the handover is left out": {"handover_in": ()},
}


def schedule_variant(cfg, progress, **changes):
    """loss_weights with some of RIGHT_SCHEDULE changed."""
    choices = choices_of(RIGHT_SCHEDULE, changes)
    if cfg.loss_schedule not in choices.handover_in:
        return LossWeights(1.0, cfg.alpha if choices.constant_alpha else 0.5, 1.0)
    grown = progress**choices.power
    shares = {"stays": 1.0, "falls": 1 - grown, "grows": grown, "config": cfg.alpha}
    return LossWeights(choices.factor * grown, shares[choices.alpha], shares[choices.align])


def observe_schedule(function):
    """(kd, alpha, align) of a schedule at several progresses, with handover and without."""
    seen = {}
    # 0.3 is neither the default alpha nor 1 - p ** 2 at any of these progresses.
    for cfg in (BOSS, replace(BOSS, loss_schedule="constant", alpha=0.3)):
        for progress in (0.25, 0.6, 1.0):
            weights = function(cfg, progress)
            if not isinstance(weights, (tuple, list)) or len(weights) != 3:
                raise WrongAnswer("it should return LossWeights(kd, alpha, align)")
            for name, weight in zip(LossWeights._fields, weights, strict=True):
                what = f"with loss_schedule={cfg.loss_schedule!r}, {name} at p = {progress}"
                seen[what] = torch.tensor(float(weight))
    return seen


def check_loss_weights(answer):
    """Tell a learner whether their loss_weights(cfg, progress) is right: True or False."""
    mistakes = SCHEDULE_MISTAKES
    return judge(answer, loss_weights, observe_schedule, schedule_variant, mistakes)


# The training loop.

RIGHT_LOOP = {
    "epochs": "all",
    "sets_epoch": True,
    "first_epoch": 0,
    "trains": True,
    "softmax": False,
    "clears": "each batch",
    "renews": False,
    "clips": True,
    "steps": True,
    "optimizer": torch.optim.Adam,
    "settings": {},
}

LOOP_MISTAKES = {
    "it trains nothing": {"epochs": "none"},
    "only one epoch is trained: repeat it cfg.n_epochs times": {"epochs": "one"},
    "two epochs are trained, whatever cfg.n_epochs says": {"epochs": "two"},
    "nothing moves the weights: is optimizer.step() called, and after loss.backward()?": {
        "steps": False
    },
    "the gradients add up from step to step: call optimizer.zero_grad()": {"clears": "never"},
    "the gradients add up within an epoch: call optimizer.zero_grad() for each batch": {
        "clears": "each epoch"
    },
    "the optimizer is made anew in every epoch, and forgets: make it once, before the loop": {
        "renews": True
    },
    "the gradients are not clipped to cfg.grad_norm_max": {"clips": False},
    "the student stays in evaluation mode: call student.train()": {"trains": False},
    "every epoch shows the same views: call train_loader.set_epoch(epoch)": {"sets_epoch": False},
    "epochs count from 1: train_loader.set_epoch(0) comes first, else its views are others": {
        "first_epoch": 1
    },
    "the learning rate is not cfg.lr": {"settings": {"lr": 1e-3}},
    "the weight decay is not cfg.weight_decay": {"settings": {"weight_decay": 0.0}},
    "learning rate and weight decay are not the config's": {
        "settings": {"lr": 1e-3, "weight_decay": 0.0}
    },
    "the optimizer is not Adam": {"optimizer": torch.optim.SGD},
    "the optimizer is AdamW, where the config's is Adam": {"optimizer": torch.optim.AdamW},
    "F.cross_entropy wants logits: leave out the softmax": {"softmax": True},
}


def loop_variant(student, train_loader, cfg, **changes):
    """The training loop by hand, with some of RIGHT_LOOP changed."""
    choices = choices_of(RIGHT_LOOP, changes)
    # The later wins: a mistake's setting stands in the place of the config's.
    settings = {"lr": cfg.lr, "weight_decay": cfg.weight_decay} | choices.settings
    optimizer = choices.optimizer(student.parameters(), **settings)
    n_epochs = {"all": cfg.n_epochs, "two": 2, "one": 1, "none": 0}[choices.epochs]
    for epoch in range(n_epochs):
        if choices.renews:
            optimizer = choices.optimizer(student.parameters(), **settings)
        if choices.clears == "each epoch":
            optimizer.zero_grad()
        if choices.sets_epoch:
            train_loader.set_epoch(choices.first_epoch + epoch)
        student.train(choices.trains)
        for images, labels, *_ in train_loader:
            logits = student(images)
            loss = F.cross_entropy(logits.softmax(1) if choices.softmax else logits, labels)
            if choices.clears == "each batch":
                optimizer.zero_grad()
            loss.backward()
            if choices.clips:
                nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_norm_max)
            if choices.steps:
                optimizer.step()


def loop_of_fit(student, train_loader, cfg):
    """The epochs of `fit`, and nothing besides."""
    state = TrainState(DistillLoss(cfg, student))
    for epoch in range(cfg.n_epochs):
        train_one_epoch(state, state.loss_fn, train_loader, epoch)


class MadeUpBatches:
    """A loader of two small batches that change with the epoch, to try a training loop with."""

    dataset = range(12)  # of which a learner's loop may ask the length

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 2

    def __iter__(self):
        # Seeded by the epoch alone, so a loop that leaves out set_epoch sees the same batches
        # again.
        generator = torch.Generator().manual_seed(self.epoch)
        for _ in range(len(self)):
            images = torch.randn(6, 3, 8, 8, generator=generator)
            labels = torch.randint(NUM_CLASSES, (6,), generator=generator)
            yield Batch(images.to(pick_device()), labels.to(pick_device()))


def observe_loop(function):
    """The weights and statistics of a small net after a training loop on made-up batches."""
    # None of them is Adam's default, so that a setting which is left out shows in the weights.
    cfg = Config(lr=0.03, weight_decay=0.1, grad_norm_max=0.5, n_epochs=3, amp="off")
    # Without a bias before the batch norm: its gradient is nothing but rounding.
    student = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        GlobalAvgPool(),
        nn.Linear(4, NUM_CLASSES),
    )
    # In eval mode, so that a loop which never calls train() shows in the statistics.
    fill_with_numbers(student.to(pick_device()).eval().parameters())
    function(student, MadeUpBatches(), cfg)
    seen = {}
    # Statistics and num_batches_tracked too: they show how often it ran in training mode.
    for name, value in student.state_dict().items():
        seen[f"after three epochs the student's {name}"] = value.detach().float()
    return seen


def check_training_loop(answer):
    """Tell a learner whether their training loop does what `fit` does: True or False.

    answer(student, train_loader, cfg) trains the student for cfg.n_epochs with cross-entropy and
    Adam.
    """
    return judge(answer, loop_of_fit, observe_loop, loop_variant, LOOP_MISTAKES, "fit")


# ==================================================================================================
# 7  Training
# ==================================================================================================

TERMS = ("ce", "kl", "align")
TRAINING_COLUMNS = ("epoch", "lr", "train_loss", "train_acc", *TERMS)
HISTORY_COLUMNS = (*TRAINING_COLUMNS, "valid_loss", "valid_acc", "n", "seconds")
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
# Steps between two looks at whether the loss is finite; each look waits for the device.
CHECK_FINITE_EVERY = 20


def build_optimizer(cfg, parameters):
    """The optimizer of the config over `parameters`: one fused kernel a step.

    SGD has Nesterov momentum 0.9.
    """
    settings = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "fused": True}
    if cfg.optimizer == "sgd":
        settings |= {"momentum": 0.9, "nesterov": True}
    optimizer = OPTIMIZERS[cfg.optimizer](parameters, **settings)
    if cfg.optimizer == "sgd":
        # Where fp16 skips the very first step, torch leaves a fused momentum unset.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


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

    An epoch without validation is never best.
    """
    best = -1.0
    since = 0
    for row in history:
        since += 1
        # A comparison with NaN, the score of an epoch without validation, is false.
        if row["valid_acc"] > best:
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

    def parts(self):
        """What has a state_dict of its own."""
        return {"loss_fn": self.loss_fn, "optimizer": self.optimizer, "scaler": self.scaler}

    def state_dict(self):
        state = {"history": self.history, "best": self.best}
        for name, part in self.parts().items():
            state[name] = part.state_dict()
        return state

    def load_state_dict(self, state):
        self.history = state["history"]
        self.best = state["best"]
        for name, part in self.parts().items():
            if state[name]:  # the scaler's is empty where the run was not in fp16
                part.load_state_dict(state[name])


def copy_of_weights(model):
    """A copy of a model's state dict, contiguous and on the CPU."""
    weights = {}
    for name, value in model.state_dict().items():
        # Channels last is this device's choice; a file holds the plain layout.
        weights[name] = value.cpu().clone(memory_format=torch.contiguous_format)
    return weights


def refuse_evaluation(loader):
    """UserError for a loader or Dataset of evaluation images, however torch wrapped them."""
    if getattr(loader, "name", None) == "evaluation":
        raise UserError(
            "evaluation images are for predictions alone: "
            "they must not enter training or validation"
        )
    if hasattr(loader, "dataset"):  # a DataLoader, a Subset
        refuse_evaluation(loader.dataset)
    for part in getattr(loader, "datasets", ()):  # a ConcatDataset
        refuse_evaluation(part)


def train_one_epoch(state, forward, loader, epoch, views=None, on_step=None):
    """One pass over the training images: {"lr", "train_loss", "train_acc"} and the loss's terms.

    forward: state.loss_fn or its data-parallel wrapper. loader yields (images, labels) or Batch.
    views: TeacherViews to read or fill. on_step(n_images, sums) is told of each step. Sums stay on
    the device, so no step waits for one. Raises UserError where a loss is not finite, or for
    evaluation images.
    """
    refuse_evaluation(loader)
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
    sums = EpochSums(loss_fn.device)
    unchecked = []  # (loss, rows, teacher's logits) since the last look
    for step, batch in enumerate(loader):
        batch = Batch(*batch)
        # Views are made in fp32; networks under autocast want their own type at once.
        images = to_device(batch.images, loss_fn.device, loss_fn.dtype or torch.float32)
        labels = batch.labels.to(loss_fn.device, non_blocking=True)

        stored = None
        if views:
            stored = views.read(batch, loss_fn.device)
        out = forward(images, labels, stored)
        # The rate moves with every step.
        lr = learning_rate(cfg, epoch + step / n_steps)
        # The weight is 1, except where the processes' parts of a step differ in size (see Batch).
        optimizer_step(state, out.loss * batch.weight, lr, cfg.grad_norm_max)
        # The teacher answered anew: kept for the epoch in which this view comes again.
        if views and stored is None:
            views.write(batch, out.teacher_logits)

        # The loss without the weight, for the sums count by images.
        sums.add(out, labels)
        unchecked.append((out.loss.detach(), batch.rows, out.teacher_logits))
        # Looking at a loss waits for the device, so it is done for many steps together.
        if len(unchecked) == CHECK_FINITE_EVERY or step == n_steps - 1:
            check_finite(unchecked, cfg, epoch, loader)
            unchecked = []
        if on_step:
            on_step(len(labels), sums)
    return {"lr": lr, **sums.over_all_processes()}


class EpochSums:
    """Sums over an epoch's images, kept on the device: loss, right answers, images, terms."""

    def __init__(self, device):
        # fp64: a sum of a million small numbers in fp32 would lose the last of them.
        self.sums = torch.zeros(3 + len(TERMS), device=device, dtype=torch.float64)
        self.terms = ()  # those that the loss has

    def add(self, out, labels):
        """Count a step: Distilled and labels (B,)."""
        n = len(labels)
        self.sums[0] += out.loss.detach() * n
        self.sums[1] += (out.student_logits.detach().argmax(1) == labels).sum()
        self.sums[2] += n
        self.terms = tuple(out.terms)
        for name, term in out.terms.items():
            self.sums[3 + TERMS.index(name)] += term * n

    def means(self):
        """{"train_loss", "train_acc"} and the terms, so far. Reading them waits for the device."""
        loss, correct, n, *terms = self.sums.tolist()
        means = {"train_loss": loss / n, "train_acc": correct / n}
        for name in self.terms:
            means[name] = terms[TERMS.index(name)] / n
        return means

    def over_all_processes(self):
        """The means over the images of all processes."""
        all_reduce(self.sums)
        return self.means()


def check_finite(losses, cfg, epoch, loader):
    """UserError naming epoch and images of the first loss that is not finite.

    losses: (loss, rows, teacher's logits) of some steps. It reads the device, so it is called every
    CHECK_FINITE_EVERY batches and not at each. The teacher is asked first: where its answers are
    not finite, no learning rate helps.
    """
    # One transfer for all steps since the last look.
    good = torch.stack([loss for loss, *_ in losses]).isfinite().tolist()
    if all(good):
        return
    _, rows, teacher_logits = losses[good.index(False)]
    where = ""
    # A DataLoader does not tell which images a batch has.
    if rows is not None:
        ids = [loader.split.ids[row] for row in rows[:8].tolist()]
        where = f" at the images {', '.join(ids)}, ..."
    if teacher_logits is not None and not teacher_logits.isfinite().all():
        raise UserError(
            f"the teacher's answers in epoch {epoch + 1} are not finite{where}: "
            "try amp=off, or another teacher file; the last whole epoch is saved"
        )
    raise UserError(
        f"the loss of epoch {epoch + 1} is not finite{where}: lower lr (now {cfg.lr:g}) "
        f"or set amp=off, with {option('--fresh')}; the last whole epoch is saved"
    )


def check_scale(scaler, scale_before, cfg, epoch, n_steps):
    """UserError where no fp16 gradient of an epoch was finite, so that nothing was learned.

    The scaler leaves out a step whose gradients are not finite, and halves its scale. A run may
    begin with some such steps; but there is no hope where a scale below 1 is still too large, nor
    after the last epoch.
    """
    if not scaler.is_enabled():
        return
    scale = scaler.get_scale()
    # The scale after an epoch of which every step was left out.
    halved_each_step = scale_before * scaler.get_backoff_factor() ** n_steps
    if scale not in (0, halved_each_step):  # 0: halved until nothing was left
        return
    if scale >= 1 and epoch + 1 < cfg.n_epochs:
        return
    raise UserError(
        f"no fp16 gradient of epoch {epoch + 1} is finite, so nothing is learned: set amp=off "
        f"or lower lr (now {cfg.lr:g}), with {option('--fresh')}; what was saved is intact"
    )


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


def fit(loss_fn, train_loader, valid_loader, folder=None):
    """Train the student of a DistillLoss as its config says; returns the history, a row an epoch.

    It trains any net. The loaders are BatchLoaders or the course's DataLoaders (valid_loader None:
    no validation, the last epoch's net is the best); the net is on its device. folder: a RunFolder,
    to which every epoch is saved, and from which a run goes on, exactly as if it had not stopped
    (on CPUs; CUDA's sums are not the same from run to run). The student ends with its best weights,
    also where the time limit ends it early, or an interrupt: Ctrl-C or a notebook's stop button,
    which is let through, so that the cells after it do not run either.
    Raises UserError where the folder's run has other settings or another process works there, where
    a loss is not finite, where memory does not suffice, or where it is handed evaluation images.
    """
    cfg = loss_fn.cfg
    refuse_evaluation(train_loader)
    refuse_evaluation(valid_loader)
    refuse_other_views(train_loader, cfg)
    if cfg.teacher_views and not isinstance(train_loader, BatchLoader):
        raise UserError(
            "teacher_views wants a BatchLoader: a DataLoader's views cannot be replayed"
        )
    # Layout and precision, in case the caller moved the net by hand.
    loss_fn.on(loss_fn.device)
    lock = folder.lock() if folder else contextlib.nullcontext()
    with lock, out_of_memory_named(cfg), images_on_gpu(train_loader, valid_loader):
        state = TrainState(loss_fn)
        if folder:
            # Before anything is loaded: a run of other images is refused, finished or not.
            folder.add_contents("training", train_loader.dataset)
            folder.add_contents("validation", getattr(valid_loader, "dataset", None))
            folder.restore(state)
        # Before the first step: processes that differ would wait for each other or average
        # nonsense.
        check_processes_agree(facts_of_training(loss_fn, train_loader, state.history, folder))
        views = None
        if isinstance(train_loader, BatchLoader):
            say(describe_run(cfg, train_loader))
        if cfg.replays:
            # Part of the stored logits' key, for another teacher answers differently.
            teacher = loss_fn.teacher
            teacher_key = (state_checksum(teacher), code_and_settings(teacher))
            views = TeacherViews(cfg, train_loader, teacher_key, loss_fn.dtype)
        if folder:
            # Whatever was lost beside last.ckpt is written again; that of a finished run stays,
            # if it is this folder's own.
            is_whole = is_finished(state.history, cfg) and not folder.is_from_elsewhere
            folder.save(state, last=not is_whole)
        try:
            train_epochs(state, train_loader, valid_loader, views, folder)
        except KeyboardInterrupt:
            if in_notebook():  # the command line has its own words
                say_how_to_go_on(cfg, state.history, folder)
            raise
        finally:
            # After an error too: the caller's net is the best one in any case.
            loss_fn.student.load_state_dict(state.best)
    return state.history


def refuse_other_views(loader, cfg):
    """UserError where a BatchLoader was made for a config with other batches or views than `cfg`.

    The run's facts would tell of settings that it was not trained with.
    """
    if not isinstance(loader, BatchLoader):
        return
    names = ("image_size", "batch_size", "seed", *VIEW_SETTINGS)
    other = [name for name in names if getattr(loader.cfg, name) != getattr(cfg, name)]
    # How many epochs of views there are; 0: new ones in each.
    ours, theirs = [c.teacher_views if c.replays else 0 for c in (cfg, loader.cfg)]
    if ours != theirs:
        other.append("teacher_views or whether there is a teacher")
    if other:
        raise UserError(
            f"{cfg.exp_name}: the training loader was made for another config; different are "
            f"{', '.join(other)}: hand this config to build_loaders"
        )


def say_how_to_go_on(cfg, history, folder):
    """What a notebook's stop button leaves, and how to go on from there."""
    text = f"{cfg.exp_name}: stopped after {len(history)} of {cfg.n_epochs} epochs"
    if folder:
        again = cell_again(folder.began_fresh)
        text += f"; every whole epoch is saved: {again}, and it goes on from there"
    say(text)


def cell_again(fresh):
    """Which cell goes on with a stopped run; fresh: whether it throws away what is saved."""
    if fresh:
        return "run this cell again without fresh=True"
    return "run this cell again"


def facts_of_training(loss_fn, loader, history, folder=None):
    """What must be the same in all processes before they train together: {key: value}."""
    facts = folder.facts if folder else run_facts(loss_fn)
    steps = len(loader)
    if isinstance(loader, BatchLoader):
        # The rows themselves, so that another order or batch size is noticed.
        steps = fingerprint([rows.tolist() for rows in loader.batches()])
    together = {
        "history": fingerprint(history),
        "steps": steps,
        "code": fingerprint(Path(__file__).read_text(encoding="utf-8")),
    }
    # The settings one by one as well, so that a message can name the one that differs.
    return {**facts["config"], **facts, **together}


def train_epochs(state, train_loader, valid_loader, views, folder):
    """Train, validate and save epoch by epoch, until the last, or patience or time runs out."""
    loss_fn = state.loss_fn
    cfg = loss_fn.cfg
    student = loss_fn.student
    # The wrapper averages gradients over processes; what has state is still read from loss_fn.
    forward = data_parallel(loss_fn)
    display = RunDisplay(cfg, len(train_loader.dataset), state.history)
    with contextlib.closing(display.bar):
        # The length of the history is the clock, so a restored run goes on at the right epoch.
        while not is_finished(state.history, cfg):
            epoch = len(state.history)
            if time_is_up(cfg, state.history, loss_fn.device):
                how_to_go_on = ""
                if folder:
                    how_to_go_on = (
                        "; a new session goes on from there "
                        "(on Kaggle: attach this one's output as an input)"
                    )
                say(
                    f"{cfg.exp_name}: ends after epoch {epoch} of {cfg.n_epochs}, for the "
                    f"session's time is nearly up{how_to_go_on}"
                )
                break
            start = time.perf_counter()
            # The scale before the epoch, for `check_scale`; 1 where it is not fp16.
            scale = state.scaler.get_scale()
            row = train_one_epoch(state, forward, train_loader, epoch, views, display.on_step)
            check_scale(state.scaler, scale, cfg, epoch, len(train_loader))
            for buffer in student.buffers():  # all validate with the first process's statistics
                broadcast(buffer)
            if valid_loader:
                row |= evaluate(student, valid_loader)
            else:
                row["valid_acc"] = math.nan
            epochs_since_best = best_so_far([*state.history, row])[1]
            # Without validation every epoch counts as the best so far: the last one is kept.
            if epochs_since_best == 0 or not valid_loader:
                state.best = copy_of_weights(student)
            # Saving is not counted: it is no part of the training's speed.
            seconds = time.perf_counter() - start
            state.history.append({"epoch": epoch + 1, **row, "seconds": seconds})
            display.show(epoch + 1, row["train_loss"], row["train_acc"])
            if folder:
                folder.save(state)
            else:
                # `save` would have let the processes wait for each other.
                barrier()


# ==================================================================================================
# 8  Runs
# ==================================================================================================

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"  # what a run goes on from, and the save before it
BEST = "student_best.ckpt"
EXERCISES_FOLDER = "exercises"  # where the exercises edition keeps its runs
RESULT = "result.json"  # what a later call compares the stage's CSV by
# Config keys that may change when a run goes on.
BEHAVIOUR_KEYS = {"time_limit_h"}
# Facts that are hashes of what may be a learner's own code.
OWN_CODE_FACTS = {
    "layers": "the layers of the student",
    "student_code": "the code of the student",
    "loss_fn_kd": "the code of loss_fn_kd",
    "alignment": "the code of alignment",
    "loss_weights": "the code of loss_weights",
}
# All that are hashes of nets and code: a sentence names them without their values.
HASHED_FACTS = OWN_CODE_FACTS | {
    "teacher_code": "the code or settings of the teacher",
    "teacher_checksum": "the checksum of the teacher",
}
# Hashes of what is trained and validated on. Evaluation images are none of a run's facts: a CSV is
# written anew from those that are there.
DATA_FACTS = {
    "training_files": "the names or labels of the training images",
    "validation_files": "the names or labels of the validation images",
    "training_contents": "the training images",
    "validation_contents": "the validation images",
}


def had_own(facts, function):
    """Whether a run was trained with another function in the place of this one of the module."""
    return facts.get(function.__name__) not in (None, code_fingerprint(function))


def layers_fingerprint(model):
    """A hash of a net's layers and their settings, whatever their weights.

    The modules' repr would tell them too, but versions of torch differ in it, and a run goes on
    under another one.
    """
    layers = []
    for name, module in model.named_modules():
        shapes = [(key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)]
        layers.append((name, type(module).__name__, plain_settings(module), shapes))
    return fingerprint(layers)


def plain_settings(module):
    """{name: text} of the numbers, texts and tuples among a module's attributes: its settings.

    Private ones are torch's own, `training` says what is done with the net just now, and `source`
    where a teacher's weights came from.
    """
    settings = {}
    for key, value in vars(module).items():
        is_setting = not key.startswith("_") and key not in ("training", "source")
        if is_setting and isinstance(value, PLAIN):
            settings[key] = repr(value)
    return settings


def module_code_fingerprint(model):
    """A hash of the code of a net's own modules; torch's and torchvision's do not count."""
    kinds = set()
    for module in model.modules():
        kind = type(module)
        if kind.__module__.partition(".")[0] not in ("torch", "torchvision"):
            kinds.add(kind)
    return code_fingerprint(*kinds)


def code_and_settings(model):
    """A hash of all but the weights that a net's answers depend on."""
    return fingerprint(layers_fingerprint(model), module_code_fingerprint(model))


def run_facts(loss_fn, data=None):
    """What a result depends on, as JSON-able facts: they must be the same for a run to go on.

    Settings, layers, own code included, number of processes, the teacher's weights and code, and
    the data's names and labels. What the images show is known when they are decoded (see
    `add_contents`).
    """
    facts = {
        "config": dataclasses.asdict(loss_fn.cfg),
        "layers": layers_fingerprint(loss_fn.student),
        "student_code": module_code_fingerprint(loss_fn.student),
        "loss_fn_kd": None,
        "alignment": None,
        "loss_weights": None,
        "teacher_checksum": None,
        "teacher_code": None,
        "processes": rank_and_world()[1],
    }
    # Only what is used counts: editing a loss that is not trained with must not refuse a run.
    if loss_fn.teacher is not None:
        facts["loss_fn_kd"] = code_fingerprint(loss_fn.loss_fn_kd)
        facts["loss_weights"] = code_fingerprint(loss_fn.loss_weights)
        facts["teacher_checksum"] = state_checksum(loss_fn.teacher)
        facts["teacher_code"] = code_and_settings(loss_fn.teacher)
    if loss_fn.layers:
        facts["alignment"] = code_fingerprint(loss_fn.alignment)
    if data is not None:
        facts["origin"] = data.origin
        for split in ("training", "validation"):
            facts[f"{split}_files"] = fingerprint(data.ids[split], data.labels[split])
    return json.loads(json.dumps(facts))  # as they come back from a file


class RunFolder:
    """The folder of one run: its lock, its files, and the facts that must be the same for going on.

    config.json (the facts), student_best.ckpt (a plain fp32 state dict), log.csv (the history),
    last.ckpt and previous.ckpt (the last.ckpt of the save before), and result.json (the Result that
    a stage leaves at its end). last.ckpt holds the facts, the
    history, the best student, student and adapters ("loss_fn"), optimizer and scaler; no random
    state, for every draw is a function of (seed, epoch).
    fresh=True: what is there is started again when training begins.
    """

    def __init__(self, path, loss_fn, data=None, fresh=False, **more_facts):
        self.path = Path(path)
        self.cfg = loss_fn.cfg
        self.facts = run_facts(loss_fn, data) | more_facts
        self.fresh = fresh
        self.began_fresh = False  # whether `restore` threw away what was there
        self.is_from_elsewhere = False  # whether `restore` went on from an attached run
        self.damaged = {}  # {file: what is wrong with it}, as `load` found it

    def add_contents(self, split, dataset):
        """Add to the facts what the images of a split are: the hash of a Split's files.

        Another Dataset has none (None). A finished run is no exception: for its score and its CSV
        images are decoded anyway, so it costs little even where the cache is empty.
        """
        self.facts[f"{split}_contents"] = getattr(dataset, "contents", None)

    def lock(self):
        """A context manager that holds the folder, or UserError where another process holds it."""
        return locked(self.path)

    def load(self):
        """The checkpoint to go on from, or None; no file is changed.

        Where last.ckpt is damaged it is the save before it. Only the first process looks, for
        another machine has other files. Raises UserError where files are there and none is whole,
        or where they are of a run with other settings.
        """
        if not is_first_process():
            return None
        saved, self.damaged = read_run(self.path)
        if saved is None:
            return None
        different = self.different_facts(saved)
        if not different:
            return saved
        # Stopped in its first epoch it has nothing to lose: the new run begins in its place.
        if not saved["history"]:
            return None
        raise UserError(
            f"{self.path} holds a run with other settings: {', '.join(different.values())}; "
            f"{option('--fresh')} starts it again"
        )

    def restore(self, state):
        """Bring a TrainState to where the run stopped, if it ever began.

        On Kaggle to where the run of an attached input stopped, if that is later. The first process
        decides and hands its checkpoint to the others, so that no two can go on from two epochs.
        """
        found = None
        if is_first_process():
            found = self._where_to_go_on()
        found = from_first_process(found)
        self.began_fresh = self.fresh
        # From here on the folder's run is this one, and nothing of it is to be cleared.
        self.fresh = False
        if found is None:
            return
        saved, place = found
        self.is_from_elsewhere = place != self.path
        try:
            state.load_state_dict(saved)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            # An entry is not there, or a state dict does not fit.
            why = str(error).splitlines()[0]
            raise UserError(
                f"{place} holds a run of another student or program ({why}); "
                f"{option('--fresh')} restarts it"
            ) from None
        what = f"goes on after epoch {len(state.history)}"
        if is_finished(state.history, self.cfg):
            what = "finished before, loaded"
        n = len(state.history)
        best = best_so_far(state.history)[0]
        score = ""
        # -1: no epoch has been validated yet.
        if best >= 0:
            score = f" ({n} epochs, best validation accuracy {best:.4f})"
        say(f"{self.cfg.exp_name}: {what} from {place}{score}")

    def _where_to_go_on(self):
        """(checkpoint, its folder), or None where a run begins; with fresh=True it does."""
        if self.fresh:
            self.clear()
            return None
        saved = self.load()
        place = self.path
        for why in self.damaged.values():
            say(f"WARNING: {why}; going on from {PREVIOUS}, the save before it")
        for attached, folder in self._attached():
            # The longer run wins; of two of one length, this folder's own.
            if saved is None or len(attached["history"]) > len(saved["history"]):
                saved = attached
                place = folder
        if saved is None:
            return None
        return saved, place

    def save(self, state, last=True):
        """Write the run's files, from the first process; the others wait.

        last=False leaves last.ckpt as it is, if it is there.
        """
        if is_first_process():
            self._put_damaged_aside()
            write_text(self.path / "config.json", json.dumps(self.facts, indent=1) + "\n")
            if state.history:  # an untrained net is no result
                save_checkpoint(state.best, self.path / BEST)
            log = pd.DataFrame(state.history, columns=HISTORY_COLUMNS)
            write_text(self.path / "log.csv", log.to_csv(index=False, lineterminator="\n"))
            # last.ckpt at the end: killed before it, the run goes on from the save before.
            if last or not (self.path / LAST).is_file():
                saved = {"facts": json.dumps(self.facts), **state.state_dict()}
                save_checkpoint(saved, self.path / LAST, keep_as=PREVIOUS)
        barrier()

    def clear(self):
        """Forget the run: nothing goes on from here any more."""
        # The result too, else an old CSV could still be taken for the best.
        for name in (LAST, PREVIOUS, BEST, RESULT):
            (self.path / name).unlink(missing_ok=True)

    def _put_damaged_aside(self):
        """Rename damaged files, so that the next save cannot keep one as its predecessor."""
        for path in self.damaged:
            with contextlib.suppress(OSError):
                os.replace(path, path.with_name("damaged.ckpt"))
        self.damaged = {}

    def _attached(self):
        """Yield (checkpoint, its folder) of each run of this stage in a Kaggle input.

        An earlier session's output, attached as an input, is found so. A run with other settings is
        ignored with a message.
        """
        for folder in attached_folders(self.path, self.cfg):
            try:
                saved, _ = read_run(folder)
            except UserError as error:
                say(f"ignored: {error}")
                continue
            different = self.different_facts(saved)
            if different:
                what = ", ".join(different.values())
                say(f"ignored: {folder} holds a run with other settings: {what}")
            else:
                yield saved, folder

    def different_facts(self, saved):
        """{name: in words} of the facts in which a saved run differs so that it cannot go on here.

        The number of processes may differ where the run is finished.
        """
        # The settings one by one; "config" as a whole is left out below.
        was = {**saved["facts"], **saved["facts"]["config"]}
        now = {**self.facts, **self.facts["config"]}
        # The origin is for who reads config.json; its words name evaluation images too.
        may_differ = {"config", "origin"} | settings_that_may_differ(saved, self.cfg)
        if is_finished(saved["history"], self.cfg):
            may_differ.add("processes")
        different = {}
        # The keys of both, for another version of the program may have more or fewer.
        for name in {**was, **now}:
            if name in may_differ or was.get(name) == now.get(name):
                continue
            if name.endswith("_contents") and None in (was.get(name), now.get(name)):
                continue  # not decoded yet, or read by a DataLoader
            if name in HASHED_FACTS:
                different[name] = f"{HASHED_FACTS[name]} (it has changed)"
            elif name in DATA_FACTS:
                different[name] = f"{DATA_FACTS[name]} (they have changed)"
            else:
                saved_value = printable(was.get(name))
                different[name] = f"{name} {saved_value} (now {now.get(name)})"
        return different


def attached_folders(path, cfg):
    """The folders in Kaggle's inputs with a run of the stage whose own folder is `path`."""
    # With the folder in between ("demo/simple"), so that a demo run looks for demo runs.
    name = Path(cfg.exp_name)
    if path.is_relative_to(default_out()):
        name = path.relative_to(default_out())
    # A kill between two renames leaves only the save before the last one.
    found = [*attached_files(LAST), *attached_files(PREVIOUS)]
    # match compares from the right, so whatever input it lies in does not count.
    folders = {file.parent for file in found if file.parent.match(str(name))}
    return sorted(folders)


def check_folders(configs, data, out=None):
    """Look at the run folders of several Configs before the first one is trained.

    Raises UserError naming all stages whose folder holds a run of other settings, as after another
    LENGTH. Only settings are compared; the rest is, when a stage is prepared.
    """
    different = []
    for cfg in configs:
        saved = run_in(stage_folder(cfg, data, out))
        # One without a whole epoch has nothing to lose: `RunFolder.load` lets it go.
        if saved is None or not saved["history"]:
            continue
        keys = different_settings(saved, cfg)
        if keys:
            was = saved["facts"]["config"]
            changes = [f"{key} {was.get(key)}, now {getattr(cfg, key, None)}" for key in keys]
            different.append(f"{cfg.exp_name} ({some_of(changes)})")
    if different:
        raise UserError(
            f"{stage_folder(configs[0], data, out).parent} holds runs with other settings: "
            f"{', '.join(different)}. Go back to these settings, or delete or rename the folder"
        )


def different_settings(saved, cfg):
    """The Config keys in which a saved run differs from `cfg` so that it cannot go on."""
    was = saved["facts"]["config"]
    # By way of JSON, for in a file tuples are lists.
    now = json.loads(json.dumps(dataclasses.asdict(cfg)))
    may_differ = settings_that_may_differ(saved, cfg)
    return [key for key in {**was, **now} if key not in may_differ and was.get(key) != now.get(key)]


def settings_that_may_differ(saved, cfg):
    """The Config keys that may change when a saved run goes on as `cfg` says.

    Among them n_epochs, which may grow where neither the learning rate nor the loss depends on it.
    """
    may_differ = set(BEHAVIOUR_KEYS)
    constant = cfg.lr_schedule == "constant" and cfg.loss_schedule == "constant"
    # An own loss_weights may move with the progress, whatever the config says.
    own_weights = had_own(saved["facts"], loss_weights)
    grows = saved["facts"]["config"].get("n_epochs", 0) < cfg.n_epochs
    if constant and grows and not own_weights:
        may_differ.add("n_epochs")
    return may_differ


def read_run(folder):
    """(checkpoint, {damaged file: why}) of a folder: last.ckpt, or previous.ckpt if need be.

    The checkpoint is None where there is neither; its "facts" are parsed. Raises UserError where
    files are there and none is whole.
    """
    damaged = {}
    for name in (LAST, PREVIOUS):
        path = Path(folder) / name
        if not path.is_file():
            continue
        try:
            return checked_checkpoint(path), damaged
        except UserError as error:
            damaged[path] = str(error)
    if damaged:
        # In the order of reading, so the first is last.ckpt's, if it is there.
        first = next(iter(damaged.values()))
        raise UserError(f"{first}; {option('--fresh')} starts the run again")
    return None, damaged


def run_in(folder):
    """The checkpoint of a folder; None where there is none, or none that is whole.

    Damaged files are named when the stage is prepared.
    """
    try:
        return read_run(folder)[0]
    except UserError:
        return None


def checked_checkpoint(path):
    """What a last.ckpt holds, with its "facts" parsed; UserError where it is no run's."""
    saved = load_file(path)
    try:
        saved["facts"] = json.loads(saved["facts"])
        # This line and the next are there for the errors that they raise.
        dict(saved["facts"]["config"])
        best_so_far(saved["history"])  # reads each row, as all that follows does
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no run of this program") from None
    return saved


@dataclass
class Run:
    """What a stage leaves: settings, history, scores and files. `student()` gives its best net."""

    cfg: Config
    folder: Path
    origin: str
    history: pd.DataFrame  # a row an epoch, as in log.csv
    n_params: int
    macs: float  # nan where torch cannot count them
    correct: torch.Tensor  # (N,) bool: which validation images it answers rightly
    csv: Path
    net: nn.Module  # the trained student
    facts: dict  # what the result depends on, own code included (see run_facts)

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
    def n_valid(self):
        """The number of validation images."""
        return len(self.correct)

    @property
    def valid_acc(self):
        """The accuracy on the validation images."""
        return self.correct.double().mean().item()

    @property
    def finished(self):
        """Whether it has had all its epochs, or `patience` has ended it."""
        return is_finished(self.history.to_dict("records"), self.cfg)

    def student(self, device="cpu"):
        """A copy of the best net of this run, in eval mode."""
        # A copy, so that whoever trains or moves it does not change this Run.
        net = copy.deepcopy(self.net).to("cpu", memory_format=torch.contiguous_format)
        return freeze(net).to(device)


def load_student(path, device="cpu"):
    """(student in eval mode, its Config) from a student_best.ckpt with its config.json beside it.

    Raises UserError where they do not go together, or where the student is a learner's own, which
    this module cannot build.
    """
    path = Path(path)
    check_is_file(path)
    if path.name in (LAST, PREVIOUS):
        raise UserError(f"{path} is what a run goes on from: name the {BEST} beside it")
    config_path = path.with_name("config.json")
    if not config_path.is_file():
        raise UserError(
            f"{path} has no config.json beside it, which says what net it is: copy it from the "
            "folder of its run"
        )
    try:
        facts = json.loads(config_path.read_text(encoding="utf-8"))
        cfg = Config(**facts["config"])
        student = build_student(cfg)
        # A net of a learner's own has a config too, but not the layers that the config builds.
        is_own = facts["layers"] != layers_fingerprint(student)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        why = printable(str(error).splitlines()[0])
        raise UserError(f"{path} does not go with a config.json beside it ({why})") from None
    if is_own:
        raise UserError(
            f"{path} is a student of your own, which only the code that built it can load: "
            "predict with its Run"
        )
    # `load_net` finds by it what stands before all keys.
    first_key = next(iter(student.state_dict()))
    what = "student of the config.json beside it"
    student = load_net(path, first_key, lambda state: student, what)
    return freeze(student).to(device), cfg


def say_if_unfinished(path, cfg):
    """Warn where the log.csv beside a student_best.ckpt is of a run that has epochs left."""
    try:
        history = pd.read_csv(Path(path).with_name("log.csv")).to_dict("records")
        finished = is_finished(history, cfg)
    except (OSError, ValueError, KeyError, TypeError):  # moved without its log, or another's log
        return
    if not finished:
        say(
            f"WARNING: {path} is of a run that is not finished ({len(history)} of {cfg.n_epochs} "
            "epochs): its best student so far"
        )


@dataclass
class Stage:
    """A stage that is ready to be trained: config, data, student, loss and run folder.

    `prepare_stage` makes one; whatever can be wrong with it has been said then.
    """

    data: FoodData
    loss_fn: DistillLoss  # it owns config, student, teacher and adapters
    folder: RunFolder
    splits: tuple = ()  # (training, validation) once they are decoded

    @property
    def cfg(self):
        return self.loss_fn.cfg

    @property
    def student(self):
        return self.loss_fn.student

    @property
    def device(self):
        return self.loss_fn.device

    def decode(self):
        """The stage's (training Split, validation Split), decoded or from the cache.

        Raises UserError where the images cannot be used, or where the folder's run had others.
        """
        if not self.splits:
            self.splits = load_labelled(self.cfg, self.data)
            for split in self.splits:
                self.folder.add_contents(split.name, split)
            # Looked at again, for now what the images show is known and can be compared.
            if not self.folder.fresh:
                self.folder.load()
        return self.splits

    def train(self, processes=1):
        """Train the stage, or load it where it is finished, and write <out>/<stage>.csv: its Run.

        processes: start so many programs that train it together (see `train_in_processes`).
        The teacher is checksummed before and after: RuntimeError where it was changed.
        """
        train, valid = self.decode()
        train_loader, valid_loader = loaders_of(train, valid, self.cfg, self.device)
        history = None
        if processes > 1:
            history = train_in_processes(self, processes)
        # One process trains, or the others could not be started.
        if history is None:
            history = fit(self.loss_fn, train_loader, valid_loader, self.folder)
        self.check_teacher()
        return self.finish(history, valid_loader)

    def check_teacher(self):
        """RuntimeError where training has changed the teacher."""
        teacher = self.loss_fn.teacher
        if teacher is None:
            return
        if state_checksum(teacher) != self.folder.facts["teacher_checksum"]:
            raise RuntimeError(
                f"stage {self.cfg.exp_name} changed the teacher's weights or statistics"
            )

    def finish(self, history, valid_loader):
        """Score the trained student, predict the evaluation images and return the Run."""
        # Every process scores all images, so that each knows which of them are answered rightly.
        all_images = BatchLoader(
            valid_loader.split,
            self.cfg,
            self.device,
            batch_size=valid_loader.batch_size,
            shared=False,
        )
        logits, labels = predict_logits(self.student, all_images)
        path = self.folder.path
        run = Run(
            cfg=self.cfg,
            folder=path,
            origin=self.data.origin,
            history=pd.DataFrame(history, columns=HISTORY_COLUMNS),
            n_params=check_budget(self.student, image_size=self.cfg.image_size),
            macs=count_macs(self.student, self.cfg.image_size),
            correct=logits.argmax(1) == labels,
            # Beside the folder; a stage's name has no dot that with_suffix could take for one.
            csv=path.with_suffix(".csv"),
            net=self.student,
            facts=self.folder.facts,
        )
        evaluation = write_predictions(self.student, self.data, self.cfg, run.csv, self.device)
        write_result(run, evaluation)
        return run


def check_food_data(data):
    """UserError where `data` is no FoodData."""
    if not isinstance(data, FoodData):
        raise UserError(f"data is {kind_of(data)}: hand in what find_data gives")


def stage_folder(cfg, data, out=None):
    """Where a stage keeps its files: <out>/<stage>.

    For the demo set <out>/demo/<stage>, so that demo files never meet real ones. Raises UserError
    where `data` is no FoodData, for every call that trains asks here first.
    """
    check_food_data(data)
    out = results_folder(out)
    if data.is_demo:
        out = out / "demo"
    return out / cfg.exp_name


def prepare_stage(
    cfg,
    data,
    teacher=None,
    out=None,
    fresh=False,
    device=None,
    student=None,
    loss_fn_kd=None,
    alignment=None,
    loss_weights=None,
    processes=1,
):
    """A Stage, ready to be trained. All that can be wrong is said here; nothing is decoded yet.

    student: your own net, or a function without arguments that builds it; a copy is trained.
    loss_fn_kd, alignment, loss_weights: your own functions in place of this module's (see
    DistillLoss).
    processes: how many are to be started to train it (see Stage.train).
    Raises UserError for a student above the limit, a net without eleven logits an image, a loss
    that does not fit the config or the teacher, or a folder with a run of other settings (unless
    fresh).
    """
    student = own_student(cfg, student)
    check_budget(student, image_size=cfg.image_size)
    check_no_hidden_layers(student, cfg.image_size)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UserError(
            "the student is frozen, as a Run's or a loaded one is: call "
            "student.requires_grad_(True) before you hand it in"
        )
    if not isinstance(teacher, (nn.Module, type(None))):
        raise UserError(f"the teacher is {kind_of(teacher)}: hand in what load_teacher gives")
    if not cfg.needs_teacher:
        for name, own in (("loss_fn_kd", loss_fn_kd), ("loss_weights", loss_weights)):
            if own is not None:
                raise UserError(f"{cfg.exp_name} learns from labels alone: it takes no {name}")
    if alignment is not None and not cfg.aligns:
        raise UserError(f"{cfg.exp_name} aligns no layers: set align_weights to use an alignment")
    loss_fn = DistillLoss(cfg, student, teacher, loss_fn_kd, alignment, loss_weights)
    loss_fn.on(device or pick_device())
    loss_fn.check_answers()
    say_if_module_changed()
    folder = RunFolder(stage_folder(cfg, data, out), loss_fn, data, fresh)
    # The run's facts are those of the processes that will train it.
    if processes > 1:
        folder.facts["processes"] = processes
    # Settings and code are compared here, the images when they are decoded.
    if not fresh:
        folder.load()
    return Stage(data, loss_fn, folder)


def own_student(cfg, student=None):
    """The net to train: the config's, a copy of a net that is handed in, or what a function builds.

    A function's random weights are drawn from cfg.seed. Raises UserError for anything else.
    """
    if student is None:
        return build_student(cfg)
    if not callable(student):
        raise UserError(
            f"student is {kind_of(student)}: hand in a net, or a function or class that builds one "
            "(a net of this module is chosen by the config's key student)"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        net = student if isinstance(student, nn.Module) else student()
        # A copy, so that a second stage with the same net starts from the same weights. A function
        # may give the same net each time.
        net = copy.deepcopy(net)
        draw_lazy_weights(net, cfg.image_size)
    return net


def draw_lazy_weights(net, image_size):
    """Give the lazy layers of a net (nn.LazyLinear) their weights, by one look at an image."""
    if any(isinstance(module, LazyModuleMixin) for module in net.modules()):
        with evaluation_mode(net) as device:
            net(torch.zeros(1, 3, image_size, image_size, device=device))


def run_stage(cfg, data, teacher=None, out=None, fresh=False, device=None, **own):
    """Train one stage, or load it where it is finished, and write <out>/<stage>.csv: its Run.

    own: student, loss_fn_kd, alignment, loss_weights, as `prepare_stage` takes them, which says
    what can be wrong. In a notebook on a machine with several GPUs all of them train, without
    own code.
    """
    device = torch.device(device or pick_device())
    n = processes_for(cfg, stage_folder(cfg, data, out), device, fresh, own)
    stage = prepare_stage(cfg, data, teacher, out, fresh, device, **own, processes=n)
    return stage.train(n)


def split_names(text):
    """The names in a text, between commas."""
    return [name.strip() for name in text.split(",")]


def run(
    data,
    stages=tuple(STAGES),
    teacher_path=None,
    out=None,
    fresh=False,
    length="full",
    final=None,
    **overrides,
):
    """Run stages one after another and write the best by validation as submission.csv: their Runs.

    A better stage of an earlier call in the same folder, on the same images, keeps its place there.

    teacher_path: a file or a list of files (default: the data folder's file, else what
    `train_teacher` left; on the demo set one is trained). A stage that needs a teacher where there
    is none is left out, and that is said.
    final: "csv" repeats the best stage on training and validation images (`final_fit`), "submit"
    also makes that submission.csv. What is wrong raises UserError before any work.
    """
    if isinstance(stages, str):
        stages = split_names(stages)
    check_food_data(data)
    out = results_folder(out)
    device = pick_device()
    configs = [get_config(stage, length, data.is_demo, **overrides) for stage in stages]
    names = [cfg.exp_name for cfg in configs]
    # Stages of one name would share a folder and a CSV.
    if len(set(names)) < len(names):
        raise UserError(f"run wants each stage once, under a name of its own: {', '.join(names)}")
    for cfg in configs:  # before a teacher is trained for the demo set
        check_budget(build_student(cfg), image_size=cfg.image_size)
        if final:
            final_config(cfg, cfg.n_epochs)
    if is_first_process():
        check_writable(out)
    needs_teacher = any(cfg.needs_teacher for cfg in configs)
    path = None
    if needs_teacher:
        path = teacher_file(data, teacher_path, out)
    check_processes_agree(
        {
            "stages": names,
            "images": fingerprint(data.ids, data.labels),
            # Whether there is one: its path may differ from machine to machine.
            "teacher": bool(path),
        }
    )
    teacher = None
    if needs_teacher:
        teacher = find_teacher(data, path, out, device, fresh)
    possible = possible_stages(configs, data, teacher)
    # submission.csv belongs to no stage, so its folder has a lock of its own.
    with locked(out):
        # What is wrong with a later stage is said before the first one trains.
        prepared = [prepare_stage(cfg, data, teacher, out, fresh, device) for cfg in possible]
        runs = train_in_turn(prepared)
        write_best(runs, data, out)
        if final:
            fit_best_again(runs, data, teacher, out, fresh, final)
    return runs


def possible_stages(configs, data, teacher):
    """The configs that can be trained; that a stage is left out for want of a teacher is said."""
    possible = []
    for cfg in configs:
        if teacher is not None or not cfg.needs_teacher:
            possible.append(cfg)
    if not possible:
        raise UserError(
            f"no stage could run without a teacher: put {TEACHER_FILE} into {data.root} "
            f"or use {option('--teacher')}"
        )
    for cfg in configs:
        if cfg not in possible:
            say(
                f"{cfg.exp_name}: left out, for it needs a teacher: "
                f"no {TEACHER_FILE} in {data.root} (see {option('--teacher')})"
            )
    return possible


def train_in_turn(prepared):
    """Train Stages one after another; the Runs, up to the first that is not finished."""
    # Images that a later stage cannot use are named before the first one trains.
    for stage in prepared:
        stage.decode()
    # All stages have the same teacher, which is introduced once.
    taught = [stage for stage in prepared if stage.loss_fn.teacher is not None]
    if taught:
        _, valid = taught[0].decode()
        introduce_teacher(taught[0].loss_fn.teacher, valid)
    # All of them now: stopped on the way, the same call without --fresh finds nothing old.
    for stage in prepared:
        if stage.folder.fresh and is_first_process():
            with stage.folder.lock():
                stage.folder.clear()
    runs = []
    for stage in prepared:
        runs.append(stage.train())
        # The time is up, and a later stage would find none either.
        if not runs[-1].finished:
            say(
                f"{stage.cfg.exp_name} is not finished: "
                "the stages after it, if any, are left for the next time"
            )
            break
    return runs


def best_run(runs):
    """The Run with the best validation accuracy, the first of equal ones; said if unfinished."""
    best = max(runs, key=lambda run: run.valid_acc)
    if not best.finished:
        say(f"the best so far is {best.label}")
    return best


# What a stage leaves for later calls: its score, a hash of the images that it was trained on,
# validated on and asked about, and a hash of its CSV.
Result = namedtuple("Result", "name valid_acc n_valid epochs finished images csv")


def write_result(run, evaluation):
    """Write a Run's Result into its folder. evaluation: the Split that its CSV answers."""
    if not is_first_process():
        return
    images = [run.facts.get(fact) for fact in DATA_FACTS]
    result = Result(
        name=run.name,
        valid_acc=run.valid_acc,
        n_valid=run.n_valid,
        epochs=len(run.history),
        finished=run.finished,
        # By their bytes too, for pictures may be replaced under the same names.
        images=fingerprint(images, evaluation.ids, evaluation.contents),
        csv=text_fingerprint(run.csv),
    )
    write_text(run.folder / RESULT, json.dumps(result._asdict(), indent=1) + "\n")


def read_result(folder):
    """The Result in a stage's folder; None where none is there or it is damaged."""
    try:
        result = Result(**json.loads((folder / RESULT).read_text(encoding="utf-8")))
        # float raises where it is no number, so that such a file counts as damaged.
        return result._replace(valid_acc=float(result.valid_acc))
    except (OSError, ValueError, TypeError):
        return None


def better_result(best, data, out=None):
    """(Result, path of its CSV) of a stage of an earlier call that is better than this call's best.

    None where none is. It has the same images; a better one that cannot be compared is said. The
    first process looks, for all.
    """
    # Both editions of the notebook write submission.csv, so the stages of both count.
    root = results_folder(out)
    places = [stage_folder(best.cfg, data, root / part).parent for part in ("", EXERCISES_FOLDER)]
    found = None
    if is_first_process():
        found = better_result_in(places, best)
    return from_first_process(found)


def better_result_in(places, best):
    """What `better_result` returns, by the files of this process."""
    own = read_result(best.folder)
    to_beat = best.valid_acc
    found = None
    # The best run's own file is among them; it does not beat itself.
    paths = [path for place in places for path in sorted(place.glob(f"*/{RESULT}"))]
    for path in paths:
        result = read_result(path.parent)
        # One without an epoch is no result.
        if result is None or result.epochs == 0 or result.valid_acc <= to_beat:
            continue
        csv_path = path.parent.with_suffix(".csv")
        # A score counts for the same images, and for the very CSV that was written with it.
        why_not = None
        if own is None or result.images != own.images:
            why_not = "its images were others"
        elif not csv_path.is_file() or text_fingerprint(csv_path) != result.csv:
            why_not = f"{csv_path} is not what it wrote"
        if why_not:
            say(f"{result.name} is not compared with {best.name}: {why_not}; run it again")
        else:
            to_beat = result.valid_acc
            found = (result, csv_path)
    return found


def fit_best_again(runs, data, teacher, out, fresh, final):
    """`final_fit` of the best Run, unless a stage of an earlier call is better, which is said."""
    best = best_run(runs)
    better = better_result(best, data, out)
    if better is None:
        final_fit(best, data, teacher, out, fresh, submit_it=final == "submit")
        return
    result, csv_path = better
    say(
        f"no final fit: {result.name} ({csv_path}) is better than {best.name}; "
        "name it among the stages"
    )


def final_fit(validated, data, teacher=None, out=None, fresh=False, submit_it=False, **own):
    """Repeat a validated Run on training and validation images together.

    Returns the path of its CSV; None if it is not finished, or the validated run has no epoch yet.
    Every choice is the validated stage's, its best epoch included: there it stops. No images are
    left to validate on, so it has no validation score. It replaces submission.csv only with
    submit_it=True. own: student, loss_fn_kd, alignment and loss_weights, where the validated stage
    had its own; UserError where they or the teacher are others.
    """
    if validated.history.empty:
        say(f"{validated.name}: no final fit, for it has no epoch yet")
        return None
    # The first of equal epochs, as in `best_so_far`.
    best_epoch = int(validated.history["valid_acc"].argmax()) + 1
    cfg = final_config(validated.cfg, best_epoch)
    name = cfg.exp_name
    # fresh=True, for what lies in the folder is compared below; nothing is cleared before `fit`.
    stage = prepare_stage(cfg, with_validation_images(data), teacher, out, fresh=True, **own)
    for fact, what in HASHED_FACTS.items():
        if stage.folder.facts[fact] != validated.facts[fact]:
            raise UserError(f"{name}: {what} is not that of {validated.name}: hand in the same")
    # It is a run of its own kind, which `evaluate` knows by this fact.
    stage.folder.facts["final"] = True
    if not fresh:
        refuse_other_kind(stage.folder.path, validated.name)
    train, _ = stage.decode()  # first, for it may have moved on to other images
    stage.folder.fresh = fresh or has_moved_on(stage)
    train_loader = BatchLoader(train, cfg, stage.device, train=True)
    history = fit(stage.loss_fn, train_loader, None, stage.folder)
    if not is_finished(history, cfg):
        say(f"{name}: not finished, so no CSV is written; the same call goes on")
        return None
    path = stage.folder.path.with_suffix(".csv")
    write_predictions(stage.student, data, cfg, path, stage.device)
    accuracy = plus_minus(validated.valid_acc, validated.n_valid)
    say(
        f"{name}: repeats {validated.label} (validated {accuracy}) for {best_epoch} epochs "
        f"on {len(train_loader.split):,} images; it has no validation score of its own"
    )
    if submit_it:
        copy_submission(path, data, out, f"the final fit of {validated.name}, as asked")
    return path


def final_config(cfg, n_epochs):
    """The Config of a final fit of a stage, which ends after so many epochs."""
    # Without validation no epoch is better than the one before: `patience` ends it.
    return replace(cfg, exp_name=f"{cfg.exp_name}_final", patience=n_epochs)


def refuse_other_kind(path, name):
    """UserError where the folder of a final fit of a stage holds a run that is none."""
    saved = run_in(path)
    if saved is not None and not saved["facts"].get("final"):
        raise UserError(
            f"{path} holds a run that is no final fit of {name}: rename one of them, or delete it"
        )


def with_validation_images(data):
    """The FoodData whose training images are both the training and the validation images."""
    joined = {}
    for name in ("files", "labels", "ids"):
        splits = getattr(data, name)
        # Training first in each of the three lists, so that they stay parallel.
        joined[name] = splits | {"training": splits["training"] + splits["validation"]}
    return replace(data, **joined)


def has_moved_on(stage):
    """True, and said, if the folder holds a final fit of what the validated stage was before."""
    try:
        stage.folder.load()
    except UserError as error:
        say(f"{stage.cfg.exp_name}: started again, for {error}")
        return True
    return False


def train_teacher(data, out=None, cfg=None, fresh=False):
    """Train a torchvision ResNet from scratch on the training images: the path of its checkpoint.

    The homework allows a teacher of one's own; it is not bound by the parameter limit and never
    submitted. It is also the way on for who has a public copy of Food-11, which holds no teacher
    file. On the demo set it learns from pictures of its own (`with_teacher_pictures`), so that it
    knows more than its students can. cfg: its settings, by default TEACHER_CONFIG. Raises UserError
    where the session's time ends it too early: call it again to go on.
    """
    if cfg is None:
        cfg = TEACHER_CONFIG
        if data.is_demo:
            cfg = replace(cfg, **DEMO_TEACHER_SETTINGS)
        if is_fast():
            cfg = replace(cfg, n_epochs=1)
    if data.is_demo:
        data = with_teacher_pictures(data)
    loss_fn = DistillLoss(cfg, build_student(cfg)).on(pick_device())
    folder = RunFolder(stage_folder(cfg, data, out), loss_fn, data, fresh)
    train_loader, valid_loader = build_loaders(cfg, data, loss_fn.device)
    history = fit(loss_fn, train_loader, valid_loader, folder)
    if not is_finished(history, cfg):
        raise UserError(
            "the teacher is not finished, and a half-trained one must not teach: run again to go on"
        )
    path = folder.path / BEST
    if is_first_on_node() and not is_first_process():  # another machine, which has no file of it
        save_checkpoint(copy_of_weights(loss_fn.student), path)
    barrier()
    return path


def teacher_file(data, path=None, out=None):
    """`path`, else the data folder's file, else that of `train_teacher`, or None.

    The last counts where the training images had these names and labels. It may be of an earlier
    session of Kaggle's, attached as an input.
    """
    # The demo set's teacher is trained on it; one that lies near is of other pictures.
    if not data.is_demo:
        path = path or data.teacher_path
    if path or data.is_demo:
        return path
    folder = stage_folder(TEACHER_CONFIG, data, out)
    files = fingerprint(data.ids["training"], data.labels["training"])
    for place in (folder, *attached_folders(folder, TEACHER_CONFIG)):
        saved = run_in(place)
        if saved is None or saved["facts"].get("training_files") != files:
            continue
        cfg = TEACHER_CONFIG
        with contextlib.suppress(TypeError, UserError):  # of another version of the program
            cfg = Config(**saved["facts"]["config"])
        # A half-trained teacher must not teach.
        if is_finished(saved["history"], cfg) and (place / BEST).is_file():
            return place / BEST
    return None


def find_teacher(data, path=None, out=None, device="cpu", fresh=False):
    """The frozen teacher: of `teacher_file`, else (demo set) trained here.

    None without one. Raises UserError where a file is no teacher.
    """
    path = teacher_file(data, path, out)
    if path is not None:
        return load_teacher(path, device)
    if not data.is_demo:
        return None
    teacher = load_teacher(train_teacher(data, out, fresh=fresh), device)
    teacher.source += ", trained here"
    return teacher


def introduce_teacher(teacher, split, n_images=200):
    """Say which teacher teaches, and its accuracy on some validation images: that accuracy.

    split: validation in the `eval` form; n_images are taken at equal distances, so all classes are
    among them. It is said loudly where the teacher is no better than chance: trained on classes in
    another order, or not trained. Raises UserError where its answers are not finite.
    """
    source = getattr(teacher, "source", "the one handed in")
    n = min(n_images, len(split))
    rows = torch.linspace(0, len(split) - 1, n).long()
    # Fifty at a time, which bounds the memory that feature maps take.
    batches = [(normalize(split.images[part]), split.labels[part]) for part in rows.split(50)]
    logits, labels = predict_logits(teacher, batches)
    if not logits.isfinite().all():
        raise UserError(
            f"the teacher ({source}) cannot teach: its answers to validation images are not finite"
        )
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    score = plus_minus(accuracy, n)
    say(f"teacher: {source}; accuracy {score} on {n} of {len(split):,} validation images")
    # Chance: to answer always with the most frequent class. Two standard errors above it, a
    # teacher knows something; none has to be better than always right.
    chance = max(labels.bincount().max().item() / n, 1 / NUM_CLASSES)
    if accuracy < min(1, chance + 2 * standard_error(chance, n)):
        say(
            f"WARNING: THIS TEACHER IS NO BETTER THAN CHANCE ({chance:.4f}): its classes are in "
            "another order, or it is not trained; students learn its mistakes"
        )
    return accuracy


def module_source():
    """This module's file as it is now; None where it cannot be read."""
    try:
        return Path(__file__).read_bytes()
    except OSError:
        return None


# Read with the import, to be compared when a stage is prepared.
SOURCE_WHEN_IMPORTED = module_source()


def say_if_module_changed():
    """Warn where this module's file was edited after its import: a notebook runs the old one."""
    if module_source() != SOURCE_WHEN_IMPORTED:
        say(
            "WARNING: helpers.py was changed after its import: restart the kernel to use the change"
        )


# ==================================================================================================
# 9  Submission
# ==================================================================================================

# Of a picture's shorter side; 1.0 is its largest central square.
TTA_SCALES = (1.0, 0.75)


def centre_crops(aspects, scale):
    """Matrices (N, 1, 2, 3) to the central square of `scale` times a picture's shorter side.

    In the `whole` form, where a picture of any aspect is a square.
    """
    # A square in pixels: of the longer side, which counts as 1 too, a smaller part.
    wide = scale * (1 / aspects).clamp(max=1)
    high = scale * aspects.clamp(max=1)
    return affine_matrix(wide, 0, 0, high)[:, None, :2].float()


def tta_probabilities(student, eval_loader, whole_loader, scales=TTA_SCALES):
    """Mean class probabilities (N, 11) over test-time variants of each picture; nothing is drawn.

    The variants are the evaluation crop, other scales of it, and the mirror images of them all.
    eval_loader, whole_loader: BatchLoaders of one split in either form, in equal batches.
    """
    crops = []
    for scale in scales:
        matrices = centre_crops(whole_loader.split.aspects, scale)
        # (N, 1, 2, 3): a way to the source and no frame, so `warp` blackens nothing.
        crops.append(matrices.to(whole_loader.device))
    size = whole_loader.cfg.image_size
    parts = []
    with evaluation_mode(student):
        for cropped, whole in zip(eval_loader, whole_loader, strict=True):
            variants = [cropped.images]
            # They are normalised already, which sampling keeps, for its four weights sum to 1.
            variants += [warp(whole.images, matrices[whole.rows], size) for matrices in crops]
            total = 0.0
            for images in variants:
                total = total + F.softmax(student(images).float(), 1)
                total = total + F.softmax(student(images.flip(3)).float(), 1)
            # Two answers to each variant, plain and mirrored: the mean (B, 11).
            parts.append(total.cpu() / (2 * len(variants)))
    return torch.cat(parts)


def predict(student, split, cfg, device="cpu", whole=None):
    """The class (N,) int64 of every image of a Split in the `eval` form, in its order.

    whole: the same split in the `whole` form, for test-time augmentation. Raises UserError where
    the net's answers are not finite.
    """
    student = student.to(device)
    batch_size = 2 * cfg.batch_size
    # Every process predicts all images, so none has to collect the others' parts.
    eval_loader = BatchLoader(split, cfg, device, batch_size=batch_size, shared=False)
    if whole is None:
        answers, _ = predict_logits(student, eval_loader)
    else:
        whole_loader = BatchLoader(whole, cfg, device, batch_size=batch_size, shared=False)
        answers = tta_probabilities(student, eval_loader, whole_loader)
    # The largest of NaNs would be class 0, for every image.
    unusable = ~answers.isfinite().all(1)
    if unusable.any():
        ids = [split.ids[row] for row in unusable.nonzero()[:, 0].tolist()]
        raise UserError(
            f"the net's answers to {len(ids)} {split.name} images ({some_of(ids)}) are not finite: "
            "its weights are damaged or too large"
        )
    return answers.argmax(1)


CSV_COLUMNS = ["Id", "Category"]


def write_submission(path, ids, classes):
    """Write the CSV Id,Category, a row an image in the given order, whole or not at all."""
    # int, for a tensor would be written as "tensor(3)".
    numbers = [int(k) for k in classes]
    rows = pd.DataFrame(dict(zip(CSV_COLUMNS, (list(ids), numbers), strict=True)))
    write_text(path, rows.to_csv(index=False, lineterminator="\n"))


# Wanted ids are written out in memory, so a mistyped number must not ask for billions.
MOST_ROWS = 1_000_000


def validate_submission(path, ids):
    """Return the number of rows of a submission CSV that Kaggle would take.

    ids: the wanted ids, or how many rows ("0000", "0001", ...). As on Kaggle the order of the rows
    does not count (another one is said), nor do quotes, line ends, a byte-order mark and blank last
    lines. UserError names the first row that is wrong, the missing and the double ids.
    """
    rows = read_csv_rows(path)
    if isinstance(ids, int):
        if ids > MOST_ROWS:
            raise UserError(f"{path}: {ids} rows are wanted; at most {MOST_ROWS:,} can be checked")
        ids = [f"{i:04d}" for i in range(ids)]
    if not ids:
        raise UserError(f"{path}: no row is wanted, so there is nothing to check")
    if not rows:
        raise UserError(f"{path}, row 1: the header is missing, not Id,Category")
    if rows[0] != CSV_COLUMNS:
        raise UserError(
            f"{path}, row 1: the header is {quoted(','.join(rows[0]))}, not Id,Category"
        )
    wanted = set(ids)
    found = []
    # Rows count from 1 and with the header, as an editor shows them.
    for number, row in enumerate(rows[1:], 2):
        # The class is plain digits: "07", "3.0" and " 3" are refused.
        if len(row) != 2 or row[0] not in wanted or not re.fullmatch("[0-9]|10", row[1]):
            raise UserError(
                f"{path}, row {number} is {quoted(','.join(row))}: wanted are an id of the "
                f"evaluation images ({ids[0]} to {ids[-1]}), a comma and a class from 0 to "
                f"{NUM_CLASSES - 1}"
            )
        found.append(row[0])
    check_ids_once(path, found, ids)
    if found != list(ids):
        say(f"{path}: the rows are in another order than the files, which Kaggle ignores")
    return len(ids)


def read_csv_rows(path):
    """The rows of a CSV in UTF-8, blank last lines left out; UserError where it is none."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # spreadsheets write a mark first
        # A blank line further up stays: it is a row of no cells, which is refused.
        while lines and not lines[-1].strip():
            lines.pop()
        return list(csv.reader(lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no text in UTF-8 with commas ({error})") from None


def check_ids_once(path, found, ids):
    """UserError naming ids that are missing or there twice."""
    counts = Counter(found)
    missing = [name for name in ids if name not in counts]
    double = [name for name, n in counts.items() if n > 1]
    wrong = []
    if missing:
        wrong.append(f"{len(missing)} ids are missing ({some_of(missing)})")
    if double:
        wrong.append(f"{len(double)} ids are there twice ({some_of(double)})")
    if wrong:
        raise UserError(f"{path}: {len(found)} rows, wanted are {len(ids)}: {' and '.join(wrong)}")


def some_of(names, n=4):
    """The first names of a list, with dots where there are more."""
    text = ", ".join(printable(name) for name in names[:n])
    if len(names) > n:
        text += ", ..."
    return text


def quoted(text, longest=80):
    """A text from a file as a message may show it: visible characters, and not too many."""
    visible = ascii(text)[1:-1]
    if len(visible) > longest:
        visible = visible[:longest] + "..."
    return f"'{visible}'"


def write_predictions(student, data, cfg, path, device, tta=False):
    """Predict the evaluation images, write the CSV and validate it; returns their Split.

    Where labels are known, say the accuracy.
    """
    split = load_data(data, "evaluation", "eval", cfg.image_size)
    whole = None
    if tta:
        whole = load_data(data, "evaluation", "whole", cfg.image_size)
    classes = predict(student, split, cfg, device, whole)
    # Every process has predicted all images; one writes.
    if is_first_process():
        write_submission(path, split.ids, classes)
        # Against the folder's ids, not the split's: a row must not be lost on the way.
        validate_submission(path, data.ids["evaluation"])
    # -1 is an unknown label.
    known = split.labels >= 0
    n = int(known.sum())
    if n > 0:
        accuracy = (classes == split.labels)[known].double().mean().item()
        say(f"accuracy on {n} evaluation images of {data.origin}: {plus_minus(accuracy, n)}")
    return split


def write_best(runs, data, out=None):
    """Copy the CSV of the best run by validation accuracy to submission.csv and return its path.

    The stages of earlier calls count too, those of the exercises edition among them, if their
    images were the same. For the demo set it is submission_demo.csv. Where the labels of the
    evaluation images are known, they are not the homework's: None is returned and that is said.
    """
    best = best_run(runs)
    accuracy = plus_minus(best.valid_acc, best.n_valid)
    on = f"({best.n_valid} images, {data.origin})"
    better = better_result(best, data, out)
    if better is None:
        why = f"{best.label} has the best validation accuracy, {accuracy} {on}"
        return copy_submission(best.csv, data, out, why)
    result, csv_path = better
    name = result.name
    if not result.finished:
        name += " (not finished)"
    why = (
        f"{name}, of an earlier call, has the best validation accuracy, "
        f"{plus_minus(result.valid_acc, result.n_valid)} {on}; "
        f"the best of this call is {best.label}, {accuracy}"
    )
    return copy_submission(csv_path, data, out, why)


def copy_submission(csv_path, data, out, why):
    """Copy a CSV to submission.csv (submission_demo.csv for the demo set) and say why.

    Returns the path, or None where the labels of the evaluation images are known.
    """
    if data.has_evaluation_labels:
        say(
            "no submission.csv: the labels of these evaluation images are known, "
            "so they are not the homework's"
        )
        return None
    name = "submission.csv"
    if data.is_demo:
        name = "submission_demo.csv"
    path = results_folder(out) / name
    if is_first_process():
        write_text(path, csv_path.read_text(encoding="utf-8"))
    say(f"{path} is {csv_path}: {why}")
    return path


def download_link(path):
    """A link for the notebook, from which the browser downloads a file."""
    from IPython.display import HTML

    # A relative link, for the browser sees the notebook server's folders.
    place = os.path.relpath(path)
    link = urllib.parse.quote(Path(place).as_posix())
    return HTML(f'<a href="{link}" download>Download {html.escape(place)}</a>')


# ==================================================================================================
# 10  Pictures
# ==================================================================================================

# Okabe and Ito's palette, which colour-blind readers and grey print keep apart; a stage keeps its
# colour, marker and line.
STAGE_STYLES = {
    "simple": ("#E69F00", "o", "-"),
    "medium": ("#56B4E9", "s", "--"),
    "strong": ("#009E73", "^", "-."),
    "boss": ("#CC79A7", "D", ":"),
    "beyond": ("#D55E00", "v", (0, (6, 1, 1, 1, 1, 1))),  # a dash and two dots
    "teacher": ("#000000", "*", "-"),
}
# In turn for runs of other names.
SPARE_STYLES = (
    ("#777777", "x", "-"),
    ("#0072B2", "P", "--"),
    ("#8C564B", "h", "-."),
    ("#332288", "X", ":"),
)


def stage_style(name, number=0):
    """{"color", "marker", "ls"} of a stage; of any other name that of the spare style `number`."""
    spare = SPARE_STYLES[number % len(SPARE_STYLES)]
    color, marker, line = STAGE_STYLES.get(name, spare)
    return {"color": color, "marker": marker, "ls": line}


def styles_of(names):
    """{name: style} of one figure's lines. No two stages look alike, nor do four other names."""
    others = [name for name in names if name not in STAGE_STYLES]
    styles = {name: stage_style(name) for name in names if name in STAGE_STYLES}
    return styles | {name: stage_style(name, number) for number, name in enumerate(others)}


class AltTextFigure(plt.Figure):
    """A Figure that a notebook shows with an alt text: its title, and what it shows."""

    alt_text = ""  # one line, which `new_figure` starts with the title and `describe` goes on with

    def describe(self, text):
        """Say after the title what the figure shows, for who cannot see it."""
        self.alt_text = f"{self.alt_text}. {text}"

    def _repr_html_(self):
        return self._as_html(self._drawn())

    def _repr_mimebundle_(self, include=None, exclude=None):
        """HTML, for a picture output has no alt text when a notebook is rendered.

        The PNG beside it is for what takes no HTML, LaTeX say.
        """
        picture = self._drawn()
        return {
            "text/html": self._as_html(picture),
            "image/png": png_of_few_colours(picture),
            "text/plain": self.alt_text,
        }

    @illustration()
    def _ipython_display_(self):
        """Called by IPython, before it looks for anything else."""
        from IPython.display import display

        display(self._repr_mimebundle_(), raw=True)

    def _drawn(self):
        """The figure as a PIL image."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return Image.open(buffer).convert("RGB")

    def _as_html(self, picture):
        """A PIL image of the figure as an HTML image."""
        if can_write_webp():  # a third of the size of the PNG, which counts in a notebook
            source = "data:image/webp;base64," + as_base64(picture, "webp", quality=85)
        else:
            source = "data:image/png;base64," + png_of_few_colours(picture)
        alt_text = html.escape(self.alt_text)
        # On a narrow screen it shrinks until its letters are 9 pixels high, and then scrolls.
        width = math.ceil(picture.width * min(1, 9 / self.smallest_letters()))
        style = f"max-width:100%;min-width:{width}px"
        image = f'<img alt="{alt_text}" style="{style}" src="{source}">'
        return f'<div style="overflow-x:auto">{image}</div>'

    def smallest_letters(self):
        """The size of its smallest text in pixels."""
        points = 12.0
        for text in self.findobj(Text):
            if text.get_visible() and text.get_text():
                points = min(points, text.get_fontsize())
        return points * self.dpi / 72  # a point is 1/72 inch


def can_write_webp():
    """Whether this Pillow was built with WebP."""
    Image.init()
    return "WEBP" in Image.SAVE


def as_base64(picture, form, **options):
    """A PIL image as the text of a file of a form ("webp", "png") in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def png_of_few_colours(picture):
    """A PIL image as a PNG in base64. Of 64 colours, which are a third of the size of all."""
    return as_base64(picture.quantize(64), "png", optimize=True)


def new_figure(title, rows=1, columns=1, width=8.0, height=3.2):
    """(Figure, (rows, columns) array of Axes); width and height in inches.

    It is closed in pyplot, so that a notebook shows it once, as a value.
    """
    figure = plt.figure(
        figsize=(width, height), dpi=80, layout="constrained", FigureClass=AltTextFigure
    )
    plt.close(figure)
    figure.suptitle(title, fontsize=11)
    figure.alt_text = " ".join(title.split())
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


# --- pictures of ideas ----------------------------------------------------------------------------

STUDENT_COLOR = STAGE_STYLES["medium"][0]
TEACHER_COLOR = STAGE_STYLES["teacher"][0]
LOSS_COLOR = STAGE_STYLES["simple"][0]


def new_diagram(title, height):
    """(Figure, Axes) for a drawing: 10 units wide, 2 units an inch, the origin at the bottom left.

    height: in units. Five inches and letters of 11 points stay readable 300 pixels wide.
    """
    # Two units an inch, and 0.3 inches for the title.
    figure, axes = new_figure(title, width=5, height=height / 2 + 0.3)
    ax = axes[0, 0]
    ax.set(xlim=(0, 10), ylim=(0, height), xticks=[], yticks=[])
    ax.axis("off")
    return figure, ax


def draw_box(ax, center, text, color=TEACHER_COLOR, width=1.9, height=1.2, dashed=False):
    """A box with a coloured frame around a text; center (x, y), width and height in units."""
    x, y = center
    corner = (x - width / 2, y - height / 2)
    line = "--" if dashed else "-"
    # A thin tint of the frame's colour inside, on which black letters can be read.
    ax.add_patch(plt.Rectangle(corner, width, height, color=color, alpha=0.15, lw=0))
    ax.add_patch(plt.Rectangle(corner, width, height, fill=False, ec=color, ls=line, lw=2))
    ax.text(x, y, text, ha="center", va="center", fontsize=11)


def draw_arrow(ax, start, end, bend=0.0):
    """An arrow from a point to another; bend: how far it swings out, as a part of its length."""
    style = {"arrowstyle": "-|>", "lw": 1.5, "color": "#555555"}
    style["connectionstyle"] = f"arc3,rad={bend}"
    ax.annotate("", xy=end, xytext=start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})


@illustration()
def plot_kd_diagram():
    """Knowledge distillation: one view, both nets, their softened answers and the two losses."""
    figure, ax = new_diagram("knowledge distillation", 6)
    draw_box(ax, (0.9, 3.6), "one view", width=1.7)
    draw_box(ax, (3.5, 5.2), "teacher\n(frozen)", dashed=True)
    draw_box(ax, (3.5, 3.0), "student", STUDENT_COLOR)
    draw_box(ax, (6.2, 5.2), "softmax\nof z / T")
    draw_box(ax, (6.2, 3.0), "softmax\nof z / T", STUDENT_COLOR)
    draw_box(ax, (3.5, 0.7), "label")
    draw_box(ax, (8.9, 4.1), "α T² KL", LOSS_COLOR)
    draw_box(ax, (8.9, 0.7), "(1 – α) CE", LOSS_COLOR)
    # Both nets get the same view.
    draw_arrow(ax, (1.75, 4.0), (2.55, 5.0))
    draw_arrow(ax, (1.75, 3.4), (2.55, 3.0))
    for y in (5.2, 3.0):
        draw_arrow(ax, (4.45, y), (5.25, y))
    draw_arrow(ax, (7.15, 5.2), (7.95, 4.4))
    draw_arrow(ax, (7.15, 3.0), (7.95, 3.8))
    # Cross-entropy takes the student's logits as they are, T = 1.
    draw_arrow(ax, (4.45, 2.6), (7.95, 1.1))
    draw_arrow(ax, (4.45, 0.7), (7.95, 0.7))
    figure.describe(
        "One view of an image goes to the frozen teacher and to the student. The logits of both "
        "are divided by T and go through a softmax; KL compares them, weighted by alpha T squared. "
        "The student's plain logits meet the label in cross-entropy, weighted by 1 - alpha."
    )
    return figure


def draw_channels(ax, x, color, n=4):
    """A column of squares, each of them a channel."""
    ax.plot([x] * n, range(n), "s", color=color, markersize=15, clip_on=False)


def draw_links(ax, x, to_x, pairs, width):
    """Lines between the channels of two columns; pairs: (from, to)."""
    for start, end in pairs:
        ax.plot([x, to_x], [start, end], color="#555555", lw=width, zorder=0)


@illustration()
def plot_convolutions(in_channels=128, out_channels=256):
    """What sees what in a full 3x3 convolution and in depthwise + pointwise, and their weights."""
    weights = dwpw_arithmetic(in_channels, out_channels)["weights"]
    full = weights["full convolution"]
    split = weights["depthwise + pointwise"]
    title = f"{in_channels} channels to {out_channels}"
    figure, axes = new_figure(title, columns=2, width=5, height=3)
    every_pair = list(itertools.product(range(4), range(4)))
    same_channel = [(channel, channel) for channel in range(4)]
    left, right = axes[0]

    draw_links(left, 0, 1, every_pair, 3.0)  # thick: 3x3 = 9 weights a line
    left.set_title(f"full 3x3:\n{full:,} weights", fontsize=11)
    for x in (0, 1):
        draw_channels(left, x, LOSS_COLOR)

    draw_links(right, 0, 1, same_channel, 3.0)
    draw_links(right, 1, 2, every_pair, 0.8)  # thin: one weight a line
    right.set_title(f"3x3, then 1x1:\n{split:,} weights", fontsize=11)
    for x in (0, 1, 2):
        draw_channels(right, x, STAGE_STYLES["strong"][0])
    for ax in (left, right):
        ax.margins(0.15)
        ax.set(xticks=[], yticks=[])
        ax.axis("off")
    figure.describe(
        "Left, a full 3x3 convolution: every output channel sees every input channel through nine "
        f"weights, {full:,} in all. Right: each channel goes through a 3x3 filter of its own, then "
        f"a 1x1 convolution mixes them, one weight a pair: {split:,} weights, {split / full:.0%}."
    )
    return figure


@illustration()
def plot_inverted_residual(channels=32, expansion=3, kernel_size=3):
    """The channels of an inverted residual from its input to its output, and where its weights are.

    The counts are those of an InvertedResidual, batch norms included.
    """
    block = InvertedResidual(channels, channels, kernel_size, expansion=expansion)
    wide = channels * expansion
    figure, ax = new_diagram("an inverted residual", 6.4)
    color = STAGE_STYLES["strong"][0]
    # The wide maps are drawn higher, whatever the expansion, so that both fit.
    for x, width, height in (
        (0.8, channels, 1),
        (3.6, wide, 3),
        (6.4, wide, 3),
        (9.2, channels, 1),
    ):
        draw_box(ax, (x, 3.2), str(width), color, width=0.9, height=height)
    parts = []
    for x, name in ((2.2, "expand"), (5.0, "depthwise"), (7.8, "project")):
        layer = getattr(block, name)
        size = layer[0].kernel_size[0]
        count = sum(weight.numel() for weight in layer.parameters())
        # Boxes are 0.9 wide and their centres 2.8 apart: the arrow fills the gap.
        draw_arrow(ax, (x - 0.95, 3.2), (x + 0.95, 3.2))
        ax.text(x, 0.9, f"{name}\n{size}x{size}\n{count:,}", ha="center", va="center", fontsize=11)
        parts.append(f"{name} {size}x{size}, {count:,} parameters")
    draw_arrow(ax, (0.8, 3.7), (9.2, 3.7), bend=-0.36)
    ax.text(5.0, 6.0, "shortcut: + input", ha="center", va="center", fontsize=11)
    figure.describe(
        f"{channels} channels are widened to {wide}, filtered one by one, and narrowed again to "
        f"{channels}; a shortcut adds the input to the output. {'; '.join(parts)}."
    )
    return figure


@illustration()
def plot_alignment_diagram(cfg=None):
    """How layers are compared: the student's map, its adapter, and the teacher's map, by layer.

    cfg: the stage whose layers and weights are drawn; Boss without one.
    """
    layers = (cfg or BOSS).aligned_layers  # {layer: weight}
    figure, ax = new_diagram("alignment", 2 * len(layers) + 0.8)
    top = 2 * len(layers)
    ax.text(0.9, top + 0.3, "student", ha="center", fontsize=11)
    ax.text(9.1, top + 0.3, "teacher", ha="center", fontsize=11)
    for row, (layer, weight) in enumerate(layers.items()):
        # Two units a layer, from the top down.
        y = top - 0.9 - 2 * row
        draw_box(ax, (0.9, y), layer, STUDENT_COLOR, width=1.6)
        draw_box(ax, (3.7, y), "pool,\n1x1 adapter", STAGE_STYLES["boss"][0], width=2.5)
        draw_box(ax, (6.6, y), f"{weight:g} x\nsmooth L1", LOSS_COLOR, width=2.1)
        draw_box(ax, (9.1, y), layer, width=1.6, dashed=True)
        draw_arrow(ax, (1.7, y), (2.45, y))
        draw_arrow(ax, (4.95, y), (5.55, y))
        draw_arrow(ax, (8.3, y), (7.65, y))
        if row > 0:  # each net computes this layer from the one above
            for x in (0.9, 9.1):
                draw_arrow(ax, (x, y + 1.4), (x, y + 0.6))
    weights = ", ".join(f"{layer} {weight:g}" for layer, weight in layers.items())
    figure.describe(
        "In each layer the larger of two maps is averaged down, a 1x1 adapter brings the student's "
        "to the teacher's width, and smooth L1 compares it with the teacher's. "
        f"Weights: {weights}."
    )
    return figure


# Name, colour and line of each term of the loss.
TERM_STYLES = {
    "ce": ("CE", LOSS_COLOR, "-"),
    "kl": ("T² KL", STUDENT_COLOR, "--"),
    "align": ("alignment", STAGE_STYLES["boss"][0], ":"),
}


def weights_by_epoch(cfg, epochs):
    """A DataFrame of what multiplies each term of the loss, a row for each of the epochs (from 1).

    The columns are those of log.csv: ce, kl (T^2 KL) and align.
    """
    rows = []
    for epoch in epochs:
        # Epochs count from 1 here, so this is the p of `set_progress`.
        kd, alpha, align = loss_weights(cfg, epoch / cfg.n_epochs)
        if not cfg.needs_teacher:  # labels alone
            kd, alpha, align = LossWeights(kd=1.0, alpha=0.0, align=0.0)
        # kd * [alpha T^2 KL + (1 - alpha) CE] + align * alignment, term by term.
        rows.append({"ce": kd * (1 - alpha), "kl": kd * alpha, "align": align})
    return pd.DataFrame(rows, index=pd.Index(epochs, name="epoch"))


@illustration()
def plot_loss_terms(run):
    """The weights of a Run's loss terms over its epochs, and below what each adds to the loss.

    The weights are those of this module's `loss_weights`. Raises UserError before the first epoch.
    """
    if run.history.empty:
        raise UserError(f"{run.label}: no epoch yet, so there are no terms to show")
    history = run.history.set_index("epoch")
    loss = history["train_loss"]
    weights = weights_by_epoch(run.cfg, history.index)
    figure, axes = new_figure(f"loss of {run.label}: {run.origin}", 2, 1, 5, 5)
    upper, lower = axes[:, 0]
    changes = []
    for term, (name, color, line) in TERM_STYLES.items():
        # What a stage's loss does not need is not in its log, or empty there.
        if term not in history or history[term].isna().all():
            continue
        upper.plot(weights[term], ls=line, color=color, lw=2.5, label=name)
        lower.plot(weights[term] * history[term], ls=line, color=color, lw=2.5, label=name)
        changes.append(f"{name} from {weights[term].iloc[0]:.2g} to {weights[term].iloc[-1]:.2g}")
    # What the terms and weights, which are this module's, do not show.
    own = [f.__name__ for f in (loss_fn_kd, loss_weights) if had_own(run.facts, f)]
    name = "the loss"
    if own:
        name = f"the loss, with your own {' and '.join(own)}"
        figure.describe(f"Terms and weights are not those of your own {' and '.join(own)}")
    lower.plot(loss, color=TEACHER_COLOR, lw=1, label=name)
    upper.set_ylabel("weight", fontsize=11)
    lower.set_ylabel("weight x term", fontsize=11)
    lower.set_xlabel("epoch", fontsize=11)
    lower.legend(fontsize=11, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.3))
    figure.describe(
        f"The training loss goes from {loss.iloc[0]:.2f} to {loss.iloc[-1]:.2f}; its lowest value "
        f"is {loss.min():.2f}, in epoch {loss.idxmin()}. Weights: {', '.join(changes)}."
    )
    return figure


# --- pictures of data -----------------------------------------------------------------------------


def draw_picture(ax, image, title=""):
    """Draw a (3, H, W) uint8 or normalised float image, or a map (H, W) of any numbers."""
    if image.ndim == 3 and image.is_floating_point():
        mean, std = mean_and_std(torch.device("cpu"))
        # Back to pixels of 0..255, which is what mean and deviation are in.
        image = (image.cpu() * std + mean).clamp(0, 255).byte()
    if image.ndim == 3:
        image = image.movedim(0, -1)  # (H, W, 3), as matplotlib wants it
    ax.imshow(image.numpy())
    ax.set_title(title, fontsize=9)
    ax.axis("off")


def picture_grid(title, cells, rows, columns, width, height):
    """A figure of pictures, row by row.

    cells: a list of (image, title), or None for a place that stays empty. Places after the last
    cell stay empty too.
    """
    figure, axes = new_figure(title, rows, columns, width, height)
    for ax in axes.flat:
        ax.axis("off")
    for ax, cell in zip(axes.flat, cells, strict=False):
        if cell is not None:
            image, image_title = cell
            draw_picture(ax, image, image_title)
    return figure


@illustration()
def plot_samples(split, per_class=2):
    """A few images of each class, a column a class."""
    cells = []
    for place in range(per_class):
        for label, name in enumerate(CLASS_NAMES):
            rows = (split.labels == label).nonzero()[:, 0].tolist()
            if place >= len(rows):
                cells.append(None)
            elif place == 0:
                cells.append((split.images[rows[0]], name))
            else:
                cells.append((split.images[rows[place]], ""))
    title = f"{split.name} images by class: {split.origin}"
    return picture_grid(title, cells, per_class, NUM_CLASSES, 11, 1 + per_class)


@illustration()
def plot_views(loader, n_images=3, n_views=6):
    """What training sees: each row one picture in several epochs of a training BatchLoader."""
    rows = torch.linspace(0, len(loader.split) - 1, n_images).long()
    views = []  # of each epoch (n_images, 3, S, S)
    for epoch in range(n_views):
        loader.set_epoch(epoch)
        views.append(loader.views_of(rows))

    cells = []
    for i in range(n_images):
        for epoch in range(n_views):
            image_title = ""
            if i == 0:
                image_title = f"epoch {epoch + 1}"
            cells.append((views[epoch][i], image_title))
    title = f"the training views of {loader.cfg.exp_name}: {loader.split.origin}"
    return picture_grid(title, cells, n_images, n_views, 9, 1.5 * n_images)


@illustration()
def plot_epoch_parts(parts, origin):
    """Stacked bars of where an epoch's seconds go: {loader's name: what `epoch_parts` returns}."""
    # A loader that could not be timed (None) has no bar.
    parts = {name: seconds for name, seconds in parts.items() if seconds}
    title = f"seconds of an epoch under each loader: {origin}"
    figure, axes = new_figure(title, height=1.2 + 0.5 * len(parts))
    ax = axes[0, 0]
    frame = pd.DataFrame(parts).T  # a row a loader, a column a part
    colors = ["#E69F00", "#56B4E9"]
    frame.plot.barh(ax=ax, stacked=True, color=colors, edgecolor="black", width=0.7)
    totals = [f"{sum(seconds.values()):,.1f} s" for seconds in parts.values()]
    # The last container holds the outer bars, at whose ends the totals belong.
    ax.bar_label(ax.containers[-1], totals, padding=3)
    ax.invert_yaxis()  # the first loader on top
    ax.margins(x=0.12)
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=2, frameon=False, fontsize=9)
    return figure


@illustration()
def plot_lines(frame, title, ylabel, errors=None, **axes_settings):
    """Each column of a DataFrame as a line over its index.

    errors: a Series for all columns or a DataFrame of the same columns, drawn as bars of +- one.
    axes_settings are set on the axes (xscale="log", ...).
    """
    figure, axes = new_figure(title, width=7)
    ax = axes[0, 0]
    if isinstance(errors, pd.Series):
        errors = pd.DataFrame(dict.fromkeys(frame, errors))
    parts = []
    for column, style in zip(frame, itertools.cycle(["o-", "s--", "D-.", "^:", "v-"])):
        values = frame[column]
        ax.plot(values.index, values, style, markersize=5, label=column)
        if errors is not None:
            color = ax.lines[-1].get_color()
            ax.errorbar(values.index, values, errors[column], ls="", color=color, capsize=4)
        parts.append(f"{column} {', '.join(f'{value:.3g}' for value in values)}")
    ax.set(xlabel=frame.index.name, ylabel=ylabel, **axes_settings)
    if ax.get_yscale() == "log":
        plain_numbers(ax.yaxis)
    # A tick at each value that was measured, also on a logarithmic scale.
    tick_labels = [f"{x:g}" for x in frame.index]
    ax.set_xticks(frame.index, tick_labels, minor=False)
    ax.legend(fontsize=9)
    figure.describe(f"{ylabel} at {', '.join(tick_labels)}: {'; '.join(parts)}.")
    return figure


# Accuracy on this project's photographs after 30 epochs, 112 px, seed 1 (tests/bench/RESULTS.md):
# (who, parameters, validation, evaluation).
PHOTOGRAPH_RESULTS = (
    ("the course's net, labels alone", 59_723, 0.569, 0.557),
    ("the course's net, distilled", 59_723, 0.589, 0.557),
    ("best published net within the limit", 59_790, 0.586, 0.587),
    ("published Boss, cut to the limit", 58_235, 0.605, 0.624),
    ("published Boss", 99_891, 0.660, 0.659),
    ("Strong", 52_795, 0.672, 0.662),
    ("Beyond without the schedule", 52_795, 0.697, 0.675),
    ("Boss", 52_795, 0.707, 0.700),
    ("the teacher", 11_182_155, 0.763, 0.754),
)
PHOTOGRAPHS_SCORED = 1_493  # images in each of the two splits


def photograph_results():
    """What was measured on photographs (not Food-11): a DataFrame, a row a recipe.

    validation: the best of 30 epochs, chosen by the very images it is scored on. evaluation: images
    whose labels nobody had while anything was chosen. Nothing here depends on the notebook's data.
    """
    columns = ["30 epochs on photographs", "parameters", "validation", "evaluation"]
    frame = pd.DataFrame(PHOTOGRAPH_RESULTS, columns=columns).set_index(columns[0])
    frame["+- s.e."] = standard_error(frame["evaluation"], PHOTOGRAPHS_SCORED).round(3)
    # First what counts, so that it is on a narrow screen too.
    return frame[["evaluation", "+- s.e.", "validation", "parameters"]]


@illustration()
def plot_photograph_results():
    """`photograph_results` as two marks a recipe, with bars of +- one standard error."""
    frame = photograph_results()
    title = "the project's own photographs (not Food-11, not this notebook's data)"
    figure, axes = new_figure(title, width=7, height=4)
    ax = axes[0, 0]
    places = range(len(frame))
    # Side by side, so that neither bar hides the other.
    for split, label, mark, shift in (
        ("validation", "validation, best epoch", "s", -0.12),
        ("evaluation", "evaluation", "o", 0.12),
    ):
        errors = standard_error(frame[split], PHOTOGRAPHS_SCORED)
        heights = [place + shift for place in places]
        ax.errorbar(frame[split], heights, xerr=errors, fmt=mark, capsize=3, label=label)
    ax.set_yticks(places, frame.index)
    ax.set_xlabel("accuracy, +- one standard error")
    ax.grid(axis="x", alpha=0.3)
    ax.legend(fontsize=9, loc="lower right")
    parts = [f"{name} {value:.3f}" for name, value in frame["evaluation"].items()]
    figure.describe(f"Evaluation accuracy from bottom to top: {', '.join(parts)}.")
    return figure


def attention_map(model, images, layer):
    """How active a layer is at each place: the mean square over its channels, (B, H, W).

    Images are (B, 3, S, S) (Zagoruyko, Komodakis 2017).
    """
    features = features_of(model, [layer], images)[layer]  # (B, C, H, W)
    return features.float().square().mean(1).cpu()


def correlation(a, b):
    """The correlation of two maps (H, W) over their places."""
    return torch.corrcoef(torch.stack([a.ravel(), b.ravel()]))[0, 1]


@illustration()
def plot_attention(images, nets, layer, origin):
    """Pictures (B, 3, S, S), and below them where a layer of each net looks.

    nets: {name: net}, the teacher first. The number is the correlation of a map with the first
    net's.
    """
    maps = {}  # {name: (B, H, W)}
    for name, net in nets.items():
        maps[name] = attention_map(net, images, layer)
    # All are averaged down to the smallest, so that they can be compared place by place.
    side = min(net_maps.shape[-1] for net_maps in maps.values())
    for name in maps:
        # (B, H, W) -> (B, side, side): torch takes B for channels of a single image.
        maps[name] = F.adaptive_avg_pool2d(maps[name], side)

    first_name = next(iter(nets))
    cells = [(image, "") for image in images]
    for name in nets:
        for own, first in zip(maps[name], maps[first_name], strict=True):
            image_title = name
            if name != first_name:
                image_title = f"{name}, {correlation(own, first):+.2f}"
            cells.append((own, image_title))
    title = f"where {layer} is active: {origin}"
    rows = len(nets) + 1
    return picture_grid(title, cells, rows, len(images), 9, 1.6 * rows)


@illustration()
def plot_soft_labels(logits, images, temperatures, origin, soft_labels=soft_labels):
    """Pictures and what the teacher's logits become at several temperatures, a row a picture.

    logits (n, 11) and images (n, 3, S, S), or those of one picture, (11,) and (3, S, S).
    soft_labels: your own in place of this module's.
    """
    logits = logits.reshape(-1, NUM_CLASSES)
    images = images.reshape(-1, *images.shape[-3:])
    title = f"the teacher's soft labels: {origin}"
    rows = len(logits)
    figure, axes = new_figure(title, rows, len(temperatures) + 1, 11, 0.5 + 2.9 * rows)
    color = stage_style("teacher")["color"]
    for row in range(rows):
        draw_picture(axes[row, 0], images[row])
        heights = []  # of the longest bar, by temperature
        for column, temperature in enumerate(temperatures, 1):
            ax = axes[row, column]
            probabilities = soft_labels(logits[row], temperature)
            ax.barh(CLASS_NAMES, probabilities.tolist(), color=color)
            ax.set(xlim=(0, 1), title=f"T = {temperature:g}")
            ax.invert_yaxis()  # the first class on top
            # The class names stand once, left of the first chart.
            ax.tick_params(labelsize=9, labelleft=column == 1)
            heights.append(f"{probabilities.max():.2f} at T = {temperature:g}")
        name = CLASS_NAMES[logits[row].argmax()]
        figure.describe(f"Picture {row + 1}: {name} has {', '.join(heights)}")
    return figure


@illustration()
def plot_history(runs, published=None):
    """Training loss and validation accuracy by epoch of several Runs.

    The bar at each best epoch is +- one standard error. published: {name: score}, which become
    thin lines.
    """
    runs = list(runs)
    names = ", ".join(run.label for run in runs)
    title = f"learning curves of {names}: {runs[0].origin}"
    figure, axes = new_figure(title, 1, 2, 10, 3.6)
    loss_ax, accuracy_ax = axes[0]
    best = []
    styles = styles_of([run.name for run in runs])
    for run in runs:
        style = styles[run.name]
        draw_history(loss_ax, run, "train_loss", style)
        draw_history(accuracy_ax, run, "valid_acc", style)
        draw_best(accuracy_ax, run, style["color"])
        best.append(f"{run.label} {plus_minus(run.valid_acc, run.n_valid)}")
    for name, score in (published or {}).items():
        color = stage_style(name)["color"]
        accuracy_ax.axhline(score, ls="-", lw=0.8, color=color, label=f"{name}, published")
    # Losses of different kinds are not comparable, hence the hint in the label.
    loss_ax.set(xlabel="epoch", ylabel="training loss (each stage its own)", yscale="log")
    accuracy_ax.set(xlabel="epoch", ylabel="validation accuracy")
    plain_numbers(loss_ax.yaxis)
    accuracy_ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.describe(f"Best validation accuracy: {', '.join(best)}.")
    return figure


def plain_numbers(axis):
    """Label a logarithmic axis with 0.5 and 20, not with powers of ten, whose letters are small."""
    # Labels at 1, 2 and 5 times each power of ten; minor ticks have none.
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def draw_history(ax, run, column, style):
    """Draw a column of a Run's history over its epochs; style: as stage_style gives it."""
    history = run.history
    some = max(1, len(history) // 8)  # a marker at each epoch would hide the line
    marks = {"markersize": 5, "markevery": some, "lw": 1.6}
    ax.plot(history["epoch"], history[column], label=run.label, **style, **marks)


def draw_best(ax, run, color):
    """Draw a Run's accuracy at its best epoch with a bar of +- one standard error."""
    scores = run.history["valid_acc"]
    if scores.empty:
        return
    # The first of equal epochs, as in `best_so_far`.
    epoch = run.history["epoch"][scores.idxmax()]
    error = standard_error(run.valid_acc, run.n_valid)
    ax.errorbar([epoch], [run.valid_acc], [error], color=color, capsize=4, lw=2)


def confusion_matrix(labels, classes):
    """(11, 11) int64: row = true class, column = predicted class. labels, classes: (N,) int64."""
    # Each pair (true, predicted) has a number of its own, which is counted: (121,).
    pairs = labels * NUM_CLASSES + classes
    counts = torch.bincount(pairs, minlength=NUM_CLASSES**2)
    return counts.view(NUM_CLASSES, NUM_CLASSES)


@illustration()
def plot_confusion(labels, classes, origin):
    """The confusion matrix as fractions of each true class, with counts."""
    counts = confusion_matrix(labels, classes)
    # A class without images has a row of zeros, not of 0 / 0.
    fractions = counts / counts.sum(1, keepdim=True).clamp(min=1)
    title = f"confusion matrix, validation: {origin}"
    figure, axes = new_figure(title, width=7, height=6)
    ax = axes[0, 0]
    ax.imshow(fractions.numpy(), cmap="cividis", vmin=0, vmax=1)
    for i, j in counts.nonzero().tolist():
        color = "white"
        if fractions[i, j] > 0.5:  # where the colour map is bright
            color = "black"
        # x is the column, the predicted class; y the row, the true one.
        ax.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=9, color=color)
    ax.set_xticks(range(NUM_CLASSES), CLASS_NAMES, rotation=45, ha="right", fontsize=9)
    ax.set_yticks(range(NUM_CLASSES), CLASS_NAMES, fontsize=9)
    ax.set(xlabel="predicted", ylabel="true")
    return figure


def calibration_bins(labels, logits, n_bins):
    """(mean confidence, accuracy, number of images) in bins of confidence of equal width.

    labels: (N,); logits: (N, 11). Three Series with an entry for each bin that holds an image.
    """
    # How sure the net is, and of what: the largest probability and its class, (N,) each.
    confidence, classes = soft_labels(logits, 1.0).max(1)
    right = classes == labels  # (N,) bool

    # A row an image. In double precision, for the means are over many.
    images = pd.DataFrame({"confidence": confidence.double(), "right": right.double()})

    # The bin of each image, (N,): bin k holds confidences from k / n_bins up to (k + 1) / n_bins.
    # A confidence of exactly 1 would open a bin of its own; it belongs to the last one.
    bin_numbers = (images["confidence"] * n_bins).clip(upper=n_bins - 1).astype(int)

    # A row a bin, in order of confidence; bins without an image do not appear.
    bins = images.groupby(bin_numbers)
    means = bins.mean()
    return means["confidence"], means["right"], bins.size()


@illustration()
def plot_calibration(labels, logits, origin, bins=10):
    """Accuracy against confidence of several nets, {name: logits (N, 11)}; labels: (N,).

    On the diagonal a net knows how sure it is. Below it stands how many images each bin holds. The
    bars of the points are +- one standard error; bins of less than five images have no point. ECE
    is the mean distance from the diagonal, weighted by the images of each bin (Guo et al. 2017).
    """
    figure, axes = new_figure(f"calibration, validation: {origin}", 2, 1, 6, 5.5)
    upper, lower = axes[:, 0]
    upper.plot([0, 1], [0, 1], color="#BBBBBB", ls="--")
    # The bars of all nets, side by side, fill 0.8 of a bin.
    width = 0.8 / bins / len(logits)
    styles = styles_of(logits)
    for number, (name, net_logits) in enumerate(logits.items()):
        # Three Series, (filled bins,) each.
        confidence, accuracy, n = calibration_bins(labels, net_logits, bins)
        # Each bin's distance from the diagonal counts by its images, also where it is not drawn.
        distance = abs(confidence - accuracy)
        error = (distance * n).sum() / n.sum()
        figure.describe(f"{name}: ECE {error:.3f}, {calibration_side(confidence, accuracy, n)}")
        # The accuracy over a handful of images says little: such a point would mislead.
        drawn = n >= 5
        bars = standard_error(accuracy, n)[drawn]
        style = styles[name]
        points = (confidence[drawn], accuracy[drawn], bars)
        upper.errorbar(*points, label=f"{name}: ECE {error:.3f}", capsize=3, **style)
        # n.index holds the numbers of the bins; a tenth of a bin stays free on either side.
        left = (n.index + 0.1) / bins + number * width
        lower.bar(left, n, width, align="edge", color=style["color"], edgecolor="black", lw=0.5)
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    lower.set(xlabel="confidence (largest probability)", ylabel="images", xlim=(0, 1))
    upper.legend(fontsize=9)
    return figure


def calibration_side(confidence, accuracy, n):
    """Whether a net is right more or less often than it says, in words; Series over bins."""
    gap = ((accuracy - confidence) * n).sum() / n.sum()
    if gap > 0:
        return f"right {gap:.3f} more often than it says"
    return f"right {-gap:.3f} less often than it says"


@illustration()
def plot_mistakes(split, classes, right=None, n=12):
    """A grid of images that were classified wrongly, with the true and the predicted class.

    classes: (N,). right: classes of another net, (N,); shown are the mistakes of the one that the
    other gets right.
    """
    mistaken = classes != split.labels  # (N,) bool
    what = "mistakes"
    if right is not None:
        mistaken = mistaken & (right == split.labels)
        what = "mistakes of the student that the teacher gets right"
    wrong = mistaken.nonzero()[:, 0].tolist()

    cells = []
    for i in wrong[:n]:
        true_name = CLASS_NAMES[split.labels[i]]
        predicted_name = CLASS_NAMES[classes[i]]
        cells.append((split.images[i], f"{true_name}\nnot {predicted_name}"))
    title = (
        f"{len(wrong)} {what}, {len(split)} {split.name} images "
        f"(first {len(cells)}): {split.origin}"
    )
    rows = max(1, math.ceil(len(cells) / 6))  # a figure without mistakes is a row of nothing
    return picture_grid(title, cells, rows, 6, 10, 2 * rows)


# ==================================================================================================
# 11  The report's questions
# ==================================================================================================


@illustration()
def stage_table(runs, guesses=None):
    """A DataFrame with a row a stage.

    Validation accuracy +- s.e., the difference to the row above with its paired standard error,
    parameters, multiply-adds, epochs, seconds.
    guesses: {stage: accuracy guessed before it ran}, which become a column.
    """
    rows = []
    above = None  # the run in the row above
    for run in runs:
        error = standard_error(run.valid_acc, run.n_valid)
        comparable = above is not None and have_same_images(above, run)
        row = {
            "stage": run.label,
            # First what is compared, so that it is on a narrow screen too.
            "accuracy": round(run.valid_acc, 4),
            "+- s.e.": round(error, 4),
            **difference_to(above.correct if comparable else None, run.correct),
            "parameters": run.n_params,
            "multiply-adds (M)": round(run.macs / 1e6, 1),
            "epochs": len(run.history),
            "seconds": round(run.history["seconds"].sum()),
        }
        if guesses:
            row["guess"] = guesses.get(run.name, "none")
        rows.append(row)
        above = run
    return pd.DataFrame(rows).set_index("stage")


def have_same_images(run, other):
    """Whether two Runs were validated on the same images."""
    facts = ("validation_files", "validation_contents")
    is_same = all(run.facts.get(fact) == other.facts.get(fact) for fact in facts)
    return is_same and run.n_valid == other.n_valid


def accuracy_table(labels, predictions, caption):
    """A DataFrame of accuracy +- standard error, a row for each {name: predicted classes (N,)}.

    With the difference to the row above and its paired standard error.
    """
    rows = []
    above = None
    for name, classes in predictions.items():
        correct = classes == labels
        accuracy = correct.double().mean().item()
        error = standard_error(accuracy, len(labels))
        row = {caption: name, "accuracy": round(accuracy, 4), "+- s.e.": round(error, 4)}
        rows.append(row | difference_to(above, correct))
        above = correct
    return pd.DataFrame(rows).set_index(caption)


def difference_to(above, correct):
    """The columns of a row that compare it, (N,) bool, with the row above; empty without one."""
    if above is None:
        return {"- row above": "", "its +- s.e.": ""}
    difference, error = paired_difference(correct, above)
    return {"- row above": f"{difference:+.4f}", "its +- s.e.": f"{error:.4f}"}


@illustration()
def dwpw_arithmetic(in_channels=128, out_channels=256, kernel_size=3, size=14):
    """A DataFrame: weights and multiply-adds of a full convolution against depthwise + pointwise.

    size: pixels a side of the output.
    """
    depthwise = in_channels * kernel_size**2
    pointwise = in_channels * out_channels
    # pointwise is in * out already, so this is in * out * k^2.
    full = pointwise * kernel_size**2
    weights = {
        "full convolution": full,
        "depthwise": depthwise,
        "pointwise": pointwise,
        "depthwise + pointwise": depthwise + pointwise,
    }
    frame = pd.DataFrame({"weights": weights})
    # Every weight is used once at each place of the output.
    frame["multiply-adds (M)"] = (frame["weights"] * size**2 / 1e6).round(2)
    frame["share of full"] = (frame["weights"] / full).round(3)
    return frame


def gradient_sizes(student_logits, labels, teacher_logits, temperatures):
    """How hard each term of the loss pulls at a picture's student logits, by temperature.

    A DataFrame with a row a temperature: the mean norm over the batch of the gradient of KL alone,
    of T^2 KL and of CE. Logits (B, 11), labels (B,).
    """

    def gradient_norm(alpha, temperature):
        # A leaf of its own for each call, so that gradients do not add up.
        logits = student_logits.detach().float().requires_grad_()
        loss_fn_kd(logits, labels, teacher_logits, alpha, temperature).backward()
        # The loss is a mean over the batch, so the sum of these norms is the mean of a picture's.
        return logits.grad.norm(dim=1).sum().item()

    rows = []
    for temperature in temperatures:
        scaled_kl = gradient_norm(1.0, temperature)
        cross_entropy = gradient_norm(0.0, temperature)
        # loss_fn_kd gives T^2 KL: divided by T^2 it is the gradient of KL alone.
        rows.append((scaled_kl / temperature**2, scaled_kl, cross_entropy))
    index = pd.Index(temperatures, name="temperature")
    return pd.DataFrame(rows, index=index, columns=["KL", "T^2 KL", "CE"])


def temperature_table(cfg, temperatures, data, teacher, device, n_epochs=10):
    """A DataFrame: validation accuracy +- standard error of short trainings.

    They differ in their temperature alone. Nothing is written. Raises UserError where the session's
    time ends one too early to be compared.
    """
    train, valid = build_loaders(cfg, data, device)
    n_epochs = min(n_epochs, cfg.n_epochs)
    classes = {}  # {temperature: predicted classes (N,)}
    for temperature in temperatures:
        short = replace(cfg, temperature=temperature, n_epochs=n_epochs)
        net = build_student(cfg)  # the same first weights each time
        loss_fn = DistillLoss(short, net, teacher).on(device)
        history = fit(loss_fn, train, valid)
        if not is_finished(history, short):
            raise UserError(
                f"no time is left to compare temperatures: T = {temperature} ended early"
            )
        logits, labels = predict_logits(net, valid)
        classes[temperature] = logits.argmax(1)
    return accuracy_table(labels, classes, "temperature")


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
    # As nets are on every device (see `to_device`).
    return model.to(memory_format=torch.channels_last)


def prune_structured(model, ratio):
    """A copy of a ResNet-18 or -34 with thinner blocks.

    ratio: the fraction of each block's inner channels that goes, by L1 norm. Inner are those
    between its two convolutions, for no shortcut passes there, so that the tensors really become
    smaller.
    """
    model = copy.deepcopy(model)
    for block in model.modules():
        if not isinstance(block, torchvision.models.resnet.BasicBlock):
            continue
        norms = block.conv1.weight.abs().sum((1, 2, 3))  # (inner channels,)
        # At least one channel, for a convolution without any cannot run.
        n_kept = max(1, round((1 - ratio) * len(norms)))
        keep = norms.topk(n_kept).indices
        # What has an entry for each inner channel in its first dimension.
        by_channel = [block.conv1.weight, block.bn1.weight, block.bn1.bias]
        by_channel += [block.bn1.running_mean, block.bn1.running_var]
        for tensor in by_channel:
            # Through .data: a parameter stays the same object while its shape changes.
            tensor.data = tensor.data[keep]
        # The second convolution reads the inner channels: (out, inner, 3, 3).
        block.conv2.weight.data = block.conv2.weight.data[:, keep]
    return model.to(memory_format=torch.channels_last)


def pruning_table(model, loader, ratios=(0.0, 0.2, 0.4, 0.6, 0.8)):
    """A DataFrame with a row a pruning ratio, and columns by what is measured and kind of pruning.

    Accuracy on a loader, weights that are not zero (millions), and milliseconds an image.
    """
    kinds = {"unstructured": prune_unstructured, "structured": prune_structured}
    rows = []
    evaluate(model, loader)  # the first pass is slower
    for ratio in ratios:
        for kind, prune_copy in kinds.items():
            net = prune_copy(model, ratio)
            start = time.perf_counter()
            score = evaluate(net, loader)
            # `evaluate` has read its sums from the device, so nothing is still running there.
            seconds = time.perf_counter() - start
            # Both kinds of pruning show here: fewer weights, or as many of which more are zero.
            weights = sum(int((p != 0).sum()) for p in net.parameters())
            row = {
                "pruning ratio": ratio,
                "pruning": kind,
                "accuracy": score["valid_acc"],
                "weights (M)": weights / 1e6,
                "ms an image": 1000 * seconds / score["n"],
            }
            rows.append(row)
    # The columns get two levels: what is measured, and the kind of pruning.
    return pd.DataFrame(rows).pivot(index="pruning ratio", columns="pruning").round(3)


@illustration()
def epoch_parts(cfg, loader, device, batches=3):
    """Where the seconds of an epoch go with a loader.

    {"waiting for pictures": s, "training on them": s}. Scaled up from some batches after the first,
    which pays for start-up. Where a DataLoader's workers cannot get shared memory (a container of
    Docker's has 64 MB of it), their batches go through pipes, which is said.
    """
    try:
        with images_on_gpu(loader):
            return time_batches(cfg, loader, device, batches)
    except (RuntimeError, OSError) as error:
        if not getattr(loader, "num_workers", 0):
            raise
        why = reason(error)
    # Here, where the error and with it the workers are gone.
    say(f"A DataLoader's workers failed ({why}). Timed with batches through pipes instead.")
    loader = DataLoader(
        loader.dataset,
        loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=stack_as_arrays,
    )
    return time_batches(cfg, loader, device, batches)


def stack_as_arrays(samples):
    """A DataLoader's collate_fn for workers without shared memory.

    Tensors are handed over in shared memory, numpy arrays through a pipe.
    """
    images, labels = zip(*samples, strict=True)
    return np.stack(images), np.array(labels)


def time_batches(cfg, loader, device, batches):
    """The seconds that `epoch_parts` returns.

    Teacher and student are untrained here: what they know does not change their speed.
    """
    teacher = build_student(TEACHER_CONFIG)
    loss_fn = DistillLoss(cfg, build_student(cfg), teacher).on(device)
    state = TrainState(loss_fn)
    waiting = 0.0
    training = 0.0
    n = 0
    stream = endless(loader)  # it may have fewer batches than are timed
    for number in range(batches + 1):
        start = _clock(device)
        images, labels, *_ = next(stream)
        ready = _clock(device)
        images = to_device(torch.as_tensor(images), device, loss_fn.dtype or torch.float32)
        labels = torch.as_tensor(labels).to(device)
        loss = loss_fn(images, labels).loss
        optimizer_step(state, loss, cfg.lr, cfg.grad_norm_max)
        done = _clock(device)
        if number > 0:
            waiting += ready - start
            training += done - ready
            n += len(labels)
    # Seconds an image, times the images of an epoch.
    n_images = len(loader.dataset)
    return {
        "waiting for pictures": waiting * n_images / n,
        "training on them": training * n_images / n,
    }


def endless(loader):
    """The batches of a loader, pass after pass."""
    while True:
        yield from loader


def _clock(device):
    """Seconds, once the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ==================================================================================================
# 12  Machinery
# ==================================================================================================

# --- devices and precision ------------------------------------------------------------------------


def pick_device():
    """The torch.device to train on: this process's GPU if a real kernel runs on it, else the CPU.

    Raises UserError where the GPU is too old for the installed torch (Kaggle's P100, for example).
    """
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    # torchrun numbers a machine's processes, and each has the GPU of its number.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.index >= torch.cuda.device_count():
        n_gpus = torch.cuda.device_count()
        raise UserError(f"there are {n_gpus} GPUs: start at most as many processes")
    try:
        # A card can be available and this torch have no kernels for it: only running one tells.
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        name = torch.cuda.get_device_name(device)
        why = str(error).splitlines()[0]
        raise UserError(
            f"the GPU {name} cannot run torch {torch.__version__} ({why}); Kaggle: choose T4 x2"
        ) from None
    torch.cuda.set_device(device)
    # fp32 is fp32 on every card: newer ones would round the numbers that a convolution multiplies
    # to 10 bits (TF32), and a score would depend on the card.
    torch.backends.cudnn.allow_tf32 = False
    return device


def free_memory(device):
    """Bytes of a GPU that a new tensor can have.

    What torch keeps for later counts as free, for torch hands it back where it is wanted; the
    driver counts it as taken.
    """
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # The driver tells (free, total) in bytes.
    return torch.cuda.mem_get_info(device)[0] + unused


def keep_freed_memory():
    """Let glibc keep freed memory instead of handing it back to the system.

    Fresh pages made a CPU's training step a third longer.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # others have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def amp_dtype(device, amp="auto"):
    """torch.bfloat16, torch.float16 or None (full precision) for training on `device`.

    auto: bf16 from CUDA capability 8.0 on and on CPUs that have it in hardware, fp16 on older GPUs.
    The capability is asked, for torch.cuda.is_bf16_supported() is True on a T4, which emulates it
    slowly. Raises UserError for bf16 on such a GPU.
    """
    if amp == "off":
        return None
    if amp == "fp16":
        return torch.float16
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if amp == "bf16" and not has_bf16:
            name = torch.cuda.get_device_name(device)
            raise UserError(f"amp=bf16: {name} has no bfloat16: set amp=auto, fp16 or off")
        if has_bf16:
            return torch.bfloat16
        return torch.float16
    if amp == "bf16":
        return torch.bfloat16
    # Where torch has no such function, `dict` is called in its place and gives {}.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        return torch.bfloat16
    return None


def to_device(x, device, dtype=None):
    """A module or a tensor (B, C, H, W) on a device, channels last: convolutions are faster so."""
    layout = {"memory_format": torch.channels_last, "non_blocking": True}
    if dtype is not None:
        layout["dtype"] = dtype
    return x.to(device, **layout)


@contextlib.contextmanager
def out_of_memory_named(cfg):
    """Memory that does not suffice becomes a UserError that names the settings to change.

    A GPU has its memory back when the error is raised.
    """
    # Of Python, CUDA, torch's CPU allocator (Linux, Windows) and C++.
    wordings = "MemoryError|out of memory|allocate memory|enough memory|bad_alloc"
    # cuDNN's: no memory, and no algorithm that does with the memory that there is.
    wordings += "|ALLOC_FAILED|ALLOCATION_FAILED|unable to find an engine"
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeErrors of many wordings
        if not re.search(wordings, repr(error)):
            raise
        # A notebook keeps the traceback, and with it the frames of the step and their tensors: it
        # is cut off below the block. (Clearing the frames is not enough, for torch has closures.)
        of_the_block = error.__traceback__.tb_next
        if of_the_block:
            of_the_block.tb_next = None
        give_cached_memory_back()
        # Two is the least that the config allows.
        half = max(2, cfg.batch_size // 2)
        raise UserError(
            f"{cfg.exp_name}: out of memory with batch_size={cfg.batch_size}, "
            f"image_size={cfg.image_size}: set batch_size={half} or a smaller image_size, "
            f"with {option('--fresh')}"
        ) from None


# --- processes ------------------------------------------------------------------------------------


def rank_and_world():
    """(rank, number of processes) of this process; (0, 1) where torch.distributed is not in use."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first_process():
    """Whether this is the process that prints and writes."""
    return rank_and_world()[0] == 0


def is_first_on_node():
    """Whether this is the process that fills its machine's cache: of several on it, the first."""
    if rank_and_world()[1] == 1:
        return True
    # torchrun's number of a process on its machine; the rank counts over all machines.
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def barrier():
    """Wait for all processes; nothing in a single one."""
    if rank_and_world()[1] > 1:
        torch.distributed.barrier()


def all_reduce(tensor):
    """Sum a tensor over all processes, in place."""
    if rank_and_world()[1] > 1:
        torch.distributed.all_reduce(tensor)


def broadcast(tensor):
    """Give all processes the first one's tensor, in place."""
    if rank_and_world()[1] > 1:
        torch.distributed.broadcast(tensor, 0)


def from_first_process(value):
    """The first process's value in all processes; the value itself in a single one.

    It may hold plain values and tensors on the CPU. It comes through the process group, so that
    machines need no folder in common.
    """
    if rank_and_world()[1] == 1:
        return value
    # A list, for torch replaces its entries by what it receives.
    handed = [value]
    torch.distributed.broadcast_object_list(handed, 0)
    return handed[0]


def check_processes_agree(facts):
    """Compare {key: JSON-able value} over all processes, which wait for each other here.

    Raises UserError, in all of them, naming the first process that differs from process 0, and the
    keys in which it does.
    """
    world = rank_and_world()[1]
    if world == 1:
        return
    everyone = [None] * world
    # Every process must come here, or the others wait for it.
    torch.distributed.all_gather_object(everyone, facts)
    wanted = everyone[0]
    for rank, theirs in enumerate(everyone):
        keys = [key for key in {**wanted, **theirs} if wanted.get(key) != theirs.get(key)]
        # Settings are among the keys one by one; those of behaviour may differ.
        keys = [key for key in keys if key not in ("config", *BEHAVIOUR_KEYS)]
        if keys:
            raise UserError(
                f"process {rank} differs from process 0 in {some_of(keys)}: "
                "start all processes with the same files, settings and helpers.py"
            )


def data_parallel(loss_fn):
    """The loss in torch's data-parallel wrapper; itself in a single process."""
    if rank_and_world()[1] == 1:
        return loss_fn
    device_ids = None
    if loss_fn.device.type == "cuda":
        device_ids = [loss_fn.device]
    # The loss and not the net, so that adapters are averaged with the student.
    return nn.parallel.DistributedDataParallel(loss_fn, device_ids)


@contextlib.contextmanager
def process_group():
    """Join torchrun's process group for the block (NCCL on GPUs, gloo on CPUs).

    Without torchrun do nothing.
    """
    # torchrun sets it for the processes that it starts.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        backend = "gloo"
        device = pick_device()
        if device.type == "cuda":
            # gloo as well, by which objects in the CPU's memory are handed on.
            backend = "cpu:gloo,cuda:nccl"
        try:
            torch.distributed.init_process_group(
                backend,
                timeout=datetime.timedelta(hours=12),  # the others wait while one decodes
                device_id=device if device.type == "cuda" else None,
            )
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise UserError(
                f"the processes could not join ({why}); where a machine takes its own name for "
                "127.0.1.1, set GLOO_SOCKET_IFNAME to its network interface"
            ) from None
    yield
    # Not in a finally: a process that failed must end at once, so that torchrun ends the others.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# --- all GPUs from a notebook ---------------------------------------------------------------------


def gpus_of_notebook(device):
    """How many GPUs a notebook on `device` can train on; 1 elsewhere, on a CPU and on other GPUs.

    Whoever asks for a GPU other than the first wants that one.
    """
    # Without an index it is the current GPU, by default the first.
    is_first_gpu = device.type == "cuda" and device.index in (None, 0)
    if not in_notebook() or not is_first_gpu or rank_and_world()[1] > 1:
        return 1
    return torch.cuda.device_count()


def processes_for(cfg, folder, device, fresh, own):
    """How many processes train a stage: one a GPU of a notebook's machine. What is special is said.

    One alone where own code is handed in, which another process could not import from a notebook.
    A run that lies in the folder, or in an attached one, goes on with as many as it began with: its
    batches would be cut in other parts.
    """
    n = gpus_of_notebook(device)
    if n == 1:
        return 1
    own = [name for name, value in own.items() if value is not None]
    if own:
        names = ", ".join(own)
        say(
            f"{cfg.exp_name}: one of {n} GPUs trains, for your own {names} is in this notebook only"
        )
        return 1
    if fresh:
        return n
    saved = longest_run(folder, cfg)
    if saved is None:
        return n
    if is_finished(saved["history"], cfg):  # there is nothing to train
        return 1
    began_with = saved["facts"].get("processes", n)
    if began_with < n:
        say(f"{cfg.exp_name}: {began_with} of {n} GPUs at work, for the run began on so many")
        return began_with
    return n


def longest_run(folder, cfg):
    """The checkpoint with most epochs under `cfg`'s settings, or None.

    Of a stage's folder and those that are attached for it; of two alike the first counts.
    """
    runs = []
    for place in (folder, *attached_folders(folder, cfg)):
        saved = run_in(place)
        if saved is not None and not different_settings(saved, cfg):
            runs.append(saved)
    return max(runs, key=lambda saved: len(saved["history"]), default=None)


def train_in_processes(stage, n):
    """Train a Stage with torchrun, n processes on as many GPUs; its student gets the best weights.

    Returns the history, or None where nothing started, which is said. The run in the folder is one
    like any other. Raises UserError, or KeyboardInterrupt, where the training itself ended early.
    """
    name = stage.cfg.exp_name
    say(f"{name}: {n} GPUs train, a process each")
    # By the files' times it is seen afterwards whether training began at all.
    before = times_of_checkpoints(stage.folder.path)
    # The first process trains on the GPU on which this one keeps memory.
    give_cached_memory_back()
    interrupted = False
    with tempfile.TemporaryDirectory() as place:
        errors = Path(place) / "stderr"
        command = job_command(write_job(stage, Path(place)), n)
        try:
            code = watch(command, errors, n)
        except KeyboardInterrupt:
            interrupted = True
        # Inside the block, at whose end the file is gone.
        why = why_it_ended(errors)
    started = times_of_checkpoints(stage.folder.path) != before
    if interrupted:
        again = cell_again(stage.folder.fresh)
        say(f"{name}: stopped, every whole epoch is saved; {again} to go on")
        raise KeyboardInterrupt
    if code != 0 and started:
        raise UserError(why)
    if code != 0:
        failed = f"{name}: {n} GPUs could not be started ({why})"
        if not stage.folder.fresh and began_on_several(stage):
            raise UserError(f"{failed}, and its run began on several: {cell_again(False)} to go on")
        say(f"{failed}; one trains")
        # From here on it is a run of one process.
        stage.folder.facts["processes"] = 1
        return None
    # The processes have cleared what was to be cleared; their run must not be.
    stage.folder.fresh = False
    saved = stage.folder.load()
    stage.student.load_state_dict(saved["best"])
    return saved["history"]


def began_on_several(stage):
    """Whether several processes began the run that a Stage would go on from."""
    saved = longest_run(stage.folder.path, stage.cfg)
    return saved is not None and saved["facts"].get("processes", 1) > 1


def give_cached_memory_back():
    """Leave what torch keeps of the GPU's memory to another process."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def times_of_checkpoints(folder):
    """{name: when it was last written, in nanoseconds} of a run's checkpoints that are there.

    Both, for a kill between two renames leaves the previous one alone.
    """
    times = {}
    for name in (LAST, PREVIOUS):
        with contextlib.suppress(FileNotFoundError):
            times[name] = (folder / name).stat().st_mtime_ns
    return times


def write_job(stage, place):
    """Write all that a process needs to train a Stage into a new folder: the path of job.json."""
    teacher = stage.loss_fn.teacher
    # AveragedTeachers has members, any other teacher is alone.
    teachers = [] if teacher is None else getattr(teacher, "members", [teacher])
    paths = []
    for number, one in enumerate(teachers):
        path = place / f"teacher-{number}.ckpt"
        # From memory, for the file that it came from may be another one by now.
        save_checkpoint(copy_of_weights(one), path)
        paths.append(str(path))
    job = {
        "data": str(stage.data.root),
        "folder": str(stage.folder.path),
        "fresh": stage.folder.fresh,
        "teachers": paths,
        # Each process compares its own facts with these (see `train_job`).
        "facts": stage.folder.facts,
    }
    write_text(place / "job.json", json.dumps(job))
    return place / "job.json"


def job_command(job, n):
    """The command that trains a job on this machine with n processes."""
    # --standalone takes a free port, so two trainings on a machine do not meet.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # The machine's own name may mean nothing to itself, as in a container without a network.
    launcher += ["--local-addr", "127.0.0.1"]
    module = str(Path(__file__).resolve())
    return [*launcher, "--nproc-per-node", str(n), module, "train", str(job)]


def train_job(path):
    """Train what `write_job` wrote, as one of several processes.

    Raises UserError where this is not what the notebook has, by the run's facts: a patched module,
    a teacher that is no ResNet.
    """
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    wanted = job["facts"]
    device = pick_device()
    teacher = None
    if job["teachers"]:
        teacher = load_teacher(job["teachers"], device)
    data = read_folder(job["data"])
    cfg = Config(**wanted["config"])
    loss_fn = DistillLoss(cfg, build_student(cfg), teacher).on(device)
    folder = RunFolder(job["folder"], loss_fn, data, job["fresh"])
    train_loader, valid_loader = build_loaders(cfg, data, device)
    folder.add_contents("training", train_loader.dataset)
    folder.add_contents("validation", valid_loader.dataset)
    # Both sides have been through JSON, so lists and tuples do not differ.
    different = [key for key in wanted if folder.facts.get(key) != wanted[key]]
    if different:
        raise UserError(f"the notebook has another {some_of(different)}")
    fit(loss_fn, train_loader, valid_loader, folder)


def watch(command, errors, n):
    """Run a command and show what it prints, its bar in one line: the exit code.

    errors: a file for its stderr. Where the notebook is stopped, the command is stopped too.
    """
    # The processes share the cores.
    threads = max(1, (os.cpu_count() or 1) // n)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        # What `texts_of` decodes, whatever the system's locale says.
        "PYTHONIOENCODING": "utf-8",
        # Their time limit counts from the session's start, not from theirs.
        "HW13_SESSION_START": str(SESSION_START),
        FOR_NOTEBOOK: "1",
    }
    redraw = None
    # The process has the file open by itself, so it may be closed here at once.
    with open(errors, "wb") as stderr:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,  # the stop button reaches it through `stop` alone
        )
    try:
        for text, redraws in texts_of(process.stdout):
            if not redraws:
                say(text)
            elif in_notebook():
                # Made with the first text, so that without a bar no empty line is shown.
                redraw = redraw or CellBar.status_printer(None)
                redraw(text)
        return process.wait()
    except BaseException:
        # KeyboardInterrupt too: nothing may go on training behind a stopped cell.
        stop(process)
        raise


def texts_of(stream):
    """Yield (text, whether it redraws its line) of what a process prints, as it comes."""
    # A character of several bytes may arrive in two parts.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    redraws = False
    # read1 returns what is there and does not wait for more.
    while part := stream.read1():
        rest += decoder.decode(part)
        # [text, end, text, end, ..., rest]: what has no end yet waits for the next part.
        *texts_and_ends, rest = re.split("([\r\n])", rest)
        texts = texts_and_ends[::2]
        ends = texts_and_ends[1::2]
        for text, end in zip(texts, ends, strict=True):
            if text.strip():
                yield text, redraws
            # The text after a \r overwrites the line of the one before.
            redraws = end == "\r"
    if rest.strip():  # the last line has no end
        yield rest, redraws


def stop(process, patience=40):
    """End torchrun as Ctrl-C does; it ends its processes. After `patience` seconds by force."""
    with contextlib.suppress(ProcessLookupError, ValueError):  # Windows knows no SIGINT
        process.send_signal(signal.SIGINT)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def why_it_ended(errors):
    """The line of a command's stderr that says why it ended."""
    lines = errors.read_text(encoding="utf-8", errors="replace").splitlines()
    # `main` puts the program's name before its one line.
    ours = [line for line in lines if line.startswith("helpers.py: ")]
    if ours:
        return ours[0].removeprefix("helpers.py: ")
    # The last line of a traceback, behind torchrun's "[rank0]: ".
    named = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    why = next(iter(named or lines[-1:]), "it ended without a word")
    return quoted(re.sub(r"^\[rank\d+\]: ", "", why), 160)


# --- what is shown --------------------------------------------------------------------------------


def say(text):
    """Print a line, from the first process only.

    What the terminal cannot show (names may hold any byte) is written as an escape.
    """
    if is_first_process():
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        shown = readable(text).encode(encoding, "backslashreplace").decode(encoding)
        print(shown, flush=True)


# What a notebook has in the place of a flag of the command line.
NOTEBOOK_WORDS = {
    "--fresh": "fresh=True (or another exp_name)",
    "--teacher": "load_teacher(path)",
    "--out": "out=",
}


# The variable by which a notebook tells the processes that it starts for whom they speak.
FOR_NOTEBOOK = "HW13_FOR_NOTEBOOK"


def option(flag):
    """A flag of the command line, or what takes its place in a notebook, for a message."""
    if in_notebook() or FOR_NOTEBOOK in os.environ:
        return NOTEBOOK_WORDS[flag]
    return flag


def in_notebook():
    """Whether the code runs in a Jupyter kernel."""
    # Not imported to find out: in a kernel it is loaded already.
    if "IPython" not in sys.modules:
        return False
    shell = type(sys.modules["IPython"].get_ipython())
    # Colab's shell is a subclass of Jupyter's.
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in shell.__mro__)


class CellBar(tqdm):
    """A tqdm that redraws one line below a notebook cell, so that only its last state is kept."""

    @staticmethod
    def status_printer(file):
        """What tqdm calls with the text of the bar each time that it redraws it."""
        from IPython.display import display

        handle = display({"text/plain": ""}, raw=True, display_id=True)

        def show(text):
            handle.update({"text/plain": text}, raw=True)

        return show


def progress_bar(total, desc, initial=0):
    """One tqdm bar of images with an ETA; off in all processes but the first.

    In a notebook it is a line that redraws itself, else it is on stderr. It is plain tqdm on
    purpose: tqdm.auto's widgets and worker processes that fork in a notebook do not get on, and
    widgets are lost when the notebook is rendered.
    """
    options = {"total": total, "desc": desc, "initial": initial, "unit": "img", "mininterval": 0.5}
    # pythonw, or a shell's 2>&-, leaves no stderr.
    options["disable"] = not is_first_process() or sys.stderr is None
    if in_notebook():
        # The bar's text goes through status_printer; tqdm's own output goes nowhere.
        return CellBar(file=io.StringIO(), ascii=False, ncols=120, **options)
    if FOR_NOTEBOOK in os.environ:  # the notebook reads it and redraws it
        return tqdm(file=sys.stdout, ncols=120, **options)
    if sys.stderr and not sys.stderr.isatty():  # a log file: a line every half a minute
        options["mininterval"] = 30.0
    return tqdm(file=sys.stderr, dynamic_ncols=True, **options)


KAGGLE_HOURS = 12


def session_start():
    """When this session began, in seconds since 1970.

    On Kaggle that is when the machine's first process began: a restarted kernel, or a command in a
    cell late in the session, has no new hours. Elsewhere, and where the system does not tell, it is
    now, when the module is imported.
    """
    now = time.time()
    # Set by the notebook that started this process (see `watch`).
    if "HW13_SESSION_START" in os.environ:
        return float(os.environ["HW13_SESSION_START"])
    if not on_kaggle():
        return now
    try:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        # The 22nd field: ticks from the boot to the start. The second is a name in parentheses.
        fields = Path("/proc/1/stat").read_text().rpartition(")")[2].split()
        # What follows the name begins with the third field, so the 22nd has index 19.
        age = uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - max(0.0, age)


SESSION_START = session_start()


class RunDisplay:
    """One progress bar over all epochs of a fit, with loss and accuracy, and a line of pace."""

    def __init__(self, cfg, n_images, history):
        self.cfg = cfg
        self.history = history
        self.told = False
        # The bar counts images, and begins where a restored run stopped.
        done = len(history) * n_images
        self.bar = progress_bar(cfg.n_epochs * n_images, cfg.exp_name, done)

    def on_step(self, n, sums):
        """Count a step of `n` images; where the bar redrew itself, read the EpochSums."""
        # Every process does about as many, and this bar counts for all.
        redrawn = self.bar.update(n * rank_and_world()[1])
        if not redrawn:
            return
        means = sums.means()
        self.show(len(self.history) + 1, means["train_loss"], means["train_acc"])
        elapsed = self.bar.format_dict["elapsed"]
        # By then the slow first steps no longer count for much.
        if elapsed > 20 and not self.told:
            self.tell_pace(elapsed)

    def show(self, epoch, loss, accuracy):
        """Write an epoch's loss and accuracy behind the bar."""
        # -1, where no epoch has been validated, would look like a score.
        best = max(best_so_far(self.history)[0], 0)
        self.bar.set_postfix_str(
            f"epoch {epoch}/{self.cfg.n_epochs}, loss {loss:.3f}, acc {accuracy:.3f}, "
            f"best valid {best:.3f}",
            refresh=False,
        )

    def tell_pace(self, seconds):
        """Say once, after so many `seconds`: the pace, the end, whether the session suffices."""
        self.told = True
        # Epochs of an earlier call are in the bar, but not in this call's time.
        rate = (self.bar.n - self.bar.initial) / seconds
        left = datetime.timedelta(seconds=round((self.bar.total - self.bar.n) / rate))
        if left <= datetime.timedelta(minutes=1):
            return
        end = datetime.datetime.now() + left
        line = f"{self.cfg.exp_name}: {rate:,.0f} images/s, {left} to go, till {end:%H:%M}"
        if on_kaggle():
            used = datetime.timedelta(seconds=round(time.time() - SESSION_START))
            rest = datetime.timedelta(hours=KAGGLE_HOURS) - used
            line += f"; the Kaggle session has {rest} left"
            if left > rest:
                line += (
                    ": choose LENGTH = 'lesson' or a smaller n_epochs, or go on in a second session"
                )
        say(line)


def time_is_up(cfg, history, device):
    """Whether another epoch would leave too little of the session to predict and write every CSV.

    Needed are the next epoch, a prediction (counted as one more epoch; it is shorter), and five
    minutes, or a tenth of a short limit. An epoch is taken to be as long as the longest so far. The
    session began at SESSION_START. The first of several processes decides.
    """
    hours = cfg.time_limit_h
    if not hours:
        hours = KAGGLE_HOURS - 0.5 if on_kaggle() else math.inf
    limit = 3600 * hours
    # A guess for the first epoch, which the longest one so far replaces.
    longest = min(300, limit / 20)
    if history:
        longest = max(row["seconds"] for row in history)
    needed = 2 * longest + min(300, limit / 10)
    used = time.time() - SESSION_START
    # In a tensor, for the first process's answer is handed to all: they must end together.
    up = torch.tensor(used + needed > limit, device=device)
    broadcast(up)
    return bool(up)


def describe_run(cfg, loader):
    """One line at the start of a stage: device, precision, processes, and where the images lie."""
    device = loader.device
    split = loader.split
    world = rank_and_world()[1]
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    how = str(amp_dtype(device, cfg.amp) or torch.float32).removeprefix("torch.")
    if world > 1:
        how += f", {world} processes"
    where = str(split.cache)
    if loader.images.is_cuda:
        where += ", moved onto the GPU"
    return f"{cfg.exp_name}: {split.origin}; {name}, {how}; {len(split):,} images in {where}"


# --- files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_whole(path, keep_as=None):
    """A temporary path beside `path`, renamed over it if the block ends well, else removed.

    It is flushed to disk first. keep_as: a name beside it under which the file that was there is
    kept. Raises UserError where it cannot be written.
    """
    path = Path(path)
    # In the same folder, for a rename replaces a file at once only within one file system.
    # A name of its own: processes of two containers may have one number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_old_temporaries(path)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep_as and path.is_file():
            # Killed after this line there is no `path`: who reads it must know the other name.
            os.replace(path, path.with_name(keep_as))
        os.replace(temporary, path)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path} cannot be written ({why}); what was saved is intact") from None
    finally:
        # After the rename it is not there any more.
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_old_temporaries(path):
    """Remove what processes left that were killed while they wrote `path`, a day ago or more."""
    for left in path.parent.glob(".*.tmp"):
        is_ours = left.name.startswith(f".{path.name}.")
        if is_ours and is_a_day_old(left):
            left.unlink(missing_ok=True)


def is_a_day_old(path):
    """Whether a file or folder was last written a day ago or more; not if it is gone by now."""
    try:
        return time.time() - path.stat().st_mtime > 86_400
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(folder):
    """Hold a folder for the block, from the first process.

    UserError where another process holds it or it cannot be written. A killed process holds
    nothing, for the system closes its files. Where the file system knows no locks, that is said and
    the block runs without one.
    """
    if not is_first_process():
        yield
        return
    folder = Path(folder)
    is_new = not folder.exists()
    # timeout=0: who comes second is told at once.
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"another run is working in {folder}: wait for it or choose another {option('--out')}"
        ) from None
    except (NotImplementedError, OSError) as error:
        if not is_about_locks(error):
            raise UserError(
                f"{folder} cannot be written ({error.strerror}); what was saved is intact"
            ) from None
        say(f"WARNING: {folder} cannot be locked here: see that one run at a time works in it")
    try:
        yield
    finally:
        # The lock's file goes before the lock does: another process that opens it in between
        # finds it held, and one that comes later makes a file of its own.
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            os.unlink(lock.lock_file)
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def is_about_locks(error):
    """Whether an error of a lock says that the file system has none."""
    if isinstance(error, NotImplementedError):  # filelock's
        return True
    return error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


def check_writable(folder):
    """UserError unless `folder`, or the first folder above it that exists, can be written to.

    Nothing is made.
    """
    folder = Path(folder)
    there = folder.absolute()
    # The root of a drive that is not there is its own parent.
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.exists():
        raise UserError(f"{folder} cannot be written to: there is no {there}")
    if not there.is_dir():
        raise UserError(f"{folder} cannot be written to: {there} is a file")
    if not os.access(there, os.W_OK):
        raise UserError(f"{folder} cannot be written to: {there} is read-only")


def write_text(path, text):
    """Write a text file whole or not at all."""
    with written_whole(path) as temporary:
        # newline: lines end alike on every system, and those of a CSV as its writer ended them.
        temporary.write_text(text, encoding="utf-8", newline="")


def save_checkpoint(obj, path, keep_as=None):
    """torch.save through `written_whole`.

    Through memory, because torch reports a full disk as no OSError.
    """
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    with written_whole(path, keep_as) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def is_of_the_system(error):
    """Whether reading failed for the disk, the network or the memory, and not for the file."""
    if isinstance(error, MemoryError):
        return True
    # A damaged file may ask for an impossible place in it, which is EINVAL.
    return getattr(error, "errno", None) not in (None, 0, errno.EINVAL)


def check_is_file(path):
    """UserError unless there is a file at `path`."""
    if path.is_dir():
        inside = ""
        if (path / BEST).is_file():
            inside = f", perhaps its {BEST}"
        raise UserError(f"{path} is a folder: name a file in it{inside}")
    if not path.is_file():
        raise UserError(f"there is no file {path}")


def load_file(path):
    """torch.load with weights_only=True on the CPU: a file that would run code is refused.

    Raises UserError for a missing, damaged or unsafe file, saying what it is instead.
    """
    path = Path(user_path(path))
    check_is_file(path)
    kind = kind_of_file(path)
    if kind:
        raise UserError(f"{path} is not loaded: {kind}")
    try:
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: pickle, zip, runtime, EOF
        if is_of_the_system(error):
            raise
        why = "it is damaged or no torch file"
        # torch's words for a pickle that names a class or function that is not allowed.
        if re.search("Unsupported (global|class)|GLOBAL", str(error)):
            why = (
                "it holds more than tensors and plain values (a whole net, or objects of its "
                "training): save the state dict alone, torch.save(net.state_dict(), path)"
            )
        raise UserError(f"{path} is not loaded: {why}") from None


def numpy_number_classes():
    """What a numpy number in a checkpoint (an accuracy, often) is made of; none of it runs code."""
    # numpy's own function that rebuilds a number; its module has moved in numpy 2.
    scalar = np.float64(0).__reduce__()[0]
    pieces = [np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar")]  # numpy 1's name for it
    for number in ("float16", "float32", "float64", "int32", "int64", "bool"):
        # Each dtype has a class of its own, as numpy.dtypes.Float64DType.
        pieces.append(type(np.dtype(number)))
    return pieces


NUMPY_NUMBERS = numpy_number_classes()


PACKED = "it is a packed archive: unpack it"


def kind_of_zip(path):
    """What a zip that is no checkpoint is, by the names in it; None for one that may be one."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile:  # cut short, of which torch.load has to tell
        return None
    if "constants.pkl" in names:
        return "it is a TorchScript file: save the state_dict() of its net with torch.save"
    if "data.pkl" in names:
        return None
    if any(name.endswith(".npy") for name in names):
        return "it holds numpy arrays: save a state dict of tensors with torch.save"
    return PACKED


def kind_of_file(path):
    """What a file that is no checkpoint is, by its first bytes; None for one that may be one."""
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer: fetch the file itself with git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page: download the file itself"
    # .safetensors: the header's length in eight bytes, then the header in JSON.
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "it is a .safetensors file: save its state dict with torch.save"
    if head.startswith(b"\x89HDF"):
        return "it is an HDF5 file (Keras?), no torch checkpoint"
    # gzip, bzip2, RAR and 7z. A zip is looked into, for torch's own files are zips.
    if head.startswith((b"\x1f\x8b", b"BZh", b"Rar!", b"7z")):
        return PACKED
    if head.startswith(b"PK"):
        return kind_of_zip(path)
    is_torch_file = b"\x80" in head[:32]  # a pickle, or the form before torch's zips
    if not is_torch_file and head.isascii():
        return "it is a text, no torch checkpoint"
    return None


# --- fingerprints ---------------------------------------------------------------------------------

PLAIN = (bool, int, float, str, tuple)  # the kinds of values that tell all of themselves as text


def fingerprint(*parts):
    """A short hash of JSON-able values: for cache keys, and for whether two runs are the same."""
    # Keys in one order, and what JSON does not know (a path) as its text.
    text = json.dumps(parts, sort_keys=True, default=str)
    # 80 bits: two keys do not meet by chance.
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def text_fingerprint(path):
    """A short hash of a text file's content, be it text or not."""
    return fingerprint(Path(path).read_text(encoding="utf-8", errors="replace"))


def code_fingerprint(*pieces):
    """A short hash of functions' and classes' code, and of what it refers to by name.

    Followed are functions, classes, base classes and plain values of the same module (of a
    notebook, its cells). Comments, docstrings and layout do not count.
    """
    texts = []
    waiting = list(pieces)
    seen = set()
    while waiting:
        piece = waiting.pop()
        if isinstance(piece, functools.partial):
            # What is bound belongs to what the function computes.
            bound = dict(enumerate(piece.args)) | piece.keywords
            texts += plain_values(bound)
            waiting += [value for value in bound.values() if callable(value)]
            piece = piece.func
        if not (inspect.isroutine(piece) or inspect.isclass(piece)):
            # An object that can be called: what it holds, and its class.
            texts += plain_values(vars(piece))
            piece = type(piece)
        # Functions may refer to each other, or to themselves.
        if id(piece) in seen:
            continue
        seen.add(id(piece))
        texts.append(plain_code(piece))
        waiting += functions_and_classes_used_by(piece)
        texts += plain_values(names_used_by(piece))
    # Sorted, for the order in which pieces were found does not matter.
    return fingerprint(sorted(texts))


def plain_code(piece):
    """The code of a function or class without comments, docstrings and layout."""
    try:
        source = textwrap.dedent(inspect.getsource(piece))
    except (OSError, TypeError):
        return code_without_source(piece)
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a lambda in the middle of a statement
        return source
    for node in ast.walk(tree):
        # The body of a lambda or of `a if b else c` is an expression and no list.
        body = getattr(node, "body", None)
        # A body needs a statement, so a docstring that stands alone is left.
        if isinstance(body, list) and len(body) > 1 and is_docstring(body[0]):
            del body[0]
    return tree_as_text(tree)


def code_without_source(piece):
    """The code of a namedtuple, of a notebook's class, or of what was built by exec, as text."""
    if hasattr(piece, "_fields"):  # a namedtuple
        return f"{piece.__name__} {piece._fields} {piece._field_defaults}"
    if inspect.isclass(piece):
        # A notebook keeps the source of functions alone.
        methods = [
            f"{function.__name__}: {plain_code(function)}" for function in functions_of(piece)
        ]
        own = {name: value for name, value in vars(piece).items() if not name.startswith("__")}
        return "\n".join([piece.__name__, *methods, *plain_values(own)])
    defaults = dict(enumerate(getattr(piece, "__defaults__", None) or ()))
    defaults |= getattr(piece, "__kwdefaults__", None) or {}
    codes = [bytecode(code) for code in code_objects(piece)]
    return " ".join([*codes, *plain_values(defaults)])


def tree_as_text(value):
    """A syntax tree, or a value in one, as text that is the same under all versions of Python.

    That of ast.unparse and ast.dump is not: f-strings and empty fields differ.
    """
    if isinstance(value, list):
        return f"[{', '.join(tree_as_text(entry) for entry in value)}]"
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = []
    for name, entry in ast.iter_fields(value):
        # Later versions have more fields, which are empty where older code has no use for them.
        if entry not in (None, []):
            fields.append(f"{name}={tree_as_text(entry)}")
    return f"{type(value).__name__}({', '.join(fields)})"


def bytecode(code):
    """A code object as text that is the same in every process of one Python version."""
    # The text of a code object holds its address; `code_objects` gives the inner ones instead.
    values = [const for const in code.co_consts if not isinstance(const, types.CodeType)]
    return f"{code.co_code.hex()} {code.co_names} {values}"


def is_docstring(statement):
    """Whether a statement is nothing but a text."""
    is_value = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_value and isinstance(statement.value.value, str)


def functions_of(piece):
    """A function itself, or the functions that a class defines, static and class methods too.

    Of a namedtuple none that Python makes for it: each version has others.
    """
    if inspect.isfunction(piece):
        return [piece]
    if inspect.ismethod(piece):
        return [piece.__func__]
    functions = []
    # A function that is built in has no __dict__.
    for value in getattr(piece, "__dict__", {}).values():
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if inspect.isfunction(value) and not made_for_namedtuple(value):
            functions.append(value)
    return functions


def made_for_namedtuple(function):
    """Whether a function is one of those that Python adds to a namedtuple."""
    # __module__ is None where the code was run without a name.
    return str(function.__module__).startswith(("collections", "namedtuple_"))


def code_objects(piece):
    """The code objects of a piece, those of functions inside its functions included."""
    codes = [function.__code__ for function in functions_of(piece)]
    for code in codes:  # the list grows while it is walked
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return codes


def names_used_by(piece):
    """{name: value} of the globals and enclosed variables that a piece's functions refer to."""
    used = {}
    for function in functions_of(piece):
        for code in code_objects(function):
            for step in dis.get_instructions(code):
                # Not all of co_names: names of attributes are among these.
                loads = step.opname in ("LOAD_GLOBAL", "LOAD_NAME")  # the latter in a class's body
                if loads and step.argval in function.__globals__:
                    used[step.argval] = function.__globals__[step.argval]
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            with contextlib.suppress(ValueError):  # not filled yet
                used[name] = cell.cell_contents
    return used


def functions_and_classes_used_by(piece):
    """The functions and classes of the piece's own module that it refers to."""
    module = getattr(piece, "__module__", None)
    found = []
    for base in getattr(piece, "__bases__", ()):
        if base.__module__ == module:
            found.append(base)
    for value in names_used_by(piece).values():
        is_code = inspect.isfunction(value) or inspect.isclass(value)
        if is_code and value.__module__ == module:
            found.append(value)
    return found


def plain_values(named):
    """A text, name = value, for each number, text, tuple, array and tensor of {name: value}.

    Not of lists and dicts, for code may write to them, and would then differ after it has run.
    """
    values = []
    for name, value in named.items():
        if isinstance(value, PLAIN):
            values.append(f"{name} = {value!r}")
        if isinstance(value, torch.Tensor):
            values.append(f"{name} = {value.dtype} {value.tolist()}")
        # Of objects an array has the addresses alone.
        if isinstance(value, np.ndarray) and value.dtype != object:
            values.append(f"{name} = {value.dtype} {value.shape} {fingerprint(value.tobytes())}")
    return values


# ==================================================================================================
# 13  Exercises
# ==================================================================================================

# The exercises edition is made from the notebook. Where the notebook shows one of these functions,
# the learner writes it. reference: what stands in until the answer is right; None: the config's.
Exercise = namedtuple("Exercise", "reference check hint")

EXERCISES = {
    "training_loop": Exercise(
        loop_of_fit,
        check_training_loop,
        "for each epoch, counted from 0, choose its views with `train_loader.set_epoch(epoch)` "
        "and bring the student into training mode; for each batch `images, labels, *_` work out "
        "the cross-entropy, clear the old gradients, go backward, clip with "
        "`nn.utils.clip_grad_norm_`, and step. (The check trains a tiny net on made-up batches for "
        "three epochs, so what your loop prints is seen twice.)",
    ),
    "soft_labels": Exercise(
        soft_labels,
        check_soft_labels,
        "what is divided by what, and over which dimension do the probabilities add up to one? "
        "Logits may be so large that `exp` overflows: `F.softmax` copes with that.",
    ),
    "loss_fn_kd": Exercise(
        loss_fn_kd,
        check_loss_fn_kd,
        "`F.kl_div(log_p_student, p_teacher, reduction='batchmean')` wants the student's "
        "logarithms (`F.log_softmax`) and the teacher's probabilities (your `soft_labels`); "
        "`F.cross_entropy` wants the plain logits.",
    ),
    "dwpw_conv": Exercise(
        dwpw_conv,
        check_dwpw_conv,
        "six layers in an `nn.Sequential`: convolution, `nn.BatchNorm2d`, `nn.LeakyReLU(0.01)`, "
        "and the same again. `groups=in_channels` makes a convolution depthwise; both have a bias. "
        "`h.check_budget(my_dwpw_conv(64, 128))` counts the parameters.",
    ),
    "student": Exercise(
        None,
        check_student,
        "a stem that halves the picture once or twice, some of your blocks, `h.GlobalAvgPool()` "
        "and one `nn.Linear`. The docstring is that of the solution; any net within 60,000 "
        "parameters will do. Strong and the stages after it then train *yours*, while their texts "
        "speak of the reference, the net with the inverted residuals below; "
        '`mine.use_reference("student")` puts that back. Boss trains yours where it has a '
        "`layer1`, `layer2` and `layer3`.",
    ),
    "loss_weights": Exercise(
        loss_weights,
        check_loss_weights,
        "`cfg.loss_schedule` says which of the two cases of the docstring it is; return "
        "`h.LossWeights(kd=..., alpha=..., align=...)`.",
    ),
    "alignment": Exercise(
        alignment,
        check_alignment,
        "for each layer: average the larger of the two maps down with `F.adaptive_avg_pool2d`, "
        "send the student's through its adapter, and add the weight times `F.smooth_l1_loss`.",
    ),
}


def no_exercise(name):
    """What to say of a name that no exercise has, without the full stop."""
    return f"{printable(repr(name))} is no exercise: {', '.join(EXERCISES)}"


class Answers:
    """A learner's answers and guesses in the exercises edition.

    What is right is what the stages train with. In the place of anything else this module's
    reference stands, and that is said. The runs of this edition have a folder of their own,
    "exercises"; one of which nothing but the code has changed is started again.
    """

    def __init__(self, out=None):
        self.out = results_folder(out) / EXERCISES_FOLDER
        self.own = {}  # name of an exercise -> the right answer
        self.guesses = {}  # name of a stage -> guessed validation accuracy

    def take(self, name, answer):
        """Check the answer to an exercise: it is returned where it is right, else the reference."""
        if name not in EXERCISES:
            raise UserError(no_exercise(name))
        exercise = EXERCISES[name]
        if exercise.check(answer):
            self.own[name] = answer
            say("Yours is used below.")
            return answer
        # An earlier right answer goes too, or stages would train with code that is no longer there.
        self.own.pop(name, None)
        say("Until it is right the reference stands in below.")
        return exercise.reference

    def use_reference(self, name):
        """Put an exercise's reference back in the place of the learner's answer."""
        if name not in EXERCISES:
            say(f"{no_exercise(name)}.")
            return
        self.own.pop(name, None)
        say(f"{name}: the reference stands in below.")

    def with_views(self, cfg, settings):
        """The config with a learner's settings of the training views, if these are right."""
        if check_views(settings, cfg):
            return replace(cfg, **settings)
        say("Until they are right the reference's views stand in below.")
        return cfg

    def guess(self, cfg, accuracy):
        """Keep a guess of a stage's validation accuracy, from 0 to 1; None is no guess."""
        # An earlier guess goes even where the new one is refused below.
        self.guesses.pop(cfg.exp_name, None)
        if accuracy is None:
            say(
                f"{cfg.exp_name}: no guess yet. It trains for {cfg.n_epochs} epochs: write a "
                "number from 0 to 1 in the place of None."
            )
        elif isinstance(accuracy, bool) or not isinstance(accuracy, numbers.Real):
            say(f"{cfg.exp_name}: {accuracy!r} is no number.")
        elif not 0 <= accuracy <= 1:
            say(f"{cfg.exp_name}: {accuracy!r} is no accuracy from 0 to 1.")
        else:
            self.guesses[cfg.exp_name] = float(accuracy)
            say(f"{cfg.exp_name}: after {cfg.n_epochs} epochs, you guess, {accuracy:.3f}.")

    def run_stage(self, cfg, data, teacher=None, device=None, fresh=False, **own):
        """`run_stage` with the right answers; then the guess beside what was reached.

        own: code for this stage alone, as in `run_stage`; None is the reference.
        """
        own = self.own_for(cfg) | own
        own = {name: value for name, value in own.items() if value is not None}
        if own:
            say(f"{cfg.exp_name} trains with your {', '.join(own)}.")
        device = torch.device(device or pick_device())
        n = processes_for(cfg, stage_folder(cfg, data, self.out), device, fresh, own)
        # fresh=True, for a run of other code is no error here; whether there is one is asked next.
        stage = prepare_stage(cfg, data, teacher, self.out, True, device, **own, processes=n)
        stage.folder.fresh = fresh or own_code_has_changed(stage)
        if not stage.folder.fresh:
            # Other settings, as after another LENGTH: hours of training are not thrown away.
            stage.folder.load()
        run = stage.train(n)
        if run.name in self.guesses:
            reached = plus_minus(run.valid_acc, run.n_valid)
            say(f"{run.name}: you guessed {self.guesses[run.name]:.4f}, it reached {reached}.")
        return run

    def check_folders(self, configs, data):
        """`check_folders` for the runs of this edition."""
        check_folders(configs, data, self.out)

    def own_for(self, cfg):
        """The right answers that a stage has a use for, as `prepare_stage` takes them."""
        wanted = []
        if cfg.student != "sample":  # Simple and Medium keep the course's net
            wanted.append("student")
        if cfg.needs_teacher:
            wanted.append("loss_fn_kd")
        if cfg.loss_schedule == "handover":
            wanted.append("loss_weights")
        if cfg.aligns:
            wanted.append("alignment")
        own = {name: self.own[name] for name in wanted if name in self.own}
        if "student" in own and not self.has_layers(cfg):
            say(
                f"{cfg.exp_name}: your student has no {', '.join(cfg.aligned_layers)} to align, "
                "so the reference trains here."
            )
            del own["student"]
        return own

    def has_layers(self, cfg):
        """Whether the learner's student has the layers that a stage aligns."""
        student = own_student(cfg, self.own["student"])
        image = torch.zeros(1, 3, cfg.image_size, cfg.image_size)
        return cfg.aligned_layers.keys() <= maps_it_has(student, cfg.aligned_layers, image).keys()

    def stage_table(self, runs):
        """`stage_table` with the guesses."""
        return stage_table(runs, self.guesses)

    def plot_soft_labels(self, *arguments):
        """`plot_soft_labels`, drawn with the learner's soft_labels if they are right."""
        return plot_soft_labels(*arguments, self.own.get("soft_labels", soft_labels))


def own_code_has_changed(stage):
    """True, and said, if a Stage's folder holds its run with other code, and nothing else other.

    But for the number of processes: where own code comes in, one trains in the place of several.
    """
    saved = run_in(stage.folder.path)
    if saved is None:
        return False
    different = stage.folder.different_facts(saved)
    code = different.keys() & OWN_CODE_FACTS.keys()
    if not code or different.keys() - code - {"processes"}:
        return False
    say(f"{stage.cfg.exp_name}: started again, for {', '.join(different.values())}")
    return True


# --- the exercises edition, made from the notebook ------------------------------------------------

EXERCISES_INTRODUCTION = """\
**This is the exercises edition.** It is the same walk, but the taught functions are yours to write.
Each step is *predict, write, check, run, compare*:

1. **Predict.** Before a stage runs, guess its validation accuracy: `mine.guess` keeps it for the
   tables.
2. **Write.** A cell with `raise NotImplementedError` is yours: put your code in its place.
3. **Check.** The next cell says whether it is right, and if not, why. A solution is folded below.
4. **Run and compare.** What is right is what the stages below train with. What is not yet written
   or not yet right breaks nothing: the reference stands in, and the cell says so.

After a change run the cells from there on again; a stage whose code has changed starts anew. (Where
a cell ends in a syntax error, the check below it still sees what you wrote before.)"""

# What the exercises edition calls in the place of the module's own functions.
EXERCISES_CALLS = {
    "h.check_folders(": "mine.check_folders(",
    "h.prepare_stage(simple_cfg, data, ": "h.prepare_stage(simple_cfg, data, out=mine.out, ",
    "h.run_stage(": "mine.run_stage(",
    "h.stage_table(": "mine.stage_table(",
    "h.plot_soft_labels(": "mine.plot_soft_labels(",
}

LOOP_HEAD = '''\
def my_training_loop(student, train_loader, cfg):
    """Train a student on its labels for cfg.n_epochs, as `fit` does.

    Adam with cfg.lr and cfg.weight_decay; gradients are clipped to the norm cfg.grad_norm_max.
    """
'''
TODO = "    raise NotImplementedError  # TODO: your code\n"


def export_exercises(folder=None):
    """Write the one-file exercises edition and return its path. folder: as in export_notebook."""
    folder = Path(folder or Path(__file__).parent)
    notebook = one_file_notebook(folder)
    cells = []
    for cell in notebook.cells:
        cells += exercise_cells(cell)
    # Below the title and above this module.
    cells.insert(1, new_markdown(EXERCISES_INTRODUCTION))
    # In place of nbformat's random ids, which would change with every export.
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number:03d}"
    notebook.cells = cells
    return write_notebook(notebook, folder / EXERCISES_NOTEBOOK)


def exercise_cells(cell):
    """The cells that the exercises edition has in the place of one cell of the notebook.

    A cell says by itself what becomes of it: it shows the source of a function of an exercise, it
    trains a stage, it folds an answer. Where that says nothing there is a mark in its metadata:
    {"exercise": "training_loop"}, "views" (to be written after the cell), or "omit".
    """
    kind = cell.metadata.pop("exercise", None)
    if kind == "omit":
        return []
    if kind == "views":
        return [cell, *views_exercise()]
    if kind:
        return code_exercise(kind, LOOP_HEAD, textwrap.indent(cell.source, "    "))
    if cell.cell_type == "markdown":
        return with_place_for_answer(cell)
    if cell.source.startswith("%%"):  # this module
        return [cell]
    return learners_code(cell)


def learners_code(cell):
    """What a code cell without a mark becomes: an exercise, or itself with what a learner needs."""
    # The cell is this one call and nothing else.
    shown = re.fullmatch(r"h\.show_source\(h\.(\w+)\)", cell.source.strip())
    if shown and exercise_that_shows(shown[1]):
        name = exercise_that_shows(shown[1])
        return code_exercise(name, *head_and_body(name, globals()[shown[1]]))
    # Before the calls are renamed: the name of the stage's config, for `mine.guess`.
    trained = re.search(r"h\.(?:run_stage|prepare_stage)\((\w+),", cell.source)
    cell.source = with_own_calls(cell.source)
    if trained:
        guess = f"mine.guess({trained[1]}, None)  # TODO: your guess, for example 0.5"
        return [new_markdown(PREDICT), new_code(guess), cell]
    if re.search(r"^\s*import helpers", cell.source, re.MULTILINE):
        return [cell, new_code("mine = h.Answers()")]
    return [cell]


def with_own_calls(text):
    """Code with the calls of the exercises edition in the place of the module's own."""
    for call, own_call in EXERCISES_CALLS.items():
        text = text.replace(call, own_call)
    return text


PREDICT = "**Predict.** Which validation accuracy will this stage reach?"


def exercise_that_shows(name):
    """The exercise whose answer is the function of that name, or None."""
    # The only shown function that is not called as its exercise.
    if name == plain_student.__name__:
        return "student"
    return name if name in EXERCISES else None


def with_place_for_answer(cell):
    """A question, an empty place for the learner's own answer, and the folded answer."""
    question, fold, answer = cell.source.partition("<details>")
    if not fold:
        return [cell]
    # A stage of a solution is compared with those that were trained with the learner's answers.
    answer = with_own_calls(answer)
    place = new_markdown("**Your answer:** *double-click here and write.*")
    # An exercise is answered with code, a question in words.
    if question.startswith("**Exercise"):
        place = new_code("# Your code.")
    return [new_markdown(question.strip()), place, new_markdown(fold + answer)]


def head_and_body(name, function):
    """(signature and docstring, the rest) of a function's source, as a learner's my_... function.

    What the body calls of this module gets "h." before it, but for what the learner has written.
    """
    source = inspect.getsource(function)
    lines = source.splitlines(keepends=True)
    # The source is a single def, whose first statement is its docstring.
    docstring = ast.parse(source).body[0].body[0]
    head = "".join(lines[: docstring.end_lineno])
    head = head.replace(f"def {function.__name__}(", f"def my_{name}(", 1)
    body = "".join(lines[docstring.end_lineno :])
    names = [used.__name__ for used in functions_and_classes_used_by(function)]
    names += [text.split(" = ")[0] for text in plain_values(names_used_by(function))]
    for name in names:
        if name not in EXERCISES:
            # (?<![\w.]): not the end of a longer name, nor an attribute of something else.
            body = re.sub(rf"(?<![\w.]){name}\b", f"h.{name}", body)
    return head, body


def code_exercise(name, head, body):
    """Write, check, and a folded solution, for one function."""
    take = f'mine.take("{name}", my_{name})'
    # The cell that it replaces trains a student, so the loop is called at once.
    if name == "training_loop":
        # A student of its own for each try, so that a second one does not train the first on.
        student = "student = h.build_student(cfg).to(device)"
        train = "training_loop(student, train_loader, cfg)"
        check = f"{name} = {take}\n{student}\n{train}"
    elif EXERCISES[name].reference is None:
        # Nothing stands in for it: the stages take the answer from `mine`.
        check = f"_ = {take}"
    else:
        check = f"{name} = {take}"
    return [
        new_markdown(f"**Write `my_{name}`.** Hint: {EXERCISES[name].hint}"),
        new_code(head + TODO.rstrip(), exercise=name),
        new_code(check),
        folded_solution(head + body),
    ]


def views_exercise():
    """Write, check, and a folded solution, for the settings of Boss's training views."""
    start = ["my_views = {"]
    solution = ["my_views = {"]
    # The exercise starts from the course's sample transform.
    plain = Config()
    for setting_name, transform in VIEW_SETTINGS.items():
        start.append(f'    "{setting_name}": {getattr(plain, setting_name)},  # TODO: {transform}')
        solution.append(f'    "{setting_name}": {getattr(BOSS, setting_name)},')
    return [
        new_markdown(
            "**Write the training views of Strong and Boss** as settings: the comments name the "
            "transforms of torchvision that the homework's Boss has, one after the other. Now they "
            "are those of the course's sample transform."
        ),
        new_code("\n".join([*start, "}"]), exercise="views"),
        new_code("strong_cfg = mine.with_views(strong_cfg, my_views)"),
        folded_solution("\n".join([*solution, "}"])),
    ]


def folded_solution(code):
    """A markdown cell with code that is seen when it is unfolded."""
    return new_markdown(
        f"<details><summary>A solution</summary>\n\n```python\n{code.strip()}\n```\n\n</details>"
    )


def new_markdown(text):
    # Imported where it is used, by the exports alone.
    import nbformat

    return nbformat.v4.new_markdown_cell(text)


def new_code(text, **metadata):
    import nbformat

    return nbformat.v4.new_code_cell(text, metadata=metadata)


# ==================================================================================================
# 14  Command line
# ==================================================================================================

NOTEBOOK = "hw13_distill.ipynb"
KAGGLE_NOTEBOOK = "submission/hw13_distill_kaggle.ipynb"
EXERCISES_NOTEBOOK = "submission/hw13_distill_exercises.ipynb"


def export_notebook(folder=None):
    """Write the one-file notebook for Kaggle and return its path.

    It is the notebook with this module in its first cell, without outputs. folder: where the
    notebook lies, default beside this module.
    """
    folder = Path(folder or Path(__file__).parent)
    notebook = one_file_notebook(folder)
    # The marks are for `export_exercises`.
    for cell in notebook.cells:
        cell.metadata.pop("exercise", None)
    return write_notebook(notebook, folder / KAGGLE_NOTEBOOK)


def one_file_notebook(folder):
    """The notebook of a folder, without outputs, with this module in its first code cell."""
    import nbformat

    notebook = nbformat.read(folder / NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
    # This magic writes the cell to a file, from which the next cells import it.
    text = "%%writefile helpers.py\n" + Path(__file__).read_text(encoding="utf-8")
    # Folded in Jupyter and on Kaggle.
    hidden = {"jupyter": {"source_hidden": True}, "_kg_hide-input": True}
    # Below the title. Its id is fixed, for a random one would change with every export.
    notebook.cells.insert(1, nbformat.v4.new_code_cell(text, id="helpers", metadata=hidden))
    return notebook


def write_notebook(notebook, path):
    """Write a notebook to a file; returns its path."""
    import nbformat

    write_text(path, nbformat.writes(notebook) + "\n")
    return path


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors: one line, no usage text."""

    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists the arguments)")


def build_parser():
    """The command line's parser: each command sets `function`, which gets the arguments."""
    parser = Parser(
        prog="helpers.py",
        description="Distil a ResNet-18 into at most 60,000 parameters on Food-11.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_run(commands)
    add_evaluate(commands)
    add_predict(commands)
    add_validate(commands)
    add_export(commands)
    add_train(commands)
    return parser


def add_command(commands, name, function, help):
    """A command of the parser, to which arguments can be added."""
    parser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(function=function)
    return parser


def describe_config_keys():
    """Every key of --set, a line each: its meaning and the words that it takes."""
    lines = ["the keys of --set:"]
    for f in dataclasses.fields(Config):
        choices = f.metadata["choices"] or ""
        lines.append(f"  {f.name:<16}{f.metadata['meaning']} {choices}")
    return "\n".join(lines)


def add_run(commands):
    run_parser = add_command(commands, "run", run_command, "train stages and write their CSVs")
    run_parser.epilog = describe_config_keys()
    # It keeps the epilog's line ends.
    run_parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = run_parser.add_argument
    add(
        "--data",
        metavar="DIR",
        type=user_path,
        help="folder with training/, validation/, evaluation/",
    )
    add("--demo", action="store_true", help="use the drawn demo set")
    add(
        "--out",
        metavar="DIR",
        type=user_path,
        help="results (default: submission/, on Kaggle its working folder)",
    )
    add("--stages", default=",".join(STAGES), help="comma-separated (default: %(default)s)")
    add(
        "--teacher",
        nargs="+",
        metavar="FILE",
        type=user_path,
        help=f"teacher checkpoint (default: {TEACHER_FILE} of the data, or one trained before); "
        "several are averaged",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a config key, listed below",
    )
    # Without a default, so that one which is not given can depend on HW13_FAST.
    add("--length", choices=list(LENGTHS), help="how many of each stage's epochs (default: full)")
    add(
        "--final",
        choices=["csv", "submit"],
        help="repeat the best stage on all labelled images; or also submit that",
    )
    add("--fresh", action="store_true", help="start again where a run is there already")


def add_evaluate(commands):
    help = "validation accuracy of a checkpoint"
    add = add_command(commands, "evaluate", evaluate_command, help).add_argument
    add("--data", metavar="DIR", type=user_path, required=True)
    add("--checkpoint", metavar="FILE", type=user_path, required=True)


def add_predict(commands):
    help = "write the CSV of a checkpoint"
    add = add_command(commands, "predict", predict_command, help).add_argument
    add("--data", metavar="DIR", type=user_path, required=True)
    add("--checkpoint", metavar="FILE", type=user_path, required=True)
    add("--out", metavar="CSV", type=user_path, required=True)
    add("--tta", action="store_true", help="average several views of each image")


def add_validate(commands):
    add = add_command(commands, "validate", validate_command, "check a submission CSV").add_argument
    add("csv", metavar="CSV", type=user_path)
    add("--rows", type=int, required=True, metavar="N")


def add_export(commands):
    add_command(
        commands,
        "export",
        export_command,
        "write the one-file notebooks: for Kaggle, and exercises",
    )


def add_train(commands):
    help = "train what a notebook has prepared (it starts this by itself, on several GPUs)"
    add_command(commands, "train", train_command, help).add_argument("job", metavar="FILE")


def run_command(args):
    # Of a key that is given twice the last value counts.
    settings = dict(parse_setting(text) for text in args.set)
    stages = split_names(args.stages)
    length = args.length or chosen_length()
    # For its errors alone: a mistyped stage or value is told before any data is read.
    for stage in stages:
        get_config(stage, length, **settings)
    if args.demo and args.data:
        raise UserError("--demo draws its own data: leave out --data")
    with process_group():
        # Inside the group, so that one process of a machine draws and the others wait for it.
        data = make_demo_data() if args.demo else find_data(args.data)
        if data is None:
            raise UserError(
                "no data found: name its folder with --data DIR, "
                "or use --demo for the drawn demo set"
            )
        say(f"{data.describe()}\n{data.counts().to_string()}")
        runs = run(
            data,
            stages,
            teacher_path=args.teacher,
            out=args.out,
            fresh=args.fresh,
            length=length,
            final=args.final,
            **settings,
        )
        with illustration():
            say(stage_table(runs).to_string())


def evaluate_command(args):
    # The other splits may be missing, or not usable.
    data = read_folder(args.data, needed=("validation",))
    device = pick_device()
    student, cfg = load_student(args.checkpoint, device)
    say_if_unfinished(args.checkpoint, cfg)
    facts = json.loads(Path(args.checkpoint).with_name("config.json").read_text(encoding="utf-8"))
    if facts.get("final"):
        raise UserError(
            f"{args.checkpoint} was trained on the validation images too: "
            "it has no validation accuracy"
        )
    say(data.account())
    split = load_data(data, "validation", "eval", cfg.image_size)
    score = evaluate(student, BatchLoader(split, cfg, device, batch_size=256))
    # NaN has an argmax too, so an accuracy would not show it.
    if not math.isfinite(score["valid_loss"]):
        raise UserError(f"{args.checkpoint} cannot be scored: its answers are not finite")
    n = score["n"]
    print(f"{args.checkpoint}: stage {cfg.exp_name}, {cfg.image_size} px, {data.origin}")
    what = "validation accuracy"
    if is_plain_folder(data.root, ("validation",)):  # pictures of whichever split
        what = f"accuracy in {data.root.name}"
    print(f"{what} {plus_minus(score['valid_acc'], n)} ({n} images)")


def predict_command(args):
    out = Path(args.out)
    if not out.name or out.is_dir():
        raise UserError(f"--out {args.out} is a folder: name a CSV file")
    # Before the work: a place that cannot be written is told at once.
    check_writable(out.parent)
    check_replaceable(out)
    data = read_folder(args.data, needed=("evaluation",))
    folders = {path.parent.resolve() for path in data.files["evaluation"]}
    if out.parent.resolve() in folders and is_called_as_an_id(out):
        raise UserError(f"--out {args.out} would count as an evaluation image: name another file")
    device = pick_device()
    student, cfg = load_student(args.checkpoint, device)
    say_if_unfinished(args.checkpoint, cfg)
    # A teacher's checkpoint can be loaded as well, but is above the limit.
    check_budget(student, image_size=cfg.image_size)
    say(data.account())
    write_predictions(student, data, cfg, out, device, args.tta)
    print(f"{args.out}: {len(data.ids['evaluation'])} rows, {data.origin}")


def check_replaceable(path):
    """UserError where something other than an earlier CSV of predictions lies at `path`."""
    if not path.exists():
        return
    header = ",".join(CSV_COLUMNS).encode()
    start = b""
    if path.is_file():  # a pipe or a device is not even looked into
        with open(path, "rb") as file:
            start = file.read(len(header))
    if start != header:
        raise UserError(
            f"--out {path} is a file already, and no CSV of predictions: name another one"
        )


def validate_command(args):
    print(f"{args.csv}: {validate_submission(args.csv, args.rows)} rows, valid")


def train_command(args):
    with process_group():
        train_job(args.job)


def export_command(args):
    print(export_notebook())
    print(export_exercises())


def words_when_stopped(args):
    """What Ctrl-C leaves of a command, and how to go on; args: None before they are read."""
    if args is None or args.command != "run":
        return "stopped"
    again = "the same command"
    if args.fresh:  # which would throw away what is saved
        again += " without --fresh"
    return f"stopped; {again} goes on after the last whole epoch"


def main(argv=None):
    """The command line. Returns the exit code, with one line each on stderr.

    0; 2 for a mistake of the user; 130 when stopped.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that cannot show a name ends no run
        sys.stdout.reconfigure(errors="backslashreplace")
    args = None
    try:
        # Inside the try, for mistakes in the arguments are UserErrors too.
        args = build_parser().parse_args(argv)
        args.function(args)
        return 0
    except (UserError, OSError, UnicodeError, MemoryError, torch.OutOfMemoryError) as error:
        # A MemoryError says nothing.
        text = str(error) or "out of memory: choose a smaller batch_size or image_size"
        # In one line, whatever line ends the text has.
        line = readable(" ".join(text.split()))
        print(f"helpers.py: {line}", file=sys.stderr, flush=True)
        if rank_and_world()[1] > 1:
            os._exit(2)  # at once, without waiting for the other processes: torchrun ends them
        return 2
    except KeyboardInterrupt:
        print(f"helpers.py: {words_when_stopped(args)}", file=sys.stderr)
        if rank_and_world()[1] > 1:
            os._exit(130)  # the others may wait for this one for ever
        return 130


if __name__ == "__main__":
    sys.exit(main())
