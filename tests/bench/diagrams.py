"""Draw the notebook's diagrams of ideas as PNG files.

    python tests/bench/diagrams.py FOLDER

FOLDER gets a file per diagram and alt.json, one sentence of alternative text per file. A diagram is
drawn for 400 pixels: its letters are 12 pixels high there, and the file has twice as many pixels.
The figure of the photographs shows the first table of RESULTS.md.
"""

import json
import sys
from pathlib import Path

import common  # noqa: F401, it knows where helpers.py is
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import helpers as h

# Okabe and Ito's palette, which colour-blind readers and grey print keep apart.
ORANGE = "#E69F00"  # a loss, and Simple
BLUE = "#56B4E9"  # the student, and Medium
GREEN = "#009E73"  # Strong
PINK = "#CC79A7"  # Boss
RED = "#D55E00"  # Beyond
BLACK = "#000000"  # the teacher, in a dashed frame, for it is frozen
GREY = "#555555"  # all else

ALT = {
    "distillation.png": (
        "One view goes to the frozen teacher and to the student; KL compares their answers divided "
        "by T, and cross-entropy compares the student's plain answer with the label."
    ),
    "convolutions.png": (
        "In a full 3x3 convolution every output channel sees every input channel through nine "
        "weights; depthwise filters each channel alone, and pointwise mixes them with one weight."
    ),
    "inverted_residual.png": (
        "A 1x1 convolution widens 32 channels to 96, a 3x3 depthwise one filters each of them, "
        "another 1x1 narrows them to 32 again, and a shortcut adds the input."
    ),
    "alignment.png": (
        "In layers 1 to 3 a 1x1 adapter widens the student's map, and smooth L1 compares it with "
        "the teacher's map, with the weights 3, 2 and 1."
    ),
    "stages.png": (
        "Simple has labels alone (10 epochs), Medium adds the teacher (700), Strong a better net "
        "(300), Boss aligned layers and a schedule (600); Beyond has smaller crops, no alignment."
    ),
    "views.png": (
        "Each epoch cuts another part out of one picture and may mirror it; teacher and student "
        "get this same view."
    ),
    "stored_answers.png": (
        "In epochs 1 to 50 the teacher answers each view and its answers are stored; from epoch 51 "
        "on the same views come again, and the loss reads the stored answers instead."
    ),
    "photographs.png": (
        "Accuracy on evaluation photographs, from bottom to top: the course's net 0.557, the "
        "published Boss 0.659, Boss 0.700, Beyond after 100 epochs 0.750 and under six views "
        "0.774, the teacher at 224 px 0.772."
    ),
}


# --- drawing --------------------------------------------------------------------------------------


def diagram(title, height, boxes, arrows, texts=()):
    """(Figure, Axes) of boxes, arrows and texts, 10 units wide and `height` units high.

    boxes: (x, y, text, color, width), and a height if it is not 1.2; arrows: (x, y, to x, to y),
    and a bend if there is one; texts: (x, y, text), which begin at x. Two units are an inch.
    """
    figure = plt.figure(figsize=(5, height / 2 + 0.3), dpi=80, layout="constrained")
    figure.suptitle(title, fontsize=12)
    ax = figure.subplots()
    for box in boxes:
        draw_box(ax, *box)
    for arrow in arrows:
        draw_arrow(ax, *arrow)
    for x, y, text in texts:
        ax.text(x, y, text, va="center", fontsize=11)
    ax.set(xlim=(0, 10), ylim=(0, height))
    ax.axis("off")
    return figure, ax


def draw_box(ax, x, y, text, color, width, height=1.2):
    """A box around a text, its centre at (x, y); the teacher's frame is dashed."""
    corner = (x - width / 2, y - height / 2)
    line = "--" if color == BLACK else "-"
    # A thin tint of the frame's colour inside, on which black letters can be read.
    ax.add_patch(plt.Rectangle(corner, width, height, fc=(color, 0.15), ec=color, ls=line, lw=2))
    ax.text(x, y, text, ha="center", va="center", fontsize=11)


def draw_arrow(ax, x, y, to_x, to_y, bend=0.0):
    """An arrow; bend: how far it swings out, as a part of its length."""
    style = {"arrowstyle": "-|>", "lw": 1.5, "color": GREY, "shrinkA": 0, "shrinkB": 0}
    style["connectionstyle"] = f"arc3,rad={bend}"
    ax.annotate("", xy=(to_x, to_y), xytext=(x, y), arrowprops=style)


# --- the diagrams ---------------------------------------------------------------------------------


DISTILLATION_BOXES = (
    (0.9, 3.6, "one view", GREY, 1.7),
    (3.5, 5.2, "teacher\n(frozen)", BLACK, 1.9),
    (3.5, 3.0, "student", BLUE, 1.9),
    (6.2, 5.2, "softmax\nof z / T", GREY, 1.9),
    (6.2, 3.0, "softmax\nof z / T", BLUE, 1.9),
    (3.5, 0.7, "label", GREY, 1.9),
    (8.9, 4.1, "α T² KL", ORANGE, 1.9),
    (8.9, 0.7, "(1 – α) CE", ORANGE, 1.9),
)
DISTILLATION_ARROWS = (
    (1.75, 4.0, 2.55, 5.0),
    (1.75, 3.4, 2.55, 3.0),
    (4.45, 5.2, 5.25, 5.2),
    (4.45, 3.0, 5.25, 3.0),
    (7.15, 5.2, 7.95, 4.4),
    (7.15, 3.0, 7.95, 3.8),
    # Cross-entropy takes the student's logits as they are, T = 1.
    (4.45, 2.6, 7.95, 1.1),
    (4.45, 0.7, 7.95, 0.7),
)


def distillation():
    """Knowledge distillation: one view, both nets, their softened answers and the two losses."""
    return diagram("knowledge distillation", 6, DISTILLATION_BOXES, DISTILLATION_ARROWS)[0]


def convolutions():
    """What sees what in a full 3x3 convolution and in depthwise + pointwise, and their weights."""
    figure = plt.figure(figsize=(5, 3), dpi=80, layout="constrained")
    figure.suptitle("128 channels to 256", fontsize=12)
    left, right = figure.subplots(1, 2)
    left.set_title("full 3x3:\n294,912 weights", fontsize=11)
    right.set_title("3x3, then 1x1:\n33,920 weights", fontsize=11)
    for channel in range(4):
        right.plot((0, 1), (channel, channel), color=GREY, lw=3.0, zorder=0)
        for other in range(4):
            # Thick: 3x3 = 9 weights per line. Thin: one.
            left.plot((0, 1), (channel, other), color=GREY, lw=3.0, zorder=0)
            right.plot((1, 2), (channel, other), color=GREY, lw=0.8, zorder=0)
        left.plot((0, 1), (channel, channel), "s", color=ORANGE, markersize=15)
        right.plot((0, 1, 2), (channel,) * 3, "s", color=GREEN, markersize=15)
    for ax in (left, right):
        ax.margins(0.15)
        ax.axis("off")
    return figure


RESIDUAL_BOXES = (
    (0.8, 3.2, "32", GREEN, 0.9, 1),
    (3.6, 3.2, "96", GREEN, 0.9, 3),
    (6.4, 3.2, "96", GREEN, 0.9, 3),
    (9.2, 3.2, "32", GREEN, 0.9, 1),
)
RESIDUAL_ARROWS = (
    (1.25, 3.2, 3.15, 3.2),
    (4.05, 3.2, 5.95, 3.2),
    (6.85, 3.2, 8.75, 3.2),
    (0.8, 3.7, 9.2, 3.7, -0.36),
)
RESIDUAL_TEXTS = (
    (1.6, 0.9, "expand\n1x1\n3,264"),
    (4.1, 0.9, "depthwise\n3x3\n1,056"),
    (7.1, 0.9, "project\n1x1\n3,136"),
    (3.7, 6.0, "shortcut: + input"),
)


def inverted_residual():
    """The channels of an inverted residual from input to output, and where its weights are."""
    return diagram("an inverted residual", 6.4, RESIDUAL_BOXES, RESIDUAL_ARROWS, RESIDUAL_TEXTS)[0]


def alignment():
    """How Boss compares layers: the student's map, its adapter and the teacher's map, by layer."""
    boxes = []
    arrows = []
    for row, (layer, weight) in enumerate(h.BOSS.aligned_layers.items()):
        y = 5.1 - 2 * row
        boxes.append((0.9, y, layer, BLUE, 1.6))
        boxes.append((3.7, y, "pool,\n1x1 adapter", PINK, 2.5))
        boxes.append((6.6, y, f"{weight:g} x\nsmooth L1", ORANGE, 2.1))
        boxes.append((9.1, y, layer, BLACK, 1.6))
        arrows += [(1.7, y, 2.45, y), (4.95, y, 5.55, y), (8.3, y, 7.65, y)]
        if row > 0:  # each net computes this layer from the one above
            arrows += [(0.9, y + 1.4, 0.9, y + 0.6), (9.1, y + 1.4, 9.1, y + 0.6)]
    texts = ((0.1, 6.3, "student"), (8.3, 6.3, "teacher"))
    return diagram("alignment", 6.8, boxes, arrows, texts)[0]


STAGES = (
    ("simple", ORANGE, "the course's net,\nlabels alone"),
    ("medium", BLUE, "+ the teacher's answers,\n   softened by T = 20"),
    ("strong", GREEN, "+ a better net and optimiser,\n   turned crops, T = 4"),
    ("boss", PINK, "+ aligned layers; the teacher\n   first, the labels last"),
    ("beyond", RED, "no aligned layers, so answers can be\nstored; upright, smaller crops"),
)


def stages():
    """A map of the five stages: what is new in each, and how many epochs it takes."""
    boxes = []
    arrows = []
    texts = []
    for row, (name, color, text) in enumerate(STAGES):
        y = 8.6 - 1.95 * row
        label = f"{name.title()}\n{h.STAGES[name].n_epochs} epochs"
        boxes.append((1.5, y, label, color, 2.8, 1.35))
        texts.append((3.2, y, text))
        if row > 0:
            arrows.append((1.5, y + 1.28, 1.5, y + 0.68))
    return diagram("the five stages, and what is new in each", 9.4, boxes, arrows, texts)[0]


# x, y and side of each view in the picture, from the top left, as parts of the whole
VIEWS_CUTS = ((0.02, 0.05, 0.85, RED), (0.35, 0.3, 0.62, GREEN), (0.15, 0.42, 0.55, BLUE))
VIEWS_BOXES = ((8.8, 4.5, "teacher", BLACK, 2.0), (8.8, 2.5, "student", BLUE, 2.0))
VIEWS_ARROWS = ((6.3, 3.6, 7.75, 4.4), (6.3, 3.3, 7.75, 2.6))
VIEWS_TEXTS = (
    (0.6, 1.5, "one picture,\nepochs 1, 2, 3"),
    (4.0, 5.75, "1"),
    (4.0, 3.45, "2"),
    (4.0, 1.15, "3"),
    (7.6, 1.1, "both see the\nsame view"),
)


def views():
    """One picture, a view of it per epoch, and who sees this view."""
    title = "a view: a part of the picture, another in each epoch"
    figure, ax = diagram(title, 7.2, VIEWS_BOXES, VIEWS_ARROWS, VIEWS_TEXTS)
    picture = h.draw_dish(9, np.random.default_rng(3)).resize((240, 240))
    ax.imshow(picture, extent=(0.1, 3.3, 2.2, 5.4), aspect="auto")
    for row, (x, y, side, color) in enumerate(VIEWS_CUTS):
        corner = (0.1 + 3.2 * x, 2.2 + 3.2 * (1 - y - side))
        frame = {"fill": False, "ec": color, "lw": 2.5}
        ax.add_patch(plt.Rectangle(corner, 3.2 * side, 3.2 * side, **frame))
        view = picture.crop([240 * value for value in (x, y, x + side, y + side)])
        if row == 1:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        bottom = 4.9 - 2.3 * row
        ax.imshow(view, extent=(4.5, 6.2, bottom, bottom + 1.7), aspect="auto")
        ax.add_patch(plt.Rectangle((4.5, bottom), 1.7, 1.7, **frame))
    ax.set(xlim=(0, 10), ylim=(0, 7.2))  # imshow has moved them
    return figure


N_VIEWS = h.BEYOND.teacher_views
STORED_BOXES = (
    (1.0, 6.8, f"{N_VIEWS} views\nper image", GREY, 1.8),
    (3.9, 7.7, "teacher", BLACK, 1.9),
    (3.9, 5.9, "student", BLUE, 1.9),
    (6.6, 5.9, "loss", ORANGE, 1.5),
    (8.9, 4.4, "stored\nanswers", PINK, 2.0, 1.8),
    (1.0, 2.3, "the same\nviews", GREY, 1.8),
    (3.9, 2.3, "student", BLUE, 1.9),
    (6.6, 2.3, "loss", ORANGE, 1.5),
)
STORED_ARROWS = (
    (1.9, 7.1, 2.95, 7.6),
    (1.9, 6.5, 2.95, 6.0),
    (4.85, 7.4, 6.3, 6.5),
    (4.85, 5.9, 5.85, 5.9),
    (4.85, 7.8, 8.9, 5.3, -0.3),
    (1.9, 2.3, 2.95, 2.3),
    (4.85, 2.3, 5.85, 2.3),
    (8.9, 3.5, 7.35, 2.3, -0.3),
)
STORED_TEXTS = (
    (0.1, 8.8, f"epochs 1 to {N_VIEWS}: the teacher answers"),
    (8.1, 7.6, "written"),
    (0.1, 3.7, f"epochs {N_VIEWS + 1} to {h.BEYOND.n_epochs}: it rests"),
    (8.5, 2.3, "read"),
    (2.8, 0.8, "The teacher's time is saved."),
)


def stored_answers():
    """Beyond: the teacher answers the first views; later they come again with stored answers."""
    return diagram("stored answers", 9.2, STORED_BOXES, STORED_ARROWS, STORED_TEXTS)[0]


# --- the photographs ------------------------------------------------------------------------------

# From bottom to top: label, and the accuracy on evaluation images, after 30 epochs unless said.
PHOTOGRAPHS = (
    ("course's net, labels", 0.557),
    ("course's net, distilled", 0.557),
    ("best published legal net", 0.587),
    ("published Boss, cut", 0.624),
    ("published Boss", 0.659),
    ("Strong", 0.662),
    ("Boss", 0.700),
    ("Beyond, 100 epochs", 0.750),
    ("Beyond, six views", 0.774),
    ("teacher, 112 px", 0.754),
    ("teacher, 224 px", 0.772),
)


def photographs():
    """Accuracy on the photographs, +- one standard error, by recipe."""
    names, accuracies = zip(*PHOTOGRAPHS, strict=True)
    errors = [h.standard_error(accuracy, 1_493) for accuracy in accuracies]
    figure = plt.figure(figsize=(5, 4.6), dpi=80, layout="constrained")
    figure.suptitle("own photographs (not Food-11), 112 px", fontsize=12)
    ax = figure.subplots()
    ax.errorbar(accuracies, names, xerr=errors, fmt="o", color=BLACK, capsize=3)
    ax.tick_params(labelsize=11)
    label = "evaluation accuracy ± s.e.\n(30 epochs unless said)"
    ax.set_xlabel(label, loc="right", fontsize=11)
    ax.grid(axis="x", alpha=0.3)
    return figure


DIAGRAMS = (
    distillation,
    convolutions,
    inverted_residual,
    alignment,
    stages,
    views,
    stored_answers,
    photographs,
)


def main(folder):
    """Write every diagram as a PNG of 64 colours, a third of the size of all, and alt.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for draw in DIAGRAMS:
        name = f"{draw.__name__}.png"
        figure = draw()
        figure.savefig(folder / name, dpi=160)
        plt.close(figure)
        picture = Image.open(folder / name).convert("RGB").quantize(64)
        picture.save(folder / name, optimize=True)
    h.write_text(folder / "alt.json", json.dumps(ALT, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
