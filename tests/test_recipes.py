"""The ring's candidates (tests/bench/recipes.py): nets that can be built, folded nets that answer
alike, losses.
"""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

import helpers as h

sys.path.insert(0, str(ROOT / "tests/bench"))

import recipes as r  # noqa: E402

ONE_SMALL_EPOCH = ["--epochs", "1", "--size", "64", "--teacher-size", "80"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def teacher():
    return h.freeze(h.build_student(h.TEACHER_CONFIG))


def parameters_of(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", r.RECIPES)
def test_every_net_answers_and_all_but_the_published_one_are_legal(name, teacher):
    recipe = r.RECIPES[name]
    net = recipe.net(recipe.cfg, teacher)
    assert net.train()(torch.randn(2, 3, 64, 64)).shape == (2, 11)
    limit = h.PARAM_LIMIT
    if name == "published_boss":
        limit = 99_891
    assert h.check_budget(r.deployed(net), limit) > 40_000


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_folded_net_answers_like_its_branches(kernel):
    """With weights and statistics that are not fresh, for which a wrong fold could pass."""
    net = r.Spec(((24, 2, 2), (32, 2, 1)), kernel=kernel, rep=True).build()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.uniform_(0.5, 1.5)

    images = torch.randn(3, 3, 64, 64)
    folded = r.deployed(net.eval())
    with torch.no_grad():
        assert torch.allclose(folded(images), net(images), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, r.RepDepthwise) for module in folded.modules())
    assert parameters_of(folded) < parameters_of(net)


def test_an_anti_aliased_stride_keeps_a_constant_and_blurs_a_checkerboard_away():
    pool = r.BlurPool(2)
    flat = torch.ones(1, 2, 8, 8)
    board = flat * (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))
    # The first row and column also see the padding.
    assert torch.allclose(pool(flat)[..., 1:, 1:], torch.ones(1, 2, 3, 3))
    assert torch.allclose(pool(board)[..., 1:, 1:], torch.zeros(1, 2, 3, 3), atol=1e-6)


def test_the_frozen_stem_is_the_teachers_and_stays_so(teacher):
    recipe = r.RECIPES["published_boss"]
    net = recipe.net(recipe.cfg, teacher).train()
    before = h.state_checksum(net.stem)
    net(torch.randn(4, 3, 64, 64)).sum().backward()
    assert torch.equal(net.stem[0].weight, teacher.conv1.weight)
    assert net.stem[0].weight.grad is None
    # The checksum holds the stem's statistics too; the layers after it do train.
    assert h.state_checksum(net.stem) == before
    assert net.layer1[0][1].training


def test_candidate_losses_vanish_where_the_answers_agree_in_their_sense():
    """Standardised logits forget scale and shift; DIST forgets them in the probabilities alone."""
    teacher = torch.randn(8, 11)
    labels = torch.zeros(8, dtype=torch.long)
    other = torch.randn(8, 11)
    assert r.standardised_kd(3 * teacher + 2, labels, teacher, 1.0, 2.0).abs() < 1e-4
    assert r.standardised_kd(other, labels, teacher, 1.0, 2.0) > 0.1
    assert r.dist_kd(teacher + 5, labels, teacher, 1.0, 2.0).abs() < 1e-4

    # Half of the teacher's answer, half of a uniform one: every correlation is one, and the KL
    # divergence is not zero.
    paler = (0.5 * teacher.softmax(1) + 0.5 / 11).log()
    assert r.dist_kd(paler, labels, teacher, 1.0, 1.0).abs() < 1e-4
    assert h.loss_fn_kd(paler, labels, teacher, 1.0, 1.0) > 1e-4

    assert r.dist_kd(other, labels, teacher, 1.0, 2.0) > 0.01
    assert r.dist_kd(3 * teacher, labels, teacher, 1.0, 1.0) > 0.01


def test_a_projector_into_the_teachers_classifier_folds_and_leaves_the_teachers_own_alone(teacher):
    cfg = h.STAGES["beyond"]
    net = r.projected_net(cfg, teacher)
    images = torch.randn(3, 3, 64, 64)
    labels = torch.arange(3)
    loss_fn = r.ProjectorLoss(cfg, net, teacher)
    plain = h.DistillLoss(cfg, net, teacher)
    loss = loss_fn(images, labels).loss
    plain_loss = plain(images, labels).loss
    assert loss > plain_loss + 0.01  # the distance of the features

    # fc is the projector, which learns, and then the teacher's classifier, which does not.
    loss.backward()
    assert net.fc[0].weight.grad is not None
    assert net.fc[1].weight.grad is None
    assert torch.equal(net.fc[1].weight, teacher.fc.weight)

    folded = r.deployed(net.eval())
    assert torch.allclose(folded(images), net(images), atol=1e-5)
    assert isinstance(folded.fc, torch.nn.Linear)


def test_choosing_never_sees_the_validation_split_and_its_halves_stay_the_same(food):
    data = h.find_data(food)
    halves = r.choosing_data(data)
    trained = set(halves.ids["training"])
    held_out = set(halves.ids["validation"])
    assert trained | held_out == set(data.ids["training"])
    assert not trained & held_out
    assert 4 <= len(trained) <= 18  # of 22
    for split in ("training", "validation"):
        for path, label in zip(halves.files[split], halves.labels[split], strict=True):
            assert path.parent.name == "training"
            assert path.name.startswith(f"{label}_")

    # Another image in the folder does not move the others.
    first = data.files["training"][0]
    first.with_name("0_99.jpg").write_bytes(first.read_bytes())
    more = r.choosing_data(h.find_data(food))
    assert trained <= set(more.ids["training"])
    assert held_out <= set(more.ids["validation"])


def test_stored_rows_that_chose_no_epoch_are_of_the_last_one():
    rows = pd.read_csv(r.RESULTS / "recipes.csv")
    unchosen = rows[rows["scored"] != "best"]
    assert len(unchosen) > 10
    assert (unchosen["accuracy"] == unchosen["last_accuracy"]).all()


def test_early_alignment_is_alignment_in_the_first_half_and_needs_no_teacher_in_the_second(teacher):
    aligned = r.ALIGNED_HANDOVER
    cfg = r.RECIPES["handover_early"].cfg
    net = r.own_net(cfg, teacher)
    early = r.EarlyAlignment(cfg, net, teacher)
    whole = h.DistillLoss(aligned, net, teacher)
    images = torch.randn(4, 3, 64, 64)
    labels = torch.arange(4)
    for loss_fn in (early, whole):
        loss_fn.set_progress(0.5)
    assert torch.equal(early(images, labels).loss, whole(images, labels).loss)

    # In the second half stored logits are taken as they are, and no layer is compared.
    for loss_fn in (early, whole):
        loss_fn.set_progress(0.6)
    stored = torch.randn(4, 11)
    out = early(images, labels, stored)
    assert torch.equal(out.teacher_logits, stored)
    assert "align" not in out.terms
    assert not torch.equal(whole(images, labels, stored).teacher_logits, stored)


def test_changed_views_are_each_pictures_own_and_the_same_again_in_the_same_epoch(teacher):
    number = torch.arange(1.0, 17)  # a picture's own grey, which its own label stands for
    images = torch.ones(16, 3, 64, 64) * number[:, None, None, None]
    labels = torch.arange(16) % 11
    own = torch.eye(16)

    # Mixed: the label says which greys were blended, and how much of each.
    blended, mixed_labels = r.mixed(images, own, np.random.default_rng(1))
    assert (mixed_labels.max(1).values < 0.9).any()
    assert torch.allclose(mixed_labels.sum(1), torch.ones(16))
    expected = (mixed_labels @ number)[:, None, None, None]
    assert torch.allclose(blended, expected.expand_as(blended))

    # Cut: every pixel is of one picture or of its partner, and the label says how many.
    cut, cut_labels = r.cut_mixed(images, own, np.random.default_rng(1))
    assert torch.allclose(cut_labels.sum(1), torch.ones(16))
    for picture in range(16):
        for partner in range(16):
            share = (cut[picture, 0] == number[partner]).float().mean()
            assert torch.allclose(share, cut_labels[picture, partner], atol=1e-5)
    assert 2 < (cut_labels.max(1).values < 0.999).sum() < 14

    # Coloured: red and blue lie two apart, and each picture gets its own distance and brightness.
    colours = images + torch.tensor([-1.0, 0.0, 1.0])[:, None, None]
    shifted, same = r.coloured(colours, own, np.random.default_rng(1))
    apart = (shifted[:, 2] - shifted[:, 0])[:, 0, 0] / 2
    grey = shifted.mean((1, 2, 3))
    assert same is own
    assert 0.3 < apart.min() < apart.max() < 2
    assert len(apart.unique()) == 16
    assert len(grey.unique()) == 16

    # Erased: some pictures lose a square, at most a quarter of them, and nothing else changes.
    holes, same = r.erased(images, own, np.random.default_rng(1))
    area = (holes == 0).float().mean((1, 2, 3))
    assert 0 < (area > 0).sum() < 16
    assert area.max() <= 0.26
    assert same is own
    assert torch.equal(holes[holes != 0], images[holes != 0])

    cfg = h.STAGES["beyond"]
    loss_fn = r.ChangedViews(r.mixed, cfg, h.build_student(cfg), teacher)
    answers = []
    for progress in (0.5, 0.5, 0.6):
        loss_fn.set_progress(progress)
        answers.append(loss_fn(images, labels).teacher_logits)
    assert torch.equal(answers[0], answers[1])
    assert not torch.allclose(answers[0], answers[2])


def test_the_ring_trains_stores_tabulates_and_predicts(food, teacher_file, tmp_path, capsys):
    """Two recipes with other losses and a folded net, end to end: one row each, trained once."""
    names = ["beyond_projector", "beyond_erase"]
    results = tmp_path / "results"
    work = tmp_path / "work"
    folders = ["--data", str(food), "--results", str(results), "--work", str(work)]
    budget = [*ONE_SMALL_EPOCH, *folders, "--against", names[0]]

    r.main(names + budget)
    r.main(names + budget)
    assert capsys.readouterr().out.count("is stored already") == 2
    rows = pd.read_csv(results / "recipes.csv")
    assert list(rows.recipe) == names
    assert (rows.parameters == 52_795).all()
    assert (rows.scored == "half").all()
    assert (rows.last_accuracy == rows.accuracy).all()  # no epoch was chosen
    shares = rows[["accuracy", "last_accuracy", "six_views", "agreement"]]
    assert shares.stack().between(0, 1).all()

    r.main(["--table", *budget])
    assert "difference" in capsys.readouterr().out
    assert (results / "recipes-1-64-80-0-half.png").is_file()

    r.main(names + budget + ["--predict", str(tmp_path / "csv")])
    ids = h.read_folder(food).ids["evaluation"]
    for name in ("teacher", *(f"{name}_1_half" for name in names)):  # one epoch
        h.validate_submission(tmp_path / f"csv/{name}.csv", ids)

    with pytest.raises(SystemExit):
        r.main(["no_such_recipe"])
    assert "no recipe is called no_such_recipe" in capsys.readouterr().err


def test_the_teacher_that_looks_at_enlarged_views_has_its_own_checksum(teacher):
    large = h.freeze(r.EnlargingTeacher(teacher, 96))
    assert h.state_checksum(large) != h.state_checksum(teacher)
    assert large(torch.randn(2, 3, 64, 64)).shape == (2, 11)
