"""Pictures take data and return a Figure; they never show it and leave pyplot as it was."""

import base64
import html
import io
import re
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock

import helpers as h

BOSS = h.get_config("boss", image_size=64)


def a_run(folder, origin, student):
    """A Run of two epochs."""
    history = {
        "epoch": [1, 2],
        "train_loss": [2.0, 1.0],
        "valid_acc": [0.1, 4 / 11],
        "seconds": [1.0, 1.0],
    }
    return h.Run(
        cfg=h.STAGES["boss"],
        folder=folder,
        origin=origin,
        history=pd.DataFrame(history),
        n_params=58_235,
        macs=10**8,
        correct=torch.arange(11) < 4,
        csv=folder / "boss.csv",
        net=student,
        facts={},
    )


@pytest.fixture
def figures(food):
    """{name: Figure}: one of each kind."""
    data = h.find_data(food)
    origin = data.origin
    split = h.load_data(data, "validation", "eval", 64)
    whole = h.load_data(data, "training", "whole", 64)
    loader = h.BatchLoader(whole, BOSS, "cpu", train=True)
    labels = split.labels
    classes = torch.arange(11).roll(3)
    student = h.build_student(h.STAGES["boss"])
    nets = {"teacher": h.build_student(h.TEACHER_CONFIG), "boss": student}
    run = a_run(food, origin, student)
    parts = {"a": {"wait": 10.0, "train": 1.0}, "b": {"wait": 0.0, "train": 1.0}}
    lines = pd.DataFrame({"a": [1, 2], "b": [3, 4]}, [0.1, 1.0])
    images = torch.randn(2, 3, 64, 64)
    logits = {"teacher": torch.randn(11, 11)}
    return {
        "samples": h.plot_samples(split),
        "views": h.plot_views(loader),
        "photographs": h.plot_photograph_results(),
        "epoch parts": h.plot_epoch_parts(parts, origin),
        "lines": h.plot_lines(lines, origin, "y", xscale="log"),
        "attention": h.plot_attention(images, nets, "layer2", origin),
        "soft labels": h.plot_soft_labels(torch.randn(11), split.images[0], (1, 4, 20), origin),
        "history": h.plot_history([run], h.PUBLISHED_SCORES),
        "confusion": h.plot_confusion(labels, classes, origin),
        "calibration": h.plot_calibration(labels, logits, origin),
        "mistakes": h.plot_mistakes(split, classes),
        "no mistakes": h.plot_mistakes(split, labels),
        "mistakes that the teacher gets right": h.plot_mistakes(split, classes, labels),
    }


def test_each_picture_is_a_figure_that_names_its_data_also_to_who_cannot_see_it(figures):
    ours = "the project's own photographs (not Food-11, not this notebook's data)"
    theirs = "photographs of no known set (not the homework's Food-11)"
    for name, figure in figures.items():
        data = ours if name == "photographs" else theirs
        assert isinstance(figure, Figure), name
        assert data in figure.alt_text, name
        alt = re.search('<img alt="([^"]+)" [^>]+base64,[^"]{999}', figure._repr_html_())
        assert alt, name
        assert data in html.unescape(alt[1]), name
    assert plt.get_fignums() == []


def test_each_picture_of_an_idea_says_what_it_shows():
    assert "KL compares them" in h.plot_kd_diagram().alt_text
    assert "smooth L1" in h.plot_alignment_diagram().alt_text
    assert "layer1 3, layer2 2, layer3 1" in h.plot_alignment_diagram().alt_text


def test_the_weights_in_the_picture_of_convolutions_are_those_of_layers():
    full = torch.nn.Conv2d(8, 16, 3, bias=False)
    split = [torch.nn.Conv2d(8, 8, 3, groups=8, bias=False), torch.nn.Conv2d(8, 16, 1, bias=False)]
    left, right = h.plot_convolutions(8, 16).axes
    assert f"{full.weight.numel():,} weights" in left.get_title()
    assert f"{sum(layer.weight.numel() for layer in split)} weights" in right.get_title()


def test_the_counts_in_the_picture_of_the_inverted_residual_make_up_the_block():
    alt_text = h.plot_inverted_residual(16, 4, 5).alt_text
    counts = re.findall(r"([\d,]+) parameters", alt_text)
    block = h.InvertedResidual(16, 16, 5, expansion=4)
    assert sum(int(count.replace(",", "")) for count in counts) == count_parameters(block)
    assert "widened to 64" in alt_text
    assert "depthwise 5x5" in alt_text


def test_the_parts_in_the_picture_of_the_loss_make_up_the_loss_that_was_trained(food, tiny):
    """Boss's training loss of each epoch is the sum of the three lines drawn below it."""
    data = h.find_data(food)
    cfg = h.get_config("boss", **{**tiny, "n_epochs": 2})
    student = h.build_student(cfg)
    loss_fn = h.DistillLoss(cfg, student, h.build_student(h.TEACHER_CONFIG))
    history = h.fit(loss_fn, h.build_loaders(cfg, data, torch.device("cpu"))[0], None)
    run = a_run(food, data.origin, student)
    run.cfg = cfg
    run.history = pd.DataFrame(history)
    figure = h.plot_loss_terms(run)
    parts = {line.get_label(): line.get_ydata() for line in figure.axes[1].lines}
    loss = parts.pop("the loss")
    assert list(parts) == ["CE", "T² KL", "alignment"]
    assert sum(parts.values()) == pytest.approx(loss, rel=1e-4)
    assert "T² KL from 1.9 to 0" in figure.alt_text
    # With another loss the three do not make it up, and that is said.
    run.facts = {"loss_fn_kd": "other code"}
    labels = [line.get_label() for line in h.plot_loss_terms(run).axes[1].lines]
    assert labels[-1] == "the loss, with your own loss_fn_kd"


def test_the_picture_of_a_loss_of_labels_alone_has_one_term(food, tiny):
    run = a_run(food, "x", None)
    run.cfg = h.get_config("simple", **tiny)
    run.history["ce"] = [2.0, 1.0]
    run.history["align"] = float("nan")
    lines = h.plot_loss_terms(run).axes[0].lines
    assert [line.get_label() for line in lines] == ["CE"]
    assert set(lines[0].get_ydata()) == {1.0}


def test_a_run_whose_time_ended_before_its_first_epoch_has_no_terms_to_show(
    food, tiny, monkeypatch, capsys
):
    run = a_run(food, "x", None)
    run.cfg = h.get_config("boss", **tiny)
    run.history = run.history.iloc[:0]
    with pytest.raises(h.UserError, match="0 of 2 epochs.: no epoch yet"):
        h.plot_loss_terms(run)
    monkeypatch.delenv("HW13_STRICT")
    assert h.plot_loss_terms(run) is None
    assert "Not shown, and the run goes on: boss (unfinished" in capsys.readouterr().out


def test_the_picture_of_a_loss_says_where_it_shows_another_schedule(food, tiny):
    run = a_run(food, "x", None)
    run.cfg = h.get_config("boss", **tiny)
    run.history["ce"] = [2.0, 1.0]
    run.facts = {"loss_fn_kd": h.code_fingerprint(h.loss_fn_kd), "loss_weights": "other code"}
    figure = h.plot_loss_terms(run)
    assert figure.axes[1].lines[-1].get_label() == "the loss, with your own loss_weights"
    assert "not those of your own loss_weights" in figure.alt_text


def test_the_confusion_matrix_has_true_classes_as_rows():
    labels = torch.tensor([2, 2, 2, 5])
    classes = torch.tensor([2, 7, 7, 5])
    ax = h.plot_confusion(labels, classes, "x").axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "true")
    # Of class 2 two pictures are taken for 7: column 7 of row 2.
    counts = {text.get_position(): text.get_text() for text in ax.texts}
    assert counts == {(2, 2): "1", (7, 2): "2", (5, 5): "1"}
    assert ax.images[0].get_array()[2, 7] == pytest.approx(2 / 3)


def test_runs_on_other_images_are_not_compared(food):
    runs = [a_run(food, "x", None) for _ in range(3)]
    for run, contents in zip(runs, ("a", "a", "b"), strict=True):
        run.facts = {"validation_contents": contents}
    table = h.stage_table(runs)
    assert table["- row above"].tolist() == ["", "+0.0000", ""]


def a_figure():
    return h.plot_lines(pd.DataFrame({"a": [1, 2]}, [0, 1]), "two <lines>\nof text", "y")


def test_letters_are_nine_pixels_high_on_a_narrow_screen(figures):
    """A figure shrinks to its min-width and no further."""
    diagrams = [h.plot_kd_diagram(), h.plot_convolutions(), h.plot_inverted_residual()]
    for figure in [*figures.values(), *diagrams]:
        page = figure._repr_html_()
        narrowest = int(re.search(r"min-width:(\d+)px", page)[1])
        width = figure._drawn().width
        sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
        pixels = min(sizes) * figure.dpi / 72
        assert pixels * narrowest / width >= 9
        assert pixels >= 9
        assert narrowest <= width
    assert narrowest <= 300  # a diagram fits beside the margins of a page of 400


def test_five_stages_have_five_lines_and_markers():
    styles = [h.stage_style(name) for name in h.STAGES]
    for part in ("color", "marker", "ls"):
        assert len({style[part] for style in styles}) == 5


def test_runs_of_other_names_have_styles_of_their_own():
    names = ["boss", "deep", "scheduled", "no_layer2", "medium_t4"]
    styles = h.styles_of(names)
    assert set(styles) == set(names)
    for part in ("color", "marker"):
        assert len({styles[name][part] for name in names}) == 5
    assert styles["boss"] == h.stage_style("boss")


def test_a_history_has_a_bar_of_its_standard_error_at_the_best_epoch(food):
    run = a_run(food, "x", None)
    accuracy_ax = h.plot_history([run]).axes[1]
    ((start, end),) = accuracy_ax.collections[0].get_segments()
    error = h.standard_error(4 / 11, 11)
    assert start.tolist() == pytest.approx([2, 4 / 11 - error])
    assert end.tolist() == pytest.approx([2, 4 / 11 + error])


def test_lines_with_errors():
    frame = pd.DataFrame({"a": [0.5, 0.6], "b": [0.1, 0.2]}, [1, 4])
    both = h.plot_lines(frame, "x", "y", errors=pd.Series([0.1, 0.3], [1, 4])).axes[0]
    heights = []
    for bars in both.collections:
        heights += [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
    assert heights == pytest.approx([0.2, 0.6, 0.2, 0.6])


def test_a_logarithmic_axis_has_plain_numbers(food):
    """Two or more of them, also within one power of ten."""
    run = a_run(food, "x", None)
    loss_ax = h.plot_history([run]).axes[0]
    loss_ax.figure.draw_without_rendering()
    labels = [label.get_text() for label in loss_ax.get_yticklabels(which="both")]
    assert {"1", "2"} <= set(labels)
    assert "$" not in "".join(labels)


def test_soft_labels_of_two_pictures():
    """A row a picture; each chart has the softened probabilities."""
    logits = torch.tensor([[9.0] + [0.0] * 10, [1.0] + [0.0] * 10])
    images = torch.randn(2, 3, 8, 8)
    figure = h.plot_soft_labels(logits, images, (1, 4), "x")
    charts = [ax for ax in figure.axes if ax.patches]
    assert len(figure.axes) == 6
    for chart, row, temperature in zip(charts, (0, 0, 1, 1), (1, 4, 1, 4), strict=True):
        widths = [bar.get_width() for bar in chart.patches]
        assert widths == pytest.approx(h.soft_labels(logits[row], temperature).tolist())
    assert "Picture 1: Bread has 1.00 at T = 1, 0.49 at T = 4" in figure.alt_text


def test_a_listing_scrolls_and_breaks_no_word():
    page = h.show_source(h.loss_fn_kd)._repr_html_()
    assert "overflow-x:auto" in page
    assert page.count('<pre style="white-space:pre;word-break:normal">') == 1


def picture_in(text):
    """The PIL image of a base64 text."""
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_a_figure_has_its_title_as_it_was_given():
    figure = a_figure()
    assert figure.texts[0].get_text() == "two <lines>\nof text"
    assert figure.alt_text == "two <lines> of text. y at 0, 1: a 1, 2."
    assert 'alt="two &lt;lines&gt; of text. y at 0, 1' in figure._repr_html_()


def test_a_notebook_gets_a_figure_as_html_as_png_and_as_text():
    """An exporter that takes no HTML (LaTeX) has the PNG, one that takes no picture the title."""
    InteractiveShell.instance()
    with capture_output() as captured:
        InteractiveShell.instance().display_formatter.format(a_figure())
    forms = captured.outputs[0].data
    assert "<img alt" in forms["text/html"]
    assert forms["text/plain"].startswith("two <lines> of text")
    picture = picture_in(forms["image/png"])
    assert picture.format == "PNG"
    in_html = picture_in(re.search('base64,([^"]+)', forms["text/html"])[1])
    assert in_html.format == "WEBP"
    assert in_html.size == picture.size == (560, 256)
    # Few colours, but the same picture.
    difference = np.asarray(in_html.convert("L"), int) - np.asarray(picture.convert("L"), int)
    assert abs(difference).mean() < 3


def test_a_pillow_without_webp_shows_a_png(monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.SAVE, "WEBP")
    page = a_figure()._repr_html_()
    assert picture_in(re.search('image/png;base64,([^"]+)', page)[1]).format == "PNG"


def broken_figure():
    """A figure whose text no font can set, which shows when it is drawn."""
    figure = a_figure()
    figure.suptitle("$\\no_such_command$")
    return figure


def test_a_figure_that_cannot_be_drawn_is_said(monkeypatch, capsys):
    with pytest.raises(ValueError, match="no_such_command"):
        broken_figure()._ipython_display_()
    monkeypatch.delenv("HW13_STRICT")
    broken_figure()._ipython_display_()
    assert capsys.readouterr().out.startswith("Not shown, and the run goes on: ValueError: ")


def test_confusion_matrix_counts():
    labels = torch.tensor([0, 0, 1, 10])
    classes = torch.tensor([0, 1, 1, 3])
    counts = h.confusion_matrix(labels, classes)
    assert counts.sum() == 4
    assert counts[0, 0] == counts[0, 1] == counts[1, 1] == counts[10, 3] == 1


def test_dwpw_arithmetic():
    table = h.dwpw_arithmetic(128, 256, 3, 14)
    assert table.loc["full convolution", "weights"] == 128 * 256 * 9
    assert table.loc["depthwise + pointwise", "weights"] == 128 * 9 + 128 * 256
    assert table.loc["full convolution", "multiply-adds (M)"] == 57.80  # 14 * 14 * 128 * 256 * 9
    assert table.loc["depthwise + pointwise", "share of full"] == round(1 / 256 + 1 / 9, 3)


def test_accuracy_table():
    labels = torch.tensor([0, 1, 2, 3])
    half_right = torch.tensor([0, 1, 0, 0])
    table = h.accuracy_table(labels, {"all": labels, "half": half_right}, "x")
    assert table["accuracy"].tolist() == [1.0, 0.5]
    assert table["+- s.e."].tolist() == [0.0, 0.25]
    assert table["- row above"].tolist() == ["", "-0.5000"]
    assert table["its +- s.e."].tolist() == ["", "0.2500"]


def test_a_paired_difference_counts_only_images_on_which_one_of_two_is_right():
    """Against McNemar's form: (b - c) / n, sqrt(b + c - (b - c)^2 / n) / n."""
    ours = torch.tensor([True] * 70 + [False] * 30)
    theirs = torch.tensor([True] * 60 + [False] * 25 + [True] * 15)
    b = 10  # ours alone
    c = 15  # theirs alone
    difference, error = h.paired_difference(ours, theirs)
    assert difference == pytest.approx((b - c) / 100)
    assert error == pytest.approx((b + c - (b - c) ** 2 / 100) ** 0.5 / 100)
    assert h.paired_difference(ours, ours) == (0.0, 0.0)


def test_mistakes_of_the_student_that_the_teacher_gets_right(food):
    """The student says 3 to all; the teacher is right about the labels 0 to 5."""
    split = h.load_data(h.find_data(food), "validation", "eval", 64)
    student = torch.full((11,), 3)
    teacher = torch.where(split.labels < 6, split.labels, 0)
    title = h.plot_mistakes(split, student, teacher).alt_text
    # The labels 0 to 5, but not 3.
    assert title.startswith("5 mistakes of the student that the teacher gets right")


def test_calibration_error_by_hand():
    """Two images at confidence 0.9, one of them right; two at 0.6, both right.

    The error is (|0.5 - 0.9| + |1 - 0.6|) / 2.
    """
    rows = []
    for confidence in (0.9, 0.9, 0.6, 0.6):
        probabilities = [confidence] + [(1 - confidence) / 10] * 10
        rows.append(torch.tensor(probabilities).log())
    labels = torch.tensor([0, 1, 0, 0])
    figure = h.plot_calibration(labels, {"net": torch.stack(rows)}, "x")
    legend = figure.axes[0].get_legend()
    assert legend.get_texts()[0].get_text() == "net: ECE 0.400"
    assert "net: ECE 0.400, right 0.000" in figure.alt_text
    assert [bar.get_height() for bar in figure.axes[1].patches] == [2, 2]


def test_a_net_is_right_less_or_more_often_than_it_says():
    confidence = pd.Series([0.9, 0.5])
    n = pd.Series([3, 1])
    less = h.calibration_side(confidence, pd.Series([0.7, 0.7]), n)
    assert less == "right 0.100 less often than it says"
    more = h.calibration_side(confidence, pd.Series([1.0, 0.6]), n)
    assert more == "right 0.100 more often than it says"


def test_attention_map_is_the_mean_square_over_channels():
    model = h.build_student(h.STAGES["boss"]).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model.layer1(model.stem(images)).square().mean(1)
    assert torch.allclose(h.attention_map(model, images, "layer1"), wanted, atol=1e-6)


def test_epoch_parts_tell_waiting_from_training(tiny):
    """A loader that sleeps 0.2 s a batch of 4 keeps an epoch of 8 images waiting for 0.4 s."""

    class Sleepy:
        dataset = range(8)

        def __iter__(self):
            for _ in range(2):
                time.sleep(0.2)
                yield torch.randn(4, 3, 64, 64), torch.arange(4)

    parts = h.epoch_parts(h.get_config("boss", **tiny), Sleepy(), torch.device("cpu"))
    assert 0.4 <= parts["waiting for pictures"] < 4
    assert parts["training on them"] > 0


def test_workers_without_shared_memory_are_timed_over_pipes(tiny, monkeypatch, capsys):
    """torch's own collating fails, as it does in a worker whose /dev/shm is full."""

    def without_shared_memory(samples):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")

    monkeypatch.setattr("torch.utils.data._utils.collate.default_collate", without_shared_memory)
    dataset = TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8))
    loader = DataLoader(dataset, 4, num_workers=1)
    parts = h.epoch_parts(h.get_config("boss", **tiny), loader, torch.device("cpu"))
    assert parts["waiting for pictures"] > 0
    assert parts["training on them"] > 0
    out = capsys.readouterr().out
    assert "unable to allocate shared memory" in out
    assert "through pipes" in out
    assert out.count("\n") == 1


def test_arrays_of_a_batch_are_what_torch_collates():
    dataset = TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4))
    wanted = torch.utils.data.default_collate(list(dataset))
    images, labels = h.stack_as_arrays(dataset)
    assert isinstance(images, np.ndarray)
    assert torch.equal(torch.as_tensor(images), wanted[0])
    assert torch.equal(torch.as_tensor(labels), wanted[1])


def test_a_loader_that_cannot_be_timed_has_no_bar(tiny, monkeypatch, capsys):
    class Broken:
        dataset = range(8)

        def __iter__(self):
            raise OSError("[Errno 38] Function not implemented")

    cfg = h.get_config("boss", **tiny)
    with pytest.raises(OSError):
        h.epoch_parts(cfg, Broken(), torch.device("cpu"))
    monkeypatch.delenv("HW13_STRICT")
    parts = {"this": {"wait": 2.0, "train": 1.0}}
    parts["broken"] = h.epoch_parts(cfg, Broken(), torch.device("cpu"))
    assert "Function not implemented" in capsys.readouterr().out
    labels = h.plot_epoch_parts(parts, "x").axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["this"]


def test_gradient_sizes_by_hand():
    """The gradient of KL at T is (p_student - p_teacher) / T, that of CE p_student - onehot.

    Both are per picture.
    """
    student = torch.randn(5, 11)
    teacher = torch.randn(5, 11)
    labels = torch.arange(5)
    table = h.gradient_sizes(student, labels, teacher, (1, 4))

    soft = (h.soft_labels(student, 4) - h.soft_labels(teacher, 4)) / 4
    soft_norm = soft.norm(dim=1).mean().item()
    assert table.loc[4, "KL"] == pytest.approx(soft_norm, rel=1e-4)
    assert table.loc[4, "T^2 KL"] == pytest.approx(16 * table.loc[4, "KL"])

    hard = h.soft_labels(student, 1) - F.one_hot(labels, 11)
    hard_norm = hard.norm(dim=1).mean().item()
    assert table["CE"].tolist() == pytest.approx([hard_norm, hard_norm], rel=1e-4)


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    return h.freeze(h.build_student(h.TEACHER_CONFIG))


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_unstructured_pruning_takes_the_smallest_weights_of_each_convolution(resnet):
    pruned = h.prune_unstructured(resnet, 0.25)
    for old, new in zip(resnet.modules(), pruned.modules(), strict=True):
        if isinstance(old, torch.nn.Conv2d):
            gone = new.weight == 0
            assert gone.sum() == round(0.25 * gone.numel())
            assert old.weight[gone].abs().max() <= old.weight[~gone].abs().min()
            assert torch.equal(old.weight[~gone], new.weight[~gone])


def test_structured_pruning_is_the_net_without_its_weakest_inner_channels(resnet):
    """The net answers the same as one whose second convolutions ignore the other channels."""
    pruned = h.prune_structured(resnet, 0.5)
    images = torch.randn(2, 3, 64, 64)
    for block in resnet.modules():
        if isinstance(block, BasicBlock):
            norms = block.conv1.weight.abs().sum((1, 2, 3))
            weakest = norms.argsort()[: len(norms) // 2]
            block.conv2.weight[:, weakest] = 0
    assert torch.allclose(pruned(images), resnet(images), atol=1e-4)
    assert 0.5 < count_parameters(pruned) / count_parameters(resnet) < 0.6
    assert pruned.layer1[0].conv1.weight.shape[0] == 32


def test_temperature_table(food, teacher_file, tiny, monkeypatch):
    asked = []
    loss_fn_kd = h.loss_fn_kd

    def noted(student_logits, labels, teacher_logits, alpha, temperature):
        asked.append(temperature)
        return loss_fn_kd(student_logits, labels, teacher_logits, alpha, temperature)

    monkeypatch.setattr(h, "loss_fn_kd", noted)
    data = h.find_data(food)
    cfg = h.get_config("medium", **tiny)
    teacher = h.load_teacher(teacher_file)
    table = h.temperature_table(cfg, (1, 4), data, teacher, torch.device("cpu"), n_epochs=1)
    assert table.index.tolist() == [1, 4]
    assert set(asked) == {1, 4}
    assert table["accuracy"].between(0, 1).all()


def test_no_temperatures_are_compared_where_the_time_is_up(food, teacher_file, tiny, monkeypatch):
    cfg = h.get_config("medium", **(tiny | {"time_limit_h": 1e-9}))
    teacher = h.load_teacher(teacher_file)
    data = h.find_data(food)
    with pytest.raises(h.UserError, match="no time is left to compare temperatures"):
        h.temperature_table(cfg, (1, 4), data, teacher, torch.device("cpu"))


def test_pruning_table(food, teacher_file, tiny, monkeypatch):
    scored = []  # the weights of each net that is scored
    evaluate = h.evaluate

    def noted(net, loader):
        scored.append(sum(int((p != 0).sum()) for p in net.parameters()))
        return evaluate(net, loader)

    monkeypatch.setattr(h, "evaluate", noted)
    cfg = h.get_config("medium", **tiny)
    teacher = h.load_teacher(teacher_file)
    _, valid_loader = h.build_loaders(cfg, h.find_data(food), torch.device("cpu"))
    table = h.pruning_table(teacher, valid_loader, (0.0, 0.9))
    assert table.index.name == "pruning ratio"
    assert table["weights (M)"].loc[0.0].round(1).tolist() == [11.2, 11.2]
    assert table["accuracy"].loc[0.0].nunique() == 1
    assert (table["weights (M)"].loc[0.9] < 3).all()
    # The first is the model itself; the rest are what the table tells of.
    told = table["weights (M)"][["unstructured", "structured"]].to_numpy().flatten()
    assert [round(n / 1e6, 3) for n in scored[1:]] == told.tolist()


def test_the_cell_with_the_module_is_folded_in_jupyter_and_on_kaggle():
    cell = h.one_file_notebook(Path(h.__file__).parent).cells[1]
    assert cell.source.startswith("%%writefile helpers.py")
    assert cell.metadata["_kg_hide-input"] is True
    assert cell.metadata["jupyter"]["source_hidden"] is True


def test_what_was_measured_on_photographs_is_what_the_results_say():
    frame = h.photograph_results()
    said = (ROOT / "tests/bench/RESULTS.md").read_text()
    for accuracy in [*frame["validation"], *frame["evaluation"]]:
        assert f"{accuracy:.3f}" in said
    for parameters in frame["parameters"].drop("the teacher"):
        assert f"{parameters:,}" in said
    figure = h.plot_photograph_results()
    assert "Boss 0.700, the teacher 0.754" in figure.alt_text
    assert "not Food-11" in figure.alt_text
