"""The losses, against their formulas in float64 and numbers worked out by hand."""

import pytest
import torch
from torch import nn

import helpers as h

LABELS = torch.tensor([0, 3, 10, 3])
IMAGES = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def logits(seed):
    return 3 * torch.randn(4, 11, generator=torch.Generator().manual_seed(seed))


def by_formula(student, teacher, alpha, temperature):
    """alpha T^2 KL(teacher || student) + (1 - alpha) CE, as it is written, in float64."""
    p = (teacher.double() / temperature).softmax(1)
    q = (student.double() / temperature).softmax(1)
    kl = (p * (p / q).log()).sum() / 4
    ce = -student.double().softmax(1)[range(4), LABELS].log().mean()
    return (alpha * temperature**2 * kl + (1 - alpha) * ce).item()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_loss_fn_kd_is_its_formula_and_writes_to_nothing(alpha, temperature):
    student, teacher = logits(1), logits(2)
    loss = h.loss_fn_kd(student, LABELS, teacher, alpha, temperature).item()
    assert loss == pytest.approx(by_formula(student, teacher, alpha, temperature), rel=1e-4)
    assert torch.equal(torch.cat([student, teacher]), torch.cat([logits(1), logits(2)]))


def test_loss_fn_kd_is_fp32_under_autocast_and_has_the_courses_defaults():
    student, teacher = logits(1).bfloat16(), logits(2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = h.loss_fn_kd(student, LABELS, teacher).item()
    assert loss == pytest.approx(by_formula(student, teacher, 0.5, 20.0), rel=1e-4)


def test_the_weights_of_the_loss_follow_the_schedule():
    assert h.loss_weights(h.MEDIUM, 0.3) == (1.0, 0.5, 1.0)
    # 10 p^2 (1 - p^2) for the soft loss, 10 p^4 for the labels.
    kd, alpha, align = h.loss_weights(h.BOSS, 0.5)
    assert (kd * alpha, kd * (1 - alpha), align) == (1.875, 0.625, 1.0)


# --- feature maps ---------------------------------------------------------------------------------


def test_alignment_is_a_weighted_smooth_l1_at_the_smaller_of_two_sizes():
    # Means of 0.5 and 3, at places of two channels.
    large = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]], [[3.0, 3.0], [2.0, 4.0]]]])
    small = torch.zeros(1, 2, 1, 1)
    weights = {"layer1": 3.0, "layer2": 2.0}
    adapters = dict.fromkeys(weights, nn.Identity())
    # Half its square up to a distance of one, the distance less a half above.
    one_layer = (0.5 * 0.5**2 + 3.0 - 0.5) / 2
    for ours, theirs in ((large, small), (small, large)):
        maps = {"layer1": ours, "layer2": small}, {"layer1": theirs, "layer2": small + 1}
        assert h.alignment(*maps, weights, adapters).item() == 3 * one_layer + 2 * 0.5


def boss(seed=0, **own):
    """A small DistillLoss; the student's layers 1 and 3 are as wide as the teacher's."""
    cfg = h.get_config("boss", image_size=40, widths=(64, 32, 256), depths=(1, 1, 1), seed=seed)
    cfg = h.replace(cfg, temperature=5.0, amp="bf16")
    teacher = h.plain_student()
    nn.init.normal_(teacher.fc.weight)  # fresh weights would answer nearly alike to all
    return h.DistillLoss(cfg, h.build_student(cfg), teacher, **own)


def test_an_adapter_is_drawn_from_the_seed():
    torch.manual_seed(5)
    _, bias = boss().adapters.parameters()
    assert torch.equal(boss().adapters.layer2.bias, bias)


# --- DistillLoss ----------------------------------------------------------------------------------


def test_distill_loss_is_the_sum_of_its_weighed_terms():
    loss_fn = boss().eval()
    loss_fn.set_progress(0.5)
    out = loss_fn(IMAGES, LABELS)
    weights = {"layer1": 3, "layer2": 2, "layer3": 1}
    ours = h.features_of(loss_fn.student, weights, IMAGES)
    theirs = h.features_of(loss_fn.teacher, weights, IMAGES)
    align = h.alignment(ours, theirs, weights, loss_fn.adapters).item()
    ce = by_formula(out.student_logits, out.teacher_logits, 0.0, 5.0)
    kl = by_formula(out.student_logits, out.teacher_logits, 1.0, 5.0)
    assert [*out.terms.values()] == pytest.approx([ce, kl, align], 1e-4)
    # 10 p^4 and 10 p^2 (1 - p^2) at half of the training.
    assert out.loss.item() == pytest.approx(10 / 16 * ce + 10 / 4 * 3 / 4 * kl + align, rel=1e-4)


def test_a_step_changes_no_teacher_and_leaves_no_hook():
    loss_fn = boss().train()
    assert {name.split(".")[0] for name in loss_fn.state_dict()} == {"student", "adapters"}
    before = h.state_checksum(loss_fn.teacher)
    loss_fn.set_progress(0.5)
    loss_fn(IMAGES, LABELS).loss.backward()
    assert h.state_checksum(loss_fn.teacher) == before
    assert all(p.grad is not None for p in loss_fn.parameters())
    assert not any(module._forward_hooks for module in loss_fn.modules())


@pytest.mark.parametrize(
    ("stage", "settings", "stored"),
    [
        ("simple", {}, None),
        ("medium", {"alpha": 0.0}, None),
        ("boss", {"align_weights": (0.0,)}, logits(2)),
    ],
)
def test_the_teacher_does_not_run_when_nothing_needs_it(stage, settings, stored):
    cfg = h.get_config(stage, image_size=40, **settings)
    teacher = h.plain_student()
    loss_fn = h.DistillLoss(cfg, h.build_student(cfg), teacher).eval()
    teacher.forward = lambda images: pytest.fail("the teacher ran")
    assert loss_fn(IMAGES, LABELS, stored).teacher_logits is stored


def test_an_own_loss_gets_fp32_and_what_it_writes_to_is_a_copy():
    def own_loss(student_logits, labels, teacher_logits, alpha, temperature):
        assert student_logits.dtype == teacher_logits.dtype == torch.float32
        return student_logits.sum() + teacher_logits.zero_().sum() + alpha * temperature

    loss_fn = boss(loss_fn_kd=own_loss, loss_weights=lambda *arguments: (0.5, 0.25, 0.0)).on("cpu")
    for dtype in (torch.bfloat16, None):
        loss_fn.dtype = dtype
        out = loss_fn(IMAGES, LABELS)
        assert out.teacher_logits.any()
        assert torch.allclose(out.loss, 0.5 * (out.student_logits.float().sum() + 0.25 * 5.0))
