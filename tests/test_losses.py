"""The losses, against numbers worked out by hand and torch's own functions."""

import math

import pytest
import torch
import torch.nn.functional as F
from shared import DWPW
from torch import nn

import helpers as h


def logits(seed=0, n=6):
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(n, h.NUM_CLASSES, generator=generator)
    teacher = 3 * torch.randn(n, h.NUM_CLASSES, generator=generator)
    return student, teacher


def test_loss_fn_kd_by_hand():
    student = torch.tensor([[2.0, 0.0]])
    teacher = torch.tensor([[0.0, 4.0]])
    p = [1 / (1 + math.exp(2)), math.exp(2) / (1 + math.exp(2))]  # softmax((0, 4) / 2)
    q = [math.exp(1) / (math.exp(1) + 1), 1 / (math.exp(1) + 1)]  # softmax((2, 0) / 2)
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    ce = -math.log(math.exp(2) / (math.exp(2) + 1))
    loss = h.loss_fn_kd(student, torch.tensor([0]), teacher, alpha=0.3, temperature=2.0)
    assert loss.item() == pytest.approx(0.3 * 4 * kl + 0.7 * ce, rel=1e-5)


def test_loss_fn_kd_bounds():
    student, teacher = logits()
    labels = torch.arange(6)
    assert h.loss_fn_kd(teacher, labels, teacher, alpha=1.0).item() == pytest.approx(0, abs=1e-4)
    assert h.loss_fn_kd(student, labels, teacher, alpha=0.0) == F.cross_entropy(student, labels)

    usual = h.loss_fn_kd(student, labels, teacher)
    assert usual == h.loss_fn_kd(student, labels, teacher, 0.5, 20.0)
    assert h.loss_fn_kd(student.half(), labels, teacher.half()).dtype == torch.float32

    soft = F.one_hot(labels, 11).float()
    assert torch.allclose(h.loss_fn_kd(student, soft, teacher), usual)


def test_t_squared_keeps_the_gradients_size():
    student, teacher = logits()
    sizes = []
    for t in (5.0, 20.0, 80.0):
        x = student.clone().requires_grad_()
        h.loss_fn_kd(x, torch.arange(6), teacher, 1.0, t).backward()
        sizes.append(x.grad.norm().item())
    assert max(sizes) / min(sizes) < 1.3


def test_handover_is_the_published_form():
    cfg = h.STAGES["boss"]
    for p in (0.1, 0.5, 1.0):
        kd, alpha, align = h.loss_weights(cfg, p)
        assert kd * alpha == pytest.approx(10 * p**2 * (1 - p**2))
        assert kd * (1 - alpha) == pytest.approx(10 * p**4)
        assert align == 1.0
    assert h.loss_weights(h.STAGES["medium"], 0.3) == (1.0, 0.5, 1.0)


def test_alignment_is_a_weighted_smooth_l1():
    ours = {"layer1": torch.zeros(1, 2, 1, 1)}
    theirs = {"layer1": torch.tensor([0.5, 3.0]).view(1, 2, 1, 1)}
    loss = h.alignment(ours, theirs, {"layer1": 3.0}, {"layer1": nn.Identity()})
    # Weight 3, and the mean of a distance below one, halved and squared, and of one above it.
    by_hand = 3 * (0.5 * 0.5**2 + (3.0 - 0.5)) / 2
    assert loss.item() == pytest.approx(by_hand)


def boss_loss(teacher_file, **settings):
    cfg = h.get_config("boss", image_size=64, **DWPW | settings)
    teacher = h.load_teacher(teacher_file)
    return h.DistillLoss(cfg, h.build_student(cfg), teacher)


def test_distill_loss_is_the_sum_of_its_terms(teacher_file):
    loss_fn = boss_loss(teacher_file).eval()
    loss_fn.set_progress(0.5)
    images = torch.randn(3, 3, 64, 64)
    labels = torch.tensor([1, 2, 3])
    out = loss_fn(images, labels)

    ours = h.features_of(loss_fn.student, loss_fn.layers, images)
    theirs = h.features_of(loss_fn.teacher, loss_fn.layers, images)
    ce = F.cross_entropy(out.student_logits, labels)
    kl = h.loss_fn_kd(out.student_logits, labels, out.teacher_logits, 1.0, 4.0)
    align = 0.0
    for layer, weight in (("layer1", 3), ("layer2", 2), ("layer3", 1)):
        align += weight * F.smooth_l1_loss(ours[layer], theirs[layer])
    # 10 p^4 and 10 p^2 (1 - p^2) at half of the training
    wanted = 10 / 16 * ce + 10 / 4 * 3 / 4 * kl + align

    assert out.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, term in (("ce", ce), ("kl", kl), ("align", align)):
        assert out.terms[name].item() == pytest.approx(term.item(), rel=1e-5)
        assert not out.terms[name].requires_grad


def test_constant_schedule_equals_loss_fn_kd(teacher_file):
    cfg = h.get_config("medium", image_size=64)
    loss_fn = h.DistillLoss(cfg, h.build_student(cfg), h.load_teacher(teacher_file)).eval()
    images = torch.randn(3, 3, 64, 64)
    labels = torch.tensor([1, 2, 3])
    loss, _, student_logits, teacher_logits = loss_fn(images, labels)
    wanted = h.loss_fn_kd(student_logits, labels, teacher_logits, 0.5, 20.0)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def feature_maps(sides):
    """Random maps of the three layers, as wide as the teacher's."""
    maps = {}
    for layer, width, side in zip((1, 2, 3), (64, 128, 256), sides, strict=True):
        maps[f"layer{layer}"] = torch.randn(2, width, side, side)
    return maps


def test_the_larger_of_two_feature_maps_is_pooled(teacher_file):
    loss_fn = boss_loss(teacher_file, strides=(1, 1, 2))
    weights = loss_fn.cfg.align_weights
    large = feature_maps((16, 16, 8))
    small = feature_maps((16, 8, 4))
    wanted = 0.0
    for (name, x), weight in zip(large.items(), weights, strict=True):
        factor = x.shape[2] // small[name].shape[2]
        pooled = F.avg_pool2d(x, factor)
        wanted += weight * F.smooth_l1_loss(pooled, small[name])
    assert torch.allclose(h.alignment(large, small, loss_fn.layers, loss_fn.adapters), wanted)
    assert torch.allclose(h.alignment(small, large, loss_fn.layers, loss_fn.adapters), wanted)


def test_only_student_and_adapters_are_parameters(teacher_file):
    loss_fn = boss_loss(teacher_file, widths=(32, 64, 128))
    own = {id(p) for p in loss_fn.parameters()}
    teachers = {id(p) for p in loss_fn.teacher.parameters()}
    assert not own & teachers
    stored = {key.split(".")[0] for key in loss_fn.state_dict()}
    assert stored == {"student", "adapters"}
    # Each adapter is a convolution from the student's width to the teacher's.
    widths = [loss_fn.adapters[f"layer{i}"].weight.shape[:2] for i in (1, 2, 3)]
    assert widths == [(64, 32), (128, 64), (256, 128)]
    assert h.check_budget(loss_fn.student) < h.PARAM_LIMIT


@pytest.mark.parametrize("widths", [(64, 128, 256), (32, 64, 128)])
def test_the_loss_is_fp32_under_bf16_networks(teacher_file, widths):
    loss_fn = boss_loss(teacher_file, widths=widths)
    loss_fn.dtype = torch.bfloat16
    loss_fn.set_progress(0.5)
    loss, _, student_logits, _ = loss_fn(torch.randn(2, 3, 64, 64), torch.arange(2))
    loss.backward()
    assert loss.dtype == torch.float32
    assert student_logits.dtype == torch.bfloat16


def test_train_mode_never_reaches_the_teacher(teacher_file):
    loss_fn = boss_loss(teacher_file)
    loss_fn.set_progress(0.5)
    before = h.state_checksum(loss_fn.teacher)
    out = loss_fn.train()(torch.randn(4, 3, 64, 64), torch.arange(4))
    out.loss.backward()
    assert not any(m.training for m in loss_fn.teacher.modules())
    assert h.state_checksum(loss_fn.teacher) == before
    assert all(p.grad is None for p in loss_fn.teacher.parameters())
    assert all(p.grad is not None for p in loss_fn.student.parameters())


def test_hooks_live_for_one_call(teacher_file):
    loss_fn = boss_loss(teacher_file)
    with pytest.raises(RuntimeError):  # five channels
        loss_fn(torch.randn(1, 5, 64, 64), torch.zeros(1).long())
    loss_fn(torch.randn(2, 3, 64, 64), torch.zeros(2).long())
    for net in (loss_fn.student, loss_fn.teacher):
        assert not any(m._forward_hooks for m in net.modules())


def test_the_teacher_does_not_run_when_nothing_needs_it(teacher_file):
    def forward(x):
        pytest.fail("the teacher ran")

    teacher = h.load_teacher(teacher_file)
    teacher.forward = forward
    images = torch.randn(2, 3, 64, 64)
    labels = torch.zeros(2).long()
    unused = (
        (h.get_config("simple", image_size=64), None),
        (h.get_config("medium", image_size=64, alpha=0), None),
        (h.get_config("medium", image_size=64), torch.zeros(2, 11)),  # its answers are stored
    )
    for cfg, stored in unused:
        loss_fn = h.DistillLoss(cfg, h.build_student(cfg), teacher)
        loss_fn(images, labels, stored)


def test_a_missing_teacher_is_said():
    cfg = h.get_config("boss", image_size=64)
    with pytest.raises(h.UserError, match="boss needs a teacher.*--teacher"):
        h.DistillLoss(cfg, h.build_student(cfg))


def test_own_functions_get_fp32_logits_and_maps(teacher_file):
    """Under autocast too, so that a loss which is right in full precision is right there."""
    seen = []

    def own_loss(student_logits, labels, teacher_logits, alpha, temperature):
        seen.extend([student_logits.dtype, teacher_logits.dtype])
        return h.loss_fn_kd(student_logits, labels, teacher_logits, alpha, temperature)

    def own_alignment(student_maps, teacher_maps, weights, adapters):
        for layer in weights:
            seen.extend([student_maps[layer].dtype, teacher_maps[layer].dtype])
        return h.alignment(student_maps, teacher_maps, weights, adapters)

    cfg = h.get_config("boss", image_size=64)
    teacher = h.load_teacher(teacher_file)
    student = h.build_student(cfg)
    loss_fn = h.DistillLoss(cfg, student, teacher, own_loss, own_alignment)
    loss_fn.dtype = torch.bfloat16
    loss_fn(torch.randn(2, 3, 64, 64), torch.arange(2))
    assert len(seen) == 8
    assert set(seen) == {torch.float32}
