"""The checks of a learner's own answers: right ones pass, whatever their form, and mistakes are
named. The mistakes are written here by hand, as a learner writes them, beside those of the tables.
"""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import helpers as h

# (check, table of mistakes, the function with a mistake, the right one)
TABLES = {
    "soft_labels": (
        h.check_soft_labels,
        h.SOFT_LABEL_MISTAKES,
        h.soft_labels_variant,
        h.soft_labels,
    ),
    "loss_fn_kd": (h.check_loss_fn_kd, h.KD_MISTAKES, h.kd_variant, h.loss_fn_kd),
    "dwpw_conv": (h.check_dwpw_conv, h.DWPW_MISTAKES, h.dwpw_variant, h.dwpw_conv),
    "alignment": (h.check_alignment, h.ALIGNMENT_MISTAKES, h.alignment_variant, h.alignment),
    "schedule": (
        h.check_loss_weights,
        h.SCHEDULE_MISTAKES,
        h.schedule_variant,
        h.loss_weights,
    ),
    "loop": (h.check_training_loop, h.LOOP_MISTAKES, h.loop_variant, h.loop_of_fit),
}


@pytest.fixture
def said(capsys):
    """A function that gives (verdict, what was printed) of a check of an answer."""

    def ask(check, answer, **settings):
        verdict = check(answer, **settings)
        return verdict, capsys.readouterr().out.strip()

    return ask


@pytest.mark.parametrize("table", TABLES)
def test_the_right_function_is_right(said, table):
    check, _, variant, reference = TABLES[table]
    for answer in (variant, reference):
        verdict, text = said(check, answer)
        assert verdict
        assert text.startswith("Right")


@pytest.mark.parametrize("table", TABLES)
def test_each_mistake_of_a_table_is_named_and_no_other(said, table):
    check, mistakes, variant, _ = TABLES[table]
    for hint, changes in mistakes.items():
        verdict, text = said(check, functools.partial(variant, **changes))
        assert not verdict
        assert text.rstrip(".?") == f"Not yet: {hint}".rstrip(".?")


@pytest.mark.parametrize("check", [check for check, *_ in TABLES.values()])
def test_what_is_not_written_or_fails_is_said(said, check):
    def to_do(*arguments):
        raise NotImplementedError

    def failing(*arguments):
        return 1 / 0

    assert said(check, to_do) == (False, "Not yet: it is still to be written.")
    line = failing.__code__.co_firstlineno + 1
    assert said(check, failing) == (
        False,
        f"Not yet: it raises ZeroDivisionError in line {line}: division by zero.",
    )
    assert not check(lambda *arguments: None)


def to_be_written(*arguments):
    raise NotImplementedError


def test_the_function_that_is_still_to_be_written_is_named(said):
    def calls_another(student_logits, labels, teacher_logits, alpha, temperature):
        return to_be_written(student_logits)

    assert said(h.check_loss_fn_kd, calls_another) == (
        False,
        "Not yet: to_be_written, which it calls, is still to be written.",
    )
    # torch's own error of that kind has a text, which says more.
    verdict, text = said(h.check_dwpw_conv, lambda *arguments: nn.ModuleList([nn.Conv2d(8, 9, 1)]))
    assert not verdict
    assert 'missing the required "forward" function' in text


def test_an_answer_that_leaves_the_device_is_told_so(said):
    verdict, text = said(h.check_soft_labels, lambda z, t: F.softmax(z / t, -1).to("meta"))
    assert not verdict
    assert "lies on meta, where the arguments lie on cpu" in text


def test_soft_labels_in_place_are_told_so(said):
    def in_place(logits, temperature):
        logits /= temperature
        return logits.softmax(-1)

    verdict, text = said(h.check_soft_labels, in_place)
    assert not verdict
    assert "not /=" in text


def test_an_alignment_that_names_the_layers_itself_is_told_so(said):
    def names_layers(student_maps, teacher_maps, weights, adapters):
        chosen = {name: weights[name] for name in ("layer1", "layer2", "layer3")}
        return h.alignment(student_maps, teacher_maps, chosen, adapters)

    assert said(h.check_alignment, names_layers) == (
        False,
        "Not yet: it fails on layer2, which has no weight: the layers to align are the keys of "
        "weights.",
    )


def test_an_alignment_may_put_its_pooled_maps_back(said):
    def puts_back(student_maps, teacher_maps, weights, adapters):
        for layer in weights:
            side = min(student_maps[layer].shape[-1], teacher_maps[layer].shape[-1])
            for maps in (student_maps, teacher_maps):
                maps[layer] = F.adaptive_avg_pool2d(maps[layer], side)
        return h.alignment(student_maps, teacher_maps, weights, adapters)

    verdict, text = said(h.check_alignment, puts_back)
    assert verdict, text


# --- loss_fn_kd, as learners write it -------------------------------------------------------------


def kl(student, teacher, t, reduction="batchmean"):
    log_p = F.log_softmax(student / t, dim=1)
    return F.kl_div(log_p, F.softmax(teacher / t, dim=1), reduction=reduction)


def right_by_hand(s, y, t, alpha, temperature):
    p = (t / temperature).softmax(1)
    q = (s / temperature).log_softmax(1)  # logarithms already
    soft = (p * (p.log() - q)).sum(1).mean()
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(s, y)


def soft_cross_entropy(s, y, t, alpha, temperature):
    """As PyTorch's tutorial has it: without the teacher's entropy."""
    soft = -(F.softmax(t / temperature, 1) * F.log_softmax(s / temperature, 1)).sum(1).mean()
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(s, y)


def test_a_loss_with_the_same_value_or_the_same_gradient_is_right(said):
    assert said(h.check_loss_fn_kd, right_by_hand) == (True, "Right: it agrees with loss_fn_kd.")
    verdict, text = said(h.check_loss_fn_kd, soft_cross_entropy)
    assert verdict
    assert "the gradient of loss_fn_kd and another value" in text


@pytest.mark.parametrize(
    "without",
    [
        lambda loss: loss.item(),
        lambda loss: loss.detach(),
        lambda loss: torch.tensor(loss.item()),
    ],
)
def test_a_loss_without_a_gradient_is_refused(said, without):
    verdict, text = said(h.check_loss_fn_kd, lambda *case: without(h.loss_fn_kd(*case)))
    assert not verdict
    assert "no gradient" in text


def test_a_loss_under_no_grad_is_refused(said):
    verdict, text = said(h.check_loss_fn_kd, torch.no_grad()(right_by_hand))
    assert not verdict
    assert "torch.no_grad()" in text


def swapped_in_the_kl(s, y, t, a, T):
    return a * T * T * kl(t, s, T) + (1 - a) * F.cross_entropy(s, y)


def wrong_order(s, y, t, a, T):
    soft = F.kl_div(F.softmax(t / T, 1), F.log_softmax(s / T, 1), reduction="batchmean")
    return a * T * T * soft + (1 - a) * F.cross_entropy(s, y)


def a_logarithm_too_many(s, y, t, a, T):
    soft = F.kl_div(F.log_softmax(s / T, 1), F.log_softmax(t / T, 1), reduction="batchmean")
    return a * T * T * soft + (1 - a) * F.cross_entropy(s, y)


def over_the_batch(s, y, t, a, T):
    soft = F.kl_div(F.log_softmax(s / T, 0), F.softmax(t / T, 0), reduction="batchmean")
    return a * T * T * soft + (1 - a) * F.cross_entropy(s, y)


def detached_soft_loss(s, y, t, a, T):
    return a * T * T * kl(s, t, T).detach() + (1 - a) * F.cross_entropy(s, y)


def one_of_each(s, y, t, a, T):
    """KL as a mean over the classes too, and no T ** 2."""
    return a * kl(s, t, T, "batchmean") / 11 + (1 - a) * F.cross_entropy(s, y)


def in_place(s, y, t, a, T):
    t /= T
    return a * T * T * kl(s / T, t, 1.0) + (1 - a) * F.cross_entropy(s, y)


def swapped_and_unweighted(s, y, t, a, T):
    return a * T * T * kl(t, s, T) + F.cross_entropy(s, y)


BY_HAND = [
    (swapped_in_the_kl, ["swapped inside the KL"]),
    (wrong_order, ["arguments of F.kl_div are in the wrong order"]),
    (a_logarithm_too_many, ["not their logarithm"]),
    (in_place, ["changes teacher_logits in place"]),
    (over_the_batch, ["over the batch (dim=0)"]),
    (detached_soft_loss, ["detached from its gradient"]),
    (one_of_each, ["11 times too small", "And: ", "not multiplied by temperature ** 2"]),
    (swapped_and_unweighted, ["swapped inside the KL", "And: ", "not multiplied by 1 - alpha"]),
    (lambda s, y, t, a, T: right_by_hand(s, y, t, T, a), ["alpha and temperature are swapped"]),
    (lambda s, y, t, a, T: right_by_hand(t, y, s, a, T), ["swapped in both losses"]),
    (
        lambda s, y, t, a, T: a * T**2 * kl(s, t, T) + (1 - a) * F.cross_entropy(s / T, y),
        ["cross-entropy sees logits divided by the temperature"],
    ),
    (
        lambda s, y, t, a, T: a * T**2 * kl(s, t, T) + F.cross_entropy(s, y),
        ["not multiplied by 1 - alpha"],
    ),
    (
        lambda s, y, t, a, T: T**2 * (a * kl(s, t, T) + (1 - a) * F.cross_entropy(s, y)),
        ["T ** 2 multiplies both losses"],
    ),
    (
        lambda s, y, t, a, T: a * kl(s, t, T) + (1 - a) * F.cross_entropy(s / T, y),
        ["not multiplied by temperature ** 2", "And: ", "divided by the temperature"],
    ),
    (
        lambda s, y, t, a, T: a * T**2 * kl(s, t, T, "sum") + (1 - a) * F.cross_entropy(s, y),
        ["grows with the batch"],
    ),
    (lambda *case: right_by_hand(*case) / 3, ["is no known mistake"]),
    (lambda *case: right_by_hand(*case).expand(2), ["a scalar is wanted"]),
]


@pytest.mark.parametrize(("answer", "words"), BY_HAND)
def test_a_wrong_loss_is_told_why(said, answer, words):
    verdict, text = said(h.check_loss_fn_kd, answer)
    assert not verdict
    for word in words:
        assert word in text


# --- the others -----------------------------------------------------------------------------------


def test_soft_labels_by_hand(said):
    def by_hand(logits, temperature):
        powers = (logits / temperature).exp()  # overflows for large logits
        return powers / powers.sum(-1, keepdim=True)

    verdict, text = said(h.check_soft_labels, by_hand)
    assert not verdict
    assert "exp overflows" in text
    assert said(h.check_soft_labels, lambda z, t: (z / t).softmax(-1))[0]
    assert said(h.check_soft_labels, lambda z, t: (z.double() / t).softmax(-1))[0]
    _, text = said(h.check_soft_labels, lambda z, t: (z / t).softmax(1))
    assert "dim=-1" in text


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_soft_labels_without_a_dimension(said):
    # Right for a batch, but for (2, 3, 11) torch takes the first dimension.
    verdict, text = said(h.check_soft_labels, lambda z, t: F.softmax(z / t))
    assert not verdict
    assert "does not say over which dimension" in text


class Block(nn.Module):
    """The course's block as a class."""

    def __init__(self, in_channels, out_channels, kernel_size=3, stride=2, padding=1):
        super().__init__()
        size = (kernel_size, stride, padding)
        # Not in the order in which they are called.
        self.last_norm = nn.BatchNorm2d(out_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)
        self.norm = nn.BatchNorm2d(in_channels)
        self.depthwise = nn.Conv2d(in_channels, in_channels, *size, groups=in_channels)

    def forward(self, x):
        x = F.leaky_relu(self.norm(self.depthwise(x)))
        return F.leaky_relu(self.last_norm(self.pointwise(x)))


def test_the_block_may_be_a_class(said):
    assert said(h.check_dwpw_conv, Block)[0]
    _, text = said(h.check_dwpw_conv, lambda i, o, k=3, s=2, p=1: nn.Conv2d(i, o, k, s, p))
    assert "is no known mistake" in text


@pytest.mark.parametrize("block", [h.dwpw_conv(64, 128), Block(64, 128)])
def test_a_block_is_counted_by_itself(block):
    # By hand: 64 * 9 + 64, 2 * 64, 64 * 128 + 128, 2 * 128.
    assert h.check_budget(block) == 640 + 128 + 8320 + 256 == 9344


def test_the_student(said):
    for right in (h.get_student_model, h.get_student_model(), Net):
        verdict, text = said(h.check_student, right)
        assert verdict, text
        assert "under the limit" in text


class Net(nn.Module):
    """A small student, to be spoilt."""

    def __init__(self, width=16):
        super().__init__()
        self.block = h.dwpw_conv(3, width)
        self.fc = nn.Linear(width, h.NUM_CLASSES)

    def forward(self, x):
        return self.fc(self.block(x).mean((2, 3)))


class Idle(Net):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 3)


class Detached(Net):
    def forward(self, x):
        return self.fc(self.block(x).mean((2, 3)).detach())


class Squeezed(Net):
    def forward(self, x):
        return super().forward(x).squeeze()


class OneSize(nn.Sequential):
    def __init__(self):
        super().__init__(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(48, h.NUM_CLASSES))


class Together(Net):
    def forward(self, x):
        logits = super().forward(x)
        return logits - logits.mean(0)


class InAList(Net):
    """Its second block is no part of it."""

    def __init__(self):
        super().__init__()
        self.blocks = [nn.Conv2d(3, 3, 3, padding=1)]

    def forward(self, x):
        return super().forward(self.blocks[0](x))


class AlwaysDrops(Net):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5)


class NotFinite(Net):
    def forward(self, x):
        return super().forward(x) / 0 * 0


class Frozen(Net):
    def __init__(self):
        super().__init__()
        next(self.parameters()).requires_grad_(False)


def test_frozen_parameters_are_not_called_trained(said):
    frozen = next(Net().parameters()).numel()
    verdict, text = said(h.check_student, Frozen)
    assert verdict
    assert text.endswith(f"under the limit; {frozen:,} of them are frozen.")


class Lazy(nn.Module):
    """It learns at the first image how wide its last layer is."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2)
        self.fc = nn.LazyLinear(11)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


def test_lazy_layers_are_right_and_get_their_weights_from_the_seed():
    assert h.check_student(Lazy)
    cfg = h.Config(image_size=64)
    first = h.state_checksum(h.own_student(cfg, Lazy))
    torch.rand(1)  # elsewhere in the notebook
    assert h.state_checksum(h.own_student(cfg, Lazy)) == first
    assert h.check_budget(h.own_student(cfg, Lazy())) == 224 + 99


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (InAList, "neither trained nor saved"),
        (AlwaysDrops, "it answers otherwise each time"),
        (NotFinite, "its logits are not finite"),
        (Idle, "no gradient reaches 'unused.weight'"),
        (Detached, "no gradient reaches 'block.0.weight'"),
        (Squeezed, "it returns the shape (11,), where the shape (1, 11) is wanted"),
        (OneSize, "it fails on images of 100 x 100"),
        (Together, "depends on the others of the batch"),
        (lambda: nn.Sequential(Net(), nn.Softmax(1)), "probabilities"),
        (lambda: nn.Sequential(Net(), nn.Sigmoid()), "its last step is Sigmoid"),
        (lambda: nn.Sequential(Net(), nn.ReLU(), nn.Flatten()), "its last step is Relu"),
        (lambda: nn.Sequential(Net(), nn.Tanh(), nn.Unflatten(1, (11,))), "last step is Tanh"),
        (lambda: Net().requires_grad_(False), "none of its parameters is trained"),
        (lambda: Net(4000), "the homework allows 60,000"),
        (lambda: nn.Sequential(Net(), nn.Linear(11, 10)), "(3, 10)"),
        (lambda: "net", "it builds a str"),
    ],
)
def test_a_wrong_student_is_told_why(said, wrong, words):
    verdict, text = said(h.check_student, wrong)
    assert not verdict
    assert words.replace("'", "") in text.replace("'", "")


def test_a_student_that_is_handed_in_is_left_as_it_is():
    net = h.get_student_model()
    before = h.state_checksum(net)
    assert h.check_student(net)
    assert h.state_checksum(net) == before
    assert all(p.grad is None for p in net.parameters())


BOSS_VIEWS = {"crop_scale": (0.7, 1.0), "hflip": 0.5, "vflip": 0.5, "rotation": 180, "affine": 30}


def test_the_views_of_boss(said):
    assert said(h.check_views, BOSS_VIEWS) == (True, "Right: these are the views of boss.")
    for name in BOSS_VIEWS:
        verdict, text = said(h.check_views, BOSS_VIEWS | {name: 0.1})
        assert not verdict
        assert name in text
        assert h.VIEW_SETTINGS[name] in text
    assert not h.check_views(BOSS_VIEWS | {"shear": 3})
    assert not h.check_views(None)


def test_views_as_an_array_are_not_right():
    assert not h.check_views(BOSS_VIEWS | {"crop_scale": np.array((0.7, 1.0))})


def loop_by_hand(student, train_loader, cfg):
    optimizer = torch.optim.Adam(student.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    for epoch in range(cfg.n_epochs):
        train_loader.set_epoch(epoch)
        student.train()
        for images, labels, *_ in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(student(images), labels).backward()
            nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_norm_max)
            optimizer.step()


def test_the_loop_by_hand_does_what_fit_does(said):
    assert said(h.check_training_loop, loop_by_hand) == (True, "Right: it agrees with fit.")

    def reports(student, train_loader, cfg):
        loop_by_hand(student, train_loader, cfg)
        print(f"{len(train_loader.dataset)} pictures, {len(train_loader)} batches")

    assert said(h.check_training_loop, reports)[0]

    def idle(student, train_loader, cfg):
        pass

    assert said(h.check_training_loop, idle) == (False, "Not yet: it trains nothing.")


def test_an_alignment_by_hand(said):
    def by_hand(student_maps, teacher_maps, weights, adapters):
        loss = torch.tensor(0.0)
        for name in weights:
            ours = adapters[name](student_maps[name])  # a 1x1 convolution and a mean commute
            theirs = teacher_maps[name]
            side = min(ours.shape[-1], theirs.shape[-1])
            ours = F.adaptive_avg_pool2d(ours, side)
            theirs = F.adaptive_avg_pool2d(theirs, side)
            loss = loss + weights[name] * F.smooth_l1_loss(ours, theirs)
        return loss

    assert said(h.check_alignment, by_hand)[0]

    def of_every_layer(student_maps, teacher_maps, weights, adapters):
        layers = dict.fromkeys(student_maps, 1.0)
        return h.alignment(student_maps, teacher_maps, layers, adapters)

    verdict, text = said(h.check_alignment, of_every_layer)
    assert not verdict
    assert "fails on layer4" in text
    assert "the keys of weights" in text


def test_two_mistakes_in_a_schedule(said):
    def schedule(cfg, progress):
        if cfg.loss_schedule == "handover":
            return h.LossWeights(progress, 1 - progress, 1.0)
        return h.LossWeights(1.0, cfg.alpha, 1.0)

    _, text = said(h.check_loss_weights, schedule)
    assert "factor 10" in text
    assert "not squared" in text


def test_what_differs_is_said_where_no_mistake_is_known(said):
    """By name, place and number, so that a learner can look there."""

    def weights(cfg, progress):
        return h.loss_weights(cfg, progress)._replace(kd=7.0)

    assert said(h.check_loss_weights, weights)[1] == (
        "Not yet: with loss_schedule='handover', kd at p = 0.25 is 7 where 0.625 is wanted, "
        "and that is no known mistake."
    )

    def with_a_layer_too_many(*settings):
        block = h.dwpw_conv(*settings)
        return nn.Sequential(*block, nn.Conv2d(settings[1], settings[1], 1, bias=False))

    assert said(h.check_dwpw_conv, with_a_layer_too_many)[1].startswith(
        "Not yet: the number of parameters in the block of (8, 12) is 372 where 228 is wanted"
    )


def test_arguments_in_another_order_are_named(said):
    def loss(student_logits, teacher_logits, labels, alpha, temperature):
        return h.loss_fn_kd(student_logits, labels, teacher_logits, alpha, temperature)

    assert said(h.check_loss_fn_kd, loss)[1] == (
        "Not yet: the order of the arguments is "
        "student_logits, labels, teacher_logits, alpha, temperature."
    )


def test_blocks_as_learners_slip(said):
    """Written as a learner writes them, not by the variant."""

    def block(i, o, k=3, stride=2, padding=1, *, act=nn.LeakyReLU, last=1, both=1, norm=True):
        layers = [nn.Conv2d(i, i, k, stride, padding, groups=i)]
        if norm:
            layers.append(nn.BatchNorm2d(i))
        layers += [act(0.01), nn.Conv2d(i, o, last or k, both or stride)]
        return nn.Sequential(*layers, nn.BatchNorm2d(o), act(0.01))

    check = h.check_dwpw_conv
    assert said(check, block)[0]
    cases = {
        "there is no batch norm after the depthwise convolution": {"norm": False},
        "the stride belongs to the depthwise convolution alone": {"both": 0},
        "a pointwise one is 1 x 1": {"last": 0},
        "the activation's slope is 0.1": {"act": lambda slope: nn.LeakyReLU(0.1)},
    }
    for words, slip in cases.items():
        verdict, text = said(check, functools.partial(block, **slip))
        assert not verdict
        assert words in text, text
