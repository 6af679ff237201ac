"""The two stored forms, the drawn transform and the warp, against torchvision and slicing."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision import transforms

import helpers as h

BOSS = h.get_config("boss", image_size=64, batch_size=8)
BILINEAR = transforms.InterpolationMode.BILINEAR
IDENTITY = [[1, 0, 0], [0, 1, 0]]
HFLIP = [[-1, 0, 0], [0, 1, 0]]
VFLIP = [[1, 0, 0], [0, -1, 0]]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def smooth_picture(size=256, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def affine(*matrices):
    return torch.tensor([matrices], dtype=torch.float32)


def largest_difference(a, b):
    return (a - b).abs().max()


# --- the eval form -------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [40, 64, 97])
def test_the_eval_view_equals_the_reference_transform_bit_for_bit(food, image_size):
    data = h.find_data(food)
    split = h.load_data(data, "validation", "eval", image_size)
    loader = h.BatchLoader(split, BOSS, "cpu", batch_size=4)
    transform = h.reference_transform(h.Config(image_size=image_size), train=False)
    reference = h.FoodDataset(data, "validation", transform)
    ours = torch.cat([batch.images for batch in loader])
    theirs = torch.stack([image for image, _ in reference])

    # The stored bytes are the reference's pixels before it normalises them.
    std = torch.tensor(h.IMAGENET_STD).view(3, 1, 1)
    mean = torch.tensor(h.IMAGENET_MEAN).view(3, 1, 1)
    their_bytes = ((theirs * std + mean) * 255).round().byte()
    assert torch.equal(loader.split.images, their_bytes)
    assert largest_difference(ours, theirs) < 1e-5

    our_labels = torch.cat([batch.labels for batch in loader]).tolist()
    their_labels = [label for _, label in reference]
    assert our_labels == their_labels


# --- the warp -------------------------------------------------------------------------------------


def test_coordinates_are_those_of_affine_grid():
    matrices = torch.randn(3, 2, 3)
    grid = torch.nn.functional.affine_grid(matrices, (3, 1, 7, 7), align_corners=False)
    wanted = grid.permute(0, 3, 1, 2)  # x and y come first in ours
    assert torch.allclose(h.coordinates(matrices, 7), wanted, atol=1e-5)


def test_warp_identity_and_flips():
    image = pixels(smooth_picture(64))[None]
    assert largest_difference(h.warp(image, affine(IDENTITY), 64), image) < 0.02
    assert largest_difference(h.warp(image, affine(HFLIP), 64), image.flip(3)) < 0.02
    assert largest_difference(h.warp(image, affine(VFLIP), 64), image.flip(2)) < 0.02


def test_warp_crop_equals_slicing():
    image = pixels(smooth_picture(64))[None]
    # rows 8..40 and columns 16..48 of 64: half size 0.5, centres at pixels 24 and 32
    crop = affine([[0.5, 0, 0.0], [0, 0.5, 24 / 32 - 1]])
    out = h.warp(image, crop, 32)
    assert largest_difference(out, image[:, :, 8:40, 16:48]) < 0.02


def test_warp_on_one_image_keeps_its_shape():
    image = torch.zeros(1, 3, 20, 20, dtype=torch.uint8)
    out = h.warp(image, affine(IDENTITY), 10)
    assert out.shape == (1, 3, 10, 10)


@pytest.mark.parametrize("seed", range(12))
def test_the_boss_chain_equals_torchvisions_given_its_parameters(seed):
    """Draw as sample_affine does, read the parameters back from the matrices, and apply
    torchvision's own functions.
    """
    source = smooth_picture(256, seed)
    size = 224
    cfg = h.get_config("boss")
    draw = h.sample_affine(torch.ones(1), cfg, seeded(seed))
    to_source, undo_affine, undo_both = draw[0].double()

    # The two angles: the affine step's is clockwise, the rotation's counter-clockwise.
    affine_angle = math.degrees(math.atan2(-undo_affine[1, 0], undo_affine[0, 0]))
    both = math.degrees(math.atan2(undo_both[1, 0], undo_both[0, 0]))
    rotate_angle = both + affine_angle

    # Without the angles, the crop and the flips are left: half sizes, whose signs are the flips.
    linear = to_source[:, :2] @ torch.linalg.inv(undo_both[:, :2])
    wide = linear[0, 0].abs().item()
    high = linear[1, 1].abs().item()
    x, y = to_source[:, 2].tolist()
    left = (1 + x - wide) * 128
    top = (1 + y - high) * 128

    # The crop with sub-pixel edges, as torchvision's resize would see it; then flip, rotate,
    # affine: torchvision's.
    box = (left, top, left + 256 * wide, top + 256 * high)
    image = source.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if linear[0, 0] < 0:
        image = TF.hflip(image)
    if linear[1, 1] < 0:
        image = TF.vflip(image)
    image = TF.rotate(pixels(image), rotate_angle, BILINEAR)
    image = TF.affine(image, affine_angle, [0, 0], 1.0, [0.0, 0.0], BILINEAR)

    ours = h.warp(pixels(source)[None], draw, size)[0]
    difference = (ours - image.float()).abs()
    assert difference.mean() < 0.8
    black = (image.sum(0) == 0).float().mean()
    our_black = (ours.sum(0) < 0.5).float().mean()
    assert abs(our_black - black) < 0.01
    # Corners are cut wherever the rotation is not close to a quarter turn.
    assert black > 0.02 or abs(rotate_angle) % 90 < 10


def test_both_frames_cut_to_black():
    """45 + 20 degrees: torchvision leaves 19 % black, one matrix over the whole picture 1 %."""
    size = 224
    image = torch.full((1, 3, 256, 256), 200, dtype=torch.uint8)
    rotated = TF.rotate(torch.full((3, size, size), 200, dtype=torch.uint8), 45, BILINEAR)
    expected = TF.affine(rotated, 20, [0, 0], 1.0, [0.0, 0.0], BILINEAR)
    expected_black = (expected[0] < 1).float().mean()

    ours = h.warp(image, turn(45, 20), size)
    black = (ours[0, 0] < 1).float().mean()
    assert abs(black - expected_black) < 0.005
    assert black > 0.17


def turn(rotation, affine_angle):
    """The matrices of fixed angles, without a crop."""
    undo_a = turned(-affine_angle)
    undo_r = turned(rotation)
    both = undo_r @ undo_a
    return torch.stack([both, undo_a, both])[None, :, :2]


def turned(degrees):
    cos = math.cos(math.radians(degrees))
    sin = math.sin(math.radians(degrees))
    return torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]])


# --- the draw -------------------------------------------------------------------------------------


@pytest.mark.parametrize("aspect", [1.0, 1.5, 0.6, 2.6])
def test_crops_follow_torchvisions_distribution(aspect):
    n = 4000
    height = 512
    width = round(height * aspect)

    image = Image.new("RGB", (width, height))
    torch.manual_seed(0)
    theirs = []  # top, left, height, width
    for _ in range(n):
        crop = transforms.RandomResizedCrop.get_params(image, (0.7, 1.0), (3 / 4, 4 / 3))
        theirs.append(crop)
    theirs = torch.tensor(theirs, dtype=torch.float64)

    aspects = torch.full((n,), width / height)
    x, y, wide, high = h.sample_crops(aspects, (0.7, 1.0), seeded(1))
    # No crop leaves its picture, which reaches from -1 to 1.
    assert wide.max() <= 1 + 1e-9
    assert high.max() <= 1 + 1e-9
    assert (x.abs() + wide).max() <= 1 + 1e-9
    assert (y.abs() + high).max() <= 1 + 1e-9

    top = (1 + y - high) / 2 * height
    left = (1 + x - wide) / 2 * width
    ours = torch.stack([top, left, high * height, wide * width], 1)
    # Kolmogorov-Smirnov distance, forgiving torchvision's rounding to whole pixels
    for column in range(4):
        for value in torch.linspace(0, max(width, height), 200):
            theirs_below = (theirs[:, column] <= value).double().mean()
            assert (ours[:, column] <= value + 1).double().mean() > theirs_below - 0.04
            assert (ours[:, column] <= value - 1).double().mean() < theirs_below + 0.04


def test_flips_and_angles_follow_the_config():
    n = 20_000
    draw = h.sample_affine(torch.ones(n), BOSS, seeded(0))
    undo_affine = draw[:, 1]
    angles = torch.atan2(undo_affine[:, 1, 0], undo_affine[:, 0, 0]).rad2deg()
    assert angles.abs().max() <= 30.01
    assert abs(angles.mean()) < 0.5
    assert abs(angles.std() - 60 / 12**0.5) < 0.3  # of a uniform distribution 60 degrees wide

    # One flip of two turns the determinant's sign.
    mirrored = torch.linalg.det(draw[:, 0, :, :2]) < 0
    assert abs(mirrored.float().mean() - 0.5) < 0.02

    cfg = h.Config(crop_scale=(1, 1), hflip=0.25)
    plain = h.sample_affine(torch.ones(n), cfg, seeded(0))
    assert plain.shape == (n, 1, 2, 3)
    flipped = plain[:, 0, 0, 0] < 0
    assert abs(flipped.float().mean() - 0.25) < 0.02


def test_every_image_of_a_batch_gets_its_own_draw():
    draw = h.sample_affine(torch.ones(50), BOSS, seeded(0))
    different = {tuple(m.flatten().tolist()) for m in draw[:, 0]}
    assert len(different) == 50


# --- the loader -----------------------------------------------------------------------------------


def boss_loader(food, **settings):
    values = {"image_size": 64, "batch_size": 8} | settings
    cfg = h.get_config("boss", **values)
    split = h.load_data(h.find_data(food), "training", "whole", 64)
    return h.BatchLoader(split, cfg, "cpu", train=True)


def all_rows(batches):
    return torch.cat([batch.rows for batch in batches])


def test_an_epoch_is_a_function_of_seed_and_epoch(food):
    loader = boss_loader(food)
    first = list(loader)
    loader.set_epoch(1)
    second = list(loader)

    again = boss_loader(food)
    again.set_epoch(1)
    for a, b in zip(second, again, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.rows, b.rows)

    assert not torch.equal(all_rows(first), all_rows(second))
    other = boss_loader(food, seed=1)
    assert not torch.equal(all_rows(first), all_rows(other))


def test_every_row_comes_once_with_its_own_label(food):
    loader = boss_loader(food)
    batches = list(loader)
    assert sorted(all_rows(batches).tolist()) == list(range(22))
    assert len(batches) == 3
    assert len(loader) == 3
    for batch in batches:
        assert torch.equal(batch.labels, loader.split.labels[batch.rows])
        assert batch.weight == 1.0
        assert batch.images.shape == (len(batch.rows), 3, 64, 64)
        assert batch.images.dtype == torch.float32


def test_the_view_of_a_row_does_not_depend_on_its_batch(food):
    loader = boss_loader(food)
    batch = next(iter(loader))
    alone = loader.views_of(batch.rows[3:4])[0]
    assert largest_difference(alone, batch.images[3]) < 1e-5


def test_the_sample_transform_is_the_exact_crop_and_flips(food):
    cfg = h.get_config("simple", image_size=64, batch_size=8)
    split = h.load_data(h.find_data(food), "training", "eval", 64)
    loader = h.BatchLoader(split, cfg, "cpu", train=True)
    flipped = 0
    for batch in loader:
        for image, row in zip(batch.images, batch.rows, strict=True):
            straight = h.normalize(split.images[row])
            mirrored = torch.equal(image, straight.flip(2))
            flipped += mirrored
            assert mirrored or torch.equal(image, straight)
    assert 3 < flipped < 19  # of 22


def test_the_form_must_be_the_one_that_the_config_wants(food):
    data = h.find_data(food)
    with pytest.raises(h.UserError, match="wants the whole form, not eval"):
        h.BatchLoader(h.load_data(data, "training", "eval", 64), BOSS, "cpu", train=True)


def test_replayed_epochs_repeat(food):
    loader = boss_loader(food, teacher_views=2, align_weights=())
    epochs = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        epochs.append(torch.cat([b.images for b in loader]))
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[1], epochs[3])
    assert not torch.equal(epochs[0], epochs[1])


def test_parts_of_several_processes_make_the_whole(food):
    loader = boss_loader(food)
    whole = [b.rows for b in loader]
    loader.world = 3
    parts = []
    for rank in range(3):
        loader.rank = rank
        parts.append(list(loader))

    lengths = {len(part) for part in parts}
    assert len(lengths) == 1
    for step, rows in enumerate(whole):
        shares = [part[step] for part in parts]
        assert torch.equal(all_rows(shares), rows)
        weight = sum(share.weight for share in shares)
        assert weight == pytest.approx(3)


def test_a_last_batch_too_small_to_share_joins_the_one_before(food):
    loader = boss_loader(food, batch_size=7)  # 22 = 7 + 7 + 7 + 1
    loader.world = 2
    assert [len(rows) for rows in loader.batches()] == [7, 7, 8]


def test_a_step_needs_an_image_for_each_process(food, monkeypatch):
    data = h.find_data(food)
    cfg = h.Config(image_size=64, batch_size=4)
    split = h.load_data(data, "training", "eval", 64)
    monkeypatch.setattr(h, "rank_and_world", lambda: (0, 5))
    with pytest.raises(h.UserError, match="a step has 4 images .* too few for 5 processes"):
        h.BatchLoader(split, cfg, "cpu", train=True)
    h.BatchLoader(split, cfg, "cpu", train=True, shared=False)
