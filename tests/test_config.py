"""The settings: the stages' values, lengths, what is allowed, what makes a view."""

import dataclasses

import pytest
from conftest import same

import helpers as h

# --- the stages -----------------------------------------------------------------------------------


def test_the_stages_have_their_published_values():
    simple, medium, _, boss, _ = h.STAGES.values()
    assert simple == h.replace(
        simple,
        seed=20220013,
        student="sample",
        loss_fn_type="CE",
        n_epochs=10,
        batch_size=64,
        lr=3e-4,
        weight_decay=1e-5,
        grad_norm_max=10,
        patience=300,
    )
    assert medium == h.replace(
        medium, student="sample", loss_fn_type="KD", alpha=0.5, temperature=20.0, n_epochs=700
    )
    assert boss == h.replace(
        boss,
        crop_scale=(0.7, 1.0),
        hflip=0.5,
        vflip=0.5,
        rotation=180,
        affine=30,
        align_weights=(3, 2, 1),
        loss_schedule="handover",
        n_epochs=600,
    )


@pytest.mark.parametrize(
    ("length", "simple", "boss", "demo"),
    [("full", 10, 600, 40), ("lesson", 10, 60, 10), ("quick", 4, 6, 4)],
)
def test_length_scales_the_epochs(length, simple, boss, demo):
    assert h.get_config("simple", length).n_epochs == simple
    assert h.get_config("boss", length) == h.replace(h.STAGES["boss"], n_epochs=boss)
    assert not h.get_config("boss", length, teacher_views=5).replays  # nor are its maps stored
    # On the demo set only what a stage is about differs, so that the stages can be compared.
    configs = [h.get_config(stage, length, demo=True) for stage in h.STAGES]
    assert {(cfg.n_epochs, cfg.image_size, cfg.lr) for cfg in configs} == {(demo, 64, 4e-3)}


def test_diff_configs_prints_only_what_changes(capsys):
    h.diff_configs(h.get_config("simple"), h.get_config("simple", n_epochs=700))
    assert capsys.readouterr().out.split() == ["n_epochs", "10", "->", "700"]


# --- what is allowed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", 39),
        ("image_size", True),
        ("lr", float("nan")),
        ("temperature", 0),
        ("loss_fn_type", "kd"),
        ("widths", (64, "a")),
        ("rotation", (10.0,)),
        ("crop_scale", (0.5, 1.5)),
    ],
)
def test_a_wrong_value_names_the_key_and_what_is_allowed(key, value):
    with pytest.raises(h.UserError, match=f"^{key}=.+: allowed"):
        h.Config(**{key: value})


@pytest.mark.parametrize(
    "name", ["submission", "submission_demo", "demo", "exercises", "", "../up", "a\n"]
)
def test_a_name_that_is_taken_or_no_folders_is_refused(name):
    with pytest.raises(h.UserError, match="exp_name=.*allowed"):
        h.Config(exp_name=name)


@pytest.mark.parametrize("turn", [{"rotation": 9}, {"affine": 9}, {"vflip": 0.5}])
def test_turns_go_with_a_random_crop_alone(turn):
    with pytest.raises(h.UserError, match="crop_scale=.*allowed"):
        h.Config(**turn)


# --- what makes a view ----------------------------------------------------------------------------

OTHER_VALUES = {str: "other", int: 50, float: 1.0, tuple: (1, 1)}


def second_epoch(cfg, data):
    """[(rows, images)] of the steps of a config's second training epoch."""
    loader, _ = h.build_loaders(cfg, data, "cpu")
    loader.set_epoch(1)
    return [(batch.rows, batch.images) for batch in loader]


def test_view_keys_are_all_settings_that_change_what_a_row_shows_or_where(food):
    """Stored answers of a teacher belong to views: with a key missed they are other pictures'."""
    data = h.read_folder(food)
    cfg = h.get_config("boss", image_size=40, batch_size=8)
    wanted = second_epoch(cfg, data)
    changing = set()
    for f in dataclasses.fields(cfg):
        choices = f.metadata["choices"]
        other = choices[-1] if choices else OTHER_VALUES[type(f.default)]
        if not same(second_epoch(h.replace(cfg, **{f.name: other}), data), wanted):
            changing.add(f.name)
    assert changing == set(h.VIEW_KEYS)
