"""Pictures take data and return a Figure; they never show it and leave pyplot as it was."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import helpers as h


@pytest.fixture
def pictures(food):
    data = h.find_data(food)
    split = h.load_data(data, "validation", "eval", 64)
    whole = h.load_data(data, "training", "whole", 64)
    classes = torch.arange(11).roll(3)
    history = pd.DataFrame({"epoch": [1, 2], "train_loss": [2.0, 1.0], "valid_acc": [0.1, 0.4], "seconds": [1.0, 1.0]})
    run = h.Run(h.STAGES["boss"], food, data.origin, history, 58_235, 10**8, 0.4, 11, food / "boss.csv")
    logits = torch.randn(11)
    return {
        "samples": lambda: h.plot_samples(split),
        "views": lambda: h.plot_views(h.BatchLoader(whole, h.get_config("boss", image_size=64), "cpu", train=True)),
        "throughput": lambda: h.plot_throughput({"a": 10.0, "b": 2000.0}, data.origin),
        "soft labels": lambda: h.plot_soft_labels(logits, split.images[0], (1, 4, 20), data.origin),
        "history": lambda: h.plot_history([run], h.PUBLISHED_SCORES),
        "confusion": lambda: h.plot_confusion(split.labels, classes, data.origin),
        "by class": lambda: h.plot_by_class(split.labels, {"teacher": split.labels, "boss": classes}, data.origin),
        "mistakes": lambda: h.plot_mistakes(split, classes),
        "no mistakes": lambda: h.plot_mistakes(split, split.labels),
    }


def test_each_picture_is_a_figure_that_names_its_data(pictures, tmp_path):
    for name, draw in pictures.items():
        figure = draw()
        assert isinstance(figure, Figure) and "own photographs" in figure.get_suptitle(), name
        figure.savefig(tmp_path / "a.png")
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
