"""Shared fixtures. Tests that want the photo set find it through HW13_PHOTOS, or skip."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HW13_FAST"] = "1"
os.environ["HW13_STRICT"] = "1"  # an illustration that fails is an error here

import helpers as h  # noqa: E402


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path_factory):
    """No variable of the caller's machine reaches a test; the cache is shared by a test run and
    thrown away.
    """
    for name in ("HW13_DATA", "HW13_KAGGLE"):
        monkeypatch.delenv(name, raising=False)
    # On a pretended Kaggle the session would else be as old as this machine, and its time be up.
    monkeypatch.setenv("HW13_SESSION_START", str(time.time()))
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("HW13_KAGGLE", str(base / "no_kaggle"))
    cache = base / "cache"
    cache.mkdir(exist_ok=True)
    monkeypatch.setenv("HW13_CACHE", str(cache))


def save_picture(path, seed=0, size=(60, 48), mode="RGB", **options):
    """Write a smooth random picture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    picture = small.resize(size, Image.Resampling.BICUBIC).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path


@pytest.fixture
def food(tmp_path):
    """A data folder in the homework's layout: 2 training, 1 validation image a class, 5 evaluation
    images.
    """
    root = tmp_path / "Food-11"
    for label in range(h.NUM_CLASSES):
        for n in range(2):
            size = (60 + 4 * n, 48 + label)  # no two shapes are alike
            save_picture(root / "training" / f"{label}_{n}.jpg", 10 * label + n, size)
        save_picture(root / "validation" / f"{label}_0.jpg", 500 + label)
    for n in range(5):
        save_picture(root / "evaluation" / f"{n:04d}.jpg", 900 + n)
    return root


@pytest.fixture
def teacher_file(food):
    """A random teacher with the homework's file name, in the data folder."""
    torch.manual_seed(1)
    teacher = h.build_student(h.Config(student="resnet18"))
    path = food / h.TEACHER_FILE
    torch.save(teacher.state_dict(), path)
    return path


@pytest.fixture
def tiny():
    """Overrides that make any stage run in a second."""
    return {"image_size": 64, "n_epochs": 2, "batch_size": 8, "lr": 1e-3, "amp": "off"}


@pytest.fixture(scope="session")
def photos():
    """The FoodData of the photo set, or a skip."""
    folder = os.environ.get("HW13_PHOTOS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("HW13_PHOTOS names no folder of photographs")
    return h.find_data(folder)
