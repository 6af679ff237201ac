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


def smooth_picture(size=256, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def affine(*matrices):
    return torch.tensor([matrices], dtype=torch.float32)


# --- the eval form -------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [40, 64, 97])
def test_the_eval_view_equals_the_reference_transform_bit_for_bit(food, image_size):
    data = h.find_data(food)
    loader = h.BatchLoader(
        h.load_data(data, "validation", "eval", image_size), BOSS, "cpu", batch_size=4
    )
    reference = h.FoodDataset(
        data, "validation", h.reference_transform(h.Config(image_size=image_size), train=False)
    )
    ours = torch.cat([batch.images for batch in loader])
    theirs = torch.stack([image for image, _ in reference])
    assert torch.equal(
        loader.split.images,
        (
            (
                theirs * torch.tensor(h.IMAGENET_STD).view(3, 1, 1)
                + torch.tensor(h.IMAGENET_MEAN).view(3, 1, 1)
            )
            * 255
        )
        .round()
        .byte(),
    )
    assert (ours - theirs).abs().max() < 1e-5
    assert torch.cat([batch.labels for batch in loader]).tolist() == [
        label for _, label in reference
    ]


# --- the warp -------------------------------------------------------------------------------------


def test_coordinates_are_those_of_affine_grid():
    matrices = torch.randn(3, 2, 3)
    wanted = torch.nn.functional.affine_grid(matrices, (3, 1, 7, 7), align_corners=False).permute(
        0, 3, 1, 2
    )
    assert torch.allclose(h.coordinates(matrices, 7), wanted, atol=1e-5)


def test_warp_identity_and_flips():
    image = pixels(smooth_picture(64))[None]
    assert (h.warp(image, affine([[1, 0, 0], [0, 1, 0]]), 64) - image).abs().max() < 0.02
    assert (h.warp(image, affine([[-1, 0, 0], [0, 1, 0]]), 64) - image.flip(3)).abs().max() < 0.02
    assert (h.warp(image, affine([[1, 0, 0], [0, -1, 0]]), 64) - image.flip(2)).abs().max() < 0.02


def test_warp_crop_equals_slicing():
    image = pixels(smooth_picture(64))[None]
    # rows 8..40 and columns 16..48 of 64: half size 0.5, centres at pixels 24 and 32
    out = h.warp(image, affine([[0.5, 0, 0.0], [0, 0.5, 24 / 32 - 1]]), 32)
    assert (out - image[:, :, 8:40, 16:48]).abs().max() < 0.02


def test_warp_on_one_image_keeps_its_shape():
    assert h.warp(
        torch.zeros(1, 3, 20, 20, dtype=torch.uint8), affine([[1, 0, 0], [0, 1, 0]]), 10
    ).shape == (1, 3, 10, 10)


@pytest.mark.parametrize("seed", range(12))
def test_the_boss_chain_equals_torchvisions_given_its_parameters(seed):
    """Draw as sample_affine does, read the parameters back from the matrices, and apply
    torchvision's own functions.
    """
    source, size = smooth_picture(256, seed), 224
    cfg = h.get_config("boss")
    draw = h.sample_affine(torch.ones(1), cfg, torch.Generator().manual_seed(seed))
    to_source, undo_affine, undo_both = draw[0].double()
    affine_angle = math.degrees(math.atan2(-undo_affine[1, 0], undo_affine[0, 0]))  # clockwise
    both = math.degrees(math.atan2(undo_both[1, 0], undo_both[0, 0]))
    rotate_angle = both + affine_angle  # counter-clockwise
    linear = to_source[:, :2] @ torch.linalg.inv(undo_both[:, :2])  # crop and flips alone
    wide, high = linear[0, 0].abs().item(), linear[1, 1].abs().item()
    x, y = to_source[:, 2].tolist()
    left, top = (1 + x - wide) * 128, (1 + y - high) * 128
    # The crop with sub-pixel edges, as torchvision's resize would see it; then flip, rotate,
    # affine: torchvision's.
    image = source.resize(
        (size, size),
        Image.Resampling.BILINEAR,
        box=(left, top, left + 256 * wide, top + 256 * high),
    )
    image = TF.hflip(image) if linear[0, 0] < 0 else image
    image = TF.vflip(image) if linear[1, 1] < 0 else image
    image = TF.rotate(pixels(image), rotate_angle, BILINEAR)
    image = TF.affine(image, affine_angle, [0, 0], 1.0, [0.0, 0.0], BILINEAR)
    ours = h.warp(pixels(source)[None], draw, size)[0]
    difference = (ours - image.float()).abs()
    assert difference.mean() < 0.8
    black = (image.sum(0) == 0).float().mean()
    assert abs((ours.sum(0) < 0.5).float().mean() - black) < 0.01
    assert black > 0.02 or abs(rotate_angle) % 90 < 10


def test_both_frames_cut_to_black():
    """45 + 20 degrees: torchvision leaves 19 % black, one matrix over the whole picture 1 %."""
    image, size = torch.full((1, 3, 256, 256), 200, dtype=torch.uint8), 224
    expected = TF.affine(
        TF.rotate(torch.full((3, size, size), 200, dtype=torch.uint8), 45, BILINEAR),
        20,
        [0, 0],
        1.0,
        [0.0, 0.0],
        BILINEAR,
    )
    draw = turn(45, 20)
    black = (h.warp(image, draw, size)[0, 0] < 1).float().mean()
    assert abs(black - (expected[0] < 1).float().mean()) < 0.005 and black > 0.17


def turn(rotation, affine_angle):
    """The matrices of fixed angles, without a crop."""
    a, r = math.radians(affine_angle), math.radians(rotation)
    undo_a = torch.tensor(
        [[math.cos(a), math.sin(a), 0], [-math.sin(a), math.cos(a), 0], [0, 0, 1.0]]
    )
    undo_r = torch.tensor(
        [[math.cos(r), -math.sin(r), 0], [math.sin(r), math.cos(r), 0], [0, 0, 1.0]]
    )
    both = undo_r @ undo_a
    return torch.stack([both, undo_a, both])[None, :, :2]


# --- the draw -------------------------------------------------------------------------------------


@pytest.mark.parametrize("aspect", [1.0, 1.5, 0.6, 2.6])
def test_crops_follow_torchvisions_distribution(aspect):
    n, height = 4000, 512
    width = round(height * aspect)
    image = Image.new("RGB", (width, height))
    torch.manual_seed(0)
    theirs = torch.tensor(
        [
            transforms.RandomResizedCrop.get_params(image, (0.7, 1.0), (3 / 4, 4 / 3))
            for _ in range(n)
        ],
        dtype=torch.float64,
    )  # top, left, height, width
    x, y, wide, high = h.sample_crops(
        torch.full((n,), width / height), (0.7, 1.0), torch.Generator().manual_seed(1)
    )
    assert (wide.max() <= 1 + 1e-9) and (high.max() <= 1 + 1e-9)
    assert ((x.abs() + wide).max() <= 1 + 1e-9) and ((y.abs() + high).max() <= 1 + 1e-9)
    ours = torch.stack(
        [(1 + y - high) / 2 * height, (1 + x - wide) / 2 * width, high * height, wide * width], 1
    )
    for column in range(
        4
    ):  # Kolmogorov-Smirnov distance, forgiving torchvision's rounding to whole pixels
        for value in torch.linspace(0, max(width, height), 200):
            theirs_below = (theirs[:, column] <= value).double().mean()
            assert (ours[:, column] <= value + 1).double().mean() > theirs_below - 0.04
            assert (ours[:, column] <= value - 1).double().mean() < theirs_below + 0.04


def test_flips_and_angles_follow_the_config():
    n = 20_000
    draw = h.sample_affine(torch.ones(n), BOSS, torch.Generator().manual_seed(0))
    undo_affine = draw[:, 1]
    angles = torch.atan2(undo_affine[:, 1, 0], undo_affine[:, 0, 0]).rad2deg()
    assert (
        angles.abs().max() <= 30.01
        and abs(angles.mean()) < 0.5
        and abs(angles.std() - 60 / 12**0.5) < 0.3
    )
    assert (
        abs((torch.linalg.det(draw[:, 0, :, :2]) < 0).float().mean() - 0.5) < 0.02
    )  # one flip of two
    plain = h.sample_affine(
        torch.ones(n), h.Config(crop_scale=(1, 1), hflip=0.25), torch.Generator().manual_seed(0)
    )
    assert plain.shape == (n, 1, 2, 3) and abs((plain[:, 0, 0, 0] < 0).float().mean() - 0.25) < 0.02


def test_every_image_of_a_batch_gets_its_own_draw():
    draw = h.sample_affine(torch.ones(50), BOSS, torch.Generator().manual_seed(0))
    assert len({tuple(m.flatten().tolist()) for m in draw[:, 0]}) == 50


# --- the loader -----------------------------------------------------------------------------------


def boss_loader(food, **settings):
    cfg = h.get_config("boss", **({"image_size": 64, "batch_size": 8} | settings))
    return h.BatchLoader(
        h.load_data(h.find_data(food), "training", "whole", 64), cfg, "cpu", train=True
    )


def test_an_epoch_is_a_function_of_seed_and_epoch(food):
    loader, again = boss_loader(food), boss_loader(food)
    first = list(loader)
    loader.set_epoch(1)
    second = list(loader)
    again.set_epoch(1)
    for a, b in zip(second, again, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.rows, b.rows)
    assert not torch.equal(torch.cat([b.rows for b in first]), torch.cat([b.rows for b in second]))
    other = boss_loader(food, seed=1)
    assert not torch.equal(torch.cat([b.rows for b in first]), torch.cat([b.rows for b in other]))


def test_every_row_comes_once_with_its_own_label(food):
    loader = boss_loader(food)
    batches = list(loader)
    assert (
        sorted(torch.cat([b.rows for b in batches]).tolist()) == list(range(22))
        and len(batches) == len(loader) == 3
    )
    for batch in batches:
        assert torch.equal(batch.labels, loader.split.labels[batch.rows]) and batch.weight == 1.0
        assert (
            batch.images.shape == (len(batch.rows), 3, 64, 64)
            and batch.images.dtype == torch.float32
        )


def test_the_view_of_a_row_does_not_depend_on_its_batch(food):
    loader = boss_loader(food)
    batch = next(iter(loader))
    assert (loader.views_of(batch.rows[3:4])[0] - batch.images[3]).abs().max() < 1e-5


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
    assert 3 < flipped < 19


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
    assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[1], epochs[3])
    assert not torch.equal(epochs[0], epochs[1])


def test_parts_of_several_processes_make_the_whole(food):
    loader = boss_loader(food)
    whole = [b.rows for b in loader]
    parts = []
    for rank in range(3):
        loader.rank, loader.world = rank, 3
        parts.append(list(loader))
    assert len({len(p) for p in parts}) == 1
    for step, rows in enumerate(whole):
        assert torch.equal(torch.cat([p[step].rows for p in parts]), rows)
        assert sum(p[step].weight for p in parts) == pytest.approx(3)


def test_a_last_batch_too_small_to_share_joins_the_one_before(food):
    loader = boss_loader(food, batch_size=7)  # 22 = 7 + 7 + 7 + 1
    loader.world = 2
    assert [len(rows) for rows in loader.batches()] == [7, 7, 8]
