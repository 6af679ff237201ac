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


def prepared(food, stage="boss", **settings):
    """(config, data, training loader, validation loader, student)."""
    cfg = h.get_config(stage, **(SMALL | settings))
    data = h.find_data(food)
    train, valid = h.build_loaders(cfg, data, torch.device("cpu"))
    return cfg, data, train, valid, h.build_student(cfg)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_the_first_of_equal_epochs_is_the_best_and_patience_counts_from_it():
    rows = [{"valid_acc": v} for v in (0.1, 0.3, 0.3, 0.2)]
    assert [h.best_so_far(rows[:n]) for n in range(5)] == [(-1.0, 0), (0.1, 0), (0.3, 0), (0.3, 1), (0.3, 2)]
    cfg = h.Config(n_epochs=9, patience=2)
    assert [h.is_finished(rows[:n], cfg) for n in range(5)] == [False] * 4 + [True]
    assert h.is_finished(rows, h.Config(n_epochs=4)) and not h.is_finished(rows, h.Config(n_epochs=5))
    assert h.best_so_far([{"valid_acc": float("nan")}] * 3) == (-1.0, 3)


def test_learning_rate():
    constant = h.Config(lr=0.1)
    assert {h.learning_rate(constant, e) for e in (0, 3.3, 9.9)} == {0.1}
    cosine = h.Config(lr=0.1, lr_schedule="cosine", warmup_epochs=2.0, n_epochs=10)
    values = [h.learning_rate(cosine, e / 10) for e in range(100)]
    assert values[0] < 0.001 and max(values) == pytest.approx(0.1) and values.index(max(values)) == 20
    assert values[20:] == sorted(values[20:], reverse=True) and values[-1] < 1e-3
    assert h.learning_rate(cosine, 6) == pytest.approx(0.05)


def test_optimizers_follow_the_config():
    weight = [torch.nn.Parameter(torch.ones(2))]
    for name, kind in h.OPTIMIZERS.items():
        optimizer = h.build_optimizer(h.Config(optimizer=name, lr=0.5, weight_decay=0.1), weight)
        assert type(optimizer) is kind and optimizer.defaults["lr"] == 0.5 and optimizer.defaults["weight_decay"] == 0.1


def test_one_step_is_one_clipped_step(food):
    """An epoch of one batch equals torch's own optimizer after torch's own clipping."""
    cfg, _, train, _, student = prepared(food, "simple", batch_size=64, grad_norm_max=0.1, optimizer="sgd", lr=1.0)
    reference = h.build_student(cfg).train()
    batch = next(iter(train))
    torch.nn.functional.cross_entropy(reference(batch.images), batch.labels).backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    torch.optim.SGD(reference.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=1e-5).step()
    start = h.build_student(cfg)
    moved = sum((a - b).norm() ** 2 for a, b in zip(reference.parameters(), start.parameters(), strict=True)) ** 0.5
    assert moved.item() == pytest.approx(1.9 * 0.1, rel=0.01)
    loss_fn = h.DistillLoss(cfg, student)
    row = h.train_one_epoch(h.TrainState(loss_fn, cfg, torch.device("cpu")), loss_fn, train, cfg, 0)
    assert row["train_loss"] == pytest.approx(math.log(11), rel=0.2)
    for (name, a), (_, b) in zip(student.state_dict().items(), reference.state_dict().items(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-4), name


def test_the_scaler_unscales_before_clipping_and_steps_once(food):
    """The order of calls under fp16: unscale, clip, step, update, each once a batch."""
    cfg, _, train, _, student = prepared(food, "simple", batch_size=64)
    loss_fn = h.DistillLoss(cfg, student)
    state, calls = h.TrainState(loss_fn, cfg, torch.device("cpu")), []

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
            assert norm <= cfg.grad_norm_max * 1.001

        def update(self):
            calls.append("update")

    state.scaler = Spy()
    h.train_one_epoch(state, loss_fn, train, cfg, 0)
    assert calls == ["scale", "unscale", "step", "update"]


def test_evaluate_counts_every_image_once(food):
    _, _, _, valid, student = prepared(food)
    valid.batch_size = 5  # 11 images: a last batch of one
    score = h.evaluate(student, valid)
    logits, labels = h.predict_logits(student, valid)
    assert score["n"] == 11 and logits.shape == (11, 11) and torch.equal(labels, valid.split.labels)
    assert score["valid_acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert h.standard_error(0.5, 100) == 0.05


def test_evaluating_changes_nothing(food):
    _, _, _, valid, student = prepared(food)
    before = h.state_checksum(student.train())
    h.evaluate(student, valid)
    assert h.state_checksum(student) == before and student.training


def test_a_loss_that_is_not_finite_is_an_error(food):
    cfg, _, train, valid, student = prepared(food, "simple")
    with torch.no_grad():
        student[0].weight.fill_(float("nan"))
    train.set_epoch(0)
    first = ", ".join(train.split.ids[i] for i in train.batches()[0][:8].tolist())
    with pytest.raises(h.UserError, match=f"loss of epoch 1 is not finite at the images {first}, .*lower lr"):
        h.fit(student, train, valid, cfg)


@pytest.mark.parametrize(("finite_check", "steps"), [(1, 2), (2, 2), (20, 3)])
def test_it_stops_within_so_many_batches_and_keeps_the_last_good_checkpoint(food, tmp_path, monkeypatch, finite_check,
                                                                            steps):
    """The second batch of the second epoch goes wrong: epoch 1 stays saved, and going on from it is exact."""
    cfg, _, train, valid, student = prepared(food, "simple", n_epochs=3, finite_check=finite_check)
    whole = h.build_student(cfg)
    h.fit(whole, train, valid, cfg, folder=tmp_path / "whole")
    original, seen = h.BatchLoader.views_of, []

    def poisoned(loader, rows, draw=None):
        seen.append(loader.train)
        images = original(loader, rows, draw)
        return images * float("nan") if loader.train and seen.count(True) == 5 else images

    with monkeypatch.context() as patch:
        patch.setattr(h.BatchLoader, "views_of", poisoned)
        with pytest.raises(h.UserError, match="epoch 2 is not finite.*last whole epoch is saved"):
            h.fit(student, train, valid, cfg, folder=tmp_path / "cut")
    assert seen.count(True) == 3 + steps
    resumed = h.build_student(cfg)
    assert len(h.fit(resumed, train, valid, cfg, folder=tmp_path / "cut")) == 3
    assert h.state_checksum(resumed) == h.state_checksum(whole)


# --- fit -------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_the_best_student(food, teacher_file, tmp_path):
    cfg, _, train, valid, student = prepared(food)
    history = h.fit(student, train, valid, cfg, h.load_teacher(teacher_file), tmp_path / "boss")
    assert sorted(p.name for p in (tmp_path / "boss").iterdir()) == ["config.json", "last.ckpt", "log.csv",
                                                                    "previous.ckpt", "student_best.ckpt"]
    log = pd.read_csv(tmp_path / "boss/log.csv")
    assert len(log) == 4 == len(history) and {"epoch", "lr", "train_loss", "valid_acc", "seconds"} <= set(log)
    state = torch.load(tmp_path / "boss/student_best.ckpt", weights_only=True)
    assert all(v.dtype in (torch.float32, torch.int64) and v.is_contiguous() for v in state.values())
    assert not any("adapter" in k or "module" in k for k in state)
    loaded, loaded_cfg = h.load_student(tmp_path / "boss/student_best.ckpt")
    assert loaded_cfg == cfg and h.evaluate(loaded, valid)["valid_acc"] == max(log["valid_acc"])
    assert h.state_checksum(loaded) == h.state_checksum(student)


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


@pytest.mark.parametrize(("name", "calls"), [("evaluate", 0), ("evaluate", 2), ("save_checkpoint", 1),
                                             ("write_text", 2)])
@pytest.mark.parametrize("settings", [{}, {"align_weights": (), "teacher_views": 2},
                                      {"align_weights": (), "teacher_views": 4}])
def test_interrupted_is_the_same_as_not(food, teacher_file, tmp_path, monkeypatch, name, calls, settings):
    def train(folder):
        cfg, _, loader, valid, student = prepared(food, **settings)
        return h.fit(student, loader, valid, cfg, h.load_teacher(teacher_file), tmp_path / folder), student

    history, student = train("whole")
    interrupted(monkeypatch, name, calls, lambda: train("cut"))
    again, resumed = train("cut")
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in history]
    assert h.state_checksum(resumed) == h.state_checksum(student)
    a, b = (torch.load(tmp_path / f / "last.ckpt", weights_only=True) for f in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a["loss_fn"][k], b["loss_fn"][k]) for k in a["loss_fn"])
    for k, entry in a["optimizer"]["state"].items():
        assert all(torch.equal(entry[n], b["optimizer"]["state"][k][n]) for n in entry)


def test_other_settings_are_refused_with_the_keys(food, tmp_path):
    cfg, _, train, valid, student = prepared(food, "simple", n_epochs=1)
    h.fit(student, train, valid, cfg, folder=tmp_path, facts={"data": "a"})
    cosine = dataclasses.replace(cfg, lr_schedule="cosine", n_epochs=2)
    for other, facts, key in ((dataclasses.replace(cfg, lr=0.5), {"data": "a"}, "lr 0.001"),
                              (cfg, {"data": "b"}, "data a"), (cosine, {"data": "a"}, "n_epochs")):
        with pytest.raises(h.UserError, match=rf"other settings.*{key}.*--fresh"):
            h.fit(h.build_student(other), train, valid, other, folder=tmp_path, facts=facts)
    longer = dataclasses.replace(cfg, n_epochs=2)
    assert len(h.fit(h.build_student(longer), train, valid, longer, folder=tmp_path, facts={"data": "a"})) == 2
    assert len(h.fit(h.build_student(cfg), train, valid, cfg, folder=tmp_path, facts={}, fresh=True)) == 1


def test_early_stop_ends_the_run_and_stays_finished(food, tmp_path):
    cfg, _, train, valid, student = prepared(food, "simple", lr=0.0, n_epochs=9, patience=2)
    assert len(h.fit(student, train, valid, cfg, folder=tmp_path)) == 3
    assert len(h.fit(h.build_student(cfg), train, valid, cfg, folder=tmp_path)) == 3


def test_fit_takes_the_courses_loader_and_is_deterministic(food):
    cfg, data, _, valid, _ = prepared(food, "simple", n_epochs=2)

    def train(workers):
        dataset = h.FoodDataset(data, "training", h.reference_transform(cfg, train=True))
        student = h.build_student(cfg)
        history = h.fit(student, DataLoader(dataset, 8, shuffle=True, num_workers=workers),
                        DataLoader(h.FoodDataset(data, "validation", h.reference_transform(cfg, train=False)), 4), cfg)
        return history, h.state_checksum(student)

    history, first = train(0)
    assert train(0)[1] == first and len(history) == 2
    assert train(2)[1] == train(2)[1]


def test_evaluation_images_cannot_train(food):
    cfg, data, _, valid, student = prepared(food, "simple")
    loaders = (h.BatchLoader(h.load_data(data, "evaluation", "eval", 64), cfg, "cpu", train=True),
               DataLoader(h.FoodDataset(data, "evaluation", h.reference_transform(cfg, train=True)), 4))
    subset = DataLoader(torch.utils.data.Subset(loaders[1].dataset, [0, 1]), 2)
    state = h.TrainState(h.DistillLoss(cfg, student), cfg, torch.device("cpu"))
    for loader in (*loaders, subset):
        for forbidden in (lambda bad: h.fit(student, bad, valid, cfg), lambda bad: h.fit(student, valid, bad, cfg),
                          lambda bad: h.train_one_epoch(state, state.loss_fn, bad, cfg, 0)):
            with pytest.raises(h.UserError, match="evaluation images"):
                forbidden(loader)


def test_fit_takes_a_loader_of_any_dataset(food):
    cfg, _, train, valid, student = prepared(food, "simple", n_epochs=1)
    batch = next(iter(train))
    pairs = torch.utils.data.TensorDataset(batch.images, batch.labels)
    assert len(h.fit(student, DataLoader(pairs, 4), valid, cfg)) == 1


def test_a_stopped_run_is_finished_for_any_number_of_processes():
    history = [{"valid_acc": v} for v in (0.5, 0.4, 0.3)]
    assert h.is_finished(history, h.Config(patience=2, n_epochs=9))
    assert not h.is_finished(history, h.Config(patience=3, n_epochs=9)) and h.is_finished(history, h.Config(n_epochs=3))


def test_replayed_views_want_a_batch_loader(food, teacher_file):
    cfg, data, _, valid, student = prepared(food, align_weights=(), teacher_views=2)
    loader = DataLoader(h.FoodDataset(data, "training", h.reference_transform(cfg, train=True)), 4)
    with pytest.raises(h.UserError, match="wants a BatchLoader"):
        h.fit(student, loader, valid, cfg, h.load_teacher(teacher_file))


def test_stored_views_give_what_the_teacher_gives(food, teacher_file, monkeypatch):
    settings = {"align_weights": (), "loss_schedule": "constant", "n_epochs": 4}
    cfg, _, train, valid, student = prepared(food, teacher_views=2, **settings)
    teacher, runs = h.load_teacher(teacher_file), []
    forward = teacher.forward
    teacher.forward = lambda x: runs.append(len(x)) or forward(x)
    h.fit(student, train, valid, cfg, teacher)
    assert sum(runs) == 2 * 22
    monkeypatch.setattr(h.TeacherViews, "read", lambda *a: None)
    again = h.build_student(cfg)
    h.fit(again, train, valid, cfg, teacher)
    assert h.state_checksum(again) == h.state_checksum(student) and sum(runs) == 6 * 22


def test_stored_views_of_something_else_are_refused(food, teacher_file):
    cfg, _, train, _, _ = prepared(food, align_weights=(), teacher_views=2)
    views = h.TeacherViews(cfg, train, "teacher a")
    assert h.TeacherViews(cfg, train, "teacher b").path != views.path
    assert h.TeacherViews(dataclasses.replace(cfg, rotation=10.0), train, "teacher a").path != views.path
    raw = views.path.read_bytes()
    for harm in (b"x" + raw[1:], raw[:-4]):
        views.path.write_bytes(harm)
        with pytest.raises(h.UserError, match="other pictures or settings"):
            h.TeacherViews(cfg, train, "teacher a")


def test_stored_views_go_on_after_a_kill(food):
    cfg, _, train, _, _ = prepared(food, align_weights=(), teacher_views=2)
    h.TeacherViews(cfg, train, "teacher c").write(1, torch.tensor([3, 5]), torch.ones(2, 11))
    again = h.TeacherViews(cfg, train, "teacher c")
    assert torch.equal(again.read(1, torch.tensor([5]), "cpu"), torch.ones(1, 11))
    assert again.read(1, torch.tensor([4, 5]), "cpu") is None and again.read(0, torch.tensor([5]), "cpu") is None


# --- stages ----------------------------------------------------------------------------------------------------------


def test_run_stage_refuses_a_student_above_the_limit_before_any_work(food, tmp_path, monkeypatch):
    monkeypatch.setattr(h, "load_data", lambda *a: pytest.fail("decoded"))
    cfg = h.get_config("strong", widths=(24, 32, 60))
    with pytest.raises(ValueError, match="homework allows 60,000"):
        h.run_stage(cfg, h.find_data(food), out=tmp_path / "out")
    with pytest.raises(ValueError, match="homework allows 60,000"):
        h.run(h.find_data(food), ["strong"], out=tmp_path / "out", widths=(24, 32, 60))
    assert not (tmp_path / "out").exists()


def test_a_changed_teacher_is_an_error(food, teacher_file, tmp_path, monkeypatch, tiny):
    teacher = h.load_teacher(teacher_file)
    original = h.fit

    def fit(*args, **kwargs):
        history = original(*args, **kwargs)
        with torch.no_grad():
            teacher.bn1.running_mean += 1
        return history

    monkeypatch.setattr(h, "fit", fit)
    with pytest.raises(RuntimeError, match="changed the teacher"):
        h.run_stage(h.get_config("medium", **tiny), h.find_data(food), teacher, tmp_path)


def test_run_says_what_is_wrong_with_a_later_stage_before_the_first_trains(food, teacher_file, tmp_path, monkeypatch,
                                                                           tiny):
    h.run(h.find_data(food), ["strong"], out=tmp_path, **tiny)
    monkeypatch.setattr(h, "fit", lambda *a: pytest.fail("trained"))
    with pytest.raises(h.UserError, match="other settings"):
        h.run(h.find_data(food), ["simple", "strong"], out=tmp_path, **tiny | {"lr": 0.5})


def test_run_without_a_teacher_leaves_stages_out_and_says_so(food, tmp_path, capsys, tiny):
    runs = h.run(h.find_data(food), out=tmp_path, **tiny)
    assert [run.name for run in runs] == ["simple"]
    out = capsys.readouterr().out
    assert out.count("left out, for it needs a teacher") == 4 and h.TEACHER_FILE in out
    with pytest.raises(h.UserError, match="no stage could run without a teacher"):
        h.run(h.find_data(food), ["boss"], out=tmp_path, **tiny)


def test_all_stages_end_in_a_table_and_a_submission(food, teacher_file, tmp_path, capsys):
    settings = {"image_size": 64, "n_epochs": 1, "batch_size": 8}
    runs = h.run(h.find_data(food), out=tmp_path, **settings)
    table = h.stage_table(runs)
    assert list(table.index) == list(h.STAGES) and (table["parameters"] <= h.PARAM_LIMIT).all()
    assert table["+- s.e."].iloc[0] == round(h.standard_error(runs[0].valid_acc, 11), 4)
    best = max(runs, key=lambda run: run.valid_acc)
    assert (tmp_path / "submission.csv").read_bytes() == best.csv.read_bytes()
    for run in runs:
        assert h.validate_submission(run.csv, 5) == 5 and run.folder == tmp_path / run.name
    capsys.readouterr()
    h.run(h.find_data(food), out=tmp_path, **settings)
    assert capsys.readouterr().out.count("finished before, loaded") == 5
    saved = json.loads((tmp_path / "boss/config.json").read_text())
    assert saved["config"]["n_epochs"] == 1 and len(saved["teacher"]) == 64


def test_a_public_copy_gets_an_accuracy_but_no_submission(tmp_path, capsys, tiny):
    from test_data import public_copy
    data = h.find_data(public_copy(tmp_path / "copy"))
    (run,) = h.run(data, ["simple"], out=tmp_path / "out", **tiny)
    out = capsys.readouterr().out
    assert "accuracy on 11 evaluation images" in out and "not the homework's split" in out
    assert run.csv.exists() and not (tmp_path / "out/submission.csv").exists() and "no submission.csv" in out


def test_an_own_teacher_can_teach(food, tmp_path, tiny):
    data = h.find_data(food)
    cfg = dataclasses.replace(h.TEACHER_CONFIG, **tiny)
    path = h.train_teacher(data, tmp_path, cfg)
    (run,) = h.run(data, ["medium"], path, tmp_path, **tiny)
    assert run.name == "medium" and len(run.history) == 2


def test_demo_results_never_meet_a_real_runs(food, tmp_path):
    demo = dataclasses.replace(h.find_data(food), origin="demo set (drawn, not photographs)")
    (run,) = h.run(demo, ["simple"], out=tmp_path, n_epochs=1)
    assert run.folder == tmp_path / "demo/simple" and run.cfg.image_size == 64
    assert (tmp_path / "submission_demo.csv").exists() and not (tmp_path / "submission.csv").exists()


def test_the_pace_names_the_end_and_what_to_change_where_a_kaggle_session_is_too_short(monkeypatch, tmp_path, capsys):
    (tmp_path / "working").mkdir()
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path))
    for n_epochs, short in ((10, False), (600, True)):
        display = h.RunDisplay(h.Config(n_epochs=n_epochs), 1000, [])
        display.bar.update(1000)
        display.tell_pace(100.0)
        display.bar.close()
        out = capsys.readouterr().out
        assert "10 images/s" in out and " to go, till " in out and "session has" in out
        assert ("choose LENGTH = 'lesson'" in out) == short
