"""From bytes to a batch of views: the drawn transform against torchvision's, the order."""

import math

import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision import transforms

import helpers as h

BOSS = h.get_config("boss", image_size=64, batch_size=8)
BILINEAR = transforms.InterpolationMode.BILINEAR


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def smooth_picture(size, seed=0):
    """A random picture, uint8 (3, size, size)."""
    small = 255 * torch.rand(3, 9, 9, generator=seeded(seed))
    return TF.resize(small, [size, size]).byte()


# --- the warp and its draw ------------------------------------------------------------------------


def test_warp_crops_and_mirrors_as_slicing_does():
    image = smooth_picture(64)[None]
    # Rows 8 to 40 and columns 16 to 48 of 64: half sizes 0.5, centres at 24 and 32 pixels.
    ours = h.warp(image, torch.tensor([[[[-0.5, 0, 0], [0, 0.5, 24 / 32 - 1]]]]), 32)
    wanted = image[:, :, 8:40, 16:48].flip(3)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, wanted.float(), atol=0.02)


def test_the_border_of_an_enlarged_picture_does_not_darken():
    image = torch.full((1, 3, 20, 20), 200, dtype=torch.uint8)
    ours = h.warp(image, torch.eye(2, 3)[None, None], 40)
    assert torch.allclose(ours, torch.tensor(200.0))


@pytest.mark.parametrize("seed", range(10))
def test_the_boss_chain_is_torchvisions_under_the_same_draw(seed):
    """The parameters are read back from the drawn matrices and given to torchvision's functions."""
    picture = smooth_picture(256, seed)
    draw = h.sample_affine(torch.ones(1), BOSS, seeded(seed))
    to_source, undo_affine, undo_both = draw[0].double()
    affine, both = (math.degrees(math.atan2(m[1, 0], m[0, 0])) for m in (undo_affine, undo_both))
    # Without the turns half sizes are left, whose signs are the flips.
    halves = (to_source[:, :2] @ undo_both[:, :2].T).diagonal()
    centre = to_source[:, 2]

    # The crop with edges between pixels, then flips, rotation and affine, which turns clockwise.
    edges = torch.cat([centre - halves.abs(), centre + halves.abs()])
    box = (128 + 128 * edges).tolist()
    image = TF.to_pil_image(picture).resize((224, 224), Image.Resampling.BILINEAR, box)
    flips = [dim for dim, half in ((2, halves[0]), (1, halves[1])) if half < 0]
    image = TF.rotate(TF.pil_to_tensor(image).flip(flips), both - affine, BILINEAR)
    theirs = TF.affine(image, -affine, [0, 0], 1.0, [0.0, 0.0], BILINEAR)

    ours = h.warp(picture[None], draw, 224)[0]
    assert (ours - theirs.float()).abs().mean() < 0.8  # of 255
    # Each turn cuts at the frame and fills with black.
    black = torch.stack([ours, theirs]).amax(1) < 0.5
    assert abs(black.float().mean((1, 2)).diff()) < 0.01


@pytest.mark.parametrize("aspect", [1.0, 1.5, 0.6, 2.6])
def test_crops_follow_the_distribution_of_torchvisions(aspect):
    image = torch.zeros(1, 512, round(512 * aspect))
    torch.manual_seed(0)
    draw_one = transforms.RandomResizedCrop.get_params
    theirs = [draw_one(image, (0.35, 1.0), (3 / 4, 4 / 3)) for _ in range(1500)]
    # Top, left, height and width as parts of the picture.
    theirs = torch.tensor(theirs).T / torch.tensor(image.shape[1:] * 2)[:, None]
    x, y, wide, high = h.sample_crops(torch.full((1500,), aspect), (0.35, 1.0), seeded(1))
    ours = torch.stack([(1 + y - high) / 2, (1 + x - wide) / 2, high, wide])
    # The mean distance of the two distributions' quantiles.
    assert (ours.sort().values - theirs.sort().values).abs().mean(1).max() < 0.02


def test_flips_and_angles_follow_the_config():
    cfg = h.replace(BOSS, hflip=0.25, rotation=0.0)
    draw = h.sample_affine(torch.ones(20_000), cfg, seeded(0))
    to_source, frame = draw.unbind(1)  # one frame, of the one turn
    angles = torch.atan2(frame[:, 1, 0], frame[:, 0, 0]).rad2deg()
    assert abs(angles.std() - 60 / 12**0.5) < 0.3  # of a uniform distribution 60 degrees wide
    crop = to_source[:, :, :2] @ frame[:, :, :2].mT
    mirrored = (crop.diagonal(dim1=1, dim2=2) < 0).float().mean(0)
    assert torch.allclose(mirrored, torch.tensor([0.25, 0.5]), atol=0.02)


# --- the loader -----------------------------------------------------------------------------------


def boss_loader(food, **changes):
    """The training loader of 22 images."""
    cfg = h.replace(BOSS, **changes)
    return h.build_loaders(cfg, h.read_folder(food), "cpu")[0]


def images_of(loader, epoch):
    """All views of an epoch, in its order."""
    loader.set_epoch(epoch)
    return torch.cat([batch.images for batch in loader])


def test_every_row_comes_once_an_epoch_with_its_own_label(food):
    loader = boss_loader(food)
    images, labels, rows, *_ = zip(*loader, strict=True)
    assert [len(part) for part in images] == [8, 8, 6]
    rows = torch.cat(rows)
    assert rows.tolist() != list(range(22))
    assert sorted(rows.tolist()) == list(range(22))
    assert torch.equal(torch.cat(labels), loader.split.labels[rows])


def test_validation_comes_in_order_as_the_reference_shows_it(food):
    data = h.read_folder(food)
    (batch,) = h.build_loaders(BOSS, data, "cpu")[1]
    dataset = h.FoodDataset(data, "validation", h.reference_transform(BOSS, train=False))
    images, labels = zip(*dataset, strict=True)
    assert batch.labels.tolist() == list(labels)
    assert torch.allclose(batch.images, torch.stack(images), atol=1e-5)


def test_an_epoch_is_a_function_of_seed_and_epoch(food):
    loader = boss_loader(food)
    second = images_of(loader, 1)
    views = loader.views_of(torch.arange(22))
    assert torch.equal(images_of(boss_loader(food), 1), second)
    assert not torch.equal(images_of(boss_loader(food, seed=1), 1), second)
    loader.set_epoch(0)
    # Not only the order is another.
    assert (loader.views_of(torch.arange(22)) - views).flatten(1).any(1).all()


def test_replayed_epochs_repeat(food):
    loader = boss_loader(food, teacher_views=2, align_weights=())
    epochs = [images_of(loader, epoch) for epoch in range(3)]
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])


def test_the_sample_transform_is_the_exact_crop_and_flips(food):
    cfg = h.get_config("simple", image_size=64)
    loader, _ = h.build_loaders(cfg, h.read_folder(food), "cpu")
    straight = h.normalize(loader.split.images)
    both = torch.stack([straight, straight.flip(3)])
    straight, mirrored = (both == loader.views_of(torch.arange(22))).flatten(2).all(2)
    assert (straight ^ mirrored).all()
    assert 3 < mirrored.sum() < 19


@pytest.mark.parametrize(
    ("batch_size", "world", "sizes"),
    [
        (7, 1, [7, 7, 8]),  # one image is too few for batch norm
        (19, 2, [22]),  # three are too few for two processes
    ],
)
def test_a_last_batch_that_is_too_small_joins_the_one_before(food, batch_size, world, sizes):
    loader = boss_loader(food, batch_size=batch_size)
    loader.world = world
    assert [len(rows) for rows in loader.batches()] == sizes


def test_parts_of_several_processes_make_the_whole(food):
    loaders = [boss_loader(food) for _ in range(3)]
    for rank, loader in enumerate(loaders):
        loader.rank, loader.world = rank, 3
    for step, *parts in zip(boss_loader(food), *loaders, strict=True):
        images, _, rows, weights, _ = zip(*parts, strict=True)
        assert torch.equal(torch.cat(rows), step.rows)
        assert torch.allclose(torch.cat(images), step.images, atol=1e-5)
        # The mean over processes of weighted means is the mean over the step.
        assert list(weights) == [3 * len(part) / len(step.rows) for part in rows]
