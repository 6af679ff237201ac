"""Shared fixtures. Tests that want the photo set find it through HW13_PHOTOS, or skip."""

import os
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "submission")]
os.environ["HW13_FAST"] = "1"
os.environ["HW13_STRICT"] = "1"  # an illustration that fails is an error here
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as helpers.py has it, before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import helpers as h  # noqa: E402


def ids(n):
    """The homework's names of n evaluation images."""
    return [f"{i:04d}" for i in range(n)]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path_factory):
    """No variable of the caller's machine reaches a test; the cache is shared by a test run and
    thrown away.
    """
    monkeypatch.delenv("HW13_DATA", raising=False)
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("HW13_KAGGLE", str(base / "no_kaggle"))
    monkeypatch.setenv("HW13_CACHE", str(base / "cache"))


def save_picture(path, seed=0, size=(60, 48), mode="RGB", **options):
    """Write a smooth random picture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    picture = small.resize(size, Image.Resampling.BICUBIC).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path


def draw_food(root):
    """A data folder in the homework's layout: 2 training, 1 validation image per class, and 5
    evaluation images.
    """
    for label in range(h.NUM_CLASSES):
        for n in range(2):
            size = (60 + 4 * n, 48 + label)  # no two shapes are alike
            save_picture(root / "training" / f"{label}_{n}.jpg", 10 * label + n, size)
        save_picture(root / "validation" / f"{label}_0.jpg", 500 + label)
    for n in range(5):
        save_picture(root / "evaluation" / f"{n:04d}.jpg", 900 + n)
    return root


@pytest.fixture
def food(tmp_path):
    """The path of a small data folder, without a teacher."""
    return draw_food(tmp_path / "Food-11")


@pytest.fixture(scope="session")
def a_teacher(tmp_path_factory):
    """The path of a random teacher's file, made once."""
    path = tmp_path_factory.mktemp("teacher") / h.TEACHER_FILE
    torch.save(h.build_student(h.TEACHER_CONFIG).state_dict(), path)
    return path


@pytest.fixture
def teacher_file(food, a_teacher):
    """The path of a random teacher's file with the homework's file name, in the data folder."""
    return Path(shutil.copy(a_teacher, food))


@pytest.fixture
def tiny():
    """Overrides that make any stage run in a second."""
    return {"image_size": 64, "n_epochs": 2, "batch_size": 8, "lr": 1e-3, "amp": "off"}


@pytest.fixture(scope="session")
def trained(tmp_path_factory, a_teacher):
    """The folder of one whole run, made once: food/ with a teacher, and out/ with strong, medium
    and their CSVs. Copy it (`copied_run`) before you change it.
    """
    root = tmp_path_factory.mktemp("trained")
    draw_food(root / "Food-11")
    shutil.copy(a_teacher, root / "Food-11")
    settings = {"image_size": 64, "n_epochs": 2, "batch_size": 8, "lr": 1e-3, "amp": "off"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HW13_KAGGLE", str(root / "no_kaggle"))
        patch.setenv("HW13_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        data = h.read_folder(root / "Food-11")
        h.run(data, ("medium", "strong"), out=root / "out", **settings)
    return root


@pytest.fixture
def copied_run(trained, tmp_path):
    """A copy of `trained` for a test of its own: a folder with Food-11/ and out/."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.fixture(scope="session")
def photos():
    """The FoodData of the photo set, or a skip."""
    folder = os.environ.get("HW13_PHOTOS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("HW13_PHOTOS names no folder of photographs")
    return h.find_data(folder)


def without_seconds(folder):
    """What last.ckpt of a run's folder holds, but for the times and its probe's numbers."""
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    del saved["facts"]
    saved["history"] = [{**row, "seconds": 0} for row in saved["history"]]
    return saved


def same(a, b):
    """Whether two nested checkpoints are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def settings_of(**values):
    """The --set arguments of a command line."""
    arguments = []
    for key, value in values.items():
        arguments += ["--set", f"{key}={value}"]
    return arguments
