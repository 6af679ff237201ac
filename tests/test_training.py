"""fit and its parts: exact resuming, early stopping, both loaders, the files that a run leaves."""

import dataclasses
import json
import math

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

import helpers as h

SMALL = {"image_size": 64, "batch_size": 8, "n_epochs": 4, "lr": 1e-3, "amp": "off"}


def prepared(food, stage="simple", teacher_file=None, **settings):
    """(DistillLoss, FoodData, training loader, validation loader) of a small run."""
    cfg = h.get_config(stage, **(SMALL | settings))
    data = h.find_data(food)
    train, valid = h.build_loaders(cfg, data, torch.device("cpu"))
    teacher = None
    if teacher_file:
        teacher = h.load_teacher(teacher_file)
    return h.DistillLoss(cfg, h.build_student(cfg), teacher), data, train, valid


def fit_into(path, loss_fn, train, valid, fresh=False, **facts):
    """The history of a fit into a folder."""
    return h.fit(loss_fn, train, valid, h.RunFolder(path, loss_fn, fresh=fresh, **facts))


# --- parts ----------------------------------------------------------------------------------------


def test_the_first_of_equal_epochs_is_the_best_and_patience_counts_from_it():
    rows = [{"valid_acc": v} for v in (0.1, 0.3, 0.3, 0.2)]
    assert [h.best_so_far(rows[:n]) for n in range(5)] == [
        (-1.0, 0),
        (0.1, 0),
        (0.3, 0),
        (0.3, 1),
        (0.3, 2),
    ]
    cfg = h.Config(n_epochs=9, patience=2)
    assert [h.is_finished(rows[:n], cfg) for n in range(5)] == [False] * 4 + [True]
    assert h.is_finished(rows, h.Config(n_epochs=4)) and not h.is_finished(
        rows, h.Config(n_epochs=5)
    )
    assert h.best_so_far([{"valid_acc": float("nan")}] * 3) == (-1.0, 3)


def test_learning_rate():
    constant = h.Config(lr=0.1)
    assert {h.learning_rate(constant, e) for e in (0, 3.3, 9.9)} == {0.1}
    short = dataclasses.replace(constant, warmup_epochs=1e-4)
    assert h.learning_rate(short, 0) == 0.1  # never more
    cosine = h.Config(lr=0.1, lr_schedule="cosine", warmup_epochs=2.0, n_epochs=10)
    values = [h.learning_rate(cosine, e / 10) for e in range(100)]
    assert (
        values[0] < 0.001 and max(values) == pytest.approx(0.1) and values.index(max(values)) == 20
    )
    assert values[20:] == sorted(values[20:], reverse=True) and values[-1] < 1e-3
    assert h.learning_rate(cosine, 6) == pytest.approx(0.05)


def test_a_first_step_that_fp16_skips_leaves_sgd_a_momentum_of_zero():
    cfg = h.Config(optimizer="sgd", lr=0.1)
    weights = []
    for skips_first in (False, True):
        weight = torch.nn.Parameter(torch.ones(1000))
        optimizer = h.build_optimizer(cfg, [weight])
        weight.grad = torch.full((1000,), 0.5)
        if skips_first:
            # What GradScaler tells a fused optimizer.
            optimizer.grad_scale = torch.tensor(1.0)
            optimizer.found_inf = torch.tensor(1.0)
            optimizer.step()
            assert torch.equal(weight.detach(), torch.ones(1000))
            assert not optimizer.state[weight]["momentum_buffer"].any()
            optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        weights.append(weight.detach())
    assert torch.equal(*weights)


def test_optimizers_follow_the_config():
    weight = [torch.nn.Parameter(torch.ones(2))]
    for name, kind in h.OPTIMIZERS.items():
        optimizer = h.build_optimizer(h.Config(optimizer=name, lr=0.5, weight_decay=0.1), weight)
        assert (
            type(optimizer) is kind
            and optimizer.defaults["lr"] == 0.5
            and optimizer.defaults["weight_decay"] == 0.1
        )


def test_one_step_is_one_clipped_step(food):
    """An epoch of one batch equals torch's own optimizer after torch's own clipping."""
    settings = {"batch_size": 64, "grad_norm_max": 0.1, "optimizer": "sgd", "lr": 1.0}
    loss_fn, _, train, _ = prepared(food, **settings)
    reference = h.build_student(loss_fn.cfg).train()
    batch = next(iter(train))
    torch.nn.functional.cross_entropy(reference(batch.images), batch.labels).backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    sgd = {"lr": 1.0, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-5}
    torch.optim.SGD(reference.parameters(), **sgd).step()

    moved = 0.0
    start = h.build_student(loss_fn.cfg)
    for a, b in zip(reference.parameters(), start.parameters(), strict=True):
        moved += (a - b).norm() ** 2
    assert moved.sqrt().item() == pytest.approx(1.9 * 0.1, rel=0.01)

    row = h.train_one_epoch(h.TrainState(loss_fn), loss_fn, train, 0)
    assert row["train_loss"] == pytest.approx(math.log(11), rel=0.2)
    assert row["ce"] == row["train_loss"]
    trained = loss_fn.student.state_dict()
    for name, wanted in reference.state_dict().items():
        assert torch.allclose(trained[name].float(), wanted.float(), atol=1e-4), name


def test_the_scaler_unscales_before_clipping_and_steps_once(food):
    """The order of calls under fp16: unscale, clip, step, update, each once a batch."""
    loss_fn, _, train, _ = prepared(food, batch_size=64)
    student = loss_fn.student
    state = h.TrainState(loss_fn)
    calls = []

    class Spy:
        def scale(self, loss):
            calls.append("scale")
            return loss * 8

        def unscale_(self, optimizer):
            calls.append("unscale")
            for p in student.parameters():
                p.grad /= 8

        def step(self, optimizer):
            calls.append("step")
            norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
            assert norm <= loss_fn.cfg.grad_norm_max * 1.001

        def update(self):
            calls.append("update")

    state.scaler = Spy()
    h.train_one_epoch(state, loss_fn, train, 0)
    assert calls == ["scale", "unscale", "step", "update"]


class Overflow(torch.autograd.Function):
    """Logits whose gradient is infinite: no scale makes it finite."""

    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


class Overflowing(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return Overflow.apply(self.net(images))


@pytest.mark.parametrize(("n_epochs", "epoch"), [(1, 1), (9, 2)])
def test_fp16_gradients_that_are_never_finite_end_the_run(food, n_epochs, epoch):
    """11 steps an epoch; the scaler may begin with some lost ones, 2^16 is halved 17 times."""
    cfg = h.Config(image_size=40, batch_size=2, n_epochs=n_epochs, amp="fp16")
    train, valid = h.build_loaders(cfg, h.find_data(food), torch.device("cpu"))
    broken = h.DistillLoss(cfg, Overflowing(h.build_student(cfg)))
    with pytest.raises(h.UserError, match=f"no fp16 gradient of epoch {epoch} is finite"):
        h.fit(broken, train, valid)
    if n_epochs == 1:
        assert len(h.fit(h.DistillLoss(cfg, h.build_student(cfg)), train, valid)) == 1


def test_evaluate_counts_every_image_once(food):
    loss_fn, _, _, valid = prepared(food)
    student = loss_fn.student
    valid.batch_size = 5  # 11 images: a last batch of one
    score = h.evaluate(student, valid)
    logits, labels = h.predict_logits(student, valid)
    assert score["n"] == 11 and logits.shape == (11, 11) and torch.equal(labels, valid.split.labels)
    assert score["valid_acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert h.standard_error(0.5, 100) == 0.05


def test_evaluating_changes_nothing(food):
    loss_fn, _, _, valid = prepared(food)
    student = loss_fn.student
    before = h.state_checksum(student.train())
    h.evaluate(student, valid)
    assert h.state_checksum(student) == before and student.training


def test_a_loss_that_is_not_finite_is_an_error(food):
    loss_fn, _, train, valid = prepared(food)
    with torch.no_grad():
        loss_fn.student[0].weight.fill_(float("nan"))
    train.set_epoch(0)
    first = ", ".join(train.split.ids[i] for i in train.batches()[0][:8].tolist())
    with pytest.raises(
        h.UserError, match=f"loss of epoch 1 is not finite at the images {first}, .*lower lr"
    ):
        h.fit(loss_fn, train, valid)


@pytest.mark.parametrize(("check_every", "steps"), [(1, 2), (2, 2), (20, 3)])
def test_it_stops_within_so_many_batches_and_keeps_the_last_good_checkpoint(
    food, tmp_path, monkeypatch, check_every, steps
):
    """The second batch of epoch 2 goes wrong: epoch 1 stays saved, and going on is exact."""
    monkeypatch.setattr(h, "CHECK_FINITE_EVERY", check_every)
    whole, _, train, valid = prepared(food, n_epochs=3)
    fit_into(tmp_path / "whole", whole, train, valid)
    original = h.BatchLoader.views_of
    seen = []

    def poisoned(loader, rows, draw=None):
        seen.append(loader.train)
        images = original(loader, rows, draw)
        if loader.train and seen.count(True) == 5:
            images = images * float("nan")
        return images

    with monkeypatch.context() as patch:
        patch.setattr(h.BatchLoader, "views_of", poisoned)
        with pytest.raises(h.UserError, match="epoch 2 is not finite.*last whole epoch is saved"):
            fit_into(tmp_path / "cut", prepared(food, n_epochs=3)[0], train, valid)
    assert seen.count(True) == 3 + steps
    resumed = prepared(food, n_epochs=3)[0]
    assert len(fit_into(tmp_path / "cut", resumed, train, valid)) == 3
    assert h.state_checksum(resumed.student) == h.state_checksum(whole.student)


# --- fit ------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_the_best_student(food, teacher_file, tmp_path):
    loss_fn, _, train, valid = prepared(food, "boss", teacher_file)
    folder = tmp_path / "boss"
    history = fit_into(folder, loss_fn, train, valid)
    names = ["config.json", "last.ckpt", "log.csv", "previous.ckpt", "student_best.ckpt"]
    assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == names

    log = pd.read_csv(folder / "log.csv")
    assert len(log) == 4 == len(history)
    assert {"epoch", "lr", "train_loss", "valid_acc", "seconds"} <= set(log)
    # The loss's terms stand beside it: the handover can be seen.
    for epoch, row in log.iterrows():
        weights = h.loss_weights(loss_fn.cfg, (epoch + 1) / 4)
        kd = weights.alpha * row["kl"] + (1 - weights.alpha) * row["ce"]
        total = weights.kd * kd + weights.align * row["align"]
        assert row["train_loss"] == pytest.approx(total, rel=1e-4)

    state = torch.load(folder / "student_best.ckpt", weights_only=True)
    for name, value in state.items():
        assert value.dtype in (torch.float32, torch.int64) and value.is_contiguous()
        assert "adapter" not in name and "module" not in name
    loaded, loaded_cfg = h.load_student(folder / "student_best.ckpt")
    assert loaded_cfg == loss_fn.cfg
    # pandas before 3 loses the last digit of what it reads.
    best = pytest.approx(max(log["valid_acc"]), abs=1e-12)
    assert h.evaluate(loaded, valid)["valid_acc"] == best
    assert h.state_checksum(loaded) == h.state_checksum(loss_fn.student)


class Killed(Exception):
    pass


def interrupted(monkeypatch, name, calls, action):
    """Run `action` with the `calls`-th call of helpers.<name> raising Killed."""
    original, count = getattr(h, name), iter(range(1000))

    def killer(*args, **kwargs):
        if next(count) == calls:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(h, name, killer)
        with pytest.raises(Killed):
            action()


@pytest.mark.parametrize(
    ("name", "calls"), [("evaluate", 0), ("evaluate", 2), ("save_checkpoint", 1), ("write_text", 2)]
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"align_weights": (), "teacher_views": 2}, {"align_weights": (), "teacher_views": 4}],
)
def test_interrupted_is_the_same_as_not(
    food, teacher_file, tmp_path, monkeypatch, name, calls, settings
):
    def train(folder):
        loss_fn, _, loader, valid = prepared(food, "boss", teacher_file, **settings)
        return fit_into(tmp_path / folder, loss_fn, loader, valid), loss_fn.student

    history, student = train("whole")
    interrupted(monkeypatch, name, calls, lambda: train("cut"))
    again, resumed = train("cut")
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in history]
    assert h.state_checksum(resumed) == h.state_checksum(student)
    a, b = (torch.load(tmp_path / f / "last.ckpt", weights_only=True) for f in ("whole", "cut"))
    assert a.keys() == b.keys() and all(
        torch.equal(a["loss_fn"][k], b["loss_fn"][k]) for k in a["loss_fn"]
    )
    for k, entry in a["optimizer"]["state"].items():
        assert all(torch.equal(entry[n], b["optimizer"]["state"][k][n]) for n in entry)


def test_other_settings_are_refused_with_the_keys(food, tmp_path):
    loss_fn, _, train, valid = prepared(food, n_epochs=1)
    fit_into(tmp_path, loss_fn, train, valid, data_name="a")
    cosine = {"lr_schedule": "cosine", "n_epochs": 2}
    for settings, name, key in (
        ({"lr": 0.5}, "a", "lr 0.001"),
        ({}, "b", "data_name a"),
        (cosine, "a", "n_epochs"),
    ):
        other = prepared(food, **{"n_epochs": 1} | settings)[0]
        with pytest.raises(h.UserError, match=rf"other settings.*{key}.*--fresh"):
            fit_into(tmp_path, other, train, valid, data_name=name)
    longer = prepared(food, n_epochs=2)[0]
    assert len(fit_into(tmp_path, longer, train, valid, data_name="a")) == 2
    again = prepared(food, n_epochs=1)[0]
    assert len(fit_into(tmp_path, again, train, valid, fresh=True)) == 1


def test_early_stop_ends_the_run_and_stays_finished(food, tmp_path):
    settings = {"lr": 0.0, "n_epochs": 9, "patience": 2}
    loss_fn, _, train, valid = prepared(food, **settings)
    assert len(fit_into(tmp_path, loss_fn, train, valid)) == 3
    assert len(fit_into(tmp_path, prepared(food, **settings)[0], train, valid)) == 3


def test_fit_takes_the_courses_loader_and_is_deterministic(food):
    data = prepared(food)[1]

    def loader(cfg, split, **options):
        transform = h.reference_transform(cfg, train=split == "training")
        return DataLoader(h.FoodDataset(data, split, transform), **options)

    def train(workers):
        loss_fn = prepared(food, n_epochs=2)[0]
        training = loader(loss_fn.cfg, "training", batch_size=8, shuffle=True, num_workers=workers)
        history = h.fit(loss_fn, training, loader(loss_fn.cfg, "validation", batch_size=4))
        return history, h.state_checksum(loss_fn.student)

    history, first = train(0)
    assert train(0)[1] == first and len(history) == 2
    assert train(2)[1] == train(2)[1]


def test_evaluation_images_cannot_train(food):
    loss_fn, data, _, valid = prepared(food)
    cfg = loss_fn.cfg
    split = h.load_data(data, "evaluation", "eval", 64)
    dataset = h.FoodDataset(data, "evaluation", h.reference_transform(cfg, train=True))
    subset = torch.utils.data.Subset(dataset, [0, 1])
    state = h.TrainState(loss_fn)
    for loader in (
        h.BatchLoader(split, cfg, "cpu", train=True),
        DataLoader(dataset, 4),
        DataLoader(subset, 2),
    ):
        with pytest.raises(h.UserError, match="evaluation images"):
            h.fit(loss_fn, loader, valid)
        with pytest.raises(h.UserError, match="evaluation images"):
            h.fit(loss_fn, valid, loader)
        with pytest.raises(h.UserError, match="evaluation images"):
            h.train_one_epoch(state, loss_fn, loader, 0)


def test_fit_takes_a_loader_of_any_dataset(food):
    loss_fn, _, train, valid = prepared(food, n_epochs=1)
    batch = next(iter(train))
    pairs = torch.utils.data.TensorDataset(batch.images, batch.labels)
    assert len(h.fit(loss_fn, DataLoader(pairs, 4), valid)) == 1


def test_a_stopped_run_is_finished_for_any_number_of_processes():
    history = [{"valid_acc": v} for v in (0.5, 0.4, 0.3)]
    assert h.is_finished(history, h.Config(patience=2, n_epochs=9))
    assert not h.is_finished(history, h.Config(patience=3, n_epochs=9)) and h.is_finished(
        history, h.Config(n_epochs=3)
    )


def replaying(food, teacher_file=None, **settings):
    """What `prepared` gives for a run that stores the teacher's logits of two epochs."""
    settings = {"align_weights": (), "teacher_views": 2} | settings
    return prepared(food, "boss", teacher_file, **settings)


def test_replayed_views_want_a_batch_loader(food, teacher_file):
    loss_fn, data, _, valid = replaying(food, teacher_file)
    transform = h.reference_transform(loss_fn.cfg, train=True)
    loader = DataLoader(h.FoodDataset(data, "training", transform), 4)
    with pytest.raises(h.UserError, match="wants a BatchLoader"):
        h.fit(loss_fn, loader, valid)


def test_stored_views_give_what_the_teacher_gives(food, teacher_file, monkeypatch):
    runs = []

    def trained():
        loss_fn, _, train, valid = replaying(food, teacher_file, loss_schedule="constant")
        forward = loss_fn.teacher.forward
        loss_fn.teacher.forward = lambda x: runs.append(len(x)) or forward(x)
        h.fit(loss_fn, train, valid)
        return h.state_checksum(loss_fn.student)

    first = trained()
    assert sum(runs) == 2 * 22
    monkeypatch.setattr(h.TeacherViews, "read", lambda *a: None)
    assert trained() == first
    assert sum(runs) == 6 * 22


def test_one_method_says_which_epoch_is_replayed_and_the_batch_carries_it(food, teacher_file):
    loss_fn, _, train, _ = replaying(food, teacher_file)
    assert [loss_fn.cfg.view_epoch(e) for e in range(5)] == [0, 1, 0, 1, 0]
    train.set_epoch(3)
    assert {batch.view_epoch for batch in train} == {1}
    never = dataclasses.replace(loss_fn.cfg, loss_fn_type="CE")
    assert [never.view_epoch(e) for e in range(5)] == [0, 1, 2, 3, 4]


def test_stored_views_of_something_else_are_refused(food, teacher_file):
    loss_fn, _, train, _ = replaying(food, teacher_file)
    cfg = loss_fn.cfg
    views = h.TeacherViews(cfg, train, "teacher a")
    assert h.TeacherViews(cfg, train, "teacher b").path != views.path
    turned = dataclasses.replace(cfg, rotation=10.0)
    assert h.TeacherViews(turned, train, "teacher a").path != views.path
    raw = views.path.read_bytes()
    for harm in (b"x" + raw[1:], raw[:-4]):
        views.path.write_bytes(harm)
        with pytest.raises(h.UserError, match="other pictures or settings"):
            h.TeacherViews(cfg, train, "teacher a")


def test_stored_views_go_on_after_a_kill(food, teacher_file):
    loss_fn, _, train, _ = replaying(food, teacher_file)

    def batch(*rows, view_epoch=1):
        return h.Batch(None, None, torch.tensor(rows), view_epoch=view_epoch)

    h.TeacherViews(loss_fn.cfg, train, "teacher c").write(batch(3, 5), torch.ones(2, 11))
    again = h.TeacherViews(loss_fn.cfg, train, "teacher c")
    assert torch.equal(again.read(batch(5), "cpu"), torch.ones(1, 11))
    assert again.read(batch(4, 5), "cpu") is None
    assert again.read(batch(5, view_epoch=0), "cpu") is None


# --- stages ---------------------------------------------------------------------------------------


def test_run_stage_refuses_a_student_above_the_limit_before_any_work(food, tmp_path, monkeypatch):
    monkeypatch.setattr(h, "load_data", lambda *a: pytest.fail("decoded"))
    data = h.find_data(food)
    out = tmp_path / "out"
    widths = (24, 32, 60)
    with pytest.raises(ValueError, match="homework allows 60,000"):
        h.run_stage(h.get_config("strong", widths=widths), data, out=out)
    with pytest.raises(ValueError, match="homework allows 60,000"):
        h.run(data, ["strong"], out=out, widths=widths)
    assert not out.exists()


def test_a_changed_teacher_is_an_error(food, teacher_file, tmp_path, monkeypatch, tiny):
    cfg = h.get_config("medium", **tiny)
    data = h.find_data(food)
    teacher = h.load_teacher(teacher_file)
    original = h.fit

    def fit(*args, **kwargs):
        history = original(*args, **kwargs)
        with torch.no_grad():
            teacher.bn1.running_mean += 1
        return history

    monkeypatch.setattr(h, "fit", fit)
    with pytest.raises(RuntimeError, match="changed the teacher"):
        h.run_stage(cfg, data, teacher, tmp_path)


def test_run_says_what_is_wrong_with_a_later_stage_before_the_first_trains(
    food, teacher_file, tmp_path, monkeypatch, tiny
):
    data = h.find_data(food)
    h.run(data, ["strong"], out=tmp_path, **tiny)
    monkeypatch.setattr(h, "fit", lambda *a: pytest.fail("trained"))
    changed = tiny | {"lr": 0.5}
    with pytest.raises(h.UserError, match="other settings"):
        h.run(data, ["simple", "strong"], out=tmp_path, **changed)


def test_run_without_a_teacher_leaves_stages_out_and_says_so(food, tmp_path, capsys, tiny):
    data = h.find_data(food)
    runs = h.run(data, out=tmp_path, **tiny)
    assert [run.name for run in runs] == ["simple"]
    out = capsys.readouterr().out
    assert out.count("left out, for it needs a teacher") == 4
    assert h.TEACHER_FILE in out
    with pytest.raises(h.UserError, match="no stage could run without a teacher"):
        h.run(data, ["boss"], out=tmp_path, **tiny)


def test_all_stages_end_in_a_table_and_a_submission(food, teacher_file, tmp_path, capsys):
    data = h.find_data(food)
    settings = {"image_size": 64, "n_epochs": 1, "batch_size": 8}
    runs = h.run(data, out=tmp_path, **settings)
    for run in runs:
        assert h.validate_submission(run.csv, 5) == 5
        assert run.folder == tmp_path / run.name

    table = h.stage_table(runs)
    assert list(table.index) == list(h.STAGES)
    assert (table["parameters"] <= h.PARAM_LIMIT).all()
    error = h.standard_error(runs[0].valid_acc, 11)
    assert table["+- s.e."].iloc[0] == round(error, 4)

    best = max(runs, key=lambda run: run.valid_acc)
    assert (tmp_path / "submission.csv").read_bytes() == best.csv.read_bytes()
    saved = json.loads((tmp_path / "boss/config.json").read_text())
    assert saved["config"]["n_epochs"] == 1
    assert len(saved["teacher_checksum"]) == 64  # SHA-256 in hexadecimal

    # A second time, nothing is left to train.
    capsys.readouterr()
    h.run(data, out=tmp_path, **settings)
    assert capsys.readouterr().out.count("finished before, loaded") == 5


def test_a_public_copy_gets_an_accuracy_but_no_submission(tmp_path, capsys, tiny):
    from test_data import public_copy

    data = h.find_data(public_copy(tmp_path / "copy"))
    (run,) = h.run(data, ["simple"], out=tmp_path / "out", **tiny)
    out = capsys.readouterr().out
    assert "accuracy on 11 evaluation images" in out
    assert "not the homework's split" in out
    assert "no submission.csv" in out
    assert run.csv.exists()
    assert not (tmp_path / "out/submission.csv").exists()


def test_an_own_teacher_can_teach(food, tmp_path, tiny):
    data = h.find_data(food)
    cfg = dataclasses.replace(h.TEACHER_CONFIG, **tiny)
    path = h.train_teacher(data, tmp_path, cfg)
    (run,) = h.run(data, ["medium"], path, tmp_path, **tiny)
    assert run.name == "medium"
    assert len(run.history) == 2


def test_demo_results_never_meet_a_real_runs(food, tmp_path):
    demo = dataclasses.replace(h.find_data(food), origin="demo set (drawn, not photographs)")
    (run,) = h.run(demo, ["simple"], out=tmp_path, n_epochs=1)
    assert run.folder == tmp_path / "demo/simple"
    assert run.cfg.image_size == 64
    assert (tmp_path / "submission_demo.csv").exists()
    assert not (tmp_path / "submission.csv").exists()


def told_pace(n_epochs, capsys):
    """What is printed of the pace of a run whose first 1000 images took 100 seconds."""
    display = h.RunDisplay(h.Config(n_epochs=n_epochs), 1000, [])
    display.bar.update(1000)
    display.tell_pace(100.0)
    display.bar.close()
    return capsys.readouterr().out


def test_the_pace_names_the_end_and_what_to_change_where_a_kaggle_session_is_too_short(
    monkeypatch, tmp_path, capsys
):
    (tmp_path / "working").mkdir()
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path))
    fits = told_pace(10, capsys)
    too_long = told_pace(600, capsys)
    for out in (fits, too_long):
        assert "10 images/s" in out
        assert " to go, till " in out
        assert "session has" in out
    advice = "choose LENGTH = 'lesson'"
    assert advice not in fits
    assert advice in too_long
