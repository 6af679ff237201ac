"""Folders as people have them: every file is used or named, labels are right however they are
spelled, and what the pictures are is said rightly.
"""

import os
import random
import shutil
from pathlib import Path

import pytest
from conftest import save_picture

import helpers as h

ENDINGS = (".jpg", ".JPG", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif")
FORMATS = {".jpe": "JPEG", ".jfif": "JPEG", ".tif": "TIFF"}


def picture(path, seed=0):
    """A small picture whose ending may be any."""
    kind = FORMATS.get(path.suffix.lower())
    options = {} if kind is None else {"format": kind}
    return save_picture(path, seed, (12, 10), **options)


def every_file(root):
    """All paths below the splits' folders that are no folders, links included."""
    found = set()
    for folder, _, names in os.walk(root):
        if Path(folder) != root:
            found |= {Path(folder) / name for name in names}
    return found


def used(data):
    """All files that a FoodData uses."""
    return [path for paths in data.files.values() for path in paths]


def add_strays(folder, rng):
    """Put some of what lies about in real folders into a split's folder."""
    strays = (
        lambda: (folder / ".DS_Store").write_bytes(b"x"),
        lambda: (folder / "Thumbs.db").write_bytes(b"x"),
        lambda: (folder / "notes.txt").write_text("to do"),
        lambda: (folder / "._0_1.jpg").write_bytes(b"x"),
        lambda: picture(folder / "old" / "0_7.jpg", 3),
        lambda: picture(folder / "__MACOSX" / "0_8.jpg", 4),
        lambda: (folder / "labels.csv").write_text("a,b"),
    )
    for stray in rng.sample(strays, rng.randint(0, len(strays))):
        stray()


def flat_split(folder, rng, n, name_of):
    for i in range(n):
        picture(folder / (name_of(i) + rng.choice(ENDINGS)), i)


def made_up_folder(root, rng):
    """A data folder in a layout that is drawn; {split: number of pictures that must be used}."""
    expected = {}
    by_class = rng.random() < 0.5
    for split in h.SPLITS:
        folder = root / split
        flat = not by_class or (split == "evaluation" and rng.random() < 0.5)
        if flat and split == "evaluation":
            expected[split] = rng.randint(3, 6)
            flat_split(folder, rng, expected[split], "{:04d}".format)
        elif flat:
            expected[split] = 11
            flat_split(folder, rng, 11, "{}_1".format)
        else:
            expected[split] = 11
            for label, name in enumerate(h.CLASS_NAMES):
                spelled = name.replace("/", rng.choice("-_ "))
                picture(folder / spelled / f"a{rng.choice(ENDINGS)}", label)
        if flat or split != "evaluation":
            add_flat_or_class_strays(folder, rng, flat)
    return expected


def add_flat_or_class_strays(folder, rng, flat):
    """Strays that do not change which layout a split has."""
    if flat:
        add_strays(folder, rng)
        return
    (folder / "readme.txt").write_text("x")
    first = sorted(path for path in folder.iterdir() if path.is_dir())[0]
    if rng.random() < 0.5:
        picture(first / "deeper" / "b.jpg", 5)


@pytest.mark.parametrize("seed", range(40))
def test_no_file_is_used_twice_or_goes_unsaid(tmp_path, seed):
    rng = random.Random(seed)
    expected = made_up_folder(tmp_path / "Food-11", rng)
    data = h.read_folder(tmp_path / "Food-11")
    files = used(data)
    assert len(files) == len(set(files))
    assert not set(files) & set(data.ignored)
    assert set(files) | set(data.ignored) == every_file(tmp_path / "Food-11")
    assert {split: len(paths) for split, paths in data.files.items()} == expected
    if data.ignored:
        assert f"Ignored {h.counted(len(data.ignored), 'file')}" in data.account()
        for why in set(data.ignored.values()):
            assert why in data.account()


@pytest.mark.parametrize("seed", range(15))
def test_labels_are_those_of_the_folders_however_they_are_spelled(tmp_path, seed):
    rng = random.Random(seed)
    spell_class = rng.choice(
        [
            lambda label: h.CLASS_NAMES[label].replace("/", "-").upper(),
            lambda label: h.CLASS_NAMES[label].replace("/", "_").replace(" ", "_").lower(),
            str,
            "{:02d}".format,
        ]
    )
    names = rng.choice(
        [
            ("train", "valid", "test"),
            ("Training", "Validation", "Evaluation"),
            ("train", "val", "eval"),
        ]
    )
    root = tmp_path / rng.choice(["Food-11", "archive/food11", "Food-11/Food-11"])
    for name in names:
        for label in range(h.NUM_CLASSES):
            picture(root / name / spell_class(label) / f"{label}.jpg", label)
    data = h.read_folder(tmp_path / root.relative_to(tmp_path).parts[0])
    for split in h.SPLITS:
        assert [int(path.stem) for path in data.files[split]] == data.labels[split]
        assert sorted(data.labels[split]) == list(range(h.NUM_CLASSES))
    assert data.has_evaluation_labels


def test_an_evaluation_image_never_loses_its_row_in_silence(food):
    (food / "evaluation/0005.webp").write_bytes(b"no picture")
    picture(food / "evaluation/0006.jfif")
    (food / "evaluation/0007").write_bytes(b"x")  # an id without an ending
    data = h.read_folder(food)
    assert data.ids["evaluation"] == [f"{i:04d}" for i in range(8)]

    (food / "evaluation/0008.jpg").symlink_to(food / "nowhere.jpg")
    with pytest.raises(h.UserError, match="0008.jpg"):
        h.read_folder(food)


def test_broken_links_and_loose_pictures_are_named(food):
    (food / "training/3_9.jpg").symlink_to(food / "nowhere.jpg")
    data = h.read_folder(food)
    assert data.ignored == {food / "training/3_9.jpg": h.BROKEN_LINK}
    assert "training/3_9.jpg" in data.account()


def test_run_predict_and_evaluate_say_the_same_of_what_is_ignored(
    food, teacher_file, tmp_path, capsys
):
    (food / "training/notes.txt").write_text("x")
    (food / "evaluation/list.txt").write_text("x")
    settings = ["--set", "image_size=64", "--set", "n_epochs=1"]
    out = str(tmp_path / "out")
    where = ["--data", str(food)]
    said = []
    assert h.main(["run", *where, "--out", out, "--stages", "simple", *settings]) == 0
    said.append(capsys.readouterr().out)
    student = ["--checkpoint", f"{out}/simple/student_best.ckpt"]
    assert h.main(["evaluate", *where, *student]) == 0
    said.append(capsys.readouterr().out)
    assert h.main(["predict", *where, *student, "--out", str(tmp_path / "my.csv")]) == 0
    said.append(capsys.readouterr().out)
    for text in said:
        assert "Ignored 2 files, no pictures: 2 (training/notes.txt, evaluation/list.txt)." in (
            text.replace(
                "evaluation/list.txt, training/notes.txt", "training/notes.txt, evaluation/list.txt"
            )
        )


def test_each_command_asks_for_what_it_reads(food, teacher_file, tmp_path):
    settings = ["--set", "image_size=64", "--set", "n_epochs=1"]
    out = str(tmp_path / "out")
    run = ["run", "--data", str(food), "--out", out, "--stages", "simple", *settings]
    assert h.main(run) == 0
    student = ["--checkpoint", f"{out}/simple/student_best.ckpt"]
    alone = tmp_path / "alone"
    shutil.copytree(food / "validation", alone / "validation")
    assert h.main(["evaluate", "--data", str(alone), *student]) == 0
    plain = tmp_path / "pictures"
    shutil.copytree(food / "evaluation", plain)
    csv = tmp_path / "plain.csv"
    assert h.main(["predict", "--data", str(plain), *student, "--out", str(csv)]) == 0
    assert h.validate_submission(csv, [f"{n:04d}" for n in range(5)]) == 5


def known_data(counts, evaluation_labels=False, class_folders=False):
    """A FoodData of so many files that need not exist."""
    files = {}
    labels = {}
    ids = {}
    for split, n in counts.items():
        files[split] = [Path(split) / f"{i}.jpg" for i in range(n)]
        labels[split] = [i % h.NUM_CLASSES for i in range(n)]
        ids[split] = [f"{i:04d}" for i in range(n)]
    if not evaluation_labels:
        labels["evaluation"] = [-1] * counts["evaluation"]
    return h.FoodData(Path("nowhere"), "", files, labels, ids, {}, None, class_folders)


def test_what_the_data_is_follows_from_counts_and_names():
    homework = known_data(h.HOMEWORK_COUNTS)
    assert h.origin_of(homework) == "Food-11 of the homework"
    assert homework.is_homework
    of_2022 = known_data(h.ORIGINAL_COUNTS)
    assert h.origin_of(of_2022) == "Food-11 of homework 13 of 2022"
    assert not of_2022.is_homework
    original = known_data(h.ORIGINAL_COUNTS, evaluation_labels=True)
    assert "original distribution" in h.origin_of(original)
    others = {"training": 500, "validation": 100, "evaluation": 100}
    wanted = "photographs of no known set (not the homework's Food-11)"
    assert h.origin_of(known_data(others)) == wanted


def test_one_file_less_is_still_the_homeworks_data_and_said(monkeypatch):
    monkeypatch.setattr(h, "copies_between_splits", lambda files: {})  # there are no files
    data = known_data(h.HOMEWORK_COUNTS | {"training": 9_992})
    assert data.is_homework
    assert "Food-11 of the homework" in h.origin_of(data)
    assert any("1" in sentence and "training" in sentence for sentence in h.what_is_amiss(data))


def test_what_is_probably_wrong_is_a_warning(food):
    for n in range(2):
        (food / f"training/4_{n}.jpg").unlink()
    shutil.copy(food / "validation/0_0.jpg", food / "training/0_77.jpg")
    shutil.copy(food / "evaluation/0001.jpg", food / "evaluation/0001 (1).jpg")
    account = h.read_folder(food).account()
    assert "no training image of Fried food" in account
    assert "1 of 11 validation images are byte for byte training images too" in account
    assert "0001 (1)" in account


def test_an_archive_and_a_split_alone_say_what_to_do(food, tmp_path):
    packed = tmp_path / "food.zip"
    packed.write_bytes(b"PK")
    with pytest.raises(h.UserError, match="unpack it"):
        h.read_folder(packed)
    with pytest.raises(h.UserError, match="the folder above"):
        h.read_folder(food / "training")


def test_a_tilde_is_the_home_folder(food, monkeypatch):
    monkeypatch.setenv("HOME", str(food.parent))
    assert len(h.read_folder("~/Food-11").files["training"]) == 22


def test_the_home_of_somebody_unknown_is_a_folder_that_is_not_there():
    with pytest.raises(h.UserError, match="there is no folder ~nobody-of-this-name/Food-11"):
        h.read_folder("~nobody-of-this-name/Food-11")
    with pytest.raises(h.UserError, match="there is no file ~nobody-of-this-name/a.ckpt"):
        h.load_file("~nobody-of-this-name/a.ckpt")


@pytest.mark.parametrize("name", ["カレー\u30001", "Screenshot 4.02\u202fPM", "crème brûlée 1"])
def test_any_words_may_name_an_evaluation_image(food, name):
    save_picture(food / "evaluation" / f"{name}.jpg", 7)
    assert name in h.read_folder(food).ids["evaluation"]


@pytest.mark.parametrize("sign", ["\n", "\x07", "\u2028"])
def test_a_name_with_signs_that_no_csv_holds_is_an_error(food, sign):
    save_picture(food / "evaluation" / f"a{sign}b.jpg", 7)
    with pytest.raises(h.UserError, match="a name that is no text"):
        h.read_folder(food)


def class_folder_split(folder, spell=str):
    """A split with a picture in a folder for each class."""
    for label in range(h.NUM_CLASSES):
        picture(folder / spell(label) / f"{folder.name}_{label}.png", label)


def test_a_loose_picture_beside_class_folders_is_named_and_an_evaluation_one_has_a_row(tmp_path):
    for split in h.SPLITS:
        class_folder_split(tmp_path / split)
        picture(tmp_path / split / "loose.jpg", 70)
    data = h.read_folder(tmp_path)
    for split in ("training", "validation"):
        assert data.ignored[tmp_path / split / "loose.jpg"] == h.LOOSE
        assert f"{split}/loose.jpg" in data.account()
    loose = data.files["evaluation"].index(tmp_path / "evaluation/loose.jpg")
    assert data.labels["evaluation"][loose] == -1
    assert len(data.ids["evaluation"]) == 12


def test_a_picture_in_no_split_is_said_to_be_ignored(food):
    picture(food / "soup.jpg", 1)
    picture(food / "more/rice.png", 2)
    (food / "notes.txt").write_text("mine")
    data = h.read_folder(food)
    assert data.ignored == {food / "soup.jpg": h.OUTSIDE, food / "more/rice.png": h.OUTSIDE}
    assert "in no split's folder: 2 (soup.jpg, more/rice.png)" in data.account()
    # A folder that is itself the split has no outside.
    assert h.read_folder(food / "evaluation", ("evaluation",)).ignored == {}


def test_a_picture_is_known_by_its_first_bytes_and_read_without_a_name_for_it(food):
    (food / "training/3_0.jpg").rename(food / "training/3_0.download")
    (food / "training/3_1.jpg").rename(food / "training/3_1")
    (food / "training/3_2.txt").write_text("3 0.5 0.5")
    data = h.read_folder(food)
    assert data.labels["training"].count(3) == 2
    assert data.ignored == {food / "training/3_2.txt": h.NO_PICTURE}
    assert len(h.load_data(data, "training", "eval", 40)) == 22


def test_a_pipe_or_a_link_to_itself_is_named_and_never_opened(food):
    os.mkfifo(food / "training/3_8")
    (food / "training/3_9.jpg").symlink_to(food / "training/3_9.jpg")
    (food / "training/up").symlink_to(food)
    data = h.read_folder(food)
    assert data.ignored == {
        food / "training/3_8": h.NOT_A_FILE,
        food / "training/3_9.jpg": h.BROKEN_LINK,
        food / "training/up": h.NOT_A_FILE,
    }


def test_many_lost_training_pictures_are_refused(food):
    for n in range(3):
        (food / f"training/{n}_0.jpg").write_bytes(b"")
    with pytest.raises(h.UserError, match="3 of 22 images are empty or broken links.*0_0.jpg"):
        h.read_folder(food)


def test_a_submission_follows_the_evaluation_folders_own_form(food, tmp_path, capsys):
    csv = tmp_path / "stage.csv"
    csv.write_text("Id,Category\n")
    shutil.rmtree(food / "training")
    class_folder_split(food / "training", "{:02d}".format)
    data = h.read_folder(food)
    assert data.ids["evaluation"] == [f"{n:04d}" for n in range(5)]
    assert h.copy_submission(csv, data, tmp_path, "") == tmp_path / "submission.csv"

    # As first distributed: the label is in the name.
    for n in range(5):
        (food / f"evaluation/{n:04d}.jpg").rename(food / f"evaluation/{10 - n}_{n}.jpg")
    data = h.read_folder(food)
    assert data.labels["evaluation"] == [10, 6, 7, 8, 9]
    assert "labels of its evaluation images are known" in data.account()
    assert h.copy_submission(csv, data, tmp_path, "") is None
    assert "no submission.csv" in capsys.readouterr().out


def test_a_second_folder_of_a_split_and_a_doubled_one(food):
    shutil.copytree(food / "evaluation", food / "test")
    data = h.read_folder(food)
    assert set(data.ignored.values()) == {h.SECOND_FOLDER}
    assert len(data.ignored) == 5
    shutil.rmtree(food / "evaluation")
    (food / "test").rename(food / "inner")
    (food / "test").mkdir()
    (food / "inner").rename(food / "test/test")
    assert h.read_folder(food).ids["evaluation"] == [f"{n:04d}" for n in range(5)]


def test_a_doubled_folder_that_is_a_link_to_class_folders(food, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for path in sorted((food / "training").iterdir()):
        label, _, rest = path.name.partition("_")
        (elsewhere / label).mkdir(parents=True, exist_ok=True)
        path.rename(elsewhere / label / rest)
    (food / "training/images").symlink_to(elsewhere, target_is_directory=True)
    assert len(h.read_folder(food).files["training"]) == 22


def test_a_picture_beside_the_data_does_not_hide_it(food):
    save_picture(food.parent / "screenshot.png", 1)
    data = h.read_folder(food.parent, needed=("evaluation",))
    assert data.root == food
    assert len(data.ids["evaluation"]) == 5
    # Alone it is what is meant.
    assert h.read_folder(food / "evaluation", needed=("evaluation",)).root == food / "evaluation"


def test_the_folder_in_which_one_stands_is_a_folder_like_any_other(food, monkeypatch):
    (food.parent / h.TEACHER_FILE).write_bytes(b"")
    monkeypatch.chdir(food)
    assert h.read_folder(".").teacher_path == food.parent / h.TEACHER_FILE
    monkeypatch.chdir(food / "training")
    with pytest.raises(h.UserError, match="Name the folder above it"):
        h.read_folder(".")


def test_an_unusable_split_that_is_not_needed_is_named(food):
    (food / "training/0_0.jpg").rename(food / "training/99_0.jpg")
    data = h.read_folder(food, needed=("evaluation",))
    assert set(data.ignored.values()) == {h.UNUSABLE_SPLIT}
    assert len(data.ignored) == 22
    with pytest.raises(h.UserError, match="99"):
        h.read_folder(food)


def test_other_spellings_here_and_on_kaggle_and_an_archive_beside_the_notebook(
    food, tmp_path, monkeypatch
):
    (food / "training").rename(food / "train")
    (food / "validation").rename(food / "Valid")
    (food / "evaluation").rename(food / "test")
    here = tmp_path / "here"
    shutil.copytree(food, here / "food11")
    monkeypatch.chdir(here)
    assert h.find_data().root.name == "food11"
    shutil.rmtree("food11")
    # The competition's archive, unpacked into a folder of its name, or as it came.
    shutil.copytree(food, "ml2023spring-hw13/Food-11")
    assert h.find_data().root == Path("ml2023spring-hw13/Food-11")
    # The archive may still lie beside what came out of it.
    Path("ml2023spring-hw13.zip").write_bytes(b"PK")
    assert h.find_data().root == Path("ml2023spring-hw13/Food-11")
    shutil.rmtree("ml2023spring-hw13")
    for packed in ("food-11.zip", "Food-11.tar.gz", "ml2023spring-hw13.zip"):
        Path(packed).write_bytes(b"PK")
        with pytest.raises(h.UserError, match="unpack it"):
            h.find_data()
        Path(packed).unlink()
    (tmp_path / "k/working").mkdir(parents=True)
    shutil.copytree(food, tmp_path / "k/input/a/b")
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path / "k"))
    assert h.find_data().root == tmp_path / "k/input/a/b"


def test_counts_far_from_a_known_sets_are_not_it():
    for change in ({"training": 9_000, "validation": 4_000}, {"training": 500, "evaluation": 9}):
        assert h.known_set(known_data(h.HOMEWORK_COUNTS | change)) is None
    half = known_data(h.HOMEWORK_COUNTS | {"evaluation": 1_100})
    assert half.is_homework
    assert "evaluation 1,100 of 2,218; 1,118 evaluation images missing (1100, " in (
        h.describe_difference(half, h.known_set(half))
    )
