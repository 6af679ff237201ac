"""Code is known by what it answers: which changes the probe sees, which it lets pass, and that it
leaves everything as it was.
"""

import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import same
from torch import nn

import helpers as h

GLOBALS = {"smoothing": 0.1, "activation": F.relu, "rates": [1.0]}


@pytest.fixture(scope="module")
def teacher():
    """A frozen net far smaller than a ResNet-18, and as sure of its answers as a trained one."""
    net = h.build_student(h.STRONG)
    net.fc.weight.data *= 9
    return h.freeze(net)


@pytest.fixture
def facts_of(teacher, trained, tmp_path):
    """The facts of a stage with own code, as its folder would keep them."""
    data = h.read_folder(trained / "Food-11")

    def facts_of(stage="medium", **own):
        cfg = h.get_config(stage, image_size=40, amp="off")
        return h.prepare_stage(cfg, data, teacher, tmp_path, "cpu", **own)[1].facts

    return facts_of


# --- the losses of a notebook, each as it is changed there: its label smoothing from 0.1 to 0.2 ---


def a_default(w):
    return lambda logits, labels, *rest, w=w: F.cross_entropy(logits, labels, label_smoothing=w)


def a_list_in_a_closure(w):
    box = [w]
    return lambda logits, labels, *rest: F.cross_entropy(logits, labels, label_smoothing=box[0])


def a_criterion_in_a_closure(w):
    criterion = nn.CrossEntropyLoss(label_smoothing=w)
    return lambda logits, labels, *rest: criterion(logits, labels)


def reads_a_global(logits, labels, *rest):
    return F.cross_entropy(logits, labels, label_smoothing=GLOBALS["smoothing"])


def an_edited_global(w):
    GLOBALS["smoothing"] = w
    return reads_a_global


class Holds(nn.Module):
    """A loss that is a module: a criterion, and class weights in a buffer."""

    def __init__(self, smoothing, last_weight=1.0):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.register_buffer("weights", torch.linspace(1, last_weight, 11))

    def forward(self, logits, labels, *rest):
        return self.criterion(logits * self.weights, labels)


def a_buffer(w):
    return Holds(0.0, 1 + w)


def a_partial(w):
    return functools.partial(a_default(0.0), w=w)


LOSSES = [a_default, a_list_in_a_closure, a_criterion_in_a_closure, an_edited_global]
LOSSES += [Holds, a_buffer, a_partial]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_changed_loss_is_seen_and_the_same_one_is_not(facts_of, loss):
    was = facts_of(loss_fn_kd=loss(0.1))
    assert h.differences(was, facts_of(loss_fn_kd=loss(0.1))) == []
    assert h.differences(was, facts_of(loss_fn_kd=loss(0.2)))


@pytest.mark.parametrize("stage", ["strong", "boss", "beyond"])
def test_a_temperature_one_per_cent_off_is_seen(facts_of, stage):
    def warmer(logits, labels, teacher_logits, alpha, temperature):
        return h.loss_fn_kd(logits, labels, teacher_logits, alpha, 1.01 * temperature)

    assert h.differences(facts_of(stage), facts_of(stage, loss_fn_kd=warmer))


# --- students -------------------------------------------------------------------------------------


class Net(nn.Module):
    """A learner's student with the usual things to change."""

    def __init__(self, activation=F.relu, pool=torch.mean, gain=1.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 11)
        self.activation = activation
        self.options = {"pool": pool}
        nn.init.xavier_normal_(self.conv.weight, gain)

    def forward(self, x):
        x = self.activation(self.norm(self.conv(x)))
        return self.fc(self.options["pool"](x, (2, 3)))


@pytest.mark.parametrize("change", [{"activation": F.gelu}, {"pool": torch.amax}])
def test_a_changed_student_is_seen(facts_of, change):
    builder = functools.partial(Net, **change)
    was = facts_of("simple", student=Net())
    assert h.differences(was, facts_of("simple", student=builder()))


def test_a_global_that_a_student_reads_is_seen(facts_of, monkeypatch):
    net = Net(lambda x: GLOBALS["activation"](x))
    was = facts_of("simple", student=net)
    monkeypatch.setitem(GLOBALS, "activation", F.silu)
    assert h.differences(was, facts_of("simple", student=net))


def test_first_weights_count_for_a_builder_and_come_from_the_configs_seed(facts_of):
    was = facts_of("simple", student=Net)
    assert h.differences(was, facts_of("simple", student=Net)) == []
    now = facts_of("simple", student=lambda: Net(gain=5.0))
    assert h.differences(was, now) == ["other first weights"]


def test_an_instance_with_other_weights_and_statistics_is_the_same_net(facts_of):
    """Made without a seed, and looked at in training mode, it has others in every session."""
    was = facts_of("simple", student=Net())
    net = Net(gain=5.0)
    net(torch.randn(4, 3, 40, 40))
    assert h.differences(was, facts_of("simple", student=net)) == []


class InAList(Net):
    """Its first layer would be neither trained nor saved."""

    def __init__(self):
        super().__init__()
        self.more = [nn.Conv2d(3, 3, 1)]

    def forward(self, x):
        return super().forward(self.more[0](x))


def test_a_builder_with_layers_in_a_plain_list_is_refused(facts_of):
    with pytest.raises(h.UserError, match="nn.ModuleList"):
        facts_of("simple", student=InAList)


# --- schedules, alignment, the teacher, the module's own code -------------------------------------


def reads_a_list(cfg, progress):
    return h.LossWeights(kd=GLOBALS["rates"][0], alpha=0.5, align=1.0)


def test_a_schedule_that_reads_a_list_is_seen(facts_of):
    was = facts_of("boss", loss_weights=reads_a_list)
    GLOBALS["rates"][0] = 2.0
    assert h.differences(was, facts_of("boss", loss_weights=reads_a_list))


def test_an_alignment_two_per_cent_off_is_seen(facts_of):
    def louder(*arguments):
        return 1.02 * h.alignment(*arguments)

    assert h.differences(facts_of("boss"), facts_of("boss", alignment=louder))


def test_a_teacher_that_answers_otherwise_with_the_same_weights_is_seen(facts_of, teacher):
    was = facts_of()
    with teacher.register_forward_hook(lambda net, images, logits: 2 * logits):
        assert h.differences(was, facts_of())


def edited(name, old, new):
    """A function of helpers.py with an edit in its source, in the module's own namespace."""
    source = inspect.getsource(getattr(h, name))
    assert old in source
    names = {}
    exec(source.replace(old, new), vars(h), names)
    return names[name]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("sample_affine", "crop @ frames[-1]", "frames[-1] @ crop"),
        ("sample_affine", "wide * hflip", "wide"),
        ("soft_labels", "logits.float()", "2 * logits.float()"),
        ("conv_bn", "BatchNorm2d(out_channels", "BatchNorm2d(out_channels, momentum=0.5"),
    ],
)
def test_an_edit_of_the_module_is_seen(facts_of, monkeypatch, name, old, new):
    was = facts_of("boss")
    monkeypatch.setattr(h, name, edited(name, old, new))
    assert h.differences(was, facts_of("boss"))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("loss_fn_kd", "soft_loss", "kl"),
        ("loss_weights", "cfg, progress", "cfg: Config, progress: float"),
        ("alignment", "total = 0.0", "total = 0.0  # as usual"),
    ],
)
def test_a_renamed_variable_a_type_hint_and_a_comment_are_not_seen(facts_of, name, old, new):
    own = {name: edited(name, old, new)}
    assert h.differences(facts_of("boss"), facts_of("boss", **own)) == []


def test_another_number_of_threads_is_not_seen(facts_of):
    n = torch.get_num_threads()
    was = facts_of("simple")
    torch.set_num_threads(1 if n > 1 else 2)
    now = facts_of("simple")
    torch.set_num_threads(n)
    assert h.differences(was, now) == []


# --- the probe itself -----------------------------------------------------------------------------


def test_probing_changes_nothing(teacher):
    loss_fn = h.DistillLoss(h.replace(h.BOSS, image_size=40), h.build_student(h.BOSS), teacher)
    before = [h.copy_of_weights(loss_fn), torch.get_rng_state()]
    h.probe(loss_fn)
    assert same([h.copy_of_weights(loss_fn), torch.get_rng_state()], before)


def test_numbers_are_alike_but_for_rounding():
    """The last is nothing else: the gradient of a bias before a batch norm."""
    assert h.alike([1.0, 100.0, 1e-9], [1.00004, 100.0, 3e-9])
    assert not h.alike([1.0, 100.0], [1.003, 100.0])
