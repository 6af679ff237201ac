"""A fair ring: named recipes trained on one data folder under one budget.

    HW13_PHOTOS=DIR python tests/bench/recipes.py NAME ... [--epochs 30] [--size 112] [--seeds 1 2]
    python tests/bench/recipes.py --list          the names, and the size of each net
    python tests/bench/recipes.py --table [--against NAME]   stored rows, paired differences, the pictures
    python tests/bench/recipes.py NAME ... --predict DIR     evaluation CSVs of trained recipes

A NAME may be a regular expression. Every recipe of a call has the same images, teacher, sizes and number of epochs;
`fit` trains it. With --views K, recipes that need no feature maps of the teacher replay its answers to K epochs of
views; the others see new views in every epoch. A row is appended to recipes.csv in --results when its training ends,
and one that is there already is not trained again: name another folder to repeat the stored ones. Checkpoints and the
validation logits of each student lie in the work folder, so a killed call goes on where it stopped.

The accuracy is that of the epoch with the best validation accuracy, as `fit` keeps it; last_accuracy is the last
epoch's, six_views that of the kept student with test-time views. cpu_seconds are processor time of all threads, which a
pause does not lengthen; it is empty for a training that was killed on the way. Candidates live here; what wins moves to
helpers.py.
"""

import argparse
import copy
import dataclasses
import os
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from shared import DWPW  # noqa: E402

import helpers as h  # noqa: E402

RESULTS = Path(__file__).parent / "results"
ACTIVATIONS = {"relu": nn.ReLU, "hswish": nn.Hardswish}

# --- candidate nets --------------------------------------------------------------------------------------------------


def conv_bn(width, out, kernel=1, stride=1, groups=1, act=None):
    """Convolution without bias, batch norm, and an activation if one is named."""
    layers = [nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers, *([ACTIVATIONS[act]()] if act else []))


class SqueezeExcite(nn.Module):
    """Channels weighed by what the whole picture shows (Hu et al. 2018), through a bottleneck of `width` / 8."""

    def __init__(self, width):
        super().__init__()
        few = max(4, width // 8)
        self.gate = nn.Sequential(nn.Conv2d(width, few, 1), nn.ReLU(), nn.Conv2d(few, width, 1), nn.Hardsigmoid())

    def forward(self, x):
        return x * self.gate(x.mean((2, 3), keepdim=True))


class BlurPool(nn.Module):
    """Anti-aliased stride (Zhang 2019): a fixed 3x3 binomial filter before every second pixel is taken.

    The filter's own multiply-adds are not in h.count_macs, which counts layers.
    """

    def __init__(self, width):
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filter", (line[:, None] * line).expand(width, 1, 3, 3).clone(), persistent=False)

    def forward(self, x):
        return F.conv2d(x, self.filter.to(x.dtype), None, 2, 1, groups=x.shape[1])


class RepDepthwise(nn.Module):
    """Depthwise k x k, 3 x 3 and identity branches, each with batch norm, summed (Ding et al. 2021, RepVGG).

    `folded` gives the one convolution with bias that does the same in eval mode: that is what is deployed and counted.
    """

    def __init__(self, width, kernel, stride):
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.convs = nn.ModuleList(conv_bn(width, width, k, stride, width) for k in sorted({kernel, 3}))
        self.identity = nn.BatchNorm2d(width) if stride == 1 else None

    def forward(self, x):
        out = sum(conv(x) for conv in self.convs)
        return out + self.identity(x) if self.identity else out

    def folded(self):
        """A Conv2d equal to this module in eval mode."""
        width = self.convs[0][0].weight.shape[0]
        weight, bias = torch.zeros(width, 1, self.kernel, self.kernel), torch.zeros(width)
        middle = torch.zeros(width, 1, 1, 1) + 1
        parts = [(conv[0].weight, conv[1]) for conv in self.convs]
        for kernel, norm in parts + ([(middle, self.identity)] if self.identity else []):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            weight += F.pad(kernel * scale[:, None, None, None], [(self.kernel - kernel.shape[2]) // 2] * 4)
            bias += norm.bias - norm.running_mean * scale
        conv = nn.Conv2d(width, width, self.kernel, self.stride, self.kernel // 2, groups=width)
        conv.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        return conv


class TeachersClassifier(nn.Sequential):
    """A linear projector to the teacher's 512 features, then the teacher's own classifier, copied and frozen.

    After Chen et al. 2022 (SimKD), whose projector is convolutional and stands before the pooling; this one folds into
    a single linear layer, which is what is deployed and counted.
    """

    def __init__(self, width, teacher):
        super().__init__(nn.Linear(width, teacher.fc.in_features), copy.deepcopy(teacher.fc).requires_grad_(False))

    def folded(self):
        """A Linear equal to this module."""
        projector, classifier = self
        layer = nn.Linear(projector.in_features, classifier.out_features)
        layer.load_state_dict({"weight": (classifier.weight @ projector.weight).detach(),
                               "bias": classifier(projector.bias).detach()})
        return layer


def deployed(net):
    """A copy of a net in eval mode with everything folded that can be; the net itself where nothing can."""
    if not any(hasattr(m, "folded") for m in net.modules()):
        return net
    device = next(net.parameters()).device
    net = h.freeze(copy.deepcopy(net)).cpu()
    for module in list(net.modules()):
        for name, child in module.named_children():
            if hasattr(child, "folded"):
                setattr(module, name, child.folded())
    return net.to(device)


class Residual(nn.Module):
    """x + branch(x), where the sizes agree; else the branch, or a given shortcut + branch."""

    def __init__(self, branch, same, shortcut=None):
        super().__init__()
        self.branch, self.same, self.shortcut = branch, same, shortcut

    def forward(self, x):
        skipped = self.shortcut(x) if self.shortcut else x if self.same else 0
        return skipped + self.branch(x)


def inverted_residual(width, out, stride, s):
    """Expand 1x1, depthwise k x k, project 1x1, with a shortcut where shapes agree (Sandler et al. 2018)."""
    wide, blur = width * s.expansion, s.blur and stride == 2
    layers = [conv_bn(width, wide, act=s.act)] if s.expansion > 1 else []
    layers += [RepDepthwise(wide, s.kernel, stride), ACTIVATIONS[s.act]()] if s.rep else [
        conv_bn(wide, wide, s.kernel, 1 if blur else stride, wide, s.act)]
    layers += [BlurPool(wide)] if blur else []
    layers += [SqueezeExcite(wide)] if s.se else []
    layers += [conv_bn(wide, out)]
    return Residual(nn.Sequential(*layers), stride == 1 and width == out)


def residual_dwpw(width, out, stride, s):
    """dw-pw with a shortcut where shapes agree: half of an inverted residual's depth in activations, none wide."""
    branch = nn.Sequential(conv_bn(width, width, s.kernel, stride, width, s.act), conv_bn(width, out))
    return nn.Sequential(Residual(branch, stride == 1 and width == out), ACTIVATIONS[s.act]())


def convnext(width, out, stride, s):
    """Depthwise k x k first, then expand and project (Liu et al. 2022), batch norm in place of layer norm."""
    wide = out * s.expansion
    layers = [conv_bn(width, width, s.kernel, stride, width), conv_bn(width, wide, act=s.act), conv_bn(wide, out)]
    return Residual(nn.Sequential(*layers), stride == 1 and width == out)


BLOCKS = {"ir": inverted_residual, "resdw": residual_dwpw, "next": convnext}


@dataclass(frozen=True)
class Spec:
    """A net in a line: a 3x3 stem, layers of (channels, blocks, stride of the first), a head, a classifier."""

    layers: tuple
    stem: int = 16
    block: str = "ir"
    expansion: int = 3
    kernel: int = 3
    act: str = "relu"
    se: bool = False
    blur: bool = False
    rep: bool = False
    head: int = 0  # channels of a last 1x1 convolution, 0: none

    def build(self, cfg=None, teacher=None):
        """The net: (B, 3, H, W) -> logits (B, 11), its layers named layer1, layer2, ... It needs neither argument."""
        width = self.stem
        net = nn.Sequential()
        net.add_module("stem", conv_bn(3, width, 3, 2, act=self.act))
        for number, (out, depth, stride) in enumerate(self.layers, 1):
            blocks = []
            for first in [True] + [False] * (depth - 1):
                blocks.append(BLOCKS[self.block](width, out, stride if first else 1, self))
                width = out
            net.add_module(f"layer{number}", nn.Sequential(*blocks))
        if self.head:
            net.add_module("head", conv_bn(width, self.head, act=self.act))
            width = self.head
        net.add_module("pool", h.GlobalAvgPool())
        net.add_module("fc", nn.Linear(width, h.NUM_CLASSES))
        return net


def best_legal_net(cfg=None, teacher=None):
    """The best legal published net as far as its description goes: 59,790 parameters, 17 M multiply-adds.

    A depthwise-separable 7x7 stride-2 stem and pool, then ResNet-18's basic blocks of two depthwise-separable
    convolutions, 1, 4, 1 and 1 of them at 16, 32, 64 and 128 channels, a 1x1 shortcut in each layer's first block.
    """
    def separable(width, out, stride):
        return [conv_bn(width, width, 3, stride, width, "relu"), conv_bn(width, out)]

    def basic(width, out, stride, first):
        branch = nn.Sequential(*separable(width, out, stride), nn.ReLU(), *separable(out, out, 1))
        shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride), nn.BatchNorm2d(out)) if first else None
        return nn.Sequential(Residual(branch, True, shortcut), nn.ReLU())

    net, width = nn.Sequential(), 16
    net.add_module("stem", nn.Sequential(
        nn.Conv2d(3, 3, 7, 2, 3, groups=3, bias=False), nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1)))
    for number, (out, depth, stride) in enumerate(((16, 1, 1), (32, 4, 2), (64, 1, 2), (128, 1, 2)), 1):
        blocks = []
        for i in range(depth):
            blocks.append(basic(width, out, stride if i == 0 else 1, i == 0))
            width = out
        net.add_module(f"layer{number}", nn.Sequential(*blocks))
    net.add_module("pool", h.GlobalAvgPool())
    net.add_module("fc", nn.Linear(width, h.NUM_CLASSES))
    return net


class FrozenStem(nn.Sequential):
    """Layers that stay as they were copied: no gradients, and batch norm always in eval mode."""

    def train(self, mode=True):
        return super().train(False)


def own_net(cfg, teacher):
    """The config's student."""
    return h.build_student(cfg)


def projected_net(cfg, teacher):
    """The config's student with the teacher's classifier behind a projector."""
    net = h.build_student(cfg)
    net.fc = TeachersClassifier(net.fc.in_features, teacher)
    return net


def published_boss_net(cfg, teacher):
    """The published Boss student, 99,891 parameters: the teacher's own stem, copied and frozen, and four dwpw_convs."""
    net = h.build_student(cfg)
    stem = FrozenStem(*net.stem)
    stem[0].load_state_dict(teacher.conv1.state_dict())
    stem[1].load_state_dict(teacher.bn1.state_dict())
    net.stem = stem.requires_grad_(False)
    return net


class EnlargingTeacher(torchvision.models.ResNet):
    """The teacher, looking at views enlarged to `size` px: one trained at 224 px answers badly on small pictures.

    It runs in bf16. The size is a buffer, so that its checksum, the key of stored logits, tells it from the teacher.
    """

    def __init__(self, teacher, size):
        super().__init__(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], h.NUM_CLASSES)
        self.load_state_dict(teacher.state_dict())
        self.register_buffer("size", torch.tensor(size))

    def forward(self, x):
        x = F.interpolate(x.float(), int(self.size), mode="bicubic", align_corners=False)
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().forward(x)


# --- candidate losses ------------------------------------------------------------------------------------------------


def standardised_kd(student_logits, labels, teacher_logits, alpha, temperature):
    """loss_fn_kd on logits of mean 0 and deviation 1 in each row (Sun et al. 2024)."""
    student, teacher = (F.layer_norm(x.float(), x.shape[1:]) for x in (student_logits, teacher_logits))
    return PLAIN_KD(student, labels, teacher, alpha, temperature)


def dist_kd(student_logits, labels, teacher_logits, alpha, temperature):
    """DIST (Huang et al. 2022): 1 - correlation between rows and between columns of the softened probabilities.

    A replacement of the soft loss alone: labels and alpha are not used.
    """
    student, teacher = (h.soft_labels(x, temperature) for x in (student_logits, teacher_logits))

    def apart(a, b):
        return 1 - F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1).mean()

    return temperature**2 * (2 * apart(student, teacher) + 2 * apart(student.T, teacher.T))


PLAIN_KD = h.loss_fn_kd


class ProjectorLoss(h.DistillLoss):
    """DistillLoss plus the mean squared distance between the projected features and the teacher's."""

    def forward(self, images, labels, teacher_logits=None):
        with h.feature_hooks(self.student, ["fc.0"]) as ours, h.feature_hooks(self.teacher, ["avgpool"]) as theirs:
            loss, *answers = super().forward(images, labels, teacher_logits)
        return loss + F.mse_loss(ours["fc.0"].float(), theirs["avgpool"].flatten(1).float()), *answers


class ChangedViews(h.DistillLoss):
    """DistillLoss(*args) on batches that `change` alters before teacher and student see them.

    change(images, one-hot labels (B, 11), rng) -> the same two, with new values. The draws start from the seed and the
    epoch, so that a resumed run sees what an uninterrupted one would.
    """

    def __init__(self, change, *args):
        super().__init__(*args)
        self.change = change

    def set_progress(self, progress):
        super().set_progress(progress)
        self.rng = np.random.default_rng(int(h.fingerprint(self.cfg.seed, progress), 16))

    def forward(self, images, labels, teacher_logits=None):
        images, labels = self.change(images, F.one_hot(labels, h.NUM_CLASSES).float(), self.rng)
        return super().forward(images, labels, teacher_logits)


def mixed(images, labels, rng):
    """Mixup (Zhang et al. 2018): every picture laid over another one of the batch, its share from Beta(0.8, 0.8)."""
    share = torch.from_numpy(rng.beta(0.8, 0.8, (len(images), 1))).to(labels)
    other = torch.from_numpy(rng.permutation(len(images))).to(labels.device)
    wide = share[..., None, None].to(images)
    return wide * images + (1 - wide) * images[other], share * labels + (1 - share) * labels[other]


def coloured(images, labels, rng):
    """Contrast and saturation times 0.6 to 1.4, brightness +- 0.4 deviations, each drawn for each picture."""
    contrast, saturation, shift = torch.from_numpy(rng.uniform(-0.4, 0.4, (3, len(images), 1, 1, 1))).to(images)
    grey = images.mean(1, keepdim=True)
    return (grey + (1 + saturation) * (images - grey)) * (1 + contrast) + shift, labels


def erased(images, labels, rng):
    """Random erasing (Zhong et al. 2017): half of the pictures lose a square of a fifth to a half of their side."""
    n, side = len(images), images.shape[-1]
    x, y = torch.from_numpy(rng.uniform(0, side, (2, n, 1)))
    half = torch.from_numpy(side * rng.uniform(0.1, 0.25, (n, 1)) * (rng.random((n, 1)) < 0.5))
    pixels = torch.arange(side) + 0.5
    inside = ((pixels - y).abs() < half)[:, None, :, None] & ((pixels - x).abs() < half)[:, None, None, :]
    return images.masked_fill(inside.to(images.device), 0.0), labels


# --- recipes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A Config, the net where it is not the config's own, and replacements of loss_fn_kd and of the whole loss."""

    cfg: h.Config
    build: object = own_net  # (cfg, teacher) -> net
    kd: object = PLAIN_KD
    loss: object = h.DistillLoss
    replay: bool = True  # the teacher's logits of every epoch may be stored and shared by the recipes of a call

    def net(self, cfg, teacher):
        """The student with weights drawn from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            return self.build(cfg, teacher)


# Patient and consistent teaching in a short form: the teacher's answers alone, on the student's own view.
TEACH = h.get_config(
    "simple", loss_fn_type="KD", alpha=1.0, temperature=4.0, crop_scale=(0.35, 1.0), optimizer="adamw",
    weight_decay=0.02, lr=4e-3, lr_schedule="cosine", warmup_epochs=1.0, batch_size=64, grad_norm_max=10.0)
# Boss as it was published, and its legal plain form.
DWPW_BOSS = h.get_config(
    "boss", **DWPW, temperature=20.0, optimizer="adam", lr=1e-3, lr_schedule="constant", warmup_epochs=0.0,
    weight_decay=1e-5, batch_size=128)
LAYERS = ((24, 2, 2), (32, 3, 2), (48, 2, 1))  # the stages' own


def arch(layers=LAYERS, **settings):
    """A recipe that differs from TEACH in its net alone."""
    return Recipe(TEACH, Spec(layers, **settings).build)


def taught(**settings):
    """A recipe of TEACH with other settings on one net."""
    return Recipe(dataclasses.replace(TEACH, **settings), BASE.build)


BASE = Spec(((24, 2, 2), (32, 3, 2), (40, 2, 1)), kernel=5, act="hswish")

RECIPES = {
    # the marks
    "sample_ce": Recipe(h.get_config("simple", lr=1e-3)),
    "sample_kd": Recipe(h.get_config("medium", lr=1e-3)),
    "published_boss": Recipe(dataclasses.replace(
        DWPW_BOSS, stem_width=64, widths=(64, 128, 256, 140), depths=(1,) * 4, strides=(1, 2, 2, 2)),
        published_boss_net, replay=False),
    "legal_dwpw": Recipe(DWPW_BOSS, replay=False),
    "best_legal": Recipe(TEACH, best_legal_net),
    # the stages
    "strong": Recipe(h.STAGES["strong"]),
    "boss": Recipe(h.STAGES["boss"], replay=False),
    "beyond": Recipe(h.STAGES["beyond"]),
    # nets under one recipe
    "a_dwpw": Recipe(dataclasses.replace(TEACH, student="dwpw")),
    "a_ir_strided": arch(((24, 2, 2), (32, 3, 2), (48, 2, 2))),
    "a_ir_late1": arch(),
    "a_resdw": arch(((32, 2, 2), (64, 4, 2), (96, 3, 1)), block="resdw", stem=24),
    "a_ir_e2": arch(((24, 3, 2), (40, 4, 2), (56, 2, 1)), expansion=2),
    "a_ir_e4": arch(((16, 2, 2), (32, 3, 2), (40, 2, 1)), expansion=4),
    "a_ir_k5": arch(((24, 2, 2), (32, 3, 2), (40, 2, 1)), kernel=5),
    "a_ir_se": arch(((24, 2, 2), (32, 2, 2), (40, 2, 1)), se=True),
    "a_ir_hswish": arch(act="hswish"),
    "a_ir_blur": arch(blur=True),
    "a_ir_head": arch(((24, 2, 2), (32, 2, 2), (48, 2, 1)), head=192),
    "a_next_k5": arch(((24, 2, 2), (40, 3, 2), (48, 3, 1)), block="next", kernel=5, expansion=2),
    "b_k7": arch(((20, 2, 2), (28, 3, 2), (36, 2, 1)), kernel=7),
    "b_k5_deep": arch(((16, 2, 2), (24, 4, 2), (32, 4, 1)), kernel=5, stem=12),
    "b_k5_hswish": taught(),
    "b_late2": arch(((24, 2, 2), (32, 3, 1), (40, 2, 1)), kernel=5, act="hswish"),
    "b_se": arch(((24, 2, 2), (32, 2, 2), (40, 2, 1)), kernel=5, act="hswish", se=True),
    # recipes on one net
    "r_t2": taught(temperature=2.0),
    "r_lr8": taught(lr=8e-3),
    # the last stage with one thing changed (for another loss also its temperature; the branches belong to beyond_k5)
    "beyond_pure": Recipe(h.get_config("beyond", alpha=1.0)),
    "beyond_labels": Recipe(h.get_config("beyond", alpha=0.1)),
    "beyond_t2": Recipe(h.get_config("beyond", temperature=2.0)),
    "beyond_t8": Recipe(h.get_config("beyond", temperature=8.0)),
    "beyond_handover": Recipe(
        h.get_config("beyond", align_weights=(3.0, 2.0, 1.0), loss_schedule="handover"), replay=False),
    "beyond_blur": Recipe(h.STAGES["beyond"], Spec(LAYERS, act="hswish", blur=True).build),
    "beyond_k5": Recipe(h.STAGES["beyond"], BASE.build),
    "beyond_rep": Recipe(h.STAGES["beyond"], dataclasses.replace(BASE, rep=True).build),
    "beyond_sgd": Recipe(h.get_config("beyond", optimizer="sgd", lr=0.2, weight_decay=1e-4)),
    "beyond_std": Recipe(h.get_config("beyond", temperature=2.0), kd=standardised_kd),
    "beyond_dist": Recipe(h.get_config("beyond", temperature=1.0), kd=dist_kd),
    "beyond_projector": Recipe(h.STAGES["beyond"], projected_net, loss=ProjectorLoss, replay=False),
    "beyond_colour": Recipe(h.STAGES["beyond"], loss=partial(ChangedViews, coloured), replay=False),
    "beyond_erase": Recipe(h.STAGES["beyond"], loss=partial(ChangedViews, erased), replay=False),
    "beyond_mix": Recipe(h.STAGES["beyond"], loss=partial(ChangedViews, mixed), replay=False),
}


# --- the ring --------------------------------------------------------------------------------------------------------


def train(name, args, seed, data, teacher, device):
    """Train a recipe and return its row; its student's logits on the validation images go to the work folder."""
    recipe = RECIPES[name]
    views = (args.views or args.epochs) if recipe.replay and recipe.cfg.needs_teacher else 0
    cfg = dataclasses.replace(recipe.cfg, exp_name=name, image_size=args.size, n_epochs=args.epochs, seed=seed,
                              patience=args.epochs, teacher_views=views, amp=args.amp)
    net = recipe.net(cfg, teacher).to(device)
    teacher, start = teacher if cfg.needs_teacher else None, time.process_time()
    folder = work_folder(name, args, seed)
    whole_run = not folder.exists()
    train_loader, valid_loader = h.build_loaders(cfg, data, device)
    with mock.patch.multiple(h, loss_fn_kd=recipe.kd, DistillLoss=recipe.loss):
        history = h.fit(net, train_loader, valid_loader, cfg, teacher, folder, h.data_facts(data, teacher))
    logits, labels = h.predict_logits(net, valid_loader)
    small = deployed(net)
    if small is not net and not torch.allclose(h.predict_logits(small, valid_loader)[0], logits, atol=1e-3, rtol=1e-3):
        sys.exit(f"{name}: the folded net answers differently")
    cpu_seconds = time.process_time() - start if whole_run else None
    six = h.tta_probabilities(net, valid_loader, h.BatchLoader(
        h.load_data(data, "validation", "whole", args.size), cfg, device, batch_size=valid_loader.batch_size))
    torch.save({"logits": logits, "labels": labels, "six_views": six}, folder / "valid.pt")
    accuracy, six_views = ((answer.argmax(1) == labels).double().mean().item() for answer in (logits, six))
    return {"recipe": name, **budget(args), "seed": seed,
            "accuracy": accuracy, "s.e.": h.standard_error(accuracy, len(labels)),
            "last_accuracy": history[-1]["valid_acc"], "six_views": six_views,
            "parameters": sum(p.numel() for p in small.parameters()), "macs_224": h.count_macs(small, 224),
            "seconds": sum(row["seconds"] for row in history), "cpu_seconds": cpu_seconds, "logits": logits}


def budget(args):
    """What the recipes of one comparison share, as the columns of their rows."""
    return {"epochs": args.epochs, "size": args.size, "teacher_size": args.teacher_size, "views": args.views}


def budget_name(args):
    """The budget in a file's name."""
    return "-".join(map(str, budget(args).values()))


def of_budget(rows, args):
    """The rows of this call's budget."""
    return rows[(rows[list(budget(args))] == list(budget(args).values())).all(axis=1)]


def work_folder(name, args, seed):
    """Where a training keeps its files."""
    return args.work / f"{name}-{budget_name(args)}-{seed}"


def stored_rows(args):
    """The rows of recipes.csv so far, or an empty frame."""
    path = args.results / "recipes.csv"
    columns = ["recipe", "epochs", "size", "teacher_size", "views", "seed"]
    return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=columns)


def store(row, args):
    """Append a row to recipes.csv."""
    args.results.mkdir(parents=True, exist_ok=True)
    with h.written_whole(args.results / "recipes.csv") as temporary:
        pd.concat([stored_rows(args), pd.DataFrame([row])]).to_csv(temporary, index=False, float_format="%.5g")


def correct(name, args, seed):
    """(N,) 0 or 1 for each validation image of a trained recipe; None where its files are not there."""
    path = work_folder(name, args, seed) / "valid.pt"
    if not path.is_file():
        return None
    stored = torch.load(path, weights_only=True)
    return (stored["logits"].argmax(1) == stored["labels"]).double()


def table(args):
    """The stored rows of one budget, the mean over seeds, and the paired difference to --against."""
    rows = of_budget(stored_rows(args), args)
    frame = rows.groupby("recipe").agg(
        seeds=("seed", "count"), accuracy=("accuracy", "mean"), agreement=("agreement", "mean"), se=("s.e.", "mean"),
        parameters=("parameters", "first"), macs_224=("macs_224", "first"), cpu_seconds=("cpu_seconds", "mean"))
    for name in frame.index:
        seeds = set(rows.seed[rows.recipe == name]) & set(rows.seed[rows.recipe == args.against])
        pairs = [(correct(name, args, s), correct(args.against, args, s)) for s in sorted(seeds)]
        if pairs and all(a is not None and b is not None for a, b in pairs):
            difference = torch.stack([a - b for a, b in pairs]).mean(0)
            frame.loc[name, "difference"] = difference.mean().item()
            frame.loc[name, "its s.e."] = (difference.std() / len(difference) ** 0.5).item()
    frame = frame.sort_values("accuracy", ascending=False)
    print(frame.round(4).to_string())
    figure = plt.figure(figsize=(13, 4.5), dpi=80, layout="constrained")
    figure.suptitle(f"the photo set (not Food-11), {args.size} px, {args.epochs} epochs: validation accuracy +- s.e.")
    axes = figure.subplots(1, 3, sharey=True)
    for number, (name, row) in enumerate(frame.iterrows()):
        style = {"color": plt.cm.tab10(number % 10), "marker": "osD^vP*X"[number % 8]}
        for ax, key in zip(axes, ("parameters", "macs_224", "cpu_seconds"), strict=True):
            ax.errorbar(row[key], row.accuracy, row.se, ecolor="#BBBBBB", label=f"{row.accuracy:.3f} {name}", **style)
    axes[0].axvline(h.PARAM_LIMIT, color="#D55E00", ls="--", lw=1)
    labels = ("parameters (dashed: the limit)", "multiply-adds at 224 px", "processor seconds")
    for ax, label in zip(axes, labels, strict=True):
        ax.set(xlabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(args.results / f"recipes-{budget_name(args)}.png")


def write_predictions(names, args, data, teacher, device):
    """<name>.csv of the evaluation images for trained recipes (the first seed) and the teacher."""
    cfg = h.Config(image_size=args.size)
    split = h.load_data(data, "evaluation", "eval", args.size)
    nets = {"teacher": teacher}
    for name in names:
        folder = work_folder(name, args, args.seeds[0])
        net = RECIPES[name].net(RECIPES[name].cfg, teacher).to(device)
        net.load_state_dict(h.load_weights(folder / "student_best.ckpt"))
        nets[name] = h.freeze(net)
    for name, net in nets.items():
        h.write_submission(args.predict / f"{name}.csv", split.ids, h.predict(net, split, cfg, device))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--data", default=os.environ.get("HW13_PHOTOS"))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--teacher-size", type=int, default=176, help="what the teacher sees the views enlarged to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--views", type=int, default=0, help="replay so many teacher views (0: one for each epoch)")
    parser.add_argument("--amp", default="off", help="off: float32, the stored rows' own; auto: mixed precision")
    parser.add_argument("--work", type=Path, default=h.cache_root() / "recipes")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--against", default="published_boss")
    parser.add_argument("--predict", type=Path)
    args = parser.parse_args(argv)
    names = []
    for pattern in args.names:
        matching = [name for name in RECIPES if re.fullmatch(pattern, name)]
        if not matching:
            parser.error(f"no recipe is called {pattern}; --list shows the names")
        names += matching
    if args.table:
        return table(args)
    if args.list or not names:
        for name, recipe in RECIPES.items():
            net = recipe.net(recipe.cfg, h.build_student(h.TEACHER_CONFIG))
            net = deployed(net)
            print(f"{name:<16} {sum(p.numel() for p in net.parameters()):>7,} parameters, "
                  f"{h.count_macs(net, 224) / 1e6:>6.1f} M multiply-adds at 224 px")
        return None
    if not args.data:
        parser.error("name a data folder with --data DIR or HW13_PHOTOS")
    device, data = h.pick_device(), h.find_data(args.data)
    teacher = h.load_teacher(data.teacher, device)
    if args.teacher_size != args.size:
        teacher = h.freeze(EnlargingTeacher(teacher, args.teacher_size).to(device, memory_format=torch.channels_last))
    valid = h.BatchLoader(h.load_data(data, "validation", "eval", args.size), h.Config(image_size=args.size), device)
    if args.predict:
        return write_predictions(names, args, data, teacher, device)
    teacher_classes, labels = (answer if answer.ndim == 1 else answer.argmax(1)
                               for answer in h.predict_logits(teacher, valid))
    accuracy = (teacher_classes == labels).double().mean().item()
    print(f"the teacher at {args.teacher_size} px: {h.plus_minus(accuracy, len(labels))}", flush=True)
    for seed in args.seeds:
        for name in names:
            there = of_budget(stored_rows(args), args)
            if ((there.recipe == name) & (there.seed == seed)).any():
                print(f"{name}, seed {seed}: its row is stored already", flush=True)
                continue
            row = train(name, args, seed, data, teacher, device)
            row["agreement"] = (row.pop("logits").argmax(1) == teacher_classes).double().mean().item()
            row |= {"device": device.type, "date": time.strftime("%Y-%m-%d")}
            store(row, args)
            print(pd.DataFrame([row]).round(4).to_string(index=False), flush=True)
    return None


if __name__ == "__main__":
    main()
