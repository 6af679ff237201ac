"""Finding, reading and decoding data.

Both layouts, every image mode, stray and damaged files, the cache.
"""

import os
import shutil
import struct
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import save_picture
from PIL import Image, ImageOps

import helpers as h


def public_copy(root):
    """Class folders as public copies have them, with their own spelling."""
    names = [name.replace("/", "-") for name in h.CLASS_NAMES]
    for split in h.SPLITS:
        for label, name in enumerate(names):
            save_picture(root / split / name / f"{label}_0.jpg", label)
    return root


def label_in(name):
    """The number before a file name's first underscore."""
    return int(name.split("_")[0])


def pixels_of(image):
    """A PIL image as a uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# --- where data is looked for ---------------------------------------------------------------------


def test_the_argument_wins_then_the_variable_then_kaggle_then_here(food, tmp_path, monkeypatch):
    argument = tmp_path / "argument"
    variable = tmp_path / "variable"
    mount = tmp_path / "kaggle/input/x"
    here = tmp_path / "here"
    for place in (argument, variable, mount, here):
        shutil.copytree(food, place / "Food-11")
    monkeypatch.chdir(here)
    assert h.find_data().root.resolve() == here / "Food-11"
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path / "kaggle"))
    assert h.find_data().root == mount / "Food-11"
    monkeypatch.setenv("HW13_DATA", str(variable))
    assert h.find_data().root == variable / "Food-11"
    assert h.find_data(argument / "Food-11").root == argument / "Food-11"


def test_data_folder_below_here(food, tmp_path, monkeypatch):
    shutil.copytree(food, tmp_path / "work/data/Food-11")
    monkeypatch.chdir(tmp_path / "work")
    assert len(h.find_data().files["training"]) == 22
    monkeypatch.chdir(food.parent / "work" / "data")
    assert h.find_data() is not None


def test_nothing_found_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert h.find_data() is None


@pytest.mark.parametrize(
    "mount",
    [
        "ml2023spring-hw13",
        "competitions/ml2023spring-hw13",
        "datasets/someone/food",
        "food11/deeper/inside",
    ],
)
def test_kaggle_mount_forms(food, tmp_path, monkeypatch, mount):
    (tmp_path / "k/working").mkdir(parents=True)
    shutil.copytree(food, tmp_path / "k/input" / mount / "Food-11")
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path / "k"))
    assert h.find_data().root == tmp_path / "k/input" / mount / "Food-11"


def test_the_competition_wins_over_a_public_copy(food, tmp_path, monkeypatch):
    inputs = tmp_path / "k/input"
    (tmp_path / "k/working").mkdir(parents=True)
    public_copy(inputs / "a-public-copy")
    shutil.copytree(food, inputs / "competitions/ml2023spring-hw13/Food-11")
    (inputs / "teachers").mkdir()
    (inputs / "teachers" / h.TEACHER_FILE).write_bytes(b"x")
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path / "k"))
    data = h.find_data()
    assert not data.class_folders
    assert data.teacher_path == inputs / "teachers" / h.TEACHER_FILE


def test_kaggle_without_input_says_what_to_attach(tmp_path, monkeypatch):
    (tmp_path / "k/working").mkdir(parents=True)
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path / "k"))
    with pytest.raises(h.UserError, match="Add Input.*ml2023spring-hw13"):
        h.find_data()


# --- what a folder may hold -----------------------------------------------------------------------


def test_flat_layout(food):
    data = h.find_data(food)
    counts = {split: len(files) for split, files in data.files.items()}
    assert counts == {"training": 22, "validation": 11, "evaluation": 5}
    assert data.ids["evaluation"] == ["0000", "0001", "0002", "0003", "0004"]
    assert data.ids["training"] == sorted(data.ids["training"])
    assert [label_in(name) for name in data.ids["training"]] == data.labels["training"]
    assert data.labels["evaluation"] == [-1] * 5
    assert not data.is_homework


def test_counts_and_description_of_the_flat_layout(food):
    data = h.find_data(food)
    counts = data.counts()
    assert counts.loc["Bread", "training"] == 2
    assert counts.loc["all", "validation"] == 11
    assert "training 22" in data.describe()
    assert "not the homework's Food-11" in data.describe()


def test_labels_with_two_digits_keep_the_string_order(food):
    data = h.find_data(food)
    assert data.ids["training"][:4] == ["0_0", "0_1", "10_0", "10_1"]
    assert data.labels["training"][2] == 10


def test_class_folders_are_matched_by_name_not_by_position(tmp_path):
    root = public_copy(tmp_path / "copy")
    (root / "training" / "Bread").rename(root / "training" / "bread ")
    (root / "training" / "Vegetable-Fruit").rename(root / "training" / "vegetable_fruit")
    (root / "training" / ".ipynb_checkpoints").mkdir()
    data = h.find_data(root)
    assert data.class_folders
    assert sorted(data.labels["training"]) == list(range(11))
    for split in h.SPLITS:
        assert [label_in(path.stem) for path in data.files[split]] == data.labels[split]
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
    shutil.copy(food / "training" / "0_0.jpg", food / "training" / "picture.jpg")
    data = h.find_data(food)
    assert len(data.files["training"]) == 22
    assert len(data.ignored) == 6
    assert "Ignored 6" in data.describe()


def remove_a_split(root):
    shutil.rmtree(root / "validation")


def empty_a_split(root):
    for path in (root / "training").iterdir():
        path.unlink()


def give_a_label_out_of_range(root):
    (root / "training/0_0.jpg").rename(root / "training/11_0.jpg")


def take_the_labels_from_the_names(root):
    for path in list((root / "training").iterdir()):
        path.rename(path.with_name("x" + path.name))


def use_an_id_twice(root):
    save_picture(root / "evaluation/0001.png")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove_a_split, "no folder 'validation'"),
        (empty_a_split, "no usable image"),
        (give_a_label_out_of_range, "11_0.jpg has label 11"),
        (take_the_labels_from_the_names, "no label in their name"),
        (use_an_id_twice, "two images with the id 0001"),
    ],
)
def test_a_broken_folder_gives_one_clear_sentence(food, harm, message):
    harm(food)
    with pytest.raises(h.UserError, match=message) as error:
        h.find_data(food)
    assert "\n" not in str(error.value)


def test_a_named_folder_that_is_not_there(tmp_path):
    with pytest.raises(h.UserError, match="there is no folder"):
        h.find_data(tmp_path / "nothing")


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        (".jpg", "L"),
        (".jpg", "CMYK"),
        (".png", "P"),
        (".png", "RGBA"),
        (".png", "LA"),
        (".png", "1"),
        (".png", "I;16"),
    ],
)
def test_every_mode_is_handled_alike_on_both_paths(food, suffix, mode):
    path = food / "validation" / f"0_0{suffix}"
    (food / "validation/0_0.jpg").unlink()
    if mode == "I;16":
        ramp = np.arange(60 * 60).reshape(60, 60) * 18
        Image.fromarray(ramp.astype(np.uint16)).save(path)
    else:
        save_picture(path, 3, (60, 60), mode)
    data = h.find_data(food)
    i = data.files["validation"].index(path)
    split = h.load_data(data, "validation", "eval", 40)
    reference, _ = h.FoodDataset(data, "validation", h.eval_transform(40))[i]
    assert torch.equal(split.images[i], pixels_of(reference))
    assert split.images[i].float().std() > 5  # neither black nor white


def test_exif_rotation_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save_picture(tmp_path / "a.jpg", 1, (80, 40), exif=exif)
    assert h.open_image(path).size == (40, 80)


def test_every_exif_turn_is_pils_own(tmp_path):
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = save_picture(tmp_path / f"{orientation}.png", 1, (80, 40), exif=exif)
        with Image.open(path) as image:
            wanted = pixels_of(ImageOps.exif_transpose(image).convert("RGB"))
        assert torch.equal(pixels_of(h.open_image(path)), wanted)


def test_odd_exif_data_beside_good_pixels_does_no_harm(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save_picture(tmp_path / "a.jpg", 1, (80, 40), exif=exif)

    def fail(*args, **options):
        raise struct.error("argument out of range")

    # As entries that do not fit their type do where the data is written anew.
    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    assert h.open_image(path).size == (40, 80)
    # As those do that cannot even be read.
    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert h.open_image(path).size == (80, 40)


def test_a_picture_of_16_bit_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.arange(80 * 40, dtype=np.uint16).reshape(40, 80)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert h.open_image(tmp_path / "a.png").size == (40, 80)


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
    assert len(split) == 31
    assert len(split.images) == 31
    assert len(split.labels) == 31
    assert len(split.aspects) == 31
    assert "10_1.jpg" in capsys.readouterr().out
    assert "10_1" not in split.ids
    last = h.open_image(food / "training" / f"{split.ids[-1]}.jpg")
    last = last.resize((46, 46), Image.Resampling.BILINEAR)
    assert torch.equal(split.images[-1], pixels_of(last))


def test_many_damaged_training_images_are_an_error(food):
    for n in range(5):
        (food / f"training/{n}_1.jpg").write_bytes(b"no picture")
    with pytest.raises(h.UserError, match="cannot use 5 of 22 images"):
        h.load_data(h.find_data(food), "training", "whole", 40)


def test_a_split_without_an_image_that_can_be_decoded_is_an_error(tmp_path):
    for split in h.SPLITS:
        save_picture(tmp_path / split / "0_0.jpg", 1)
    (tmp_path / "validation/0_0.jpg").write_bytes(b"no picture")
    with pytest.raises(h.UserError, match="cannot use 1 of 1 images: .*0_0.jpg"):
        h.load_data(h.read_folder(tmp_path), "validation", "eval", 40)


def test_a_damaged_evaluation_image_never_loses_its_row(food, capsys):
    whole = (food / "evaluation/0001.jpg").read_bytes()
    (food / "evaluation/0001.jpg").write_bytes(whole[: int(len(whole) * 0.8)])
    (food / "evaluation/0002.jpg").write_bytes(b"no picture")
    (food / "evaluation/0003.jpg").write_bytes(b"")
    split = h.load_data(h.find_data(food), "evaluation", "eval", 40)
    out = capsys.readouterr().out
    assert split.ids == ("0000", "0001", "0002", "0003", "0004")
    assert len(split.images) == 5
    for text in ("0001.jpg", "as far as it goes", "0002.jpg", "0003.jpg"):
        assert text in out
    assert split.images[1].float().std() > 5
    assert split.images[2].unique().tolist() == [h.NEUTRAL_GREY]
    assert torch.equal(split.images[2], split.images[3])


# --- the cache ------------------------------------------------------------------------------------


def test_the_cache_is_reused_and_follows_the_files(food, monkeypatch):
    data = h.find_data(food)
    first = h.load_data(data, "training", "whole", 40)
    with monkeypatch.context() as patch:
        patch.setattr(h, "decode_all", lambda *args: pytest.fail("decoded twice"))
        assert torch.equal(h.load_data(data, "training", "whole", 40).images, first.images)
    save_picture(food / "training/0_0.jpg", 77, (90, 40))
    again = h.load_data(h.find_data(food), "training", "whole", 40)
    assert again.cache != first.cache
    assert not torch.equal(again.images[0], first.images[0])
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


def test_forms_and_sizes(food):
    data = h.find_data(food)
    whole = h.load_data(data, "validation", "whole", 40)
    evaluated = h.load_data(data, "validation", "eval", 40)
    assert whole.form == "whole"
    assert evaluated.form == "eval"
    assert whole.images.shape == (11, 3, 46, 46)
    assert evaluated.images.shape == (11, 3, 40, 40)
    assert whole.images.dtype == torch.uint8
    assert h.source_size(224) == 256
    assert torch.equal(whole.labels, evaluated.labels)
    assert whole.aspects.tolist() == [60 / 48] * 11


def test_without_user_numbers_the_cache_folder_bears_the_users_name(tmp_path, monkeypatch):
    """Windows has no os.getuid."""
    monkeypatch.delenv("HW13_CACHE")
    monkeypatch.delattr("os.getuid")
    monkeypatch.setattr("getpass.getuser", lambda: "someone")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert h.cache_root() == tmp_path / "hw13_cache_someone"


# --- the drawn demo set ---------------------------------------------------------------------------


def test_the_demo_set_is_marked_and_the_same_every_time():
    data = h.make_demo_data()
    assert data.is_demo
    assert "demo" in data.describe()
    assert not data.is_homework
    assert h.make_demo_data().files == data.files
    once = h.draw_dish(4, np.random.default_rng(3))
    twice = h.draw_dish(4, np.random.default_rng(3))
    assert np.array_equal(np.asarray(once), np.asarray(twice))


def labels_in_names(folder):
    """{number: label} of the files <label>_<number>.jpg of a folder."""
    pairs = [path.stem.split("_") for path in folder.iterdir()]
    return {int(number): int(label) for label, number in pairs}


def test_three_training_labels_in_ten_of_the_demo_set_are_wrong_and_no_other_ones(tmp_path):
    h.draw_split(tmp_path / "right/training", 20, 5)
    h.draw_split(tmp_path / "wrong/training", 20, 5, h.DEMO_WRONG_LABELS)
    right = labels_in_names(tmp_path / "right/training")
    wrong = labels_in_names(tmp_path / "wrong/training")
    assert list(Counter(right.values()).values()) == [20] * h.NUM_CLASSES
    assert set(wrong.values()) == set(range(h.NUM_CLASSES))
    n_wrong = sum(right[number] != wrong[number] for number in right)
    assert abs(n_wrong - 66) < 25  # three standard deviations of 220 draws are 20

    data = h.make_demo_data()
    per_class = h.FAST_DEMO_PICTURES
    assert set(Counter(data.labels["validation"]).values()) == {per_class["validation"]}
    theirs = h.with_teacher_pictures(data).labels["training"]
    assert set(Counter(theirs).values()) == {per_class[h.DEMO_TEACHER_FOLDER]}


def test_the_demo_sets_teacher_has_pictures_that_no_student_sees(tmp_path, capsys):
    data = h.make_demo_data()
    theirs = h.with_teacher_pictures(data)
    assert len(theirs.files["training"]) == 110
    assert not set(theirs.files["training"]) & set(data.files["training"])
    assert theirs.files["validation"] == data.files["validation"]
    assert not any(h.DEMO_TEACHER_FOLDER in str(path) for path in h.find_data(data.root).ignored)
    h.train_teacher(data, tmp_path / "out")
    assert "110 images in" in capsys.readouterr().out

    # Copied without them, it has the training images alone.
    shutil.copytree(data.root, tmp_path / "Food-11")
    copied = h.find_data(tmp_path / "Food-11")
    assert copied.is_demo
    assert h.with_teacher_pictures(copied) is copied


def test_another_seed_draws_another_demo_set():
    data = h.make_demo_data()
    other = h.make_demo_data(seed=1)
    assert other.root != data.root
    first = data.files["validation"][0].read_bytes()
    assert all(path.read_bytes() != first for path in other.files["validation"])


def test_only_pictures_are_decoded(food):
    """PostScript called .jpg would start another program, and may never end."""
    path = food / "evaluation/0001.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n")
    with pytest.raises(h.UserError, match="0001.jpg cannot be decoded .UnidentifiedImageError"):
        h.open_image(path)
    assert "EPS" not in h.picture_formats()
    assert {"JPEG", "PNG", "GIF", "BMP", "TIFF"} <= set(h.picture_formats())


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (10_000_000, 1)])
def test_a_strip_cannot_be_decoded_and_its_evaluation_row_stays(food, size, capsys):
    Image.new("L", size).save(food / "evaluation/0001.png")
    (food / "evaluation/0001.jpg").unlink()
    data = h.find_data(food)
    for form in ("eval", "whole"):
        split = h.load_data(data, "evaluation", form, 64)
        assert split.ids == ("0000", "0001", "0002", "0003", "0004")
        out = capsys.readouterr().out
        assert f"0001.png cannot be decoded (ValueError: a strip of {size[0]} x {size[1]}" in out
        assert "replaced by a grey picture" in out


def test_a_long_picture_is_still_one(food):
    Image.new("RGB", (2_000, 10), (200, 10, 10)).save(food / "training/0_0.jpg")
    split = h.load_data(h.find_data(food), "training", "eval", 64)
    assert len(split) == 22


def test_the_demo_set_is_drawn_once_and_what_a_killed_drawing_left_is_removed(
    tmp_path, monkeypatch, capsys
):
    def cannot_write(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("HW13_CACHE", str(tmp_path))
    for name, age in (("old", 2 * 86_400), ("young", 60)):
        left = tmp_path / f"demo-drawing-{name}"
        left.mkdir()
        os.utime(left, (time.time() - age,) * 2)
    root = h.make_demo_data().root
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([root.parent.name, "demo-drawing-young"])

    # Of several processes of a machine the first draws.
    def drawn(*arguments):
        raise AssertionError("a second process draws")

    monkeypatch.setattr(h, "draw_split", drawn)
    assert h.make_demo_data().root == root
    monkeypatch.undo()
    monkeypatch.setenv("HW13_CACHE", str(tmp_path))
    # Cleaners of temporary folders take the files that nobody has read for long.
    for lost in (
        root / h.DEMO_MARK,
        root / "evaluation/0003.jpg",
        root.parent / h.DEMO_TEACHER_FOLDER,
    ):
        if lost.is_dir():
            shutil.rmtree(lost)
        else:
            lost.unlink()
        assert h.make_demo_data().is_demo
        assert lost.exists()
    # Where nothing can be written what is left is used as it is.
    (root / "evaluation/0003.jpg").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cannot_write)
        assert len(h.make_demo_data().files["evaluation"]) == 43
    assert "cannot be drawn anew there" in capsys.readouterr().out
    shutil.rmtree(root)
    monkeypatch.setattr(h, "is_first_on_node", lambda: False)
    with pytest.raises(h.UserError, match="no folder"):
        h.make_demo_data()
