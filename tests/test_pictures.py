"""Pictures and tables take data and return a Figure or a DataFrame; no picture trains."""

import html
import re
import time
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.text import Text
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

import helpers as h

CPU = torch.device("cpu")
SMALL = {"image_size": 40, "n_epochs": 2, "batch_size": 8, "amp": "off"}
MEDIUM = h.get_config("medium", **SMALL)
BOSS = h.get_config("boss", **SMALL)


def a_split(labels=range(11), looks=None):
    """A Split of pictures 40 pixels wide; each has one grey, which tells what it looks like."""
    labels = torch.tensor(list(labels))
    greys = 20 * torch.tensor(looks or labels.tolist(), dtype=torch.uint8)
    return h.Split(
        name="validation",
        origin="drawn <here>",
        images=greys[:, None, None, None].repeat(1, 3, 40, 40),
        labels=labels,
        ids=tuple(range(len(labels))),
        aspects=torch.ones(len(labels)),
        contents="x",
    )


class Looks(torch.nn.Linear):
    """A teacher that knows what a picture of `a_split` looks like."""

    def forward(self, images):
        looks = (h.pixels_of(images)[:, 0, 0, 0] + 10) // 20
        return F.one_hot(looks.long(), 11).float()


def a_run(name, n_correct, **history):
    """What a figure or table asks of a Run; n_correct: of 11 images, None: not validated."""
    columns = {"epoch": [1, 2], "train_loss": [2.0, 1.0], "valid_acc": [0.1, 0.4]}
    return SimpleNamespace(
        name=name,
        label=name,
        origin="drawn <here>",
        cfg=BOSS,
        history=pd.DataFrame({**columns, "seconds": [1.0, 1.5], **history}),
        n_params=58_235,
        correct=None if n_correct is None else torch.arange(11) < n_correct,
        valid_acc=0.364,
    )


def titles_of(figure):
    return [ax.get_title() for ax in figure.axes]


def lines_of(ax):
    """{label: values} of the lines of an Axes."""
    return {line.get_label(): list(line.get_ydata()) for line in ax.lines}


def widths_of(ax):
    return [bar.get_width() for bar in ax.patches]


@pytest.fixture(scope="module")
def figures():
    """One of each kind, the last with logarithmic axes."""
    split = a_split()
    origin = split.origin
    logits = torch.randn(11)
    wrong = split.labels.roll(3)
    sizes = pd.DataFrame({"a": [0.5, 0.02], "b": [3.0, 4.0]}, [0.1, 1.0])
    nets = {"boss": h.build_student(BOSS)}
    return [
        h.plot_samples(split),
        h.plot_views(h.BatchLoader(split, BOSS, CPU, train=True)),
        h.plot_mistakes(split, split.labels),
        h.plot_attention(torch.randn(4, 3, 40, 40), nets, "layer2", origin),
        h.plot_soft_labels(logits, split.images[0], 3, (1, 4, 20), origin),
        h.plot_answers(split.images[0], {"a": logits}, origin),
        h.plot_bars(sizes, origin, "x"),
        h.plot_history([a_run("boss", 4)]),
        h.plot_confusion(split.labels, wrong, origin),
        h.plot_lines(sizes, origin, "y", loglog=True),
    ]


# --- figures --------------------------------------------------------------------------------------


def test_each_picture_says_what_it_shows_in_letters_for_a_narrow_screen(figures, monkeypatch):
    """On a narrow one a figure shrinks to its min-width, and then scrolls. No tick is a power."""
    texts = []

    def savefig(figure, file):
        figure.draw_without_rendering()
        texts.extend(text for text in figure.findobj(Text) if text.get_text())

    monkeypatch.setattr(h.AltTextFigure, "savefig", savefig)
    for figure in figures:
        alt_text, origin, sentence = figure.alt_text.partition("drawn <here>. ")
        assert len(sentence) > 15
        page = re.search(r'x:auto.*min-width:(\d+)px" alt="([^"]+)" ', figure._repr_html_())
        assert html.unescape(page[2]) == figure.alt_text
        narrowest = int(page[1])
        assert narrowest <= 400
    for text in texts:
        assert text.get_fontsize() * 80 / 72 * narrowest / figure.bbox.width >= 9
        assert "^{" not in text.get_text()


def test_a_notebook_gets_a_figure_once_with_its_text(figures):
    InteractiveShell.instance()
    with capture_output() as captured:
        InteractiveShell.instance().display_formatter.format(figures[-1])
    (output,) = captured.outputs
    assert output.data.keys() == {"text/html", "text/plain"}
    assert plt.get_fignums() == []


# --- pictures -------------------------------------------------------------------------------------


def test_samples_are_the_first_image_of_each_class_that_is_there():
    figure = h.plot_samples(a_split([3, 0, 3], [3, 0, 7]))
    assert titles_of(figure) == ["Bread", "Egg"]
    assert figure.axes[1].images[0].get_array()[0, 0, 0] == 60


def test_mistakes_come_from_the_whole_split():
    split = a_split(sorted([*range(11)] * 5))
    figure = h.plot_mistakes(split, torch.full((55,), 3))
    assert figure.alt_text.startswith("50 mistakes, validation")
    assert {"Bread\nnot Egg", "Meat\nnot Egg"} < set(titles_of(figure))


def test_soft_labels_which_may_be_a_learners_own_stand_beside_the_label_and_the_picture():
    image = h.normalize(a_split().images)[5]
    own = lambda logits, temperature: logits / temperature  # noqa: E731
    figure = h.plot_soft_labels(torch.ones(11), image, 1, (1, 4), "x", own)
    label, _, chart, picture = figure.axes
    assert widths_of(label) == [0, 1] + [0] * 9
    assert widths_of(chart) == [0.25] * 11
    assert picture.images[0].get_array()[0, 0, 0] == pytest.approx(100, abs=1)


# --- charts ---------------------------------------------------------------------------------------


def test_lines_have_a_tick_at_each_value():
    frame = pd.DataFrame({"a": [0.5, 0.6]}, [1, 20])
    ax = h.plot_lines(frame, "x", "y", frame["a"], logx=True).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels(which="both")] == ["1", "20"]


def test_a_history_has_a_line_of_each_run_and_its_panels_stand_one_below_the_other():
    both = a_run("both", None, valid_acc=[float("nan")] * 2)
    figure = h.plot_history([a_run("boss", 4), both])
    figure.draw_without_rendering()
    upper, lower = figure.axes
    assert list(lines_of(lower)) == ["boss", "both"]
    assert upper.get_position().y0 > lower.get_position().y1


def test_the_weights_of_the_loss_move_and_may_be_a_learners_own():
    weights = lines_of(h.plot_loss_weights(BOSS).axes[0])
    assert weights["kl"][5] == pytest.approx(10 * 0.25 * 0.75)
    assert weights["ce"][10] == 10
    own = h.plot_loss_weights(BOSS, lambda cfg, progress: h.LossWeights(2.0, progress, 1.0))
    assert lines_of(own.axes[0])["kl"][5] == 1.0


def test_the_confusion_matrix_has_true_classes_as_rows():
    labels = torch.tensor([2, 2, 2, 5])
    classes = torch.tensor([2, 7, 7, 5])
    ax = h.plot_confusion(labels, classes, "x").axes[0]
    counts = {text.get_position(): text.get_text() for text in ax.texts}
    assert counts == {(2, 2): "1", (7, 2): "2", (5, 5): "1"}
    assert ax.images[0].get_array()[2, 7] == pytest.approx(2 / 3)


# --- tables ---------------------------------------------------------------------------------------


def test_an_accuracy_table_compares_each_row_with_the_one_above():
    """Of 100 images 10 are right in ours alone and 15 in theirs: sqrt(25 - 5^2 / 100) / 100."""
    ours = torch.tensor([0] * 70 + [1] * 30)
    theirs = torch.tensor([0] * 60 + [1] * 25 + [0] * 15)
    table = h.accuracy_table(torch.zeros(100), {"ours": ours, "theirs": theirs}, "net")
    assert table.loc["ours"].tolist() == [0.7, 0.0458, "", ""]
    assert table.loc["theirs"].tolist() == [0.75, 0.0433, "+0.0500", "0.0497"]


def test_a_run_without_a_validation_score_is_a_gap_in_the_table():
    runs = [a_run("both", None), a_run("boss", 5), a_run("beyond", 6)]
    table = h.stage_table(runs)
    assert table.loc["both"].tolist() == ["", "", "", "", 58_235, 2, 2]
    assert table["difference"].tolist() == ["", "", "+0.0909"]


@pytest.fixture
def fits(monkeypatch):
    """What `fit` is asked to train, [(config, Split)]; some labels are false.

    The net that it leaves says 9 if it had a teacher at a temperature above 1, else 0.
    """
    training = a_split([*range(11)] * 2 + [3, 4], [*range(11)] * 2 + [5, 9])
    asked = []

    def build_loaders(cfg, data, device):
        return [h.BatchLoader(split, cfg, device) for split in (training, a_split())]

    def fit(loss_fn, train_loader, valid_loader=None):
        *_, weight, bias = loss_fn.student.parameters()
        asked.append((loss_fn.cfg, train_loader.split))
        has_soft_teacher = loss_fn.teacher is not None and loss_fn.cfg.temperature > 1
        weight.data.zero_()
        bias.data.copy_(torch.eye(11)[9 if has_soft_teacher else 0])

    monkeypatch.setattr(h, "build_loaders", build_loaders)
    monkeypatch.setattr(h, "fit", fit)
    return asked


def test_a_student_never_sees_a_missing_class_nor_what_looks_like_it(fits):
    """The last two pictures are labelled 3, and look like 9."""
    table = h.missing_class_table(MEDIUM, None, Looks(1, 1), CPU, (9, 3), (1, 4), seeds=2)
    seen = [0, 1, 2, 4, 5, 6, 7, 8, 10]
    for _, split in fits:
        assert split.labels.tolist() == seen * 2
        assert (split.images[:, 0, 0, 0] == 20 * split.labels).all()
    # Two seeds each: labels alone, then the teacher alone at two temperatures.
    assert [cfg.needs_teacher for cfg, _ in fits] == [False] * 2 + [True] * 4
    assert [(cfg.temperature, cfg.alpha) for cfg, _ in fits[2::2]] == [(1, 1), (4, 1)]
    assert len({cfg.seed for cfg, _ in fits}) == 2
    wanted = {"labels alone": 0.0, "soft labels, T = 1": 0.0, "soft labels, T = 4": 1.0}
    assert table["Soup"].to_dict() == wanted


@pytest.fixture
def resnet():
    return h.freeze(h.build_student(h.TEACHER_CONFIG))


def test_structured_pruning_is_the_net_without_its_weakest_inner_channels(resnet):
    """The net answers the same as one whose second convolutions ignore the other channels."""
    pruned = h.prune_structured(resnet, 0.5)
    images = torch.randn(2, 3, 40, 40)
    for block in resnet.modules():
        if isinstance(block, BasicBlock):
            norms = block.conv1.weight.abs().sum((1, 2, 3))
            weakest = norms.argsort()[: len(norms) // 2]
            block.conv2.weight[:, weakest] = 0
    assert torch.allclose(pruned(images), resnet(images), atol=1e-4)
    assert len(pruned.layer1[0].conv1.weight) == 32


def test_a_pruning_table_has_accuracy_weights_and_time_of_both_kinds(resnet):
    table = h.pruning_table(resnet, h.BatchLoader(a_split(), MEDIUM, CPU), (0.0, 0.9))
    assert table["accuracy"].loc[0.0].to_dict() == {"structured": 0.091, "unstructured": 0.091}
    assert (table["weights (M)"].loc[0.9] < 3).all()


class Sleepy(list):
    """Batches, each of which comes so many seconds late."""

    def __iter__(self):
        for seconds in super().__iter__():
            time.sleep(seconds)
            yield torch.randn(4, 3, 40, 40), torch.arange(4)


def test_epoch_parts_tell_waiting_from_training_and_leave_out_the_start():
    parts = h.epoch_parts(BOSS, Sleepy([0.7, 0.2]), CPU)
    assert 0.4 <= parts["waiting for pictures"] < 0.7
    assert parts["training on them"] > 0
