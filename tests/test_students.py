"""Students and their price, the teacher's file and its stored answers."""

from dataclasses import replace

import pytest
import torch
from test_training import made_up
from torch import nn

import helpers as h

# --- nets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "parameters"), [(h.SIMPLE, 59_723), (h.BEYOND, 52_795), (h.TEACHER_CONFIG, 11_182_155)]
)
def test_each_net_has_its_parameters(cfg, parameters):
    assert h.check_budget(h.build_student(cfg), limit=parameters) == parameters


def test_an_inverted_residual_adds_its_input():
    block = h.InvertedResidual(6, 6)
    nn.init.zeros_(block.project[1].weight)
    images = torch.randn(2, 6, 9, 9)
    assert torch.equal(block(images), images)


def test_a_net_is_drawn_from_its_configs_seed_and_from_nothing_else():
    before = torch.get_rng_state()
    last = h.state_checksum(h.get_student_model())
    assert torch.equal(torch.get_rng_state(), before)
    assert h.state_checksum(h.build_student(h.BEYOND)) == last
    assert h.state_checksum(h.build_student(replace(h.BEYOND, seed=1))) != last


# --- the count ------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A convolution that is called twice, and a parameter of no module."""

    def __init__(self, bare):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bare = nn.Parameter(torch.zeros(bare), requires_grad=False)

    def forward(self, x):
        return self.conv(self.conv(x)).mean((2, 3))


def test_a_module_called_twice_counts_twice_and_a_bare_frozen_parameter_once():
    assert h.check_budget(Twice(100)) == 268
    with pytest.raises(h.UserError, match="168 parameters; the homework allows 167"):
        h.check_budget(Twice(0), limit=167)


def test_parameters_that_no_call_meets_count():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), h.GlobalAvgPool())
    net[1].unused = nn.Linear(100, 10).requires_grad_(False)
    assert h.check_budget(net) == 56 + 1010


def test_counting_moves_no_statistics_no_mode_and_leaves_no_hook():
    net = h.dwpw_conv(3, 4)
    before = h.state_checksum(net)
    h.check_budget(net)
    h.layer_table(net, 64)
    assert h.state_checksum(net) == before
    for module in net.modules():
        assert module.training
        assert not module._forward_hooks


def test_the_layer_table_has_a_row_per_block_and_adds_up():
    net = h.plain_student()
    table = h.layer_table(net, 64)
    assert table.loc["layer3.3", "output"] == "256 x 4 x 4"
    sums = table[["parameters", "multiply-adds"]][:-1].sum().tolist()
    assert table.loc["all"].tolist() == ["", *sums]
    assert sums == [58_235, 9_229_056]  # counted by hand
    assert h.count_macs(h.build_student(h.STRONG), 64) == 5_728_272


# --- the teacher's file ---------------------------------------------------------------------------


def tiny_net(seed=0):
    """A net with all kinds of entries: weights, statistics, counts."""
    torch.manual_seed(seed)
    return h.dwpw_conv(3, 4)


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: under("a.", state) | under("b.", {"0.weight": 0}),
        lambda state: {"model": under("module.", state)},
    ],
)
def test_weights_are_the_file_or_one_of_its_values_under_any_prefix(tmp_path, wrap):
    net = tiny_net()
    torch.save(wrap(net.state_dict()), tmp_path / "net.ckpt")
    loaded = h.load_weights(tiny_net(1), tmp_path / "net.ckpt")
    assert h.state_checksum(loaded) == h.state_checksum(net)


# --- stored answers -------------------------------------------------------------------------------


def stored_logits(contents="a", teacher="t", dtype=None, **changes):
    """StoredLogits of a run on three pictures."""
    settings = {"image_size": 40, "teacher_views": 2} | changes
    cfg = h.get_config("beyond", **settings)
    split = replace(made_up("training", 3), contents=contents)
    return h.StoredLogits(cfg, h.BatchLoader(split, cfg, "cpu", train=True), teacher, dtype)


def rows(*numbers, view=1):
    return h.Batch(None, torch.zeros(1), torch.tensor(numbers), 1.0, view)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Logits that were stored for view 1 of the rows 2 and 0, in a cache of their own."""
    monkeypatch.setenv("HW13_CACHE", str(tmp_path))
    logits = torch.randn(2, 11, requires_grad=True)
    stored_logits().write(rows(2, 0), logits)
    return logits.detach()


def test_stored_logits_are_read_as_written_and_nothing_before(written):
    again = stored_logits()
    assert torch.equal(again.read(rows(0, 2)), written.flip(0))
    assert again.read(rows(0, 1)) is None
    assert again.read(rows(0, view=0)) is None


OTHERS = {
    "seed": 1,
    "image_size": 48,
    "train_on": "both",
    "crop_scale": (0.5, 1.0),
    "hflip": 0.0,
    "vflip": 0.5,
    "rotation": 10.0,
    "affine": 10.0,
    "batch_size": 8,
    "teacher_views": 3,
    "contents": "b",
    "teacher": "u",
    "dtype": torch.bfloat16,
}


@pytest.mark.parametrize("name", sorted({*OTHERS, *h.VIEW_KEYS}))
def test_other_views_images_teachers_or_precisions_share_no_stored_logits(written, name):
    assert stored_logits(**{name: OTHERS[name]}).read(rows(0)) is None
