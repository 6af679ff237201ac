"""Predictions and the CSV."""

import pytest
import torch
from torch import nn

import helpers as h


def test_written_csv_is_valid_and_as_the_homework_wants(tmp_path):
    path = tmp_path / "a.csv"
    h.write_submission(path, ["0000", "0001", "0002"], torch.tensor([3, 10, 0]))
    assert path.read_text() == "Id,Category\n0000,3\n0001,10\n0002,0\n"
    assert (
        h.validate_submission(path, 3) == 3 == h.validate_submission(path, ["0000", "0001", "0002"])
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 1: the header is missing"),
        ("id,category\n0000,1\n0001,1\n", "row 1: the header is 'id,category', not"),
        ("Id,Category\n0000,1\n", r"1 rows, wanted are 2: 1 ids are missing \(0001\)"),
        (
            "Id,Category\n0000,1\n0001,1\n0002,1\n",
            r"row 4 is '0002,1': wanted are an id of the evaluation images \(0000 to 0001\), "
            "a comma and a class from 0 to 10",
        ),
        (
            "Id,Category\n0000,1\n0000,1\n",
            r"2 rows, wanted are 2: 1 ids are missing \(0001\) and 1 ids are there twice \(0000\)",
        ),
        ("Id,Category\n0000,1\n\n0001,1\n", "row 3 is ''"),
        ("Id,Category\n0000,1\n" + "x" * 5000, "row 3 is 'x{80}[.]{3}'"),
        ("Id,Category\n0,1\n1,1\n", "row 2 is '0,1'"),
        ("Id,Category\n0000,11\n0001,1\n", "row 2 is '0000,11'"),
        ("Id,Category\n0000,1\n0001,-1\n", "row 3 is '0001,-1'"),
        ("Id,Category\n0000,1\n0001,1.0\n", "row 3 is '0001,1.0'"),
        ("Id,Category\n0000,1\n0001,\u0663\n", r"row 3 is '0001,\\u0663'"),
        ("Id,Category\n0000,1\n0001,\n", "row 3 is '0001,'"),
        ("Id,Category\n0000,1 \n0001,1\n", "row 2 is '0000,1 '"),
        ("Id,Category\n0000,1\n0001,1 \n", "row 3 is '0001,1 '"),
        (",Id,Category\n0,0000,1\n", "row 1: the header"),
        ("Id,Category\n0000,1,2\n0001,1\n", "row 2 is '0000,1,2'"),
    ],
)
def test_validate_names_the_first_wrong_row(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(h.UserError, match=message):
        h.validate_submission(path, 2)


@pytest.mark.parametrize(
    "text",
    [
        "Id,Category\n0000,1\n0001,10\n",
        "\ufeffId,Category\n0000,1\n0001,10\n",  # Excel
        "Id,Category\r\n0000,1\r\n0001,10\r\n",
        '"Id","Category"\n"0000","1"\n"0001","10"\n',
        "Id,Category\n0000,1\n0001,10\n\n \n",
        "Id,Category\n0000,1\n0001,10",
    ],
)
def test_validate_takes_what_kaggle_takes(tmp_path, text, capsys):
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode())
    assert h.validate_submission(path, 2) == 2
    assert capsys.readouterr().out == ""


def test_another_order_is_valid_and_said(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text("Id,Category\n0001,1\n0000,1\n")
    assert h.validate_submission(path, 2) == 2
    assert "another order than the files, which Kaggle ignores" in capsys.readouterr().out


def test_the_download_link_leads_to_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link = h.download_link(tmp_path / 'my "50 %" #1/a.csv').data
    assert 'href="my%20%2250%20%25%22%20%231/a.csv"' in link
    assert "Download my &quot;50 %&quot; #1/a.csv" in link


def test_no_rows_is_nothing_to_check(tmp_path):
    (tmp_path / "a.csv").write_text("Id,Category\n")
    with pytest.raises(h.UserError, match="no row is wanted"):
        h.validate_submission(tmp_path / "a.csv", 0)


def test_validate_other_files(tmp_path):
    with pytest.raises(h.UserError, match="no file"):
        h.validate_submission(tmp_path / "none.csv", 2)
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00Id")
    with pytest.raises(h.UserError, match="UTF-8"):
        h.validate_submission(tmp_path / "a.csv", 2)


def test_predictions_follow_the_ids(food):
    cfg = h.get_config("simple", image_size=64)
    split = h.load_data(h.find_data(food), "evaluation", "eval", 64)
    # A net just built gives all pictures one class; this one tells them apart.
    student = h.freeze(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 11)))
    student[2].weight.copy_(100 * torch.randn(11, 12, generator=torch.Generator().manual_seed(0)))
    classes = h.predict(student, split, cfg)
    one_by_one = torch.stack(
        [student(h.normalize(image[None]))[0].argmax() for image in split.images]
    )
    assert len(classes.unique()) > 2
    assert torch.equal(classes, one_by_one)


def test_tta_is_the_mean_over_exact_view_scales_and_mirrors(food):
    """Six views; scale 1 of the whole view is the central square of the picture, cut out and
    shrunk.
    """
    cfg, data = h.get_config("simple", image_size=64), h.find_data(food)
    exact, whole = (h.load_data(data, "evaluation", view, 64) for view in ("eval", "whole"))
    student = h.freeze(h.build_student(cfg))
    views = [h.normalize(exact.images)]
    for scale in h.TTA_SCALES:
        views.append(h.normalize(h.warp(whole.images, h.centre_crops(whole.aspects, scale), 64)))
    wanted = sum(student(x).softmax(1) + student(x.flip(3)).softmax(1) for x in views) / 6
    loaders = [h.BatchLoader(split, cfg, "cpu", batch_size=2) for split in (exact, whole)]
    assert torch.allclose(h.tta_probabilities(student, *loaders), wanted, atol=1e-5)
    assert torch.equal(h.predict(student, exact, cfg, whole=whole), wanted.argmax(1))


def test_a_centre_crop_is_a_square_of_the_picture():
    """Of a picture twice as wide as high, the whole height and half the width; of a high one the
    other way round.
    """
    crops = h.centre_crops(torch.tensor([2.0, 0.5, 1.0]), 1.0)[:, 0]
    assert torch.allclose(
        crops[:, [0, 1], [0, 1]], torch.tensor([[0.5, 1.0], [1.0, 0.5], [1.0, 1.0]])
    )
    assert crops[:, :, 2].abs().max() == 0 and torch.allclose(
        h.centre_crops(torch.ones(1), 0.75)[0, 0, 0, 0], torch.tensor(0.75)
    )
