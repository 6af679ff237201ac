"""Pictures take data and return a Figure; they never show it and leave pyplot as it was."""

import re
import time

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torchvision.models.resnet import BasicBlock

import helpers as h


@pytest.fixture
def pictures(food):
    data = h.find_data(food)
    split = h.load_data(data, "validation", "eval", 64)
    whole = h.load_data(data, "training", "whole", 64)
    classes = torch.arange(11).roll(3)
    history = pd.DataFrame({"epoch": [1, 2], "train_loss": [2.0, 1.0], "valid_acc": [0.1, 0.4], "seconds": [1.0, 1.0]})
    run = h.Run(h.STAGES["boss"], food, data.origin, history, 58_235, 10**8, 0.4, 11, food / "boss.csv")
    logits, student, teacher = torch.randn(11), h.build_student(h.STAGES["boss"]), h.build_student(h.TEACHER_CONFIG)
    return {
        "samples": lambda: h.plot_samples(split),
        "views": lambda: h.plot_views(h.BatchLoader(whole, h.get_config("boss", image_size=64), "cpu", train=True)),
        "epoch parts": lambda: h.plot_epoch_parts({"a": {"wait": 10.0, "train": 1.0}, "b": {"wait": 0.0, "train": 1.0}},
                                                  data.origin),
        "lines": lambda: h.plot_lines(pd.DataFrame({"a": [1, 2], "b": [3, 4]}, [0.1, 1.0]), data.origin, "y",
                                      xscale="log"),
        "attention": lambda: h.plot_attention(torch.randn(2, 3, 64, 64), {"teacher": teacher, "boss": student},
                                              "layer2", data.origin),
        "soft labels": lambda: h.plot_soft_labels(logits, split.images[0], (1, 4, 20), data.origin),
        "history": lambda: h.plot_history([run], h.PUBLISHED_SCORES),
        "confusion": lambda: h.plot_confusion(split.labels, classes, data.origin),
        "calibration": lambda: h.plot_calibration(split.labels, {"teacher": torch.randn(11, 11)}, data.origin),
        "mistakes": lambda: h.plot_mistakes(split, classes),
        "no mistakes": lambda: h.plot_mistakes(split, split.labels),
        "mistakes that the teacher gets right": lambda: h.plot_mistakes(split, classes, split.labels),
    }


def test_each_picture_is_a_figure_that_names_its_data_also_to_who_cannot_see_it(pictures):
    for name, draw in pictures.items():
        figure = draw()
        assert isinstance(figure, Figure) and "own photographs" in figure.get_suptitle(), name
        alt = re.match('<img alt="([^"]+)" [^>]+base64,[^"]{999}', figure._repr_html_())
        assert alt and "own photographs" in alt[1], name
    assert plt.get_fignums() == []


def test_confusion_matrix_counts():
    counts = h.confusion_matrix(torch.tensor([0, 0, 1, 10]), torch.tensor([0, 1, 1, 3]))
    assert counts.sum() == 4 and counts[0, 0] == counts[0, 1] == counts[1, 1] == counts[10, 3] == 1


def test_dwpw_arithmetic():
    table = h.dwpw_arithmetic(128, 256, 3, 14)
    assert table.loc["full convolution", "weights"] == 128 * 256 * 9
    assert table.loc["depthwise + pointwise", "weights"] == 128 * 9 + 128 * 256
    assert table.loc["depthwise + pointwise", "share of full"] == round(1 / 256 + 1 / 9, 3)


def test_accuracy_table():
    labels = torch.tensor([0, 1, 2, 3])
    table = h.accuracy_table(labels, {"all": labels, "half": torch.tensor([0, 1, 0, 0])}, "x")
    assert table["accuracy"].tolist() == [1.0, 0.5] and table["+- s.e."].tolist() == [0.0, 0.25]


def test_mistakes_of_the_student_that_the_teacher_gets_right(food):
    split = h.load_data(h.find_data(food), "validation", "eval", 64)
    classes, teacher = torch.full((11,), 3), torch.where(split.labels < 6, split.labels, 0)
    title = h.plot_mistakes(split, classes, teacher).get_suptitle()
    assert title.startswith("5 mistakes of the student that the teacher gets right")  # labels 0 to 5, but not 3


def test_calibration_error_by_hand():
    """Two images at confidence 0.9, one of them right; two at 0.6, both right: (|0.5 - 0.9| + |1 - 0.6|) / 2."""
    def logits(confidence):
        return torch.tensor([confidence] + [(1 - confidence) / 10] * 10).log()

    z, labels = torch.stack([logits(c) for c in (0.9, 0.9, 0.6, 0.6)]), torch.tensor([0, 1, 0, 0])
    legend = h.plot_calibration(labels, {"net": z}, "x").axes[0].get_legend()
    assert legend.get_texts()[0].get_text() == "net: ECE 0.400"


def test_attention_map_is_the_mean_square_over_channels():
    model, images = h.build_student(h.STAGES["boss"]).eval(), torch.randn(2, 3, 64, 64)
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
    assert 0.4 <= parts["waiting for pictures"] < 4 and parts["training on them"] > 0


def test_gradient_sizes_by_hand():
    """The gradient of KL at T is (p_student - p_teacher) / T, that of CE p_student - onehot, both per picture."""
    student, teacher, labels = torch.randn(5, 11), torch.randn(5, 11), torch.arange(5)
    table = h.gradient_sizes(student, labels, teacher, (1, 4))
    apart = h.soft_labels(student, 4) - h.soft_labels(teacher, 4)
    assert table.loc[4, "KL"] == pytest.approx((apart / 4).norm(dim=1).mean().item(), rel=1e-4)
    assert table.loc[4, "T^2 KL"] == pytest.approx(16 * table.loc[4, "KL"])
    hard = h.soft_labels(student, 1) - torch.nn.functional.one_hot(labels, 11)
    assert table["CE"].tolist() == pytest.approx([hard.norm(dim=1).mean().item()] * 2, rel=1e-4)


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    return h.freeze(h.build_student(h.TEACHER_CONFIG))


def test_unstructured_pruning_takes_the_smallest_weights_of_each_convolution(resnet):
    pruned = h.prune_unstructured(resnet, 0.25)
    for old, new in zip(resnet.modules(), pruned.modules(), strict=True):
        if isinstance(old, torch.nn.Conv2d):
            gone = new.weight == 0
            assert gone.sum() == round(0.25 * gone.numel())
            assert old.weight[gone].abs().max() <= old.weight[~gone].abs().min()
            assert torch.equal(old.weight[~gone], new.weight[~gone])


def test_structured_pruning_is_the_net_without_its_weakest_inner_channels(resnet):
    """The same net with the other channels' weights into the second convolution set to zero answers the same."""
    pruned, images = h.prune_structured(resnet, 0.5), torch.randn(2, 3, 64, 64)
    for block in (m for m in resnet.modules() if isinstance(m, BasicBlock)):
        norms = block.conv1.weight.abs().sum((1, 2, 3))
        block.conv2.weight[:, norms.argsort()[:len(norms) // 2]] = 0
    assert torch.allclose(pruned(images), resnet(images), atol=1e-4)
    count = sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in resnet.parameters())
    assert 0.5 < count < 0.6 and pruned.layer1[0].conv1.weight.shape[0] == 32


def test_the_report_tables(food, teacher_file, tiny):
    data, device = h.find_data(food), torch.device("cpu")
    cfg, teacher = h.get_config("medium", **tiny), h.load_teacher(teacher_file)
    table = h.temperature_table(cfg, (1, 4), data, teacher, device, n_epochs=1)
    assert table.index.tolist() == [1, 4] and table["accuracy"].between(0, 1).all()
    pruned = h.pruning_table(teacher, h.build_loaders(cfg, data, device)[1], (0.0, 0.9))
    assert pruned["weights (M)"].loc[0.0].round(1).tolist() == [11.2, 11.2]
    assert pruned["accuracy"].loc[0.0].nunique() == 1 and (pruned["weights (M)"].loc[0.9] < 3).all()
