"""Students, the parameter limit, and the teacher's file."""

import math
import random
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import helpers as h


def feature_shapes(model, layers, image_size):
    """{layer: (C, H, W)} for one image."""
    maps = h.features_of(model, layers, torch.zeros(1, 3, image_size, image_size))
    return {name: tuple(x.shape[1:]) for name, x in maps.items()}


def test_the_sample_net_is_the_courses():
    net = h.build_student(h.STAGES["simple"])
    assert h.check_budget(net) == 59_723 and round(h.count_macs(net, 224) / 1e6) == 272
    assert net(torch.zeros(1, 3, 40, 40)).shape == (1, 11)


def test_a_student_whose_operations_torch_cannot_count_has_none(monkeypatch, capsys):
    """The number stands in a table only."""

    class Uncountable(torch.nn.Linear):
        def forward(self, x):
            raise NotImplementedError("no count")

    net = Uncountable(1, 1)
    with pytest.raises(NotImplementedError):
        h.count_macs(net, 64)
    monkeypatch.delenv("HW13_STRICT")
    assert math.isnan(h.count_macs(net, 64))
    assert "no count" in capsys.readouterr().out


def test_the_plain_dwpw_net_sits_at_the_teachers_feature_sizes():
    cfg = h.Config(student="dwpw")
    net, teacher = h.build_student(cfg), h.build_student(h.Config(student="resnet18"))
    assert h.check_budget(net) == 58_235
    layers = ("layer1", "layer2", "layer3")
    ours, theirs = (feature_shapes(m, layers, 224) for m in (net, teacher))
    assert (
        ours == {"layer1": (64, 56, 56), "layer2": (128, 28, 28), "layer3": (256, 14, 14)} == theirs
    )


def test_the_published_boss_breaks_the_limit():
    cfg = h.Config(
        student="dwpw",
        stem_width=64,
        widths=(64, 128, 256, 140),
        depths=(1,) * 4,
        strides=(1, 2, 2, 2),
    )
    net = h.build_student(cfg)
    assert sum(p.numel() for p in net.parameters()) == 99_891
    with pytest.raises(ValueError, match="99,891 parameters; the homework allows 60,000"):
        h.check_budget(net)


def test_a_builder_of_ones_own_is_found_by_its_name(monkeypatch):
    monkeypatch.setitem(h.NETS, "mine", lambda cfg: nn.Linear(cfg.stem_width, 11))
    assert h.build_student(h.get_config("boss", student="mine")).in_features == 16
    assert h.parse_setting("student=mine") == ("student", "mine")
    with pytest.raises(
        h.UserError, match="student='yours': allowed is one of sample, dwpw, ir, .*mine"
    ):
        h.build_student(h.Config(student="yours"))


def test_dwpw_conv_is_the_courses_block():
    block = h.dwpw_conv(8, 16)
    assert [type(m) for m in block] == [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU] * 2
    assert (
        block[0].groups == 8 and block[3].kernel_size == (1, 1) and block[2].negative_slope == 0.01
    )
    assert block(torch.zeros(1, 8, 10, 10)).shape == (1, 16, 5, 5)


def test_widths_depths_strides_and_kernel_come_from_the_config():
    cfg = h.Config(
        student="dwpw", stem_width=8, widths=(8, 12), depths=(2, 3), strides=(2, 1), kernel_size=5
    )
    net = h.build_student(cfg)
    assert [len(net.layer1), len(net.layer2)] == [2, 3] and net.layer2[0][0].kernel_size == (5, 5)
    assert feature_shapes(net, ("layer1", "layer2"), 64) == {
        "layer1": (8, 8, 8),
        "layer2": (12, 8, 8),
    }


def test_an_inverted_residual_adds_its_input_where_shapes_agree():
    block, x = h.InvertedResidual(6, 6, 5, 1, 3).eval(), torch.randn(2, 6, 9, 9)
    nn.init.zeros_(block.project[1].weight)
    assert torch.equal(block(x), x)
    other = h.InvertedResidual(6, 8, 5, 2, 3).eval()
    nn.init.zeros_(other.project[1].weight)
    assert torch.equal(other(x), torch.zeros(2, 8, 5, 5))
    assert other.depthwise[0].groups == 18 and sum(p.numel() for p in other.parameters()) == (
        6 * 18 + 36 + 25 * 18 + 36 + 18 * 8 + 16
    )


def test_the_inverted_residual_student_keeps_large_maps_where_strides_are_one():
    cfg = h.Config(
        student="ir",
        stem_width=16,
        widths=(24, 32, 40),
        depths=(2, 3, 2),
        strides=(2, 2, 1),
        kernel_size=5,
    )
    net = h.build_student(cfg)
    assert h.check_budget(net) == 56_971
    assert feature_shapes(net, ("stem", "layer1", "layer2", "layer3"), 224) == {
        "stem": (16, 112, 112),
        "layer1": (24, 56, 56),
        "layer2": (32, 28, 28),
        "layer3": (40, 28, 28),
    }


def test_get_student_model_takes_no_argument_and_is_the_last_stages():
    assert h.check_budget(h.get_student_model()) <= h.PARAM_LIMIT
    last = h.build_student(list(h.STAGES.values())[-1])
    assert h.state_checksum(h.get_student_model()) == h.state_checksum(last)


def test_building_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    h.build_student(h.STAGES["boss"])
    assert torch.equal(torch.rand(1), wanted)


def test_a_module_called_twice_counts_twice_and_a_bare_parameter_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bare = nn.Conv2d(3, 3, 3, padding=1), nn.Parameter(torch.zeros(1000))

        def forward(self, x):
            return self.conv(self.conv(x)).mean((2, 3))

    net = Twice()
    assert h.check_budget(net) == 1000 + 2 * 84
    net.bare = nn.Parameter(torch.zeros(0))
    assert h.check_budget(net) == 168
    with pytest.raises(ValueError, match="allows 100"):
        h.check_budget(net, limit=100)


class Attends(nn.Module):
    """Attention over the pixels of a small map: its attention gives two outputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 11)

    def forward(self, x):
        pixels = self.conv(x).flatten(2).transpose(1, 2)  # (B, H W, 8)
        seen, _ = self.attention(pixels, pixels, pixels)
        return self.fc(seen.mean(1))


def test_a_module_with_two_outputs_counts_like_any_other():
    assert h.check_budget(Attends()) == sum(p.numel() for p in Attends().parameters())
    assert h.layer_table(Attends(), 64).loc["attention", "output"] == "64 x 8"


def test_a_net_for_images_of_one_size_alone_is_counted_at_that_size():
    net = nn.Sequential(nn.Conv2d(3, 2, 8, 8), nn.Flatten(), nn.Linear(2 * 12 * 12, 11))
    assert h.check_budget(net, image_size=96) == 386 + 3179
    assert h.own_student(h.Config(image_size=96), net) is not net


def test_a_parameter_that_no_call_meets_counts():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), h.GlobalAvgPool())
    net.extra = nn.ParameterList([nn.Parameter(torch.zeros(70_000))])
    net.forward = lambda x: net[1](net[0](x))
    with pytest.raises(ValueError, match="70,056"):
        h.check_budget(net)


def test_counting_does_not_move_batch_norm_or_the_mode():
    net = h.build_student(h.STAGES["boss"]).train()
    before = h.state_checksum(net)
    h.check_budget(net)
    h.layer_table(net)
    assert h.state_checksum(net) == before and all(m.training for m in net.modules())
    assert not any(m._forward_hooks for m in net.modules())


def test_layer_table_adds_up():
    table = h.layer_table(h.build_student(h.Config(student="dwpw")), 224)
    assert table.loc["all", "parameters"] == 58_235 == table["parameters"][:-1].sum()
    assert table.loc["stem.0", "multiply-adds"] == 112 * 112 * 48 * 147
    macs = h.count_macs(h.build_student(h.Config(student="dwpw")), 224)
    assert table.loc["all", "multiply-adds"] == macs == table["multiply-adds"][:-1].sum()


class Thrice(nn.Module):
    """One convolution called three times, in a block that has a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        for _ in range(3):
            x = x + self.scale * self.conv(x)
        return x


def test_multiply_adds_of_a_layer_count_at_each_call_and_at_no_block_around_it():
    net = nn.Sequential(Thrice(), h.GlobalAvgPool(), nn.Linear(3, 11))
    table = h.layer_table(net, 32)
    conv = 3 * 32 * 32 * 3 * 3 * 9
    assert table["multiply-adds"].to_dict() == {"0": 0, "0.conv": conv, "2": 33, "all": conv + 33}
    assert table["parameters"].to_dict() == {"0": 1, "0.conv": 3 * 84, "2": 44, "all": 297}


class Encodes(nn.Module):
    """A transformer's block, called twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 8, 8)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.fc = nn.Linear(16, 11)

    def forward(self, x):
        pixels = self.conv(x).flatten(2).transpose(1, 2)  # (B, H W, 16)
        return self.fc(self.block(self.block(pixels)).mean(1))


def test_the_layers_of_a_transformers_block_are_counted_at_each_call():
    net = Encodes()
    block = sum(p.numel() for p in net.block.parameters())
    once = sum(p.numel() for p in net.parameters())
    # The output projection of torch's attention is used, but not called.
    assert h.check_budget(net) == once + block - 2 * (16 * 16 + 16)
    assert torch.backends.mha.get_fastpath_enabled()
    # Four projections and the two linear layers, of 64 pixels in two blocks.
    assert h.count_macs(net, 64) > 2 * 64 * (4 * 16 * 16 + 2 * 16 * 32)


# --- the teacher ----------------------------------------------------------------------------------


def test_the_teacher_is_frozen_from_the_first_line(teacher_file):
    teacher = h.load_teacher(teacher_file)
    assert isinstance(teacher, torchvision.models.ResNet) and not any(
        m.training for m in teacher.modules()
    )
    assert not any(p.requires_grad for p in teacher.parameters())
    assert sum(p.numel() for p in teacher.parameters()) == 11_182_155
    before = h.state_checksum(teacher)
    teacher(torch.randn(2, 3, 64, 64))
    assert h.state_checksum(teacher) == before


def test_a_checksum_sees_a_buffer_that_moved(teacher_file):
    teacher = h.load_teacher(teacher_file)
    before = h.state_checksum(teacher)
    teacher.train()(torch.randn(2, 3, 64, 64))
    assert h.state_checksum(teacher) != before


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s},
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"module." + k: v for k, v in s.items()},
        lambda s: {"_orig_mod." + k: v for k, v in s.items()},
        lambda s: {"state_dict": {"module._orig_mod." + k: v for k, v in s.items()}},
        lambda s: {"epoch": 3, "model_state_dict": s, "optimizer": {"lr": 0.1}},
        lambda s: {"net": s, "acc": 90.1},
        lambda s: {"teacher": s, "best_acc": np.float64(74.3), "step": np.int64(3)},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "loops": {}},
        lambda s: {f"module.{k}": v for k, v in s.items()} | {"n_averaged": torch.tensor(7)},
        lambda s: s | {"layer1.total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
        lambda s: s | {"epoch": 7},
        lambda s: {"nets": {"a": {"weights": s}}},
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
        lambda s: {"state_dict": s, "ema": {k: v * 2 for k, v in s.items()}},
    ],
)
def test_wrappers_and_prefixes_of_a_plain_meaning_are_taken_off(teacher_file, wrap):
    state = torch.load(teacher_file, weights_only=True)
    wanted = h.state_checksum(h.load_teacher(teacher_file))
    torch.save(wrap(dict(state)), teacher_file)
    assert h.state_checksum(h.load_teacher(teacher_file)) == wanted


PREFIXES = ("", "module.", "model.", "_orig_mod.", "a.b.c.", "conv1.", "net.module.")
STRAYS = {
    "epoch": 3,
    "name": "x",
    "history": [1, 2],
    "cfg": {"lr": 0.1, "widths": (1, 2)},
    "none": None,
    "best_acc": np.float64(0.9),
    "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
    "scheduler": {"last_epoch": 3},
    "loss_weights": torch.ones(11),
    "another_net": {"conv.weight": torch.zeros(9, 3, 1, 1), "head.weight": torch.zeros(11, 9)},
    7: "a number as a key",
}


def strays(rng):
    """Some of what checkpoints hold beside a net."""
    return {key: STRAYS[key] for key in rng.sample(list(STRAYS), rng.randint(0, 4))}


def random_checkpoint(state, rng):
    """(a state dict in wrappers and with a prefix, what was done to it): nothing, less, or two."""
    prefix = rng.choice(PREFIXES)
    saved = {prefix + key: value for key, value in state.items()}
    done = rng.choice(["nothing", "nothing", "less", "two", "other shape"])
    if done == "less":
        saved.pop(prefix + rng.choice(["conv.weight", "fc.bias", "bn.running_mean"]))
    if done == "other shape":
        saved[prefix + "fc.bias"] = torch.zeros(12)
    # What stands beside a net in one dict must not begin like its own tensors.
    if rng.random() < 0.5:
        saved |= {"n_averaged": torch.tensor(3), prefix + "conv.total_ops": torch.zeros(1)}
    if done == "two":
        copy = dict(saved)
        saved = {"first": saved, "second": copy} | strays(rng)
    for _ in range(rng.randint(0, 3)):
        saved = {rng.choice(["net", "student", "state", "a.b", "model_state"]): saved} | strays(rng)
    return saved, done


def test_random_wrappers_load_the_right_net_or_say_what_is_there(tmp_path):
    """Drawn at random: layers of wrappers, a prefix, strays; sometimes a tensor less, one of
    another shape, or two nets. The right weights are loaded, or one sentence lists what is there.
    """
    rng = random.Random(7)
    path = tmp_path / "wrapped.ckpt"
    net = tiny_net()
    seen = Counter()
    for _ in range(120):
        saved, done = random_checkpoint(net.state_dict(), rng)
        torch.save(saved, path)
        seen[done] += 1
        if done == "nothing":
            loaded = h.load_net(path, "conv.weight", lambda state: tiny_net(1), "tiny net")
            assert h.state_checksum(loaded) == h.state_checksum(net)
            continue
        with pytest.raises(h.UserError) as error:
            h.load_net(path, "conv.weight", lambda state: tiny_net(1), "tiny net")
        sentence = str(error.value)
        assert "\n" not in sentence and len(sentence) < 500
        if done == "two":
            assert "it holds 2 nets" in sentence and "second" in sentence
        else:
            assert "it is no tiny net" in sentence
            assert str(next(iter(saved))) in sentence
    assert min(seen.values()) > 10 and len(seen) == 4


def tiny_net(seed=0):
    """A net with all kinds of entries: weights, statistics, a count."""
    torch.manual_seed(seed)
    layers = {"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4), "pool": h.GlobalAvgPool()}
    return nn.Sequential(OrderedDict(layers | {"fc": nn.Linear(4, 11)}))


# What files were met with: (fault, the words for it, or None where the net is usable).
FAULTS = [
    (lambda x: x * math.nan, "values that are not finite"),
    (lambda x: x.double() + 1e300, "values that are not finite"),
    (lambda x: torch.full_like(x, -math.inf), "values that are not finite"),
    (lambda x: x.to(torch.int8), "int8 values"),
    (lambda x: x > 0, "bool values"),
    (lambda x: x.to(torch.complex64), "complex64 values"),
    (lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn values"),
    (lambda x: x.to("meta"), "no values, only a shape"),
    (lambda x: x[:0], " is 0"),
    (lambda x: x[None], " is 1 x "),
    (lambda x: x.half(), None),
    (lambda x: x.bfloat16(), None),
    (lambda x: x.double(), None),
    (lambda x: nn.Parameter(x), None),
    (lambda x: x[:1].expand(x.shape), None),
    (lambda x: x * 0, None),
]


def test_weights_with_a_random_fault_are_named_by_tensor_or_usable(tmp_path):
    """Each fault in tensors drawn at random, one element or all of it."""
    rng = random.Random(3)
    path = tmp_path / "net.ckpt"
    plain = tiny_net().state_dict()
    names = [name for name in plain if not name.endswith("num_batches_tracked")]
    for fault, words in FAULTS * 4:
        name = rng.choice(names)
        state = dict(plain) | {name: fault(plain[name])}
        torch.save(state, path)
        if words:
            with pytest.raises(h.UserError, match=f"{name}.*{words}"):
                h.load_net(path, "conv.weight", lambda state: tiny_net(1), "tiny net")
            continue
        net = h.load_net(path, "conv.weight", lambda state: tiny_net(1), "tiny net").eval()
        assert net(torch.randn(2, 3, 8, 8)).isfinite().all()
        assert torch.equal(net.state_dict()[name], state[name].float())


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9])
def test_a_single_impossible_value_is_found(tmp_path, value):
    state = tiny_net().state_dict()
    state["bn.running_var"][2] = value
    torch.save(state, tmp_path / "net.ckpt")
    with pytest.raises(h.UserError, match="bn.running_var holds v"):
        h.load_net(tmp_path / "net.ckpt", "conv.weight", lambda state: tiny_net(), "tiny net")


@pytest.mark.parametrize(
    ("count", "is_good"),
    [
        (torch.tensor(3), True),
        (torch.tensor(3.0), True),
        (torch.tensor(3, dtype=torch.int32), True),
        (torch.tensor(3j), False),
        (torch.zeros(2, dtype=torch.int64), False),
    ],
)
def test_a_count_may_be_any_number(tmp_path, count, is_good):
    state = tiny_net().state_dict() | {"bn.num_batches_tracked": count}
    path = tmp_path / "net.ckpt"
    torch.save(state, path)
    if is_good:
        assert h.load_net(path, "conv.weight", lambda state: tiny_net(), "tiny net")
        return
    with pytest.raises(h.UserError, match="bn.num_batches_tracked"):
        h.load_net(path, "conv.weight", lambda state: tiny_net(), "tiny net")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "fc.bias"}, "it has no fc.bias"),
        (
            lambda s: s | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)},
            "no ResNet of 11 classes .fc.weight is 1000 x 512, not 11 x 512",
        ),
        (lambda s: [1, 2], "it holds a list"),
        (lambda s: {}, "it holds nothing"),
        (lambda s: {"a": s, "b": s}, "it holds 2 nets .a, b.: save one of them"),
        (lambda s: {"lr": 0.1, "x": {"y": 1}}, r"it holds lr .float., x .1 entries."),
        (lambda s: {"\x1b[31m" * 99: 1}, r"it holds [^\x1b]{150,260}$"),
        (
            lambda s: s | {"fc.bias": s["fc.bias"] * float("nan")},
            "fc.bias holds values that are not",
        ),
        (
            lambda s: s | {"bn1.running_var": -s["bn1.running_var"]},
            "bn1.running_var holds variances",
        ),
    ],
)
def test_a_file_with_something_else_is_named(teacher_file, harm, message):
    torch.save(harm(torch.load(teacher_file, weights_only=True)), teacher_file)
    with pytest.raises(h.UserError, match=message):
        h.load_teacher(teacher_file)


def save_torch_script(path):
    torch.jit.script(tiny_net()).save(path)


def save_numpy_arrays(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))


def save_packed(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("in/resnet18_teacher.ckpt", b"weights")


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (save_torch_script, r"it is a TorchScript file: save the state_dict\(\)"),
        (save_numpy_arrays, "it holds numpy arrays"),
        (save_packed, "it is a packed archive: unpack it"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # it is deprecated
def test_a_zip_that_is_no_checkpoint_is_named(tmp_path, save, message):
    path = tmp_path / "teacher.ckpt"
    save(path)
    with pytest.raises(h.UserError, match=message):
        h.load_teacher(path)


@pytest.mark.parametrize("names", [("student.", "teacher."), ("a.net.", "b.net.")])
def test_two_nets_side_by_side_are_refused_in_either_order(teacher_file, names):
    teacher = torch.load(teacher_file, weights_only=True)
    other = h.build_student(h.Config(student="resnet18", seed=5)).state_dict()
    for first, second in (names, names[::-1]):
        both = {first + key: tensor for key, tensor in other.items()}
        both |= {second + key: tensor for key, tensor in teacher.items()}
        torch.save({"state_dict": both}, teacher_file)
        with pytest.raises(h.UserError, match="it holds 2 nets .state_dict[.].*: save one of them"):
            h.load_teacher(teacher_file)


def test_beside_another_kind_of_net_the_one_that_fits_is_loaded(teacher_file):
    teacher = torch.load(teacher_file, weights_only=True)
    student = h.build_student(h.STAGES["simple"]).state_dict()
    small = {"conv1.weight": torch.zeros(4, 3, 3, 3)}
    both = {f"student.{key}": tensor for key, tensor in (student | small).items()}
    both |= {f"teacher.{key}": tensor for key, tensor in teacher.items()}
    torch.save(both, teacher_file)
    assert h.load_teacher(teacher_file).fc.weight.equal(teacher["fc.weight"])


@pytest.mark.parametrize("path", [None, [], torch.nn.Linear(1, 1)])
def test_what_is_no_path_is_no_teachers_file(path):
    with pytest.raises(h.UserError, match="wants the path of a teacher's file"):
        h.load_teacher(path)


def test_soft_labels_flatten_with_the_temperature():
    logits = torch.tensor([[4.0, 1.0, 0.0]])
    assert torch.allclose(h.soft_labels(logits, 1), logits.softmax(1))
    tops = [h.soft_labels(logits, t).max().item() for t in (1, 4, 20)]
    assert tops == sorted(tops, reverse=True) and tops[2] < 0.4


def test_several_teachers_are_averaged_as_probabilities(teacher_file, tmp_path):
    torch.manual_seed(2)
    torch.save(
        h.build_student(h.Config(student="resnet18", seed=5)).state_dict(), tmp_path / "b.ckpt"
    )
    one, two = h.load_teacher(teacher_file), h.load_teacher(tmp_path / "b.ckpt")
    x = torch.randn(3, 3, 64, 64)
    wanted = (one(x).softmax(1) + two(x).softmax(1)) / 2
    for paths in ((teacher_file, tmp_path / "b.ckpt"), [teacher_file, tmp_path / "b.ckpt"]):
        both = h.load_teacher(paths)
        assert torch.allclose(both(x).softmax(1), wanted, atol=1e-6)
        assert not any(m.training for m in both.modules()) and not any(
            p.requires_grad for p in both.parameters()
        )
    assert h.load_teacher([teacher_file]).fc.weight.equal(one.fc.weight)
    with pytest.raises(h.UserError, match="wants a single teacher"):
        h.DistillLoss(h.get_config("boss", image_size=64), h.build_student(h.STAGES["boss"]), both)
    h.DistillLoss(h.get_config("medium", image_size=64), h.build_student(h.STAGES["medium"]), both)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE html><title>Quota exceeded</title>", "it is a web page"),
        (b"<HTML>", "it is a web page"),
        ((20).to_bytes(8, "little") + b'{"fc.weight":{}}     ' + bytes(30), "a .safetensors file"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"\x1f\x8b\x08", "unpack it"),
        (b"weights: none", "it is a text"),
        (b"PK\x03\x04" + bytes(100), "it is damaged or no torch file"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named_by_its_first_bytes(tmp_path, content, message):
    path = tmp_path / "teacher.ckpt"
    path.write_bytes(content)
    with pytest.raises(h.UserError, match=message):
        h.load_teacher(path)


def test_a_whole_module_is_said_to_hold_more_than_tensors(tmp_path):
    torch.save(h.build_student(h.Config()), tmp_path / "net.ckpt")
    with pytest.raises(h.UserError, match="more than tensors and plain values"):
        h.load_teacher(tmp_path / "net.ckpt")


def test_a_path_with_a_comma_is_a_path(teacher_file, tmp_path):
    folder = tmp_path / "a,b"
    folder.mkdir()
    teacher_file.rename(folder / "t.ckpt")
    assert h.load_teacher(str(folder / "t.ckpt"))
