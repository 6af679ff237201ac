"""On real photographs (HW13_PHOTOS), skipped without them."""

import torch
from torch.utils.data import DataLoader, Subset

import helpers as h


def test_the_teacher_answers_alike_through_both_paths(photos):
    """The same logits from the course's Dataset and from the cache, on every 15th validation image
    at 224 px.
    """
    teacher = h.load_teacher(photos.teacher_path)
    rows = list(range(0, len(photos.files["validation"]), 15))

    transform = h.reference_transform(h.Config(), train=False)
    dataset = h.FoodDataset(photos, "validation", transform)
    theirs, labels = h.predict_logits(teacher, DataLoader(Subset(dataset, rows), 50))

    split = h.load_data(photos, "validation", "eval", 224)
    batch = (h.normalize(split.images[rows]), split.labels[rows])
    ours, _ = h.predict_logits(teacher, [batch])

    assert (ours - theirs).abs().max() < 1e-3
    assert torch.equal(ours.argmax(1), theirs.argmax(1))
    assert torch.equal(split.labels[rows], labels)
    accuracy = (ours.argmax(1) == labels).float().mean()
    assert 0.7 < accuracy < 0.86


def test_a_student_learns_from_photographs(photos, tmp_path):
    """One epoch at 64 px is far above chance (1 / 11) on the validation images."""
    cfg = h.get_config("strong", "fast", image_size=64, lr=3e-3)
    teacher = h.load_teacher(photos.teacher_path)
    run = h.run_stage(cfg, photos, teacher, tmp_path)
    assert run.valid_acc > 0.14
    assert h.validate_submission(run.csv, len(photos.ids["evaluation"]))
