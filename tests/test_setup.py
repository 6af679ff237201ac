"""Configuration, the command line's KEY=VALUE, files written whole, files that are not trusted."""

import ast
import dataclasses
import os
import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import helpers as h


def test_published_values_of_the_stages():
    simple = h.STAGES["simple"]
    assert simple.n_epochs == 10
    assert simple.loss_fn_type == "CE"
    assert simple.batch_size == 64
    assert simple.lr == 3e-4
    assert simple.seed == 20220013
    assert simple.weight_decay == 1e-5
    assert simple.grad_norm_max == 10
    assert simple.patience == 300

    medium = h.STAGES["medium"]
    assert medium.loss_fn_type == "KD"
    assert medium.alpha == 0.5
    assert medium.temperature == 20.0
    assert medium.n_epochs == 700

    boss = h.STAGES["boss"]
    assert boss.n_epochs == 600
    assert boss.crop_scale == (0.7, 1.0)
    assert boss.hflip == 0.5
    assert boss.vflip == 0.5
    assert boss.rotation == 180
    assert boss.affine == 30
    assert boss.align_weights == (3, 2, 1)
    assert boss.loss_schedule == "handover"

    # The last stage keeps the schedule and the net of Boss, and leaves out the alignment.
    beyond = h.STAGES["beyond"]
    assert beyond.loss_schedule == "handover"
    assert not beyond.aligns
    assert beyond.replays
    assert beyond.widths == boss.widths

    # All but the first stage learn from a teacher.
    assert [cfg.needs_teacher for cfg in h.STAGES.values()] == [False, True, True, True, True]


def test_on_the_demo_set_every_stage_has_the_same_length():
    """Only what a stage is about may differ, so that the stages can be compared."""
    for length, n_epochs in {"full": 40, "lesson": 10, "quick": 4, "fast": 1}.items():
        lengths = {h.get_config(stage, length, demo=True).n_epochs for stage in h.STAGES}
        assert lengths == {n_epochs}
    assert h.get_config("boss", demo=True, n_epochs=3).n_epochs == 3


def test_get_config_overrides_and_refuses_unknown_names(monkeypatch):
    monkeypatch.delenv("HW13_FAST")
    assert h.get_config("boss", n_epochs=5).n_epochs == 5
    assert h.get_config("boss") == h.STAGES["boss"]
    with pytest.raises(TypeError):
        h.get_config("boss", epochs=5)
    with pytest.raises(h.UserError, match="the stages are simple, medium"):
        h.get_config("bos")


@pytest.mark.parametrize(
    ("length", "simple", "boss"), [("full", 10, 600), ("lesson", 10, 60), ("quick", 4, 6)]
)
def test_length_scales_the_epochs(length, simple, boss):
    assert h.get_config("simple", length).n_epochs == simple
    assert h.get_config("boss", length).n_epochs == boss


def test_the_variable_for_tests_shortens_a_run_and_says_so(monkeypatch, capsys):
    assert h.chosen_length("lesson") == "fast"
    assert "HW13_FAST is set" in capsys.readouterr().out
    assert h.get_config("boss", "fast").n_epochs == 1
    monkeypatch.delenv("HW13_FAST")
    assert h.chosen_length("lesson") == "lesson"
    assert h.chosen_length() == "full"


def test_a_number_of_numpys_is_a_number():
    # As a loop over np.arange gives them.
    cfg = h.get_config("medium", temperature=np.int64(6), n_epochs=np.int64(3))
    assert (cfg.temperature, cfg.n_epochs) == (6.0, 3)
    assert (type(cfg.temperature), type(cfg.n_epochs)) == (float, int)


def test_no_name_of_the_module_is_given_twice():
    """A second constant of one name, sections away, would change what the first one says."""
    names = Counter()
    for node in ast.parse(Path(h.__file__).read_text(encoding="utf-8")).body:
        targets = getattr(node, "targets", ())
        for part in (part for target in targets for part in ast.walk(target)):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                names[part.id] += 1
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] += 1
    assert names["HIDDEN"] == 1
    assert max(names.values()) == 1, names.most_common(3)


def test_unknown_length_is_named():
    with pytest.raises(h.UserError, match="full, lesson, quick"):
        h.get_config("boss", "long")


def test_diff_configs_prints_only_what_changes(capsys):
    h.diff_configs(h.STAGES["simple"], h.STAGES["medium"])
    out = capsys.readouterr().out
    assert "loss_fn_type" in out
    assert "n_epochs" in out
    assert "700" in out
    assert "batch_size" not in out
    h.diff_configs(h.STAGES["simple"], h.STAGES["simple"])
    assert capsys.readouterr().out == "no difference\n"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", 39),
        ("image_size", 513),
        ("image_size", 64.5),
        ("image_size", 64.0),
        ("image_size", True),
        ("lr", float("nan")),
        ("lr", -1.0),
        ("lr", "fast"),
        ("alpha", 1.1),
        ("temperature", 0),
        ("loss_fn_type", "kd"),
        ("student", 18),
        ("widths", (64, "a")),
        ("widths", 64),
        ("crop_scale", (0.9, 0.1)),
        ("crop_scale", (0.5,)),
        ("kernel_size", 4),
        ("exp_name", "../up"),
        ("exp_name", ""),
        ("batch_size", 1),
        ("n_epochs", 0),
        ("amp", None),
        ("optimizer", "lion"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(key, value):
    with pytest.raises(h.UserError, match=rf"{key}=.*allowed") as error:
        h.Config(**{key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"widths": (8, 8)},
        {"align_weights": (1, 1, 1)},
        {"align_weights": (1, 1, 1, 1), "loss_fn_type": "KD", "student": "dwpw"},
        {"rotation": 10.0},
        {"vflip": 0.5},
        {"teacher_views": 2, "align_weights": (1,), "loss_fn_type": "KD", "student": "dwpw"},
    ],
)
def test_settings_that_do_not_go_together(settings):
    with pytest.raises(h.UserError, match="allowed"):
        h.Config(**settings)


# Right for some key, or for none.
VALUES = [None, True, -1, 0, 1, 7, 2**40, -0.5, 0.3, 1e9, float("inf"), "", "CE", "x" * 100]
VALUES += [(), (1,), (0.5, 0.2), (1, 2, 3), [64, 64, 64], {}, object(), b"1", ("a",)]
VALUES += [float("nan"), (None, None), (True, 1)]


def test_random_values_give_one_sentence_or_a_usable_config():
    rng = random.Random(0)
    fields = [f.name for f in dataclasses.fields(h.Config)]
    refused = 0
    for _ in range(3000):
        settings = {rng.choice(fields): rng.choice(VALUES) for _ in range(rng.randint(1, 3))}
        try:
            cfg = h.Config(**settings)
        except h.UserError as error:
            refused += 1
            assert "allowed" in str(error)
            assert "\n" not in str(error)
        else:
            # What is taken has the type of the default, whatever it was given as.
            for f in dataclasses.fields(cfg):
                assert type(getattr(cfg, f.name)) is type(f.default)
    assert refused > 1000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n_epochs=2", ("n_epochs", 2)),
        ("lr = 1e-3", ("lr", 1e-3)),
        ("widths=8,16,32", ("widths", (8, 16, 32))),
        ("crop_scale=(0.5,1)", ("crop_scale", (0.5, 1.0))),
        ("crop_scale=()", ("crop_scale", ())),
        ("optimizer=sgd", ("optimizer", "sgd")),
        ("alpha=1", ("alpha", 1.0)),
        ("exp_name=7", ("exp_name", "7")),
        ("widths=64", ("widths", (64,))),
    ],
)
def test_parse_setting(text, value):
    assert h.parse_setting(text) == value


def test_parse_setting_takes_a_list_in_brackets():
    assert h.parse_setting("widths=[24,32,48]") == h.parse_setting("widths=24,32,48")


@pytest.mark.parametrize(
    "text", ["n_epochs", "epochs=2", "n_epochs=two", "n_epochs=2.5", "=3", "lr=", "lr=__import__"]
)
def test_parse_setting_refuses(text):
    with pytest.raises(h.UserError):
        h.parse_setting(text)


def test_written_whole_leaves_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "a" / "file.txt"
    h.write_text(path, "old")
    with pytest.raises(RuntimeError), h.written_whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]  # and no temporary file beside it


def test_two_that_write_one_file_at_once_do_not_write_into_each_others(tmp_path, monkeypatch):
    """As two containers do, whose processes have one number."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "file.txt"
    with h.written_whole(path) as first:
        first.write_text("the first's")
        with h.written_whole(path) as second:
            second.write_text("the second's")
        assert path.read_text() == "the second's"
    assert path.read_text() == "the first's"
    assert list(tmp_path.iterdir()) == [path]


def test_text_files_have_the_same_bytes_on_windows(tmp_path, monkeypatch):
    def as_on_windows(self, text, encoding=None, errors=None, newline=None):
        if newline is None:
            text = text.replace("\n", "\r\n")
        self.write_bytes(text.encode(encoding or "cp1252"))

    monkeypatch.setattr(Path, "write_text", as_on_windows)
    monkeypatch.setattr(os, "linesep", "\r\n")
    path = tmp_path / "a.csv"
    h.write_submission(path, ["0000", "é"], torch.tensor([3, 10]))
    assert path.read_bytes() == "Id,Category\n0000,3\né,10\n".encode()
    assert h.validate_submission(path, ["0000", "é"]) == 2


def test_without_stderr_there_is_no_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    with h.progress_bar(3, "decode") as bar:
        bar.update()
    assert bar.disable


def test_a_drive_that_is_not_there_is_said(monkeypatch):
    """Its root is its own parent, and is not there either."""
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(h.UserError, match="cannot be written to: there is no"):
        h.check_writable("a/b")


def test_written_whole_says_so_where_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(h.UserError, match="cannot be written"):
        h.write_text(tmp_path / "file" / "below.txt", "text")


class _Evil:
    """Unpickled without care, it opens a file to write."""

    def __reduce__(self):
        return (open, ("hacked.txt", "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": _Evil()}, "evil.ckpt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(_Evil()))
    for name in ("evil.ckpt", "evil.pkl"):
        with pytest.raises(h.UserError, match="not loaded"):
            h.load_file(name)
        with pytest.raises(h.UserError, match="not loaded"):
            h.load_teacher(name)
    assert not (tmp_path / "hacked.txt").exists()


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(h.UserError, match="damaged"):
        h.load_file(path)
    with pytest.raises(h.UserError, match="no file"):
        h.load_file(tmp_path / "c.ckpt")


def test_amp_asks_the_capability_not_the_emulation(monkeypatch):
    device = torch.device("cuda")
    # torch says True of cards that only emulate bf16, which is slow.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (7, 5))
    assert h.amp_dtype(device) is torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (9, 0))
    assert h.amp_dtype(device) is torch.bfloat16
    assert h.amp_dtype(device, "off") is None
    assert h.amp_dtype(device, "bf16") is torch.bfloat16


def test_bf16_is_refused_where_it_is_emulated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "Tesla T4")
    with pytest.raises(h.UserError, match="Tesla T4 has no bfloat16"):
        h.amp_dtype(torch.device("cuda"), "bf16")
    assert h.amp_dtype(torch.device("cpu"), "bf16") is torch.bfloat16


def test_fp32_is_fp32_on_every_card(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(shape))
    assert h.pick_device() == torch.device("cuda", 0)
    assert not torch.backends.cudnn.allow_tf32


def test_a_gpu_that_runs_no_kernel_is_named(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "Tesla P100")
    monkeypatch.setattr(torch, "ones", broken)
    with pytest.raises(h.UserError, match="Tesla P100 cannot run torch"):
        h.pick_device()
    # The second process of a node with one GPU.
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(h.UserError, match="there are 1 GPUs"):
        h.pick_device()


# --- what is only looked at -----------------------------------------------------------------------


def broken():
    raise RuntimeError("no memory\nand more lines")


@h.illustration()
def broken_picture():
    """A picture."""
    broken()


def test_an_illustration_that_fails_is_an_error_in_the_tests():
    with pytest.raises(RuntimeError, match="no memory"):
        broken_picture()
    with pytest.raises(RuntimeError, match="no memory"), h.illustration():
        broken()


def test_an_illustration_that_fails_is_said_and_the_run_goes_on(monkeypatch, capsys):
    monkeypatch.delenv("HW13_STRICT")
    assert broken_picture() is None
    with h.illustration():
        broken()
    said = "Not shown, and the run goes on: RuntimeError: no memory\n"
    assert capsys.readouterr().out == 2 * said
    assert broken_picture.__doc__ == "A picture."


def test_a_stop_by_hand_goes_through_an_illustration(monkeypatch):
    monkeypatch.delenv("HW13_STRICT")
    with pytest.raises(KeyboardInterrupt), h.illustration():
        raise KeyboardInterrupt


def test_the_reason_of_an_error_is_one_short_line():
    worker = RuntimeError("Caught in worker 0.\nOriginal Traceback (...):\n  File\nOSError: full\n")
    assert h.reason(worker) == "OSError: full"
    assert h.reason(KeyError()) == "KeyError:"
    assert h.reason(h.UserError("it is a sentence")) == "it is a sentence"
    assert len(h.reason(ValueError("word " * 100))) <= 200
