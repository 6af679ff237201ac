"""What a run survives and what it says: kills, damaged files, a second run, the end of a session,
the stop button.
"""

import dataclasses
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from shared import same, without_seconds
from test_training import SMALL, prepared

import helpers as h

WORKER = [sys.executable, ROOT / "helpers.py", "run"]


def train(food, folder, stage="simple", fresh=False, **settings):
    """(history without seconds, checksum) of a fit into a folder."""
    loss_fn, _, train_loader, valid = prepared(food, stage, **settings)
    run_folder = None
    if folder:
        run_folder = h.RunFolder(folder, loss_fn, fresh=fresh)
    history = h.fit(loss_fn, train_loader, valid, run_folder)
    return [{**row, "seconds": 0} for row in history], h.state_checksum(loss_fn.student)


# --- kills ----------------------------------------------------------------------------------------


def test_killed_processes_leave_what_an_uninterrupted_one_leaves(food, teacher_file, tmp_path):
    """Three SIGKILLs at random moments of a run, then to the end: every byte is the same."""
    command = [
        *WORKER,
        "--data",
        food,
        "--stages",
        "boss",
        *(
            part
            for key, value in (SMALL | {"n_epochs": 6}).items()
            for part in ("--set", f"{key}={value}")
        ),
        "--out",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    subprocess.run([*command, tmp_path / "whole"], env=environment, check=True, capture_output=True)
    whole, rng = time.monotonic() - start, random.Random(3)
    for _ in range(3):
        process = subprocess.Popen(
            [*command, tmp_path / "cut"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(rng.uniform(0.4, 0.9) * whole)
        process.kill()
        process.wait()
    subprocess.run([*command, tmp_path / "cut"], env=environment, check=True, capture_output=True)
    for name in ("boss.csv", "submission.csv", "boss/student_best.ckpt", "boss/config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), (
            name
        )
    assert same(without_seconds(tmp_path / "whole/boss"), without_seconds(tmp_path / "cut/boss"))


# --- damaged and missing files --------------------------------------------------------------------


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "harm",
    [cut_short, os.remove, lambda p: p.write_bytes(b""), lambda p: torch.save({"other": 1}, p)],
)
def test_a_damaged_last_falls_back_to_the_save_before(food, tmp_path, harm, capsys):
    wanted = train(food, tmp_path / "whole")
    train(food, tmp_path / "cut", n_epochs=3)
    harm(tmp_path / "cut/last.ckpt")
    capsys.readouterr()
    assert train(food, tmp_path / "cut") == wanted
    out = capsys.readouterr().out
    assert "goes on after epoch 2" in out
    assert harm is os.remove or ("WARNING" in out and "last.ckpt" in out and "previous.ckpt" in out)
    assert same(without_seconds(tmp_path / "whole"), without_seconds(tmp_path / "cut"))


def test_two_damaged_saves_are_said_and_fresh_starts_again(food, tmp_path, capsys):
    wanted = train(food, tmp_path / "run", n_epochs=2)
    for name in ("last.ckpt", "previous.ckpt"):
        cut_short(tmp_path / "run" / name)
    with pytest.raises(h.UserError, match=r"last.ckpt is not loaded: it is damaged.*--fresh"):
        train(food, tmp_path / "run", n_epochs=2)
    assert "WARNING" not in capsys.readouterr().out and not (tmp_path / "run/damaged.ckpt").exists()
    assert train(food, tmp_path / "run", n_epochs=2, fresh=True) == wanted


def test_a_fallback_never_replaces_the_good_save_by_the_damaged_one(food, tmp_path, monkeypatch):
    """Killed right after the fallback's first write, the run still goes on."""
    wanted = train(food, tmp_path / "whole")
    train(food, tmp_path / "cut", n_epochs=3)
    cut_short(tmp_path / "cut/last.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(h, "train_epochs", lambda *a: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            train(food, tmp_path / "cut")
    cut_short(tmp_path / "cut/last.ckpt")
    assert train(food, tmp_path / "cut") == wanted


@pytest.mark.parametrize("name", ["student_best.ckpt", "config.json", "log.csv"])
@pytest.mark.parametrize("harm", [cut_short, lambda p: p.unlink()])
def test_what_was_lost_beside_last_is_written_again(food, tmp_path, name, harm):
    train(food, tmp_path / "run", n_epochs=1)
    before = (tmp_path / "run" / name).read_bytes()
    harm(tmp_path / "run" / name)
    train(food, tmp_path / "run", n_epochs=1)
    assert (tmp_path / "run" / name).read_bytes() == before


@pytest.mark.parametrize(
    "harm",
    [
        lambda s: s | {"facts": 3},
        lambda s: s | {"facts": "{}"},
        lambda s: [1],
        lambda s: s | {"history": [1]},
        lambda s: {"facts": s["facts"]},
    ],
)
def test_a_checkpoint_with_other_contents_is_one_sentence(food, tmp_path, harm):
    train(food, tmp_path / "run", n_epochs=1)
    saved = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    for name in ("last.ckpt", "previous.ckpt"):
        torch.save(harm(saved), tmp_path / "run" / name)
    with pytest.raises(h.UserError, match="is no run of this program; --fresh"):
        train(food, tmp_path / "run", n_epochs=1)


def test_a_checkpoint_with_a_part_missing_is_one_sentence(food, tmp_path):
    train(food, tmp_path / "run", n_epochs=1)
    saved = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    torch.save(
        {key: value for key, value in saved.items() if key != "optimizer"},
        tmp_path / "run/last.ckpt",
    )
    with pytest.raises(h.UserError, match="another student or program.*optimizer"):
        train(food, tmp_path / "run", n_epochs=1)


def test_another_student_of_the_same_settings_is_refused(food, tmp_path, monkeypatch):
    """A learner edits the builder between two runs: weights may fit, but it is another net."""
    train(food, tmp_path / "run", n_epochs=1)
    original = h.NETS["sample"]

    def edited(cfg):
        net = original(cfg)
        net.relu1 = torch.nn.SiLU()
        return net

    monkeypatch.setitem(h.NETS, "sample", edited)
    with pytest.raises(h.UserError, match="other settings: the layers of the student"):
        train(food, tmp_path / "run", n_epochs=1)


def test_a_picture_that_cannot_be_read_now_stops_and_is_not_remembered_as_broken(food, monkeypatch):
    original = h.Image.open

    def flaky(path):
        if str(path).endswith("3_1.jpg"):
            raise OSError(5, "Input/output error")
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(h.Image, "open", flaky)
        with pytest.raises(h.UserError, match="3_1.jpg cannot be decoded.*Input/output error"):
            h.load_data(h.find_data(food), "training", "whole", 72)
    assert len(h.load_data(h.find_data(food), "training", "whole", 72)) == 22


def test_damaged_pictures_are_said_at_every_use_and_a_cache_of_zeros_is_made_again(food, capsys):
    (food / "training/3_1.jpg").write_bytes(b"no picture")
    (food / "evaluation/0001.jpg").write_bytes(b"no picture")
    data = h.find_data(food)
    for split, n in (("training", 21), ("evaluation", 5)):
        made = h.load_data(data, split, "whole", 76)
        images = made.images.clone()
        assert ("3_1.jpg" if split == "training" else "0001.jpg") in capsys.readouterr().out
        assert len(h.load_data(data, split, "whole", 76)) == n
        out = capsys.readouterr().out
        assert f"WARNING: 1 of {22 if split == 'training' else 5} {split} images are damaged" in out
        size = made.cache.stat().st_size
        del made
        path = next(h.cache_root().glob(f"{split}-whole-76-*"))
        path.unlink()
        path.write_bytes(bytes(size))
        assert torch.equal(h.load_data(data, split, "whole", 76).images, images)


def test_what_killed_writers_left_is_cleared_after_a_day(tmp_path):
    old, new, other = (tmp_path / name for name in (".a.txt.1.tmp", ".a.txt.2.tmp", ".b.txt.1.tmp"))
    for path in (old, new, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (time.time() - 90_000,) * 2)
    h.write_text(tmp_path / "a.txt", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.txt.2.tmp", ".b.txt.1.tmp", "a.txt"]


def test_a_save_that_fails_leaves_last_and_its_predecessor_alone(tmp_path, monkeypatch):
    for value in (1, 2):
        h.save_checkpoint(value, tmp_path / "last.ckpt", "previous.ckpt")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(h.os, "fsync", full)
        with pytest.raises(h.UserError, match="No space left"):
            h.save_checkpoint(3, tmp_path / "last.ckpt", "previous.ckpt")
    assert [
        torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("last", "previous")
    ] == [2, 1]


def test_a_run_survives_that_its_folder_vanishes(food, tmp_path, monkeypatch):
    """Between two epochs somebody removes the folder: it is made again, and all four files are
    there at the end.
    """
    wanted = train(food, tmp_path / "whole")
    original, calls = h.evaluate, []

    def evaluate(*args):
        calls.append(1)
        if len(calls) == 3:
            for path in (tmp_path / "run").iterdir():
                path.unlink()
        return original(*args)

    monkeypatch.setattr(h, "evaluate", evaluate)
    assert train(food, tmp_path / "run") == wanted
    assert {"config.json", "last.ckpt", "log.csv", "student_best.ckpt"} <= set(
        os.listdir(tmp_path / "run")
    )


def test_a_full_disk_is_one_sentence_and_what_was_saved_stays(food, tmp_path, monkeypatch):
    train(food, tmp_path / "run", n_epochs=1)
    before = (tmp_path / "run/last.ckpt").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(h.os, "fsync", full)
    with pytest.raises(h.UserError, match="No space left on device.*what was saved is intact"):
        train(food, tmp_path / "run", n_epochs=2)
    assert (tmp_path / "run/last.ckpt").read_bytes() == before
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.endswith(".tmp")]


# --- two runs on one folder -----------------------------------------------------------------------


def test_a_second_run_on_a_folder_is_refused_and_a_killed_one_holds_nothing(food, tmp_path):
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import helpers as h\n"
        f"with h.locked({str(tmp_path / 'run')!r}): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(h.UserError, match="another run is working in .*run"):
        train(food, tmp_path / "run")
    with pytest.raises(h.UserError, match="another run"):
        h.run(h.find_data(food), ["simple"], out=tmp_path / "run", **SMALL)
    process.kill()
    process.wait()
    assert len(train(food, tmp_path / "run")[0]) == 4


# --- time -----------------------------------------------------------------------------------------


def test_a_run_ends_before_its_time_is_up_and_goes_on_later(food, tmp_path, monkeypatch, capsys):
    wanted = train(food, tmp_path / "whole")
    clock = iter(range(0, 100_000, 60))
    with monkeypatch.context() as patch:
        patch.setattr(h, "SESSION_START", 0)
        patch.setattr(h.time, "time", lambda: next(clock))
        history, _ = train(food, tmp_path / "cut", time_limit_h=0.05)  # 180 s, 18 of them kept free
    assert len(history) == 3 and "ends after epoch 3 of 4" in capsys.readouterr().out
    assert train(food, tmp_path / "cut") == wanted


def test_a_stage_for_which_no_time_is_left_still_ends_in_a_csv(food, tmp_path, monkeypatch):
    monkeypatch.setattr(h, "SESSION_START", time.time() - 3600)
    (run,) = h.run(h.find_data(food), ["simple"], out=tmp_path, **SMALL, time_limit_h=0.5)
    assert len(run.history) == 0 and h.validate_submission(run.csv, 5) == 5 and run.student()
    assert h.stage_table([run]).loc["simple", "epochs"] == 0 and h.plot_history([run])


def test_the_limit_is_kaggles_own_there_and_none_elsewhere(monkeypatch, tmp_path):
    cfg, cpu = h.Config(), torch.device("cpu")
    monkeypatch.setattr(h, "SESSION_START", time.time() - 11.6 * 3600)
    assert not h.time_is_up(cfg, [], cpu)
    (tmp_path / "working").mkdir()
    monkeypatch.setenv("HW13_KAGGLE", str(tmp_path))
    assert h.time_is_up(cfg, [], cpu) and not h.time_is_up(
        dataclasses.replace(cfg, time_limit_h=20.0), [], cpu
    )
    monkeypatch.setattr(h, "SESSION_START", time.time() - 9 * 3600)
    assert not h.time_is_up(cfg, [{"seconds": 60}], cpu) and h.time_is_up(
        cfg, [{"seconds": 5000}], cpu
    )


# --- the stop button ------------------------------------------------------------------------------


def test_the_stop_button_leaves_the_best_student_and_the_cell_goes_on(
    food, tmp_path, monkeypatch, capsys
):
    wanted = train(food, tmp_path / "whole")
    original, calls = h.BatchLoader.views_of, []

    def interrupted(loader, rows, draw=None):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return original(loader, rows, draw)

    with monkeypatch.context() as patch:
        patch.setattr(h.BatchLoader, "views_of", interrupted)
        patch.setattr(h, "in_notebook", lambda: True)
        patch.setattr(
            h, "progress_bar", lambda total, desc, initial=0: h.tqdm(total=total, disable=True)
        )
        run = h.run_stage(h.get_config("simple", **SMALL), h.find_data(food), out=tmp_path / "cut")
    assert len(run.history) == 2 and h.validate_submission(run.csv, 5) == 5
    assert "stopped after epoch 2" in capsys.readouterr().out
    again = h.run_stage(h.get_config("simple", **SMALL), h.find_data(food), out=tmp_path / "cut")
    assert h.state_checksum(again.student()) == wanted[1]


def test_without_a_notebook_an_interrupt_stays_one(food, tmp_path, monkeypatch):
    monkeypatch.setattr(h, "train_one_epoch", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(food, tmp_path / "run")


# --- a second session on Kaggle -------------------------------------------------------------------


@pytest.fixture
def kaggle(tmp_path, food, monkeypatch):
    """A simulated /kaggle with the data attached."""
    root = tmp_path / "kaggle"
    (root / "working").mkdir(parents=True)
    (root / "input").mkdir()
    food.rename(root / "input/ml2023spring-hw13")
    monkeypatch.setenv("HW13_KAGGLE", str(root))
    return root


def test_an_earlier_sessions_output_is_gone_on_from(kaggle, tmp_path, capsys):
    data = h.find_data()
    wanted = h.run_stage(h.get_config("simple", **SMALL), data, out=tmp_path / "whole")
    h.run_stage(h.get_config("simple", **SMALL | {"n_epochs": 2}), data)
    earlier = kaggle / "input/datasets/somebody/first-session"
    earlier.parent.mkdir(parents=True)
    (kaggle / "working").rename(earlier)
    (kaggle / "working").mkdir()
    for path in sorted(earlier.rglob("*")) + [earlier]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    capsys.readouterr()
    run = h.run_stage(h.get_config("simple", **SMALL), data)
    out = capsys.readouterr().out
    assert f"goes on after epoch 2 from {earlier / 'simple'}" in out
    assert run.folder == kaggle / "working/simple" and len(run.history) == 4
    assert h.state_checksum(run.student()) == h.state_checksum(wanted.student())
    for path in sorted(earlier.rglob("*")) + [earlier]:
        path.chmod(0o755)


def test_a_run_begun_without_the_input_does_not_hide_it(kaggle, capsys):
    data = h.find_data()
    h.run_stage(h.get_config("simple", **SMALL | {"n_epochs": 3}), data)
    (kaggle / "working").rename(kaggle / "input/first")
    (kaggle / "working").mkdir()
    (kaggle / "input/first").rename(kaggle / "elsewhere")
    h.run_stage(h.get_config("simple", **SMALL | {"n_epochs": 1}), data)
    (kaggle / "elsewhere").rename(kaggle / "input/first")
    capsys.readouterr()
    h.run_stage(h.get_config("simple", **SMALL), data)
    assert "goes on after epoch 3 from" in capsys.readouterr().out


def test_an_earlier_session_with_other_settings_is_ignored_and_said(kaggle, capsys):
    data = h.find_data()
    h.run_stage(h.get_config("simple", **SMALL | {"lr": 0.5}), data)
    (kaggle / "working").rename(kaggle / "input/first")
    (kaggle / "working").mkdir()
    run = h.run_stage(h.get_config("simple", **SMALL), data)
    out = capsys.readouterr().out
    assert "ignored: " in out and "lr 0.5 (now 0.001)" in out and len(run.history) == 4


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_names_the_settings_that_would_fit(food, monkeypatch, error):
    def hungry(*args):
        raise error

    monkeypatch.setattr(h, "train_one_epoch", hungry)
    with pytest.raises(
        h.UserError,
        match="simple: out of memory with batch_size=8, image_size=64: set batch_size=4",
    ):
        train(food, None)
    monkeypatch.setattr(
        h, "train_one_epoch", lambda *a: (_ for _ in ()).throw(RuntimeError("a bug"))
    )
    with pytest.raises(RuntimeError, match="a bug"):
        train(food, None)


# --- the final fit --------------------------------------------------------------------------------


def test_the_final_fit_repeats_a_stage_on_all_labelled_images(food, tmp_path, capsys):
    data = h.find_data(food)
    (run,) = h.run(data, ["simple"], out=tmp_path, **SMALL)
    before = (tmp_path / "submission.csv").read_bytes()
    path = h.final_fit(run, data, out=tmp_path)
    out = capsys.readouterr().out
    best = int(run.history["valid_acc"].argmax()) + 1
    assert (
        f"for {best} epochs on 33 images; it has no validation score" in out
        and "simple_final" in out
    )
    assert (
        h.validate_submission(path, 5) == 5 and (tmp_path / "submission.csv").read_bytes() == before
    )
    log = (tmp_path / "simple_final/log.csv").read_text().splitlines()
    assert len(log) == best + 1 and log[1].split(",")[5] == ""
    state = torch.load(tmp_path / "simple_final/last.ckpt", weights_only=True)
    assert all(torch.equal(v, state["loss_fn"][f"student.{k}"]) for k, v in state["best"].items())
    h.final_fit(run, data, out=tmp_path, submit_it=True)
    assert (tmp_path / "submission.csv").read_bytes() == path.read_bytes()
    assert (
        h.main(
            [
                "evaluate",
                "--data",
                str(food),
                "--checkpoint",
                str(tmp_path / "simple_final/student_best.ckpt"),
            ]
        )
        == 2
    )
    assert "it has no validation accuracy" in capsys.readouterr().err


def test_the_final_fit_follows_a_stage_that_went_on_and_submits_nothing_unfinished(
    food, tmp_path, monkeypatch, capsys
):
    data = h.find_data(food)
    (run,) = h.run(data, ["simple"], out=tmp_path, final="csv", **SMALL)
    moved = dataclasses.replace(run, history=run.history.assign(valid_acc=[0.0, 0.1, 0.2, 0.3]))
    assert h.final_fit(moved, data, out=tmp_path) == tmp_path / "simple_final.csv"
    assert "for 4 epochs" in capsys.readouterr().out
    (tmp_path / "simple_final.csv").unlink()
    before = (tmp_path / "submission.csv").read_bytes()
    monkeypatch.setattr(h, "time_is_up", lambda *a: True)
    assert h.final_fit(moved, data, out=tmp_path, fresh=True, submit_it=True) is None
    assert (
        h.final_fit(dataclasses.replace(run, history=run.history[:0]), data, out=tmp_path) is None
    )
    out = capsys.readouterr().out
    assert "not finished, so no CSV is written" in out and "no final fit" in out
    assert (tmp_path / "submission.csv").read_bytes() == before and not (
        tmp_path / "simple_final.csv"
    ).exists()


def test_stages_after_an_unfinished_one_wait_and_a_half_trained_teacher_does_not_teach(
    food, tmp_path, monkeypatch, capsys
):
    data = h.find_data(food)
    monkeypatch.setattr(h, "time_is_up", lambda cfg, history, device: len(history) == 2)
    configs = {
        "simple": h.STAGES["simple"],
        "second": dataclasses.replace(h.STAGES["simple"], exp_name="second"),
    }
    monkeypatch.setattr(h, "STAGES", configs)
    runs = h.run(data, ["simple", "second"], out=tmp_path, **SMALL)
    assert [run.name for run in runs] == [
        "simple"
    ] and "left for the next time" in capsys.readouterr().out
    with pytest.raises(h.UserError, match="half-trained one must not teach"):
        h.train_teacher(data, tmp_path, dataclasses.replace(h.TEACHER_CONFIG, **SMALL))


# --- values ---------------------------------------------------------------------------------------


def test_random_arguments_give_one_sentence_and_no_run(food, tmp_path, monkeypatch, capsys):
    """600 command lines of random words: exit code 2 and one line each, unless what is asked for is
    usable.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(h, "run", lambda *a, **k: [])
    monkeypatch.setattr(h, "stage_table", lambda runs: h.pd.DataFrame())
    rng = random.Random(1)
    words = [
        "run",
        "evaluate",
        "predict",
        "validate",
        "export-",
        "--data",
        str(food),
        "--demo-",
        "--out",
        "--stages",
        "simple",
        "boss,boss",
        "--teacher",
        "--set",
        "lr=1",
        "lr=",
        "=",
        "lr=nan",
        "widths=1,2",
        "depths=(1,)",
        "student=resnet50",
        "--fresh",
        "--rows",
        "3",
        "-1",
        "x",
        "",
        "\x00",
        "--length",
        "full",
        "long",
        "--final",
        "csv",
        "--tta",
        "--checkpoint",
        str(food),
        "crop_scale=0.5,0.2",
        "n_epochs=1e9",
        "time_limit_h=-1",
        "é",
    ]
    refused = 0
    for _ in range(600):
        arguments = [rng.choice(words[:5])] + [rng.choice(words) for _ in range(rng.randint(0, 6))]
        code = h.main(arguments)
        captured = capsys.readouterr()
        assert code in (0, 2), arguments
        if code == 2:
            refused += 1
            assert captured.err.startswith("helpers.py: ") and captured.err.count("\n") == 1, (
                arguments
            )
    assert refused > 500
