"""Training: the step, the epoch, the score, and fit, which goes on as if it had not stopped."""

import contextlib
import math
import time
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from conftest import same, without_seconds
from torch import nn

import helpers as h

CPU = torch.device("cpu")


def tiny_net(cfg):
    """A net with what makes a run hard to repeat: dropout and batch norm."""
    block = h.dwpw_conv(3, 4)
    return nn.Sequential(block, h.GlobalAvgPool(), nn.Dropout(), nn.Linear(4, 11))


@pytest.fixture(autouse=True)
def _a_tiny_net_among_nets(monkeypatch):
    monkeypatch.setitem(h.NETS, "sample", tiny_net)


def made_up(name, n, side=40):
    """A Split of n pictures of noise."""
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(256, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    ids = "abcdefghijklmnopqrstuv"[:n]
    return h.Split(name, "", images, torch.arange(n) % 11, ids, torch.ones(n), name)


def prepared(stage="simple", **settings):
    """(DistillLoss, training loader, validation loader): 22 and 11 pictures, three steps."""
    small = {"image_size": 40, "batch_size": 8, "n_epochs": 3, "student": "sample", "amp": "off"}
    cfg = h.get_config(stage, **(small | settings))
    split = made_up("training", 22, side=46 if cfg.crop_scale else 40)
    train = h.BatchLoader(split, cfg, CPU, train=True)
    valid = h.BatchLoader(made_up("validation", 11), cfg, CPU, batch_size=4)
    return h.DistillLoss(cfg, h.build_student(cfg), h.build_student(cfg)), train, valid


def fit_into(path, loss_fn, train, valid):
    """fit with a folder that takes any run for its own."""
    return h.fit(loss_fn, train, valid, h.RunFolder(path, {"config": {}, "probe": {}}))


# --- the step -------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_then_stays_or_falls_to_zero():
    for schedule, after in (("constant", [0.1] * 4), ("cosine", [0.1, 0.05, 0.0, 0.0])):
        cfg = h.Config(lr=0.1, lr_schedule=schedule, warmup_epochs=2.0, n_epochs=10)
        values = [h.learning_rate(cfg, epoch) for epoch in (0, 1, 2, 6, 10, 11)]
        assert values == pytest.approx([0.00005, 0.05005, *after])


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_an_epoch_of_one_step_is_torchs_own_with_clipped_gradients(kind):
    how = {"lr": 0.1, "weight_decay": 0.2}
    own = {"student": "ir", "optimizer": kind.__name__.lower(), "grad_norm_max": 1e-6}
    loss_fn, train, _ = prepared(batch_size=64, **own, **how)
    reference = h.build_student(loss_fn.cfg)
    batch = next(iter(train))
    F.cross_entropy(reference(batch.images), batch.labels).backward()
    nn.utils.clip_grad_norm_(reference.parameters(), 1e-6)
    kind(reference.parameters(), **how).step()
    h.train_one_epoch(h.TrainState(loss_fn), loss_fn, train, 0)
    vectors = map(nn.utils.parameters_to_vector, (loss_fn.parameters(), reference.parameters()))
    # Rounding parts them by 0.002 at most (one thread), a step without clipping by 0.1.
    assert torch.allclose(*vectors, atol=1e-2)


def test_a_step_unscales_before_it_clips(monkeypatch):
    state = MagicMock(**{"optimizer.param_groups": []})
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", state.clip)
    h.optimizer_step(state, torch.ones(1), 0.1, 10.0)
    names = [name.rpartition(".")[2] for name, *_ in state.mock_calls]
    steps = ["zero_grad", "scale", "backward", "unscale_", "parameters", "clip", "step", "update"]
    assert names == steps


# --- the epoch and the score ----------------------------------------------------------------------


def test_an_epochs_row_shows_how_its_rate_and_the_losss_weights_move():
    loss_fn, train, valid = prepared("beyond", teacher_views=0)
    for epoch, row in enumerate(h.fit(loss_fn, train, valid)):
        kd, alpha, _ = h.loss_weights(loss_fn.cfg, (epoch + 1) / 3)
        total = kd * (alpha * row["kl"] + (1 - alpha) * row["ce"])
        assert row["train_loss"] == pytest.approx(total, rel=1e-5)
        assert row["lr"] == h.learning_rate(loss_fn.cfg, epoch + 2 / 3)


def test_evaluate_counts_every_image_once_and_changes_nothing():
    loss_fn, _, valid = prepared()
    score = h.evaluate(loss_fn.student, valid)
    assert loss_fn.student.training
    logits = h.freeze(loss_fn.student)(h.normalize(valid.split.images))
    loss = F.cross_entropy(logits, valid.split.labels).item()
    n_correct = (logits.argmax(1) == valid.split.labels).sum().item()
    assert score == {"valid_loss": pytest.approx(loss), "valid_acc": n_correct / 11, "n": 11}


def test_a_paired_difference_has_the_error_of_a_mean():
    correct = torch.tensor([True] * 60 + [False] * 40)
    # Ten images are gained and ten lost: the mean square of -1, 0 and 1 is 0.2.
    wanted = (0.0, pytest.approx((0.2 / 100) ** 0.5))
    assert h.paired_difference(correct, correct.roll(10)) == wanted
    assert h.plus_minus(0.5, 100) == "0.5000 +- 0.0500"


def test_the_first_of_equal_epochs_is_the_best_and_patience_counts_from_it():
    rows = [{"valid_acc": accuracy} for accuracy in (0.1, 0.3, 0.3, 0.2)]
    assert [h.best_so_far(rows[:n]) for n in (0, 1, 4)] == [(-1.0, 0), (0.1, 0), (0.3, 2)]
    assert h.is_finished(rows, h.Config(patience=2))
    assert not h.is_finished(rows, h.Config(patience=3))


# --- fit ------------------------------------------------------------------------------------------


def test_fit_keeps_the_best_epochs_net(monkeypatch):
    checksums = []
    for n_epochs in (2, 4):
        accuracies = iter([0.2, 0.5, 0.5, 0.1])
        monkeypatch.setattr(h, "evaluate", lambda *_, left=accuracies: {"valid_acc": next(left)})
        loss_fn, train, valid = prepared(n_epochs=n_epochs)
        h.fit(loss_fn, train, valid)
        checksums.append(h.state_checksum(loss_fn.student))
    assert checksums[0] == checksums[1]


def test_without_validation_the_last_epochs_net_is_kept(tmp_path):
    loss_fn, train, _ = prepared(train_on="both", patience=1)
    assert len(fit_into(tmp_path, loss_fn, train, None)) == 3
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same(saved["loss_fn"], dict(loss_fn.state_dict()))


@pytest.mark.parametrize("steps", [3, 4, 8])
@pytest.mark.parametrize(
    ("stage", "settings"), [("beyond", {"teacher_views": 2}), ("simple", {"amp": "fp16"})]
)
def test_stopped_after_any_epoch_a_run_ends_as_if_it_had_not(
    stage, settings, steps, tmp_path, monkeypatch
):
    step = h.optimizer_step

    def stopped(*arguments):
        left.pop()
        step(*arguments)

    def run(folder):
        # A cache of its own, or the second run would find the first one's stored logits.
        monkeypatch.setenv("HW13_CACHE", str(tmp_path / "cache" / folder))
        loss_fn, train, valid = prepared(stage, **settings)
        with contextlib.suppress(IndexError):
            fit_into(tmp_path / folder, loss_fn, train, valid)
        return h.copy_of_weights(loss_fn.student), without_seconds(tmp_path / folder)

    whole = run("whole")
    monkeypatch.setattr(h, "optimizer_step", stopped)
    left = [None] * steps
    net, saved = run("cut")
    assert same(saved["best"], net)
    left = [None] * 99
    assert same(run("cut"), whole)


def test_stored_logits_spare_the_teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("HW13_CACHE", str(tmp_path))
    loss_fn, train, valid = prepared("beyond", teacher_views=2, n_epochs=5)
    seen = []
    loss_fn.teacher.register_forward_hook(lambda net, images, out: seen.extend(out))
    h.fit(loss_fn, train, valid)
    assert len(seen) == 2 * 22


@pytest.mark.parametrize(
    ("hours", "place", "spent", "longest", "is_up"),
    [
        # Needed are two epochs' times and five minutes.
        (1.0, "", 2000, [600], False),
        (1.0, "", 2200, [600, 60], True),
        # Without a limit of the user's there is Kaggle's.
        (0.0, "working", 39600, [600], False),
        (0.0, "working", 39600, [800], True),
        (0.0, "", 99999, [800], False),
    ],
)
def test_time_is_up_while_a_prediction_still_fits(
    hours, place, spent, longest, is_up, tmp_path, monkeypatch
):
    (tmp_path / place).mkdir(exist_ok=True)
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path))
    monkeypatch.setattr(h, "SESSION_START", time.time() - spent)
    cfg = h.Config(time_limit_h=hours)
    assert h.time_is_up(cfg, [{"seconds": seconds} for seconds in longest]) == is_up


@pytest.mark.parametrize(
    ("spoilt", "words"), [("loss", "the loss is not"), ("teacher_logits", "the teacher's answers")]
)
def test_what_is_not_finite_is_named_with_its_images(spoilt, words):
    loss_fn, train, _ = prepared("medium", batch_size=2)

    def broken(*arguments):
        out = loss_fn(*arguments)
        out = out._replace(loss=out.loss * math.nan)
        return out._replace(**{spoilt: getattr(out, spoilt) * math.nan})

    ids = ", ".join(train.split.ids[row] for row in train.batches()[0])
    with pytest.raises(h.UserError, match=f"{words}.*in epoch 1, at the images {ids}"):
        h.train_one_epoch(h.TrainState(loss_fn), broken, train, 0)


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("major", "wanted"), [(7, torch.float16), (8, torch.bfloat16)])
def test_gpus_that_only_emulate_bf16_train_in_fp16(major, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 5))
    assert h.amp_dtype(torch.device("cuda")) is wanted


AMX = {"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}


@pytest.mark.parametrize(
    ("abilities", "wanted"),
    [
        (AMX, torch.bfloat16),
        (AMX | {"amx_bf16": False}, None),
        (AMX | {"amx_bf16": False, "cpu_name": "AMD EPYC"}, torch.bfloat16),
        ({}, None),  # torch 2.10 tells nothing
    ],
)
def test_cpus_train_in_bf16_where_that_is_faster(abilities, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)
    assert [h.amp_dtype(CPU, amp) for amp in ("auto", "off")] == [wanted, None]
