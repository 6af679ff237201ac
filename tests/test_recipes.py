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


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def teacher():
    return h.freeze(h.build_student(h.TEACHER_CONFIG))


@pytest.mark.parametrize("name", r.RECIPES)
def test_every_net_answers_and_all_but_the_published_one_are_legal(name, teacher):
    net = r.RECIPES[name].net(r.RECIPES[name].cfg, teacher)
    assert net.train()(torch.randn(2, 3, 64, 64)).shape == (2, 11)
    assert (
        h.check_budget(r.deployed(net), 99_891 if name == "published_boss" else h.PARAM_LIMIT)
        > 40_000
    )


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_folded_net_answers_like_its_branches(kernel):
    """With weights and statistics that are not fresh, for which a wrong fold could pass."""
    net = r.Spec(((24, 2, 2), (32, 2, 1)), kernel=kernel, rep=True).build()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.uniform_(0.5, 1.5)
    images, folded = torch.randn(3, 3, 64, 64), r.deployed(net.eval())
    with torch.no_grad():
        assert torch.allclose(folded(images), net(images), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, r.RepDepthwise) for module in folded.modules())
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in net.parameters())


def test_an_anti_aliased_stride_keeps_a_constant_and_blurs_a_checkerboard_away():
    pool, flat = r.BlurPool(2), torch.ones(1, 2, 8, 8)
    board = flat * (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))
    assert torch.allclose(pool(flat)[..., 1:, 1:], torch.ones(1, 2, 3, 3))
    assert torch.allclose(pool(board)[..., 1:, 1:], torch.zeros(1, 2, 3, 3), atol=1e-6)


def test_the_frozen_stem_is_the_teachers_and_stays_so(teacher):
    net = r.RECIPES["published_boss"].net(r.RECIPES["published_boss"].cfg, teacher).train()
    before = h.state_checksum(net.stem)
    net(torch.randn(4, 3, 64, 64)).sum().backward()
    assert torch.equal(net.stem[0].weight, teacher.conv1.weight) and net.stem[0].weight.grad is None
    assert h.state_checksum(net.stem) == before and net.layer1[0][1].training


def test_candidate_losses_vanish_where_the_answers_agree_in_their_sense():
    """Standardised logits forget scale and shift; DIST forgets them in the probabilities alone."""
    teacher, labels = torch.randn(8, 11), torch.zeros(8, dtype=torch.long)
    other = torch.randn(8, 11)
    assert r.standardised_kd(3 * teacher + 2, labels, teacher, 1.0, 2.0).abs() < 1e-4
    assert r.standardised_kd(other, labels, teacher, 1.0, 2.0) > 0.1
    assert r.dist_kd(teacher + 5, labels, teacher, 1.0, 2.0).abs() < 1e-4
    paler = (
        0.5 * teacher.softmax(1) + 0.5 / 11
    ).log()  # every correlation is one, and the KL divergence is not zero
    assert (
        r.dist_kd(paler, labels, teacher, 1.0, 1.0).abs()
        < 1e-4
        < h.loss_fn_kd(paler, labels, teacher, 1.0, 1.0)
    )
    for student, temperature in ((other, 2.0), (3 * teacher, 1.0)):
        assert r.dist_kd(student, labels, teacher, 1.0, temperature) > 0.01


def test_a_projector_into_the_teachers_classifier_folds_and_leaves_the_teachers_own_alone(teacher):
    cfg = h.STAGES["beyond"]
    net, images = r.projected_net(cfg, teacher), torch.randn(3, 3, 64, 64)
    loss_fn = r.ProjectorLoss(cfg, net, teacher)
    plain = h.DistillLoss(cfg, net, teacher)
    loss = loss_fn(images, torch.arange(3)).loss
    assert loss > plain(images, torch.arange(3)).loss + 0.01  # the distance of the features
    loss.backward()
    assert net.fc[0].weight.grad is not None and net.fc[1].weight.grad is None
    assert torch.equal(net.fc[1].weight, teacher.fc.weight)
    folded = r.deployed(net.eval())
    assert torch.allclose(folded(images), net(images), atol=1e-5) and isinstance(
        folded.fc, torch.nn.Linear
    )


def test_changed_views_are_each_pictures_own_and_the_same_again_in_the_same_epoch(teacher):
    number = torch.arange(1.0, 17)  # a picture's own grey, which its own label stands for
    images = torch.ones(16, 3, 64, 64) * number[:, None, None, None]
    labels = torch.arange(16) % 11
    own = torch.eye(16)
    rngs = [np.random.default_rng(1) for _ in range(3)]
    blended, mixed_labels = r.mixed(images, own, rngs[0])
    assert (mixed_labels.max(1).values < 0.9).any() and torch.allclose(
        mixed_labels.sum(1), torch.ones(16)
    )
    assert torch.allclose(blended, (mixed_labels @ number)[:, None, None, None].expand_as(blended))
    colours = images + torch.tensor([-1.0, 0.0, 1.0])[:, None, None]
    shifted, same = r.coloured(colours, own, rngs[1])
    apart, grey = (shifted[:, 2] - shifted[:, 0])[:, 0, 0] / 2, shifted.mean((1, 2, 3))
    assert (
        same is own
        and 0.3 < apart.min() < apart.max() < 2
        and len(apart.unique()) == len(grey.unique()) == 16
    )
    holes, same = r.erased(images, own, rngs[2])
    area = (holes == 0).float().mean((1, 2, 3))
    assert 0 < (area > 0).sum() < 16 and area.max() <= 0.26 and same is own
    assert torch.equal(holes[holes != 0], images[holes != 0])
    loss_fn = r.ChangedViews(
        r.mixed, h.STAGES["beyond"], h.build_student(h.STAGES["beyond"]), teacher
    )
    answers = []
    for progress in (0.5, 0.5, 0.6):
        loss_fn.set_progress(progress)
        answers.append(loss_fn(images, labels).teacher_logits)
    assert torch.equal(answers[0], answers[1]) and not torch.allclose(answers[0], answers[2])


def test_the_ring_trains_stores_tabulates_and_predicts(food, teacher_file, tmp_path, capsys):
    """Two recipes with other losses and a folded net, end to end: one row each, trained once."""
    names, results = ["beyond_projector", "beyond_erase"], tmp_path / "results"
    budget = [
        "--epochs",
        "1",
        "--size",
        "64",
        "--teacher-size",
        "80",
        "--data",
        str(food),
        "--results",
        str(results),
        "--work",
        str(tmp_path / "work"),
        "--against",
        names[0],
    ]
    r.main(names + budget)
    r.main(names + budget)
    assert capsys.readouterr().out.count("is stored already") == 2
    rows = pd.read_csv(results / "recipes.csv")
    assert list(rows.recipe) == names and (rows.parameters == 52_795).all()
    assert rows[["accuracy", "last_accuracy", "six_views", "agreement"]].stack().between(0, 1).all()
    r.main(["--table", *budget])
    assert "difference" in capsys.readouterr().out and (results / "recipes-1-64-80-0.png").is_file()
    r.main(names + budget + ["--predict", str(tmp_path / "csv")])
    for name in ("teacher", *names):
        h.validate_submission(tmp_path / f"csv/{name}.csv", h.read_folder(food).ids["evaluation"])
    with pytest.raises(SystemExit):
        r.main(["no_such_recipe"])
    assert "no recipe is called no_such_recipe" in capsys.readouterr().err


def test_the_teacher_that_looks_at_enlarged_views_has_its_own_checksum(teacher):
    large = h.freeze(r.EnlargingTeacher(teacher, 96))
    assert h.state_checksum(large) != h.state_checksum(teacher)
    assert large(torch.randn(2, 3, 64, 64)).shape == (2, 11)
