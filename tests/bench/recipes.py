"""A fair ring: named recipes trained on one data folder under one budget.

    HW13_PHOTOS=DIR python tests/bench/recipes.py NAME ... [--epochs 30] [--size 112] [--seeds 1 2]
    python tests/bench/recipes.py --list          the names, and the size of each net
    python tests/bench/recipes.py --table [--against NAME]   stored rows, differences, a picture
    python tests/bench/recipes.py NAME ... --predict DIR     evaluation CSVs of trained recipes

A NAME may be a regular expression. Every recipe of a call has the same images, teacher, sizes and
number of epochs; `fit` trains it. With --views K, recipes that need no feature maps of the teacher
replay its answers to K epochs of views; the others see new views in every epoch. A row is appended
to recipes.csv in --results when its training ends, and one that is there already is not trained
again: name another folder to repeat the stored ones. Checkpoints and the validation logits of each
student lie in the work folder, so a killed call goes on where it stopped.

What a row is scored on, --scored:

    half   for choosing: trained on one fixed half of the training images, scored on the other half
    once   for a chosen recipe: trained on all training images, scored on the validation split
    best   how rows were scored before 2026-11-26: the best epoch by validation accuracy

In the first two no epoch is looked at before the last: the student is what the schedule ends with,
and the validation split has no part in any choice. cpu_seconds are processor time of all threads,
which a pause does not lengthen; it is empty for a training that was killed on the way. six_views is
the accuracy with test-time variants of each picture. Candidates live here; what wins moves to
helpers.py.
"""

import argparse
import copy
import os
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

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

# --- candidate nets -------------------------------------------------------------------------------


def conv_bn(in_channels, out_channels, kernel=1, stride=1, groups=1, act=None):
    """A convolution without bias, batch norm, and an activation if one is named."""
    padding = kernel // 2
    layers = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    )
    if act:
        layers.append(ACTIVATIONS[act]())
    return layers


class SqueezeExcite(nn.Module):
    """Channels weighed by what the whole picture shows (Hu et al. 2018): (B, C, H, W) -> the same.

    Through a bottleneck of an eighth of the channels.
    """

    def __init__(self, channels):
        super().__init__()
        few = max(4, channels // 8)
        self.gate = nn.Sequential(
            nn.Conv2d(channels, few, 1),
            nn.ReLU(),
            nn.Conv2d(few, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x):
        mean = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * self.gate(mean)


class BlurPool(nn.Module):
    """Anti-aliased stride (Zhang 2019): (B, C, H, W) -> (B, C, H / 2, W / 2).

    A fixed 3x3 binomial filter blurs before every second pixel is taken. It has no parameters;
    h.count_macs counts its multiply-adds.
    """

    def __init__(self, channels):
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        square = line[:, None] * line
        filters = square.expand(channels, 1, 3, 3).clone()
        self.register_buffer("filter", filters, persistent=False)

    def forward(self, x):
        filters = self.filter.to(x.dtype)
        return F.conv2d(x, filters, stride=2, padding=1, groups=x.shape[1])


class RepDepthwise(nn.Module):
    """Depthwise k x k, 3 x 3 and identity branches, each with batch norm, summed (RepVGG).

    (B, C, H, W) -> (B, C, H / stride, W / stride), after Ding et al. 2021. `folded` gives the one
    convolution with bias that does the same in eval mode: that is what is deployed and counted.
    """

    def __init__(self, channels, kernel, stride):
        super().__init__()
        self.channels = channels
        self.kernel = kernel
        self.stride = stride
        self.convs = nn.ModuleList()
        for size in sorted({kernel, 3}):
            self.convs.append(conv_bn(channels, channels, size, stride, channels))
        self.identity = None
        if stride == 1:
            self.identity = nn.BatchNorm2d(channels)

    def forward(self, x):
        out = sum(conv(x) for conv in self.convs)
        if self.identity is not None:
            out = out + self.identity(x)
        return out

    def folded(self):
        """A Conv2d equal to this module in eval mode."""
        branches = [(conv[0].weight, conv[1]) for conv in self.convs]
        if self.identity is not None:
            # The identity is a convolution too: one pixel of weight 1.
            branches.append((torch.ones(self.channels, 1, 1, 1), self.identity))
        weight = torch.zeros(self.channels, 1, self.kernel, self.kernel)
        bias = torch.zeros(self.channels)
        for kernel, norm in branches:
            # In eval mode batch norm is scale * x + shift, so the scale goes into the kernel.
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # (C,)
            margin = (self.kernel - kernel.shape[2]) // 2
            weight += F.pad(kernel * scale[:, None, None, None], [margin] * 4)
            bias += norm.bias - norm.running_mean * scale
        padding = self.kernel // 2
        conv = nn.Conv2d(
            self.channels, self.channels, self.kernel, self.stride, padding, groups=self.channels
        )
        conv.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        return conv


class TeachersClassifier(nn.Sequential):
    """A linear projector to the teacher's 512 features, then the teacher's own classifier.

    The classifier is copied and frozen. After Chen et al. 2022 (SimKD), whose projector is
    convolutional and stands before the pooling; this one folds into a single linear layer, which is
    what is deployed and counted.
    """

    def __init__(self, in_features, teacher):
        projector = nn.Linear(in_features, teacher.fc.in_features)
        classifier = copy.deepcopy(teacher.fc).requires_grad_(False)
        super().__init__(projector, classifier)

    def folded(self):
        """A Linear equal to this module."""
        projector, classifier = self
        weight = classifier.weight @ projector.weight
        bias = classifier(projector.bias)
        layer = nn.Linear(projector.in_features, classifier.out_features)
        layer.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        return layer


def deployed(net):
    """A copy of a net in eval mode with all folded that can be; the net itself if nothing can."""
    if not any(hasattr(module, "folded") for module in net.modules()):
        return net
    device = next(net.parameters()).device
    net = h.freeze(copy.deepcopy(net)).cpu()
    for module in list(net.modules()):
        for name, child in module.named_children():
            if hasattr(child, "folded"):
                setattr(module, name, child.folded())
    return net.to(device)


class Residual(nn.Module):
    """branch(x), plus shortcut(x) where there is one, else plus x where the shapes are the same."""

    def __init__(self, branch, same, shortcut=None):
        super().__init__()
        self.branch = branch
        self.same = same
        self.shortcut = shortcut

    def forward(self, x):
        if self.shortcut is not None:
            skipped = self.shortcut(x)
            return skipped + self.branch(x)
        if self.same:
            return x + self.branch(x)
        return self.branch(x)


def inverted_residual(in_channels, out_channels, stride, spec):
    """Expand 1x1, depthwise k x k, project 1x1 (Sandler et al. 2018).

    With a shortcut where shapes agree.
    """
    wide = in_channels * spec.expansion
    blurred = spec.blur and stride == 2
    layers = nn.Sequential()
    if spec.expansion > 1:
        layers.append(conv_bn(in_channels, wide, act=spec.act))
    if spec.rep:
        layers.append(RepDepthwise(wide, spec.kernel, stride))
        layers.append(ACTIVATIONS[spec.act]())
    else:
        own_stride = stride
        if blurred:  # the stride is BlurPool's
            own_stride = 1
        layers.append(conv_bn(wide, wide, spec.kernel, own_stride, wide, spec.act))
    if blurred:
        layers.append(BlurPool(wide))
    if spec.se:
        layers.append(SqueezeExcite(wide))
    layers.append(conv_bn(wide, out_channels))
    same = stride == 1 and in_channels == out_channels
    return Residual(layers, same)


def residual_dwpw(in_channels, out_channels, stride, spec):
    """dw-pw with a shortcut where shapes agree.

    It has half of an inverted residual's depth in activations, and none of them is wide.
    """
    branch = nn.Sequential(
        conv_bn(in_channels, in_channels, spec.kernel, stride, in_channels, spec.act),
        conv_bn(in_channels, out_channels),
    )
    same = stride == 1 and in_channels == out_channels
    return nn.Sequential(Residual(branch, same), ACTIVATIONS[spec.act]())


def convnext(in_channels, out_channels, stride, spec):
    """Depthwise k x k first, then expand and project (Liu et al. 2022).

    Batch norm stands in place of layer norm.
    """
    wide = out_channels * spec.expansion
    branch = nn.Sequential(
        conv_bn(in_channels, in_channels, spec.kernel, stride, in_channels),
        conv_bn(in_channels, wide, act=spec.act),
        conv_bn(wide, out_channels),
    )
    same = stride == 1 and in_channels == out_channels
    return Residual(branch, same)


BLOCKS = {"ir": inverted_residual, "resdw": residual_dwpw, "next": convnext}


def stacked(net, in_channels, layers, block):
    """Append layer1, layer2, ... to a net; returns the last one's channels.

    layers: (channels, blocks, stride of the first block) each.
    block(in_channels, out_channels, stride, is_first) builds one block.
    """
    for number, (out_channels, depth, stride) in enumerate(layers, 1):
        layer = nn.Sequential(block(in_channels, out_channels, stride, True))
        for _ in range(1, depth):
            layer.append(block(out_channels, out_channels, 1, False))
        net.add_module(f"layer{number}", layer)
        in_channels = out_channels
    return in_channels


@dataclass(frozen=True)
class Spec:
    """A net in a line: 3x3 stem, layers of (channels, blocks, stride of the first), classifier."""

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
        """The net: (B, 3, H, W) -> logits (B, 11), its layers named layer1, layer2, ...

        It needs neither argument.
        """

        def block(in_channels, out_channels, stride, is_first):
            return BLOCKS[self.block](in_channels, out_channels, stride, self)

        net = nn.Sequential()
        net.add_module("stem", conv_bn(3, self.stem, 3, 2, act=self.act))
        channels = stacked(net, self.stem, self.layers, block)
        if self.head:
            net.add_module("head", conv_bn(channels, self.head, act=self.act))
            channels = self.head
        net.add_module("pool", h.GlobalAvgPool())
        net.add_module("fc", nn.Linear(channels, h.NUM_CLASSES))
        return net


def separable(in_channels, out_channels, stride):
    """[depthwise 3x3 with ReLU, pointwise], each with batch norm."""
    return [
        conv_bn(in_channels, in_channels, 3, stride, in_channels, "relu"),
        conv_bn(in_channels, out_channels),
    ]


def separable_basic(in_channels, out_channels, stride, is_first):
    """ResNet-18's basic block of two separable convolutions.

    The first of a layer has a 1x1 shortcut.
    """
    branch = nn.Sequential(
        *separable(in_channels, out_channels, stride),
        nn.ReLU(),
        *separable(out_channels, out_channels, 1),
    )
    shortcut = None
    if is_first:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
        )
    return nn.Sequential(Residual(branch, True, shortcut), nn.ReLU())


def best_legal_net(cfg=None, teacher=None):
    """The best legal published net as far as its description goes: (B, 3, H, W) -> logits (B, 11).

    59,790 parameters, 17 M multiply-adds. A depthwise-separable 7x7 stride-2 stem and pool, then
    ResNet-18's basic blocks of two depthwise-separable convolutions, 1, 4, 1 and 1 of them at 16,
    32, 64 and 128 channels, a 1x1 shortcut in each layer's first block.
    """
    stem = nn.Sequential(
        nn.Conv2d(3, 3, 7, 2, 3, groups=3, bias=False),
        nn.Conv2d(3, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    )
    layers = ((16, 1, 1), (32, 4, 2), (64, 1, 2), (128, 1, 2))
    net = nn.Sequential()
    net.add_module("stem", stem)
    channels = stacked(net, 16, layers, separable_basic)
    net.add_module("pool", h.GlobalAvgPool())
    net.add_module("fc", nn.Linear(channels, h.NUM_CLASSES))
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
    """The published Boss student, 99,891 parameters.

    The teacher's own stem, copied and frozen, and four dwpw_convs.
    """
    net = h.build_student(cfg)
    stem = FrozenStem(*net.stem)
    stem[0].load_state_dict(teacher.conv1.state_dict())
    stem[1].load_state_dict(teacher.bn1.state_dict())
    net.stem = stem.requires_grad_(False)
    return net


class EnlargingTeacher(torchvision.models.ResNet):
    """The teacher, looking at pictures enlarged to `size` px: (B, 3, H, W) -> logits (B, 11).

    One trained at 224 px answers badly on small pictures. It runs in bf16. The size is a buffer, so
    that its checksum, the key of stored logits, tells it from the teacher.
    """

    def __init__(self, teacher, size):
        block = torchvision.models.resnet.BasicBlock
        super().__init__(block, [2, 2, 2, 2], h.NUM_CLASSES)
        self.load_state_dict(teacher.state_dict())
        self.register_buffer("size", torch.tensor(size))

    def forward(self, x):
        x = F.interpolate(x.float(), int(self.size), mode="bicubic", align_corners=False)
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().forward(x)


# --- candidate losses -----------------------------------------------------------------------------


def standardised_kd(student_logits, labels, teacher_logits, alpha, temperature):
    """loss_fn_kd whose soft loss sees logits of mean 0 and deviation 1 in each row.

    After Sun et al. 2024. Arguments and value are those of h.loss_fn_kd; the labels see the logits
    as they are.
    """
    # Layer norm without weights standardises each row: (B, 11) -> (B, 11).
    student = F.layer_norm(student_logits.float(), student_logits.shape[1:])
    teacher = F.layer_norm(teacher_logits.float(), teacher_logits.shape[1:])
    soft_loss = h.loss_fn_kd(student, labels, teacher, 1.0, temperature)  # alpha 1: T^2 KL alone
    hard_loss = F.cross_entropy(student_logits.float(), labels)
    return alpha * soft_loss + (1 - alpha) * hard_loss


def correlation_distance(a, b):
    """1 - the mean correlation of the rows of a and b, both (N, M): a scalar."""
    a = a - a.mean(1, keepdim=True)
    b = b - b.mean(1, keepdim=True)
    return 1 - F.cosine_similarity(a, b, dim=1).mean()


def dist_kd(student_logits, labels, teacher_logits, alpha, temperature):
    """DIST (Huang et al. 2022) in place of loss_fn_kd's KL, with the same arguments.

    1 - correlation between rows and between columns of the softened probabilities (B, 11), each
    weighed twice.
    """
    student = h.soft_labels(student_logits, temperature)
    teacher = h.soft_labels(teacher_logits, temperature)
    within_pictures = correlation_distance(student, teacher)
    within_classes = correlation_distance(student.T, teacher.T)
    soft_loss = temperature**2 * (2 * within_pictures + 2 * within_classes)
    hard_loss = F.cross_entropy(student_logits.float(), labels)
    return alpha * soft_loss + (1 - alpha) * hard_loss


class ProjectorLoss(h.DistillLoss):
    """DistillLoss plus the mean squared distance of the projected features to the teacher's."""

    def forward(self, images, labels, teacher_logits=None):
        with (
            h.feature_hooks(self.student, ["fc.0"]) as ours,
            h.feature_hooks(self.teacher, ["avgpool"]) as theirs,
        ):
            out = super().forward(images, labels, teacher_logits)
        projected = ours["fc.0"].float()  # (B, 512)
        wanted = theirs["avgpool"].flatten(1).float()  # (B, 512, 1, 1) -> (B, 512)
        distance = F.mse_loss(projected, wanted)
        return out._replace(loss=out.loss + distance)


class EarlyAlignment(h.DistillLoss):
    """DistillLoss whose layers are aligned in the first half of the training only.

    The config itself aligns nothing, so the teacher's logits may be stored: in the second half,
    where no feature map is asked for, they stand in for the teacher.
    """

    early_layers = h.STAGES["boss"].aligned_layers

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.adapters = h.build_adapters(self.cfg, self.student, self.teacher, self.early_layers)

    def set_progress(self, progress):
        super().set_progress(progress)
        self.layers = {}
        if progress <= 0.5:
            self.layers = self.early_layers


class ChangedViews(h.DistillLoss):
    """DistillLoss on batches that `change` alters before teacher and student see them.

    change(images, one-hot labels (B, 11), rng) -> the same two, with new values. The draws start
    from the seed and the epoch, so that a resumed run sees what an uninterrupted one would. The
    other arguments are those of DistillLoss.
    """

    def __init__(self, change, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.change = change

    def set_progress(self, progress):
        super().set_progress(progress)
        seed = int(h.fingerprint(self.cfg.seed, progress), 16)
        self.rng = np.random.default_rng(seed)

    def forward(self, images, labels, teacher_logits=None):
        one_hot = F.one_hot(labels, h.NUM_CLASSES).float()  # (B, 11)
        images, labels = self.change(images, one_hot, self.rng)
        return super().forward(images, labels, teacher_logits)


def mixed_views(cfg, student, teacher, loss_fn_kd):
    """A Recipe's loss: `mixed` changes the batches."""
    return ChangedViews(mixed, cfg, student, teacher, loss_fn_kd=loss_fn_kd)


def cut_views(cfg, student, teacher, loss_fn_kd):
    """A Recipe's loss: `cut_mixed` changes the batches."""
    return ChangedViews(cut_mixed, cfg, student, teacher, loss_fn_kd=loss_fn_kd)


def coloured_views(cfg, student, teacher, loss_fn_kd):
    """A Recipe's loss: `coloured` changes the batches."""
    return ChangedViews(coloured, cfg, student, teacher, loss_fn_kd=loss_fn_kd)


def erased_views(cfg, student, teacher, loss_fn_kd):
    """A Recipe's loss: `erased` changes the batches."""
    return ChangedViews(erased, cfg, student, teacher, loss_fn_kd=loss_fn_kd)


def mixed(images, labels, rng):
    """Mixup (Zhang et al. 2018): every picture laid over another one of the batch.

    Its weight is drawn from Beta(0.8, 0.8). images (B, 3, S, S), labels (B, 11) probabilities.
    """
    n = len(images)
    weight = torch.from_numpy(rng.beta(0.8, 0.8, (n, 1))).to(labels)  # (B, 1)
    other = torch.from_numpy(rng.permutation(n)).to(labels.device)
    image_weight = weight[..., None, None].to(images)  # (B, 1, 1, 1)
    images = image_weight * images + (1 - image_weight) * images[other]
    labels = weight * labels + (1 - weight) * labels[other]
    return images, labels


def cut_mixed(images, labels, rng):
    """CutMix (Yun et al. 2019): half of the pictures get a rectangle of another one of the batch.

    Its share of the area is uniform, its place too; what lies outside the picture is cut off.
    images (B, 3, S, S), labels (B, 11) probabilities.
    """
    n = len(images)
    side = images.shape[-1]
    share = rng.uniform(0, 1, (n, 1))
    share[rng.random(n) < 0.5] = 0.0
    x, y = torch.from_numpy(rng.uniform(0, side, (2, n, 1)))  # centres, (B, 1) each
    half_side = torch.from_numpy(side * np.sqrt(share) / 2)  # (B, 1)
    other = torch.from_numpy(rng.permutation(n)).to(images.device)
    pixels = torch.arange(side) + 0.5  # (S,)
    in_columns = (pixels - x).abs() < half_side  # (B, S)
    in_rows = (pixels - y).abs() < half_side  # (B, S)
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]  # (B, 1, S, S)
    covered = inside.double().mean((1, 2, 3)).to(labels)[:, None]  # (B, 1)
    images = torch.where(inside.to(images.device), images[other], images)
    labels = (1 - covered) * labels + covered * labels[other]
    return images, labels


def coloured(images, labels, rng):
    """Contrast and saturation times 0.6 to 1.4, brightness +- 0.4 deviations.

    Each is drawn for each picture. images (B, 3, S, S).
    """
    changes = rng.uniform(-0.4, 0.4, (3, len(images), 1, 1, 1))
    contrast, saturation, shift = torch.from_numpy(changes).to(images)  # (B, 1, 1, 1) each
    grey = images.mean(1, keepdim=True)  # (B, 1, S, S)
    saturated = grey + (1 + saturation) * (images - grey)
    return saturated * (1 + contrast) + shift, labels


def erased(images, labels, rng):
    """Random erasing (Zhong et al. 2017): half of the pictures lose a square.

    Of a fifth to a half of their side. images (B, 3, S, S).
    """
    n = len(images)
    side = images.shape[-1]
    x, y = torch.from_numpy(rng.uniform(0, side, (2, n, 1)))  # centres, (B, 1) each
    half_side = side * rng.uniform(0.1, 0.25, (n, 1))
    chosen = rng.random((n, 1)) < 0.5
    half_side = torch.from_numpy(np.where(chosen, half_side, 0.0))  # (B, 1)
    pixels = torch.arange(side) + 0.5  # (S,)
    in_columns = (pixels - x).abs() < half_side  # (B, S)
    in_rows = (pixels - y).abs() < half_side  # (B, S)
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]  # (B, 1, S, S)
    return images.masked_fill(inside.to(images.device), 0.0), labels


# --- recipes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A Config, and what differs from the stages: the net, loss_fn_kd, the whole loss."""

    cfg: h.Config
    build: object = own_net  # (cfg, teacher) -> net
    kd: object = h.loss_fn_kd  # in place of loss_fn_kd, with its arguments
    loss: object = h.DistillLoss  # (cfg, student, teacher, loss_fn_kd=kd) -> a DistillLoss
    replay: bool = (
        True  # the teacher's logits of every epoch may be stored, for all recipes at once
    )

    def net(self, cfg, teacher):
        """The student with weights drawn from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            return self.build(cfg, teacher)


# Patient and consistent teaching in a short form: the teacher's answers alone, on the student's own
# view.
TEACH = h.get_config(
    "simple",
    loss_fn_type="KD",
    alpha=1.0,
    temperature=4.0,
    crop_scale=(0.35, 1.0),
    optimizer="adamw",
    weight_decay=0.02,
    lr=4e-3,
    lr_schedule="cosine",
    warmup_epochs=1.0,
    batch_size=64,
    grad_norm_max=10.0,
)
# Boss in its legal plain form, and as it was published.
DWPW_BOSS = h.get_config(
    "boss",
    **DWPW,
    temperature=20.0,
    optimizer="adam",
    lr=1e-3,
    lr_schedule="constant",
    warmup_epochs=0.0,
    weight_decay=1e-5,
    batch_size=128,
)
PUBLISHED_BOSS = replace(
    DWPW_BOSS,
    stem_width=64,
    widths=(64, 128, 256, 140),
    depths=(1, 1, 1, 1),
    strides=(1, 2, 2, 2),
)
# The last stage, but that a call says how many views are stored. Its rows are called handover_bare;
# beyond is what the stage was until 2026-11-26.
HANDOVER = replace(h.STAGES["beyond"], teacher_views=0)
BEYOND = replace(HANDOVER, loss_schedule="constant")
ALIGNED_HANDOVER = replace(HANDOVER, align_weights=h.STAGES["boss"].align_weights)
LAYERS = ((24, 2, 2), (32, 3, 2), (48, 2, 1))  # the stages' own
FULL = ((24, 2, 2), (36, 3, 2), (50, 2, 1))  # 59,731 parameters
NARROW = ((24, 2, 2), (32, 3, 2), (40, 2, 1))  # what a kernel of 5 leaves room for
SHALLOW = ((24, 2, 2), (32, 2, 2), (40, 2, 1))  # what squeeze-and-excitation leaves room for
BASE = Spec(NARROW, kernel=5, act="hswish")


def arch(layers=LAYERS, **settings):
    """A recipe that differs from TEACH in its net alone."""
    return Recipe(TEACH, Spec(layers, **settings).build)


def taught(**settings):
    """A recipe of TEACH with other settings on one net."""
    return Recipe(replace(TEACH, **settings), BASE.build)


def beyond(**settings):
    """The last stage as it was, with other settings."""
    return Recipe(replace(BEYOND, **settings))


RECIPES = {
    # the marks
    "sample_ce": Recipe(h.get_config("simple", lr=1e-3)),
    "sample_kd": Recipe(h.get_config("medium", lr=1e-3)),
    "published_boss": Recipe(PUBLISHED_BOSS, published_boss_net, replay=False),
    "legal_dwpw": Recipe(DWPW_BOSS, replay=False),
    "best_legal": Recipe(TEACH, best_legal_net),
    # the stages
    "strong": Recipe(h.STAGES["strong"]),
    "boss": Recipe(h.STAGES["boss"], replay=False),
    "handover_bare": Recipe(HANDOVER),
    # nets under one recipe
    "a_dwpw": Recipe(replace(TEACH, student="dwpw")),
    "a_ir_strided": arch(((24, 2, 2), (32, 3, 2), (48, 2, 2))),
    "a_ir_late1": arch(),
    "a_resdw": arch(((32, 2, 2), (64, 4, 2), (96, 3, 1)), block="resdw", stem=24),
    "a_ir_e2": arch(((24, 3, 2), (40, 4, 2), (56, 2, 1)), expansion=2),
    "a_ir_e4": arch(((16, 2, 2), (32, 3, 2), (40, 2, 1)), expansion=4),
    "a_ir_k5": arch(NARROW, kernel=5),
    "a_ir_se": arch(SHALLOW, se=True),
    "a_ir_hswish": arch(act="hswish"),
    "a_ir_blur": arch(blur=True),
    "a_ir_head": arch(((24, 2, 2), (32, 2, 2), (48, 2, 1)), head=192),
    "a_next_k5": arch(((24, 2, 2), (40, 3, 2), (48, 3, 1)), block="next", kernel=5, expansion=2),
    "b_k7": arch(((20, 2, 2), (28, 3, 2), (36, 2, 1)), kernel=7),
    "b_k5_deep": arch(((16, 2, 2), (24, 4, 2), (32, 4, 1)), kernel=5, stem=12),
    "b_k5_hswish": taught(),
    "b_late2": arch(((24, 2, 2), (32, 3, 1), (40, 2, 1)), kernel=5, act="hswish"),
    "b_se": arch(SHALLOW, kernel=5, act="hswish", se=True),
    # recipes on one net
    "r_t2": taught(temperature=2.0),
    "r_lr8": taught(lr=8e-3),
    # the last stage with one thing changed
    "handover_early": Recipe(HANDOVER, loss=EarlyAlignment),
    "handover_bare_dist": Recipe(HANDOVER, kd=dist_kd),
    "beyond_handover": Recipe(ALIGNED_HANDOVER, replay=False),
    "handover_mix": Recipe(HANDOVER, loss=mixed_views, replay=False),
    "handover_cut": Recipe(HANDOVER, loss=cut_views, replay=False),
    "handover_full": Recipe(HANDOVER, Spec(FULL, act="hswish").build),
    # the last stage as it was, and that with one thing changed (for another loss also its
    # temperature; the branches belong to beyond_k5)
    "beyond": Recipe(BEYOND),
    "beyond_pure": beyond(alpha=1.0),
    "beyond_labels": beyond(alpha=0.1),
    "beyond_t2": beyond(temperature=2.0),
    "beyond_t8": beyond(temperature=8.0),
    "beyond_early": Recipe(BEYOND, loss=EarlyAlignment),
    "beyond_cut": Recipe(BEYOND, loss=cut_views, replay=False),
    "beyond_full": Recipe(BEYOND, Spec(FULL, act="hswish").build),
    "beyond_dist_t4": Recipe(BEYOND, kd=dist_kd),
    "beyond_blur": Recipe(BEYOND, Spec(LAYERS, act="hswish", blur=True).build),
    "beyond_k5": Recipe(BEYOND, BASE.build),
    "beyond_rep": Recipe(BEYOND, replace(BASE, rep=True).build),
    "beyond_sgd": beyond(optimizer="sgd", lr=0.2, weight_decay=1e-4),
    "beyond_std": Recipe(replace(BEYOND, temperature=2.0), kd=standardised_kd),
    "beyond_dist": Recipe(replace(BEYOND, temperature=1.0), kd=dist_kd),
    "beyond_projector": Recipe(BEYOND, projected_net, loss=ProjectorLoss, replay=False),
    "beyond_colour": Recipe(BEYOND, loss=coloured_views, replay=False),
    "beyond_erase": Recipe(BEYOND, loss=erased_views, replay=False),
    "beyond_mix": Recipe(BEYOND, loss=mixed_views, replay=False),
}


# --- budgets, files and rows ----------------------------------------------------------------------


def budget(args):
    """What the recipes of one comparison have in common, as the columns of their rows."""
    return {
        "epochs": args.epochs,
        "size": args.size,
        "teacher_size": args.teacher_size,
        "views": args.views,
        "scored": args.scored,
        "amp": args.amp,
    }


def budget_name(args):
    """The budget in a file's name."""
    values = budget(args)
    # The first rows' files had their names before these columns came.
    for column, value in {"scored": "best", "amp": "off"}.items():
        if values[column] == value:
            del values[column]
    return "-".join(map(str, values.values()))


def of_budget(rows, args):
    """The rows of this call's budget."""
    for column, value in budget(args).items():
        rows = rows[rows[column] == value]
    return rows


def work_folder(name, args, seed):
    """Where a training keeps its files."""
    return args.work / f"{name}-{budget_name(args)}-{seed}"


def stored_rows(args):
    """The rows of recipes.csv so far, or an empty frame."""
    path = args.results / "recipes.csv"
    if path.is_file():
        return pd.read_csv(path)
    return pd.DataFrame(columns=["recipe", *budget(args), "seed"])


def is_stored(name, args, seed):
    """Whether a recipe has its row already."""
    rows = of_budget(stored_rows(args), args)
    return ((rows.recipe == name) & (rows.seed == seed)).any()


def store(row, args):
    """Append a row to recipes.csv."""
    args.results.mkdir(parents=True, exist_ok=True)
    rows = pd.concat([stored_rows(args), pd.DataFrame([row])])
    with h.written_whole(args.results / "recipes.csv") as temporary:
        rows.to_csv(temporary, index=False, float_format="%.5g")


# --- the ring -------------------------------------------------------------------------------------


def recipe_config(name, args, seed):
    """A recipe's Config under this call's budget."""
    recipe = RECIPES[name]
    views = 0
    if recipe.replay and recipe.cfg.needs_teacher:
        views = args.views or args.epochs
    return replace(
        recipe.cfg,
        exp_name=name,
        image_size=args.size,
        n_epochs=args.epochs,
        seed=seed,
        patience=args.epochs,
        teacher_views=views,
        amp=args.amp,
    )


def train(name, args, seed, data, teacher, device):
    """Train a recipe: (its row, its student's logits (N, 11) on the validation images).

    The logits go to the work folder too.
    """
    recipe = RECIPES[name]
    cfg = recipe_config(name, args, seed)
    net = recipe.net(cfg, teacher)
    path = work_folder(name, args, seed)
    is_whole_run = not path.exists()

    start = time.process_time()
    train_loader, valid_loader = h.build_loaders(cfg, data, device)
    loss_fn = recipe.loss(cfg, net, teacher, loss_fn_kd=recipe.kd)
    loss_fn.on(device)
    folder = h.RunFolder(path, loss_fn, data)
    looked_at = None  # without validation `fit` keeps the last epoch's student
    if args.scored == "best":
        looked_at = valid_loader
    history = h.fit(loss_fn, train_loader, looked_at, folder)
    small = deployed(net)
    logits, labels = h.predict_logits(net, valid_loader)
    check_deployed(name, net, small, valid_loader, logits)
    cpu_seconds = None
    if is_whole_run:
        cpu_seconds = time.process_time() - start

    six = six_view_probabilities(net, cfg, data, valid_loader)
    torch.save({"logits": logits, "labels": labels, "six_views": six}, path / "valid.pt")
    row = {"recipe": name, **budget(args), "seed": seed}
    row |= scores(logits, labels, six)
    row["last_accuracy"] = row["accuracy"]
    if args.scored == "best":
        row["last_accuracy"] = history[-1]["valid_acc"]
    row |= costs(small, history, cpu_seconds)
    return row, logits


def check_deployed(name, net, small, valid_loader, logits):
    """End the program where a folded net does not answer as the trained one does, (N, 11)."""
    if small is net:
        return
    small_logits, _ = h.predict_logits(small, valid_loader)
    if not torch.allclose(small_logits, logits, atol=1e-3, rtol=1e-3):
        sys.exit(f"{name}: the folded net answers differently")


def six_view_probabilities(net, cfg, data, valid_loader):
    """Mean class probabilities (N, 11) over test-time variants of the validation images."""
    split = h.load_data(data, "validation", "whole", cfg.image_size)
    batch_size = valid_loader.batch_size
    whole_loader = h.BatchLoader(split, cfg, valid_loader.device, batch_size=batch_size)
    return h.tta_probabilities(net, valid_loader, whole_loader)


def accuracy_of(answers, labels):
    """The accuracy of logits or probabilities (N, 11)."""
    return fraction_equal(answers.argmax(1), labels)


def fraction_equal(classes, others):
    """The fraction of pictures on which two lists of classes (N,) agree."""
    return (classes == others).double().mean().item()


def scores(logits, labels, six):
    """The columns of a row that say how good a student is."""
    accuracy = accuracy_of(logits, labels)
    return {
        "accuracy": accuracy,
        "s.e.": h.standard_error(accuracy, len(labels)),
        "six_views": accuracy_of(six, labels),
    }


def costs(small, history, cpu_seconds):
    """The columns of a row that say what a student costs; `small` is what would be deployed."""
    return {
        "parameters": count_parameters(small),
        "macs_224": h.count_macs(small, 224),
        "seconds": sum(row["seconds"] for row in history),
        "cpu_seconds": cpu_seconds,
    }


def count_parameters(net):
    """All parameters of a net, trained or frozen."""
    return sum(p.numel() for p in net.parameters())


def train_all(names, args, data, teacher, device):
    """Train the recipes that have no row yet, seed by seed, and store each row as it ends."""
    teacher_classes = score_teacher(args, data, teacher, device)
    for seed in args.seeds:
        for name in names:
            if is_stored(name, args, seed):
                print(f"{name}, seed {seed}: its row is stored already", flush=True)
                continue
            row, logits = train(name, args, seed, data, teacher, device)
            row["agreement"] = fraction_equal(logits.argmax(1), teacher_classes)
            row["device"] = device.type
            row["date"] = time.strftime("%Y-%m-%d")
            store(row, args)
            print(pd.DataFrame([row]).round(4).to_string(index=False), flush=True)


def score_teacher(args, data, teacher, device):
    """Print the teacher's validation accuracy, with --six-views also theirs; its classes (N,)."""
    cfg = h.Config(image_size=args.size)
    split = h.load_data(data, "validation", "eval", args.size)
    loader = h.BatchLoader(split, cfg, device)
    logits, labels = h.predict_logits(teacher, loader)
    accuracy = h.plus_minus(accuracy_of(logits, labels), len(labels))
    print(f"the teacher at {args.teacher_size} px: {accuracy}", flush=True)
    if args.six_views:
        six = six_view_probabilities(teacher, cfg, data, loader)
        accuracy = h.plus_minus(accuracy_of(six, labels), len(labels))
        print(f"the same, six views: {accuracy}", flush=True)
    return logits.argmax(1)


def choosing_data(data):
    """The FoodData on which recipes are chosen: its training images, in two fixed halves.

    One is trained on, the other stands where the validation split was. An image's half is that of
    its id, whatever else is in the folder; the validation split itself is not in it.
    """
    halves = {}
    is_held_out = [int(h.fingerprint(image_id), 16) % 2 for image_id in data.ids["training"]]
    for name in ("files", "labels", "ids"):
        splits = getattr(data, name)
        training = []
        held_out = []
        for value, held in zip(splits["training"], is_held_out, strict=True):
            half = held_out if held else training
            half.append(value)
        halves[name] = splits | {"training": training, "validation": held_out}
    return replace(data, **halves)


def load_ring_teacher(args, data, device):
    """The data folder's teacher, enlarging what it sees where --teacher-size says so."""
    teacher = h.load_teacher(data.teacher_path, device)
    if args.teacher_size == args.size:
        return teacher
    larger = h.freeze(EnlargingTeacher(teacher, args.teacher_size))
    return h.to_device(larger, device)


def predict_all(names, args, data, teacher, device):
    """CSVs of the evaluation images for trained recipes and the teacher, named by csv_name.

    With --six-views they are predicted from test-time variants of each picture, and say so.
    """
    nets = {"teacher": teacher}
    for name in names:
        recipe = RECIPES[name]
        for seed in args.seeds:
            net = recipe.net(recipe.cfg, teacher)
            path = work_folder(name, args, seed) / "student_best.ckpt"
            net.load_state_dict(h.load_file(path))
            nets[csv_name(name, args, seed)] = h.freeze(net)
    cfg = h.Config(image_size=args.size)
    split = h.load_data(data, "evaluation", "eval", args.size)
    whole = None
    suffix = ""
    if args.six_views:
        whole = h.load_data(data, "evaluation", "whole", args.size)
        suffix = "_six"
    for name, net in nets.items():
        classes = h.predict(net, split, cfg, device, whole)
        h.write_submission(args.predict / f"{name}{suffix}.csv", split.ids, classes)


def csv_name(name, args, seed):
    """What a student's evaluation CSV is called: recipe, epochs if not 30, seed if not 1, half."""
    if args.epochs != 30:
        name = f"{name}_{args.epochs}"
    if seed != 1:
        name = f"{name}_seed{seed}"
    if args.scored == "half":
        name = f"{name}_half"
    return name


# --- the table ------------------------------------------------------------------------------------


def correct(name, args, seed):
    """(N,) 0 or 1 for each validation image of a trained recipe; None where its files are gone."""
    path = work_folder(name, args, seed) / "valid.pt"
    if not path.is_file():
        return None
    stored = torch.load(path, weights_only=True)
    return (stored["logits"].argmax(1) == stored["labels"]).double()


def paired_difference(name, args, seeds):
    """(mean difference in accuracy to --against, its standard error), image by image.

    None where a training's files are not there, or where no seed is common to both.
    """
    differences = []
    for seed in seeds:
        ours = correct(name, args, seed)
        theirs = correct(args.against, args, seed)
        if ours is None or theirs is None:
            return None
        differences.append(ours - theirs)
    if not differences:
        return None
    # Over seeds first, (N,): seeds answer the same images, so they are not as many more images.
    difference = torch.stack(differences).mean(0)
    standard_error = difference.std() / len(difference) ** 0.5
    return difference.mean().item(), standard_error.item()


def compare(args):
    """A DataFrame: the mean of a budget's rows over seeds, and the difference to --against."""
    rows = of_budget(stored_rows(args), args)
    frame = rows.groupby("recipe").agg(
        seeds=("seed", "count"),
        accuracy=("accuracy", "mean"),
        agreement=("agreement", "mean"),
        se=("s.e.", "mean"),
        parameters=("parameters", "first"),
        macs_224=("macs_224", "first"),
        cpu_seconds=("cpu_seconds", "mean"),
    )
    seeds_of = {name: set(group.seed) for name, group in rows.groupby("recipe")}
    for name in frame.index:
        common_seeds = seeds_of[name] & seeds_of.get(args.against, set())
        pair = paired_difference(name, args, sorted(common_seeds))
        if pair is None:
            continue
        difference, standard_error = pair
        frame.loc[name, "difference"] = difference
        frame.loc[name, "its s.e."] = standard_error
    return frame.sort_values("accuracy", ascending=False)


SCORED_ON = {
    "half": "training images that were held out",
    "once": "the validation images, once",
    "best": "the validation images, best epoch",
}


def draw(frame, args):
    """A figure of accuracy against parameters, multiply-adds and processor time."""
    figure = plt.figure(figsize=(13, 4.5), dpi=80, layout="constrained")
    figure.suptitle(
        f"the photo set (not Food-11), {args.size} px, {args.epochs} epochs: "
        f"accuracy +- s.e. on {SCORED_ON[args.scored]}"
    )
    axes = figure.subplots(1, 3, sharey=True)
    labels = {
        "parameters": "parameters (dashed: the limit)",
        "macs_224": "multiply-adds at 224 px",
        "cpu_seconds": "processor seconds",
    }
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        draw_recipes(ax, frame, column)
        ax.set(xlabel=label)
    axes[0].axvline(h.PARAM_LIMIT, color="#D55E00", ls="--", lw=1)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8)
    return figure


def draw_recipes(ax, frame, column):
    """Every recipe as a mark of its own: accuracy +- s.e. over a column of the frame."""
    for number, (name, row) in enumerate(frame.iterrows()):
        ax.errorbar(
            row[column],
            row.accuracy,
            row.se,
            color=plt.cm.tab10(number % 10),
            marker="osD^vP*X"[number % 8],
            ecolor="#BBBBBB",
            label=f"{row.accuracy:.3f} {name}",
        )


def table(args):
    """Print the stored rows of one budget and draw them."""
    frame = compare(args)
    if frame.empty:
        sys.exit(f"no row of this budget is in {args.results}: {budget(args)}")
    print(frame.round(4).to_string())
    figure = draw(frame, args)
    figure.savefig(args.results / f"recipes-{budget_name(args)}.png")


# --- the command line -----------------------------------------------------------------------------


def list_recipes():
    """Print every recipe's name and the size of its net."""
    teacher = h.build_student(h.TEACHER_CONFIG)
    for name, recipe in RECIPES.items():
        net = deployed(recipe.net(recipe.cfg, teacher))
        macs = h.count_macs(net, 224) / 1e6
        print(
            f"{name:<16} {count_parameters(net):>7,} parameters, "
            f"{macs:>6.1f} M multiply-adds at 224 px"
        )


def matching_names(patterns, parser):
    """The recipes that the command line's regular expressions name."""
    names = []
    for pattern in patterns:
        matching = [name for name in RECIPES if re.fullmatch(pattern, name)]
        if not matching:
            parser.error(f"no recipe is called {pattern}; --list shows the names")
        names += matching
    return names


def build_parser():
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME")
    add("--results", type=Path, default=RESULTS)
    add("--data", default=os.environ.get("HW13_PHOTOS"))
    add("--epochs", type=int, default=30)
    add("--size", type=int, default=112)
    add("--teacher-size", type=int, default=176, help="what the teacher sees the views enlarged to")
    add("--seeds", type=int, nargs="+", default=[1])
    add("--views", type=int, default=0, help="replay so many teacher views (0: one for each epoch)")
    add("--scored", choices=("half", "once", "best"), default="half", help="see above")
    add("--amp", default="off", help="off (float32, the rows' of before), bf16, fp16 or auto")
    add("--work", type=Path, default=h.cache_root() / "recipes")
    add("--list", action="store_true")
    add("--table", action="store_true")
    add("--against", default="published_boss")
    add("--predict", type=Path)
    add(
        "--six-views",
        action="store_true",
        help="the teacher's score, or with --predict the CSVs, from test-time variants too",
    )
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    names = matching_names(args.names, parser)
    if args.table:
        table(args)
        return
    if args.list or not names:
        list_recipes()
        return
    if not args.data:
        parser.error("name a data folder with --data DIR or HW13_PHOTOS")
    device = h.pick_device()
    data = h.find_data(args.data)
    if args.scored == "half":
        data = choosing_data(data)
    teacher = load_ring_teacher(args, data, device)
    if args.predict:
        predict_all(names, args, data, teacher, device)
    else:
        train_all(names, args, data, teacher, device)


if __name__ == "__main__":
    main()
