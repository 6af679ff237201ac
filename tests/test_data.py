"""A folder becomes FoodData, and its pictures a Split: places, layouts, decoding, the cache.

Folders that are not usable are in test_faults.py.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import save_picture
from PIL import Image
from torchvision import transforms

import helpers as h


def touched(root, pattern="{label}_0.jpg", splits=h.SPLITS):
    """A folder of empty pictures, one per class and split, for what opens none."""
    for split in splits:
        for label, name in enumerate(h.CLASS_NAMES):
            name = name.replace("/", "-")
            path = root / split / pattern.format(label=label, name=name, lower=name.lower())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def labels_in(paths):
    """The numbers before the underscores of files' names."""
    return [int(path.name.partition("_")[0]) for path in paths]


def pixels(image):
    """A PIL image as a uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def loaded(root, split="training", form="eval", image_size=40):
    return h.load_data(h.read_folder(root), split, form, image_size)


# --- where data is looked for ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "here/Food-11",
        "here/food11-hw13",
        "here/data/Food-11",
        "here/ml2022spring-hw13/food11-hw13",
        "working/Food-11",
        "working/food11-hw13",
        "working/ml2023spring-hw13/Food-11/Food-11",
        "input/ml2023spring-hw13/Food-11",
        "input/competitions/ml2023spring-hw13/Food-11",
        "input/datasets/someone/food11-image-dataset",
        "input/food11/deeper/inside",
    ],
)
def test_data_is_found_near_the_notebook_in_kaggles_inputs_and_where_a_cell_unpacks_it(
    tmp_path, monkeypatch, place
):
    root = touched(tmp_path / place)
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path))
    monkeypatch.chdir(tmp_path / place.partition("/")[0])
    assert h.find_data().root.absolute() == root


def test_the_argument_wins_then_the_variable_then_an_input_then_here(tmp_path, monkeypatch):
    names = ("variable", "kaggle/input/x", "here/Food-11")
    variable, attached, here = (touched(tmp_path / name) for name in names)
    monkeypatch.chdir(here.parent)
    assert h.find_data().root.absolute() == here
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path / "kaggle"))
    assert h.find_data().root == attached
    monkeypatch.setenv("HW13_DATA", str(variable))
    assert h.find_data().root == variable
    assert h.find_data(here).root == here


def test_the_competition_wins_and_a_teacher_may_be_attached_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path))
    touched(tmp_path / "input/a-public-copy")
    competition = touched(tmp_path / "input/competitions/ml2023spring-hw13/Food-11")
    teacher = save_picture(tmp_path / "input/teachers/a.jpg")
    teacher = teacher.rename(teacher.with_name(h.TEACHER_FILE))
    assert h.find_data().root == competition
    assert h.find_data().teacher_path == teacher


# --- what a folder holds --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "splits"),
    [
        ("{label}_0.jpg", "train val test"),  # as first distributed
        ("{name}/{label}_0.jpg", "training validation evaluation"),
        ("{lower} /{label}_0.JPG", "Training Valid TEST"),
        ("{label}/{label}_0.png", "train valid eval"),
        ("{label:02d}/{label}_0.jpeg", "training validation testing"),
    ],
)
def test_labels_are_those_of_the_names_in_both_layouts_and_all_spellings(tmp_path, pattern, splits):
    root = touched(tmp_path / "archive", pattern, splits.split())
    # What systems leave behind is no picture, and shifts no label.
    touched(root, ".ipynb_checkpoints/{label}_9.jpg", splits.split())
    data = h.read_folder(tmp_path)
    assert data.root == root
    for split in ("training", "validation"):
        assert data.labels[split] == labels_in(data.files[split])
        assert set(data.labels[split]) == set(range(11))
    # Labels of evaluation images are never read.
    assert data.labels["evaluation"] == [-1] * 11
    if "/" in pattern:  # where names may be alike
        assert data.ids["evaluation"] == [f"{n:04d}" for n in range(11)]


def test_ids_are_the_names_in_their_order_and_counts_say_what_is_there(food):
    data = h.read_folder(food)
    # A label of two digits keeps its place in the order of names.
    assert data.ids["training"][:4] == ["0_0", "0_1", "10_0", "10_1"]
    assert data.ids["evaluation"] == ["0000", "0001", "0002", "0003", "0004"]
    assert data.counts().loc["Bread"].tolist() == [2, 1, 0]
    assert data.counts().loc["all"].tolist() == [22, 11, 5]
    both = h.with_validation_images(data)
    assert both.labels["training"] == labels_in(both.files["training"])


# --- one picture ----------------------------------------------------------------------------------


def test_a_turn_that_a_camera_notes_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter, clockwise
    path = save_picture(tmp_path / "a.jpg", 1, (80, 40), exif=exif)
    assert h.open_image(path).size == (40, 80)


# --- a split of bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [40, 64, 97])
def test_the_eval_form_is_the_reference_and_the_whole_form_a_squeeze_bit_for_bit(food, image_size):
    # Written out, for the module's own chain is what is tested.
    side = round(image_size * 256 / 224)
    chains = {
        "eval": transforms.Compose([transforms.Resize(side), transforms.CenterCrop(image_size)]),
        "whole": transforms.Resize((side, side)),
    }
    for form, chain in chains.items():
        split = loaded(food, form=form, image_size=image_size)
        pictures = [Image.open(food / f"training/{name}.jpg") for name in split.ids]
        assert torch.equal(split.images, torch.stack([pixels(chain(one)) for one in pictures]))
        aspects = [one.width / one.height for one in pictures]
        assert torch.equal(split.aspects, torch.tensor(aspects))


def test_the_pictures_after_a_damaged_one_keep_what_is_theirs(food):
    whole = loaded(food)
    (food / "training/3_1.jpg").write_bytes(b"no picture")
    split = loaded(food)
    left = [name != "3_1" for name in whole.ids]
    assert split.ids == tuple(name for name in whole.ids if name != "3_1")
    for name in ("labels", "aspects", "images"):
        assert torch.equal(getattr(split, name), getattr(whole, name)[left])


# --- the cache ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("HW13_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def opened(cache, monkeypatch):
    """The pictures that are opened in place of the folder's, slowly."""
    paths = []

    def open_slowly(path):
        paths.append(path)
        time.sleep(0.005)
        return Image.new("RGB", (60, 48))

    monkeypatch.setattr(h, "open_image", open_slowly)
    return paths


def renamed(name):
    return lambda picture: picture.rename(picture.parent / name)


@pytest.mark.parametrize(
    ("change", "decodes", "same_contents"),
    [
        (lambda picture: picture.chmod(0o600), 1, True),
        (lambda picture: picture.parents[1].rename(picture.parents[2] / "moved"), 1, True),
        (lambda picture: os.utime(picture, (1, 1)), 2, True),
        (renamed("3_2.jpg"), 2, True),
        (renamed("4_.jpg"), 2, False),
        (lambda picture: picture.write_bytes(picture.read_bytes() + b"0"), 2, False),
    ],
)
def test_the_cache_goes_by_names_sizes_and_times_and_contents_by_bytes_and_labels(
    food, opened, change, decodes, same_contents
):
    before = loaded(food)
    change(food / "training/3_1.jpg")
    after = loaded(food.parent)
    assert len(opened) == 22 * decodes
    assert (after.contents == before.contents) == same_contents


def test_a_killed_decode_leaves_nothing_that_stays(food, cache):
    child = os.fork()
    if child == 0:
        try:
            h.open_image = lambda path: os.kill(os.getpid(), 9)
            loaded(food)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 9
    assert len(list(cache.glob(".*.part"))) == 1
    assert len(loaded(food)) == 22
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".npy", ".pt"]


def test_of_two_programs_that_want_one_split_the_first_decodes(food, opened):
    with ThreadPoolExecutor(2) as programs:
        list(programs.map(loaded, [food, food]))
    assert len(opened) == 22


@pytest.mark.parametrize(("cpus", "threads"), [(3, 3), (64, 8)])
def test_a_decode_uses_the_cpus_that_it_may_use_eight_at_most(
    food, cache, monkeypatch, cpus, threads
):
    """A container has fewer CPUs than its machine, and each decoded picture needs memory."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cpus))
    monkeypatch.setattr(h, "ThreadPoolExecutor", lambda n: pytest.fail(f"{n} threads"))
    with pytest.raises(pytest.fail.Exception, match=f"^{threads} threads"):
        loaded(food)


# --- the drawn demo set ---------------------------------------------------------------------------


def test_three_training_labels_in_ten_of_the_demo_set_are_wrong_and_no_others(cache, monkeypatch):
    # A picture as wide as its label tells.
    monkeypatch.setattr(h, "draw_dish", lambda label, rng: Image.new("RGB", (50 + label, 50)))
    data = h.make_demo_data()
    theirs = h.with_teacher_pictures(data)
    assert not set(theirs.files["training"]) & set(data.files["training"])

    def share_of_wrong_labels(some, split):
        widths = [Image.open(path).width for path in some.files[split]]
        return np.mean(np.array(widths) - 50 != some.labels[split])

    assert share_of_wrong_labels(data, "validation") == 0
    assert share_of_wrong_labels(theirs, "training") == 0
    # Three standard deviations of 154 draws.
    assert abs(share_of_wrong_labels(data, "training") - 0.3) < 0.11


def test_a_stopped_drawing_is_begun_anew_and_a_whole_one_never_again(cache, monkeypatch):
    monkeypatch.setattr(h, "FAST_DEMO_PICTURES", dict.fromkeys(h.FAST_DEMO_PICTURES, 1))
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(h, "draw_dish", None)
        h.make_demo_data()
    data = h.make_demo_data()
    assert [path for path in cache.iterdir() if path.is_dir()] == [data.root.parent]
    assert "DEMO" in data.describe()
    monkeypatch.setattr(h, "draw_dish", None)
    assert h.make_demo_data() == data
