"""Finding, reading and decoding data: both layouts, every image mode, stray and damaged files, the cache."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import save_picture
from PIL import Image

import helpers as h


def public_copy(root, evaluation_labels=True):
    """Class folders as public copies have them, with their own spelling."""
    names = [name.replace("/", "-") for name in h.CLASS_NAMES]
    for split in h.SPLITS:
        for k, name in enumerate(names):
            save_picture(root / split / name / f"{k}_0.jpg", k)
    return root


# --- where data is looked for ----------------------------------------------------------------------------------------


def test_the_argument_wins_then_the_variable_then_kaggle_then_here(food, tmp_path, monkeypatch):
    places = [tmp_path / "argument", tmp_path / "variable", tmp_path / "kaggle/input/x", tmp_path / "here"]
    for place in places:
        shutil.copytree(food, place / "Food-11")
    monkeypatch.chdir(places[3])
    assert h.find_data().root.resolve() == places[3] / "Food-11"
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path / "kaggle"))
    assert h.find_data().root == places[2] / "Food-11"
    monkeypatch.setenv("HW13_DATA", str(places[1]))
    assert h.find_data().root == places[1] / "Food-11"
    assert h.find_data(places[0] / "Food-11").root == places[0] / "Food-11"


def test_data_folder_below_here(food, tmp_path, monkeypatch):
    shutil.copytree(food, tmp_path / "work/data/Food-11")
    monkeypatch.chdir(tmp_path / "work")
    assert len(h.find_data().files["training"]) == 22
    monkeypatch.chdir(food.parent / "work" / "data")
    assert h.find_data() is not None


def test_nothing_found_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert h.find_data() is None


@pytest.mark.parametrize("mount", ["ml2023spring-hw13", "competitions/ml2023spring-hw13",
                                   "datasets/someone/food", "food11/deeper/inside"])
def test_kaggle_mount_forms(food, tmp_path, monkeypatch, mount):
    (tmp_path / "k/working").mkdir(parents=True)
    shutil.copytree(food, tmp_path / "k/input" / mount / "Food-11")
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path / "k"))
    assert h.find_data().root == tmp_path / "k/input" / mount / "Food-11"


def test_the_competition_wins_over_a_public_copy(food, tmp_path, monkeypatch):
    (tmp_path / "k/working").mkdir(parents=True)
    public_copy(tmp_path / "k/input/a-public-copy")
    shutil.copytree(food, tmp_path / "k/input/competitions/ml2023spring-hw13/Food-11")
    (tmp_path / "k/input/teachers").mkdir()
    (tmp_path / "k/input/teachers" / h.TEACHER_FILE).write_bytes(b"x")
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path / "k"))
    data = h.find_data()
    assert not data.class_folders and data.teacher == tmp_path / "k/input/teachers" / h.TEACHER_FILE


def test_kaggle_without_input_says_what_to_attach(tmp_path, monkeypatch):
    (tmp_path / "k/working").mkdir(parents=True)
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path / "k"))
    with pytest.raises(h.UserError, match="Add Input.*ml2023spring-hw13"):
        h.find_data()


# --- what a folder may hold ------------------------------------------------------------------------------------------


def test_flat_layout(food):
    data = h.find_data(food)
    assert {s: len(f) for s, f in data.files.items()} == {"training": 22, "validation": 11, "evaluation": 5}
    assert data.ids["evaluation"] == ["0000", "0001", "0002", "0003", "0004"]
    assert data.ids["training"] == sorted(data.ids["training"])
    assert all(int(i.split("_")[0]) == k for i, k in zip(data.ids["training"], data.labels["training"], strict=True))
    assert data.labels["evaluation"] == [-1] * 5
    counts = data.counts()
    assert counts.loc["Bread", "training"] == 2 and counts.loc["all", "validation"] == 11
    assert "training 22" in data.describe() and "not Food-11" in data.describe() and not data.is_homework


def test_labels_with_two_digits_keep_the_string_order(food):
    data = h.find_data(food)
    assert data.ids["training"][:4] == ["0_0", "0_1", "10_0", "10_1"] and data.labels["training"][2] == 10


def test_class_folders_are_matched_by_name_not_by_position(tmp_path):
    root = public_copy(tmp_path / "copy")
    (root / "training" / "Bread").rename(root / "training" / "bread ")
    (root / "training" / "Vegetable-Fruit").rename(root / "training" / "vegetable_fruit")
    (root / "training" / ".ipynb_checkpoints").mkdir()
    data = h.find_data(root)
    assert data.class_folders and sorted(data.labels["training"]) == list(range(11))
    assert all(int(p.stem.split("_")[0]) == k for s in h.SPLITS
               for p, k in zip(data.files[s], data.labels[s], strict=True))
    assert data.ids["evaluation"] == [f"{i:04d}" for i in range(11)]
    assert data.files["evaluation"] == sorted(data.files["evaluation"])
    assert "not the homework's split" in data.origin


def test_a_stray_or_missing_class_folder_is_an_error(tmp_path):
    root = public_copy(tmp_path / "copy")
    (root / "training" / "Asian").mkdir()
    with pytest.raises(h.UserError, match="amiss are Asian"):
        h.find_data(root)
    shutil.rmtree(root / "training" / "Asian")
    shutil.rmtree(root / "validation" / "Soup")
    with pytest.raises(h.UserError, match="Soup .missing."):
        h.find_data(root)


def test_stray_files_are_ignored_with_a_count(food):
    for name in ("._0_0.jpg", "Thumbs.db", ".DS_Store", "notes.txt"):
        (food / "training" / name).write_bytes(b"x")
    (food / "training" / "3_99.jpg").write_bytes(b"")
    (food / "training" / "picture.jpg").write_bytes((food / "training" / "0_0.jpg").read_bytes())
    data = h.find_data(food)
    assert len(data.files["training"]) == 22 and len(data.ignored) == 6 and "Ignored 6" in data.describe()


@pytest.mark.parametrize(("harm", "message"), [
    (lambda r: shutil.rmtree(r / "validation"), "no folder 'validation'"),
    (lambda r: [p.unlink() for p in (r / "training").iterdir()], "no usable image"),
    (lambda r: (r / "training/0_0.jpg").rename(r / "training/11_0.jpg"), "11_0.jpg has label 11"),
    (lambda r: [p.rename(p.with_name("x" + p.name)) for p in (r / "training").iterdir()], "no label in their name"),
    (lambda r: save_picture(r / "evaluation/0001.png"), "two images with the id 0001"),
])
def test_a_broken_folder_gives_one_clear_sentence(food, harm, message):
    harm(food)
    with pytest.raises(h.UserError, match=message) as error:
        h.find_data(food)
    assert "\n" not in str(error.value)


def test_a_named_folder_that_is_not_there(tmp_path):
    with pytest.raises(h.UserError, match="there is no folder"):
        h.find_data(tmp_path / "nothing")


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), [("a.jpg", "L"), ("a.jpg", "CMYK"), ("a.png", "P"), ("a.png", "RGBA"),
                                            ("a.png", "LA"), ("a.png", "1"), ("a.png", "I;16")])
def test_every_mode_is_handled_alike_on_both_paths(food, name, mode):
    path = food / "validation" / ("0_0" + name[1:])
    (food / "validation/0_0.jpg").unlink()
    if mode == "I;16":
        Image.fromarray((np.arange(60 * 60).reshape(60, 60) * 18).astype(np.uint16)).save(path)
    else:
        save_picture(path, 3, (60, 60), mode)
    data = h.find_data(food)
    i = data.files["validation"].index(path)
    split = h.load_data(data, "validation", "eval", 40)
    reference = h.eval_transform(40)(h.FoodDataset(data, "validation", lambda im: im)[i][0])
    assert torch.equal(split.images[i], torch.from_numpy(np.array(reference)).permute(2, 0, 1))
    assert split.images[i].float().std() > 5  # neither black nor white


def test_exif_rotation_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save_picture(tmp_path / "a.jpg", 1, (80, 40), exif=exif)
    assert h.open_image(path).size == (40, 80)


def test_a_decompression_bomb_is_refused_by_name(tmp_path, monkeypatch):
    path = save_picture(tmp_path / "bomb.png", 1, (200, 200))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(h.UserError, match="bomb.png.*bomb"):
        h.open_image(path)


def test_a_damaged_training_image_is_left_out_and_named(food, capsys):
    for n in range(2, 12):
        save_picture(food / "training" / f"0_{n}.jpg", n)
    (food / "training/10_1.jpg").write_bytes(b"no picture")
    data = h.find_data(food)
    split = h.load_data(data, "training", "whole", 40)
    assert len(split) == 31 == len(split.images) == len(split.labels) == len(split.aspects)
    assert "10_1.jpg" in capsys.readouterr().out and "10_1" not in split.ids
    last = h.open_image(food / "training" / f"{split.ids[-1]}.jpg").resize((46, 46), Image.Resampling.BILINEAR)
    assert torch.equal(split.images[-1], torch.from_numpy(np.array(last)).permute(2, 0, 1))


def test_many_damaged_training_images_are_an_error(food):
    for n in range(5):
        (food / f"training/{n}_1.jpg").write_bytes(b"no picture")
    with pytest.raises(h.UserError, match="cannot use 5 of 22 images"):
        h.load_data(h.find_data(food), "training", "whole", 40)


def test_a_damaged_evaluation_image_never_loses_its_row(food, capsys):
    whole = (food / "evaluation/0001.jpg").read_bytes()
    (food / "evaluation/0001.jpg").write_bytes(whole[:int(len(whole) * 0.8)])
    (food / "evaluation/0002.jpg").write_bytes(b"no picture")
    (food / "evaluation/0003.jpg").write_bytes(b"")
    split = h.load_data(h.find_data(food), "evaluation", "eval", 40)
    out = capsys.readouterr().out
    assert split.ids == ("0000", "0001", "0002", "0003", "0004") and len(split.images) == 5
    assert "0001.jpg" in out and "as far as it goes" in out and "0002.jpg" in out and "0003.jpg" in out
    assert split.images[1].float().std() > 5
    assert split.images[2].unique().tolist() == [h.NEUTRAL_GREY]
    assert torch.equal(split.images[2], split.images[3])


def test_the_cache_is_reused_and_follows_the_files(food, monkeypatch):
    data = h.find_data(food)
    first = h.load_data(data, "training", "whole", 40)
    monkeypatch.setattr(h, "_decode_all", lambda *a: pytest.fail("decoded twice"))
    assert torch.equal(h.load_data(data, "training", "whole", 40).images, first.images)
    monkeypatch.undo()
    save_picture(food / "training/0_0.jpg", 77, (90, 40))
    again = h.load_data(h.find_data(food), "training", "whole", 40)
    assert again.cache != first.cache and not torch.equal(again.images[0], first.images[0])
    assert again.aspects[0] == 90 / 40


def test_a_cut_cache_file_is_made_again(food):
    data = h.find_data(food)
    split = h.load_data(data, "training", "whole", 41)
    pixels = split.images.clone()
    split.cache.write_bytes(split.cache.read_bytes()[:100])
    assert torch.equal(h.load_data(data, "training", "whole", 41).images, pixels)


def test_decoding_leaves_the_warning_filters_alone(food):
    before = list(warnings.filters)
    h.load_data(h.find_data(food), "training", "whole", 43)
    assert warnings.filters == before


def test_views_and_sizes(food):
    data = h.find_data(food)
    whole, exact = (h.load_data(data, "validation", view, 40) for view in ("whole", "eval"))
    assert whole.images.shape == (11, 3, 46, 46) and exact.images.shape == (11, 3, 40, 40)
    assert whole.images.dtype == torch.uint8 and h.source_size(224) == 256
    assert torch.equal(whole.labels, exact.labels) and whole.aspects.tolist() == [60 / 48] * 11


def test_the_demo_set_is_marked_and_the_same_every_time():
    data = h.make_demo_data()
    assert data.is_demo and "demo" in data.describe() and not data.is_homework
    assert h.make_demo_data().files == data.files
    a, b = (h.draw_dish(4, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(np.asarray(a), np.asarray(b))
